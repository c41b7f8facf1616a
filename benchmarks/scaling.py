"""Weak scaling over mesh shapes by the TPU compiler's figures: one batch per chip on 8 to 256 chips, without a TPU.

    python benchmarks/scaling.py --config configs/clip.py:b16 --config.model.scan=true --config.model.remat=dots

Each row is one run of `clip_jax.compile`, which takes a minute or more, mostly in the compiler. Nothing is measured:
`ms` is the compiler's own estimate of a step with the exchanges between chips by bytes, `wait ms` the part of it that
waits for them, `bound ms` the longest of computing, memory and links at the peaks. MFU and examples/s follow
`ms`. `efficiency` is the `ms` of the same mesh on the fewest chips divided by that of the row. See docs/scaling.md and
benchmarks/README.md.
"""

import os
import sys

import common

COLUMNS = {
    "mesh": "<9", "chips": ">6", "batch": ">7,", "GiB": ">6.2f", "sent GB": ">8.2f", "ms": ">8.1f",
    "wait ms": ">8.1f", "bound ms": ">8.1f", "MFU": ">6.1%", "examples/s": ">11,.0f", "efficiency": ">11.1%",
}  # fmt: skip
SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
MESHES = {"data": [], "fsdp=8": ["mesh.fsdp=8"], "tensor=2": ["mesh.tensor=2"]}


def main():
    parser = common.make_parser(__doc__, "scaling")
    parser.add_argument("--config", default="configs/clip.py:b16", help="default: %(default)s")
    parser.add_argument("--chip", default="v5e", choices=("v5e", "v6e"), help="default: %(default)s")
    parser.add_argument(
        "--chips", default=",".join(map(str, SLICES)), help="separated by commas (default: %(default)s)"
    )
    parser.add_argument("--meshes", default=",".join(MESHES), help="separated by commas (default: %(default)s)")
    parser.add_argument("--batch-per-chip", type=int, default=128, help="default: %(default)s, 32,768 on 256 chips")
    parser.add_argument("--svg", metavar="FILE", help="chart of the step time against the chips")
    args = common.parse(parser)
    for given, known in ((args.chips, [str(n) for n in SLICES]), (args.meshes, [*MESHES])):
        if wrong := set(given.split(",")) - set(known):
            parser.error(f"{wrong.pop()!r} is none of {', '.join(known)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    from clip_jax import compile as compile_lib
    from clip_jax.errors import UserError

    report = common.Report(COLUMNS, config=args.config, chip=args.chip, overrides=args.overrides)
    report.header()
    series = {}
    for mesh in args.meshes.split(","):
        first = None
        for chips in sorted(map(int, args.chips.split(","))):
            overrides = [f"data.batch_size={chips * args.batch_per_chip}", *MESHES[mesh], *args.overrides]
            command = [
                f"--config={args.config}",
                f"--topology={args.chip}:{SLICES[chips]}",
                *(f"--config.{o}" for o in overrides),
            ]
            row = {"mesh": mesh, "chips": chips, "batch": chips * args.batch_per_chip}
            try:
                result = compile_lib.run(compile_lib.parse_args(command), log=lambda line: None)
            except UserError as error:
                sys.exit(f"error: {error}")
            if not result["fits"]:
                report.add(**result | row)
                continue
            estimate = result["estimate"]
            step, bound = estimate["compiler"], estimate["at_best"]
            first = first or step["seconds"]
            waits = result["cycles"]["bases"].get("links", 0) / result["cycles"]["total"] * step["seconds"]
            row |= {"GiB": result["memory"]["total"] / 2**30, "sent GB": result["sent"] / 1e9}
            row |= {"ms": 1e3 * step["seconds"], "wait ms": 1e3 * waits, "bound ms": 1e3 * bound["seconds"]}
            row |= {"MFU": step["mfu"], "examples/s": step["examples_per_second"]}
            del result["cycles"]["instructions"]  # thousands, which `clip_jax.compile --json` writes
            report.add(**result | row, efficiency=first / step["seconds"])
            series.setdefault(f"{mesh}, compiler's estimate", []).append((chips, 1e3 * step["seconds"]))
            series.setdefault(f"{mesh}, bound", []).append((chips, 1e3 * bound["seconds"]))
    report.write(args.json)
    if args.svg and series:
        title = f"{args.config}, {args.batch_per_chip} examples per {args.chip} chip: estimated time of a step"
        common.line_chart(args.svg, title, "chips", "ms", series)


if __name__ == "__main__":
    main()
