"""Whole runs: output and files, resuming, kill -9, wrong input, a full disk."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import COMPILE_FAST, REPO
from helpers import interrupted, losses, run, tiny_config, train_command

from clip_jax import train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluation.results import EvalResult
from clip_jax.runtime import goodput, storage
from clip_jax.training import checkpoint


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """`(work folder, finished process)` of an uninterrupted run of 8 steps, as a user starts it."""
    workdir = tmp_path_factory.mktemp("finished")
    process = run(train_command(workdir, "train.steps=8", "log.tensorboard=true"))
    assert process.returncode == 0, process.stderr
    return workdir, process


def test_what_a_run_prints_and_writes(finished):
    workdir, process = finished
    for text in (
        "devices: 1 x cpu",
        "mesh {'data': 1",
        "parameters:",
        "logit_scale",
        "GFLOP per example",
        "MiB per device",
        "8 steps of 16: 128 examples",
    ):
        assert text in process.stdout
    line = next(line for line in process.stdout.splitlines() if line.startswith("step 8/8"))
    for text in ("loss", "acc", "scale", "grad", "params", "lr", "img/s", "data wait", "ETA"):
        assert text in line
    *rows, seconds = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) and seconds["seconds/compiling"] > 0
    assert f"time: {goodput.describe({part: seconds[f'seconds/{part}'] for part in goodput.PARTS})}" in process.stdout
    assert {
        "loss",
        "logit_scale",
        "grad_norm",
        "param_norm",
        "lr",
        "images_per_s",
        "data_wait_share",
        "skipped",
        "eta_s",
    } <= rows[-1].keys()
    assert any((workdir / "tensorboard").glob("events*")) and (workdir / "config.json").is_file()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["6", "8"]


def test_a_complete_run_trains_no_further(finished):
    workdir, _ = finished
    before = losses(workdir)
    assert (
        train.train(tiny_config("train.steps=8", "mesh.data=1", "mesh.fsdp=-1"), workdir, log=lambda line: None) == {}
    )
    assert losses(workdir) == before


def test_kill_and_resume_is_bit_identical(finished, tmp_path):
    """After kill -9 and the same command again, the losses are those of a run that was not killed."""
    command = train_command(tmp_path, "train.steps=8", "log.tensorboard=true")
    process = subprocess.Popen(
        command, cwd=REPO, env=run_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("step 5/8"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    again = run(command)
    assert again.returncode == 0, again.stderr
    first = int(again.stdout.split("from step ")[1].split()[0])
    assert 0 <= first < 8, "the killed run had not finished"
    expected, got = losses(finished[0]), losses(tmp_path)
    assert {step: got[step] for step in expected} == expected


def test_the_outcomes_of_the_last_evaluation_are_kept_before_its_metrics(tmp_path, monkeypatch):
    """A run with metrics of its last step counts as complete."""
    monkeypatch.setattr("clip_jax.inference.Model", lambda *_: types.SimpleNamespace())
    monkeypatch.setattr("clip_jax.evaluate.run", lambda *_: EvalResult({"a/top1": 0.5}))
    done = []
    monkeypatch.setattr("clip_jax.evaluate.keep_outcomes", lambda *_: done.append("outcomes"))
    writer = types.SimpleNamespace(write=lambda *_: done.append("metrics"))
    run = train.Run(tiny_config(), *[None] * 4, writer, *[None] * 2, tmp_path, None, print)
    state = types.SimpleNamespace(params=None, extra=None, step=3)
    run.evaluate(state, ())
    run.evaluate(state, (), is_last=True)
    assert done == ["metrics", "outcomes", "metrics"]


def run_env():
    return {**os.environ, "XLA_FLAGS": COMPILE_FAST, "PYTHONUNBUFFERED": "1"}


def test_resume_on_another_mesh_reads_the_same_batches(finished, tmp_path):
    config = tiny_config("train.steps=8", "mesh={'data': 2, 'fsdp': 2, 'tensor': 2}")

    def stop_at_5(line):
        if line.startswith("step 5/8"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path, stop_at_5)
    time.sleep(1)
    config = tiny_config("train.steps=8", "mesh={'data': 4, 'fsdp': 1, 'tensor': 2}")
    lines = []
    train.train(config, tmp_path, lines.append)
    assert not any("another order" in line for line in lines)
    orders = [checkpoint.read_meta(folder / "checkpoints" / "8")["order"] for folder in (finished[0], tmp_path)]
    assert orders[0] and orders[0] == orders[1]
    expected, got = losses(finished[0]), losses(tmp_path)
    np.testing.assert_allclose([got[s] for s in sorted(expected)], [expected[s] for s in sorted(expected)], rtol=1e-3)


def test_a_run_that_reads_its_records_in_another_order_says_so():
    lines, run = [], types.SimpleNamespace(order=None)
    for digest, step in (("a", 1), ("a", 5), ("b", 9)):
        checkpoint.Checkpointer.begin_order(run, digest, step, lines.append)
    (line,) = lines
    assert line.startswith("warning: from step 9 on, the records come in another order than before")
    assert run.order == "b"


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.image.width=64", "model.image.width was 32, is now 64"),
        ("tokenizer=clip_bpe", "tokenizer was 'sentencepiece', is now 'clip_bpe'"),
        ("optim.name=adamw", "optim.name was 'sgd', is now 'adamw'"),
        ("data.batch_size=32", "data.batch_size was 16, is now 32"),
        (
            "optim.grad_clip_norm=0",
            r"Length mismatch .*optim.grad_clip_norm was 1.0, is now 0.0; .* Use another --workdir",
        ),
    ],
)
def test_another_model_or_tokenizer_is_refused(finished, override, message):
    with pytest.raises(UserError, match=message):
        train.train(tiny_config(override), finished[0], lambda line: None)
    assert checkpoint.find(finished[0]).name == "8", "the checkpoints are still there"


def test_a_checkpoint_without_an_array_is_refused(finished):
    other = {"params": {"img": {"more": jax.ShapeDtypeStruct((2,), np.float32)}}}
    with pytest.raises(checkpoint.Damaged, match="does not fit the configuration: it has no array params/img/more"):
        checkpoint.restore_arrays(finished[0] / "checkpoints" / "8", other)


def test_another_tokenizer_under_the_same_name_is_refused(finished, monkeypatch):
    from clip_jax.data import tokenizers

    monkeypatch.setattr(tokenizers.Tokenizer, "fingerprint", lambda self: "other")
    with pytest.raises(UserError, match="the tokenizer .sentencepiece. differ from"):
        train.train(tiny_config(), finished[0], lambda line: None)


def damage(folder):
    """Cuts the largest file of a checkpoint in half."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_skipped(tmp_path, caplog):
    config = tiny_config("train.steps=4")
    train.train(config, tmp_path, lambda line: None)
    expected = losses(tmp_path)
    damage(tmp_path / "checkpoints" / "4")
    lines = []
    train.train(config, tmp_path, lines.append)
    assert "is damaged" in caplog.text and any("from step 2" in line for line in lines)
    assert losses(tmp_path) == expected
    # The damaged one is out of the way: the run has saved step 4 again.
    assert [path.name.split("-")[0] for path in sorted((tmp_path / "checkpoints").glob("4*"))] == ["4", "4.damaged"]
    caplog.clear()
    train.train(config, tmp_path, lines.append)
    assert "is damaged" not in caplog.text and any("is complete: 4 of 4 steps" in line for line in lines)
    for step in (2, 4):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(UserError, match="none of the checkpoints .* can be read"):
        train.train(config, tmp_path, lines.append)


def test_a_half_written_checkpoint_is_not_picked_up(tmp_path):
    config = tiny_config("train.steps=2")
    train.train(config, tmp_path, lambda line: None)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
    assert checkpoint.find(tmp_path).name == "2"
    lines = []
    train.train(tiny_config("train.steps=3"), tmp_path, lines.append)
    assert any("from step 2" in line for line in lines)


@pytest.mark.parametrize("divides", [False, True])
def test_only_large_replicated_arrays_are_divided_among_devices(tmp_path, caplog, monkeypatch, mesh8, divides):
    """Each part of an array is a program, which a save waits for."""
    if divides:
        monkeypatch.setattr(checkpoint, "_MIN_SHARED", 0)
    config, x = tiny_config(), np.arange(48, dtype=np.float32).reshape(16, 3)
    whole, rows = (jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("data",)))
    state = {"x": jax.device_put(x, whole)}
    with checkpoint.Checkpointer(tmp_path, config, make_tokenizer(config.tokenizer)) as checkpointer:
        with jax.log_compiles():
            checkpointer.save(1, state, {})
        checkpointer.wait()
    assert ("Compiling jit(slice)" in caplog.text) == divides
    target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)}
    found = checkpoint.restore_arrays(tmp_path / "checkpoints" / "1", target)["x"]
    np.testing.assert_array_equal(found, x)
    assert found.sharding == rows


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    from clip_jax import evaluate
    from clip_jax.evaluation.results import EvalResult

    scores = iter([0.3, 0.9, 0.1, 0.2, 0.25])
    monkeypatch.setattr(evaluate, "run", lambda model, tasks, log: EvalResult({"emoji/skipped": next(scores)}))
    options = ["checkpoint.best=emoji/skipped", "checkpoint.keep=1", "checkpoint.steps=0"]
    options += ["eval.steps=1", "eval.train_tasks=('emoji',)"]
    for steps in (3, 5):  # a later start keeps the best of an earlier one
        train.train(tiny_config(f"train.steps={steps}", *options), tmp_path, lambda line: None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "5"]
    assert checkpoint.find(tmp_path, "best").name == "2" and checkpoint.find(tmp_path).name == "5"


def test_a_loss_that_stays_nan_stops_the_run(tmp_path):
    config = tiny_config(
        "train.steps=30", "optim.lr=1e30", "optim.weight_decay=0", "train.max_bad_steps=3", "checkpoint.steps=1"
    )
    with pytest.raises(UserError, match=r"not finite in steps \d+ to \d+; their updates were skipped"):
        train.train(config, tmp_path, lambda line: None)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.batch_size=18"], "data.batch_size=18 is not divisible by the 8 devices"),
        (["mesh.data=3"], "does not fit 8 device"),
        (["model.image.size=20"], "model.image.size=20 is not divisible by the patch size 8"),
        (["data.source=/nowhere/x.tar"], "/nowhere/x.tar"),
        (["method=clipp"], "method='clipp' is neither one of"),
        (["tokenizer=bpe"], "bpe"),
        (["data.augment=rcc(0.5, 1.0)"], "did you mean 'rrc'"),
        (["data.templates=({nme})"], "nme"),
        (["eval.tasks=zeroshott(source='x')"], "unknown task 'zeroshott' .did you mean 'zeroshot'"),
        (["eval.tasks=zeroshot(source='/nowhere/pets')"], "/nowhere/pets: no such file or folder"),
        (["eval.tasks=retrieval(source='scenes', split='tset')"], "scenes: no split 'tset' .did you mean 'test'"),
        (["eval.tasks=zeroshot(source='emoji')"], "emoji: has no split 'test'; name one of its splits: train, "),
        (["eval.tasks=emoji,emoji()"], "eval.tasks: the metrics of 'emoji' and 'emoji.*' have the same names"),
        (["eval.tasks=emoji", "checkpoint.best=emoji/unseen_concept/top1"], "computes this metric .did you mean"),
        (["eval.train_tasks=emoji", "eval.steps=0", "checkpoint.best=emoji/skipped"], "eval.steps=0, computes"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        train.train(tiny_config(*overrides), tmp_path, lambda line: None)
    assert "\n" not in str(error.value) and not (tmp_path / "metrics.jsonl").exists()


def test_the_command_ends_with_one_line_and_status_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    base = ["--config=configs/clip.py"]
    for arguments, message in (
        ([*base, f"--workdir={file}/run"], "cannot be written"),
        ([*base, "--workdir=x", "--config.optim.lrr=1"], "did you mean 'optim.lr'"),
        ([*base, "--workdir=x", "--lr=1"], "unknown argument '--lr=1'"),
        ([*base, "--workdir=x", "--config.optim.lr"], "has no value"),
    ):
        assert train.main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("error: ")


def test_a_full_disk_stops_with_one_line_and_keeps_the_earlier_checkpoint(finished, tmp_path):
    """A limit on the size of files simulates the full disk: writing beyond it fails in the same places."""
    workdir = interrupted(finished[0], tmp_path / "run", 6)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (380_000, 380_000))

    second = run(
        train_command(workdir, "train.steps=8"), preexec_fn=limit, env={"JAX_ENABLE_COMPILATION_CACHE": "false"}
    )
    assert second.returncode == 2, second.stderr
    error = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(error) == 1
        and "could not save checkpoint" in error[0]
        and "last good checkpoint is" in error[0]
        and "/checkpoints/6" in error[0]
    ), second.stderr
    assert checkpoint.find(workdir).name == "6"
    third = run(train_command(workdir, "train.steps=8"))
    assert third.returncode == 0 and "from step 6" in third.stdout


def test_commands_start_without_importing_jax():
    """--help and errors appear at once, because importing JAX takes seconds."""
    code = "import sys, clip_jax.train, clip_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_eight_devices_are_simulated():
    assert jax.device_count() == 8


def test_bad_records_are_counted_in_the_progress_line(tmp_path):
    """One of eight images is truncated. The run continues without it and reports it; with a stricter limit it stops."""
    rng = np.random.default_rng(0)
    for i in range(8):
        PIL.Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(8)))
    data = [f"data.source={tmp_path}/pairs.csv", "data.templates=()", "data.augment=rrc(0.5, 1.0)"]
    lines = []
    train.train(tiny_config("train.steps=2", "data.max_bad_share=0.5", *data), tmp_path / "run", lines.append)
    assert any("| skipped " in line for line in lines if line.startswith("step 2/2"))
    with pytest.raises(UserError, match="records are unusable .*more than max_bad_share=0.01"):
        train.train(tiny_config("train.steps=40", "data.max_bad_share=0.01", *data), tmp_path / "strict", lines.append)


def test_a_failing_evaluation_costs_no_training(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\nmissing.png,a cat\n")
    tasks = f"eval.tasks=(\"retrieval(source='{tmp_path}/pairs.csv')\",)"
    with pytest.raises(UserError, match="no usable image among 1 records"):
        train.train(tiny_config("train.steps=3", "checkpoint.steps=0", tasks), tmp_path / "run", lambda line: None)
    assert checkpoint.find(tmp_path / "run").name == "3"


def test_the_home_folder_in_a_work_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.prepare("~/runs/x") == tmp_path / "runs" / "x" and (tmp_path / "runs" / "x").is_dir()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_command_prints_no_warning_of_the_tpu_compiler():
    code = """
from clip_jax.runtime import command
def work():
    import jax
    assert jax.devices()[0].platform == "cpu"
raise SystemExit(command.run(work))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    process = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_machine_with_a_tpu_keeps_its_variables(monkeypatch):
    from clip_jax.runtime import command, hosts

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(hosts, "tpu_chips", lambda: ["/dev/vfio/0"])
    command.quiet_libtpu()
    assert os.environ == {}
    monkeypatch.setattr(hosts, "tpu_chips", lambda: [])
    monkeypatch.setattr(os, "environ", {"TPU_NAME": "mine"})
    command.quiet_libtpu()
    assert os.environ == {"TPU_NAME": "mine"}
    monkeypatch.setattr(os, "environ", {})
    command.quiet_libtpu()
    assert os.environ == command.QUIET_LIBTPU
