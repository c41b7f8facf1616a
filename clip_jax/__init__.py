"""Pretraining of CLIP-like models in JAX: one trainer, many methods, any machine.

``clip_jax.load(folder)`` gives a trained model ready for use; see :class:`clip_jax.inference.Model`.
"""

import os
import re

__version__ = "0.1.0"

# Devices simulated on a CPU wait for each other inside XLA's thread pool, which has to hold a thread for every collective that
# may wait at a time; with one thread per core or device it can lock up for good.
_simulated = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
if _simulated:
    os.environ.setdefault("NPROC", str(max(64 * int(_simulated[1]), os.cpu_count() or 1)))


def __getattr__(name):
    # Loading JAX takes seconds, so `import clip_jax` alone does not.
    if name in ("Model", "load"):
        from clip_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
