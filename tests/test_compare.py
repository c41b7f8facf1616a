"""`clip_jax.compare`: what it reads of work folders, its tables, its page, the queries that runs keep; TensorBoard."""

import json

import numpy as np
import pytest
from helpers import Page, events, tiny_config

from clip_jax import compare, evaluate, run_folder
from clip_jax.errors import UserError
from clip_jax.evaluation.report import queries
from clip_jax.evaluation.report.figures import Retrieval
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.results import EvalResult
from clip_jax.runtime import storage
from clip_jax.training import metrics


def write_run(folder, *overrides, loss=1.0, steps=(10, 20), top1=(0.2, 0.4), cost=None, history=()):
    """Writes the files of a run that was evaluated at two steps."""
    config = tiny_config("train.steps=20", *overrides)
    folder.mkdir(parents=True)
    run_folder.record(folder, config, 0)
    for step, changes in history:
        row = {"step": step, "time": 1.0, "changes": changes}
        with (folder / run_folder.HISTORY).open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = []
    for step, value in zip(steps, top1, strict=True):
        rows.append({"step": step, "time": 100.0 + step, "loss": loss / step, "lr": 1e-3, "goodput": 0.5, "t_acc": 0.1})
        fixed = {"pets/images": 100.0, "pets/majority_top1": 0.1}
        rows.append({"step": step, "time": 100.5 + step, "pets/top1": value, "pets/loss": 2.0} | fixed)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    if cost:
        (folder / run_folder.MACHINE).write_text(json.dumps(cost))
    return folder


COST = {"parameters": 12_345, "flops_per_example": 1e9, "devices": 4, "device": "TPU v4"}


@pytest.fixture
def pair(tmp_path):
    a = write_run(tmp_path / "a" / "seed_0", cost=COST)
    b = write_run(
        tmp_path / "b" / "seed_0", "optim.lr=0.5", "data.batch_size=8", loss=2.0, top1=(0.1, 0.3), cost=COST,
        history=[(10, {"data.batch_size": [32, 8], "optim.lr": [1.0, 0.5]})],
    )  # fmt: skip
    return a, b


def table(rows):
    return {row[0]: row[1:] for row in rows}


def test_tables_of_two_runs(pair):
    runs = [compare.read_run(path, name) for path, name in zip(pair, compare.names(pair), strict=True)]
    assert [run.name for run in runs] == ["a/seed_0", "b/seed_0"]
    assert table(compare.differing(runs)) == {"data.batch_size": ["16", "8"], "optim.lr": ["0.3", "0.5"]}
    costs = table(compare.costs(runs))
    assert costs["examples"] == ["320", "400"]  # 20 * 16; 10 * 32 + 10 * 8
    assert costs["FLOPs of the training"] == ["3.2e+11", "4e+11"] and costs["parameters"] == ["12,345"] * 2
    assert costs["machine"] == ["4 x TPU v4"] * 2 and costs["steps"] == ["20", "20"]
    assert costs["training loss"] == [f"{np.mean([0.1, 0.05]):.4f}", f"{np.mean([0.2, 0.1]):.4f}"]
    assert costs["time"] == ["10s so far"] * 2
    rows = {cells[0]: (cells[1:], best) for cells, best in compare.results(runs)}
    assert rows["pets/top1"] == (["40.00\u202f% (±\u202f9.6)", "30.00\u202f% (±\u202f9.0)"], {1})
    assert rows["pets/loss"] == (["2", "2"], set()) and not {"pets/images", "pets/majority_top1"} & set(rows)
    assert compare.changes(runs) == [
        ["b/seed_0", "10", "data.batch_size", "32", "8"], ["b/seed_0", "10", "optim.lr", "1.0", "0.5"]
    ]  # fmt: skip


def test_a_fork_counts_its_own_examples_and_the_times_of_a_complete_run(tmp_path):
    run = write_run(tmp_path / "a")
    row = {"step": 5, "time": 1.0, "changes": {}, "forked_from": "runs/x/checkpoints/5"}
    (run / run_folder.HISTORY).write_text(json.dumps(row) + "\n")
    seconds = {f"seconds/{part}": 60.0 for part in ("training", "data", "checkpoint", "evaluation")}
    seconds |= {f"seconds/{part}": 0.0 for part in ("compiling", "starting", "lost")}
    lines = (run / "metrics.jsonl").read_text().replace('{"step": 3', json.dumps({"step": 20, "time": 9e9} | seconds))
    (run / "metrics.jsonl").write_text(lines)
    costs = table(compare.costs([compare.read_run(run, "a")]))
    assert costs["examples"] == ["240"] and costs["time"] == ["4m00s"]
    assert costs["steps"] == ["20, after 5 of runs/x/checkpoints/5"] and "parameters" not in costs


def test_the_page_and_what_is_printed(pair, tmp_path, capsys):
    (pair[0] / "evaluations").mkdir()
    (pair[0] / "evaluations" / "15.json").write_text('{"pets/top1": 0.9}')
    assert compare.main([*map(str, pair), f"--html={tmp_path}/page.html"]) == 0
    out = capsys.readouterr().out
    assert f"page: {tmp_path}/page.html" in out and "optim.lr" in out and "model.embed_dim" not in out
    page = Page((tmp_path / "page.html").read_text())
    charts = page.data["charts"]
    assert [[name for name, *_ in chart["curves"]] for chart in charts] == [["a/seed_0", "b/seed_0"]] * len(charts)
    top1 = next(chart for chart in charts if chart["curves"][0][2] == [0.2, 0.9, 0.4])
    assert top1["curves"][0][1] == [10, 15, 20] and top1["curves"][1][2] == [0.1, 0.3]
    for text in (
        "Differences",
        "The last evaluations (a/seed_0: step 20, b/seed_0: step 20)",
        "Changes within the runs",
    ):
        assert text in page.text
    assert "Queries" not in page.text


def test_what_is_older_than_the_last_step_says_so(tmp_path):
    """A run that was complete and is longer now; a metric that was not evaluated at the end; a metric that is NaN."""
    folder = write_run(tmp_path / "a")
    parts = "training data checkpoint evaluation compiling starting lost".split()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for row in ({f"seconds/{part}": 60.0 for part in parts}, {"cats/top1": 0.25}):
            file.write(json.dumps({"step": 10, "time": 115.0} | row) + "\n")
    (folder / "evaluations").mkdir()
    for step in (10, 20):
        (folder / "evaluations" / f"{step}.json").write_text('{"dogs/score": NaN}')
    run = compare.read_run(folder, "a")
    assert table(compare.costs([run]))["time"] == ["10s so far"]
    rows = {cells[0]: cells[1] for cells, _ in compare.results([run])}
    assert rows["cats/top1"] == "25.00\u202f% (step 10)" and "step" not in rows["pets/top1"]
    compare.write([run, run], tmp_path / "page.html")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="a/config.json is no configuration: "):
        compare.read_run(folder, "a")


def test_a_metric_of_one_run_keeps_the_colours(tmp_path):
    a, b = write_run(tmp_path / "a", steps=(10,), top1=(0.1,)), write_run(tmp_path / "b")
    (a / "metrics.jsonl").write_text("")
    text = compare.write([compare.read_run(p, p.name) for p in (a, b)], tmp_path / "page.html").read_text()
    page = Page(text)
    assert all([name for name, *_ in chart["curves"]] == ["b"] for chart in page.data["charts"])
    assert '<path class="line c1" d="M' in text and '<path class="line c0" d=""' in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{a}"], "name two work folders or more"),
        (["{a}", "{a}"], "a run is named twice"),
        (["{a}", "{a}/none"], "/none is no work folder: it has neither config.json nor metrics.jsonl"),
        (["{a}", "--htm=x"], "unknown argument '--htm=x'"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, arguments, message, capsys):
    run = write_run(tmp_path / "a")
    assert compare.main([text.replace("{a}", str(run)) for text in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def result():
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (9, 7, 3), np.uint8)} for _ in range(6)]
    texts = [f"text {i} <b>" for i in range(6)]
    ids = np.arange(6)
    order = np.stack([np.roll(ids, -i) for i in range(6)])
    retrieval = Retrieval(texts, ids, ids, order, order[::-1], images)
    classes = Classification(["cat", "dog"], ids % 2, np.tile([0, 1], (6, 1)), np.ones((6, 2)), images, [""] * 6)
    return EvalResult({"pets/top1": 0.5}, {"retrieval": {"flickr": retrieval}, "classification": {"pets": classes}})


def test_queries_of_an_evaluation(tmp_path, monkeypatch):
    found = queries.collect(result())
    assert {title: len(rows) for title, rows in found.items()} == {
        "flickr: from text to image": 6, "flickr: from image to text": 6, "pets: classes": 6
    }  # fmt: skip
    first = found["flickr: from image to text"][1]
    assert first["query"] == "text 1 <b>" and first["image"].startswith("data:image/webp;base64,")
    assert [answer["text"][5] for answer in first["answers"]] == list("12345")
    assert [answer["right"] for answer in first["answers"]] == [True, False, False, False, False]
    back = found["flickr: from text to image"][0]["answers"]
    assert [answer["right"] for answer in back] == [False, True, False, False, False]  # 5, 0, 1, 2, 3
    assert [a["text"] for a in found["pets: classes"][1]["answers"] if a["right"]] == ["dog"]

    (tmp_path / "metrics.jsonl").touch()
    evaluate.write_report(tmp_path, tiny_config(), EvalResult({}), tmp_path / "elsewhere.html")
    assert not (tmp_path / queries.FILE).exists(), "beside a running training, nothing but the page is written"
    queries.write(tmp_path, result())
    kept = json.loads((tmp_path / queries.FILE).read_text())
    assert kept == found
    other = json.loads(json.dumps(found))
    other["pets: classes"][0]["query"] = "cow"
    drawn = queries.side_by_side({"run <1>": kept, "run 2": other})
    assert drawn.count("run &lt;1&gt;") == 6 + 6 + 5 and "cow" not in drawn and "<b>text" not in drawn
    assert drawn.count("class=hit") == 2 * sum(
        a["right"] for q in found["flickr: from text to image"] for a in q["answers"]
    )
    assert queries.side_by_side({"a": {}, "b": kept}) == ""
    assert queries.side_by_side({"a": {"pets: classes": "x"}, "b": {"pets: classes": [{"answers": [3]}]}}) == ""


def test_tensorboard_has_the_documented_names(tmp_path):
    config = tiny_config("log.tensorboard=true")
    writer = metrics.Writer(storage.path(tmp_path), config)
    writer.write(7, {"loss": 1.0, "flickr/image_to_text_R@1": 0.5})
    writer.close()
    assert events(tmp_path / "tensorboard") == {("loss", 7), ("flickr/image_to_text_R@1", 7)}
