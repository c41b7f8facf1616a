"""Studies: the plan, tuning, complete runs, tables, intervals, the figure, the page, readouts, wrong input."""

import dataclasses
import json
import signal
import types

import numpy as np
import pytest
from conftest import REPO
from helpers import TINY, Page

from clip_jax import config, study
from clip_jax.errors import UserError
from clip_jax.evaluation.results import Outcomes
from clip_jax.runtime import faults
from clip_jax.studies import folders, runs, tables
from clip_jax.study import Row, Study

METRIC = "retrieval/image_to_text_R@10"
TASK = "retrieval(source='emoji', split='val_unseen_vendor', limit=16)"


def make_study(tmp_path, names=("a", "b"), **fields):
    rows = tuple(
        Row(name, str(REPO / "configs" / "clip.py:emoji"), (*TINY, "train.steps=2"), (10.0 * i,))
        for i, name in enumerate(names)
    )
    return Study("two rows", rows, {"R@10": METRIC}, "published", tasks=(TASK,), **fields)


def pretend(folder, value, step=2, gap=0.5):
    """Writes the files of a run of two steps."""
    folder.mkdir(parents=True)
    rows = [{"step": s, "time": 0.0, "loss": 2.0, "gap": gap} for s in (1, 2)] + [
        {"step": step, "time": 0.0, METRIC: value}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_plan_is_the_training_command_of_every_row_and_seed(tmp_path, capsys):
    changes = ["optim.lr=0.7", "optim={'b1': 0.8}", "optim={'b2': 0.9}", "optim.lr=0.5"]
    study.run_study(make_study(tmp_path), tmp_path / "runs", 2, changes, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "runs").exists()
    assert all(
        line.startswith("python -m clip_jax.train --config=") and "--config.optim.lr=0.5" in line for line in lines
    )
    assert all("optim.lr=0.7" not in line and "b1" in line and "b2" in line for line in lines), "each field once"
    assert [line.rsplit("=", 1)[1] for line in lines] == ["0", "0", "1", "1"]
    assert f"--workdir={tmp_path}/runs/b/seed_1" in lines[-1]


def test_complete_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    values = {"a": (0.1, 0.12), "b": (0.3, 0.34)}
    for name, shares in values.items():
        for seed, value in enumerate(shares):
            pretend(tmp_path / name / f"seed_{seed}", value, gap=0.5 + seed)
    monkeypatch.setattr(runs, "train", lambda run: pytest.fail(f"{run.folder} was repeated"))
    study.run_study(make_study(tmp_path, curves=("gap",)), tmp_path, 2, [], dry_run=False)
    out = capsys.readouterr().out
    assert "11.00 ± 1.41" in out and "32.00 ± 2.83" in out
    assert "a < b: R@10 11.00 and 32.00 %: confirmed (p = " in out
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures["runs"]["as trained"]["b"][1][METRIC] == 0.34 and figures["table"][1][0] == "a"
    page = (tmp_path / "study.html").read_text()
    assert (
        "32.00&nbsp;±&nbsp;2.83" in page and "gap" in page and "[1,1]" in page.replace(" ", "").replace("1.0", "1")
    )  # the mean of 0.5 and 1.5


def test_the_page_draws_evaluations_that_were_made_at_several_steps(tmp_path):
    two = make_study(tmp_path)
    for name in ("a", "b"):
        for seed in range(2):
            folder = tmp_path / name / f"seed_{seed}"
            pretend(folder, 0.4 + seed / 10)
            with (folder / "metrics.jsonl").open("a") as file:
                rows = [{"step": 1, METRIC: 0.1 + seed / 5}, {"step": 1, "val/loss": 3.0}, {"step": 2, "val/loss": 2.0}]
                file.write("".join(json.dumps(row) + "\n" for row in rows))
    study.run_study(two, tmp_path, 2, [], dry_run=False)
    page = Page((tmp_path / "study.html").read_text())
    assert [a["aria-label"] for a in page.find("svg")] == [
        "loss over steps", "R@10 over steps", "val/loss over steps",
    ]  # fmt: skip
    curves = page.data["charts"][1]["curves"]
    assert curves == [["a", [1, 2], [0.2, 0.45]], ["b", [1, 2], [0.2, 0.45]]]


@pytest.mark.parametrize(
    ("a", "b", "outcome"),
    [
        ((0.3, 0.31), (0.1, 0.11), "the opposite order"),
        ((0.1, 0.3), (0.2, 0.3), "no significant difference"),
        ((0.1,), (0.2,), "cannot decide"),
    ],
)
def test_order_reports_the_outcome(tmp_path, a, b, outcome):
    found = {"as trained": {"a": [{METRIC: x} for x in a], "b": [{METRIC: x} for x in b]}}
    (line,) = tables.order(make_study(tmp_path), found)
    assert outcome in line
    assert not list(tables.order(make_study(tmp_path), {"as trained": {"a": [{METRIC: 0.1}], "b": [{}]}}))


def test_each_readout_is_evaluated_once_and_kept(tmp_path, capsys, monkeypatch):
    asked = []

    def load(folder, overrides):
        asked.append((folder.parent.name, overrides))
        return types.SimpleNamespace(config=config.load(str(REPO / "configs" / "clip.py"), TINY))

    monkeypatch.setattr("clip_jax.inference.load", load)
    monkeypatch.setattr(
        "clip_jax.evaluate.run",
        lambda *_, **__: types.SimpleNamespace(metrics={METRIC: 0.9 if asked[-1][0] == "a" else 0.2}, outcomes={}),
    )
    for name, value in (("a", 0.1), ("b", 0.3)):
        pretend(tmp_path / name / "seed_0", value)
    two = make_study(
        tmp_path, readouts={"as trained": (), "otherwise": ("eval.batch_size=7",), "the same": ("data.batch_size=16",)}
    )
    for _ in range(2):
        study.run_study(two, tmp_path, 1, [], dry_run=False)
    assert asked == [("a", ("eval.batch_size=7",)), ("b", ("eval.batch_size=7",))]
    figures = json.loads((tmp_path / "study.json").read_text())
    assert [row[:2] + [row[5]] for row in figures["table"][1:]] == [
        ["a", "as trained", "10.00"], ["a", "otherwise", "90.00"], ["a", "the same", "10.00"],
        ["b", "as trained", "30.00"], ["b", "otherwise", "20.00"], ["b", "the same", "30.00"],
    ]  # fmt: skip
    assert "read by otherwise, a < b: R@10 90.00 and 20.00 %: one run each cannot decide" in capsys.readouterr().out


def test_a_readout_keeps_its_outcomes_when_another_one_is_put_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_jax.inference.load", lambda folder, overrides: types.SimpleNamespace(
        config=config.load(str(REPO / "configs" / "clip.py"), TINY), changes=overrides
    ))  # fmt: skip

    def evaluate(model, *_, **__):
        right = float("eval.batch_size=7" in model.changes)
        return types.SimpleNamespace(
            metrics={METRIC: right}, outcomes={METRIC: Outcomes(np.full(3, right), np.arange(3))}
        )

    monkeypatch.setattr("clip_jax.evaluate.run", evaluate)
    pretend(tmp_path / "a" / "seed_0", 0.1)
    readouts = {"seven": ("eval.batch_size=7",), "eight": ("eval.batch_size=8",)}
    for names in (["seven"], ["eight", "seven"]):
        one = make_study(tmp_path, ("a",), readouts={name: readouts[name] for name in names})
        (planned,) = runs.plan(one, tmp_path, [])
        found = runs.read_out(one, planned.seed(0), {}, {})
        assert {name: (m[METRIC], kept[METRIC].values.mean()) for name, (m, kept) in found.items()} == {
            name: (float(name == "seven"),) * 2 for name in names
        }


def test_a_run_that_is_not_complete_is_trained(tmp_path):
    pretend(tmp_path / "a" / "seed_0", 0.5, step=1)  # its last evaluation was at an earlier step
    (planned,) = runs.plan(make_study(tmp_path, ("a",)), tmp_path, ["checkpoint.steps=0"])
    run = planned.seed(0)
    assert run.metrics() is None
    runs.train(run)
    value = run.metrics()[METRIC]
    kept = run.outcomes()[METRIC]
    assert 0 <= value <= 1 and value == pytest.approx(kept.values.mean()) and len(kept.groups) == 16
    assert "step 2/2" in (run.folder / "train.log").read_text()


def test_a_metric_that_no_task_computes_is_refused_before_the_first_run(tmp_path):
    wrong = dataclasses.replace(make_study(tmp_path, ("a",)), metrics={"R@10": METRIC, "top-1": "emoji/top1"})
    with pytest.raises(UserError, match="no row has a task with the metric 'emoji/top1'; they compute: retrieval/"):
        runs.plan(wrong, tmp_path, [])


def test_rows_of_equal_compute(tmp_path):
    clip = str(REPO / "configs" / "clip.py:emoji")
    rows = [Row(name, clip, (*TINY, f"data.batch_size={batch}")) for name, batch in (("a", 16), ("b", 64))]
    two = Study("", tuple(rows), {"R@10": METRIC}, equal_compute=True, tasks=(TASK,))
    planned = runs.plan(two, tmp_path, ["train.steps=8"])
    a, b = (p.seed(0) for p in planned)
    assert [a.steps, b.steps] == [8, 2] and a.flops == pytest.approx(b.flops, rel=0.01)
    assert "--config.train.steps=2" in b.command


def test_a_run_that_fails_ends_the_study_with_its_last_line_and_status(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    run = runs.Run(
        Row("a", "x"), 0, tmp_path / "a", ("-c", "print('error: no such data'); raise SystemExit(2)"), 2, 1.0
    )
    with pytest.raises(UserError, match="a, seed 0 ended with status 2: error: no such data"):
        runs.train(run)
    run = runs.Run(Row("a", "x"), 0, tmp_path / "b", ("-c", "raise SystemExit(42)"), 2, 1.0)
    with pytest.raises(faults.Stopped, match="^preempted in a, seed 0; the same command resumes the run$") as stopped:
        runs.train(run)
    assert stopped.value.status == 42 and signal.getsignal(signal.SIGTERM) is handler
    killed = runs.Run(Row("a", "x"), 0, tmp_path / "c", ("-c", "import os; os.kill(os.getpid(), 15)"), 2, 1.0)
    with pytest.raises(faults.Stopped, match="^preempted in a, seed 0"):  # before the program handles the signal
        runs.train(killed)


def test_a_folder_with_a_run_of_another_definition_is_refused(tmp_path):
    row = make_study(tmp_path, ("a",))
    first, other = (runs.plan(row, tmp_path, [change])[0].seed(0) for change in ("optim.lr=0.1", "optim.lr=0.2"))
    first.folder.mkdir(parents=True)
    (first.folder / folders.DEFINITION).write_text(json.dumps({"changes": first.changes}))
    assert runs.results(first, []) is None
    with pytest.raises(UserError, match="holds a run with optim.lr=0.1, not optim.lr=0.2: give another --workdir"):
        runs.results(other, [])


def test_a_run_by_hand_of_another_definition_is_refused(tmp_path):
    """The commands of `--dry-run` leave config.json alone."""
    first, other = (
        runs.plan(make_study(tmp_path, ("a",)), tmp_path, [change])[0].seed(0)
        for change in ("optim.lr=0.1", "optim.lr=0.2")
    )
    first.folder.mkdir(parents=True)
    given = config.load(str(REPO / "configs" / "clip.py:emoji"), config.parse_overrides(first.command[4:]))
    (first.folder / "config.json").write_text(config.to_json(given))
    assert runs.results(first, []) is None
    with pytest.raises(UserError, match="holds a run with optim.lr=0.1, not optim.lr=0.2: give another --workdir"):
        runs.results(other, [])


def test_a_run_or_an_index_of_another_filter_is_refused(tmp_path):
    def planned(keep, after=""):
        one = make_study(tmp_path, ("a", "b"))
        row = dataclasses.replace(one.rows[1], index=("clip_jax.tools.filter", keep), after=after)
        return runs.plan(dataclasses.replace(one, rows=(one.rows[0], row)), tmp_path, [])[1]

    half, third = planned("--keep=0.5"), planned("--keep=0.3")
    (half.folder / "index").mkdir(parents=True)  # a filter that was interrupted: no index
    assert planned("--keep=0.5").seed(0).command == half.seed(0).command
    (half.folder / "index" / "report.json").write_text("{}")
    (half.folder / folders.INDEX_DEFINITION).write_text(json.dumps({"command": list(half.row.index)}))
    runs.write_index(half)
    with pytest.raises(UserError, match=r"index is of .*keep=0.5, not .*keep=0.3: give another --workdir"):
        runs.write_index(third)
    run = half.seed(0)
    run.folder.mkdir(parents=True)
    (run.folder / folders.DEFINITION).write_text(json.dumps(folders.definition(run)))
    assert runs.results(run, []) is None
    for other, problem in (
        (third, "--keep=0.5, not --keep=0.3"),
        (planned("--keep=0.5", "a"), "no such change, not a"),
    ):
        with pytest.raises(UserError, match=f"holds a run with .*{problem}: "):
            runs.results(other.seed(0), [])
    with pytest.raises(UserError, match="--workdir=gs://bucket/x: the index of the row 'b' needs a local folder"):
        runs.plan(half.study, "gs://bucket/x", [])


def test_a_run_whose_outcomes_are_lost_evaluates_again(tmp_path):
    pretend(tmp_path / "a" / "seed_0", 0.5)
    run = runs.plan(make_study(tmp_path, ("a",)), tmp_path, [])[0].seed(0)
    assert runs.results(run, [METRIC])[0][METRIC] == 0.5
    assert runs.results(run, [METRIC, (METRIC,)]) is None


def test_a_tuple_of_metrics_that_are_known_as_means_alone_is_refused():
    kept = {"x/top1": Outcomes(np.ones(2), np.arange(2))}
    assert runs.pooled({"x/top1": 1.0}, kept, [("x/top1", "y/top1")])[0] == {"x/top1": 1.0}, "another row's task"
    with pytest.raises(UserError, match="'x/F@1' has no outcomes for each picture, which a tuple of metrics needs"):
        runs.pooled({"x/top1": 1.0, "x/F@1": 0.5}, kept, [("x/top1", "x/F@1")])


def test_wrong_input(tmp_path, capsys):
    wrong = [
        ("configs/clip.py", [], "has no function get_study(variant)"),
        ("configs/oner.py:ablate", [], "did you mean 'ablation'?"),
        ("configs/oner.py:ablation", ["--seeds=0"], "must be at least 1"),
        ("configs/oner.py:ablation", ["--config.train.stepz=3"], "stepz"),
        ("configs/none.py", [], "there is no file"),
    ]
    for spec, arguments, message in wrong:
        path = f"{REPO}/{spec}"
        assert study.main([f"--config={path}", f"--workdir={tmp_path / 'w'}", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("spec", ["oner.py:ablation", "studies/methods.py"])
def test_rows_of_the_studies_are_configurations_with_the_metrics_asked_for(spec):
    for row in study.load(f"{REPO}/configs/{spec}").rows:
        assert any(task.startswith("emoji") for task in config.load(row.config).eval.tasks)


def test_the_training_command_refuses_a_study():
    with pytest.raises(UserError, match="is a study: python -m clip_jax.study"):
        config.load(f"{REPO}/configs/oner.py:ablation")
