"""The rounding error of the gradients' sum over chips, in float32 and in bfloat16 (`optim.grad_dtype`).

    python benchmarks/gradients.py
    python benchmarks/gradients.py --batch 2048 --chips 8,32 --config=configs/clip.py:smoke

One device computes the part of each chip, one after the other. The loss is that of the whole batch. The parts are
added as a ring adds them: each sum is rounded to the dtype before the next part comes. Errors are norms relative to
the gradient that float32 arithmetic gives, of kernels alone: all other gradients are always summed in float32. The
data are random, the parameters those at the start. See docs/scaling.md.
"""

import statistics

import common

COLUMNS = {
    "chips": ">5,", "examples a chip": ">15,", "sum": "<8", "median": ">8.2%", "largest": ">8.2%", "kernel": "<44",
}  # fmt: skip


def kernels(tree):
    """Returns `{path: kernel}` of the parameters of `tree`."""
    import jax

    from clip_jax.runtime.sharding import path_name

    found = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {path: x for path, x in found.items() if path.endswith("kernel")}


def make_parts(config, batch, params, extra):
    """Returns a function of the number of chips that yields each chip's part of the gradient."""
    import jax

    from clip_jax.methods.interface import make_method

    method, rng = make_method(config), jax.random.key(1)

    def encode(params, rows):
        return method.encode(params, extra, rows, rng, train=True)[0]

    def loss(features):
        return method.loss(params, extra, features, batch, rng)[0]

    @jax.jit
    def part(params, rows, cotangent):
        return kernels(jax.vjp(lambda p: encode(p, rows), params)[1](cotangent)[0])

    features = jax.jit(encode)(params, batch)
    cotangents = jax.jit(jax.grad(loss))(features)

    def parts(chips):
        for chip in range(chips):
            rows = slice(chip * len(batch["example_id"]) // chips, (chip + 1) * len(batch["example_id"]) // chips)
            yield part(params, *jax.tree.map(lambda x, rows=rows: x[rows], (batch, cotangents)))

    return parts


def main(argv=None):
    parser = common.make_parser(__doc__, "gradients")
    parser.add_argument("--config", default="configs/clip.py:emoji", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="examples of all chips (default: %(default)s)")
    parser.add_argument("--chips", default="4,16,64,256", help="numbers of chips (default: %(default)s)")
    args = common.parse(parser, argv)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from clip_jax import config as config_lib
    from clip_jax.program import make_program

    def load(dtype):
        overrides = [*args.overrides, f"data.batch_size={args.batch}", f"model.dtype={dtype}"]
        return make_program(config_lib.load(args.config, overrides))

    program, rounded = load("float32"), load("bfloat16").config
    rng, text = np.random.default_rng(0), program.config.model.text
    batch = {
        name: rng.integers(0, 256 if x.dtype == np.uint8 else text.vocab_size, x.shape, x.dtype)
        for name, x in program.batch.items()
    }
    batch["text"][:, -1] = max(text.eot_id, 0)
    batch = jax.tree.map(jnp.asarray, batch)
    params, extra = jax.jit(program.method.init)(jax.random.key(0), batch)
    (expected,) = make_parts(program.config, batch, params, extra)(1)
    parts = make_parts(rounded, batch, params, extra)

    report = common.Report(COLUMNS, config=args.config, overrides=args.overrides, batch=args.batch)
    report.header()
    for chips in map(int, args.chips.split(",")):
        for dtype in (jnp.float32, jnp.bfloat16):
            total = None
            for part in parts(chips):
                part = {path: x.astype(dtype) for path, x in part.items()}
                total = part if total is None else jax.tree.map(jnp.add, total, part)
            errors = {
                path: float(jnp.linalg.norm(total[path].astype(jnp.float32) - x) / jnp.linalg.norm(x))
                for path, x in expected.items()
            }
            worst = max(errors, key=errors.get)
            report.add(
                **{"chips": chips, "examples a chip": args.batch // chips, "sum": jnp.dtype(dtype).name},
                median=statistics.median(errors.values()), largest=errors[worst], kernel=worst, errors=errors,
            )  # fmt: skip
    report.write(args.json)


if __name__ == "__main__":
    main()
