"""The chips of a run by their names, and TPU slices as their compiler describes them, without a TPU."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from clip_jax.errors import UserError, unknown
from clip_jax.runtime import command, hardware


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
