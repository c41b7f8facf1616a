"""Compiles for an absent machine: `python -m clip_jax.compile --config=configs/clip.py:b16 --topology=v5e:16x16`.

For a TPU slice, the TPU's own compiler compiles the real train step and reports whether it fits and what it costs. That
needs the package libtpu (extra `tpu`) but no TPU. For GPUs (`gpu:h100x8`) XLA's compiler counts the memory, which needs
JAX's CUDA plugin (extra `gpu`) but no GPU; the costs follow from shapes. docs/scaling.md explains the figures. Exit
status: 0 it fits, 1 it does not, 2 wrong input.
"""

import json
import os
import re
import time

from clip_jax import config as config_lib
from clip_jax import run_folder
from clip_jax.errors import UserError
from clip_jax.runtime import command, storage
from clip_jax.runtime.topology import gpu_devices, parse_topology, tpu_devices

# `main` sets JAX's environment variables before anything imports JAX, so functions import what needs JAX.

#: Without a GPU nothing can be timed, and without timing XLA finds no setting for some of its own matrix products.
_WITHOUT_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class DoesNotFit(Exception):
    """A step needs more memory than a device has.

    Attributes:
      temporary: the bytes of temporaries that the step needs on one device, or None when unknown.
    """

    def __init__(self, line, temporary=None):
        super().__init__(line)
        self.temporary = temporary

    @classmethod
    def of_compiler(cls, message):
        """The exception for the compiler's message; its first line is the message."""
        size = re.search(r"\(([\d.]+)([KMGTP]?)\) exceeds", message)
        temporary = float(size[1]) * 1024 ** " KMGTP".index(size[2] or " ") if size else None
        return cls(message.partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0], temporary)


def compile_for(program, topology, devices):
    """Compiles a step for the absent devices of a `Topology`.

    Returns and raises as `compile_for_tpu`; for GPUs only the mesh, the options and the memory are in the result.
    """
    if topology.shape:
        return compile_for_tpu(program, topology, devices)
    return _compile(program, topology, devices, _WITHOUT_GPU)[1]


def _compile(program, topology, devices, more=None):
    """Compiles a step for absent devices, with `more` compiler options.

    Returns:
      `(jax.stages.Compiled, {mesh, options, compile_seconds, memory})`.
    """
    import jax

    from clip_jax import program as program_lib
    from clip_jax.runtime import sharding

    mesh = sharding.make_mesh(program.config.mesh, devices)
    sharded, state_bytes, batch_bytes = program_lib.shard(program, mesh)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program_lib.compile_step(sharded, more=more)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit.of_compiler(str(error)) from None
        line, kind = str(error).splitlines()[0], "TPU" if topology.shape else "GPU"
        raise UserError(
            f"the {kind} compiler failed; extra {kind.lower()!r} installs the one that belongs to this jax: {line}"
        ) from None
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    fields = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {field: getattr(memory, f"{field}_size_in_bytes") for field in fields}
    total = sum(sizes.values()) - 2 * sizes["alias"]
    return compiled, dict(
        mesh=dict(mesh.shape),
        options=program_lib.compiler_options(sharded),
        compile_seconds=seconds,
        memory=dict(sizes, total=total, state=state_bytes, batch=batch_bytes),
    )


def compile_for_tpu(program, topology, devices):
    """Compiles a step for TPU devices.

    Args:
      program: a `clip_jax.program.Program` of shapes.
      topology: the `Topology`.
      devices: its devices, a result of `tpu_devices`.

    Returns:
      A dict with the bytes, FLOPs and collectives of one device, and its estimated cycles where the step fits.

    Raises DoesNotFit when the step needs too much memory, and UserError when the compiler fails otherwise.
    """
    from clip_jax.hlo_cost import hlo_cost

    compiled, result = _compile(program, topology, devices)
    text, fits = compiled.as_text(), result["memory"]["total"] <= topology.chip.device_hbm
    cost = hlo_cost(text)
    # Kernels are compiled again, which takes minutes and is of no use for a step that does not fit.
    cycles = dict(cycles=estimate_cycles(text, topology, result["options"])) if fits else {}
    return dict(
        result,
        flops=cost.flops,
        traffic=cost.traffic,
        sent=cost.sent,
        between_slices=cost.between_slices,
        unknown_loops=cost.unknown_loops,
        collectives=[dict(key._asdict(), count=count) for key, count in cost.collectives.most_common()],
        **cycles,
    )


def estimate_cycles(text, topology, options):
    """Returns the cycles of a compiled step on one device, in all, by part and by instruction, as a dict for JSON.

    Args:
      text: its optimized HLO text.
      topology: the `Topology`.
      options: `{option: value}` of the compiler.
    """
    from clip_jax import hlo_cycles, kernel_cycles

    kernels = kernel_cycles.kernel_cycles(text, topology, options)
    cycles = hlo_cycles.step_cycles(text, hlo_cycles.peaks(topology.chip), kernels)
    return dict(
        total=cycles.cycles,
        parts=cycles.by("part"),
        backward=cycles.by("part", backward=True),
        bases=cycles.by("basis"),
        instructions=[row._asdict() for row in cycles.merged()],
    )


def search(args, topology, devices, tries, log):
    """Compiles the configuration with one set of overrides after the other and logs each result.

    Returns the figures of the first that fits, with its `overrides`; None when none fits.
    """
    from clip_jax.estimates import USABLE, gib
    from clip_jax.program import make_program

    for overrides, _ in tries:
        flags = " ".join(f"--config.{o}" for o in overrides)
        try:
            config = run_folder.load(args.config, [*args.overrides, *overrides])
            result = compile_for(make_program(config), topology, devices)
        except (DoesNotFit, UserError) as error:
            log(f"  {flags}: {error}")
            continue
        total, hbm = result["memory"]["total"], topology.chip.device_hbm
        log(f"  {flags}: {gib(total)} of {gib(hbm)} ({total / hbm:.0%})")
        if total <= USABLE * hbm:
            return dict(result, overrides=overrides)
    return None


def advise(args, topology, program, error, devices, log):
    """Logs what would make a step fit.

    With `--search`, returns the figures of the first variant that fits; else None.
    """
    from clip_jax.estimates import gib, variants
    from clip_jax.program import shard
    from clip_jax.runtime import sharding

    _, state_bytes, _ = shard(program, sharding.make_mesh(program.config.mesh, devices))
    log(f"it does not fit: {error}")
    tries = variants(program.config, topology, state_bytes, error.temporary)
    log(f"parameters and optimizer state take {gib(state_bytes)} of it; smaller variants, the cheapest first:")
    if args.search:
        return search(args, topology, devices, tries, log)
    for overrides, effect in tries:
        log(f"  {' '.join(f'--config.{o}' for o in overrides)}: {effect}")
    log("  --search compiles them one after the other until one fits")
    return None


def parse_args(argv):
    """Parses the command line. Raises UserError."""
    parser = command.make_parser("clip_jax.compile", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a configuration, e.g. configs/clip.py:b16"
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="a TPU slice, e.g. v5e:16x16 (v3 v4 v5e v5p v6e tpu7x), several slices, e.g. v5e:16x16*2, or gpu:h100x8",
    )
    parser.add_argument(
        "--search", action="store_true", help="compile smaller variants until one fits, when the first does not"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    args, rest = parser.parse_known_args(argv)
    args.overrides = config_lib.parse_overrides(rest)
    return args


def run(args, log=print):
    """Compiles or estimates; returns the figures, a dict with `fits`. Raises UserError."""
    from clip_jax import estimates
    from clip_jax.program import make_program, model_flops

    topology = parse_topology(args.topology)
    config = run_folder.load(args.config, args.overrides)
    devices = (tpu_devices if topology.shape else gpu_devices)(topology)
    program, flops = make_program(config), model_flops(config)
    about = dict(
        config=args.config, overrides=args.overrides, topology=args.topology, chips=topology.count, model_flops=flops
    )
    shapes = {} if topology.shape else estimates.estimate_gpu(topology, program, flops)
    if not devices:
        result = dict(shapes, fits=shapes["memory"]["total"] <= topology.chip.device_hbm)
    else:
        log(f"compiling for {topology.count} chips, which takes minutes for a large model ...")
        try:
            result = compile_for(program, topology, devices)
            memory, hbm = result["memory"], topology.chip.device_hbm
            if memory["total"] > hbm:  # the compiler refuses a step only when its temporaries alone are too large
                sizes = f"{estimates.gib(memory['total'])} of {estimates.gib(hbm)}"
                raise DoesNotFit(f"the compiler accepts it, but its figures add up to {sizes}", memory["temp"])
        except DoesNotFit as error:
            found = advise(args, topology, program, error, devices, log)
            return dict(about, fits=False, compiler=str(error), found=found)
        result = shapes | result | dict(fits=True)
        if topology.shape:
            result["estimate"] = estimates.estimate(topology, config, result, flops)
    for line in estimates.describe(topology, config, result, flops):
        log(line)
    return about | result


def main(argv=None):
    """Runs the command; returns the exit status: 0 it fits, 1 it does not, 2 wrong input, after one line about it."""
    # The command needs no accelerator, and JAX cannot cache programs for devices that are not present.
    os.environ.update(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    fits = []

    def work():
        args = parse_args(argv)
        result = run(args, log=lambda line: print(line, flush=True))
        if args.json:
            storage.write(args.json, json.dumps(result, indent=1))
        fits.append(result["fits"])

    return command.run(work) or int(not fits[0])


if __name__ == "__main__":
    command.script(main)
