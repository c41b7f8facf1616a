"""The former name of the command `python -m clip_jax.tools.train_tokenizer`, which it runs."""

import runpy
import sys

if __name__ == "__main__":
    print("clip_jax.data.train_tokenizer is now clip_jax.tools.train_tokenizer", file=sys.stderr)
    runpy.run_module("clip_jax.tools.train_tokenizer", run_name="__main__", alter_sys=True)
