"""The chips of a run by their names, and their devices as the compiler describes them, without a TPU or GPU."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from clip_jax.errors import UserError, unknown
from clip_jax.runtime import command, hardware

#: What XLA's compiler needs to know of a GPU besides `hardware.GPUS`, from the descriptions of GPUs that XLA itself
#: carries (openxla/xla, xla/backends/gpu/target_config/specs).
_GPUS = {
    "a100": dict(major=8, feature="NONE", cores=108, fpus=64, shared=167936, optin=166912, l2=41943040, ghz=1.41),
    "h100": dict(
        major=9, feature="ACCELERATED_FEATURES", cores=132, fpus=128, shared=233472, optin=232448, l2=52428800, ghz=1.98
    ),
    "b200": dict(
        major=10,
        feature="ACCELERATED_FEATURES",
        cores=148,
        fpus=128,
        shared=233472,
        optin=232448,
        l2=132644864,
        ghz=1.965,
    ),
}
_GPUS["h200"] = _GPUS["h100"]
_GPU_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} feature_extension: {feature} }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: {l2} memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
#: The most GPUs of a server.
_SERVER = 8


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


def has_gpu_compiler():
    """Returns whether JAX's CUDA plugin is installed, which compiles for GPUs without one."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def gpu_devices(topology):
    """Returns the devices of GPUs as XLA's compiler describes them, or None without JAX's CUDA plugin.

    A server has as many GPUs as divide their number, at most `_SERVER`.
    """
    if not has_gpu_compiler():
        return None
    from jax.experimental import topologies

    chip, name = topology.chip, topology.name.removeprefix("gpu:").rpartition("x")[0]
    target = _GPU_TARGET.format(
        **_GPUS[name], bandwidth=int(chip.hbm_bandwidth), memory=int(chip.hbm), kind=chip.kinds[0]
    )
    gpus = next(n for n in range(_SERVER, 0, -1) if topology.count % n == 0)
    options = dict(target_config=target, topology=f"1x{topology.count // gpus}x{gpus}")
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name=topology.name, **options).devices
    except NotImplementedError:  # a plugin of which only a part is installed
        return None
