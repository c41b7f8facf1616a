"""Columns of a data set: written, joined, and rejected when they were made of another one."""

import fcntl
import lzma
import os
import pickle
import stat

import numpy as np
import pytest

from clip_jax.data.sources import MemorySource, columns, make_source
from clip_jax.errors import UserError


def source(*texts):
    return MemorySource([{"image": np.full((2, 2, 3), i, np.uint8), "texts": [text]} for i, text in enumerate(texts)])


PETS = source("a cat", "a dog", "a parrot")


@pytest.fixture
def rewrites(tmp_path):
    path = tmp_path / "rewrites.jsonl"
    with columns.TextWriter(path, PETS, {"seed": 0}) as out:
        for i in range(3):
            out.write(PETS[i], {"rewrites": [f"rewrite {i}"]})
    return path


def test_texts_join_their_records(rewrites, tmp_path):
    joined = pickle.loads(pickle.dumps(columns.ColumnsSource(PETS, str(rewrites))))
    assert [joined[i]["rewrites"] for i in range(3)] == [["rewrite 0"], ["rewrite 1"], ["rewrite 2"]]
    assert joined[1]["texts"] == ["a dog"] and len(joined) == 3
    packed = tmp_path / "packed.jsonl.xz"
    packed.write_bytes(lzma.compress(rewrites.read_bytes()))
    assert columns.ColumnsSource(PETS, str(packed))[2]["rewrites"] == ["rewrite 2"]


def test_a_writer_goes_on_after_half_a_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    with columns.TextWriter(path, PETS, {}) as out:
        out.write(PETS[0], {"tag": "a"})
        out.write(None, {"tag": ""})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with columns.TextWriter(path, PETS, {}) as out:
        assert out.done == 1
        out.write(None, {"tag": ""})
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match="2 rows, but memory has 3 records"):
        columns.ColumnsSource(PETS, str(path))
    with pytest.raises(UserError, match="another about: {}"):
        columns.TextWriter(path, PETS, {"seed": 1})


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.parquet"])
def test_one_writer_at_a_time_has_a_file(name, tmp_path):
    path = str(tmp_path / name)
    with columns.text_writer(path, PETS, {}) as out:
        out.write(PETS[0], {"tag": "a"})
        with pytest.raises(UserError, match=f"{name} is being written by another process: let it end, or name another"):
            columns.text_writer(path, PETS, {})
        out.write(PETS[1], {"tag": "b"})
    for about in ({"seed": 1}, {"seed": 2}):
        with pytest.raises(UserError, match="made with another about"):
            columns.text_writer(path, PETS, about)
    with columns.text_writer(path, PETS, {}) as out:
        assert out.done == 2


def descriptor(file):
    return file if isinstance(file, int) else file.fileno()


def test_a_lock_is_on_the_descriptor_that_writes(tmp_path, monkeypatch):
    """On SMB a locked file is closed to all other descriptors."""
    locked = []
    monkeypatch.setattr(fcntl, "flock", lambda file, _: locked.append(descriptor(file)))
    with columns.TextWriter(tmp_path / "texts.jsonl", PETS, {}) as out:
        assert locked == [out._file.fileno()]


@pytest.mark.parametrize("error", [BlockingIOError, PermissionError])
def test_another_host_does_not_write_into_the_same_folder(error, tmp_path, monkeypatch):
    """NFS locks a folder for one host alone, and a file for all. SMB answers with a PermissionError."""
    path, lock = tmp_path / "texts.parquet", fcntl.flock

    def of_another_host(file, how):
        try:
            return None if stat.S_ISDIR(os.fstat(descriptor(file)).st_mode) else lock(file, how)
        except BlockingIOError:
            raise error from None

    monkeypatch.setattr(fcntl, "flock", of_another_host)
    with columns.text_writer(path, PETS, {}) as out:
        out.write(PETS[0], {"tag": "a"})
        with pytest.raises(UserError, match="texts.parquet is being written by another process"):
            columns.text_writer(path, PETS, {})
    assert os.listdir(path) == ["part-000000.parquet"]


def test_the_lock_of_a_writer_that_has_just_ended_is_no_claim(tmp_path, monkeypatch):
    """Else a third writer would make the lock file anew, and two would write."""
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *args: [lock(*args), *map(os.unlink, tmp_path.glob("*/.*"))])
    with pytest.raises(UserError, match="texts.parquet is being written by another process"):
        columns.text_writer(tmp_path / "texts.parquet", PETS, {})


def test_half_a_line_of_something_else_stays(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"image": "a.png", "caption": "mine"}')
    with pytest.raises(UserError, match="texts.jsonl exists and holds something else; give another file"):
        columns.TextWriter(path, PETS, {})
    assert path.read_text() == '{"image": "a.png", "caption": "mine"}'
    path.unlink()
    with columns.TextWriter(path, PETS, {}):
        whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with columns.TextWriter(path, PETS, {}) as out:
        assert out.done == 0 and path.read_bytes() == whole


def test_columns_of_another_data_set_or_order_are_refused(rewrites, tmp_path):
    with pytest.raises(UserError, match="made of another data set: memory, 3 records, not memory, 2"):
        columns.ColumnsSource(source("a cat", "a dog"), str(rewrites))
    header, *lines = rewrites.read_text().splitlines()
    rewrites.write_text("\n".join([header, *lines[::-1]]) + "\n")
    shuffled = columns.ColumnsSource(PETS, str(rewrites))
    assert shuffled[1]["rewrites"] == ["rewrite 1"]
    with pytest.raises(UserError, match="line 2: made of other texts than record 0"):
        shuffled[0]


def test_arrays_join_their_records(tmp_path):
    values, fields = (
        np.arange(12, dtype=np.float16).reshape(3, 2, 2),
        {"regions": ((2, 2), np.float16), "count": ((), np.int32)},
    )
    with columns.array_writer(tmp_path / "c", PETS, fields, {"encoder": "none"}) as arrays:
        arrays["regions"][:], arrays["count"][:] = values, [0, 1, 2]
    joined = columns.ColumnsSource(PETS, str(tmp_path / "c"))
    joined[0]
    again = pickle.loads(pickle.dumps(joined))
    assert (again[2]["regions"] == values[2]).all() and again[2]["count"] == 2
    with columns.array_writer(tmp_path / "c", PETS, fields, {"encoder": "other"}):
        assert (again[2]["regions"] == values[2]).all()  # as in a training that has mapped the former ones
    with pytest.raises(UserError, match=r"c/\w+.npy was made anew since it was opened; start again"):
        pickle.loads(pickle.dumps(joined))[0]  # as in a worker that starts later
    with pytest.raises(UserError, match="another data set"):
        columns.ColumnsSource(source("a cat", "a dog", "a fish"), str(tmp_path / "c"))
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        columns.array_writer(tmp_path / "file" / "c", PETS, fields, {}),
    ):
        pass
    with pytest.raises(ZeroDivisionError), columns.array_writer(tmp_path / "c", PETS, fields, {}):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="damaged, or no columns"):
        columns.ColumnsSource(PETS, str(tmp_path / "c"))


def test_plain_lines_are_counted(tmp_path):
    (tmp_path / "chatgpt.txt").write_text("one\ntwo\n\n")
    assert columns.ColumnsSource(PETS, str(tmp_path / "chatgpt.txt"))[1]["chatgpt"] == "two"
    (tmp_path / "chatgpt.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 rows, but memory has 3 records"):
        columns.ColumnsSource(PETS, str(tmp_path / "chatgpt.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "damaged, or no columns \\(KeyError"),
        ("no\n", "not a JSON object: 'no"),
        (None, "no such file or folder of columns"),
    ],
)
def test_damaged_columns(tmp_path, content, message):
    if content:
        (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        columns.ColumnsSource(PETS, str(tmp_path / "c.jsonl"))


def test_specs_with_several_columns(tmp_path):
    (tmp_path / "table.tsv").write_text("filepath\tcaption\na.png\ta cat\nb.png\ta dog\n")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG")
        (tmp_path / f"{name}_text.txt").write_text(f"{name} 0\n{name} 1\n")
    joined = make_source(f"{tmp_path}/table.tsv?columns={tmp_path}/a_text.txt?columns={tmp_path}/b_text.txt")
    assert (joined[1]["a_text"], joined[1]["b_text"], joined[1]["texts"]) == ("a 1", "b 1", ["a dog"])
