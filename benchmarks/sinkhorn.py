"""OTTER's transport plans by batch size: the plans of both directions, the whole loss with its gradient, and InfoNCE.

    python benchmarks/sinkhorn.py
    python benchmarks/sinkhorn.py --batches 8192,16384,32768 --time ""

The batch is sharded over all devices; a machine without accelerators simulates them (`--devices`). Memory is the
compiler's reservation for temporaries on each device, without allocating it. Times are medians of runs that take
turns. Everything is float32 with five iterations. See benchmarks/README.md.
"""

import os

import common
import contrastive

COLUMNS = {
    "batch": ">8,", "plans MiB": ">10.1f", "OTTER MiB": ">10.1f", "InfoNCE MiB": ">11.1f", "plans ms": ">9.1f",
    "OTTER ms": ">9.1f", "InfoNCE ms": ">10.1f", "plans / OTTER": ">13.2f",
}  # fmt: skip
WIDTH = 512


def functions():
    """Returns `(plans, OTTER's loss, InfoNCE)`, of the student's unit rows; the first two take the teacher's too."""
    import jax.numpy as jnp

    from clip_jax.losses.contrastive import infonce
    from clip_jax.losses.transport import sinkhorn
    from clip_jax.methods.otter import SCALES, Options, loss

    options = Options()

    def plans(teacher_image, teacher_text):
        rows = jnp.concatenate([teacher_image, teacher_text], axis=1)
        cols = jnp.concatenate([teacher_image + teacher_text, teacher_text], axis=1)
        return sinkhorn(rows, cols, options.entropy, options.iterations, 200.0), sinkhorn(
            cols, rows, options.entropy, options.iterations, 200.0
        )

    def otter(image, text, teacher_image, teacher_text):
        features = dict(image=image, text=text, teacher_image=teacher_image, teacher_text=teacher_text)
        return loss(options, 5.0, dict.fromkeys(SCALES, 3.9), {}, features, None, None)[0]

    return plans, otter, lambda image, text: infonce(image, text, 50.0)[0]


def main():
    parser = common.make_parser(__doc__, "sinkhorn")
    parser.add_argument("--batches", default="1024,4096,16384,32768", help="batches for memory (default: %(default)s)")
    parser.add_argument("--time", default="256,1024,4096", help="batches for time (default: %(default)s)")
    parser.add_argument(
        "--devices", type=int, default=8, help="simulated devices on a machine without accelerators (default: 8)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each function (default: 5)")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    import jax

    from clip_jax.runtime import sharding

    batches, timed = ([int(x) for x in text.split(",") if x] for text in (args.batches, args.time))
    plans, otter, infonce = functions()
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    report = common.Report(COLUMNS, devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}", width=WIDTH)
    report.header()
    with jax.set_mesh(mesh):
        for batch in sorted({*batches, *timed}):
            rows = jax.ShapeDtypeStruct((batch, WIDTH), "float32", sharding=sharding.batch_sharding(mesh))
            compiled = [
                jax.jit(plans).lower(rows, rows).compile(),
                jax.jit(jax.value_and_grad(otter, argnums=(0, 1))).lower(*[rows] * 4).compile(),
                jax.jit(jax.value_and_grad(infonce, argnums=(0, 1))).lower(rows, rows).compile(),
            ]
            mib = [fn.memory_analysis().temp_size_in_bytes / 2**20 for fn in compiled]
            row = {"batch": batch, "plans MiB": mib[0], "OTTER MiB": mib[1], "InfoNCE MiB": mib[2]}
            if batch in timed:
                features = contrastive.random_features([rows] * 4)
                calls = [lambda *x, fn=fn, n=n: fn(*x[:n]) for fn, n in zip(compiled, (2, 4, 2), strict=True)]
                ms = [1e3 * seconds for seconds in contrastive.seconds_of(calls, features, args.repeats)]
                row |= {"plans ms": ms[0], "OTTER ms": ms[1], "InfoNCE ms": ms[2], "plans / OTTER": ms[0] / ms[1]}
            report.add(**row)
    report.write(args.json)


if __name__ == "__main__":
    main()
