"""Reading at addresses: ranges, retries, refusals, wildcards, the disk cache, and a run whose data fail for good."""

import contextlib
import io
import os
import pathlib
import re
import threading
import types

import fsspec
import numpy as np
import PIL.Image
import pytest
from helpers import losses, train_command
from storage_emulators import emulator
from web_server import serve_as_hub, web_server

from clip_jax import train
from clip_jax.data import clients, disk_cache, files, remote
from clip_jax.data.loader import Loader
from clip_jax.data.records import BaseSource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView
from clip_jax.errors import StorageError, UserError
from clip_jax.training import checkpoint

DATA = bytes(range(200))
TAR = "train/00000.tar"


@pytest.fixture(scope="module")
def server():
    with web_server() as web:
        yield web


@pytest.fixture
def web(server, monkeypatch):
    """The server with the object `TAR`, for the Hub too."""
    server.reset()
    server.objects.update({TAR: DATA, f"hub/{TAR}": DATA, "empty.tar": b""})
    monkeypatch.setenv(remote.SECONDS, "0.2")
    serve_as_hub(server, monkeypatch)
    monkeypatch.setattr(clients, "_systems", {})
    monkeypatch.setattr(remote, "_down", {})
    return server


@pytest.fixture(params=["http", "hf"])
def place(request, web):
    """The folder of `TAR` on the web and on the Hub, without requests so far."""
    folder = f"{web.url}" if request.param == "http" else f"hf://datasets/{web.repository}"
    assert remote.read(f"{folder}/{TAR}", 0, 1) == DATA[:1]
    web.requests.clear()
    return folder


def test_a_read_is_one_request_for_a_range(place, web):
    for start, end, wanted in ((0, 7, "bytes=0-6"), (150, 180, "bytes=150-179"), (0, None, None)):
        web.requests.clear()
        assert remote.read(f"{place}/{TAR}", start, end) == DATA[start:end]
        assert [(method, header) for method, _, header in web.requests] == [("GET", wanted)]
    web.requests.clear()
    assert remote.read(f"{place}/{TAR}", 5, 5) == remote.read(f"{place}/{TAR}", 5, 3) == b"" and not web.requests
    # Where the object ends; the server says so, and nothing is asked twice.
    assert remote.read(f"{place}/{TAR}", 190, 300) == DATA[190:] and remote.read(f"{place}/{TAR}", 200, 300) == b""
    assert remote.size(f"{place}/{TAR}") == 200 and len(web.requests) == 3
    assert remote.read(f"{place}/{TAR}", 190) == DATA[190:]


def test_what_may_pass_is_tried_again(place, web):
    for failure in (503, 500, 429, 408, "short", "few", "reset"):
        web.requests.clear()
        web.failures += [failure, failure]
        assert remote.read(f"{place}/{TAR}", 10, 60) == DATA[10:60], failure
        assert len(web.requests) == 3, failure
    web.failures += [503, "reset"]
    assert remote.size(f"{place}/{TAR}") == 200
    web.failures += ["short"]
    assert remote.read(f"{place}/{TAR}") == DATA


@pytest.mark.parametrize("failure", [503, "short", "few", "reset"])
def test_the_last_retry_ends_in_one_line(failure, place, web):
    web.failures += 20 * [failure]
    with pytest.raises(StorageError, match=rf"^{place}/{TAR} cannot be read: .*\(6 tries in 0 s\)$") as error:
        remote.read(f"{place}/{TAR}", 10, 60)
    # aiohttp sends a request again itself when a connection that was kept open turns out to be closed.
    assert len(web.requests) == remote.TRIES or failure == "reset" and len(web.requests) <= 2 * remote.TRIES
    assert "\n" not in str(error.value)


class Clock:
    """Time that passes by `sleep` alone."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_pauses_double_and_are_bounded(monkeypatch):
    clock, starts = Clock(), []
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "_down", {})
    monkeypatch.setattr(remote._jitter, "uniform", lambda low, high: 1.0)

    def work(seconds):
        starts.append(clock.now)
        clock.now += seconds
        raise ConnectionResetError

    with pytest.raises(StorageError, match=r"^gs://b/a cannot be read: ConnectionResetError \(6 tries in 60 s\)$"):
        remote._retry("gs://b/a", lambda: work(0))
    np.testing.assert_allclose(np.diff(starts), 60 * np.array([2, 4, 8, 16, 32]) / 62)
    # Others of this bucket, which wait meanwhile or start now, give up; those of another one do not.
    starts.clear()
    for path, tries in (("gs://b/c", 1), ("gs://d/c", 6)):
        with pytest.raises(StorageError, match=f"{tries} tries"):
            remote._retry(path, lambda: work(0))
    # A connection that stays silent costs its time limit each time: after two minutes the read ends.
    clock.now += 1000
    with pytest.raises(StorageError, match="4 tries"):
        remote._retry("gs://b/a", lambda: work(clients.TIMEOUT))
    remote._retry("gs://b/a", lambda: 1)
    with pytest.raises(StorageError, match="6 tries"):
        remote._retry("gs://b/a", lambda: work(0))


def test_a_connection_that_stays_silent_is_given_up(web, monkeypatch):
    monkeypatch.setattr(clients, "TIMEOUT", 0.1)
    web.failures += ["hang"]
    assert remote.read(f"{web.url}/{TAR}", 0, 3) == DATA[:3] and len(web.requests) == 2


@pytest.mark.parametrize(
    "failure, message",
    [(404, "no such object"), (403, "permission denied"), (401, "there are no valid credentials"), (400, "refused")],
)
def test_what_stays_wrong_is_not_tried_again(failure, message, place, web):
    web.failures += [failure]
    with pytest.raises(UserError, match=rf"^{place}/{TAR}: .*{message}") as error:
        remote.read(f"{place}/{TAR}", 0, 3)
    assert len(web.requests) == 1 and "\n" not in str(error.value)
    assert (failure in (401, 403) and place.startswith("hf")) == ("HF_TOKEN" in str(error.value))


def test_wrong_addresses(web, monkeypatch):
    web.failures += ["no_range"]
    with pytest.raises(UserError, match="does not answer requests for a range"):
        remote.read(f"{web.url}/{TAR}", 0, 3)
    for address, message in (
        ("ftp://host/a.tar", "ftp:// is unknown; allowed are a local path, gs://"),
        ("gs://bucket", "gs://bucket names no object"),
        ("hf://datasets/org/nothing/a.tar", "no such object .repository not found"),
    ):
        with pytest.raises(UserError, match=message):
            remote.read(address)
    with pytest.raises(UserError, match="https:// has no wildcards; write a range"):
        remote.expand("https://host/*.tar")
    monkeypatch.setitem(clients.SCHEMES, "gs", ("no_such_package", "gcs"))
    with pytest.raises(UserError, match=r"no_such_package is not installed: pip install 'clip-jax-pretraining\[gcs\]'"):
        remote.read("gs://bucket/a.tar")
    monkeypatch.setenv(remote.SECONDS, "long")
    with pytest.raises(UserError, match="CLIP_JAX_STORAGE_SECONDS=long must be a number"):
        remote.size(f"{web.url}/{TAR}")


def test_ranges_and_wildcards(web, tmp_path):
    names = [f"{web.url}/{i:02d}.tar" for i in range(8, 12)]
    assert files.expand(f"{web.url}/{{08..11}}.tar") == names and not web.requests
    assert len(remote.expand("gs://bucket/{000..199}/{0..9}.tar")) == 2000
    assert remote.expand(names[0] + "?token=1") == [names[0] + "?token=1"]
    web.objects |= {f"hub/train/0000{i}.tar": b"" for i in (2, 1)} | {"hub/train/readme.txt": b"", "hub/train/x/a": b""}
    folder = f"hf://datasets/{web.repository}/train"
    assert remote.expand(f"{folder}/*.tar") == [f"{folder}/0000{i}.tar" for i in range(3)]
    assert remote.expand(f"hf://datasets/{web.repository}@main/train/*0.tar") == [
        f"hf://datasets/{web.repository}@main/{TAR}"
    ]
    with pytest.raises(UserError, match="no such object"):
        remote.expand(f"{folder}/*.parquet")
    # Each local file of a range must be there.
    (tmp_path / "1.tar").write_bytes(DATA)
    assert remote.expand(f"{tmp_path}/{{1..1}}.tar") == remote.expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/1.tar"]
    for name in ("x1a.tar", "x10a.tar"):
        (tmp_path / name).write_bytes(DATA)
    (tmp_path / "x2.tar").write_bytes(DATA)
    assert remote.expand(f"{tmp_path}/x{{1..2}}*.tar") == [f"{tmp_path}/{x}.tar" for x in ("x10a", "x1a", "x2")]
    for pattern in ("{1..2}.tar", "{2..1}.tar"):
        with pytest.raises(UserError, match="no such file"):
            remote.expand(f"{tmp_path}/{pattern}")


def test_local_files_and_memory(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(DATA)
    fsspec.filesystem("memory").pipe_file("/remote_test/a", DATA)
    for path in (f"{tmp_path}/a", "memory://remote_test/a"):
        assert remote.read(path) == DATA and remote.read(path, 150, 300) == DATA[150:] and remote.size(path) == 200
        with remote.opened(path) as file:
            assert file.read(3) == DATA[:3] and file.seek(-5, 2) == 195 and file.read() == DATA[195:]
            assert file.seek(10) == 10 and file.seek(5, 1) == 15 and file.readinto(bytearray(4)) == 4
            assert file.tell() == 19 and file.seekable() and file.readable()
        for work in (remote.read, remote.size, remote.opened):
            with pytest.raises(UserError, match=f"{path}b: no such"):
                work(f"{path}b")
    assert remote.expand("memory://remote_test/*") == ["memory://remote_test/a"]
    with pytest.raises(UserError, match="cannot be read|no such file"):
        remote.read(str(tmp_path))
    # A mount that fails is storage that fails.
    monkeypatch.setenv(remote.SECONDS, "0")
    monkeypatch.setattr(os.path, "getsize", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(StorageError, match="cannot be read: .*Input/output error"):
        remote.size(f"{tmp_path}/a")


def test_pyarrow_reads_objects(web):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, sink = pa.table({"a": list(range(1000))}), pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=100)
    web.objects["a.parquet"] = sink.getvalue().to_pybytes()
    with remote.opened(f"{web.url}/a.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(3)["a"].to_pylist() == list(range(300, 400))
        web.failures += 50 * [503]
        with pytest.raises(StorageError, match="a.parquet cannot be read"):
            pq.ParquetFile(file, pre_buffer=True).read_row_group(5)


@contextlib.contextmanager
def bucket_of(kind, monkeypatch):
    with emulator(kind) as bucket:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(remote.SECONDS, "0.2")
        monkeypatch.setattr(clients, "_systems", {})
        clients._system(kind).pipe({f"bucket/train/{i}.tar": DATA for i in range(3)})
        yield bucket


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_bucket(kind, monkeypatch):
    with bucket_of(kind, monkeypatch) as bucket:
        path = f"{bucket.url}/train/0.tar"
        assert (
            remote.read(path, 3, 9) == DATA[3:9] and remote.read(path) == DATA and remote.read(path, 190) == DATA[190:]
        )
        assert remote.read(path, 190, 300) == DATA[190:] and remote.read(path, 200, 300) == b""
        assert remote.size(path) == 200
        assert remote.expand(f"{bucket.url}/train/*.tar") == [f"{bucket.url}/train/{i}.tar" for i in range(3)]
        for status in (503, 429):
            bucket.fail(2, status)
            assert remote.read(path, 3, 9) == DATA[3:9]
        bucket.fail(remote.TRIES)  # as many as there are tries: no client tries again itself
        with pytest.raises(StorageError, match=f"{path} cannot be read: .*6 tries"):
            remote.read(path, 3, 9)
        bucket.fail(1, 403)
        with pytest.raises(UserError, match=f"^{path}: permission denied .*(gcloud|aws configure)"):
            remote.read(path, 3, 9)
        bucket.fail(0)
        for missing in (f"{bucket.url}/train/9.tar", f"{kind}://nothing/9.tar"):
            with pytest.raises(UserError, match=f"^{missing}: no such object$"):
                remote.read(missing, 3, 9)


def test_threads_and_forks(web):
    wrong = []

    def read(i):
        if remote.read(f"{web.url}/{TAR}", i, i + 2) != DATA[i : i + 2]:
            wrong.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(web.requests) == 32
    if not (child := os.fork()):  # its threads and connections are the parent's, which do not work here
        os._exit(0 if remote.read(f"{web.url}/{TAR}", 4, 6) == DATA[4:6] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_disk_cache(web, tmp_path, monkeypatch):
    monkeypatch.setenv(disk_cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv(disk_cache.LIMIT, "1e-6")  # a thousand bytes
    path = f"{web.url}/{TAR}"
    for _ in range(2):
        assert remote.read(path, 0, 100) == DATA[:100] and remote.read(path, 100, 200) == DATA[100:]
    assert len(web.requests) == 2
    # An entry that another process has cut off is read again.
    for entry in (tmp_path / "cache").rglob("*"):
        if entry.is_file():
            entry.write_bytes(entry.read_bytes()[:-1])
    assert remote.read(path, 0, 100) == DATA[:100] and len(web.requests) == 3
    # The entries that were used last stay, within the limit.
    for start in range(20):
        remote.read(path, start, 100 + start)
        os.utime(newest(tmp_path / "cache"), ns=(start + 1, start + 1))  # a clock may be too coarse for their order
    remote.read(path, 50, 150)
    entries = [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]
    assert 500 < sum(entry.stat().st_size for entry in entries) <= 1000
    web.requests.clear()
    assert remote.read(path, 19, 119) == DATA[19:119] and not web.requests
    assert remote.read(path, 0, 100) == DATA[:100] and len(web.requests) == 1
    # Nothing is kept where the folder cannot be written, and no error of an object is kept.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(disk_cache.FOLDER, str(tmp_path / "file"))
    web.failures += [404]
    with pytest.raises(UserError, match="no such object"):
        remote.read(path, 0, 9)
    assert remote.read(path, 0, 9) == DATA[:9]
    monkeypatch.setenv(disk_cache.LIMIT, "none")
    with pytest.raises(UserError, match="CLIP_JAX_SHARD_CACHE_GB=none must be a positive number"):
        remote.read(path, 0, 9)


def test_processes_share_the_disk_cache(tmp_path):
    cache, children = disk_cache.DiskCache(str(tmp_path), 3000), []
    for child in range(3):
        if number := os.fork():
            children.append(number)
            continue
        try:
            for key in np.random.default_rng(child).integers(0, 20, 200):
                assert cache.get(f"{key}", lambda key=key: bytes([key]) * 300) == bytes([key]) * 300
            os._exit(0)
        finally:
            os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 3000 and not list(tmp_path.rglob("*.tmp"))


def newest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)


class Pictures(BaseSource):
    """Pictures that lie one after the other in an object; each is read by a request."""

    def __init__(self, web, count=40):
        super().__init__("pictures")
        rng, pictures = np.random.default_rng(0), []
        for _ in range(count):
            file = io.BytesIO()
            PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
            pictures.append(file.getvalue())
        self._path = f"{web.url}/pictures"
        self._starts = np.cumsum([0, *map(len, pictures)])
        web.objects["pictures"] = b"".join(pictures)

    def __len__(self):
        return len(self._starts) - 1

    def __getitem__(self, index):
        image = remote.read(self._path, int(self._starts[index]), int(self._starts[index + 1]))
        return {"image": image, "texts": [f"picture {index}"]}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_raises_the_storage_error_of_its_threads_and_workers(workers, web):
    source, tokenizer = Pictures(web), make_tokenizer("sentencepiece")
    options = dict(batch_size=4, seed=0, threads=2, workers=workers, cache_bytes=0)
    with contextlib.closing(Loader(source, [ImageView("image", 8)], tokenizer, **options)) as loader:
        next(loader)
        web.left = 0
        with pytest.raises(StorageError, match=f"^{web.url}/pictures cannot be read: 503"):
            for _ in range(20):
                next(loader)


def test_a_run_whose_data_fail_saves_and_ends_with_44(web, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("clip_jax.data.sources.configured_source", lambda data: Pictures(web))
    record_step = train.Recorder.record_step

    def fail_after_two(recorder, step, *values):
        web.left = 0 if step == 2 else web.left
        return record_step(recorder, step, *values)

    options = (
        "mesh.data=-1",
        "data.cache_mb=0",
        "data.threads=1",
        "data.templates=()",
        "train.steps=10",
        "checkpoint.steps=0",
    )
    monkeypatch.setattr(train.Recorder, "record_step", fail_after_two)
    assert train.main(train_command(tmp_path, *options)[3:]) == 44
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    pattern = rf"error: {web.url}/pictures cannot be read: 503.*; the run resumes from step (\d); the same command .*"
    step = int(re.fullmatch(pattern, line)[1])
    assert 2 <= step < 10 and list(losses(tmp_path)) == list(range(1, step + 1))
    assert checkpoint.find(tmp_path).name == str(step)


def test_several_hosts_resume_from_the_newest_checkpoint(monkeypatch):
    monkeypatch.setattr(train.hosts, "count", lambda: 2)
    for newest, step in ((pathlib.Path("/run/checkpoints/40"), 40), (None, 0)):
        run = types.SimpleNamespace(checkpointer=types.SimpleNamespace(newest=lambda newest=newest: newest))
        recorder = types.SimpleNamespace(run=run)
        with pytest.raises(StorageError, match=f"^gs://b/a fails; the run resumes from step {step}$"):
            train.Recorder.end_without_data(recorder, StorageError("gs://b/a fails"), (45, {}, ()), None)
