"""Evaluates a checkpoint.

    python -m clip_jax.evaluate --checkpoint=runs/clip
    python -m clip_jax.evaluate --checkpoint=runs/clip --task="zeroshot(source='/data/pets')" --report

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
import sys

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.evaluation.results import merge_results
from clip_jax.evaluation.tasks import check, parse_tasks, summary
from clip_jax.evaluation.tasks import parse_task as parse_task
from clip_jax.runtime import command, hosts, storage


def run(model, tasks, log=print):
    """Runs tasks on a model, logs a short table of each, and returns their merged `EvalResult`.

    Args:
      model: as `clip_jax.evaluation.embed` describes it.
      tasks: task strings; one string counts as a list of one.
      log: function of a line.

    Raises UserError for a wrong task string, two tasks with metrics of one name, or unusable data.
    """
    results = []
    for task in parse_tasks([tasks] if isinstance(tasks, str) else tasks, "tasks"):
        result = task(model)
        for line in summary(result):
            log(line)
        results.append(result)
    return merge_results(results)


def check_tasks(config):
    """Checks the tasks of a configuration before a run starts, see `clip_jax.evaluation.tasks.check`."""
    check(config)


def write_report(workdir, config, result, path=None):
    """Writes the HTML page of a result; returns its path.

    Args:
      workdir: the work folder, which has metrics.jsonl.
      config: the configuration.
      result: the `EvalResult`.
      path: of the page; by default report.html in the work folder.

    Raises UserError when it cannot be written.
    """
    from clip_jax.evaluation.report import assembly

    workdir = storage.path(workdir)
    path = path or workdir / "report.html"
    return assembly.write_report(
        path,
        result,
        title=f"{config.method} on {config.data.source}",
        config=config.to_dict(),
        metrics_jsonl=workdir / "metrics.jsonl",
    )


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
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
    hosts.add_arguments(parser)
    args, args.overrides = parser.parse_known_args(argv)
    return command.run(lambda: evaluate(args))


def evaluate(args):
    """Does the work of the command for its parsed arguments; raises UserError."""
    for task in parse_tasks(args.task or (), "--task"):
        task.check_sources()
    overrides = config_lib.parse_overrides(args.overrides)
    hosts.start(hosts.from_arguments(args))
    from clip_jax.inference import load

    model = load(args.checkpoint, args.which, args.ema, overrides=overrides)
    tasks = args.task or model.config.eval.tasks
    if not tasks:
        raise UserError("the run was configured without evaluation tasks: name some with --task")
    result = run(model, tasks, hosts.log)
    if hosts.is_first() and args.json:
        storage.write(args.json, json.dumps(result.metrics, indent=1, sort_keys=True))
    if hosts.is_first() and args.report is not None:
        folder = storage.path(args.checkpoint)
        folder = next((p for p in (folder, *folder.parents[:2]) if (p / "metrics.jsonl").exists()), folder)
        print(f"report: {write_report(folder, model.config, result, args.report)}")
    hosts.wait("reported")  # by the first host


if __name__ == "__main__":
    sys.exit(main())
