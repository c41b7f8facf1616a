"""Blocks of tar shards: the same samples as with an index, from ranges of bytes alone."""

import contextlib
import io
import json
import pickle
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
from data_helpers import write_tar

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import ranges, tar, tar_samples
from clip_jax.data.sources.shards import ShardSource, format_of, scan_shards, scanned_source
from clip_jax.data.sources.webdataset import WebDatasetSource
from clip_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))


def pair(key, number):
    return [(f"{key}.png", b"image %d" % number), (f"{key}.txt", b"c%d" % number)]


def from_blocks(path, length):
    """The raw records of a shard, read block by block; what is broken; and the sizes of its blocks."""
    rows, broken = tar.scan(str(path), length)
    blocks = [tar.read(str(path), start, end) for start, end, _ in rows]
    assert [len(block) for block in blocks] == [samples for _, _, samples in rows]
    return [record for block in blocks for record in block], broken, [samples for *_, samples in rows]


def from_index(path):
    source = WebDatasetSource([str(path)])
    return [source._members(i) for i in range(len(source))], source.broken


def own(record):
    return [record.get(field) for field in ("image", "txt", "cls", "a")]


def shuffled_members(seed):
    """Members in an order in which some samples are apart, doubled, without an image, or named after a dot."""
    rng = random.Random(seed)
    members = []
    for number in range(40):
        key = rng.choice([f"{number:02d}", f"{number:02d}.v1", f"{rng.randrange(40):02d}", f"f/{number}"])
        kinds = rng.sample(["png", "jpg", "txt", "json", "cls", "syn.json", "seg.png", "npz"], rng.randint(1, 6))
        values = {"json": b'{"a": 1}', "syn.json": b'{"b": [2]}', "cls": b"3", "npz": npz(x=np.zeros((1, 2)))}
        members += [(f"{key}.{kind}", values.get(kind, b"%d" % number)) for kind in kinds]
    for _ in range(rng.choice([0, 0, 5])):
        members.insert(rng.randrange(len(members)), members.pop(rng.randrange(len(members))))
    return members


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("length", [1, 4, 512])
def test_blocks_hold_the_samples_of_the_whole_shard(tmp_path, length):
    path, found = tmp_path / "a.tar", Counter()
    for seed in range(25):
        write_tar(path, shuffled_members(seed))
        records, broken, sizes = from_blocks(path, length)
        expected, expected_broken = from_index(path)
        # A sample that a block cannot hold alone is left out and counted; the others are those of the index.
        assert len(expected) - len(records) == broken["members of a sample are apart"] - expected_broken.get(
            "members of a sample are apart", 0
        )
        left = iter(map(own, expected))
        assert all(own(record) in left for record in records)  # in the same order
        assert max(sizes) <= length
        found.update(expected_broken)
    assert len(found) >= 4  # the rules had something to do


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_links_and_joined_archives(tmp_path, form):
    stem = "folder/" + "x" * 120
    for part in range(2):
        write_tar(tmp_path / f"{part}.tar", [m for i in range(5) for m in pair(f"{stem[:90]}{i}", 5 * part + i)], form)
    if form != tarfile.USTAR_FORMAT:
        write_tar(tmp_path / "1.tar", [m for i in range(5) for m in pair(f"{stem}{i} 문어", 5 + i)], form)
    (tmp_path / "a.tar").write_bytes((tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes())
    records, broken, sizes = from_blocks(tmp_path / "a.tar", 4)
    assert [record["txt"] for record in records] == [b"c%d" % i for i in range(10)]
    assert sizes == [4, 4, 2] and not broken


def test_a_shard_cut_in_the_middle(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(9) for m in pair(f"{i}", i)])
    data = (tmp_path / "a.tar").read_bytes()
    for cut in range(4 * 2048, 5 * 2048 + 1, 256):  # a sample takes 2048 bytes
        (tmp_path / "b.tar").write_bytes(data[:cut])
        records, broken, _ = from_blocks(tmp_path / "b.tar", 2)
        assert len(records) == (5 if cut >= 5 * 2048 - 510 else 4) and broken == {"truncated shard": 1}


def test_members_of_datacompdr_are_fields(tmp_path):
    """The members and fields of apple/ml-mobileclip's DataCompDR with the pictures beside them."""
    image, text = np.ones((3, 4), np.float16), np.zeros((6, 4), np.float16)
    members = []
    for i in range(3):
        members += [
            (f"{i:03d}.jpg", b"image"),
            (f"{i:03d}.json", b'{"uid": "u%d", "syn_text": "own"}' % i if i == 2 else b'{"uid": "u%d"}' % i),
            (f"{i:03d}.npz", npz(image_emb=image, text_emb=text)),
            (f"{i:03d}.paug.json", json.dumps({"param_aug": "[[1, 2]]"}).encode()),
            (f"{i:03d}.pth.gz", b"not read"),
            (f"{i:03d}.syn.json", json.dumps({"syn_text": [f"a {i}", f"b {i}"]}).encode()),
            (f"{i:03d}.txt", b"c%d" % i),
            (f"{i:03d}.url.txt", b"https://x\n"),
        ]
    write_tar(tmp_path / "a.tar", members)
    path = str(tmp_path / "a.tar")
    blocks, broken = scan_shards("tar", [path])
    for source in (
        ShardSource("tar", [path], blocks, "blocks", text=["txt", "syn_text"]),
        WebDatasetSource([path], "index", text=["txt", "syn_text"]),
    ):
        record = source[1]
        assert record["texts"] == ["c1", "a 1", "b 1"] and record["image"] == b"image" and not broken
        np.testing.assert_array_equal(record["image_emb"], image)
        np.testing.assert_array_equal(record["text_emb"], text)
        assert (record["uid"], record["param_aug"], record["url.txt"]) == ("u1", "[[1, 2]]", "https://x")
        assert "pth.gz" not in record
        assert source[2]["syn_text"] == "own"  # the plain JSON's field has precedence
        assert pickle.loads(pickle.dumps(source))[0]["texts"] == ["c0", "a 0", "b 0"]


def test_damaged_members_are_bad_records(tmp_path):
    objects = npz(x=np.array([{}], object))
    members = [("0.png", b"x"), ("0.npz", b"PK no archive"), ("1.png", b"x"), ("1.syn.json", b"{")]
    write_tar(tmp_path / "a.tar", [*members, ("2.png", b"x"), ("2.npz", objects), ("3.png", b"x")])
    (start, end, samples), *_ = tar.scan(str(tmp_path / "a.tar"))[0]
    block = tar.read(str(tmp_path / "a.tar"), start, end)
    for index, reason in enumerate(("malformed npz", "malformed json", "malformed npz")):
        with pytest.raises(BadRecord, match=reason):
            block[index]
    assert samples == 4 and block[3] == {"image": b"x"}
    file = io.BytesIO()
    np.savez_compressed(file, x=np.arange(200.0))
    data = file.getvalue()
    for i in range(len(data)):  # the array, or a bad record
        with contextlib.suppress(BadRecord):
            tar_samples._read_arrays(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])


def test_a_remote_shard_is_scanned_in_large_pieces(tmp_path, monkeypatch):
    import fsspec

    from clip_jax.data import remote

    write_tar(tmp_path / "a.tar", [m for i in range(50) for m in pair(f"{i:02d}", i)])
    data = (tmp_path / "a.tar").read_bytes()
    fsspec.filesystem("memory").pipe_file("/tar_blocks/a.tar", data)
    reads, read = [], remote.read
    monkeypatch.setattr(ranges, "_PIECE", 20_000)
    monkeypatch.setattr(remote, "read", lambda path, start, end: reads.append((start, end)) or read(path, start, end))
    assert tar.scan("memory://tar_blocks/a.tar", 8) == tar.scan(str(tmp_path / "a.tar"), 8)
    assert len(reads) <= len(data) // 20_000 + 2 and all(end - start <= 20_000 for start, end in reads)
    assert all(b[0] > a[0] for a, b in zip(reads, reads[1:], strict=False))  # forwards alone


def test_a_field_cls_of_the_json_is_no_label(tmp_path):
    path = str(tmp_path / "a.tar")
    write_tar(path, [*pair("0", 0), ("0.json", b'{"cls": "cat"}')])
    record = scanned_source(path, "x")[0]
    assert ("label" in record, record["cls"]) == (False, "cat")


def test_a_shard_that_shrank_or_changed_is_named(tmp_path):
    path = str(tmp_path / "a.tar")
    write_tar(path, [m for i in range(9) for m in pair(f"{i}", i)])
    blocks, _ = scan_shards("tar", [path])
    source = ShardSource("tar", [path], blocks, "x")
    data = (tmp_path / "a.tar").read_bytes()
    for changed in (data[: len(data) // 2], bytes(len(data)), b""):
        (tmp_path / "a.tar").write_bytes(changed)
        with pytest.raises(UserError, match="a.tar changed since its blocks were found"):
            source.read_block(0)


def test_fields_are_looked_for_in_several_shards(tmp_path):
    paths = [str(tmp_path / f"{number}.tar") for number in range(20)]
    for number, path in enumerate(paths):
        extra = [(f"{number}.cls", b"7"), (f"{number}.json", b'{"alt": "json"}')] if number == 19 else []
        write_tar(path, [*pair(f"{number}", number), *extra])
    blocks, _ = scan_shards("tar", paths)
    source = ShardSource("tar", paths, blocks, "x")
    assert (source[19]["label"], source[3]["label"], source[19]["texts"]) == (7, -1, ["c19"])
    assert ShardSource("tar", paths, blocks, "x", text="alt")[19]["texts"] == ["json"]
    with pytest.raises(UserError, match="x: no field 'atl' .did you mean 'alt'"):
        ShardSource("tar", paths, blocks, "x", text="atl")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/a.b/00000.tar", "tar"),
        ("gs://b/x.tfrecord-00000-of-00010", "tfrecord"),
        ("x.tfrecord-{00000..00009}-of-00010", "tfrecord"),
        ("/d/*.array_record*", "arrayrecord"),
        ("/d.tar/x.csv", None),
        ("a.tar.gz", None),
        ("a.parquet.index", None),
    ],
)
def test_formats_by_the_ending(path, kind):
    assert format_of(path) == kind
