"""Another name of the command `python -m clip_jax.tools.manifest`, which it runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.manifest", run_name="__main__", alter_sys=True)
