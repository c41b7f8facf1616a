"""Evaluation of a checkpoint: `python -m clip_jax.evaluate --checkpoint=runs/clip [--task="zeroshot(source='/data/pets')"] [--report]`.

Needs nothing but the checkpoint. Without `--task` it runs the tasks that the run was configured with. A task is written as a
call with literals (docs/evaluation.md):

    emoji(subset='all', language='en')
    zeroshot(source='/data/pets', split='test', classes='pets.txt', templates='clip_80', name='pets')
    retrieval(source='flickr.jsonl', split='test', name='flickr')
    relations(source='scenes')
    probe(train='/data/cifar/train', test='/data/cifar/test', name='cifar')
"""

import argparse
import inspect
import json
import pathlib
import sys

from clip_jax import config as config_lib
from clip_jax.data.sources import make_source
from clip_jax.errors import UserError
from clip_jax.plugins import parse_call
from clip_jax.runtime import command, hosts


def emoji(model, subset="all", templates=("{}",), language="en"):
    """The embedded protocol: {seen, unseen concepts} x {seen, unseen vendor}, names in one of 28 languages."""
    from clip_jax.evaluation.tasks import emoji_task

    return emoji_task(model, subset, language, templates=templates)


def _open(source, split, **fields):
    """The source; without a split its "test", or the only one it has."""
    fields = {name: value or None for name, value in fields.items()}
    if split:
        return make_source(source, split, **fields)
    try:
        return make_source(source, "test", **fields)
    except UserError:
        return make_source(source, "train", **fields)


def zeroshot(model, source, split="", classes=None, templates="simple", name="zeroshot", duplicates="error", canonical=False,
             label="", image="", limit=None):  # fmt: skip
    """Zero-shot classification of any labelled source; `classes`: the source's own, a name, a file with one per line, or a list."""
    from clip_jax.evaluation.tasks import zeroshot_task

    data = _open(source, split, image=image, label=label)
    return zeroshot_task(
        model, data, classes, templates, name=name, duplicates=duplicates, canonical=canonical, limit=limit
    )


def retrieval(model, source, split="", name="retrieval", image="", text="", limit=None):
    """Image-text retrieval R@1, 5, 10 in both directions; pictures with several captions count as the published protocols have it."""
    from clip_jax.evaluation.tasks import retrieval_task

    return retrieval_task(model, _open(source, split, image=image, text=text), name=name, limit=limit)


def relations(model, source="scenes", split="", name="scenes", image="", text="", limit=1500):
    """The right caption of a picture against the one with objects or attributes exchanged; `limit`: of pictures, evenly spaced."""
    from clip_jax.evaluation.tasks import relations_task

    return relations_task(model, _open(source, split, image=image, text=text), name=name, limit=limit)


def probe(model, train, test, train_split="train", test_split="", name="probe", image="", label="", limit=None):
    """Linear probe on the image embeddings."""
    from clip_jax.evaluation.tasks import probe_task

    fields = dict(image=image, label=label)
    return probe_task(
        model, _open(train, train_split, **fields), _open(test, test_split, **fields), name=name, limit=limit
    )


TASKS = {"emoji": emoji, "zeroshot": zeroshot, "retrieval": retrieval, "relations": relations, "probe": probe}


def parse_task(text):
    """`"zeroshot(source='x')"` -> a function of a model; raises UserError for an unknown task or argument."""
    name, args, kwargs = parse_call(text, "task")
    if name not in TASKS:
        raise config_lib.unknown("unknown task", name, TASKS)
    signature = inspect.signature(TASKS[name])
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        parameters = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
        raise UserError(f"task {text!r}: {error}; it is {name}({parameters})") from None
    return lambda model: TASKS[name](model, *args, **kwargs)


def run(model, tasks, log=print):
    """Runs tasks (strings) on a model; prints a short table of each; returns their merged EvalResult."""
    from clip_jax.evaluation.tasks import merge_results

    results = []
    for task in tasks:
        result = parse_task(task)(model)
        for line in summary(result.metrics):
            log(line)
        results.append(result)
    return merge_results(results)


CELLS = [(c, v) for c in ("seen", "unseen") for v in ("seen", "unseen")]


def summary(metrics):
    """The lines that tell the main numbers of a task: for the emoji protocol and for relations a table, for others every metric."""
    rest = dict(metrics)
    for name in [key.removesuffix("/relations") for key in metrics if key.endswith("/relations")]:
        m = {key.removeprefix(name + "/"): rest.pop(key) for key in metrics if key.startswith(name + "/")}
        yield from _relation_lines(name, m)
    for prefix in dict.fromkeys(key.split("/")[0] for key in metrics if key.startswith("emoji")):
        cells = [
            (c, v, f"{prefix}/{c}_concept_{v}_vendor")
            for c, v in CELLS
            if f"{prefix}/{c}_concept_{v}_vendor/top1" in metrics
        ]
        if not cells:
            continue
        yield f"{prefix} zero-shot      top-1   top-5   chance  pixel 1-NN   R@10 i2t/t2i   top-1 without compositions   pictures x classes"
        for concept, vendor, cell in cells:
            m = {key.removeprefix(cell + "/"): value for key, value in metrics.items() if key.startswith(cell + "/")}
            pixel = f"{m['pixel_1nn_top1']:8.1%}" if "pixel_1nn_top1" in m else "       -"
            recall = (
                f"{m['image_to_text_R@10']:.1%} / {m['text_to_image_R@10']:.1%}" if "image_to_text_R@10" in m else "-"
            )
            yield (
                f"  {concept + ' concept,':16}{vendor + ' vendor':14}{m['top1']:6.1%}  {m['top5']:6.1%}  {m['chance_top1']:6.2%}  {pixel}"
                f"   {recall:>13}   {m['top1_without_compositions']:8.1%}   {m['images']:.0f} x {m['classes']:.0f}"
            )
        if any(c == v == "seen" for c, v, _ in cells):
            yield "  (the pictures of seen concepts from seen vendors were trained on)"
        rest = {key: value for key, value in rest.items() if not key.startswith(prefix + "/")}
    for key, value in rest.items():
        yield f"  {key:40} {value:.4g}"


def _relation_lines(name, m):
    """Of a task's metrics without its name: a row for each wrong caption, a column for each part of the pictures."""
    parts = ["", *(key.removeprefix("relations") for key in m if key.startswith("relations_"))]
    yield (
        f"{name}, right caption against wrong"
        + "".join(f"{part[1:] or 'all':>13}" for part in parts)
        + "   chance  pictures"
    )
    for test, words, count in (("relations", "objects", "images"), ("attributes", "attributes", "images_attributes")):
        if test in m:
            cells = "".join(f"{m[test + part]:13.1%}" if test + part in m else f"{'-':>13}" for part in parts)
            yield f"  {words + ' exchanged':{len(name) + 27}}{cells}      50%  {m[count]:8.0f}"
    recalls = (f"R@{k} {m[f'image_to_text_R@{k}']:.1%} / {m[f'text_to_image_R@{k}']:.1%}" for k in (1, 10))
    yield f"  retrieval among the right captions, i2t/t2i: {', '.join(recalls)}"


def write_report(workdir, config, result, path=None):
    """Writes the HTML page of a result; returns its path."""
    from clip_jax.evaluation import report

    workdir = pathlib.Path(workdir)
    path = pathlib.Path(path) if path else workdir / "report.html"
    return report.write_report(
        path,
        result,
        title=f"{config.method} on {config.data.source}",
        config=config.to_dict(),
        metrics_jsonl=workdir / "metrics.jsonl",
    )


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = command.make_parser("clip_jax.evaluate", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a work folder, its checkpoints folder, or the folder of one step"
    )
    parser.add_argument("--which", default="latest", help="latest (default), best, or a step")
    parser.add_argument("--task", action="append", help="may be given several times")
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
    """The work of the command; `args`: its parsed arguments. Raises UserError."""
    for task in args.task or ():
        parse_task(task)
    overrides = config_lib.parse_overrides(args.overrides)
    hosts.start(hosts.from_arguments(args))
    from clip_jax.inference import load

    model = load(args.checkpoint, args.which, args.ema, overrides=overrides)
    tasks = args.task or model.config.eval.tasks
    if not tasks:
        raise UserError("the run was configured with no evaluation tasks: name some with --task")
    result = run(model, tasks, hosts.log)
    if hosts.is_first() and args.json:
        pathlib.Path(args.json).write_text(json.dumps(result.metrics, indent=1, sort_keys=True))
    if hosts.is_first() and args.report is not None:
        folder = pathlib.Path(args.checkpoint)
        folder = next((p for p in (folder, *folder.parents[:2]) if (p / "metrics.jsonl").is_file()), folder)
        print(f"report: {write_report(folder, model.config, result, args.report)}")
    hosts.wait("reported")  # by the first one


if __name__ == "__main__":
    sys.exit(main())
