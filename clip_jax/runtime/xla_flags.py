"""Compiler options of the training step for each kind of chip: overlap of collectives with compute, on-chip memory.

`clip_jax.program.compile_step` passes them to the compiler, for `clip_jax.train` and for `clip_jax.compile`, so that
what is checked is what runs. `--config.train.xla_flags=false` turns them off. None of them was measured on a chip here.
`LIBTPU_INIT_ARGS` and `XLA_FLAGS` still set other flags; an option of this file wins over the same flag there.

Sources, public repositories of large users:
  MaxText: AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, MaxText/configs/v5e/128b.sh, v5p/128b.sh
  AXLearn: apple/axlearn, axlearn/common/compiler_options.py
  Marin: marin-community/marin, the variables that it sets by default for TPUs (LIBTPU_INIT_ARGS)
  NVIDIA: docs.nvidia.com/jax-toolbox/environment-variables, the flags of its JAX images
"""

from clip_jax.runtime import hardware

_ALL = {
    # Orders instructions such that collectives and copies overlap with compute (AXLearn, on all TPUs).
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    # Gathers kernels whole (MaxText: DISABLE_COLLECTIVE_MATMUL). With mesh.fsdp alone the compiler would multiply by
    # the part of each chip in turn, in a loop, and copy more than the gathers take.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

_OVERLAP = {
    # All-gathers, of parameters with mesh.fsdp, run within the fusions that compute (MaxText: CF_FOR_ALL_GATHER, v5e
    # and v5p; AXLearn: v6e, and v4 for the asynchronous all-gather, which v3 does not support).
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # The exchange of features around a ring (MaxText: v5p; AXLearn: v4).
    "xla_enable_async_collective_permute": "true",
    # All-reduces of gradients overlap with the rest of the backward pass (MaxText: DATA_PARALLEL_OVERLAP, v5e and v5p;
    # AXLearn: between slices).
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

#: KiB of on-chip vector memory that one fusion may use.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"

_OPTIONS = {
    "v3": _ALL,
    "v4": _ALL | _OVERLAP,
    "v5e": _ALL | _OVERLAP | {_VMEM: 50000},  # Marin
    "v5p": _ALL | _OVERLAP | {_VMEM: 50000},  # Marin
    "v6e": _ALL | _OVERLAP | {_VMEM: 98304},  # MaxText: DENSE_VMEM_LIMIT; AXLearn; Marin
    "tpu7x": _ALL | _OVERLAP,  # Assumption: as v4, because the sources name nothing for it
}
#: XLA's own options take booleans, libtpu's text.
_GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}  # NVIDIA; not the default of XLA


def options(device_kind):
    """Returns `{option: value}` for `jax.stages.Lowered.compile(compiler_options=...)`; empty for an unknown chip.

    Args:
      device_kind: `jax.Device.device_kind`, such as `"TPU v5 lite"`.
    """
    chip = hardware.chip_of(device_kind)
    if chip in hardware.GPUS.values():
        return dict(_GPU_OPTIONS)
    return next((dict(_OPTIONS[name]) for name, tpu in hardware.TPUS.items() if tpu is chip), {})
