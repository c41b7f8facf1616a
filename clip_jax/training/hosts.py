"""`python -m clip_jax.training.hosts` is now `python -m clip_jax.runtime.hosts`, which this runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.training.hosts is now clip_jax.runtime.hosts", file=sys.stderr)
    runpy.run_module("clip_jax.runtime.hosts", run_name="__main__", alter_sys=True)
