"""MDS shards, which mosaicml-streaming's `MDSWriter` writes; the format of `shards`.

A shard is, all little-endian:

    uint32 n; uint32 offsets [n + 1], of the samples and of their end; JSON of the columns; the samples
    sample: uint32 size of each value whose encoding has no fixed size; the values, in the order of the columns

A block is a range of bytes. The columns of a shard are read once, from its front.
"""

import json
import re
import struct
from collections import Counter
from typing import NamedTuple

import numpy as np

from clip_jax.data import remote
from clip_jax.data.blocks import Block, Recent
from clip_jax.data.records import BadRecord
from clip_jax.data.sources.example import preferred  # noqa: F401 part of the format
from clip_jax.data.sources.ranges import version
from clip_jax.errors import UserError

BYTES = True
FOOTER = True  # `scan` reads the front alone
_FRONT = 2**16  # bytes of a shard's front that the first request asks for
_COLUMNS = 2**20  # bytes of the JSON of the columns, at most
_SIZE = struct.Struct("<I")
_UNREADABLE = "unreadable shard"
_MALFORMED = "malformed record"
# Types of the values of arrays, by the number that stands for them.
_TYPES = {8: "uint8", 9: "int8"}
_TYPES |= {bits + i: f"{kind}{bits}" for bits in (16, 32, 64) for i, kind in enumerate(("uint", "int", "float"))}
_ARRAY = re.compile(rf"ndarray(?::({'|'.join(_TYPES.values())})?(?::(\d+(?:,\d+)*))?)?")
_MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # channels of images that are not encoded
_fronts = Recent(256)


class _Front(NamedTuple):
    """What the front of a shard says.

    Attributes:
      offsets: int64 `[samples + 1]`, of the samples and of their end.
      names: list of str, the columns.
      sizes: list of int, the bytes of a value of each column; None where they differ.
      decoders: list of functions of the bytes of a value.
    """

    offsets: np.ndarray
    names: list
    sizes: list
    decoders: list


def scan(path, length=512):
    """Returns the blocks of a shard, `[(start, end, samples), ...]` in bytes, and `{reason: count}`.

    Reads the front of the shard alone. A truncated shard gives its complete samples. Raises UserError for a compressed
    shard and for columns of other encodings than those of docs/data.md.

    Args:
      path: of the shard.
      length: int, samples of a block.
    """
    if not path.endswith(".mds"):
        raise UserError(f"{path}: a compressed shard cannot be read by offset; decompress it")
    try:
        offsets = _front(path).offsets
    except EOFError:
        return [], Counter({_UNREADABLE: 1})
    size = remote.size(path)
    whole = int(np.searchsorted(offsets, size, "right")) - 1
    if whole < len(offsets) - 1:
        reason = "truncated shard" if whole > 0 else _UNREADABLE
        return _rows(offsets, max(whole, 0), length), Counter({reason: 1})
    return _rows(offsets, whole, length), Counter()


def _rows(offsets, count, length):
    starts = range(0, count, length)
    return [(int(offsets[i]), int(offsets[min(i + length, count)]), min(length, count - i)) for i in starts]


def read(path, start, end):
    """Returns the raw records of a block, a sequence; taking one whose values are malformed raises BadRecord.

    Raises EOFError where the shard is shorter than `end` or has other samples.

    Args:
      path: of the shard.
      start, end: ints, the block's range of bytes.
    """
    data = remote.read(path, start, end)
    if len(data) < end - start:
        raise EOFError
    front = _fronts.get(version(path), lambda key: _front(path))
    first, last = np.searchsorted(front.offsets, (start, end)).tolist()
    offsets = front.offsets[first : last + 1] - start
    if offsets[:1].tolist() != [0] or offsets[-1] != end - start:
        raise EOFError  # other samples than those of the blocks

    def record(index):
        begin, end = offsets[index : index + 2].tolist()
        try:
            spans = _spans(front.sizes, data, begin)
            if spans[-1] != end:
                raise BadRecord(_MALFORMED)
            values = [decode(data[a:b]) for decode, a, b in zip(front.decoders, spans, spans[1:], strict=False)]
        except (ValueError, KeyError, struct.error, IndexError, RecursionError):
            raise BadRecord(_MALFORMED) from None
        return dict(zip(front.names, values, strict=True))

    return Block(last - first, record)


def _spans(sizes, data, position):
    """Returns the offsets of the values of the sample at `position`, and of its end."""
    count = sizes.count(None)
    given = iter(struct.unpack_from(f"<{count}I", data, position))
    spans = [position + _SIZE.size * count]
    for size in sizes:
        spans.append(spans[-1] + (next(given) if size is None else size))
    return spans


def _front(path):
    """Returns the `_Front` of a shard.

    Raises EOFError for what is no front, and UserError for a column whose encoding is not known.
    """
    try:
        offsets, columns = _read_front(path)
        names, encodings = columns["column_names"], columns["column_encodings"]
        sizes = [size or None for size in columns["column_sizes"]]
        is_text = all(isinstance(value, str) for value in [*names, *encodings])
        is_size = all(size is None or isinstance(size, int) and size > 0 for size in sizes)
        if columns["version"] != 2 or not (len(names) == len(encodings) == len(sizes) and is_text and is_size):
            raise EOFError
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise EOFError from None
    return _Front(offsets, names, sizes, [_decoder(path, *pair) for pair in zip(names, encodings, strict=True)])


def _read_front(path):
    """Returns the offsets, int64 `[samples + 1]`, and the JSON of the columns."""
    front = remote.read(path, 0, _FRONT)
    count = _SIZE.unpack_from(front)[0]
    start = _SIZE.size * (count + 2)
    begin = _SIZE.unpack_from(front, _SIZE.size)[0]  # of the samples: the end of the front
    if not start <= begin <= start + _COLUMNS:
        raise ValueError
    if begin > len(front):
        front = remote.read(path, 0, begin)
    offsets = np.frombuffer(front, "<u4", count + 1, _SIZE.size).astype(np.int64)
    if (np.diff(offsets) < 0).any():
        raise ValueError
    return offsets, json.loads(front[start:begin])


def _decoder(path, name, encoding):
    """Returns the function that decodes the bytes of a value of a column."""
    kind = encoding.partition(":")[0]
    if array := _ARRAY.fullmatch(encoding):
        dtype = np.dtype(array[1]) if array[1] else None
        shape = tuple(map(int, array[2].split(","))) if array[2] else None
        return lambda data: _array(data, dtype, shape)
    if kind not in _DECODERS:
        known = ", ".join([*_DECODERS, "ndarray"])
        raise UserError(f"{path}: column {name!r} is encoded as {encoding!r}, which is not read; known are {known}")
    return _DECODERS[kind]


def _array(data, dtype, shape):
    """Returns an array; its type and shape are written before the values where the column does not fix them."""
    start = 0
    if dtype is None:
        dtype, start = np.dtype(_TYPES[data[0]]), 1
    if shape is None:
        dimensions, width = data[start] >> 2, 1 << (data[start] & 3)
        shape = np.frombuffer(data, f"<u{width}", dimensions, start + 1).tolist()
        start += 1 + width * dimensions
    return np.frombuffer(data, dtype.newbyteorder("<"), offset=start).reshape(shape)


def _picture(data):
    """Returns an image that is not encoded, uint8 `[h, w]` or `[h, w, channels]`."""
    width, height, size = struct.unpack_from("<3I", data)
    mode = data[12 : 12 + size].decode()
    shape = (height, width) if mode == "L" else (height, width, _MODES[mode])
    return np.frombuffer(data, np.uint8, offset=12 + size).reshape(shape)


def _number(kind):
    return lambda data: np.frombuffer(data, kind)[0].item()


def _text(data):
    return data.decode("utf-8", "surrogateescape")


_DECODERS = {
    **dict.fromkeys(("bytes", "jpeg", "png"), bytes),
    "str": _text,
    "int": _number("<i8"),
    **{f"{kind}{bits}": _number(f"<{kind[0]}{bits // 8}") for kind in ("uint", "int") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": _number(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "str_int": int,
    "str_float": float,
    "str_decimal": _text,
    "pil": _picture,
    "json": json.loads,
}
