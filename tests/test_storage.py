"""Work folders in buckets of emulators and on a simulated mount of one: runs, kills, failures, the evaluator."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from conftest import COMPILE_FAST, REPO
from helpers import events, run, tiny_config, train_command
from storage_emulators import emulator

import clip_jax
from clip_jax import compare, evaluate, inference, run_folder, train
from clip_jax.errors import StorageError, UserError
from clip_jax.evaluation.results import EvalResult
from clip_jax.interop import export
from clip_jax.runtime import command, compile_cache, hosts, lock, storage
from clip_jax.training import checkpoint


# Clients keep the address of an emulator as long as the process lives.
@pytest.fixture(scope="session")
def gs_emulator():
    with emulator("gs") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3_emulator():
    with emulator("s3") as bucket:
        yield bucket


@pytest.fixture
def buckets(request, monkeypatch):
    """Function of "gs" or "s3" that returns the `Bucket` and sets the variables of its clients."""
    asked = []

    def get(kind):
        asked.append(request.getfixturevalue(f"{kind}_emulator"))
        for name, value in asked[-1].env.items():
            monkeypatch.setenv(name, value)
        return asked[-1]

    yield get
    for bucket in asked:
        bucket.fail(0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task with six images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        (folder / "cat").mkdir(exist_ok=True)
        (folder / "dog").mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(
            folder / ("cat", "dog")[i % 2] / f"{i}.png"
        )
    return f"zeroshot(source='{folder}', templates=('a {{}}.',))"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("finished")
    train.train(tiny_config("checkpoint.keep=3"), workdir, log=lambda line: None)
    return workdir


def rows(workdir):
    return [json.loads(line) for line in storage.read_log(workdir / "metrics.jsonl").splitlines()]


@pytest.mark.parametrize("kind", ["gs", "s3", "mount"])
def test_a_run_is_killed_while_it_saves_and_resumes(kind, buckets, task, tmp_path):
    """The save of step 4 never ends, and kill -9 ends the run. It resumes and repeats steps 3 and 4 bit-identically."""
    if kind == "mount":
        bucket, workdir = None, tmp_path / "run"
        env = {"PYTHONPATH": os.pathsep.join([str(REPO / "tests" / "flat_mount"), str(REPO)])}
        hangs = {"FLAT_MOUNT_HANGS": "checkpoints/4/commit_success.txt"}
    else:
        bucket, env, hangs = buckets(kind), {}, {}
        bucket.fail(-1, name="checkpoints/4/state")
        workdir = storage.path(f"{bucket.url}/run")
    process = subprocess.Popen(
        train_command(workdir, "train.steps=6", "log.tensorboard=true"),
        cwd=REPO,
        env={**os.environ, "XLA_FLAGS": COMPILE_FAST, "PYTHONUNBUFFERED": "1", **env, **hangs},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("step 5/6"):
            break
    begun = workdir / "checkpoints" / "4" / ("state/commit_success.txt" if kind == "mount" else "")
    while process.poll() is None and not begun.exists():
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9, "".join(output)
    assert (workdir / "checkpoints" / "4").is_dir() and checkpoint.find(workdir).name == "2"
    if bucket:
        bucket.fail(3, name="checkpoints/4/state")  # the service fails three times and works then
    tasks = [f'eval.tasks=("{task}",)', "eval.report=true"]
    again = run(train_command(workdir, "train.steps=6", "log.tensorboard=true", *tasks), env=env)
    assert again.returncode == 0 and "from step 2" in again.stdout, again.stderr
    assert re.search(r"step compiled in \d+\.\d s, found in the compilation cache: ", again.stdout)
    losses, evaluated = {}, {}
    for row in rows(workdir):
        if "loss" in row:
            losses.setdefault(row["step"], []).append(row["loss"])
        evaluated |= row
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    for step in (3, 4):
        assert len(losses[step]) == 2 and losses[step][0] == losses[step][1]
    assert checkpoint.committed(workdir / "checkpoints") == [4, 6]
    assert {("loss", step) for step in range(1, 7)} <= events(workdir / "tensorboard")
    assert "zeroshot" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    assert clip_jax.load(str(workdir)).config.train.steps == 6
    arguments = [f"--checkpoint={workdir}", f"--task={task}", f"--json={workdir}/eval.json", "--report"]
    assert evaluate.main(arguments) == 0
    metrics = json.loads((workdir / "eval.json").read_text())
    assert metrics["zeroshot/images"] == 6
    assert metrics == pytest.approx({name: evaluated[name] for name in metrics}, abs=1e-6)


def test_two_processes_write_into_one_bucket(buckets, finished):
    workdir = storage.path(f"{buckets('gs').url}/pair")
    pair = [sys.executable, "-m", "clip_jax.runtime.hosts", "--processes=2"]
    process = run([*pair, *train_command(workdir, "train.steps=3")[2:]])
    assert process.returncode == 0, process.stderr
    assert checkpoint.committed(workdir / "checkpoints") == [2, 3]
    got, expected = ([row["loss"] for row in rows(folder)[:3]] for folder in (workdir, finished))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def no_delay(monkeypatch):
    """Lets gcsfs try again at once."""
    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "random", types.SimpleNamespace(random=lambda: -100))


@pytest.mark.parametrize(
    "workdir, message",
    [
        ("gs://missing/run", "--workdir=gs://missing/run cannot be written: the bucket does not exist"),
        ("s3://missing/run", "--workdir=s3://missing/run cannot be written: the bucket does not exist"),
        ("gs://bucket/object", "is an object, not a folder"),
        ("s3://bucket/object", "is an object, not a folder"),
        ("gs:///run", "names no bucket"),
        (
            "http://bucket/run",
            "--workdir=http://bucket/run: http:// is unknown; allowed are a folder, gs://BUCKET/NAME and s3://",
        ),
    ],
)
def test_wrong_work_folders_are_one_line(buckets, workdir, message, capsys):
    if workdir.endswith("object"):
        storage.write(f"{buckets(workdir[:2]).url}/object", "text")
    elif workdir[:2] in ("gs", "s3"):
        buckets(workdir[:2])
    assert train.main(["--config=configs/clip.py:emoji", f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_read_only_bucket_and_wrong_credentials(buckets, kind):
    bucket = buckets(kind)
    bucket.fail(-1, 403, name=".write_test")
    with pytest.raises(UserError, match="run cannot be written: permission denied"):
        storage.prepare(f"{bucket.url}/run")
    bucket.fail(-1, 401 if kind == "gs" else 403)
    with pytest.raises(UserError, match="there are no valid credentials" if kind == "gs" else "permission denied"):
        storage.prepare(f"{bucket.url}/run")


def test_the_region_of_s3(buckets, monkeypatch, tmp_path):
    workdir = f"{buckets('s3').url}/run"
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    with pytest.raises(UserError, match="the bucket is in the region eu-west-1, AWS_REGION is us-east-2"):
        storage.prepare(workdir)
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no region is configured: set AWS_REGION"):
        storage.prepare(workdir)


def test_s3_without_credentials(buckets, tmp_path):
    buckets("s3")
    env = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_EC2_METADATA_DISABLED": "true"}
    code = "import os, sys; del os.environ['AWS_ACCESS_KEY_ID']; from clip_jax import train; sys.exit(train.main())"
    process = run([sys.executable, "-c", code, "--config=configs/clip.py:emoji", "--workdir=s3://bucket/run"], env=env)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert "there are no valid credentials" in process.stderr


def test_a_service_that_fails(buckets, monkeypatch, capsys):
    bucket = buckets("gs")
    no_delay(monkeypatch)
    bucket.fail(3)
    assert str(storage.prepare(f"{bucket.url}/run")) == "gs://bucket/run"
    bucket.fail(-1)
    assert train.main(["--config=configs/clip.py:emoji", "--workdir=gs://bucket/run"]) == 44
    error = capsys.readouterr().err
    assert "gs://bucket/run cannot be written" in error and "503" in error and error.count("\n") == 1
    with pytest.raises(StorageError, match="gs://bucket/run"):
        checkpoint.find("gs://bucket/run")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is not installed: pip install 'clip-jax-pretraining\[gcs\]'"):
        storage.path("gs://bucket/run")


def test_local_folders_import_nothing_of_buckets():
    code = "import sys, clip_jax.train; print({'fsspec', 'etils', 'gcsfs', 's3fs', 'tensorstore'} & sys.modules.keys())"
    assert run([sys.executable, "-c", code]).stdout == "set()\n"


def test_another_version_of_orbax_is_refused_for_s3(monkeypatch):
    monkeypatch.setattr(ocp, "__version__", "0.99.1")
    storage.prepare_orbax("gs://bucket/run")
    with pytest.raises(UserError, match=r"s3:// need orbax-checkpoint 0\.12\.x; 0\.99\.1 is installed"):
        storage.prepare_orbax("s3://bucket/run")


def test_a_failing_save_names_the_last_good_checkpoint(monkeypatch, capsys, tmp_path):
    save = ocp.CheckpointManager.save

    def failing(self, step, **kwargs):
        if step == 4:
            self.wait_until_finished()
            raise ValueError("ABORTED: All 32 retry attempts failed: UNAVAILABLE [http_response_code='503']")
        return save(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", failing)
    assert train.main(train_command(tmp_path, "mesh.data=-1")[3:]) == 44
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: could not save checkpoint 4 (ABORTED") and line.endswith(
        f"the last good checkpoint is {tmp_path}/checkpoints/2; the same command tries again"
    )
    # Checkpoints of Orbax before 0.12.8 have no such file, and still count.
    for file in (tmp_path / "checkpoints").rglob("commit_success.txt"):
        file.unlink()
    assert checkpoint.find(tmp_path).name == "2"
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    lines = []
    train.train(tiny_config("train.steps=3"), tmp_path, log=lines.append)
    assert any("from step 2" in line for line in lines) and checkpoint.find(tmp_path, "2").name == "2"


def test_a_mount_that_fails(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", fail)
    assert train.main(["--config=configs/clip.py:emoji", f"--workdir={tmp_path}"]) == 44
    assert command.run(fail) == 44
    assert capsys.readouterr().err == (
        f"error: --workdir={tmp_path} cannot be written: Input/output error; the same command tries again\n"
        "error: [Errno 5] Input/output error; the same command tries again\n"
    )


def test_a_log_on_a_mount_is_closed_when_it_is_flushed(tmp_path):
    log = storage.Log(tmp_path / "log")
    first = log.file
    log.write("1")
    log.flush()
    log.write("2")
    log.close()
    assert first.closed and storage.read_log(tmp_path / "log") == "1\n2\n"


def test_a_torn_line_of_a_log_costs_no_other_line(tmp_path):
    place = tmp_path / "log"
    place.write_text('{"step": 1}\n{"step": 2, "lo')
    assert storage.read_rows(place) == [{"step": 1}]
    log = storage.Log(place)
    log.write('{"step": 3}')
    log.close()
    assert storage.read_rows(place) == [{"step": 1}, {"step": 3}]


def test_a_log_in_a_bucket_has_parts(buckets, monkeypatch):
    place = storage.path(f"{buckets('gs').url}/log")
    monkeypatch.setattr(storage, "PART_CHARACTERS", 8)
    assert storage.read_log(place) == ""
    for lines in (["1", "2"], ["333333333", "4"], ["5"]):
        log = storage.Log(place)
        for line in lines:
            log.write(line)
            log.flush()
        log.close()
    assert storage.read_log(place) == "1\n2\n333333333\n4\n5\n"
    assert sorted(part.name for part in place.iterdir()) == ["000001", "000002", "000003", "000004"]


def test_files_of_a_local_library_arrive_in_a_bucket(buckets):
    place = f"{buckets('gs').url}/export"
    assert export.check_out(place) == storage.path(place)
    with storage.local_folder(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
    assert list(storage.files(storage.path(place))) == ["sub/a.txt"] and storage.read(f"{place}/sub/a.txt") == "a"
    with pytest.raises(UserError, match="--out=gs://bucket/export already exists and is not an empty folder"):
        export.check_out(place)


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_compiled_steps_in_a_bucket(buckets, kind):
    place = compile_cache.prepare("workdir", storage.path(f"{buckets(kind).url}/cached"), {})

    def compile_double():
        return jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((3,), np.float32)).compile()

    assert [compile_cache.run(compile_double, place)[1] for _ in range(2)] == [False, True]
    assert len(list(storage.files(place))) == 1


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(buckets, finished):
    folder = storage.path(f"{buckets('gs').url}/damaged") / "checkpoints"
    for step in ("4", "6"):
        storage.copy(finished / "checkpoints" / step, folder / step, last=checkpoint.COMMIT)
    storage.write(folder / "6" / "meta" / "metadata", "{")
    lines = []
    train.train(tiny_config("checkpoint.keep=3"), folder.parent, lines.append)
    assert any("from step 4" in line for line in lines) and checkpoint.committed(folder) == [4, 6]
    assert checkpoint.read_meta(folder / "6")["step"] == 6
    assert [path.name.split("-")[0] for path in folder.iterdir() if "damaged" in path.name] == ["6.damaged"]


@pytest.mark.parametrize("kind", ["folder", "gs"])
def test_the_evaluator_follows_a_run(kind, buckets, finished, task, monkeypatch, tmp_path, capsys):
    """The checkpoints appear while the evaluator waits, and the run deletes the first while it is evaluated."""
    workdir = storage.path(f"{buckets('gs').url}/followed") if kind == "gs" else tmp_path / "run"
    coming, scores = [2, 4, 6], {4: 0.9, 6: 0.3}
    waits = []

    def wait(seconds):
        waits.append(seconds)
        step = coming.pop(0)
        storage.copy(finished / "checkpoints" / str(step), workdir / "checkpoints" / str(step), last=checkpoint.COMMIT)

    load = inference.load

    def load_late(folder, *args, **kwargs):
        if str(folder).endswith("/2"):
            storage.remove(folder)
        return load(folder, *args, **kwargs)

    def score(model, tasks, log):
        return EvalResult({"zeroshot/top1": scores[max(checkpoint.committed(workdir / "checkpoints"))]})

    monkeypatch.setattr(evaluate.time, "sleep", wait)
    monkeypatch.setattr(inference, "load", load_late)
    monkeypatch.setattr(evaluate, "run", score)
    arguments = [f"--checkpoint={workdir}", f"--task={task}", "--follow", "--best=zeroshot/top1"]
    assert evaluate.main(arguments) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "step 2: the run has deleted this checkpoint" in output and output.endswith("is complete\n")
    assert len(waits) == 3
    found = {p.name: json.loads(p.read_text()) for p in (workdir / "evaluations").iterdir()}
    assert found == {f"{step}.json": {"zeroshot/top1": value} for step, value in scores.items()}
    assert checkpoint.committed(workdir / "best" / "checkpoints") == [4]
    assert clip_jax.load(str(workdir / "best")).config.train.steps == 6
    monkeypatch.setattr(evaluate, "run", None)  # nothing is evaluated twice
    assert evaluate.main(arguments) == 0
    # The run begins to delete a checkpoint that would be the best: the old best stays.
    monkeypatch.setattr(storage, "copy", lambda source, copy, last: storage.write(copy / last, ""))
    evaluate._keep_best(workdir, 6, {"zeroshot/top1": 1.0}, "zeroshot/top1")
    assert checkpoint.committed(workdir / "best" / "checkpoints") == [4]


def test_the_evaluator_leaves_out_a_best_metric_of_other_tasks(finished, task, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    given = tiny_config("checkpoint.best=emoji_val/unseen_concept_unseen_vendor/top1")
    monkeypatch.setattr(inference, "load", lambda *_, **__: types.SimpleNamespace(config=given))
    monkeypatch.setattr(evaluate, "run", lambda *_: EvalResult({"zeroshot/top1": 0.5}))
    assert evaluate.main([f"--checkpoint={tmp_path / 'run'}", f"--task={task}", "--follow"]) == 0
    assert (tmp_path / "run" / "evaluations" / "6.json").exists() and not (tmp_path / "run" / "best").exists()


def test_wrong_flags_of_the_evaluator(finished, task, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "run", None)  # nothing is evaluated before the flags are checked
    base = [f"--checkpoint={finished}", f"--task={task}"]
    for flags, message in (
        (["--best=x"], "--best needs --follow"),
        (["--follow", "--json=x"], "--follow takes no --which, --report and --json"),
        ([f"--checkpoint={finished}/checkpoints", "--follow"], "checkpoints: --follow takes the work folder, which"),
        (["--follow", "--best=zeroshot/top11"], "--best: no metric 'zeroshot/top11' (did you mean 'zeroshot/top1'?)"),
    ):
        assert evaluate.main([*base, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (finished / "best").exists()
    for part in ("meta", "state"):
        (tmp_path / "checkpoints" / "9" / part).mkdir(parents=True)
    with pytest.raises(UserError, match="is incomplete: it has no commit_success.txt"):
        checkpoint.find(tmp_path / "checkpoints" / "9")


def test_all_hosts_have_one_bucket(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda value: [value, "gs://bucket/other"])
    with pytest.raises(UserError, match="different work folders: gs://bucket/other, gs://bucket/run"):
        hosts.check_shared("gs://bucket/run")


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_the_lock_of_a_work_folder_in_a_bucket(kind, buckets, monkeypatch):
    """One of two runs creates the lock. The other one is refused while the first lives. At the end the lock is gone."""
    folder = storage.path(f"{buckets(kind).url}/locked")
    assert storage.create(folder / "a", "one") and not storage.create(folder / "a", "two")
    if kind == "s3":  # the emulator of gs:// does not read the name in the body of this request
        with monkeypatch.context() as patch:  # another one looked at the same time
            patch.setattr(type(folder), "exists", lambda self: False)
            assert not storage.create(folder / "a", "three")
    assert storage.read(folder / "a") == "one"
    with lock.hold(folder, number=0):
        found = lock.read(folder)
        assert found["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"{folder} is in use by a run on .*, process {os.getpid()}, since"):
            lock.Lock(folder).acquire(lambda line: None)
    assert lock.read(folder) is None
    storage.write(folder / lock.FILE, json.dumps(found | {"started": "1"}))
    lines = []
    with lock.hold(folder, lines.append, number=0):
        assert lock.read(folder)["token"] != found["token"] and "taken over" in lines[0]


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_runs_in_a_bucket_are_compared_and_forked(kind, buckets, finished, tmp_path, capsys):
    folder = storage.path(f"{buckets(kind).url}/compared")
    storage.copy(finished / "checkpoints" / "6", folder / "checkpoints" / "6", last=checkpoint.COMMIT)
    for name in ("config.json", "config_history.jsonl", "run.json"):
        storage.write(folder / name, (finished / name).read_bytes())
    storage.write(folder / "metrics.jsonl" / "000001", (finished / "metrics.jsonl").read_bytes())
    storage.write(folder / "evaluations" / "6.json", '{"pets/top1": 0.25}')
    assert compare.main([str(finished), str(folder), f"--html={tmp_path}/page.html"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"examples +96 +96\n", out) and re.search(r"pets/top1 +– +25.00", out)
    config, _, _, fork = train.parse_args(
        [f"--fork-from={folder}", f"--workdir={tmp_path}/fork", "--config.train.steps=9"]
    )
    assert (fork.step, config.train.steps) == (6, 9)
    config, _, _, method = train.make_parts(config)
    run_folder.begin(config, method, storage.prepare(tmp_path / "fork"), fork, lambda line: None)
    assert checkpoint.find(tmp_path / "fork").name == "6"
    assert checkpoint.read_meta(tmp_path / "fork" / "checkpoints" / "6")["config"]["train"]["steps"] == 9
