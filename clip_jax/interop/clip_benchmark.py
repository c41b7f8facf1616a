"""The former name of the command `python -m clip_jax.tools.clip_benchmark`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.interop.clip_benchmark is now clip_jax.tools.clip_benchmark", file=sys.stderr)
    runpy.run_module("clip_jax.tools.clip_benchmark", run_name="__main__", alter_sys=True)
