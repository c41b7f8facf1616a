"""Random kill -9 and SIGTERM: no step of a run may be lost or changed.

    python benchmarks/faults.py [--rounds=20] [--processes=1,2] [--seed=0] [--workdir=DIR] [--json=faults.json]

For each number of processes, a tiny model runs undisturbed on the embedded data. Then the same run is ended in each
round by a random signal to one process or to all, during training or while it writes a checkpoint, and the same
command starts it again. Prints a table. The exit status is 1 unless every process ends with the expected status
(clip_jax/runtime/faults.py) and every step, in whatever round, has the loss of the undisturbed run. A round takes
10 to 30 s on 2 CPU cores, nearly all of it start-up. DIR is a new folder, gs:// or s3:// address.
"""

import argparse
import contextlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from clip_jax.runtime import faults, hosts, storage

REPO = pathlib.Path(__file__).parent.parent
TIMEOUT = 300
# The learning rate is constant because runs differ in length. Checkpoints are frequent so that signals hit some writes.
CONFIG = """
    model.embed_dim=16 model.image.stem=() model.image.patch=8 model.image.size=16 model.image.width=32
    model.image.heads=2 model.image.mlp_dim=64 model.image.depth=1 model.text.width=32 model.text.heads=2
    model.text.mlp_dim=64 model.text.depth=1 data.batch_size=16 train.log_steps=1 optim.schedule=constant
    optim.warmup_steps=0 checkpoint.steps=2 train.stall_minutes=0.5 eval.tasks=() eval.report=false
    log.tensorboard=false
""".split()


class Failure(Exception):
    """A step was lost or changed, or a process ended with a wrong status."""


def start(processes, workdir, steps, more=()):
    """Starts the processes of a run, with `more` overrides; returns them as `list[Popen]`."""
    command = ["clip_jax.train", f"--config={REPO / 'configs' / 'clip.py'}:emoji", f"--workdir={workdir}"]
    command += [f"--config.{override}" for override in [*CONFIG, f"train.steps={steps}", *more]]
    return hosts.spawn(processes, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(children, allowed):
    """Waits for the processes and returns their statuses. Raises Failure for a hang or a status not in `allowed`."""
    try:
        errors = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    except subprocess.TimeoutExpired:
        raise Failure(f"a process did not end within {TIMEOUT} s") from None
    finally:
        end_all(children)
    statuses = [child.returncode for child in children]
    if any(status not in expected for status, expected in zip(statuses, allowed, strict=True)):
        raise Failure(f"exit statuses {statuses}, allowed for each are {allowed}:\n" + "\n".join(errors))
    return statuses


def end_all(children):
    """Kills the processes that still run: one that stays behind would write into a folder that is deleted."""
    for child in children:
        if child.poll() is None:
            child.kill()


def losses(workdir):
    """Returns `{step: [loss of each time it ran]}`."""
    found = {}
    for row in storage.read_rows(workdir / "metrics.jsonl"):
        if "loss" in row:
            found.setdefault(row["step"], []).append(row["loss"])
    return found


def is_saving(workdir):
    """Returns whether a checkpoint is being written."""
    folders = (workdir / "checkpoints").glob("[0-9]*")
    return any(not (folder / "commit_success.txt").exists() for folder in folders)


def disturb(rng, processes, workdir, steps):
    """Runs a round, which ends after some of its steps; returns a dict of what happened."""
    number, moment = rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.choice(("training", "saving"))
    targets = rng.choice([list(range(processes)), *([process] for process in range(processes))])
    done = sum(map(len, losses(workdir).values()))
    children, end = start(processes, workdir, steps), done + rng.randint(1, 4)
    try:
        waiting = time.monotonic()
        while all(child.poll() is None for child in children) and time.monotonic() - waiting < TIMEOUT:
            if sum(map(len, losses(workdir).values())) >= end and (moment == "training" or is_saving(workdir)):
                break
            time.sleep(0.1 if storage.is_remote(workdir) else 0.002)
        time.sleep(rng.uniform(0, 3 if storage.is_remote(workdir) else 0.03))
    except BaseException:
        end_all(children)
        raise
    for target in targets:
        children[target].send_signal(number)
    if number == signal.SIGTERM:
        # A process without a signal ends with the others by agreement or, between steps, once it sees them gone.
        allowed = [
            (faults.PREEMPTED, 0) if process in targets else (faults.PREEMPTED, faults.LOST, 0)
            for process in range(processes)
        ]
    else:
        allowed = [(-signal.SIGKILL if process in targets else faults.LOST, 0) for process in range(processes)]
    statuses = finish(children, allowed)
    step = max(losses(workdir), default=0)
    return dict(
        processes=processes, signal=number.name, targets=targets, moment=moment, reached=step, statuses=statuses
    )


def check(expected, workdir, steps):
    """Raises Failure for a step that is missing or ever had another result."""
    found = losses(workdir)
    for step in range(1, steps + 1):
        if step not in found:
            raise Failure(f"step {step} is lost")
        if wrong := [loss for loss in found[step] if loss != expected[step][0]]:
            raise Failure(f"step {step} has the loss {wrong[0]} instead of {expected[step][0]}")


def main(argv=None):
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="for each number of processes")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", help="an empty folder, gs:// or s3:// address; default: a temporary folder")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    rng, rows = random.Random(args.seed), []
    steps = 4 * args.rounds + 2
    print(f"{'processes':>9} {'round':>5} {'signal':>8} {'to':>6} {'during':>9} {'last step':>9} {'statuses':>10}")
    try:
        for processes in map(int, args.processes.split(",")):
            given = args.workdir and contextlib.nullcontext(args.workdir)
            with given or tempfile.TemporaryDirectory() as folder:
                folder = storage.path(folder) / str(processes)
                calm, disturbed = folder / "calm", folder / "disturbed"
                if losses(calm) or losses(disturbed):
                    raise Failure(f"{folder} holds a run already")
                finish(start(processes, calm, steps), [(0,)] * processes)
                for number in range(1, args.rounds + 1):
                    row = disturb(rng, processes, disturbed, steps)
                    rows.append(row)
                    to, statuses = (",".join(map(str, row[key])) for key in ("targets", "statuses"))
                    when = f"{row['signal']:>8} {to:>6} {row['moment']:>9} {row['reached']:9}"
                    print(f"{processes:9} {number:5} {when} {statuses:>10}", flush=True)
                finish(start(processes, disturbed, steps), [(0,)] * processes)
                check(losses(calm), disturbed, steps)
                repeated = sum(map(len, losses(disturbed).values())) - steps
                print(f"{processes} process(es): all {steps} steps equal the undisturbed run's; {repeated} repetitions")
    except Failure as failure:
        print(f"FAILED: {failure}")
        return 1
    finally:
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps({"seed": args.seed, "rounds": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
