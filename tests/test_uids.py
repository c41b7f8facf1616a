"""DataComp's subsets: the records whose uid is in a file of pairs, against sets of Python."""

import numpy as np
import pytest
from data_helpers import encoded
from example_helpers import tfrecord

from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.uids import Subset, halves_of, join
from clip_jax.errors import UserError
from clip_jax.tools import manifest

PAIR = np.dtype("u8,u8")


def write(path, numbers):
    """Writes a subset of numbers below 2**128 in this order; returns its path."""
    np.save(path, np.array([divmod(number, 2**64) for number in numbers], PAIR))
    return str(path)


def random_uids(count, seed=0, bits=128):
    rng = np.random.default_rng(seed)
    return [int.from_bytes(rng.bytes(16), "big") >> (128 - bits) for _ in range(count)]


@pytest.mark.parametrize("bits", [128, 70, 64, 9])
def test_lookup(tmp_path, bits):
    """Few bits: the upper halves are equal, numbers occur twice."""
    inside, others = random_uids(300, 1, bits), random_uids(300, 2, bits)
    edges = [0, 2**64 - 1, 2**64, 2**128 - 1]
    asked = [f"{number:032x}" for number in [*inside, *others, *edges]]
    for content in (sorted(inside), inside, [*sorted(inside), 2**128 - 1], inside[:1]):
        subset = Subset(write(tmp_path / "s.npy", content))
        assert subset.contains(*halves_of(asked)).tolist() == [int(uid, 16) in set(content) for uid in asked]


def test_uids_as_they_are_written():
    uids = ["0" * 31 + "a", "A", "a", "F" * 32, "g" * 32, "", "0" * 33, "é" * 32, "\udcff" * 32, "-1"]
    high, low, valid = halves_of(uids)
    assert valid.tolist() == [True] * 4 + [False, True] + [False] * 4
    assert low[:4].tolist() == [10, 10, 10, 2**64 - 1] and high[:4].tolist() == [0, 0, 0, 2**64 - 1]
    assert [len(half) for half in halves_of([])] == [0, 0, 0]


def test_selection(tmp_path):
    uids = random_uids(40)
    records = [{"image": b"x", "texts": [], "number": i, "uid": f"{uid:032x}"} for i, uid in enumerate(uids)]
    del records[5]["uid"]
    source = MemorySource([*records, {"image": b"x", "texts": [], "number": 40, "uid": "no uid"}])
    kept = join(source, write(tmp_path / "s.npy", sorted(uids[3:9] + uids[20:22] + random_uids(9, 7))))
    assert [kept[i]["number"] for i in range(len(kept))] == [3, 4, 6, 7, 8, 20, 21]


def rows(count):
    return [{"image": encoded(i), "caption": "c", "number": i, "uid": f"{i + 2**70:032x}"} for i in range(count)]


def test_manifest(tmp_path, monkeypatch):
    """With the column `uid` no record is read but the first ones, in which fields are looked for."""
    (tmp_path / "a.tfrecord").write_bytes(tfrecord(rows(12)))
    (tmp_path / "b.tfrecord").write_bytes(tfrecord(rows(3)))
    subset, path = write(tmp_path / "s.npy", [2**70 + 1, 2**70 + 7]), str(tmp_path / "m.manifest.parquet")
    manifest.main([f"{tmp_path}/*.tfrecord", f"--out={path}", "--columns=uid", "--processes=1"])
    for spec in (f"{path}?uids={subset}", f"{tmp_path}/*.tfrecord?uids={subset}"):
        source = make_source(spec)
        assert [source[i]["number"] for i in range(len(source))] == [1, 7, 1]
        assert source.blocks.tolist() == [2, 1] and [r["number"] for r in source.read_block(0)] == [1, 7]
        assert source.sequential
    whole = make_source(path)
    monkeypatch.setattr(type(whole), "read_block", None)
    assert len(join(whole, subset)) == 3


def test_wrong_files(tmp_path):
    source = MemorySource([{"image": b"x", "texts": [], "uid": "a" * 32}])
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "int.npy", np.arange(4))
    write(tmp_path / "other.npy", [5])
    for name, message in (
        ("missing", "no such file"),
        ("text", "not readable as .npy: "),
        ("int", r"must hold pairs of uint64 \(dtype u8,u8\), not int64 \(4,\)"),
        ("other", "no record is left: of 1 uids of the records none is in the file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            join(source, f"{tmp_path}/{name}.npy")
        assert "\n" not in str(error.value) and f"uids={tmp_path}/{name}.npy" in str(error.value)
    with pytest.raises(UserError, match="no record has the field 'uid'.* fields: "):
        join(MemorySource([{"image": b"x", "texts": []}]), f"{tmp_path}/other.npy")
