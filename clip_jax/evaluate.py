"""Evaluates a checkpoint.

    python -m clip_jax.evaluate --checkpoint=runs/clip
    python -m clip_jax.evaluate --checkpoint=runs/clip --task="zeroshot(source='/data/pets')" --report
    python -m clip_jax.evaluate --checkpoint=gs://bucket/clip --follow --best=pets/top1

With `--follow` the command evaluates each new checkpoint of a run, until the run is complete. The metrics are in
evaluations/STEP.json of the work folder, and the best checkpoint is kept in its folder best.

Only the checkpoint is needed. Without `--task` the tasks of the run's configuration run. A task is a call with literals
(docs/evaluation.md), of a task of this package or of a module by its import path (docs/adding_a_task.md):

    emoji(subset='all', language='en')
    zeroshot(source='/data/pets', split='test', classes='pets.txt', templates='clip_80', name='pets')
    retrieval(source='flickr.jsonl', split='test', name='flickr')
    relations(source='scenes')
    probe(train='/data/cifar/train', test='/data/cifar/test', name='cifar')
    knn(train='/data/cifar/train', test='/data/cifar/test', k=20)
"""

import argparse
import json
import math
import time

from clip_jax import config as config_lib
from clip_jax.errors import UserError, unknown
from clip_jax.evaluation.results import EvalResult, merge_results
from clip_jax.evaluation.tasks import check, check_metric, parse_tasks, summary
from clip_jax.evaluation.tasks import parse_task as parse_task
from clip_jax.runtime import command, hosts, lock, storage

#: Seconds between two looks for a new checkpoint.
POLL_SECONDS = 10
#: The lock of a folder's evaluator, which writes nothing that its training writes.
LOCK = "evaluate.lock"


def run(model, tasks, log=print):
    """Runs tasks on a model, logs a short table of each, and returns their merged `EvalResult`.

    Args:
      model: as `clip_jax.evaluation.embed` describes it.
      tasks: task strings; one string counts as a list of one.
      log: function of a line.

    Raises UserError for a wrong task string, two tasks with metrics of one name, or unusable data.
    """
    from clip_jax.evaluation.report.head import describe_task

    results = [EvalResult({}, model=model.facts() if hasattr(model, "facts") else {})]
    for task in parse_tasks([tasks] if isinstance(tasks, str) else tasks, "tasks"):
        result = task(model)
        for line in summary(result):
            log(line)
        result.evaluated.append(describe_task(task))
        results.append(result)
    return merge_results(results)


def check_tasks(config):
    """Checks the tasks of a configuration before a run starts, see `clip_jax.evaluation.tasks.check`."""
    check(config)


def keep_outcomes(workdir, step, result):
    """Writes the outcomes of a result image by image into a work folder (`clip_jax.evaluation.outcomes`)."""
    from clip_jax.evaluation import outcomes

    outcomes.write(storage.path(workdir) / outcomes.FILE, step, result.outcomes)


def write_report(workdir, config, result, path=None):
    """Writes the HTML page of a result; returns its path.

    Args:
      workdir: the work folder, which has metrics.jsonl.
      config: the configuration.
      result: the `EvalResult`.
      path: of the page; by default report.html in the work folder.

    Raises UserError when it cannot be written.
    """
    from clip_jax import run_folder
    from clip_jax.evaluation.report import assembly, queries

    workdir = storage.path(workdir)
    if not path:
        queries.write(workdir, result)
    path = path or workdir / "report.html"
    return assembly.write_report(
        path,
        result,
        title=" on ".join(filter(None, [config.method, config.data.source.replace("{split}", config.data.split)])),
        config=config.to_dict(),
        metrics_jsonl=workdir / "metrics.jsonl",
        history=run_folder.history(workdir),
    )


def main(argv=None):
    """Runs the command; returns the exit status: 0, or after a one-line error 2, or 44 when storage fails."""
    parser = command.make_parser("clip_jax.evaluate", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a work folder, its checkpoints folder, or the folder of one step"
    )
    parser.add_argument("--which", default="latest", help="latest (default), best, or a step")
    parser.add_argument("--task", action="append", help="a task to run; may be repeated")
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="evaluate the moving average of the weights"
    )
    parser.add_argument(
        "--report", nargs="?", const="", metavar="PATH", help="write an HTML page (report.html in the work folder)"
    )
    parser.add_argument("--json", metavar="PATH", help="write all metrics as JSON")
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint of a work folder")
    parser.add_argument(
        "--best",
        metavar="[-]METRIC",
        help="with --follow: the metric by which the best checkpoint is kept, by default checkpoint.best where the "
        "tasks compute it; - keeps the lowest, an empty one keeps none",
    )
    hosts.add_arguments(parser)
    args, args.overrides = parser.parse_known_args(argv)
    return command.run(lambda: evaluate(args))


def _load(args, path, which, overrides):
    """Returns `(model, tasks)` of the command for one checkpoint. Raises UserError and StorageError."""
    from clip_jax.inference import load

    model = load(path, which, args.ema, overrides=overrides)
    tasks = args.task or model.config.eval.tasks
    if not tasks:
        raise UserError("the run was configured without evaluation tasks: name some with --task")
    return model, tasks


def follow(args, overrides):
    """Evaluates each new checkpoint of a run until its last step, oldest first; evaluated ones are not repeated.

    A checkpoint that the run deletes before it is loaded is left out. Raises UserError and StorageError.
    """
    from clip_jax.training import checkpoint

    workdir = storage.prepare(args.checkpoint, "--checkpoint")
    if checkpoint.committed(workdir) or (workdir / "state").is_dir():
        raise UserError(f"--checkpoint={workdir}: --follow takes the work folder, which has the folder 'checkpoints'")
    with lock.hold(workdir, hosts.log, name=LOCK):
        _follow(args, workdir, overrides)


def _follow(args, workdir, overrides):
    from clip_jax.training import checkpoint

    total, done = None, set()
    hosts.log(f"waiting for checkpoints in {workdir / 'checkpoints'}")
    while total not in done:
        found = checkpoint.committed(workdir / "checkpoints")
        new = hosts.gather([step for step in found if step not in done])[0]
        if not new:
            time.sleep(POLL_SECONDS)
            continue
        step, folder = new[0], workdir / "checkpoints" / str(new[0])
        done.add(step)
        is_evaluated = hosts.gather(storage.read(_evaluated(workdir, step)) is not None)[0]
        model, problem = None, ""
        try:
            total = checkpoint.read_meta(folder)["config"]["train"]["steps"]
            if not is_evaluated:
                model, tasks = _load(args, folder, "latest", overrides)
                if args.best:
                    metric = args.best.removeprefix("-")
                    check_metric(metric, parse_tasks(tasks, "tasks"), f"--best: no metric {metric!r}")
        except UserError as error:
            problem = str(error)
        # A checkpoint that one host cannot load is left out on all of them.
        if problem := next(filter(None, hosts.gather(problem)), ""):
            if step in hosts.gather(checkpoint.committed(workdir / "checkpoints"))[0]:
                raise UserError(problem)
            hosts.log(f"step {step}: the run has deleted this checkpoint")
            continue
        if is_evaluated:
            continue
        hosts.log(f"step {step} of {total}:")
        result = run(model, tasks, hosts.log)
        if hosts.is_first():
            best = model.config.checkpoint.best if args.best is None else args.best
            # Tasks of the training alone may compute the run's own metric.
            if args.best or best.removeprefix("-") in result.metrics:
                _keep_best(workdir, step, result.metrics, best)
            storage.write(_evaluated(workdir, step), json.dumps(result.metrics, indent=1, sort_keys=True))
        hosts.wait(f"evaluated {step}")
    hosts.log(f"the run in {workdir} is complete")


def _evaluated(workdir, step):
    """Returns the file of a checkpoint's metrics."""
    return workdir / "evaluations" / f"{step}.json"


def _keep_best(workdir, step, metrics, name):
    """Copies a checkpoint to `<workdir>/best/checkpoints` when it is better than the one there.

    Args:
      workdir: the work folder.
      step: the step of the checkpoint.
      metrics: its metrics.
      name: the metric that decides, "-" before it when the lowest is the best; empty: nothing is kept.

    Raises UserError when there is no such metric.
    """
    from clip_jax.training import checkpoint

    metric = name.removeprefix("-")
    if not metric:
        return
    if metric not in metrics:
        raise unknown("--best: no metric", metric, sorted(metrics))
    folder = workdir / "best" / "checkpoints"
    kept = checkpoint.committed(folder)
    stored = (json.loads(storage.read(_evaluated(workdir, other)) or "{}") for other in kept)
    best = max((checkpoint.score(values, name) for values in stored), default=-math.inf)
    if checkpoint.score(metrics, name) <= best:
        return
    source, copy = workdir / "checkpoints" / str(step), folder / str(step)
    try:
        storage.copy(source, copy, last=checkpoint.COMMIT)
        is_whole = list(storage.files(source)) == list(storage.files(copy))
    except FileNotFoundError:
        is_whole = False
    if not is_whole:  # the run deletes it
        storage.remove(copy)
        return
    for other in set(kept) - {step}:
        storage.remove(folder / str(other))
    hosts.log(f"the best so far: {metric} {metrics[metric]:.4g}, kept in {copy}")


def _run_folder(path):
    """Returns the work folder that a checkpoint belongs to, the path itself when there is none."""
    path = storage.path(path)
    with storage.guard(path):
        return next((p for p in (path, *path.parents[:2]) if (p / "metrics.jsonl").exists()), path)


def evaluate(args):
    """Does the work of the command for its parsed arguments; raises UserError."""
    for task in parse_tasks(args.task or (), "--task"):
        task.check_sources()
    overrides = config_lib.parse_overrides(args.overrides)
    if args.follow and (args.which != "latest" or args.report is not None or args.json):
        raise UserError("--follow takes no --which, --report and --json")
    if args.best and not args.follow:
        raise UserError("--best needs --follow")
    folder = _run_folder(args.checkpoint) if args.report is not None else None
    if args.report == "":
        lock.check_free(folder, "it writes report.html itself: name another page, --report=PATH")
    hosts.start(hosts.from_arguments(args))
    if args.follow:
        follow(args, overrides)
        return
    model, tasks = _load(args, args.checkpoint, args.which, overrides)
    result = run(model, tasks, hosts.log)
    if hosts.is_first() and args.json:
        storage.write(args.json, json.dumps(result.metrics, indent=1, sort_keys=True))
    if hosts.is_first() and args.report is not None:
        print(f"report: {write_report(folder, model.config, result, args.report)}")
    hosts.wait("reported")  # by the first host


if __name__ == "__main__":
    command.script(main)
