"""The lock of a work folder, the history of its configurations, running a run again, and forks."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import REPO
from helpers import losses, tiny_config

from clip_jax import config as config_lib
from clip_jax import evaluate, run_folder, train
from clip_jax.errors import UserError
from clip_jax.runtime import faults, hosts, lock
from clip_jax.training import checkpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "STALE_SECONDS", 30)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)


def write_lock(folder, beat=0.0, **fields):
    """Writes the lock of a run in the parent process of this one, which lives, refreshed `beat` seconds ago."""
    content = lock.Lock(folder).content | {"pid": os.getppid(), "started": lock._started(os.getppid())}
    content |= {"since": 1.7e9, "beat": time.time() - beat, "token": "other"} | fields
    (folder / lock.FILE).write_text(json.dumps(content))
    return content


def beat_on(folder, beat, fields, ended):
    while not ended.wait(0.2):
        write_lock(folder, beat, **fields)


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_lock_is_there_while_it_is_held(tmp_path):
    with lock.hold(tmp_path, number=0):
        found = lock.read(tmp_path)
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        assert abs(found["beat"] - time.time()) < 60 and abs(found["since"] - time.time()) < 60
        with lock.hold(tmp_path, number=0):  # train() within the command
            pass
        assert lock.read(tmp_path) == found
    assert files(tmp_path) == {}


def test_a_folder_in_use_is_refused_in_one_line_and_nothing_is_written(tmp_path, capsys):
    write_lock(tmp_path)
    before = files(tmp_path)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1.7e9))
    line = f"{tmp_path} is in use by a run on {socket.gethostname()}, process {os.getppid()}, since {since}"
    assert train.main(["--config=configs/clip.py:emoji", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    (tmp_path / "metrics.jsonl").touch()
    before[tmp_path / "metrics.jsonl"] = b""
    assert evaluate.main([f"--checkpoint={tmp_path}", "--report"]) == 2
    assert capsys.readouterr().err == f"error: {line}; it writes report.html itself: name another page, --report=PATH\n"
    assert files(tmp_path) == before


def test_a_dead_process_of_this_machine_loses_its_lock_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for fields in ({"pid": ended.pid}, {"started": "1"}, {"pid": os.getpid(), "started": "1"}):  # numbers come again
        write_lock(tmp_path, **fields)
        lines = []
        with lock.hold(tmp_path, lines.append, number=0):
            assert lock.read(tmp_path)["pid"] == os.getpid()
        (line,) = lines
        assert line.startswith(f"{tmp_path}: taken over from a run on {socket.gethostname()}, process")


def test_a_run_of_another_host_lives_while_it_refreshes_its_lock(tmp_path, monkeypatch):
    for fields in ({"host": "pod-3"}, {"machine": "the same host after a restart"}):
        write_lock(tmp_path, beat=31, **fields)
        lines = []
        with lock.hold(tmp_path, lines.append, number=0):
            assert "token" in lock.read(tmp_path) and len(lines) == 2

        lock.check_free(tmp_path, "")
        for beat in (5, 1000):  # the clocks may differ
            write_lock(tmp_path, beat, **fields)
            monkeypatch.setattr(lock, "WATCH_SECONDS", 20)
            ended = threading.Event()
            owner = threading.Thread(target=beat_on, args=(tmp_path, beat, fields, ended))
            owner.start()
            with pytest.raises(UserError, match="is in use by a run on"), lock.hold(tmp_path, lines.append, number=0):
                pass
            ended.set()
            owner.join()
            assert lock.read(tmp_path)["token"] == "other"
            assert f"looking up to {25 if beat == 5 else 20} s" in lines[-1]
        monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
        lock.check_free(tmp_path, "")  # 1000 s
        write_lock(tmp_path, beat=5, **fields)
        with pytest.raises(UserError, match="is in use by a run on .* it writes"):
            lock.check_free(tmp_path, "it writes")

    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)
    write_lock(tmp_path, host="pod-3", beat=0.5)  # the node was taken away; the pod comes back on another one
    lines = []
    with lock.hold(tmp_path, lines.append, number=0):
        assert lock.read(tmp_path)["pid"] == os.getpid()
    assert re.search("looking up to [01] s", lines[0]) and "taken over from a run on pod-3" in lines[1]


def test_an_ending_run_lives_by_its_refreshes_and_not_by_its_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.5)

    def save():
        for i in range(30):
            write_lock(tmp_path, beat=1000 - i, host="pod-3", ending=True)
            time.sleep(0.1)
        saved.append(True)
        (tmp_path / lock.FILE).unlink()

    saved = []
    write_lock(tmp_path, beat=1001, host="pod-3", ending=True)
    owner = threading.Thread(target=save)
    owner.start()
    with lock.hold(tmp_path, lambda line: None, number=0):
        assert saved
    owner.join()


def test_on_cloud_tpu_nothing_asks_jax_before_the_hosts_have_joined(tmp_path, monkeypatch):
    """A started backend would make `jax.distributed.initialize` fail."""
    monkeypatch.setattr(hosts, "_on_cloud_tpu", lambda: True)
    monkeypatch.setattr(hosts, "is_first", lambda: pytest.fail("asked too early"))
    joined = []
    monkeypatch.setattr(train, "train", lambda *_: joined.append(True))
    assert train.main([f"--config={REPO}/configs/clip.py:emoji", f"--workdir={tmp_path}"]) == 0 and joined


def test_a_damaged_lock_is_taken_over(tmp_path):
    (tmp_path / lock.FILE).write_text("")
    with lock.hold(tmp_path, lambda line: None, number=0):
        assert lock.read(tmp_path)["pid"] == os.getpid()


def test_one_of_several_that_take_a_lock_over_gets_it(tmp_path):
    write_lock(tmp_path, started="1")
    start, outcomes = threading.Barrier(6), []

    def take():
        start.wait()
        taken = lock.Lock(tmp_path)
        try:
            taken.acquire(lambda line: None)
            outcomes.append(taken)
        except UserError:
            outcomes.append(None)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (owner,) = filter(None, outcomes)
    assert lock.read(tmp_path)["token"] == owner.token
    owner.release()


def test_the_other_processes_of_a_run_write_nothing(tmp_path):
    with lock.hold(tmp_path, number=1, coordinator="host:1"):
        assert files(tmp_path) == {}
    write_lock(tmp_path, coordinator="host:1")
    with lock.hold(tmp_path, number=1, coordinator="host:1"):
        pass
    with pytest.raises(UserError, match="is in use by"), lock.hold(tmp_path, number=1, coordinator="host:2"):
        pass


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_lock_is_refreshed_and_a_run_that_lost_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    ends = []
    monkeypatch.setattr(faults, "end", lambda status, line: ends.append((status, line)))
    with lock.hold(tmp_path, number=0):
        first = lock.read(tmp_path)["beat"]
        wait_for(lambda: lock.read(tmp_path)["beat"] > first)
        stranger = write_lock(tmp_path)
        wait_for(lambda: ends)
    assert ends[0][0] == 2 and "taken for dead" in ends[0][1]
    assert lock.read(tmp_path) == stranger


def test_a_run_that_is_ending_is_waited_for(tmp_path, monkeypatch):
    """A cluster starts the new host while the old one, asked to end, still saves its state."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    lines = []
    for fields, coordinator in (({"ending": True}, ""), ({"coordinator": "job-0:1"}, "job-0:1")):
        write_lock(tmp_path, **fields)
        threading.Timer(0.5, (tmp_path / lock.FILE).unlink).start()
        with lock.hold(tmp_path, lines.append, number=0, coordinator=coordinator):
            assert lock.read(tmp_path)["pid"] == os.getpid()
        assert "waiting for the end of a run on" in lines.pop() and not lines
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.2)
    write_lock(tmp_path, ending=True)
    with pytest.raises(UserError, match="is in use by"), lock.hold(tmp_path, lines.append, number=0):
        pass
    os.remove(tmp_path / lock.FILE)
    with lock.hold(tmp_path, number=0):
        assert not lock.read(tmp_path).get("ending")
        monkeypatch.setattr(faults, "_asked", faults.PREEMPTED)
        wait_for(lambda: lock.read(tmp_path).get("ending"))


def test_a_process_that_ends_at_once_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda status: None)
    with lock.hold(tmp_path, number=0):
        faults.end(faults.LOST, "a stall")
        assert files(tmp_path) == {}


def test_an_evaluator_runs_beside_a_training_but_not_beside_another(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_lock(tmp_path)
    os.rename(tmp_path / lock.FILE, tmp_path / evaluate.LOCK)
    with pytest.raises(UserError, match="is in use by"):
        evaluate.follow(type("Args", (), {"checkpoint": str(tmp_path)}), [])
    write_lock(tmp_path)
    os.remove(tmp_path / evaluate.LOCK)
    with lock.hold(tmp_path, number=0, name=evaluate.LOCK):
        assert {p.name for p in files(tmp_path)} == {lock.FILE, evaluate.LOCK}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    train.train(tiny_config("train.steps=4"), workdir, log=lambda line: None)
    return workdir


def test_a_run_writes_its_configuration_and_its_cost(finished):
    (row,) = run_folder.history(finished)
    assert (row["step"], row["changes"]) == (0, {}) and abs(row["time"] - time.time()) < 3600
    cost = json.loads((finished / "run.json").read_text())
    params = checkpoint.read_meta(finished / "checkpoints" / "4")
    assert cost["devices"] == jax.device_count() and cost["flops_per_example"] > 1e5 and params["step"] == 4
    assert cost["parameters"] > 100_000 and not (finished / lock.FILE).exists()


def test_a_complete_run_that_is_asked_for_fewer_steps_is_left_alone(finished):
    before, lines = files(finished), []
    assert train.train(tiny_config("train.steps=3", "optim.lr=1.0"), finished, lines.append) == {}
    assert files(finished) == before
    assert lines[-1].startswith(f"the run in {finished} has 4 steps, more than train.steps=3: it is left as it is")


def test_changes_are_kept_with_their_step(tmp_path):
    config = tiny_config("optim.lr=1e-3")
    run_folder.record(tmp_path, config, 0)
    run_folder.record(tmp_path, config, 5)
    run_folder.record(tmp_path, tiny_config("optim.lr=1e-4", "eval.steps=7"), 9)
    found = [(row["step"], row["changes"]) for row in run_folder.history(tmp_path)]
    assert found == [(0, {}), (9, {"eval.steps": [350, 7], "optim.lr": [1e-3, 1e-4]})]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 1e-4
    (tmp_path / "config.json").write_text("{")
    run_folder.record(tmp_path, config, 12)
    assert run_folder.history(tmp_path)[-1]["note"] == "config.json was damaged"


def test_the_configuration_of_a_run_runs_it_again(finished, tmp_path):
    old = config_lib.from_json((finished / "config.json").read_text())
    config, fork = parse(f"--config={finished}/config.json", f"--workdir={tmp_path}", "--config.optim.lr=0.5")
    assert fork is None and config.optim.lr == 0.5
    again, _, _, _ = train.make_parts(config)
    assert [key for key, *_ in config_lib.differences(old, again)] == ["optim.lr"]
    assert run_folder.load(f"{finished}/config.json", ["tokenizer=clip_bpe"]).model.text.vocab_size == 0


def parse(*argv):
    config, _, _, fork = train.parse_args(list(argv))
    return config, fork


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config={run}"], "is a run: its configuration is --config={run}/config.json"),
        (["--config={run}/nothing.json"], "nothing.json: there is no such file"),
        (["--config={run}/run.json"], "it has no 'method'"),
        (["--config={run}/checkpoints/4/_CHECKPOINT_METADATA.json"], "there is no such file"),
        ([], "give --config=FILE[:VARIANT] or --fork-from=RUN: one is needed"),
        (["--config={run}/config.json", "--fork-from={run}"], "--fork-from=RUN: not both"),
        (["--fork-from={run}"], "that of step 4, and train.steps=4: give more, --config.train.steps=N"),
        (["--fork-from={run}/none", "--config.train.steps=6"], "there is no checkpoint"),
        (["--fork-from={run}", "--config.train.steps=6", "--config.tokenizer=clip_bpe"], "tokenizer was 'sentencep"),
        (["--fork-from={run}", "--config.train.steps=6", "--config.optim.ema_decay=0.9"], "ema_decay was 0.0, is now"),
        (["--fork-from={run}", "--config.init_from=x"], "so init_from=x has no place"),
        (["--fork-from={run}", "--workdir={run}", "--config.train.steps=6"], "holds another run"),
    ],
)
def test_what_cannot_be_run_again_or_forked_is_one_line(finished, tmp_path, arguments, message):
    arguments = [text.replace("{run}", str(finished)) for text in arguments]
    with pytest.raises(UserError) as error:
        parse(f"--workdir={tmp_path}/new", *arguments)
    assert message.replace("{run}", str(finished)) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_fork_continues_parameters_optimizer_and_step(finished, tmp_path):
    """With unchanged fields it computes what the run itself would, and its changes are recorded."""
    flags = [f"--fork-from={finished}", f"--workdir={tmp_path}/fork"]
    config, fork = parse(*flags, "--config.train.steps=6", "--config.model.remat=full")
    lines = []
    train.train(config, tmp_path / "fork", lines.append, fork=fork)
    assert f"forked from {finished}, step 4" in lines
    train.train(tiny_config("train.steps=6"), tmp_path / "whole", lambda line: None)
    whole, forked = losses(tmp_path / "whole"), losses(tmp_path / "fork")
    assert sorted(forked) == [5, 6]
    np.testing.assert_allclose([forked[5], forked[6]], [whole[5], whole[6]], rtol=1e-5)
    (row,) = run_folder.history(tmp_path / "fork")
    assert (row["step"], row["forked_from"]) == (4, f"{finished}/checkpoints/4")
    assert row["changes"] == {"model.remat": ["none", "full"], "train.steps": [4, 6]}
    assert checkpoint.find(finished).name == "4" and run_folder.history(finished)[-1]["step"] == 0

    # The same command resumes the fork, also when the run is gone; another run's fork needs another folder.
    config, fork = parse(*flags, "--config.train.steps=6", "--config.model.remat=full")
    before = losses(tmp_path / "fork")
    train.train(config, tmp_path / "fork", lines.append, fork=fork)
    assert losses(tmp_path / "fork") == before
    with pytest.raises(UserError, match=f"is a fork of {finished}, not of elsewhere: use another --workdir"):
        parse("--fork-from=elsewhere", f"--workdir={tmp_path}/fork")


def test_a_fork_with_another_optimizer_state_is_refused(finished, tmp_path):
    workdir = tmp_path / "fork"
    config, fork = parse(
        f"--fork-from={finished}", f"--workdir={workdir}", "--config.train.steps=6",
        "--config.optim.lr_mult=(('^img/', 0.0),)",
    )  # fmt: skip
    with pytest.raises(UserError, match="optim.lr_mult would alter its state: .* is .* there, .* here"):
        train.train(config, workdir, lambda line: None, fork=fork)
    assert not (workdir / "checkpoints").exists()
