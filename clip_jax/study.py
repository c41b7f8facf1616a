"""Studies: several configurations, several seeds, one table.

    python -m clip_jax.study --config=configs/oner.py:ablation --workdir=runs/oner [--seeds=5] [--config.train.steps=99]

A file in `configs/` with studies defines their names, `STUDIES`, and `get_study(variant) -> Study`. Each run is the
ordinary training command in its own folder, WORKDIR/ROW/seed_N. `--dry-run` prints these commands; they may run
elsewhere, into the same folders. Complete runs are not repeated, and interrupted runs resume. Then the command prints
the table and writes study.json and study.html: the table, the tests of the expected order, curves and maps.
"""

import dataclasses
import html
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

from clip_jax import config as config_lib
from clip_jax import config_files, from_weights
from clip_jax.errors import StorageError, UserError, unknown
from clip_jax.runtime import command, faults, storage

_DRAWN = ("loss", "top1", "accuracy", "image_to_text_R@1", "text_to_image_R@1")


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration of a study.

    Attributes:
      name: the row's name in the table.
      config: `FILE[:VARIANT]`.
      overrides: fields that the row changes, such as `optim.lr=1e-3`.
      published: the published figures, in percent.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    published: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of configurations.

    Attributes:
      title: the title of the page.
      rows: the rows of the table. Rows with published figures go from the lowest to the highest figure, the expected
        order.
      metrics: `{column heading: metric of the last evaluation}`. Each metric is a fraction; the first decides the
        order.
      published: the heading of the published figures.
      curves: the training metrics that the page plots. It also plots the `metrics` and the usual others that were
        evaluated at several steps.
      map_task: the evaluation task whose 2-D maps the page shows, one for each row; empty: none.
      equal_compute: gives every row the number of steps that costs as many FLOPs as the first row's steps. Otherwise
        each row takes the steps of its configuration.
      readouts: `{name: overrides}`. Each readout evaluates the trained models once more, on the tasks of their
        configurations, with overrides such as `oner.embed=projector`, which must not change the shapes of the weights.
        The table has a row for each configuration and readout. The default is the model as trained.
    """

    title: str
    rows: tuple[Row, ...]
    metrics: dict[str, str]
    published: str = ""
    curves: tuple[str, ...] = ("loss",)
    map_task: str = ""
    equal_compute: bool = False
    readouts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"as trained": ()})


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
    """

    row: Row
    seed: int
    folder: Any
    command: tuple[str, ...]
    steps: int
    flops: float

    def metrics(self):
        """Returns the metrics of its last evaluation, or None while the run is incomplete."""
        from clip_jax.evaluation.report.charts import read_metrics

        last = {name: series[-1] for name, series in read_metrics(self.folder / "metrics.jsonl")[1].items()}
        return {name: value for name, (step, value) in last.items() if step == self.steps} or None


def load(spec):
    """Returns the study of `"path/to/file.py[:variant]"`. Raises UserError."""
    module, variant = config_lib.load_module(spec)
    if not hasattr(module, "get_study"):
        raise UserError(f"--config={spec}: {module.__file__!r} has no function get_study(variant)")
    if variant not in module.STUDIES:
        raise unknown(f"--config={spec}: no study", variant, module.STUDIES)
    return module.get_study(variant)


def plan(study, workdir, seeds, overrides):
    """Returns the runs of a study: all rows with the first seed, then all with the next.

    Raises UserError when a configuration is wrong.
    """
    from clip_jax.program import model_flops
    from clip_jax.train import make_parts

    runs = []
    for row in study.rows:
        changes = [*row.overrides, *overrides]
        config = make_parts(from_weights.load(row.config, changes))[0]
        steps, flops = config.train.steps, model_flops(config)
        if study.equal_compute and runs:
            steps = max(1, round(runs[0].flops / flops))
            changes.append(f"train.steps={steps}")
        spec = config_files.spec_of(row.config)
        for seed in range(seeds):
            folder = storage.path(workdir) / row.name / f"seed_{seed}"
            command = ["-m", "clip_jax.train", f"--config={spec}", f"--workdir={folder}"]
            command += [f"--config.{change}" for change in (*changes, f"seed={seed}")]
            runs.append(Run(row, seed, folder, tuple(command), steps, steps * flops))
    return sorted(runs, key=lambda run: run.seed)


def train(run):
    """Runs the training command of a run, with its output in `train.log`.

    Raises Stopped after a signal, and UserError or StorageError when the command fails.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with storage.local_folder(run.folder) as folder:
        log = folder / "train.log"
        status = _call(run.command, log)
        lines = log.read_text(errors="replace").splitlines()
    if status:
        if status in (faults.PREEMPTED, faults.INTERRUPTED):
            raise faults.Stopped(status, f"in {run.row.name}, seed {run.seed}")
        line = (lines or ["it printed nothing"])[-1]
        kind = StorageError if status == faults.STORAGE else UserError
        raise kind(f"{run.row.name}, seed {run.seed} ended with status {status}: {line} ({run.folder / 'train.log'})")


def _call(command, log):
    """Runs the interpreter with its output in a file; returns its exit status. SIGTERM is passed on."""
    with (
        log.open("a") as out,
        subprocess.Popen([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends Ctrl-C to the run as well
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def read_out(study, run, metrics):
    """Returns `{readout: metrics}` of a complete run.

    A readout that changes nothing takes the metrics of the run. The others are evaluated once and kept in the run's
    folder, in readouts.json.

    Args:
      study: the study.
      run: the run.
      metrics: the metrics of its last evaluation.
    """
    from clip_jax import evaluate, inference

    file = run.folder / "readouts.json"
    kept = json.loads(storage.read(file) or "{}")
    found, config = {}, from_weights.load(run.row.config, config_lib.parse_overrides(run.command[4:]))
    for name, changes in study.readouts.items():
        if config_lib.override(config.copy_and_resolve_references(), changes) == config:
            found[name] = metrics
            continue
        key = f"step {run.steps}: {' '.join(changes)}"
        if key not in kept:
            model = inference.load(run.folder, overrides=changes)
            kept[key] = evaluate.run(model, model.config.eval.tasks, log=lambda line: None).metrics
            storage.write(file, json.dumps(kept, indent=1))
        found[name] = kept[key]
    return found


def table(study, runs, found):
    """Returns the heading and the rows of the table as text cells.

    Args:
      study: the study.
      runs: its runs.
      found: `{readout: {row name: [metrics, one dict per seed]}}`.
    """
    cost = {run.row.name: run for run in runs}
    everything = [m for rows in found.values() for runs in rows.values() for m in runs]
    labels = [label for label, name in study.metrics.items() if any(name in m for m in everything)]
    by = ["read by"] if len(found) > 1 else []
    published = [study.published] if study.published else []
    head = ["row", *by, "seeds", "steps", "TFLOP", *labels, *published]
    rows = []
    for row, (readout, by_row) in itertools.product(study.rows, found.items()):
        run, seeds = cost[row.name], by_row[row.name]
        cells = [row.name, *[readout][: len(by)], str(len(seeds)), f"{run.steps:,}", f"{run.flops / 1e12:,.1f}"]
        for label in labels:
            values = [100 * m[study.metrics[label]] for m in seeds if m.get(study.metrics[label]) is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        rows.append(cells + [" / ".join(f"{x:g}" for x in row.published)][: len(published)])
    return head, rows


def order(study, found):
    """Yields a sentence for each pair of neighbouring rows: whether their order is the expected one.

    It compares the first metric by Welch's t-test at 5 %. `found` is that of `table`.
    """
    from scipy.stats import ttest_ind

    label, metric = next(iter(study.metrics.items()))
    for (readout, by_row), (lower, higher) in itertools.product(found.items(), itertools.pairwise(study.rows)):
        if not (lower.published and higher.published):
            continue
        a, b = ([100 * m[metric] for m in by_row[row.name]] for row in (lower, higher))
        by = f"read by {readout}, " if len(found) > 1 else ""
        text = f"{by}{lower.name} < {higher.name}: {label} {statistics.mean(a):.2f} and {statistics.mean(b):.2f} %"
        if min(len(a), len(b)) < 2:
            yield f"{text}: one run each cannot decide"
            continue
        p = ttest_ind(a, b, equal_var=False).pvalue
        outcome = "confirmed" if statistics.mean(a) < statistics.mean(b) else "the opposite order"
        yield f"{text}: {outcome if p < 0.05 else 'no significant difference'} (p = {p:.2g})"


def write(study, runs, found, workdir):
    """Writes study.json and study.html into the work folder; returns the path of the page."""
    from clip_jax import evaluate, inference
    from clip_jax.evaluation.report import page as html_page
    from clip_jax.evaluation.report.embedding_map import EmbeddingMap

    head, rows = table(study, runs, found)
    verdicts = list(order(study, found))
    figures = {"title": study.title, "runs": found, "table": [head, *rows], "order": verdicts}
    storage.write(workdir / "study.json", json.dumps(figures, indent=1))
    page = html_page.Page()
    escaped = [[html.escape(cell) for cell in cells] for cells in (head, *rows)]
    note = "<p>Mean and standard deviation over the seeds, in percent.</p>"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts)
    curves = "".join(_chart(page, curve, _mean_curves(study, runs, 0, curve)) for curve in study.curves)
    evaluated = {name: label for label, name in study.metrics.items()}
    evaluated |= {name: name for name in _repeated(runs) if name not in evaluated}
    evaluations = "".join(_chart(page, label, _mean_curves(study, runs, 1, name)) for name, label in evaluated.items())
    maps = {}
    for run in runs if study.map_task else ():
        if run.seed == 0:
            found_maps = evaluate.parse_task(study.map_task)(inference.load(run.folder)).artefacts["map"]
            maps |= {f"{run.row.name}: {name}": item for name, item in found_maps.items()}
    sections = {
        "Results": note + html_page.table(escaped[0], escaped[1:]),
        "Order": f"<p>Against the published order, neighbours compared by Welch's t-test.</p><ul>{items}</ul>"
        if items
        else "",
        "Training": f'<p>Means over the seeds.</p><div class="charts">{curves}</div>' if curves else "",
        "Evaluations during training": f'<p>Means over the seeds.</p><div class="charts">{evaluations}</div>'
        if evaluations
        else "",
        "Maps": html_page.panels(EmbeddingMap.intro, [(name, item.draw(page)) for name, item in maps.items()]),
    }
    return html_page.write_page(workdir / "study.html", page.html(study.title, sections))


def _chart(page, title, curves):
    """Returns the chart of curves by row; empty where none has two points."""
    from clip_jax.evaluation.report.charts import chart

    return chart(page, title, curves, named=True) if any(len(points) > 1 for points in curves.values()) else ""


def _mean_curves(study, runs, kind, name):
    """Returns `{row name: [(step, mean over the seeds), ...]}` at the steps that all runs of a row have.

    Args:
      kind: 0 for a training metric, 1 for one of evaluations.
      name: the metric.
    """
    from clip_jax.evaluation.report.charts import read_metrics

    found = {}
    for row in study.rows:
        files = [run.folder / "metrics.jsonl" for run in runs if run.row is row]
        curves = [dict(read_metrics(file)[kind].get(name, ())) for file in files]
        steps = sorted(set.intersection(*map(set, curves)))
        points = [(s, statistics.mean(c[s] for c in curves)) for s in steps if all(c[s] is not None for c in curves)]
        found |= {row.name: points} if points else {}
    return found


def _repeated(runs):
    """Returns the names of evaluation metrics to draw: those of `_DRAWN` that any run has at two steps or more."""
    from clip_jax.evaluation.report.charts import read_metrics

    found = [read_metrics(run.folder / "metrics.jsonl")[1] for run in runs]
    names = {name for evaluation in found for name, series in evaluation.items() if len(series) > 1}
    return sorted(name for name in names if name.rpartition("/")[2] in _DRAWN)


def run_study(study, workdir, seeds, overrides, dry_run):
    """Runs a study, prints its table and writes its page. Raises UserError and Stopped."""
    runs = plan(study, workdir, seeds, overrides)
    if dry_run:
        for run in runs:
            print(shlex.join(["python", *run.command]))
        return
    workdir = storage.prepare(workdir)
    found = {readout: {row.name: [] for row in study.rows} for readout in study.readouts}
    for number, run in enumerate(runs, 1):
        start = time.monotonic()
        if (metrics := run.metrics()) is None:
            train(run)
            if (metrics := run.metrics()) is None:
                raise UserError(
                    f"{run.row.name}, seed {run.seed}: {run.folder} has no evaluation after step {run.steps}:"
                    " see eval.tasks"
                )
        for readout, read in read_out(study, run, metrics).items():
            found[readout][run.row.name].append(read)
            shown = ", ".join(
                f"{label} {read[metric]:.2%}" for label, metric in study.metrics.items() if metric in read
            )
            name = f"{run.row.name} seed {run.seed}" + f", read by {readout}" * (len(study.readouts) > 1)
            print(f"{number}/{len(runs)} {name}: {shown} ({time.monotonic() - start:.0f} s)", flush=True)
    head, rows = table(study, runs, found)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for line in order(study, found):
        print(line)
    print(f"page: {write(study, runs, found, workdir)}")


def main(argv=None):
    """Runs the command; returns its exit status, which is that of clip_jax.train."""
    parser = command.make_parser("clip_jax.study", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a study, e.g. configs/oner.py:ablation"
    )
    parser.add_argument(
        "--workdir", required=True, help="folder, gs:// or s3:// address of the study; each run has a subfolder"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with the seeds 0, 1, ... (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the training commands and run none")
    args, rest = parser.parse_known_args(argv)

    def work():
        if args.seeds < 1:
            raise UserError(f"--seeds={args.seeds}: must be at least 1")
        overrides = config_lib.parse_overrides(rest)
        run_study(load(args.config), args.workdir, args.seeds, overrides, args.dry_run)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
