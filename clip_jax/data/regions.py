"""The former name of the command `python -m clip_jax.tools.regions`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.data.regions is now clip_jax.tools.regions", file=sys.stderr)
    runpy.run_module("clip_jax.tools.regions", run_name="__main__", alter_sys=True)
