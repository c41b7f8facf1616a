"""ArrayRecord shards of `tf.train.Example`, read without TensorFlow; the format of `shards`, and local files by record.

A block is a run of records; `start` and `end` are record numbers. The number of records is in a file's footer. The
library `array_record` has its own access to files, without this package's retries and cache: only local files are read.
"""

import re
import resource
from collections import Counter

from clip_jax.data import remote
from clip_jax.data.blocks import Block, Recent
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import example
from clip_jax.data.sources.example import preferred  # noqa: F401 part of the format
from clip_jax.data.sources.ranges import version
from clip_jax.data.sources.shards import ShardSource
from clip_jax.errors import UserError

FOOTER = True
_BAD = "unreadable record"
# Files that stay open, at most half of those that the process may open.
_readers = Recent(min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def check(path):
    """Raises UserError for a remote file."""
    if remote.is_remote(path):
        raise UserError(
            f"{path}: ArrayRecord files are read from a local disk or mount alone; copy them there, or write tar, "
            "Parquet or TFRecord shards"
        )


def scan(path, length=512):
    """Returns the blocks of a file, `[(first record, last record + 1, records), ...]`, and `{reason: count}`.

    A group of records that are compressed together is never cut. Raises UserError for a remote file.

    Args:
      path: the file.
      length: int, records of a block; more where a group is larger.
    """
    reader = _reader(path)
    if not reader.ok():
        return [], Counter({"unreadable shard": 1})
    count, group = reader.num_records(), re.search(r"group_size:(\d+)", reader.writer_options_string() or "")
    group = int(group[1]) if group else 1
    step = max(length // group, 1) * group
    return [(start, min(start + step, count), min(step, count - start)) for start in range(0, count, step)], Counter()


def read(path, start, end):
    """Returns the raw records of a block, a sequence, read by one call.

    Taking a record raises BadRecord where the file is damaged there or the record is no `tf.train.Example`. Raises
    EOFError where the file has fewer records than `end`, and UserError for a remote file.

    Args:
      path: the file.
      start, end: ints, the first record and the last one + 1.
    """
    reader = _reader(path)
    if end > reader.num_records():
        raise EOFError
    try:
        found = reader.read(start, end)
    except RuntimeError:  # one damaged chunk fails the call
        return Block(end - start, lambda index: read_one(path, start + index))
    return Block(end - start, lambda index: example.parse(found[index]))


def block_bytes(path, start, end):
    """Returns the mean bytes of as many records of a file as a block has."""
    return remote.size(path) * (end - start) / _reader(path).num_records()


def read_one(path, number):
    """Returns a raw record of a file; raises BadRecord as taking one of `read` does."""
    try:
        data = _reader(path).read([number])[0]
    except (RuntimeError, IndexError):
        raise BadRecord(_BAD) from None
    return example.parse(data)


def _reader(path):
    """Returns the open reader of a file. A file that was written again is opened again.

    Raises UserError for a missing and a remote file.
    """
    check(path)
    return _readers.get(version(path), lambda key: _open(path))


def _open(path):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768)


class ArrayRecordSource(ShardSource):
    """Local ArrayRecord files, read by record or by block. The arguments are those of `ShardSource`.

    A feature with one value is read as a scalar, another as a list. The image field is a feature that holds an encoded
    image, unless one is named.
    """

    sequential = False

    def __getitem__(self, index):
        number, row = self._place(index)
        return self._canonical(read_one(self._shards[self._rows.shard[number]], int(self._rows.start[number]) + row))


local_source = ArrayRecordSource
