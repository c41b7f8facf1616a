"""`python -m clip_jax.data.rewrite` is now `python -m clip_jax.tools.rewrite`, which this runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.data.rewrite is now clip_jax.tools.rewrite", file=sys.stderr)
    runpy.run_module("clip_jax.tools.rewrite", run_name="__main__", alter_sys=True)
