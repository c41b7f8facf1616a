"""The runs of a study: their commands, their training, what they measured, and the values that tuning chose."""

import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from typing import Any

import numpy as np

from clip_jax import config as config_lib
from clip_jax import config_files, from_weights, run_folder
from clip_jax.errors import StorageError, UserError
from clip_jax.evaluation import outcomes
from clip_jax.evaluation.report.charts import read_metrics
from clip_jax.evaluation.results import Outcomes
from clip_jax.evaluation.tasks import check_metric, parse_tasks
from clip_jax.runtime import compile_cache, faults, storage
from clip_jax.studies import definition, folders

#: Stands in a printed command for the value that tuning has not chosen yet.
CHOSEN = "CHOSEN"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
      row: its row.
      seed: its seed.
      folder: its work folder.
      command: the arguments of the Python interpreter.
      steps: the number of training steps.
      flops: the model's FLOPs of the whole training.
      changes: the configuration and the fields that its command changes, as the study defines them.
      value: the value that it tries; empty for a run of the table.
    """

    row: definition.Row
    seed: int
    folder: Any
    command: tuple[str, ...]
    steps: int
    flops: float
    changes: tuple[str, ...] = ()
    value: str = ""

    @property
    def name(self):
        """What messages call it."""
        return (
            f"{self.row.name}, {self.row.tune[0]}={self.value}" if self.value else f"{self.row.name}, seed {self.seed}"
        )

    def metrics(self):
        """Returns the metrics of its last evaluation, or None while the run is incomplete."""
        last = {name: series[-1] for name, series in read_metrics(self.folder / "metrics.jsonl")[1].items()}
        return {name: value for name, (step, value) in last.items() if step == self.steps} or None

    def outcomes(self):
        """Returns metric -> `Outcomes` of its last evaluation; {} where they are not kept."""
        return outcomes.read(self.folder / outcomes.FILE, self.steps)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A row of a study that is checked and costed.

    Attributes:
      study: the study.
      row: the row.
      workdir: the work folder of the study.
      spec: `FILE[:VARIANT]`, relative to the current folder.
      overrides: the changes of all runs, before the tuned value.
      length: what the steps of the rows are multiplied by.
      field: the tuned field; empty: none.
      costs: `{value: (steps, FLOPs of a step)}` of each value of the field; `{"": ...}` without a field.
    """

    study: definition.Study
    row: definition.Row
    workdir: Any
    spec: str
    overrides: tuple[str, ...]
    length: float
    field: str
    costs: dict[str, tuple[int, float]]

    @property
    def folder(self):
        """The folder of the row."""
        return self.workdir / self.row.name

    def seed(self, seed, value=""):
        """Returns the run of a seed; `value` is the chosen one, empty while it is unknown."""
        steps, flops = self.costs.get(value) or next(iter(self.costs.values()))
        changes = [f"{self.field}={value or CHOSEN}"] if self.field else []
        changes += [f"train.steps={steps}"] if self.study.equal_compute or self.length != 1 else []
        changes += _tasks(self.study.tasks)
        return self._run(seed, self.folder / f"seed_{seed}", changes, steps, flops)

    def tuning(self):
        """Returns the runs that try the values of the row: the seed 0 and half of the steps."""
        found = []
        for value, (steps, flops) in self.costs.items() if self.row.tune else ():
            half = max(1, steps // 2)
            folder = self.folder / "tune" / re.sub(r"[^\w.=-]+", "_", f"{self.field}={value}")
            changes = [f"{self.field}={value}", f"train.steps={half}", *_tasks(self.study.tune_tasks)]
            found.append(self._run(0, folder, changes, half, flops, value))
        return found

    def index_command(self):
        """Returns the arguments of the interpreter that write the row's index, or None where it has none."""
        if not self.row.index:
            return None
        module, *arguments = self.row.index
        return ("-m", module, *(_filled(self, text) for text in arguments), f"--out={self.folder / 'index'}")

    def _run(self, seed, folder, changes, steps, flops, value=""):
        command = ["-m", "clip_jax.train", f"--config={self.spec}", f"--workdir={folder}"]
        given = changes = (*self.overrides, *changes, f"seed={seed}")
        if compile_cache.VARIABLE not in os.environ:  # all seeds of a row have the same program
            changes = (f"compile.cache={self.workdir / compile_cache.FOLDER}", *changes)
        command += [f"--config.{_filled(self, change)}" for change in folders.that_count(changes)]
        given = config_files.spec_of(self.row.config, is_absolute=True), *given
        return Run(self.row, seed, folder, tuple(command), steps, steps * flops, given, value)


def _tasks(tasks):
    return [f"eval.tasks={tuple(tasks)!r}"] if tasks else []


def _filled(planned, text, with_index=True):
    """Returns an argument with the folders that its placeholders stand for."""
    index = f"?index={planned.folder / 'index'}" if with_index else ""
    after = planned.workdir / planned.row.after / "seed_0"
    return text.replace(definition.INDEX, index).replace(definition.AFTER, str(after))


def plan(study, workdir, overrides, length=1.0):
    """Returns the `Planned` rows of a study. Raises UserError when a configuration is wrong.

    Args:
      study: the study.
      workdir: its work folder.
      overrides: changes of all rows, the last ones, such as `["optim.lr=0.5"]`.
      length: the steps of each row are multiplied by it.
    """
    definition.check(study)
    _check_steps(study, overrides)
    workdir = storage.path(workdir)
    if storage.is_remote(workdir) and (row := next((row for row in study.rows if row.index), None)):
        raise UserError(f"--workdir={workdir}: the index of the row {row.name!r} needs a local folder")
    found, tasks = [], []
    budget, known = None, {}
    for row in study.rows:
        source = study.row(row.tuned_as) if row.tuned_as else row
        field, values = source.tune if source.tune else ("", ("",))
        changes = (*study.overrides, *row.overrides, *overrides)
        spec, config = config_files.spec_of(row.config), None
        planned = Planned(study, row, workdir, spec, changes, length, field, {})
        for value in map(str, values):
            config = _checked(planned, value, config)
            steps, flops = config.train.steps * length, _flops(config, known)
            if study.equal_compute:
                budget = budget or steps * flops
                steps = budget / flops
            steps = max(1, round(steps))
            for count in {steps, max(1, steps // 2) if row.tune else steps}:
                config_lib.validate(config_lib.override(config.copy_and_resolve_references(), [f"train.steps={count}"]))
            planned.costs[value] = steps, flops
        found.append(planned)
        tasks += parse_tasks(config.eval.tasks, "eval.tasks")
    for metric in study.metrics.values():
        _check_metric(metric, tasks, "no row has a task with the metric")
    _check_metric(
        study.tune_metric, parse_tasks(study.tune_tasks, "tune_tasks"), "no task of tune_tasks has the metric"
    )
    return found


def _check_steps(study, overrides):
    """Raises UserError when one number of steps would replace the different ones that a study gives its rows."""

    def steps(changes):
        return next((change for change in reversed(changes) if change.startswith("train.steps=")), None)

    own = {steps((*study.overrides, *row.overrides)) for row in study.rows}
    if not study.equal_compute and len(own) > 1 and steps(overrides):
        raise UserError("--config.train.steps: the rows have different steps; --length=0.5 halves those of all rows")


def _check_metric(metric, tasks, line):
    """Raises UserError when a metric, or a part of a tuple, is none of the tasks'."""
    for part in (metric,) if isinstance(metric, str) else metric:
        check_metric(part, tasks, f"the study's metrics: {line} {part!r}")


def _checked(planned, value, config):
    """Returns the resolved configuration of a row with a value. Raises UserError.

    Args:
      planned: the row.
      value: the value of its field.
      config: that of another value, whose data and tasks are checked already; None for the first.
    """
    from clip_jax.methods.interface import make_method
    from clip_jax.train import make_parts

    tuned = [f"{planned.field}={value}"] * bool(planned.field)
    if config is None:
        with_index = folders.has_index(planned)
        changes = [_filled(planned, text, with_index) for text in planned.overrides]
        return make_parts(from_weights.load(planned.row.config, changes + tuned + _tasks(planned.study.tasks)))[0]
    config = config_lib.override(config.copy_and_resolve_references(), tuned)
    config_lib.validate(config)
    make_method(config)
    return config


def _flops(config, known):
    """Returns the FLOPs of a step of a configuration.

    Args:
      config: a resolved configuration.
      known: `{what the FLOPs follow from: FLOPs}` of others, which grows.
    """
    from clip_jax.program import model_flops

    shape = config.to_dict()
    shape["optim"] = {"freeze": shape["optim"]["freeze"]}
    shape["data"] = {"batch_size": shape["data"]["batch_size"]}
    shape = repr({name: section for name, section in shape.items() if name not in ("train", "eval", "seed")})
    if shape not in known:
        known[shape] = model_flops(config)
    return known[shape]


def in_order(planned, seeds, chosen):
    """Yields what a study does, in order.

    All values are tried before the first seed, and all rows get a seed before any gets the next. Rows that need another
    row's first seed begin after all first seeds of the others.

    Args:
      planned: the rows.
      seeds: the number of seeds.
      chosen: a function of a `Planned` that returns its chosen value; called when the values have been tried.

    Yields: `Planned` whose index is needed next, or a `Run`.
    """
    groups = [p for p in planned if not p.row.after], [p for p in planned if p.row.after]
    for group in groups:
        for p in group:
            yield from [p] * bool(p.row.index)
            yield from p.tuning()
        for p in group:
            yield p.seed(0, chosen(p))
    for seed in range(1, seeds):
        for p in planned:
            yield p.seed(seed, chosen(p))


def chooser(planned):
    """Returns the function of a `Planned` that gives the value that its tuning chose; "" while runs are missing.

    The value with the highest metric is chosen, the first of equal ones.
    """
    by_name = {p.row.name: p for p in planned}

    def choose(p):
        p = by_name[p.row.tuned_as or p.row.name]
        scores = tried(p)
        return max(scores, key=scores.get) if scores and None not in scores.values() else ""

    return choose


def tried(planned):
    """Returns `{value: metric, None while the run is incomplete}` of the values of a row; {} without any.

    Raises UserError when a complete run lacks the metric.
    """
    metric, found = planned.study.tune_metric, {}
    for run in planned.tuning():
        read = results(run, [metric])
        if read is not None and (value := read[0].get(definition.key(metric))) is None:
            raise UserError(f"{run.name}: {run.folder} has no metric {definition.key(metric)}: see Study.tune_tasks")
        found[run.value] = None if read is None else (value if math.isfinite(value) else -math.inf)
    return found


def results(run, metrics):
    """Returns `(metrics, outcomes)` of a complete run with those over several cells, or None.

    A run whose file of outcomes is missing or damaged, where they are wanted, counts as incomplete: it evaluates again.

    Args:
      run: the run.
      metrics: names, and tuples of names, as in `Study.metrics`.

    Raises UserError as `folders.check`.
    """
    folders.check(run)
    found, kept = run.metrics(), run.outcomes()
    return None if found is None or _lacks(found, kept, metrics) else pooled(found, kept, metrics)


def _lacks(found, kept, metrics):
    """Whether there are no outcomes at all, although a tuple of metrics needs them."""
    return not kept and any(not isinstance(parts, str) and all(part in found for part in parts) for parts in metrics)


def pooled(found, kept, metrics):
    """Returns `(metrics, outcomes)` with the pooled metrics, whose outcomes are those of all parts together.

    Args:
      found: metric -> value.
      kept: metric -> `Outcomes`.
      metrics: names, and tuples of names.

    Raises UserError for a tuple with a metric that is known as a mean alone.
    """
    found, kept = dict(found), dict(kept)
    for parts in metrics:
        if isinstance(parts, str):
            continue
        if part := next((part for part in parts if part in found and part not in kept), None):
            raise UserError(
                f"the study's metrics: {part!r} has no outcomes for each picture, which a tuple of metrics needs"
            )
        if all(part in kept for part in parts):
            values, groups = (
                np.concatenate([getattr(kept[part], name) for part in parts]) for name in ("values", "groups")
            )
            kept[definition.key(parts)] = Outcomes(values, groups)
            found[definition.key(parts)] = float(values.mean()) if len(values) else 0.0
    return found, kept


def train(run):
    """Runs the training command of a run, with its output in `train.log`.

    Raises Stopped after a signal, and UserError or StorageError when the command fails.
    """
    folders.begin(run)
    with storage.local_folder(run.folder) as folder:
        status, line = _call(run.command, folder / "train.log")
    _check(status, run.name, f"{line} ({run.folder / 'train.log'})")


def write_index(planned):
    """Writes the index of a row unless it is there, with the output in `index.log`.

    Raises as `train` and `folders.begin_index` do.
    """
    if not folders.begin_index(planned):
        status, line = _call(planned.index_command(), planned.folder / "index.log")
        _check(status, f"the index of {planned.row.name}", f"{line} ({planned.folder / 'index.log'})")


def _call(command, log):
    """Runs the interpreter with its output in a file; returns `(exit status, last line)`. SIGTERM is passed on."""
    with (
        log.open("a") as out,
        subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal sends Ctrl-C to the run as well
            status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    return status, (log.read_text(errors="replace").splitlines() or ["it printed nothing"])[-1]


def _check(status, name, line):
    # A program that a signal ends before, or without, handling it has minus its number.
    status = {-signal.SIGTERM: faults.PREEMPTED, -signal.SIGINT: faults.INTERRUPTED}.get(status, status)
    if status in (faults.PREEMPTED, faults.INTERRUPTED):
        raise faults.Stopped(status, f"in {name}")
    if status:
        kind = StorageError if status == faults.STORAGE else UserError
        raise kind(f"{name} ended with status {status}: {line}")


def read_out(study, run, metrics, kept):
    """Returns `{readout: (metrics, outcomes)}` of a complete run.

    A readout that changes nothing takes those of the run. The others are evaluated once and kept in the run's folder,
    in readouts.json and one file of outcomes each.

    Args:
      study: the study.
      run: the run.
      metrics, kept: the metrics and outcomes of its last evaluation.
    """
    from clip_jax import evaluate, inference

    file, wanted = run.folder / "readouts.json", study.metrics.values()
    stored = json.loads(storage.read(file) or "{}")
    found, config = {}, from_weights.load(run.row.config, config_lib.parse_overrides(run.command[4:]))
    for name, changes in study.readouts.items():
        if config_lib.override(config.copy_and_resolve_references(), changes) == config:
            found[name] = metrics, kept
            continue
        key = f"step {run.steps}: {' '.join(changes)}"
        place = run.folder / f"readout_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        known = stored.get(place.name, {}).get("metrics")
        if known is None or _lacks(known, outcomes.read(place, run.steps), wanted):
            model = inference.load(run.folder, overrides=changes)
            result = evaluate.run(model, model.config.eval.tasks, log=lambda line: None)
            outcomes.write(place, run.steps, result.outcomes)
            stored[place.name] = {"readout": key, "metrics": result.metrics}
            storage.write(file, json.dumps(stored, indent=1))
        found[name] = pooled(stored[place.name]["metrics"], outcomes.read(place, run.steps), wanted)
    return found


def memory(run):
    """Returns the bytes of a step of a run, the compiler's estimate; None where it is not known."""
    return run_folder.read_json(run.folder / run_folder.MACHINE).get("step_bytes")


def minutes(metrics):
    """Returns the minutes that a run has trained, waiting for data included; None where it is not known."""
    parts = [metrics.get(f"seconds/{part}") for part in ("training", "data")]
    return None if None in parts else sum(parts) / 60
