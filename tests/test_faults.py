"""Early ends of runs, as real processes: signals, kill -9, a host that dies or hangs; and resuming after them."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import COMPILE_FAST, REPO
from helpers import losses, run, train_command

from clip_jax.runtime import command, faults, hosts

TIMEOUT = 240
# More steps than a run makes before the signal arrives.
LONG = "train.steps=100000"


PIPES = dict(cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_pair(workdir, *overrides):
    return hosts.spawn(2, train_command(workdir, LONG, *overrides)[2:], **PIPES)


def wait_for(process, beginning):
    """Reads the output up to a line with this beginning."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"no line {beginning!r}: {process.stderr.read()}")


def end(process):
    """Returns `(exit status, stderr)`; fails when the process does not end."""
    try:
        error = process.communicate(timeout=TIMEOUT)[1]
        return process.returncode, error
    finally:
        process.kill()


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Gives one CPU device to each process that a test starts."""
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FAST)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGTERM, 42, "preempted"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_saves_and_the_same_command_resumes(tmp_path, number, status, word):
    process = subprocess.Popen(train_command(tmp_path, LONG, "checkpoint.steps=0", "checkpoint.minutes=0"), **PIPES)
    wait_for(process, "step    ")
    process.send_signal(number)
    got, error = end(process)
    assert got == status, error
    line = next(line for line in error.splitlines() if line.startswith(word))
    step = int(line.split(" at step ")[1].split(":")[0])
    assert line == f"{word} at step {step}: state saved; the same command resumes the run"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step)] and sorted(losses(tmp_path)) == list(
        range(1, step + 1)
    )
    again = run(train_command(tmp_path, f"train.steps={step + 1}"))
    assert again.returncode == 0 and f"from step {step}" in again.stdout


def test_a_second_ctrl_c_ends_at_once():
    code = """
import os, signal, time
from clip_jax.runtime import command, faults
with faults.Signals() as signals, signals.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    print(signals.status, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=TIMEOUT)
    assert process.returncode == -signal.SIGINT and process.stdout == "130\n"


def test_signals_outside_of_the_steps_stop_there():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(faults.Stopped, match="preempted outside of the training steps") as stopped, faults.Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.status == 42
    with pytest.raises(faults.Stopped, match="interrupted"), faults.Signals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done = True
        pytest.fail("a signal was forgotten")
    assert done and signal.getsignal(signal.SIGTERM) == before


def test_commands_end_with_a_status_and_a_line(capsys):
    def stop():
        raise faults.Stopped(42, "at step 3: state saved")

    assert command.run(stop) == 42
    assert capsys.readouterr().err == "preempted at step 3: state saved; the same command resumes the run\n"
    assert command.run(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        command.run(lambda: 1 / 0)


def test_commands_look_for_garbage_seldom():
    before, found = gc.get_threshold(), []
    try:
        for threshold, expected in ((700, command.GARBAGE_THRESHOLD), (30_000, 30_000), (0, 0)):
            gc.set_threshold(threshold)
            assert command.run(lambda: found.append(gc.get_threshold()[0])) == 0
            assert (found.pop(), gc.get_threshold()[0]) == (expected, threshold)
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("limit, status", [(0.01, 43), (0, 0)])
def test_the_watchdog_names_the_stage_and_shows_where_it_waits(limit, status):
    code = f"""
import sys, time
from clip_jax.runtime import command, faults
with faults.watch({limit}), faults.stage("evaluation"):
    for _ in range(4):
        time.sleep(0.3)
        with faults.stage("step"):  # an inner stage restarts the time of the outer one
            pass
    print("alive", flush=True)
    with faults.stage("data"):
        time.sleep(60 if {limit} else 1)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=TIMEOUT)
    assert process.returncode == status and process.stdout == "alive\n"
    if status:
        line, *stacks = process.stderr.splitlines()
        assert line.startswith("error: the stage 'data' has taken") and "train.stall_minutes=0.01" in line
        assert any('File "<string>"' in line for line in stacks)


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_host_dies_the_other_one_stops(tmp_path, dying):
    children = start_pair(tmp_path, "train.stall_minutes=0.2")
    wait_for(children[0], "step    ")
    children[dying].kill()
    status, error = end(children[1 - dying])
    end(children[dying])
    assert status == 43, error
    assert (
        len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
        and "another process is lost" in error
    )


def test_when_a_host_hangs_the_other_one_stops(tmp_path):
    children = start_pair(tmp_path, "train.stall_minutes=0.2", "checkpoint.steps=0")  # it could hang while it saves
    wait_for(children[0], "step    ")
    children[1].send_signal(signal.SIGSTOP)
    status, error = end(children[0])
    children[1].kill()
    end(children[1])
    assert status == 43, error
    assert "'step'" in error and "lost" in error


def test_a_signal_to_one_host_stops_both_at_one_step(tmp_path):
    children = start_pair(tmp_path)
    wait_for(children[0], "step    ")
    children[1].send_signal(signal.SIGTERM)
    (status_0, error_0), (status_1, error_1) = map(end, children)
    assert (status_0, status_1) == (42, 42), error_0 + error_1
    assert (error_0 + error_1).count("preempted at step") == 1, "only one host prints it"
    step = int(error_0.split("preempted at step ")[1].split(":")[0])
    assert (tmp_path / "checkpoints" / str(step)).is_dir() and sorted(losses(tmp_path)) == list(range(1, step + 1))


def test_a_loss_that_stays_nan_stops_all_hosts(tmp_path):
    children = start_pair(
        tmp_path, "optim.lr=1e30", "optim.weight_decay=0", "train.max_bad_steps=3", "checkpoint.steps=1"
    )
    (status_0, error_0), (status_1, error_1) = map(end, children)
    assert (status_0, status_1) == (2, 2), error_0 + error_1
    for error in (error_0, error_1):
        assert "not finite in steps" in error and f"{tmp_path}/checkpoints/" in error


@pytest.mark.parametrize("processes", [1, 2])
def test_no_step_is_lost_or_changed_by_random_kills(tmp_path, processes):
    """Runs benchmarks/faults.py. CLIP_JAX_FAULT_ROUNDS=20 makes more rounds, CLIP_JAX_FAULT_SEED other ones."""
    rounds, seed = (
        os.environ.get(f"CLIP_JAX_FAULT_{name}", default) for name, default in (("ROUNDS", "1"), ("SEED", "0"))
    )
    command = [
        sys.executable,
        "benchmarks/faults.py",
        f"--rounds={rounds}",
        f"--processes={processes}",
        f"--seed={seed}",
    ]
    env, timeout = os.environ | {"PYTHONPATH": str(REPO)}, TIMEOUT * (int(rounds) + 2)
    process = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=timeout)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "equal the undisturbed run" in process.stdout


class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def terminate_self(phase, _):
    if phase == "start":
        os.kill(os.getpid(), signal.SIGTERM)


def collect():
    gc.callbacks.append(terminate_self)
    gc.collect()
    gc.callbacks.remove(terminate_self)


@pytest.mark.parametrize("cause", [Finalized, collect])
def test_a_signal_in_a_finalizer_or_a_callback_of_gc_is_not_dropped(monkeypatch, cause):
    monkeypatch.setattr(faults, "_asked", 0)
    monkeypatch.setattr(faults, "_INSIST_SECONDS", 0.1)
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)  # pytest's keeps the exception
    with faults.Signals() as signals, pytest.raises(faults.Stopped):
        cause()
        time.sleep(10)
    assert signals.status == faults.PREEMPTED


@contextlib.contextmanager
def saving(saved):
    try:
        yield
    finally:
        time.sleep(0.3)
        saved.append(True)


def test_what_an_exception_passes_on_its_way_up_is_left_to_end(monkeypatch):
    monkeypatch.setattr(faults, "_asked", 0)
    monkeypatch.setattr(faults, "_INSIST_SECONDS", 0.05)
    saved = []
    with pytest.raises(faults.Stopped), faults.Signals(), saving(saved):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(faults.Stopped), faults.Signals() as signals, saving(saved), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ValueError), faults.Signals() as signals, saving(saved), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError
    assert len(saved) == 3


COMPILES = """
import itertools, os, signal, threading, time
import jax
from clip_jax.runtime import command

def product(x, start):
    for _ in range(300):
        x = jax.numpy.sin(x) @ x
    return x + start

def compile_forever():
    for start in itertools.count():
        jax.jit(lambda x: product(x, start)).lower(jax.numpy.ones((8, 8))).compile()

def main():
    jax.config.update("jax_enable_compilation_cache", False)
    threading.Thread(target=compile_forever, daemon=True).start()
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(60)

command.script(main)
"""


DROPS = """
import os, signal, time
from clip_jax.runtime import command, faults

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def main():
    faults._INSIST_SECONDS = 0.1
    Finalized()  # Python drops what a finalizer raises
    time.sleep(60)

command.script(main)
"""


def test_a_dropped_ctrl_c_of_any_command_is_repeated():
    done = subprocess.run([sys.executable, "-c", DROPS], **PIPES)
    assert done.returncode == faults.INTERRUPTED and done.stderr.endswith("\ninterrupted\n")


def test_ctrl_c_while_a_thread_compiles_gives_its_status():
    done = subprocess.run([sys.executable, "-c", COMPILES], **PIPES)
    assert (done.returncode, done.stderr) == (faults.INTERRUPTED, "interrupted\n")
