"""Studies: several configurations, several seeds, one table.

    python -m clip_jax.study --config=configs/oner.py:ablation --workdir=runs/oner [--seeds=5] [--length=0.5]
    python -m clip_jax.study --report runs/methods runs/noise --out=studies.html

A file in `configs/` with studies defines their names, `STUDIES`, and `get_study(variant) -> Study`. Each run is the
ordinary training command in its own folder, WORKDIR/ROW/seed_N. A row that tries values of a field has a run for each
of them before, in WORKDIR/ROW/tune. `--dry-run` prints these commands; they may run elsewhere, into the same folders.
Complete runs are not repeated, and interrupted runs resume. The command prints the table and writes study.json,
study.svg and study.html: the figure, the table, the paired differences, what was tried, curves and maps.

`--report` makes one page of the studies in several folders.
"""

import math
import shlex
import sys
import time

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.runtime import command, storage
from clip_jax.studies import page, runs, tables
from clip_jax.studies.definition import Row as Row
from clip_jax.studies.definition import Study as Study
from clip_jax.studies.definition import key
from clip_jax.studies.definition import load as load


def run_study(study, workdir, seeds, overrides, dry_run=False, line="", length=1.0):
    """Runs a study, prints its tables and writes its files.

    Args:
      study: the `Study`.
      workdir: its work folder.
      seeds: the number of runs of each row.
      overrides: changes of all rows, such as `["optim.lr=0.5"]`.
      dry_run: print the commands and run none.
      line: the command that makes the study, for its page.
      length: the steps of each row are multiplied by it.

    Raises UserError, StorageError, and `clip_jax.runtime.faults.Stopped` after a signal.
    """
    planned = runs.plan(study, workdir, overrides, length)
    choose = runs.chooser(planned)
    steps = runs.in_order(planned, seeds, choose)
    if dry_run:
        for step in steps:
            _show(step, choose)
        return
    workdir = storage.prepare(workdir)
    found = tables.Found(study, planned, {}, {}, _empty(study), _empty(study), {})
    count, number = seeds * len(planned) + sum(len(p.tuning()) for p in planned), 0
    complete = []
    for step in steps:
        if isinstance(step, runs.Planned):
            runs.write_index(step)
            continue
        number += 1
        start = time.monotonic()
        wanted = [study.tune_metric] if step.value else study.metrics.values()
        metrics, outcomes = _result(step, wanted)
        if step.value:
            label = {"to choose by": key(study.tune_metric)}
            print(f"{number}/{count} {step.name}: {_shares(label, metrics)} ({_since(start)})", flush=True)
            continue
        complete.append(step)
        found.bytes.setdefault(step.row.name, runs.memory(step))
        for readout, (of_readout, kept) in runs.read_out(study, step, metrics, outcomes).items():
            found.metrics[readout][step.row.name].append(of_readout)
            found.outcomes[readout][step.row.name].append(kept)
            name = step.name + f", read by {readout}" * (len(study.readouts) > 1)
            print(f"{number}/{count} {name}: {_shares(study.keys(), of_readout)} ({_since(start)})", flush=True)
        if len(complete) % len(planned) == 0:  # all rows have this seed
            found.tried = {p.row.name: runs.tried(p) for p in planned if p.row.tune}
            found.chosen = {p.row.name: choose(p) for p in planned}
            path = page.write(found, complete, workdir, line, (number, count))
    _print(found)
    print(f"page: {path}")


def _empty(study):
    return {readout: {row.name: [] for row in study.rows} for readout in study.readouts}


def _show(step, choose):
    """Prints the command of a step of a study."""
    if isinstance(step, runs.Planned):
        print(shlex.join(["python", *step.index_command()]))
        return
    if any(argument.endswith(f"={runs.CHOSEN}") for argument in step.command):
        print(f"# {runs.CHOSEN}: the value that was the best of the runs above")
    print(shlex.join(["python", *step.command]))


def _result(run, wanted):
    """Trains a run unless it is complete; returns its `(metrics, outcomes)`. Raises UserError without an evaluation."""
    if (result := runs.results(run, wanted)) is None:
        runs.train(run)
        if (result := runs.results(run, wanted)) is None:
            raise UserError(f"{run.name}: {run.folder} has no evaluation after step {run.steps}: see eval.tasks")
    return result


def _shares(keys, metrics):
    return ", ".join(f"{label} {metrics[name]:.2%}" for label, name in keys.items() if metrics.get(name) is not None)


def _since(start):
    return f"{time.monotonic() - start:.0f} s"


def _print(found):
    for head, rows in (tables.results(found), tables.differences(found), tables.tuning(found)):
        if rows:
            print("\n".join(["", *tables.markdown(head, rows)]))
    for line in tables.order(found.study, found.metrics):
        print(line)


def parse_args(argv):
    """Returns `(args, overrides)` of a command line. Raises UserError."""
    parser = command.make_parser("clip_jax.study", __doc__)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="a study, e.g. configs/oner.py:ablation")
    parser.add_argument("--workdir", help="folder, gs:// or s3:// address of the study; each run has a subfolder")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with the seeds 0, 1, ... (default 3)")
    parser.add_argument("--length", type=float, default=1.0, help="multiplies the steps of each row (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the training commands and run none")
    parser.add_argument("--report", nargs="+", metavar="WORKDIR", help="make one page of these studies, and train none")
    parser.add_argument("--out", default="studies.html", metavar="PATH", help="the page of --report (studies.html)")
    args, rest = parser.parse_known_args(argv)
    if args.report:
        if args.config or args.workdir or rest:
            raise UserError("--report takes folders and --out alone")
        return args, []
    if not (args.config and args.workdir):
        raise UserError("give --config=FILE[:VARIANT] and --workdir=FOLDER, or --report FOLDER ...")
    if args.seeds < 1:
        raise UserError(f"--seeds={args.seeds}: must be at least 1")
    if not 0 < args.length < math.inf:
        raise UserError(f"--length={args.length}: must be a positive number")
    return args, config_lib.parse_overrides(rest)


def main(argv=None):
    """Runs the command; returns its exit status, which is that of clip_jax.train."""

    def work():
        args, overrides = parse_args(argv)
        if args.report:
            print(f"page: {page.report(args.report, args.out)}")
            return
        given = sys.argv[1:] if argv is None else argv
        line = shlex.join(["python", "-m", "clip_jax.study", *given])
        run_study(load(args.config), args.workdir, args.seeds, overrides, args.dry_run, line, args.length)

    return command.run(work)


if __name__ == "__main__":
    command.script(main)
