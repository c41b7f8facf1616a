"""Mixes the weights of two checkpoints (WiSE-FT: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").

    python -m clip_jax.tools.interpolate --b=runs/pets --alpha=0,0.25,0.5,0.75,1 --task="accuracy(source='/data/pets')"
    python -m clip_jax.tools.interpolate --b=runs/pets --alpha=0.5 --out=runs/pets_wise

The weights are (1 - alpha) A + alpha B; running statistics of BatchNorm are mixed too, as in the authors' code. By
default A are the weights that run B started from (`init_from`; the first head of configs/classify.py is made again), so
that alpha=0 is the zero-shot model. --a names another checkpoint, or weights of others, with the same shapes. It is
needed where `init_from` is a run that has trained on since B started.

With several values of alpha, or without --out, the tasks are evaluated and a table is printed: a row for each alpha, a
column for each metric that is not the same in all rows. --out writes a work folder for `clip_jax.load` and
`clip_jax.evaluate`.
"""

import json
import math

from clip_jax.errors import UserError
from clip_jax.runtime import command, storage


def main(argv=None):
    """Runs the command; returns the exit status: 0, or after a one-line error 2, or 44 when storage fails."""
    parser = command.make_parser("clip_jax.tools.interpolate", __doc__)
    parser.add_argument("--a", metavar="RUN0", help="checkpoint or weights at alpha=0; default: where B started")
    parser.add_argument("--b", required=True, metavar="RUN1", help="checkpoint at alpha=1")
    parser.add_argument("--alpha", default="0.5", metavar="A[,A...]", help="shares of B, 0 to 1 (default: %(default)s)")
    parser.add_argument("--out", metavar="RUN", help="work folder to write; needs one alpha")
    parser.add_argument("--task", action="append", help="a task to run; may be repeated (default: those of B)")
    parser.add_argument("--json", metavar="PATH", help="write the metrics of each alpha as JSON")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args))


def _run(args):
    from clip_jax import inference
    from clip_jax.evaluation.tasks import parse_tasks

    alphas = _alphas(args)
    for task in parse_tasks(args.task or (), "--task"):
        task.check_sources()
    b = inference.load(args.b)
    tasks = parse_tasks(args.task or ([] if args.out else b.config.eval.tasks), "--task")
    if not tasks and not args.out:
        raise UserError(f"nothing to do: {args.b} was configured without evaluation tasks; give --task, or --out=RUN")
    a = inference.load(args.a, mesh=b.mesh) if args.a else beginning(b, args.b)
    check(a, b, args.a or f"the weights that {args.b} started from", args.b)
    results, ends = {}, (a.params, a.extra, b.params, b.extra)
    for alpha in alphas:
        b.params, b.extra = mix(*ends, alpha)
        if tasks:
            results[alpha] = {name: value for task in tasks for name, value in task(b).metrics.items()}
    if results:
        print("\n".join(table(results)))
    if args.json:
        storage.write(args.json, json.dumps(results, indent=1, sort_keys=True))
    if args.out:
        _write(b, args.out)
        print(f"written: {args.out}, alpha={alphas[0]:g}; use it with clip_jax.load({args.out!r})")


def _alphas(args):
    """Returns the values of alpha; raises UserError for wrong arguments."""
    try:
        alphas = list(dict.fromkeys(float(text) for text in args.alpha.split(",")))
    except ValueError:
        alphas = []
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--alpha={args.alpha}: give numbers from 0 to 1, such as 0.5 or 0,0.25,0.5,0.75,1")
    if args.out and len(alphas) > 1:
        raise UserError(f"--alpha={args.alpha}: --out takes one alpha; without --out the tasks compare several")
    if args.out and (storage.path(args.out) / "checkpoints").exists():
        raise UserError(f"--out={args.out}: this folder already has checkpoints")
    return alphas


def beginning(model, path):
    """Returns the `clip_jax.Model` with the weights that the run of a model started from.

    Args:
      model: the model.
      path: its path, for messages.

    Raises UserError when the run started from no weights, these are gone or do not fit, or their run has trained on.
    """
    from clip_jax import init_from
    from clip_jax.inference import Model

    if not model.config.init_from:
        raise UserError(f"--b={path}: this run did not start from weights (init_from): give --a")
    for line in _steps(model.config.init_from, path):
        print(line)
    params, extra = init_from.beginning(model.config, model.method, model.tokenizer, model.mesh)
    return Model(model.config, model.method, params, extra, model.tokenizer, model.mesh)


def _steps(init_from, path):
    """Yields a line for each run that the run at `path` started from: the step that it has trained to.

    The first line of config_history.jsonl has the time of the start, metrics.jsonl those of the steps. A run without
    these files, and weights of others, give no line.

    Raises UserError when a run has trained on since the start: its newest checkpoint is another one now.
    """
    from clip_jax.interop.towers.files import sources
    from clip_jax.training import checkpoint

    begun = storage.read_rows(_work_folder(path) / "config_history.jsonl")[:1]
    if not begun or begun[0]["step"]:
        return
    for source in sources(init_from).values():
        folder = _work_folder(source)
        if folder == storage.path(source).parent.parent:
            continue  # one checkpoint is named
        rows = storage.read_rows(folder / "metrics.jsonl")
        since = max((row["step"] for row in rows if row.get("time", math.inf) <= begun[0]["time"]), default=0)
        now = max((row["step"] for row in rows), default=0)
        if now > since:
            kept = [step for step in checkpoint.committed(folder / "checkpoints") if step <= since]
            hint = f", such as --a={folder}/checkpoints/{kept[-1]}" if kept else ""
            raise UserError(
                f"{source}, which {path} started from, has trained on since, from step {since} to {now}: name the "
                f"checkpoint that it started from with --a{hint}"
            )
        if rows:
            yield f"alpha=0: {source}, trained to step {now}"


def _work_folder(path):
    """Returns the work folder of a path that `clip_jax.load` takes."""
    path = storage.path(path)
    if path.name == "checkpoints":
        return path.parent
    return path.parent.parent if path.parent.name == "checkpoints" else path


def check(a, b, name_a, name_b):
    """Raises UserError when the weights of two models have other shapes, or a model uses its weights differently."""
    from clip_jax import config as config_lib
    from clip_jax.init_from import ALLOWED

    (ours, theirs), problems = (_shapes(a), _shapes(b)), []
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            problems.append(f"{path} is {_text(ours.get(path))} and {_text(theirs.get(path))}")
    for field, x, y in config_lib.differences(a.config, b.config, ["model"]):
        if field in ALLOWED and None not in (x, y):
            problems.append(f"{field} is {x!r} and {y!r}")
    if a.tokenizer and b.tokenizer and a.tokenizer.fingerprint() != b.tokenizer.fingerprint():
        problems.append("their tokenizers differ")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{name_a} and {name_b} cannot be mixed: {'; '.join(problems[:5])}{more}")


def _shapes(model):
    import jax

    from clip_jax.runtime.sharding import path_name

    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(model.params)}


def _text(shape):
    return "missing" if shape is None else f"({', '.join(map(str, shape))})"


def mix(params_a, extra_a, params_b, extra_b, alpha):
    """Returns `(params, extra)`, (1 - alpha) a + alpha b of parameters and running statistics; the rest is that of b.

    Args:
      params_a, extra_a, params_b, extra_b: parameters and state of two models with equal shapes.
      alpha: the share of b.
    """
    import jax

    def between(a, b, alpha):
        return jax.tree.map(lambda x, y: ((1 - alpha) * x + alpha * y).astype(y.dtype), a, b)

    stats = ("batch_stats",) if "batch_stats" in extra_b else ()
    a, b = ({name: extra[name] for name in stats} for extra in (extra_a, extra_b))
    mixed, params = jax.jit(between)((a, params_a), (b, params_b), alpha)
    return params, {**extra_b, **mixed}


def table(results):
    """Yields the lines of a table of metrics, `{alpha: {name: value}}`; metrics that never differ are left out."""
    rows = list(results.values())
    names = [name for name in rows[0] if any(row[name] != rows[0][name] for row in rows)] or list(rows[0])
    widths = [max(len(name), 8) for name in names]
    yield "  ".join(["alpha", *(name.rjust(width) for name, width in zip(names, widths, strict=True))])
    for alpha, row in results.items():
        values = (f"{row[name]:.4g}".rjust(width) for name, width in zip(names, widths, strict=True))
        yield "  ".join([f"{alpha:5.3g}", *values])


def _write(model, out):
    from clip_jax.interop import load as interop

    config = model.config.copy_and_resolve_references()
    config.eval.ema = False  # the mixed weights are the only ones
    interop.write(interop.Imported(config, model.params, model.extra, model.tokenizer, []), out)


if __name__ == "__main__":
    command.script(main)
