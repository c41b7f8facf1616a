"""Parquet files as shards. A block is one or more row groups; `start` and `end` are numbers of row groups.

Hugging Face's files and those of `img2dataset --output_format parquet` are read as they are, see `arrow_columns.py`.
Small row groups are joined to a block. A row group is read as a whole, because its pages cannot be found without
reading it: one with more than 2,048 rows is a block of its own, and a warning names the command that writes smaller
ones; one of more than 2 GiB is an error.

A block is read with one request for the bytes of its columns, or with one for each part where unread columns of images
lie between. The footers of 1,024 files are kept, compressed; with more files each block costs a request for the footer.
"""

import functools
import io
import zlib
from collections import Counter

from absl import logging

from clip_jax.data import remote
from clip_jax.data.blocks import Recent
from clip_jax.data.sources import arrow_columns
from clip_jax.data.sources.arrow_columns import preferred  # noqa: F401 part of the format
from clip_jax.data.sources.ranges import version
from clip_jax.errors import UserError

FOOTER = True  # `scan` reads a footer alone
COLUMNS = True  # `read` takes `column`
_LARGE = 4  # times the length of a block: row groups above are named in a warning
_MAX_BYTES = 2**31  # of a row group, uncompressed
_TAIL = 2**16  # bytes at the end of a file that the first request asks for
_GAP = 2**18  # bytes between columns that are read along with them
_tails = Recent(1024)  # compressed bytes of footers
_footers = Recent(32)
_size = functools.lru_cache(2**17)(remote.size)


def scan(path, length=512):
    """Returns the blocks of a file, `[(first row group, last row group + 1, rows), ...]`, and `{reason: count}`.

    Reads the footer alone. Raises UserError for a row group that is too large to be read.
    """
    try:
        footer, _ = _footer(path)
        arrow_columns.image_column(schema_of(path))
    except errors():
        return [], Counter({"unreadable shard": 1})
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    if large := [g for g in groups if g.num_rows > _LARGE * length or g.total_byte_size > _MAX_BYTES]:
        most, size = max(g.num_rows for g in large), max(g.total_byte_size for g in large)
        what = f"{path}: row groups of up to {most:,} rows, {size / 2**30:.2f} GiB"
        command = f"python -m clip_jax.tools.to_parquet {path} --out=FOLDER"
        if size > _MAX_BYTES:
            raise UserError(f"{what}, are too large, because each is read as a whole; write smaller ones: {command}")
        logging.warning("%s, are blocks that are read as a whole; %s writes smaller ones", what, command)
    return arrow_columns.joined([group.num_rows for group in groups], length), Counter()


def read(path, start, end, column=None):
    """Returns the raw records of the row groups `start` to `end - 1`.

    Args:
      path: the file.
      start, end: numbers of row groups.
      column: the column of images, or None to choose it.

    Raises EOFError when the file has fewer row groups or is shorter than its footer says.
    """
    schema = schema_of(path)
    image = arrow_columns.image_column(schema, column)
    try:
        found = batches(path, start, end, arrow_columns.kept_columns(schema, image))
    except errors() as error:
        if isinstance(error, EOFError):
            raise
        return arrow_columns.broken(sum(group_sizes(path)[start:end]), "corrupt row group")
    return arrow_columns.rows(found, image, path)


def block_bytes(path, start, end):
    """Returns the bytes of the row groups `start` to `end - 1` in the file, without columns that `read` leaves out."""
    schema = schema_of(path)
    columns = arrow_columns.kept_columns(schema, arrow_columns.image_column(schema))
    return sum(last - first for first, last in _spans(_footer(path)[0], range(start, end), columns))


def values(path, start, end, fields):
    """Returns `{field: values of all records}` of a block for those of the fields that the file has; reads no other."""
    schema = schema_of(path)
    image = arrow_columns.image_column(schema)
    names = [name for name in arrow_columns.kept_columns(schema, image) if name in fields and name != image]
    try:
        found = batches(path, start, end, names) if names else []
    except errors() as error:
        if isinstance(error, EOFError):
            raise
        return {}
    return {name: [value for batch in found for value in batch.column(name).to_pylist()] for name in names}


def batches(path, start, end, columns=None):
    """Returns some columns, by default all, of the row groups `start` to `end - 1`, as `pyarrow.RecordBatch`es.

    Raises EOFError as `read` does, and an error of pyarrow for damaged data.
    """
    import pyarrow.parquet as pq

    footer, size = _footer(path)
    if end > footer.num_row_groups:
        raise EOFError(path)
    columns, groups = schema_of(path).names if columns is None else columns, range(start, end)
    spans = _spans(footer, groups, columns)
    parts = [(first, remote.read(path, first, last)) for first, last in spans]
    if any(len(part) < last - first for (first, last), (_, part) in zip(spans, parts, strict=True)):
        raise EOFError(path)
    file = pq.ParquetFile(_Parts(parts, size), metadata=footer, pre_buffer=False)
    return file.read_row_groups(list(groups), columns=columns, use_threads=False).to_batches()


def schema_of(path):
    """Returns the `pyarrow.Schema` of a file."""
    return _footer(path)[0].schema.to_arrow_schema()


def group_sizes(path):
    """Returns the numbers of rows of a file's row groups, list of int."""
    footer = _footer(path)[0]
    return [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]


def classes(path):
    """Returns `{column: class names}` that the file's schema holds."""
    return arrow_columns.class_names(schema_of(path))


def errors():
    """Returns the classes of the errors of damaged files."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)


def _footer(path):
    """Returns the `pyarrow.parquet.FileMetaData` of a file and the file's size in bytes."""
    return _footers.get(version(path), _read_footer)


def _read_footer(key):
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, tail = _tails.get(key, _read_tail)
    return pq.read_metadata(pa.BufferReader(zlib.decompress(tail))), size


def _read_tail(key):
    """Returns the size of a file and its compressed end, from the footer on."""
    path, size, _ = key
    size = size or _size(path)
    tail = remote.read(path, max(0, size - _TAIL), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= size:
        tail = remote.read(path, size - length, size)
    return size, zlib.compress(tail[-length:], 1)


def _spans(footer, groups, columns):
    """Returns the `[start, end)` byte ranges of some columns of row groups; neighbours are one range."""
    leaves = [f"{footer.schema.column(number).path}." for number in range(footer.num_columns)]
    wanted = [number for number, leaf in enumerate(leaves) if any(leaf.startswith(f"{name}.") for name in columns)]
    chunks = []
    for group in map(footer.row_group, groups):
        for chunk in map(group.column, wanted):
            first = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                first = min(first, chunk.dictionary_page_offset)
            chunks.append((first, first + chunk.total_compressed_size))
    spans = []
    for first, last in sorted(chunks):
        if spans and first - spans[-1][1] <= _GAP:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans


class _Parts(io.RawIOBase):
    """A file of which some parts are in memory; reading outside of them raises OSError.

    Args:
      parts: `[(offset, bytes), ...]`.
      size: of the whole file.
    """

    def __init__(self, parts, size):
        self._parts, self._size = parts, size
        self._place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self._place

    def seek(self, offset, whence=io.SEEK_SET):
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size=-1):
        end = self._size if size is None or size < 0 else min(self._place + size, self._size)
        for first, data in self._parts:
            if first <= self._place and end <= first + len(data):
                found = memoryview(data)[self._place - first : end - first]
                self._place = end
                return bytes(found)
        if self._place == end:
            return b""
        raise OSError(f"bytes {self._place} to {end} are not in memory")
