"""Contrastive losses, forward and backward, compared with plain versions that hold the matrix of all pairs.

    python benchmarks/contrastive.py --loss infonce
    python benchmarks/contrastive.py --loss infonce --batches "" --time 4096,8192

The batch is sharded over all devices; a machine without accelerators simulates them (`--devices`). Memory is the
compiler's reservation for temporaries on each device, without allocating it. Times are medians of runs that take
turns. Everything is float32. See benchmarks/README.md.
"""

import os
import statistics
import time

import common

COLUMNS = {
    "loss": "<8", "batch": ">8,", "MiB": ">9.1f", "plain MiB": ">11.1f", "ms": ">10.1f", "plain ms": ">10.1f",
    "ours / plain": ">13.2f",
}  # fmt: skip
#: Batches for the comparison of memory, and for that of time.
SIZES = {
    "infonce": ("16384,32768,65536,131072", "4096,8192"),
    "sigmoid": ("16384,32768,65536,131072", "4096,8192"),
    "filip": ("1024,2048,4096,8192", "128,256"),
}
WIDTH, FILIP_WIDTH = 512, 256
IMAGE_TOKENS, TEXT_TOKENS = 49, 77


def plain_infonce(z_image, z_text, scale):
    import jax

    logits = scale * z_image @ z_text.T
    index = jax.numpy.arange(len(logits))
    positive = index[:, None] == index
    return -0.5 * sum(jax.nn.log_softmax(x, axis=1).sum(1, where=positive).mean() for x in (logits, logits.T))


def plain_sigmoid(z_image, z_text, scale, bias):
    import jax
    import jax.numpy as jnp

    logits = scale * z_image @ z_text.T + bias
    index = jnp.arange(len(logits))
    return jax.nn.softplus(jnp.where(index[:, None] == index, -logits, logits)).sum() / len(logits)


def plain_filip(image_tokens, text_tokens, scale):
    import jax
    import jax.numpy as jnp

    similarity = jnp.einsum("ipd,jld->ijpl", image_tokens, text_tokens)
    index = jnp.arange(len(similarity))
    positive = index[:, None] == index
    logits = scale * similarity.max(3).mean(2), scale * similarity.max(2).mean(2).T
    return -0.5 * sum(jax.nn.log_softmax(x, axis=1).sum(1, where=positive).mean() for x in logits)


def losses(name):
    """Returns `(ours, plain)`, two functions from the same arrays to a scalar."""
    import jax.numpy as jnp

    from clip_jax.losses import contrastive

    def filip(image_tokens, text_tokens, scale):
        return contrastive.filip(image_tokens, text_tokens, jnp.ones(text_tokens.shape[:2], bool), scale)[0]

    return {
        "infonce": (lambda *args: contrastive.infonce(*args)[0], plain_infonce),
        "sigmoid": (lambda *args: contrastive.sigmoid(*args)[0], plain_sigmoid),
        "filip": (filip, plain_filip),
    }[name]


def shapes(name, batch, mesh):
    """Returns the shapes of a loss's arguments: features sharded over all devices of the mesh, scalars replicated."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    features = {"filip": [(batch, IMAGE_TOKENS, FILIP_WIDTH), (batch, TEXT_TOKENS, FILIP_WIDTH)]}.get(
        name, [(batch, WIDTH)] * 2
    )
    scalars = [()] * (2 if name == "sigmoid" else 1)
    spread, everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
    return [jax.ShapeDtypeStruct(s, "float32", sharding=spread if s else everywhere) for s in features + scalars]


def compile_gradient(loss, arguments):
    """Compiles the loss with the gradients of all its arguments, sharded like the arguments."""
    import jax

    fn = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))
    return jax.jit(fn, out_shardings=(None, tuple(x.sharding for x in arguments))).lower(*arguments).compile()


def random_features(arguments):
    """Returns unit vectors, a scale of 1/0.07 and, if there is one, a bias of -10."""
    import jax
    import numpy as np

    rng, scalars = np.random.default_rng(0), iter((1 / 0.07, -10.0))

    def make(x):
        if not x.shape:
            return np.float32(next(scalars))
        z = rng.standard_normal(x.shape, np.float32)
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    return [jax.device_put(make(x), x.sharding) for x in arguments]


def seconds_of(functions, arguments, repeats):
    """Returns the median seconds of each function; the functions take turns."""
    import jax

    seconds = [[] for _ in functions]
    for turn in range(repeats + 1):
        for fn, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(fn(*arguments))
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def main():
    parser = common.make_parser(__doc__, "contrastive")
    parser.add_argument("--loss", default="infonce", choices=SIZES, help="default: %(default)s")
    parser.add_argument("--batches", help="batches for memory, separated by commas (default: depends on the loss)")
    parser.add_argument("--time", help="batches for time; the plain version must fit (default: depends on the loss)")
    parser.add_argument(
        "--devices", type=int, default=8, help="simulated devices on a machine without accelerators (default: 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each version (default: 5)")
    parser.add_argument("--svg", metavar="FILE", help="chart of memory against the batch")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    import jax

    from clip_jax.runtime import sharding

    batches, timed = (
        [int(x) for x in (default if given is None else given).split(",") if x]
        for default, given in zip(SIZES[args.loss], (args.batches, args.time), strict=True)
    )
    ours, plain = losses(args.loss)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    report = common.Report(COLUMNS, devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    report.header()
    with jax.set_mesh(mesh):
        for batch in sorted({*batches, *timed}):
            arguments = shapes(args.loss, batch, mesh)
            compiled = [compile_gradient(loss, arguments) for loss in (ours, plain)]
            mib = [fn.memory_analysis().temp_size_in_bytes / 2**20 for fn in compiled]
            row = {"loss": args.loss, "batch": batch, "MiB": mib[0], "plain MiB": mib[1]}
            if batch in timed:
                seconds = seconds_of(compiled, random_features(arguments), args.repeats)
                row |= {"ms": 1e3 * seconds[0], "plain ms": 1e3 * seconds[1], "ours / plain": seconds[0] / seconds[1]}
            report.add(**row)
    report.write(args.json)
    if args.svg:
        series = {name: [(row["batch"], row[name]) for row in report.rows] for name in ("MiB", "plain MiB")}
        title = f"{args.loss}, forward and backward, {jax.device_count()} devices: temporary memory per device"
        common.line_chart(
            args.svg, title, "batch", "MiB", {"tile by tile": series["MiB"], "plain": series["plain MiB"]}, log_y=True
        )


if __name__ == "__main__":
    main()
