"""Several hosts: how they join and which rows they read; two real processes give the results of one."""

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import REPO
from helpers import losses, run, tiny_config, train_command

from clip_jax import train
from clip_jax.errors import UserError
from clip_jax.runtime import command, host_log, hosts, sharding


def parse(*flags):
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    return hosts.from_arguments(parser.parse_args(flags))


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
    ):
        monkeypatch.delenv(name, raising=False)


def test_flags_and_environment(monkeypatch):
    assert parse() is None
    expected = hosts.Cluster("10.0.0.1:1234", 4, 3)
    assert parse("--coordinator=10.0.0.1:1234", "--processes=4", "--process=3") == expected
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    assert parse() is None, "JAX needs it with SLURM and Cloud TPU too"
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert parse() == expected
    assert parse("--process=0") == hosts.Cluster("10.0.0.1:1234", 4, 0)


ALONE = """
import functools, sys, jax
from clip_jax.runtime import command, faults
from clip_jax.runtime import hosts
jax.distributed.initialize = functools.partial(jax.distributed.initialize, initialization_timeout=2)
sys.exit(command.run(lambda: hosts.start(hosts.Cluster("127.0.0.1:{port}", 2, {process}))))
"""


def test_a_host_that_does_not_find_the_others_reports_it():
    waiting = {}
    for process in range(2):  # each at a port of its own, both at the same time
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = ALONE.format(port=port, process=process)
        waiting[port] = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stderr=subprocess.PIPE, text=True)
    for port, process in waiting.items():
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 43
        assert f"in the stage 'waiting for the other processes at 127.0.0.1:{port}'" in error.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--processes=2", "--process=0"], "--coordinator .* is missing"),
        (["--coordinator=a:1"], "--coordinator is given without --processes"),
        (["--coordinator=a:1", "--processes=2"], "--process .* is missing"),
        (["--coordinator=a:1", "--processes=two", "--process=0"], "--processes=two: a whole number"),
        (["--coordinator=a", "--processes=2", "--process=0"], "--coordinator=a: HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], r"--process=2 is not in 0\.\.1"),
    ],
)
def test_incomplete_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse(*flags)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_one_line(address):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC does
        other.bind((address, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot open port {port} .*choose another port"):
            hosts.start(hosts.Cluster(f"127.0.0.1:{port}", 2, 0))
    hosts._check_port(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="at most 65535"):
        hosts._check_port("127.0.0.1:70000")


def test_where_jax_detects_the_cluster(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("SLURM_PROCID", "0")
    hosts.start()
    hosts.start(hosts.Cluster("a:1", 1, 0))
    assert not calls, "a batch script is one process, and so is a job step of one task"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    hosts.start(timeout=7)
    assert calls.pop() == {"heartbeat_timeout_seconds": 7}
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    hosts.start()
    assert not calls, "JAX_PLATFORMS excludes the TPU"
    monkeypatch.delenv("JAX_PLATFORMS")
    hosts.start()
    assert calls.pop() == {"heartbeat_timeout_seconds": 100}
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: [])
    hosts.start(hosts.Cluster("a:1", 2, 1))
    arguments = calls.pop()
    assert arguments.pop("cluster_detection_method") == "deactivate"
    assert arguments == dict(coordinator_address="a:1", num_processes=2, process_id=1, heartbeat_timeout_seconds=100)


def test_hosts_join_before_they_open_their_data(monkeypatch, tmp_path):
    """They may take very different times for it, and those that wait to be joined give up after minutes."""
    order = []

    def make_parts(*_):
        order.append("open")
        raise UserError("enough")

    monkeypatch.setattr(train.hosts, "start", lambda cluster, timeout: order.append("join"))
    monkeypatch.setattr(train, "make_parts", make_parts)
    with pytest.raises(UserError, match="enough"):
        train.train(tiny_config(), tmp_path)
    assert order == ["join", "open"]


@pytest.mark.parametrize(
    "platforms, outcome, message",
    [
        ("cpu", None, None),
        ("", None, None),
        ("cuda,cpu", None, "JAX_PLATFORMS=cuda,cpu, but JAX finds no cuda on this host: it sees only the CPU"),
        ("cuda", AssertionError(), "JAX finds no cuda on this host: it sees no device"),
        ("tpu,cpu", RuntimeError("No jellyfish\ndevice"), "finds no tpu on this host: No jellyfish device"),
    ],
)
def test_a_host_without_the_wanted_chips_does_not_train_on_its_cpu(monkeypatch, platforms, outcome, message):
    found = jax.devices()

    def devices():
        if outcome:
            raise outcome
        return found

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    if message is None:
        assert hosts.devices() == found and sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).size == len(found)
        return
    with pytest.raises(RuntimeError, match=message):
        sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def test_the_name_of_a_log():
    assert host_log.process_name(hosts.Cluster("a:1", 4, 3)) == "process-3"
    assert host_log.process_name(None, {"SLURM_PROCID": "7"}) == "process-7"
    assert host_log.process_name(None, {}) == socket.gethostname()


@pytest.mark.parametrize("error", [UserError("a wrong field"), KeyError("a defect")], ids=["refused", "defect"])
def test_a_log_ends_with_what_ended_the_process(tmp_path, capsys, error):
    def work():
        host_log.start(tmp_path, "process-3")
        print("step 1")
        host_log.write("only here")
        logging.getLogger("clip_jax").warning("a record is damaged")
        raise error

    before = (sys.stdout, sys.stderr, list(logging.getLogger().handlers))
    for _ in range(2):  # a restart appends
        if isinstance(error, UserError):
            assert command.run(work) == 2
        else:
            with pytest.raises(KeyError):
                command.run(work)
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == before
    captured = capsys.readouterr()
    assert captured.out == "step 1\nstep 1\n" and "only here" not in captured.err
    lines = (tmp_path / "logs" / "process-3.log").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("--- ")]
    assert len(starts) == 2 and f"pid {os.getpid()}" in lines[0]
    first = lines[1 : starts[1]]
    assert first[:2] == ["step 1", "only here"] and first[2].endswith("WARNING clip_jax: a record is damaged")
    assert first[-1] == ("error: a wrong field" if isinstance(error, UserError) else "KeyError: 'a defect'")


class Bucket:
    """A log in a bucket that fails at first."""

    def __init__(self):
        self.lines, self.safe, self.fails = [], [], 2

    def open(self, path):
        self.path = path
        self.fails -= 1
        if self.fails:
            raise OSError("503")
        return self

    def write(self, line):
        self.lines.append(line)

    def flush(self):
        self.safe = list(self.lines)


def test_the_log_of_a_run_in_a_bucket(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host_log, "SHIP_SECONDS", 0.01)
    bucket = Bucket()
    host_log.start(tmp_path / "run", "process-0", bucket.open)
    print("step 1")
    deadline = time.monotonic() + 30
    while "step 1" not in bucket.safe:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(host_log, "SHIP_SECONDS", 3600)
    print("the end", file=sys.stderr)
    host_log.stop()
    assert bucket.path == tmp_path / "run" / "logs" / "process-0.log" and not bucket.path.exists()
    assert bucket.safe[0].startswith("--- ") and bucket.safe[1:] == ["step 1", "the end"]
    assert capsys.readouterr() == ("step 1\n", "the end\n")


def test_a_full_disk_costs_only_the_log(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "full.log").symlink_to("/dev/full")  # every write fails, as on a full disk

    def work():
        host_log.start(tmp_path, "full")
        print("a step")
        logging.getLogger("clip_jax").warning("a warning")
        raise UserError("could not save")

    assert command.run(work) == 2
    assert capsys.readouterr() == ("a step\n", "error: could not save\n")


def test_one_host_starts_without_jax():
    code = "import sys; from clip_jax.runtime import faults, hosts; hosts.start(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def fake_mesh(shape, processes):
    """A mesh whose devices belong to the given processes, in this order."""
    devices = np.array([types.SimpleNamespace(process_index=p, id=i) for i, p in enumerate(processes)], object).reshape(
        shape
    )
    return types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))


@pytest.mark.parametrize(
    "shape, processes, in_order, shares",
    [
        ((4, 1, 1), [0, 0, 1, 1], True, 2),
        ((2, 1, 2), [0, 0, 1, 1], True, 2),
        ((1, 2, 2), [0, 0, 1, 1], True, 2),
        ((1, 1, 4), [0, 0, 1, 1], True, 1),  # both have all rows
        ((2, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], True, 2),
        ((4, 1, 1), [0, 1, 0, 1], False, None),
        ((4, 1, 1), [1, 1, 0, 0], True, 2),
        ((2, 1, 3), [0, 0, 1, 1, 2, 2], False, None),  # process 1 has devices in both rows
    ],
)
def test_which_rows_a_host_reads(monkeypatch, shape, processes, in_order, shares):
    mesh = fake_mesh(shape, processes)
    assert sharding._in_order(mesh) == in_order
    if not in_order:
        return
    index = sharding.process_shard.__wrapped__
    for process in set(processes):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        where, count = index(mesh)
        assert count == shares
        mine = np.array(processes).reshape(-1, shape[2])
        rows = [row for row in range(len(mine)) if process in mine[row]]
        assert rows == list(range(where * len(mine) // count, (where + 1) * len(mine) // count))


def sliced(*sizes):
    """Devices of slices of these sizes, out of order."""
    where = [index for index, size in enumerate(sizes) for _ in range(size)]
    devices = [
        types.SimpleNamespace(id=i, slice_index=index, platform="gpu", device_kind="H100")
        for i, index in enumerate(where)
    ]
    return devices[1::2] + devices[::2]


@pytest.mark.parametrize(
    "shape, sizes, where",
    [
        ((8, 1, 1), (4, 4), [0, 0, 0, 0, 1, 1, 1, 1]),
        ((2, 4, 1), (4, 4), [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ((2, 2, 2), (4, 4), [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]),
        ((1, 8, 1), (4, 4), [0, 0, 0, 0, 1, 1, 1, 1]),
        ((2, 4, 1), (2, 2, 2, 2), [[0, 0, 1, 1], [2, 2, 3, 3]]),
    ],
)
def test_slices_lie_along_data_then_fsdp(shape, sizes, where):
    arranged = sharding.arrange(shape, sliced(*sizes))
    assert arranged.shape == shape and len({device.id for device in arranged.flat}) == sum(sizes)
    np.testing.assert_array_equal(np.vectorize(lambda device: device.slice_index)(arranged).squeeze(), where)


@pytest.mark.parametrize("shape, sizes", [((1, 1, 8), (4, 4)), ((2, 1, 4), (2, 2, 2, 2)), ((8, 1, 1), (6, 2))])
def test_a_mesh_that_does_not_fit_the_slices(shape, sizes):
    with pytest.raises(
        UserError, match=f"does not fit {len(sizes)} slices of {', '.join(map(str, sorted(set(sizes))))} devices"
    ):
        sharding.arrange(shape, sliced(*sizes))


def together(module, *arguments, **kwargs):
    """Runs a command in two processes on this machine; returns the finished launcher."""
    return run([sys.executable, "-m", "clip_jax.runtime.hosts", "--processes=2", module, *arguments], **kwargs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of a run of 8 steps in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    process = run(train_command(workdir, "train.steps=8"))
    assert process.returncode == 0, process.stderr
    return losses(workdir)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """`(work folder, finished process)` of a run of 5 steps in two processes, by the command that a user gives."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "venv" / "bin").mkdir(parents=True)
    python = folder / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for name in (".clip_jax", ".clip_jax_gpu"):
        (folder / "venv" / name).touch()  # "installed"
    _, _, _, config, *rest = train_command(folder / "run", "train.steps=5")
    command = ["bash", "launch/local.sh", "--processes", "2", config.removeprefix("--config="), *rest]
    process = run(command, env={"CLIP_JAX_VENV": str(folder / "venv")})
    assert process.returncode == 0, process.stderr
    return folder / "run", process


def test_two_processes_have_the_losses_of_one_and_one_of_them_prints(alone, pair):
    workdir, process = pair
    got = losses(workdir)
    np.testing.assert_allclose([got[step] for step in range(1, 6)], [alone[step] for step in range(1, 6)], rtol=1e-5)
    # Rows of tables may repeat, and every process prints Gloo's lines.
    lines = [line for line in process.stdout.splitlines() if line and not line.startswith(("  ", "[Gloo]"))]
    assert len(set(lines)) == len(lines), "a line was printed twice"
    assert any("devices: 2 x cpu" in line and "2 host(s)" in line for line in lines)
    rows = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5]
    for index in range(2):
        log = (workdir / "logs" / f"process-{index}.log").read_text()
        assert f"\nprocess {index} of 2\n" in log and log.count("\nstep ") == 5 + 1, "with the line of compilation"


def test_one_process_resumes_the_run_of_two(alone, pair, tmp_path):
    subprocess.run(["cp", "-r", pair[0], tmp_path / "run"], check=True)
    process = run(train_command(tmp_path / "run", "train.steps=8"))
    assert process.returncode == 0 and "from step 5" in process.stdout, process.stderr
    got = losses(tmp_path / "run")
    np.testing.assert_allclose([got[step] for step in range(1, 9)], [alone[step] for step in range(1, 9)], rtol=1e-5)


def test_tensor_parallelism_over_hosts_and_a_damaged_checkpoint(alone, pair, tmp_path):
    """Both processes need all rows, and both skip the newest checkpoint, in which one file is truncated."""
    subprocess.run(["cp", "-r", pair[0], tmp_path / "run"], check=True)
    newest = tmp_path / "run" / "checkpoints" / "5"
    path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    arguments = train_command(tmp_path / "run", "train.steps=6", "mesh={'data': 1, 'tensor': 2}")[2:]
    process = together(*arguments)
    assert process.returncode == 0 and "from step 4" in process.stdout, process.stderr
    assert process.stderr.count("is damaged") == 1, "only one host reports it"
    got = losses(tmp_path / "run")
    np.testing.assert_allclose([got[step] for step in range(1, 7)], [alone[step] for step in range(1, 7)], rtol=1e-5)


def test_evaluation_is_shared_and_its_results_are_the_same(pair, tmp_path):
    """13 images, one of them unreadable: the hosts have shares and batches of different sizes."""
    rng = np.random.default_rng(0)
    captions = ["file,title"]
    for i in range(13):
        folder = tmp_path / "images" / ("cat", "dog", "owl")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
        captions.append(f"{folder.name}/{i}.png,{folder.name} number {i}")
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"no image")
    (tmp_path / "images" / "pairs.csv").write_text("\n".join(captions))
    tasks = [
        f"zeroshot(source='{tmp_path}/images', templates=('a {{}}.',))",
        f"retrieval(source='{tmp_path}/images/pairs.csv', image='file', text='title')",
        f"knn('{tmp_path}/images', '{tmp_path}/images', test_split='train', k=1, features='before_projection')",
    ]
    arguments = [f"--checkpoint={pair[0]}", *(f"--task={task}" for task in tasks)]
    results = []
    for name, alone in (("one", [sys.executable, "-m", "clip_jax.evaluate"]), ("two", None)):
        rest = [*arguments, f"--json={tmp_path}/{name}.json"]
        process = run([*alone, *rest]) if alone else together("clip_jax.evaluate", *rest)
        assert process.returncode == 0, process.stderr
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert process.stdout.count("zeroshot/top1") == 1
    assert results[0]["zeroshot/images"] == results[0]["knn/images"] == 12 and results[0]["zeroshot/skipped"] == 1
    assert results[0]["knn/top1"] == 1.0  # each image is its own nearest neighbour
    assert results[1] == pytest.approx(results[0], abs=1e-6)


def test_hosts_must_share_a_folder(tmp_path):
    """The relative --workdir is another folder on process 1, whose working directory differs."""
    code = f"""
import os, sys
process = [int(a[-1]) for a in sys.argv if a.startswith("--process=")][0]
os.makedirs(f"{tmp_path}/{{process}}/run")
os.chdir(f"{tmp_path}/{{process}}")
from clip_jax.runtime import command, faults
from clip_jax.runtime import hosts
def work():
    import argparse
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    hosts.start(hosts.from_arguments(parser.parse_args()))
    hosts.check_shared("run")
sys.exit(command.run(work))
"""
    (tmp_path / "unshared.py").write_text(code)
    process = together("unshared", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])})
    assert process.returncode == 2, process.stderr
    assert "run is not one folder for all hosts (process 1 sees another one)" in process.stderr


def test_the_launcher_refuses_wrong_arguments(capsys):
    for arguments in (["--processes=0", "clip_jax.train"], ["--processes=2"], ["clip_jax.train"]):
        assert hosts.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
