"""What a run checks before its first step: all problems at once, data, disk, memory, and slips of a newcomer."""

import math
import re

import jax
import pytest

from clip_jax import config as config_lib
from clip_jax import preflight, program, train
from clip_jax.config_checks import nearest_field, unknown_argument
from clip_jax.errors import Problems, UserError
from clip_jax.runtime import sharding

SMOKE = "configs/clip.py:smoke"
ROOM = 2**28


def test_problems_are_reported_together():
    problems = Problems()
    assert problems.check(int, "7") == 7
    problems.end()
    problems.check(train.make_parts, config_lib.load(SMOKE, ["data.batch_size=0"]))
    with pytest.raises(UserError, match="^data.batch_size=0: must be at least 1$"):
        problems.end()
    overrides = ["data=/nowhere", "tokenizer=no", "checkpoint.keep=0", "optim.b1=3", "checkpoint.best=emoji/unsen_top1"]
    overrides += ["""eval.tasks=("zeroshot(source='/no')", "retreival(source='x')", "emoji")"""]
    with pytest.raises(UserError) as caught:
        train.make_parts(config_lib.load(SMOKE, overrides))
    first, *lines = str(caught.value).splitlines()
    expected = ["checkpoint.keep=0", "optim.b1=3.0", "unknown task 'retreival'", "tokenizer 'no'", "/nowhere: no such"]
    assert first == f"{len(expected)} problems:" and len(lines) == len(expected)
    assert all(line.startswith(f"  {start}") for line, start in zip(lines, expected, strict=True))
    overrides[-1] = """eval.tasks=("zeroshot(source='/no')", "retrieval(source='/not', name='r')")"""
    overrides[-2] = "checkpoint.best=r/image_to_text_R1"
    with pytest.raises(UserError) as caught:
        train.make_parts(config_lib.load(SMOKE, overrides))
    text = str(caught.value)
    assert "zeroshot(source='/no'): /no: no such" in text and "retrieval(source='/not', name='r'): /not: no" in text
    assert "computes this metric (did you mean 'r/image_to_text_R@1'?)" in text


def test_a_published_recipe_asks_for_data():
    arguments = ["--config=configs/clip.py:b32", "--workdir=x"]
    with pytest.raises(UserError, match="clip.py:b32 is a published recipe without data: give the data: --config.data"):
        train.parse_args(arguments)
    assert train.parse_args([*arguments, "--config.data=emoji"])[0].data.source == "emoji"
    assert train.parse_args(["--config=configs/clip.py:emoji", "--workdir=x"])[0].data.source == "emoji"


def test_slips_name_the_field():
    fields = list(config_lib._flat(config_lib.base()))
    for key, field in (
        ("learning_rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("batch-size", "data.batch_size"),
        ("image_size", "model.image.size"),
        ("optim.lrr", "optim.lr"),
    ):
        assert nearest_field(key, fields) == f" (did you mean {field!r}?)"
    for argument, end in (
        ("--lr=1e-3", ": write --config.optim.lr=1e-3"),
        ("--batch_size=64", ": write --config.data.batch_size=64"),
        ("--confg.seed=1", ": write --config.seed=1"),
        ("--epochs=3", ": write --config.train.steps=..."),
        ("stray", "; set fields of the configuration with --config.FIELD=VALUE"),
    ):
        assert unknown_argument(argument, fields) == f"unknown argument {argument!r}{end}"
    with pytest.raises(UserError) as caught:
        config_lib.parse_overrides(["--lr", "1", "--config.seed=2", "--wd=0"])
    assert str(caught.value).count("\n") == 2 and "--config.optim.lr=1" in str(caught.value)


def make(*overrides):
    config = config_lib.load("configs/clip.py:emoji", overrides)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return program.shard(program.make_program(config), mesh)[0]


def test_memory_that_lacks_names_what_would_fit(monkeypatch, tmp_path):
    parts = make("data.batch_size=4096")
    kept, (state, fixed) = preflight.kept_bytes(parts), preflight._sizes(parts)
    rows = preflight._rows(parts)
    assert preflight.kept_bytes(parts, "full") < kept / 2
    looped = make("data.batch_size=4096", "model.scan=true")
    assert preflight.kept_bytes(looped) < 0.7 * kept, "a loop over blocks stores the results of products alone"
    # Between the size of 256 examples that the compiler reported, 296 MiB, and twice as much.
    assert 0.5 < 296 * 2**20 / (kept * 256 / rows + fixed) < 1
    monkeypatch.setattr(preflight, "device_memory", lambda held=0: (state + ROOM, "this machine has free"))
    size = fixed + 0.8 * kept
    found = dict(preflight.fitting(parts, size, state + ROOM))
    count = int(re.search(r"micro_batches=(\d+)", " ".join(found))[1])
    assert math.log2(count).is_integer() and rows % count == 0
    assert all(b <= 0.9 * (state + ROOM) for b in found.values())
    assert fixed + (size - fixed) / (count // 2) > 0.9 * (state + ROOM)
    with pytest.raises(UserError, match=r"^memory: a step needs about [\d.]+ GiB, this .*micro_batches"):
        preflight.check_room(parts, tmp_path, True)
    preflight.check_step(parts, None)
    preflight.check_step(parts, state + ROOM)
    with pytest.raises(UserError, match=rf"a step needs {preflight._gib(2 * size)}, .*--config.data.batch_size=\d+"):
        preflight.check_step(parts, 2 * size)
    monkeypatch.setattr(preflight, "device_memory", lambda held=0: (state, "this machine has free"))
    with pytest.raises(UserError, match="is enough: take a smaller model"):
        preflight.check_step(parts, size)


def test_a_disk_needs_room_for_two_checkpoints(monkeypatch, tmp_path):
    parts = make()
    state, _ = preflight._sizes(parts)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("", (), {"free": 1.5 * state}))
    preflight.check_room(parts, tmp_path, False)
    with pytest.raises(UserError, match="2 checkpoints of 0.01 GiB each need 0.03 GiB of disk, 0.02 GiB are free"):
        preflight.check_room(parts, tmp_path, True)


def test_free_memory_is_that_of_the_control_group(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert preflight.free_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("500000\n")
    assert preflight.free_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000\nactive_file 20\n")
    assert preflight.free_memory(tmp_path) == 501020
    assert preflight.free_memory(tmp_path / "none") is None


def test_a_run_that_never_began_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight.faults, "several_processes", lambda: False)
    place = tmp_path / "runs" / "new"
    arguments = [f"--config={SMOKE}", "--config.data=/nowhere"]
    assert train.main([*arguments, f"--workdir={place}"]) == 2
    assert "/nowhere: no such file" in capsys.readouterr().err and not list(tmp_path.iterdir())
    place.mkdir(parents=True)
    (place / "mine").touch()
    assert train.main([*arguments, f"--workdir={place}"]) == 2 and (place / "mine").exists()
