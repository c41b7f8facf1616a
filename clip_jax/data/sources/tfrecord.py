"""TFRecord shards of `tf.train.Example`, without TensorFlow; the format of `shards`.

A record is, all little-endian (tensorflow/core/lib/io/record_writer.h):

    uint64 length, uint32 masked CRC-32C of these 8 bytes, data [length], uint32 masked CRC-32C of the data

A block is a range of bytes. A wrong checksum of the data is a bad record. Behind a wrong checksum of a length nothing
can be found: the shard ends there.
"""

import re
import struct
from collections import Counter

from clip_jax.data import remote
from clip_jax.data.blocks import Block
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import example
from clip_jax.data.sources.example import preferred  # noqa: F401 part of the format
from clip_jax.data.sources.ranges import heads
from clip_jax.errors import UserError

BYTES = True
_HEAD, _CRC = struct.Struct("<QI"), struct.Struct("<I")
_COMPRESSED = {"gzip": rb"\x1f\x8b\x08", "zlib": rb"\x78[\x01\x5e\x9c\xda]"}  # how such data begins
_CUT = "truncated shard"
_LENGTH = "wrong checksum of a length"
_UNREADABLE = "unreadable shard"


def scan(path, length=512):
    """Returns the blocks of a shard, `[(start, end, records), ...]` in bytes, and what is broken, `{reason: count}`.

    A local shard is read at the records' heads alone, a remote one from front to end. A truncated shard gives its
    complete records. Raises UserError for a compressed shard.

    Args:
      path: of the shard.
      length: int, records of a block.
    """
    rows, broken = [], Counter()
    ends = [0]  # of the records of the current block, and its start
    with heads(path) as (get, size):
        while ends[-1] < size:
            try:
                end = _end(get(ends[-1], _HEAD.size), ends[-1])
            except ValueError:
                _refuse_compressed(path, get(0, _HEAD.size))
                broken[_LENGTH if rows or len(ends) > 1 else _UNREADABLE] = 1
                break
            if end is None or end > size:
                broken[_CUT if rows or len(ends) > 1 else _UNREADABLE] = 1
                break
            ends.append(end)
            if len(ends) > length:
                rows.append((ends[0], end, length))
                ends = [end]
    if len(ends) > 1:
        rows.append((ends[0], ends[-1], len(ends) - 1))
    return rows, broken


def _end(head, start):
    """Returns the offset after the record whose head lies at `start`, None for a head that is cut off.

    Raises ValueError where the checksum of the length is wrong.
    """
    if len(head) < _HEAD.size:
        return None
    length, crc = _HEAD.unpack(head)
    if masked_crc(head[:8]) != crc:
        raise ValueError
    return start + _HEAD.size + length + _CRC.size


def _refuse_compressed(path, head):
    for name, pattern in _COMPRESSED.items():
        if re.match(pattern, head):
            raise UserError(f"{path}: compressed by {name}, which cannot be read by offset; write it uncompressed")


def masked_crc(data):
    """Returns the checksum that TFRecord stores of bytes: CRC-32C, rotated right by 15 bits, plus 0xA282EAD8."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read(path, start, end):
    """Returns the raw records of a block, a sequence, up to the first wrong checksum of a length.

    Taking a record raises BadRecord where the checksum of its data is wrong or it is no `tf.train.Example`. Raises
    EOFError where the shard is shorter than `end`.

    Args:
      path: of the shard.
      start, end: ints, the block's range of bytes.
    """
    data = remote.read(path, start, end)
    if len(data) < end - start:
        raise EOFError
    ends = [0]
    try:
        while (following := _end(data[ends[-1] : ends[-1] + _HEAD.size], ends[-1])) and following <= len(data):
            ends.append(following)
    except ValueError:
        pass

    def record(index):
        content = data[ends[index] + _HEAD.size : ends[index + 1] - _CRC.size]
        if masked_crc(content) != _CRC.unpack_from(data, ends[index + 1] - _CRC.size)[0]:
            raise BadRecord("wrong checksum")
        return example.parse(content)

    return Block(len(ends) - 1, record)
