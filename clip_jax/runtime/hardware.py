"""Peak figures of accelerators, from their makers' public data."""

from typing import NamedTuple


class Chip(NamedTuple):
    """The peak figures of one chip.

    Attributes:
      flops: dense bf16 FLOP/s.
      hbm: bytes of memory.
      hbm_bandwidth: bytes/s between memory and chip.
      link_bandwidth: bytes/s that the chip sends over all of its links to other chips (ICI, NVLink) together.
      kinds: the beginnings of its `jax.Device.device_kind`.
      devices: the number of JAX devices on the chip.
      torus: the number of directions in which a slice of these chips is wired.
      clock: cycles/s, None when unknown. A TPU's is its peak FLOP/s divided by those of its matrix units in a cycle.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    kinds: tuple[str, ...]
    devices: int = 1
    torus: int = 0
    clock: float | None = None

    @property
    def device_hbm(self):
        """The bytes of memory of one device."""
        return self.hbm / self.devices


GB, GIB = 1e9, 2**30

#: From cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e, tpu7x. Links: half of the bidirectional interconnect bandwidth
#: per chip. The exceptions are v3 (656 Gbit/s per link: Norrie et al. 2021, four links of 82 GB/s) and v4 (a pod's
#: all-reduce bandwidth, divided by its 4,096 chips).
#: Clocks: inferred from the peaks; that of v6e, whose matrix units are larger, from the compiler's estimate of an
#: operation that only reads memory. That of tpu7x is unknown.
TPUS = {
    "v3": Chip(123e12, 32 * GIB, 900 * GB, 328 * GB, ("TPU v3",), devices=2, torus=2, clock=0.94e9),
    "v4": Chip(275e12, 32 * GIB, 1200 * GB, 268 * GB, ("TPU v4",), torus=3, clock=1.05e9),
    "v5e": Chip(197e12, 16 * GIB, 819 * GB, 200 * GB, ("TPU v5 lite", "TPU v5e"), torus=2, clock=1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 600 * GB, ("TPU v5",), torus=3, clock=1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1638 * GB, 400 * GB, ("TPU v6",), torus=2, clock=1.75e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380 * GB, 600 * GB, ("TPU7x", "TPU v7"), devices=2, torus=3),
}

#: From NVIDIA's data sheets of the SXM modules. Links: half of the bidirectional NVLink bandwidth.
GPUS = {
    "a100": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB, ("NVIDIA A100",)),
    "h100": Chip(989e12, 80 * GB, 3350 * GB, 450 * GB, ("NVIDIA H100",)),
    "h200": Chip(989e12, 141 * GB, 4800 * GB, 450 * GB, ("NVIDIA H200",)),
    "b200": Chip(2250e12, 180 * GB, 8000 * GB, 900 * GB, ("NVIDIA B200",)),
}


def chip_of(device_kind):
    """Returns the `Chip` of a `jax.Device.device_kind`, or None when it is unknown (a CPU)."""
    return next((chip for chip in (*TPUS.values(), *GPUS.values()) if device_kind.startswith(chip.kinds)), None)
