"""Seconds from starting `python -m clip_jax.train` to the first step's result, without and with a compilation cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --configs configs/clip.py:emoji --config.model.scan=true

Runs the real command on the embedded images and stops it after its first progress line. The lines that it prints
separate the stages. `imports` includes reading the configuration, source and tokenizer; `compile` includes tracing;
`first step` includes reading the second batch.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import common

STAGES = {
    "imports": r"clip_jax \d",
    "init": r"reading the first batch",
    "data, compile": r"step compiled in",
    "first step": r"step +1/",
}
COLUMNS = {"config": "<22", "cache": "<6", **dict.fromkeys(STAGES, ">14.1f"), "total": ">8.1f"}


def first_step(config, overrides, cache):
    """Returns `{stage: seconds}` of a run, and their `total`."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "clip_jax.train", f"--config={config}", f"--workdir={workdir}"]
        command += [f"--config.{override}" for override in overrides]
        env = dict(
            os.environ,
            JAX_COMPILATION_CACHE_DIR=cache,
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            PYTHONPATH=common.ROOT,
        )
        seconds, stages = {}, list(STAGES)
        start = time.perf_counter()
        since = start
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
        for line in process.stdout:
            if re.match(STAGES[stages[0]], line):
                now = time.perf_counter()
                seconds[stages.pop(0)], since = now - since, now
                if not stages:
                    break
        else:
            sys.exit(f"error: {config} ended before its first step; its message is above")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return seconds | {"total": since - start}


def main():
    parser = common.make_parser(__doc__, "startup")
    parser.add_argument(
        "--configs",
        default="configs/clip.py:emoji,configs/clip.py:b32",
        help="separated by commas (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=32, help="examples per step (default: %(default)s)")
    args = common.parse(parser)
    report = common.Report(COLUMNS, batch=args.batch)
    report.header()
    overrides = ["data=emoji", "data.workers=0", f"data.batch_size={args.batch}", "train.log_steps=1", *args.overrides]
    for config in args.configs.split(","):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                report.add(config=config, cache=state, **first_step(config, overrides, cache))
    report.write(args.json)


if __name__ == "__main__":
    main()
