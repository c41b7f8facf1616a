"""Compiles for an absent machine: `python -m clip_jax.compile --config=configs/clip.py:b16 --topology=v5e:16x16`.

For a TPU slice, the TPU's own compiler compiles the real train step and reports whether it fits and what it costs. That
needs the package libtpu (extra `tpu`) but no TPU. For GPUs (`gpu:h100x8`) the command reports only what follows from
shapes. docs/scaling.md explains the figures. Exit status: 0 it fits, 1 it does not, 2 wrong input.
"""

import importlib.util
import json
import math
import os
import re
import sys
import time
from typing import NamedTuple

from clip_jax import config as config_lib
from clip_jax import run_folder
from clip_jax.errors import UserError, unknown
from clip_jax.runtime import command, hardware, storage

# `main` sets JAX's environment variables before anything imports JAX, so functions import what needs JAX.


class Topology(NamedTuple):
    """The chips that a run uses.

    Attributes:
      name: as given on the command line.
      chip: the kind of chip.
      count: the number of chips, over all slices.
      shape: how a TPU slice is wired, such as `"16x16"`; None for GPUs.
      slices: the number of TPU slices.
    """

    name: str
    chip: hardware.Chip
    count: int
    shape: str | None
    slices: int = 1


def parse_topology(name):
    """Returns the `Topology` of `"v5e:16x16"`, `"v5e:16x16*2"` (two slices) or `"gpu:h100x8"`. Raises UserError."""
    generation, _, shape = name.partition(":")
    if generation == "gpu":
        match = re.fullmatch(r"(\w+)x([1-9]\d*)", shape)
        if not match:
            raise UserError(f"--topology={name}: write a GPU and the number of GPUs, such as gpu:h100x8")
        if match[1] not in hardware.GPUS:
            raise unknown(f"--topology={name}: GPU", match[1], hardware.GPUS)
        return Topology(name, hardware.GPUS[match[1]], int(match[2]), None)
    if generation not in hardware.TPUS:
        raise unknown(f"--topology={name}: accelerator", generation, [*hardware.TPUS, "gpu"])
    chip = hardware.TPUS[generation]
    match = re.fullmatch(rf"([1-9]\d*(?:x[1-9]\d*){{{chip.torus - 1}}})(?:\*([1-9]\d*))?", shape)
    if not match:
        example = "x".join("4" * chip.torus)
        raise UserError(
            f"--topology={name}: write the chips in each of the {chip.torus} directions, such as {generation}:{example}"
        )
    slices = int(match[2] or 1)
    return Topology(name, chip, slices * math.prod(map(int, match[1].split("x"))), match[1], slices)


def tpu_devices(topology):
    """Returns the devices of TPU slices as the compiler describes them.

    Raises UserError when libtpu is not installed or no such slice exists.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology.name} needs the TPU compiler: pip install 'clip-jax-pretraining[tpu]'")
    for key, value in command.QUIET_LIBTPU.items():
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    # A v4 chip is one device with two cores, as on Cloud TPU.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name.partition("*")[0], **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from None


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


def compile_for_tpu(program, devices):
    """Compiles a step for TPU devices.

    Args:
      program: a `clip_jax.program.Program` of shapes.
      devices: a result of `tpu_devices`.

    Returns:
      A dict with the bytes, FLOPs and collectives of one device.

    Raises DoesNotFit when the step needs too much memory, and UserError when the compiler fails otherwise.
    """
    import jax

    from clip_jax import program as program_lib
    from clip_jax.hlo_cost import hlo_cost
    from clip_jax.runtime import sharding

    mesh = sharding.make_mesh(program.config.mesh, devices)
    sharded, state_bytes, batch_bytes = program_lib.shard(program, mesh)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program_lib.compile_step(sharded)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit.of_compiler(str(error)) from None
        line = str(error).splitlines()[0]
        raise UserError(
            f"the TPU compiler failed; extra 'tpu' installs the libtpu that belongs to this jax: {line}"
        ) from None
    memory, cost = compiled.memory_analysis(), hlo_cost(compiled.as_text())
    fields = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {field: getattr(memory, f"{field}_size_in_bytes") for field in fields}
    return dict(
        mesh=dict(mesh.shape),
        options=program_lib.compiler_options(sharded),
        compile_seconds=time.perf_counter() - start,
        memory=dict(sizes, total=sum(sizes.values()) - 2 * sizes["alias"], state=state_bytes, batch=batch_bytes),
        flops=cost.flops,
        traffic=cost.traffic,
        sent=cost.sent,
        between_slices=cost.between_slices,
        unknown_loops=cost.unknown_loops,
        collectives=[dict(key._asdict(), count=count) for key, count in cost.collectives.most_common()],
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
            result = compile_for_tpu(make_program(config), devices)
        except DoesNotFit as error:
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
    devices = tpu_devices(topology) if topology.shape else None
    program, flops = make_program(config), model_flops(config)
    about = dict(
        config=args.config, overrides=args.overrides, topology=args.topology, chips=topology.count, model_flops=flops
    )
    if not topology.shape:
        result = estimates.estimate_gpu(topology, program, flops)
        result["fits"] = result["memory"]["total"] <= topology.chip.device_hbm
    else:
        log(f"compiling for {topology.count} chips, which takes minutes for a large model ...")
        try:
            result = compile_for_tpu(program, devices)
            memory, hbm = result["memory"], topology.chip.device_hbm
            if memory["total"] > hbm:  # the compiler refuses a step only when its temporaries alone are too large
                sizes = f"{estimates.gib(memory['total'])} of {estimates.gib(hbm)}"
                raise DoesNotFit(f"the compiler accepts it, but its figures add up to {sizes}", memory["temp"])
        except DoesNotFit as error:
            found = advise(args, topology, program, error, devices, log)
            return dict(about, fits=False, compiler=str(error), found=found)
        result = dict(result, fits=True, estimate=estimates.estimate(topology, config, result, flops))
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
    sys.exit(main())
