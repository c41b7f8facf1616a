"""The former name of the command `python -m clip_jax.tools.rewrite`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.data.rewrite is now clip_jax.tools.rewrite", file=sys.stderr)
    runpy.run_module("clip_jax.tools.rewrite", run_name="__main__", alter_sys=True)
