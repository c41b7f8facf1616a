"""The former name of the command `python -m clip_jax.runtime.hosts`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.training.hosts is now clip_jax.runtime.hosts", file=sys.stderr)
    runpy.run_module("clip_jax.runtime.hosts", run_name="__main__", alter_sys=True)
