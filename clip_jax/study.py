"""Studies: several configurations, several seeds, one table.

    python -m clip_jax.study --config=configs/oner.py:ablation --workdir=runs/oner_ablation [--seeds=5] [--config.train.steps=300]

A file in `configs/` that has studies has their names, `STUDIES`, and `get_study(variant) -> Study`. Each run is the ordinary training
command in a folder of its own, WORKDIR/ROW/seed_N; `--dry-run` prints these commands, which may as well be run elsewhere into the same
folders. What is complete is not run again, and what was interrupted goes on. Then the table is printed, and study.html (the table, what of
the expected order came out, curves, maps) and study.json are written.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.runtime import command, faults


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration of a study: its name, `FILE[:VARIANT]`, what it changes (`optim.lr=1e-3`), and the published figures."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    published: tuple[float, ...] = ()  # percent


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
      title: of the page.
      rows: in the order of the table; where they have published figures, from the lowest to the highest, which is the order expected.
      metrics: column heading -> metric of the last evaluation, a share; the first one decides about the order.
      published: heading of the published figures.
      curves: metrics of training that are drawn.
      map_task: evaluation task whose 2-D maps are shown, one for each row; empty: none.
      equal_compute: every row gets as many steps as cost what the first row's cost; else each has the steps of its configuration.
      readouts: name -> fields that are changed (`oner.embed=projector`) when a trained model is evaluated by the tasks of its
        configuration once more, none that the weights' shapes follow from; the table has each row once for each readout. By default as
        it was trained.
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
    """One training of a study."""

    row: Row
    seed: int
    folder: pathlib.Path
    command: tuple[str, ...]
    steps: int
    flops: float  # of the whole training, of the model

    def metrics(self):
        """The metrics of its last evaluation, or None while it is not complete."""
        from clip_jax.evaluation.report import read_metrics

        last = {name: series[-1] for name, series in read_metrics(self.folder / "metrics.jsonl")[1].items()}
        return {name: value for name, (step, value) in last.items() if step == self.steps} or None


def load(spec):
    """The study of `"path/to/file.py[:variant]"`; raises UserError."""
    module, variant = config_lib.load_module(spec)
    if not hasattr(module, "get_study"):
        raise UserError(f"--config={spec}: {module.__file__!r} has no function get_study(variant)")
    if variant not in module.STUDIES:
        raise config_lib.unknown(f"--config={spec}: no study", variant, module.STUDIES)
    return module.get_study(variant)


def plan(study, workdir, seeds, overrides):
    """The runs of a study, all rows with one seed, then with the next; raises UserError for a configuration that cannot be."""
    from clip_jax.program import model_flops
    from clip_jax.train import make_parts

    runs = []
    for row in study.rows:
        changes = [*row.overrides, *overrides]
        config = make_parts(config_lib.load(row.config, changes))[0]
        steps, flops = config.train.steps, model_flops(config)
        if study.equal_compute and runs:
            steps = max(1, round(runs[0].flops / flops))
            changes.append(f"train.steps={steps}")
        path, colon, variant = row.config.partition(":")
        spec = os.path.relpath(path) + colon + variant
        for seed in range(seeds):
            folder = pathlib.Path(workdir) / row.name / f"seed_{seed}"
            command = ["-m", "clip_jax.train", f"--config={spec}", f"--workdir={folder}"]
            command += [f"--config.{change}" for change in (*changes, f"seed={seed}")]
            runs.append(Run(row, seed, folder, tuple(command), steps, steps * flops))
    return sorted(runs, key=lambda run: run.seed)


def train(run):
    """Runs the training command of a run, its lines going to `train.log`; raises Stopped or UserError when it did not end well."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "train.log"
    with (
        log.open("a") as out,
        subprocess.Popen([sys.executable, *run.command], stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has told the run as well
            status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        if status in (faults.PREEMPTED, faults.INTERRUPTED):
            raise faults.Stopped(status, f"in {run.row.name}, seed {run.seed}")
        line = (log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{run.row.name}, seed {run.seed} ended with status {status}: {line} ({log})")


def read_out(study, run, metrics):
    """`{readout: metrics}` of a complete run whose last evaluation said `metrics`; what had to be evaluated is kept in its folder."""
    from clip_jax import evaluate, inference

    file = run.folder / "readouts.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    found = {}
    for name, changes in study.readouts.items():
        key = f"step {run.steps}: {' '.join(changes)}"
        if changes and key not in kept:
            model = inference.load(run.folder, overrides=changes)
            kept[key] = evaluate.run(model, model.config.eval.tasks, log=lambda line: None).metrics
            file.write_text(json.dumps(kept, indent=1))
        found[name] = kept[key] if changes else metrics
    return found


def table(study, runs, found):
    """Heading and rows of text cells. `found`: readout -> row name -> list of metrics, one dict per seed."""
    cost = {run.row.name: run for run in runs}
    everything = [m for rows in found.values() for runs in rows.values() for m in runs]
    labels = [label for label, name in study.metrics.items() if any(name in m for m in everything)]
    by, published = ["read by"][: len(found) > 1], [study.published][: bool(study.published)]
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
    """What of the expected order came out, a sentence for each two neighbouring rows (Welch's t-test of the first metric, 5 %)."""
    from scipy.stats import ttest_ind

    label, metric = next(iter(study.metrics.items()))
    for (readout, by_row), (lower, higher) in itertools.product(found.items(), itertools.pairwise(study.rows)):
        if not (lower.published and higher.published):
            continue
        a, b = ([100 * m[metric] for m in by_row[row.name]] for row in (lower, higher))
        by = f"read by {readout}, " if len(found) > 1 else ""
        text = f"{by}{lower.name} < {higher.name}: {label} {statistics.mean(a):.2f} and {statistics.mean(b):.2f} %"
        if min(len(a), len(b)) < 2:
            yield f"{text}: one run each decides nothing"
            continue
        p = ttest_ind(a, b, equal_var=False).pvalue
        outcome = "came out" if statistics.mean(a) < statistics.mean(b) else "came out the other way round"
        yield f"{text}: {outcome if p < 0.05 else 'not told apart'} (p = {p:.2g})"


def write(study, runs, found, workdir):
    """Writes study.json and study.html into the work folder; returns the page's path."""
    from clip_jax import evaluate, inference
    from clip_jax.evaluation import report

    head, rows = table(study, runs, found)
    verdicts = list(order(study, found))
    figures = {"title": study.title, "runs": found, "table": [head, *rows], "order": verdicts}
    (workdir / "study.json").write_text(json.dumps(figures, indent=1))
    page = report.Page()
    escaped = [[html.escape(cell) for cell in cells] for cells in (head, *rows)]
    note = "<p>Mean and standard deviation over the seeds, in percent.</p>"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts)
    charts = ""
    for curve in study.curves:
        series = {row.name: _mean_curve([run for run in runs if run.row is row], curve) for row in study.rows}
        charts += report.chart(page, curve, {name: points for name, points in series.items() if points}, named=True)
    maps = {}
    for run in runs if study.map_task else ():
        if run.seed == 0:
            found_maps = evaluate.parse_task(study.map_task)(inference.load(run.folder)).artefacts["map"]
            maps |= {f"{run.row.name}: {name}": item for name, item in found_maps.items()}
    sections = {
        "Results": note + report.table(escaped[0], escaped[1:]),
        "Order": f"<p>Against the published order, neighbours compared by Welch's t-test.</p><ul>{items}</ul>"
        if items
        else "",
        "Training": f'<p>Means over the seeds.</p><div class="charts">{charts}</div>' if charts else "",
        "Maps": report.panels(maps, lambda item: report.embedding_map(page, item), report.MAP_INTRO),
    }
    return report.write_page(workdir / "study.html", page.html(study.title, {k: v for k, v in sections.items() if v}))


def _mean_curve(runs, name):
    """The mean over runs of a training metric at the steps that all have."""
    from clip_jax.evaluation.report import read_metrics

    curves = [dict(read_metrics(run.folder / "metrics.jsonl")[0].get(name, ())) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return [
        (step, statistics.mean(c[step] for c in curves)) for step in steps if all(c[step] is not None for c in curves)
    ]


def run_study(study, workdir, seeds, overrides, dry_run):
    """The work of the command; raises UserError and Stopped."""
    runs = plan(study, workdir, seeds, overrides)
    if dry_run:
        for run in runs:
            print(shlex.join(["python", *run.command]))
        return
    workdir.mkdir(parents=True, exist_ok=True)
    found = {readout: {row.name: [] for row in study.rows} for readout in study.readouts}
    for number, run in enumerate(runs, 1):
        start = time.monotonic()
        if (metrics := run.metrics()) is None:
            train(run)
            if (metrics := run.metrics()) is None:
                raise UserError(
                    f"{run.row.name}, seed {run.seed}: {run.folder} has no evaluation after step {run.steps}: see eval.tasks"
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
    """The command; returns the exit status, that of clip_jax.train."""
    parser = command.make_parser("clip_jax.study", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a study, e.g. configs/oner.py:ablation"
    )
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="a folder in which each run has one of its own"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with the seeds 0, 1, ... (default 3)")
    parser.add_argument("--dry-run", action="store_true", help="print the training commands and end")
    args, rest = parser.parse_known_args(argv)

    def work():
        if args.seeds < 1:
            raise UserError(f"--seeds={args.seeds}: at least one run of each row is needed")
        overrides = config_lib.parse_overrides(rest)
        run_study(load(args.config), args.workdir, args.seeds, overrides, args.dry_run)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
