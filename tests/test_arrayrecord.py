"""ArrayRecord files as blocks: runs of records that one call reads."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data_helpers import encoded
from example_helpers import write_array_record

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import arrayrecord as format
from clip_jax.data.sources import make_source
from clip_jax.data.sources.shards import ShardSource, scan_shards
from clip_jax.errors import UserError

COUNT = 1100


def rows(count=COUNT):
    image = encoded(0)
    return [{"image": image, "caption": f"caption {i}", "number": i} for i in range(count)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("array_record") / "a.array_record"
    write_array_record(path, rows())
    return path


def numbers(records):
    return [record["number"] for record in records]


def test_blocks(path):
    found, broken = format.scan(str(path))
    assert found == [(0, 512, 512), (512, 1024, 512), (1024, 1100, 76)] and not broken
    assert format.scan(str(path), 2000)[0] == [(0, 1100, 1100)]
    assert [n for start, end, _ in found for n in numbers(format.read(str(path), start, end))] == list(range(COUNT))
    with pytest.raises(EOFError):
        format.read(str(path), 1024, 1101)


def test_groups_are_not_cut(tmp_path):
    """Records that are compressed together are in one block."""
    write_array_record(tmp_path / "a.array_record", rows(50), "group_size:8")
    path = str(tmp_path / "a.array_record")
    assert [row[:2] for row in format.scan(path, 20)[0]] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert [row[:2] for row in format.scan(path, 5)[0]][:2] == [(0, 8), (8, 16)]
    assert numbers(format.read(path, 16, 32)) == list(range(16, 32))


def test_local_files_are_read_by_record_and_by_block(path, tmp_path, monkeypatch):
    write_array_record(tmp_path / "b.array_record", rows(3))
    (tmp_path / "a.array_record").symlink_to(path)
    source = make_source(f"{tmp_path}/*.array_record")
    assert not source.sequential and source.blocks.tolist() == [512, 512, 76, 3]
    assert format.block_bytes(str(path), 0, 550) == path.stat().st_size / 2 and source.block_bytes > 0
    monkeypatch.setattr(format, "read", None)  # a single record reads no block
    picked = [0, 511, 512, 1099, 1100, 1102]
    assert [source[i]["number"] for i in picked] == [0, 511, 512, 1099, 0, 2]
    with pytest.raises(IndexError):
        source[1103]
    with ThreadPoolExecutor(8) as pool:
        assert numbers(pool.map(source.__getitem__, range(COUNT))) == list(range(COUNT))
    monkeypatch.undo()
    copy = pickle.loads(pickle.dumps(source))
    assert (
        copy.read_block(1)[3]
        == source[515]
        == {"image": encoded(0), "texts": ["caption 515"], "caption": "caption 515", "number": 515}
    )
    assert numbers(copy.read_block(3)) == [0, 1, 2]


def test_blocks_that_are_known_open_few_files(path, tmp_path, monkeypatch):
    """With the blocks of a manifest a source opens the files whose first records it looks at, and those it reads."""
    files = [str(tmp_path / f"{i}.array_record") for i in range(40)]
    for file in files:
        Path(file).symlink_to(path)
    blocks, _ = scan_shards("arrayrecord", files)
    used, read = set(), format.read
    monkeypatch.setattr(format, "read", lambda file, *place: used.add(file) or read(file, *place))
    monkeypatch.setattr(format, "scan", None)
    source = ShardSource("arrayrecord", files, blocks, "many")
    assert source.sequential and len(source) == 40 * COUNT and len(used) == 8
    used.clear()
    assert numbers(source.read_block(7)) == list(range(512, 1024)) and used == {files[2]}


def test_damaged_record(path, tmp_path):
    data = bytearray(path.read_bytes())
    place = data.index(b"\x28\xb5\x2f\xfd", len(data) // 3)  # the frame of a compressed record
    data[place + 20] ^= 255
    damaged = tmp_path / "a.array_record"
    damaged.write_bytes(data)
    source, bad = make_source(str(damaged)), []
    for number, size in enumerate(source.blocks):
        block = source.read_block(number)
        for index in range(size):
            try:
                assert block[index]["number"] == 512 * number + index
            except BadRecord as error:
                bad.append((512 * number + index, error.args[0]))
    assert [reason for _, reason in bad] == ["unreadable record"]
    with pytest.raises(BadRecord, match="unreadable record"):
        source[bad[0][0]]


def test_a_file_that_changed(path, tmp_path):
    write_array_record(tmp_path / "a.array_record", rows(20))
    source = make_source(str(tmp_path / "a.array_record"))
    write_array_record(tmp_path / "a.array_record", rows(19))
    with pytest.raises(UserError, match="a.array_record changed since its blocks were found"):
        source.read_block(0)
    with pytest.raises(BadRecord, match="unreadable record"):
        source[19]
    (tmp_path / "a.array_record").unlink()
    with pytest.raises(UserError, match="a.array_record: no such file"):
        source[0]


def test_a_truncated_file_is_counted(path, tmp_path):
    (tmp_path / "a.array_record").write_bytes(path.read_bytes()[:-1000])
    (tmp_path / "b.array_record").symlink_to(path)
    source = make_source(f"{tmp_path}/*.array_record")
    assert len(source) == COUNT and source.broken == {"unreadable shard": 1}


def test_remote_files_are_refused():
    for use in (format.scan, lambda path: format.read(path, 0, 1)):
        with pytest.raises(UserError, match="gs://b/a.array_record: ArrayRecord files are read from a local disk"):
            use("gs://b/a.array_record")
    with pytest.raises(UserError, match="gs://b/a.array_record: ArrayRecord files are read from a local disk"):
        make_source("gs://b/a.array_record")


def test_blocks_of_a_tfds_folder():
    """A block is read by one call, and its records are those that are read one by one."""
    source = make_source("emoji", "val_seen_vendor")
    assert source.blocks.sum() == len(source) and source.blocks.max() <= 512
    last = len(source.blocks) - 1
    block = source.read_block(last)
    assert (
        len(block) == source.blocks[-1]
        and block[0] == source[512 * last]
        and block[-1 + len(block)] == source[len(source) - 1]
    )
