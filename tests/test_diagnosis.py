"""Where the time of a run goes, traces of steps, stacks on demand, the host that waits for its data."""

import collections
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import COMPILE_FAST, REPO
from helpers import tiny_config, train_command

from clip_jax import train
from clip_jax.errors import UserError
from clip_jax.evaluation.report.charts import training_curves
from clip_jax.evaluation.report.page import Page
from clip_jax.runtime import faults, goodput, hosts, profile, sharding
from clip_jax.training.metrics import Progress

SIZES = dict(training=60.0, data=10.0, checkpoint=5.0, evaluation=10.0, compiling=10.0, starting=5.0)


def test_time_is_counted_by_stage_and_over_restarts(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(faults, "_stage", None)  # an error in an earlier test leaves its stage set
    monkeypatch.setattr(faults, "_spent", collections.Counter())
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with faults.stage("evaluation"):
        now += 7  # before the first step
        with faults.stage("checkpoint"):
            now += 3
        now += 1
    clock = goodput.Goodput(1000.0, SIZES | dict(lost=2.0, begun=800.0))
    now += 9
    clock.begin_steps(compiling=8.0)
    with faults.stage("step"):
        now += 30
    with faults.stage("data"):
        now += 4
    now += 1
    with faults.stage("checkpoint"):
        now += 2
        with faults.stage("evaluation"):
            now += 5
        now += 1
    # The process started at 1000, 200 s after the first one; of these 100 are known, 100 were lost.
    expected = dict(training=91, data=14, checkpoint=8, evaluation=15, compiling=18, starting=17, lost=100)
    seconds = clock.seconds()
    assert seconds == pytest.approx(expected | dict(begun=800)) and sum(expected.values()) == now - 800
    assert clock.share() == pytest.approx(91 / 263)
    line = goodput.describe(seconds)
    assert line.startswith("4m23s in all: training 34.6%, ") and line.endswith("lost to restarts 38.0%")


def test_the_report_says_where_the_time_went(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 1, "seconds/training": 30, "seconds/data": 90, "seconds/lost": NaN}\n'
    )
    html = training_curves(Page(), path)
    assert "2m00s in all: training 25.0%, waiting for data 75.0%" in html and "seconds/" not in html
    assert "lost to restarts 0.0%.</p>" in html


def test_steps_to_trace():
    assert profile.parse_steps("", 9) is None
    assert profile.parse_steps("3-5", 9) == (3, 5) and profile.parse_steps("9", 9) == (9, 9)
    for text in ("5-3", "0-3", "3-", "a", "3-5-7"):
        with pytest.raises(UserError, match=f"profile.steps='{text}': give a range of steps such as '100-110'"):
            profile.parse_steps(text, 9)
    with pytest.raises(UserError, match="profile.steps='8-10': the run has train.steps=9"):
        train.make_parts(tiny_config("profile.steps=8-10", "train.steps=9"))
    with pytest.raises(UserError, match="profile.port=70000: a port is at most 65535"):
        train.make_parts(tiny_config("profile.port=70000"))


def test_traces_of_steps_and_after_a_signal(tmp_path):
    step = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    config, lines = tiny_config("profile.steps=2-3", "train.steps=40"), []
    with profile.Profiler(tmp_path, config, step, lines.append) as profiler:
        state = jnp.ones((8, 8))
        for number in range(1, 8):
            if number == 6:
                os.kill(os.getpid(), signal.SIGUSR2)
            with profiler.step(number, state):
                state = step(state)
    assert [line for line in lines if "trace of" in line] == [
        "profile: a trace of steps 2 to 3 ...",
        f"profile: a trace of steps 6 to {5 + profile.SIGNAL_STEPS} ...",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"steps_2-3", "steps_6-15"}
    assert "HloModule" in (tmp_path / "steps_2-3" / "step.hlo.txt").read_text()
    assert (tmp_path / "steps_6-15" / "memory_host0.prof").stat().st_size > 0
    (trace,) = (tmp_path / "steps_2-3").glob("plugins/profile/*/*.xplane.pb")
    assert trace.name == "host0.xplane.pb", "not the name of the machine, on which other processes may run"
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [2, 3]


def test_a_trace_that_fails_and_a_signal_outside_of_the_steps(tmp_path, monkeypatch, caplog):
    before = signal.getsignal(signal.SIGUSR2)
    profile.ignore_signal()
    config, lines = tiny_config("profile.steps=2-3"), []
    (tmp_path / "steps_2-3").write_text("")  # where the folder would be
    with profile.Profiler(tmp_path, config, None, lines.append) as profiler:
        for number in range(1, 5):
            with profiler.step(number, jnp.ones(1)):
                pass
    assert len(lines) == 1 and f"profile: the trace cannot be written to {tmp_path}/steps_2-3: " in caplog.text
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, before)


def test_the_launcher_of_several_processes_survives_their_signals(tmp_path):
    (tmp_path / "waits.py").write_text("import sys; print('ready', flush=True); sys.stdin.readline()")
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_jax.runtime.hosts", "--processes=1", "waits"], cwd=REPO, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_sigusr1_shows_all_stacks_and_ends_nothing():
    code = """
import sys, time
from clip_jax.runtime import command
def wait():
    print("ready", flush=True)
    sys.stdin.readline()
sys.exit(command.run(wait))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    _, stacks = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and re.search('File "<string>", line \\d in wait', stacks)


def test_the_slowest_host_is_known_on_all_hosts(monkeypatch):
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2, tensor=1))
    rows = np.zeros((8, 4), np.int32)
    rows[[0, 4]] = [[0, 3, 1_500_000, 6], [44, 2, 2_000_000, 7]]
    request, skipped, waited, host = hosts._reducer(mesh)(jax.device_put(rows, sharding.batch_sharding(mesh)))
    assert (int(request), int(skipped), float(waited), int(host)) == (44, 5, 2.0, 7)
    assert hosts.exchange(mesh, 42, 1, 0.5) == (42, 1, 0.5, 0)

    values = dict(loss=1.0, grad_norm=1.0, param_norm=1.0, lr=1.0)
    for waits, count, named in (
        ([(4.0, 7), (3.0, 7), (0.5, 2)], 8, True),
        ([(4.0, 7), (3.0, 1)], 8, False),  # no host is far behind
        ([(0.1, 7)], 8, False),
        ([(4.0, 0)], 1, False),
    ):
        progress = Progress(4, 10, 0.0)
        monkeypatch.setattr(hosts, "count", lambda count=count: count)
        progress.start -= 10
        for wait in waits:
            progress.add(values, *wait)
        found, line = progress.report(3)
        assert found["data_wait_share"] == pytest.approx(sum(wait for wait, _ in waits) / 10, rel=0.01)
        assert ("data wait 75% (host 7)" in line) == named == ("data_wait_host" in found)


SLOW_SOURCE = """
import os, time
import numpy as np
from clip_jax.data.records import BaseSource

class Slow(BaseSource):
    reads = 0
    def __len__(self):
        return 64
    def __getitem__(self, index):
        self.reads += 1
        if os.environ["JAX_LOCAL_DEVICE_IDS"] == "1":
            time.sleep(0.1 if self.reads < 100 else 100)
        return {"image": np.zeros((16, 16, 3), np.uint8), "texts": ["a cat"]}

def make(split):
    return Slow(f"slow:{split}")
"""


def test_two_hosts_of_which_one_waits_for_its_data(tmp_path, monkeypatch):
    """The progress line names it, and when it hangs both stages are shown."""
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "slow.py").write_text(SLOW_SOURCE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPO}")
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FAST)  # one device a process
    options = ["data.source=my.slow", "data.templates=()", "data.threads=1", "data.cache_mb=0", "train.steps=1000"]
    command = train_command(tmp_path / "run", *options, "train.log_steps=2", "train.stall_minutes=0.15")
    children = hosts.spawn(2, command[2:], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (output, *_), errors = zip(*(child.communicate(timeout=240) for child in children), strict=True)
    assert [child.returncode for child in children] == [43, 43], errors
    assert re.search(r"data wait \d+% \(host 1\)", output)
    shown = "".join(
        rf"  process {i}: in the stage '{stage}' for \d+ s, \d+ s ago\n" for i, stage in enumerate(("step", "data"))
    )
    assert re.search(f"error: the stage .*\n{shown}stacks:", "".join(errors))
