"""TFRecord shards and the messages in them: right values, blocks, and every kind of damage."""

import gzip
import pickle
import zlib

import fsspec
import numpy as np
import pytest
from data_helpers import encoded
from example_helpers import crc32c, example, tfrecord

from clip_jax.data import remote
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import example as examples
from clip_jax.data.sources import make_source, ranges
from clip_jax.data.sources import tfrecord as format
from clip_jax.data.sources.shards import FORMATS, format_of
from clip_jax.errors import UserError

COUNT = 7


def rows(count=COUNT):
    return [{"image/encoded": encoded(i), "caption": f"caption {i}", "number": i} for i in range(count)]


@pytest.fixture(scope="module")
def data():
    return tfrecord(rows())


def ends_of(data):
    """The offsets behind the records of a shard."""
    ends = []
    while (start := ends[-1] if ends else 0) < len(data):
        ends.append(start + 16 + int.from_bytes(data[start : start + 8], "little"))
    return ends


def numbers(path, found):
    """The numbers of the records of scanned blocks."""
    return [record["number"] for start, end, _ in found for record in format.read(str(path), start, end)]


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]


def test_checksums():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720)
    # A file of TensorBoard begins with a record of 24 bytes: this is what TensorFlow writes.
    assert format.masked_crc((24).to_bytes(8, "little")) == 0x224B7FA3


def test_features_are_those_of_tfds(data):
    fields = {"b": [b"\xff\0", b""], "one": b"x", "f": [0.5, -2.0], "i": [-1, 2**40], "empty": [], "ü": 3}
    parsed = examples.parse(example(fields))
    assert parsed == fields and list(parsed) == sorted(fields)
    assert examples.parse(b"") == {}
    # Values that are not packed, and a field that is not known: field 1 of Example twice, then field 15.
    feature = b"\x1a\x04\x08\x05\x08\x06"  # int64_list {value: 5 value: 6}
    entry = b"\x0a\x01k\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    assert examples.parse(b"\x0a" + bytes([len(features)]) + features + b"\x78\x01") == {"k": [5, 6]}
    for bad in (b"\xff\xff\xff", example(fields)[:-1], b"\x0a\xff"):
        with pytest.raises(BadRecord, match="malformed record"):
            examples.parse(bad)


def test_image_field():
    jpg, png = b"\xff\xd8\xff\xe0", encoded(1)
    assert examples.preferred({"a": jpg, "image/encoded": png, "path": b"x.jpg"}) == {"image": "image/encoded"}
    assert examples.preferred({"image": "text", "jpeg_data": jpg}) == {"image": "jpeg_data"}
    assert examples.preferred({"image": "text"}) == {}


@pytest.mark.parametrize("length", [1, 3, 7, 512])
def test_blocks(tmp_path, data, length):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(data)
    found, broken = format.scan(str(path), length)
    assert not broken and numbers(path, found) == list(range(COUNT))
    ends = [0, *ends_of(data)]
    starts = range(0, COUNT, length)
    assert found == [(ends[i], ends[min(i + length, COUNT)], min(length, COUNT - i)) for i in starts]
    record = format.read(str(path), *found[0][:2])[0]
    assert record == {"image/encoded": encoded(0), "caption": b"caption 0", "number": 0}


def test_source(tmp_path, data):
    for number in range(2):
        (tmp_path / f"a.tfrecord-{number:05d}-of-00002").write_bytes(data)
    for spec in (f"{tmp_path}/a.tfrecord-*", str(tmp_path), f"{tmp_path}/a.tfrecord-{{00000..00001}}-of-00002"):
        source = make_source(spec)
        assert len(source) == 2 * COUNT and source.blocks.tolist() == [COUNT, COUNT] and source.sequential
    record = pickle.loads(pickle.dumps(source))[COUNT + 2]
    assert record == {"image": encoded(2), "texts": ["caption 2"], "caption": "caption 2", "number": 2}
    assert [record["number"] for record in source.read_block(1)] == list(range(COUNT))
    named = make_source(spec, image="image/encoded", text="number", label="number")
    assert named[3]["texts"] == ["3"] and named[3]["label"] == 3
    with pytest.raises(UserError, match="no field 'imag'.* fields: caption, image/encoded, number"):
        make_source(spec, image="imag")


def test_names_of_shards():
    assert set(FORMATS.values()) >= {"tfrecord", "arrayrecord"}
    names = ("a.tfrecord", "a.tfrecords", "a.tfrec", "a.tfrecord-00000-of-00100", "*.tfrecord-*", "a.tfrecord*")
    assert {format_of(name) for name in names} == {"tfrecord"}
    assert format_of("a.array_record-00000-of-00100") == "arrayrecord"


def test_truncated(tmp_path, data):
    """Cut at any byte, a shard gives the records before the cut."""
    path, ends = tmp_path / "a.tfrecord", ends_of(data)
    for cut in [*range(ends[1], ends[2] + 1, 7), ends[2] - 1, ends[2] + 5, ends[2] + 12, 3]:
        path.write_bytes(data[:cut])
        found, broken = format.scan(str(path), 2)
        whole = sum(end <= cut for end in ends)
        assert numbers(path, found) == list(range(whole))
        reason = "truncated shard" if whole else "unreadable shard"
        assert broken == ({} if cut in ends else {reason: 1})
    with pytest.raises(EOFError):
        format.read(str(path), 0, ends[0])


def test_a_wrong_checksum_of_data_is_one_bad_record(tmp_path, data):
    path, ends = tmp_path / "a.tfrecord", ends_of(data)
    for place in (ends[2] + 40, ends[3] - 1):  # in the data and in the checksum of record 3
        path.write_bytes(flipped(data, place))
        source = make_source(str(path))
        assert source.broken == {} and len(source) == COUNT
        with pytest.raises(BadRecord, match="^wrong checksum$"):
            source[3]
        assert source[2]["number"] == 2 and source[4]["number"] == 4


def test_a_wrong_checksum_of_a_length_ends_the_shard(tmp_path, data):
    path, ends = tmp_path / "a.tfrecord", ends_of(data)
    for place in (ends[2], ends[2] + 9):  # the length and the checksum of record 3
        path.write_bytes(flipped(data, place))
        source = make_source(str(path))
        assert source.broken == {"wrong checksum of a length": 1} and len(source) == 3
        # The same after the blocks were known.
        assert [record["number"] for record in format.read(str(path), 0, len(data))] == [0, 1, 2]
    path.write_bytes(data)
    source = make_source(str(path))
    path.write_bytes(flipped(data, ends[2]))
    with pytest.raises(UserError, match="a.tfrecord changed since its blocks were found"):
        source.read_block(0)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="a.tfrecord changed since its blocks were found"):
        source.read_block(0)


@pytest.mark.parametrize("content", [b"", b"not a TFRecord" * 100, bytes(100)])
def test_no_tfrecord(tmp_path, content):
    (tmp_path / "a.tfrecord").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tfrecord: no usable sample in 1 shards \((empty|unreadable) shard\)$"):
        make_source(str(tmp_path / "a.tfrecord"))


def test_compressed(tmp_path, data):
    path = tmp_path / "a.tfrecord"
    for name, content in (("gzip", gzip.compress(data)), ("zlib", zlib.compress(data))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"a.tfrecord: compressed by {name}, which cannot be read by offset"):
            make_source(str(path))
    path.with_suffix(".tfrecord.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="a.tfrecord.gz: a compressed shard cannot be read by offset"):
        make_source(f"{path}.gz")


def test_a_remote_shard_is_scanned_in_large_pieces(data, monkeypatch):
    fsspec.filesystem("memory").pipe_file("/tfrecord/a.tfrecord", data)
    reads, read = [], remote.read
    monkeypatch.setattr(ranges, "_PIECE", len(data) // 2)
    monkeypatch.setattr(remote, "read", lambda *place: reads.append(place) or read(*place))
    path = "memory://tfrecord/a.tfrecord"
    found, broken = format.scan(path, 4)
    assert len(reads) <= 3 and not broken and len(found) == 2
    reads.clear()
    assert numbers(path, found) == list(range(COUNT)) and len(reads) == 2
    np.testing.assert_array_equal([end - start for _, start, end in reads], [end - start for start, end, _ in found])


def test_a_folder_of_img2dataset(tmp_path):
    """Its names of fields, and a table of metadata beside each shard, which is no shard."""
    fields = {
        "key": "000000003",
        "jpg": encoded(3, "JPEG"),
        "txt": "a cat",
        "caption": "a cat",
        "url": "http://x/3.jpg",
    }
    (tmp_path / "00000.tfrecord").write_bytes(tfrecord([fields | {"width": 12}]))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    record = make_source(str(tmp_path))[0]
    assert record["image"] == fields["jpg"] and record["texts"] == ["a cat"] and record["width"] == 12
    assert record["key"] == "000000003" and "jpg" not in record
