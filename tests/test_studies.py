"""Tuning, intervals, the figure, the report, and the studies in configs/studies."""

import functools
import importlib
import json
import math
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from conftest import REPO
from helpers import TINY, Page

from clip_jax import study, train
from clip_jax.data.sources import make
from clip_jax.errors import UserError
from clip_jax.evaluation import outcomes
from clip_jax.evaluation.results import Outcomes
from clip_jax.evaluation.tasks import parse_tasks
from clip_jax.studies import definition, intervals, runs
from clip_jax.study import Row, Study

CELLS = "emoji/seen_concept_unseen_vendor/top1", "emoji/unseen_concept_unseen_vendor/top1"
VAL = "emoji_val/unseen_concept_seen_vendor/top1"
VAL_TASK = "emoji(subset='val')"
CLIP = str(REPO / "configs" / "clip.py:emoji")
MAKE_PART = make._make_part


def pretend(run, **values):
    """Writes the files of a complete run: `values` are the outcomes of each metric, "a", "b" or "val"."""
    run.folder.mkdir(parents=True)
    names = {"a": CELLS[0], "b": CELLS[1], "val": VAL}
    kept = {names[key]: Outcomes(np.asarray(v, np.float32), np.arange(len(v)) // 2) for key, v in values.items()}
    row = {"step": run.steps, "time": 0.0, "seconds/training": 120.0, "seconds/data": 30.0}
    row |= {name: float(found.values.mean()) for name, found in kept.items()}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run.folder / "run.json").write_text(json.dumps({"step_bytes": 3 * 2**20}))
    outcomes.write(run.folder / outcomes.FILE, run.steps, kept)


def small_study(**fields):
    rows = (
        Row("CLIP", CLIP, (*TINY, "train.steps=8"), tune=("optim.lr", (0.1, 0.2, 0.3)), line="CLIP"),
        Row("like CLIP", CLIP, (*TINY, "train.steps=8"), tuned_as="CLIP", line="like CLIP"),
    )
    fields = dict(tasks=("emoji()",), tune_tasks=(VAL_TASK,), tune_metric=VAL) | fields
    return Study("Small & <b>", fields.pop("rows", rows), {"both vendors": CELLS}, equal_compute=True, **fields)


def test_values_are_tried_for_half_of_the_steps_and_the_best_one_is_trained(tmp_path, capsys, monkeypatch):
    two = small_study(question="Which & why?", claim="None.")
    study.run_study(two, tmp_path / "s", 2, [], dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert [re.search(r"lr=(\S+)", line)[1] for line in commands] == ["0.1", "0.2", "0.3", *["CHOSEN"] * 4]
    assert ["--config.train.steps=4 " in line for line in commands] == [True] * 3 + [False] * 4
    assert ["emoji(subset=" in line for line in commands] == [True] * 3 + [False] * 4
    assert lines[3].startswith("# CHOSEN") and not (tmp_path / "s").exists()

    study.run_study(two, tmp_path / "s", 1, [], dry_run=True, length=0.5)
    lines = capsys.readouterr().out.splitlines()
    steps = [re.findall(r"train\.steps=(\d+)", line)[-1] for line in lines if not line.startswith("#")]
    assert steps == ["2"] * 3 + ["4"] * 2, "tuning has half of the steps"

    trained = []

    def pretend_to_train(run):
        trained.append(run)
        right = {"0.1": [0, 0, 0, 1], "0.2": [1, 1, 0, 1], "0.3": [1, 1, 1, 0]}
        if run.value:
            pretend(run, val=right[run.value])
        else:
            pretend(run, a=[1, 0, 1, run.seed], b=[0, 0] if run.row.name == "CLIP" else [1, 1])

    monkeypatch.setattr(runs, "train", pretend_to_train)
    study.run_study(two, tmp_path / "s", 2, [], line="python -m x")
    out = capsys.readouterr().out
    order = [(run.row.name, run.seed, run.value) for run in trained]
    assert order == [("CLIP", 0, "0.1"), ("CLIP", 0, "0.2"), ("CLIP", 0, "0.3")] + [
        (name, seed, "") for seed in (0, 1) for name in ("CLIP", "like CLIP")
    ]
    assert all("--config.optim.lr=0.2" in run.command for run in trained[3:])  # the first of two equal values
    about = json.loads((tmp_path / "s" / "study.json").read_text())
    assert about["chosen"] == {"CLIP": "0.2", "like CLIP": "0.2"} and about["done"] == [7, 7]
    assert about["tried"]["CLIP"] == {"0.1": 0.25, "0.2": 0.75, "0.3": 0.75}
    table = [dict(zip(about["table"][0], row, strict=True)) for row in about["table"][1:]]
    # Cell "a" has 4 pictures and "b" 2: a pooled share is one of 6.
    assert table[0]["both vendors"].startswith("41.67 ± 11.79") and table[1]["both vendors"].startswith("75.00")
    assert (table[0]["minutes"], table[0]["MiB"], table[0]["tuned"]) == ("2.5", "3", "lr 0.2")
    (difference,) = about["differences"][1:]
    assert difference[:3] == ["like CLIP", "CLIP", "2"] and difference[3].startswith("+33.33 [")
    assert "| like CLIP" in out and "0.2: 75.00 (chosen)" in out
    page = Page((tmp_path / "s" / "study.html").read_text())
    assert "Which & why?" in page.text and "Small & <b>" in page.text and "python -m x" in page.text
    assert page.find("img")[0]["src"].startswith("data:image/svg+xml")

    study.run_study(two, tmp_path / "s", 2, [])  # nothing is repeated
    assert len(trained) == 7
    assert study.main(["--report", str(tmp_path / "s"), f"--out={tmp_path / 'all.html'}"]) == 0
    page = Page((tmp_path / "all.html").read_text())
    assert "like CLIP" in page.text and "0.2: 75.00 (chosen)" in page.text


def test_a_row_after_another_gets_its_folder_and_an_index(tmp_path, capsys):
    command = ("clip_jax.tools.clip_score", "--source=emoji", "--checkpoint={after}", "--keep=0.5")
    source = "data.source=emoji{index}"
    rows = (
        Row("CLIP", CLIP, (*TINY, "train.steps=8")),
        Row("filtered", CLIP, (*TINY, source), after="CLIP", index=command),
        Row("plain", CLIP, TINY),
    )
    three = Study("", rows, {"x": VAL}, tasks=(VAL_TASK,))
    study.run_study(three, tmp_path, 2, [], dry_run=True, length=0.5)
    lines = capsys.readouterr().out.splitlines()
    places = [re.search(r"--(?:workdir|out)=(\S+)", line)[1].removeprefix(f"{tmp_path}/") for line in lines]
    firsts = ["CLIP/seed_0", "plain/seed_0", "filtered/index", "filtered/seed_0"]
    assert places == [*firsts, "CLIP/seed_1", "filtered/seed_1", "plain/seed_1"]
    assert f"--checkpoint={tmp_path}/CLIP/seed_0" in lines[2]
    assert f"emoji?index={tmp_path}/filtered/index" in lines[3]
    steps = [re.findall(r"train\.steps=(\d+)", line)[-1] for line in lines if "clip_jax.train" in line]
    assert steps == ["4", "3", "3", "4", "3", "3"], "half of the steps of CLIP, 8, and of the others, 6"
    with pytest.raises(UserError, match="--length=0.5 halves"):
        study.run_study(three, tmp_path, 2, ["train.steps=4"], dry_run=True)


def test_the_interval_is_that_of_two_way_clusters():
    rng = np.random.default_rng(0)
    groups = np.array([3, 3, 9, 1, 1, 1])
    a, b = rng.random((2, 3, 6)).round().astype(np.float32)
    found = intervals.paired(*([Outcomes(row, groups) for row in x] for x in (a, b)))
    d = a.astype(float) - b
    e = (d - d.mean()) / d.size

    def variance(cluster_of):
        sums = {}
        for (s, i), value in np.ndenumerate(e):
            sums[cluster_of(s, i)] = sums.get(cluster_of(s, i), 0.0) + value
        return len(sums) / (len(sums) - 1) * sum(x**2 for x in sums.values())

    by_thing, by_seed = variance(lambda s, i: groups[i]), variance(lambda s, i: s)
    total = max(by_thing + by_seed - variance(lambda s, i: (s, groups[i])), by_thing, by_seed)
    from scipy.stats import t

    half = t.ppf(0.975, total**2 / (by_thing**2 / 2 + by_seed**2 / 2)) * total**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    assert (found.seeds, found.images, found.things) == (3, 6, 3)


def test_the_interval_covers_the_true_difference():
    """Two rows of equal accuracy, with effects of things, of seeds and of both: about 5 % of the intervals miss 0."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(400):
        shift = rng.normal(0, 0.5, 40)[np.arange(120) // 3] + rng.normal(0, 0.3, (4, 1)) + rng.normal(0, 1, (4, 120))
        a, b = (shift > 0).astype(np.float32), (rng.normal(0, 1, (4, 120)) > 0).astype(np.float32)
        found = intervals.paired(*([Outcomes(row, np.arange(120) // 3) for row in x] for x in (a, b)))
        missed += found.excludes_zero
    assert 0.01 < missed / 400 < 0.09


def test_intervals_of_one_seed_and_without_pictures():
    one = (
        [Outcomes(np.array([1, 1, 1, 0], np.float32), np.arange(4))],
        [Outcomes(np.zeros(4, np.float32), np.arange(4))],
    )
    found = intervals.paired(*one)
    assert found.low > -0.1 and found.high > 0.75 and not found.excludes_zero  # one seed has no star
    found = intervals.of_seeds([0.3, 0.4, 0.5], [0.1, 0.1, 0.1])
    assert (found.mean, found.high) == pytest.approx((0.3, 0.3 + 4.302653 * 0.1 / 3**0.5)) and found.excludes_zero
    assert math.isnan(intervals.of_seeds([0.3], [0.1]).low)


@pytest.mark.parametrize("x", ["", "share of noise", "minutes"])
def test_the_figure_is_svg_with_a_mark_for_every_row(tmp_path, x, monkeypatch):
    places = (None, None) if x != "share of noise" else (0.0, 0.3)
    rows = tuple(
        Row(f"{name} & {place}", CLIP, (*TINY, "train.steps=8"), line=name, x=place)
        for place in dict.fromkeys(places)
        for name in ("CLIP", "other")
    )
    monkeypatch.setattr(runs, "train", lambda run: pretend(run, a=[1, 0, 1, run.seed], b=[0, "o" in run.row.name]))
    study.run_study(small_study(rows=rows, x=x), tmp_path, 2, [])
    root = xml.etree.ElementTree.parse(tmp_path / "study.svg").getroot()
    texts = [node.text for node in root.findall(".//{*}text")]
    wanted = ["CLIP", "other"] if x else [row.name for row in rows]
    assert all(name in texts for name in wanted) and "both vendors, %" in texts
    bars = [
        node for node in root.findall(".//{*}path") if node.get("class", "").startswith("on") and "V" in node.get("d")
    ]
    assert len(bars) == (len(rows) // 2 if x else 0), "one for each row that is compared"
    seeds = {}
    for node in root.findall(".//{*}circle[@class='seed']"):
        seeds.setdefault(node.get("cx" if x else "cy"), []).append(node)
    if x != "minutes":  # nothing was trained, so that all rows took the same time
        assert [len(of_row) for of_row in seeds.values()] == [2] * len(rows), "rows at one place stand side by side"
    about = json.loads((tmp_path / "study.json").read_text())
    assert len(about["differences"]) - 1 == len(rows) // 2  # each is compared at its own place
    assert [row[1] for row in about["differences"][1:]] == [row.name for row in rows[::2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="a/b"), "its folder needs a name"),
        (dict(after="nothing"), "after: no row 'nothing'"),
        (dict(minus="nothing"), "minus: no row 'nothing'"),
        (dict(tuned_as="b"), "tuned_as names a row with values"),
        (dict(tune=("optim.lr", (1, 2))), "no tune_metric"),
        (dict(name="b"), "two rows are called 'b'"),
    ],
)
def test_wrong_rows(fields, message):
    row = Row(**dict(name="a", config=CLIP) | fields)
    with pytest.raises(UserError, match=message):
        definition.check(Study("", (row, Row("b", CLIP)), {"x": VAL}))


def test_a_row_is_compared_with_the_first_of_its_place_or_with_the_one_that_it_names():
    rows = [Row("a", CLIP, x=1), Row("b", CLIP, x=2), Row("c", CLIP, x=2), Row("d", CLIP, x=2, minus="c")]
    study = Study("", rows, {"x": VAL})
    assert [study.base(row).name for row in rows] == ["a", "b", "b", "c"]


def test_wrong_reports(tmp_path, capsys):
    for arguments, message in [
        (["--report", str(tmp_path)], "has no readable study.json"),
        (["--report", __file__], "has no readable study.json"),
        (["--report", str(tmp_path), "--workdir=x"], "takes folders and --out alone"),
        ([], "give --config"),
        (["--config=x.py", "--workdir=x", "--length=0"], "--length=0.0: must be a positive number"),
        (["--config=x.py", "--workdir=x", "--length=nan"], "--length=nan: must be a positive number"),
    ]:
        assert study.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_whole_study_with_tuning_an_index_and_a_report(tmp_path, capsys, monkeypatch):
    """All real but for the processes: the commands run in this one."""

    def in_process(command, log):
        _, module, *arguments = command
        if module == "clip_jax.train":
            chosen, workdir, *_ = train.parse_args(arguments)
            train.train(chosen, workdir, lambda line: None)
            return 0, ""
        return importlib.import_module(module).main(arguments), ""

    monkeypatch.setattr(runs, "_call", in_process)
    monkeypatch.chdir(tmp_path)
    few = "emoji?part=concept:1/60"
    score = ("clip_jax.tools.clip_score", f"--source={few}", "--checkpoint={after}", "--keep=0.5")
    tiny = (*TINY, "train.steps=4", "checkpoint.steps=0", "eval.batch_size=16")
    rows = (
        Row("CLIP", CLIP, (*tiny, f"data.source={few}"), tune=("optim.lr", (0.001, 0.1))),
        Row("filtered", CLIP, (*tiny, f"data.source={few}{{index}}"), tuned_as="CLIP", after="CLIP", index=score),
    )
    task = "retrieval(source='emoji', split='{}_unseen_vendor', limit=16, name='{}')"
    metric = "{}/image_to_text_R@5"
    tiny_study = Study(
        "Tiny",
        rows,
        {"R@5": metric.format("test")},
        equal_compute=True,
        tasks=(task.format("test", "test"),),
        tune_tasks=(task.format("val", "val"),),
        tune_metric=metric.format("val"),
    )
    study.run_study(tiny_study, tmp_path / "tiny", 1, [])
    about = json.loads((tmp_path / "tiny" / "study.json").read_text())
    assert set(about["tried"]["CLIP"]) == {"0.001", "0.1"} and about["done"] == [4, 4]
    best = max(about["tried"]["CLIP"], key=about["tried"]["CLIP"].get)
    for row in ("CLIP", "filtered"):
        stored = json.loads((tmp_path / "tiny" / row / "seed_0" / "config.json").read_text())
        assert stored["optim"]["lr"] == float(best) and stored["train"]["steps"] == 4
        kept = outcomes.read(tmp_path / "tiny" / row / "seed_0" / outcomes.FILE, 4)
        (value,) = (m[metric.format("test")] for m in about["runs"]["as trained"][row])
        assert kept[metric.format("test")].values.mean() == pytest.approx(value) and len(kept) == 6
    assert stored["data"]["source"].endswith(f"?index={tmp_path}/tiny/filtered/index")
    (difference,) = about["differences"][1:]
    assert "[" in difference[3] and difference[4] == "16 of 16"
    assert study.main(["--report", str(tmp_path / "tiny"), "--out=all.html"]) == 0
    assert "(chosen)" in Page((tmp_path / "all.html").read_text()).text


STUDIES = "methods noise few_pairs scale detail labels sources one_encoder batch cost".split()


@functools.cache
def embedded_part(part, split, fields):
    """A part of a source of the embedded data, which a study opens for every row."""
    return MAKE_PART(part, split, dict(fields))


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_are_planned_and_their_metrics_are_those_of_their_tasks(name, tmp_path, capsys, monkeypatch):
    """Every configuration, every tuned value and every task is checked; the FLOPs of a step are not computed here."""
    monkeypatch.setattr("clip_jax.program.model_flops", lambda c: 1e6 * c.data.batch_size)
    monkeypatch.setattr(make, "_make_part", lambda *args: embedded_part(*args[:2], tuple(args[2].items())))
    found = study.load(f"{REPO}/configs/studies/{name}.py")
    study.run_study(found, tmp_path / "runs", 3, [], dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m clip_jax.train")]
    tried = sum(len(row.tune[1]) for row in found.rows if row.tune)
    assert len(lines) == 3 * len(found.rows) + tried and tried >= 6
    assert all(len(row.tune[1]) == 3 for row in found.rows if row.tune)
    assert all(row.tune or row.tuned_as for row in found.rows)  # every row has the same budget of tuning
    for tasks, metrics in ((found.tasks, found.metrics.values()), (found.tune_tasks, [found.tune_metric])):
        known = {metric for task in parse_tasks(tasks, "tasks") for metric in task.metric_names()}
        assert {part for m in metrics for part in ([m] if isinstance(m, str) else m)} <= known
    text = (REPO / "configs" / "studies" / f"{name}.py").read_text()
    assert f"python -m clip_jax.study --config=configs/studies/{name}.py --workdir=runs/{name}" in text
    assert found.question and found.claim and len({found.base(row).name for row in found.rows}) < len(found.rows)
