"""The former name of the command `python -m clip_jax.tools.filter`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.data.filter is now clip_jax.tools.filter", file=sys.stderr)
    runpy.run_module("clip_jax.tools.filter", run_name="__main__", alter_sys=True)
