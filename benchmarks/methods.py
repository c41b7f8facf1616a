"""A training step of every method compared with CLIP's: same towers, same batch, and the passes through the towers.

    python benchmarks/methods.py
    python benchmarks/methods.py --configs clip,declip:small_slip,otter --batch 64

Each configuration is the default of its file in configs/, unless a variant is named, with the towers of
configs/clip.py. A method keeps its own head widths, patch dropout and image size; a method with one tower takes the
image tower's sizes. Passes count in batches: 1 is one pass of all images, or texts, of a batch. `fixed` passes
carry no gradient. FLOPs are the matrix products of a step, forward and backward. Steps take turns on random data;
times are medians. See benchmarks/README.md.
"""

import pathlib
import statistics
import time

import common

COLUMNS = {
    "method": "<18", "images": ">6.1f", "texts": ">6.1f", "fixed images": ">12.1f", "fixed texts": ">11.1f",
    "GFLOP": ">8.2f", "FLOP / CLIP's": ">13.2f", "ms": ">8.1f", "fastest ms": ">10.1f", "ms / CLIP's": ">11.2f",
}  # fmt: skip
OWN = ("size", "patch_drop")


def load(name, batch):
    """Returns the configuration of `method[:variant]` with the towers of configs/clip.py."""
    from clip_jax import config

    folder = pathlib.Path(common.ROOT, "configs")
    file, _, variant = name.partition(":")
    c, clip = (config.load(f"{folder / f'{f}.py'}:{v}").unlock() for f, v in ((file, variant), ("clip", "")))
    image, text = c.model.image, c.model.get("text", {})
    kept = {field: image[field] for field in OWN if field in image}
    if image.get("kind", "pyramid").startswith("pyramid"):  # a tower with other fields
        shared = (field for field in image if field in clip.model.image and field not in ("kind", *kept))
        image.update({field: clip.model.image[field] for field in shared})
    else:
        c.model.image = clip.model.image
        c.model.image.update(kept)
    if "kind" in text:
        c.model.text = clip.model.text
    c.model.embed_dim, c.model.dtype = clip.model.embed_dim, clip.model.dtype
    c.data.batch_size = batch
    if "classify" in c:
        c.classify.classes = ("cat", "dog")  # those of the data, which are not opened here
    return c.lock()


def count_passes(program):
    """Returns the passes of a training step's encoding, `{("images" or "texts", with gradient): batches}`."""
    import collections

    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from clip_jax.training import optimizers

    counts, apply = collections.Counter(), nn.Module.apply
    size = program.config.data.batch_size
    params = program.state.params
    frozen = {k for k, x in optimizers.frozen(program.config.optim, params).items() if all(jax.tree.leaves(x))}

    def encode(params, extra, batch):
        trained = {id(x) for k, x in params.items() if k not in frozen}

        def counting(self, variables, *args, **kwargs):
            for x in args:
                kind = getattr(x, "ndim", 0)
                kind = (
                    "images" if kind == 4 else "texts" if kind == 2 and jnp.issubdtype(x.dtype, jnp.integer) else None
                )
                if kind:
                    counts[kind, id(variables["params"]) in trained] += len(x) / size
            return apply(self, variables, *args, **kwargs)

        nn.Module.apply = counting
        try:
            return program.method.encode(params, extra, batch, jax.random.key(0), True)
        finally:
            nn.Module.apply = apply

    jax.eval_shape(encode, params, program.state.extra, program.batch)
    return counts


class Step:
    """The compiled step of a configuration, with its state and a random batch."""

    def __init__(self, config):
        import jax
        import numpy as np

        from clip_jax.program import make_program, model_flops
        from clip_jax.runtime.sharding import id_words
        from clip_jax.training.step import first_state, make_init, make_step

        self.program = program = make_program(config)
        self.flops = model_flops(config)
        rng, vocab = np.random.default_rng(0), program.config.model.get("text", {}).get("vocab_size", 1)
        limits = {name: 256 if x.dtype == np.uint8 else vocab for name, x in program.batch.items()}
        batch = {
            name: rng.random(x.shape, x.dtype)
            if x.dtype == np.float32
            else rng.integers(0, limits[name], x.shape, x.dtype)
            for name, x in program.batch.items()
        }
        self.batch = batch | {"example_id": id_words(np.arange(config.data.batch_size))}
        init, tx = make_init(program.config, program.method, program.batch)
        self.state = first_state(init, jax.random.key(0))
        step = jax.jit(make_step(program.config, program.method, tx), donate_argnums=0)
        self.step = step.lower(self.state, self.batch).compile()

    def seconds(self, steps):
        """Returns the seconds per step."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps


def main():
    parser = common.make_parser(__doc__, "methods")
    files = sorted(path.stem for path in pathlib.Path(common.ROOT, "configs").glob("*.py"))
    parser.add_argument(
        "--configs", default=",".join(files), help="files of configs/, optionally with :variant (default: all)"
    )
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each step (default: %(default)s)")
    args = parser.parse_args()
    import jax

    names = list(dict.fromkeys(["clip", *filter(None, args.configs.split(","))]))
    runs = {name: Step(load(name, args.batch)) for name in names}
    times = {name: [] for name in names}
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            seconds = run.seconds(args.steps)
            if turn:
                times[name].append(1e3 * seconds)
    report = common.Report(COLUMNS, devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}", batch=args.batch)
    report.header()
    clip, clip_ms = runs["clip"], statistics.median(times["clip"])
    for name, run in runs.items():
        counts, ms = count_passes(run.program), statistics.median(times[name])
        passes = {
            ("" if trained else "fixed ") + kind: counts[kind, trained]
            for trained in (True, False)
            for kind in ("images", "texts")
        }
        cost = {
            "GFLOP": run.flops / 1e9,
            "FLOP / CLIP's": run.flops / clip.flops,
            "ms": ms,
            "fastest ms": min(times[name]),
        }
        report.add(method=name, **passes, **cost, **{"ms / CLIP's": ms / clip_ms})
    report.write(args.json)


if __name__ == "__main__":
    main()
