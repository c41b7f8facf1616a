"""Blocks: records that lie one after the other and are read together, such as a byte range of a tar shard.

A source with blocks has two more attributes than `clip_jax.data.records.Source`:

    blocks               int64 `[blocks]`, the number of records of each block, in the order of the records
    read_block(number)   the records of a block, a sequence. Taking an unusable record raises BadRecord

A source may also have `column(field)`: the values of a field of all records, without reading these, or None. A slice
of them is an array of NumPy or Arrow. Selections are made of them (`clip_jax.data.sources.selection`).

Where single records cost a request, as in a bucket, `sequential` is True, and training reads whole blocks
(`data.order`). In any other source, 512 records in a row are a block.
"""

import abc
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from clip_jax.data.records import BaseSource

RUN = 512  # records of a block where the source does not say
_KEPT = 16  # blocks in memory for reading record by record


class Block(Sequence):
    """Records that are made when they are taken.

    Args:
      count: int, the number of records.
      make: a function of the index in the block, which returns the record or raises BadRecord.
    """

    def __init__(self, count, make):
        self._count, self._make = count, make

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


class BlockSource(BaseSource, abc.ABC):
    """A source that reads whole blocks; `source[index]` reads the block of the record and keeps it for a while.

    A subclass calls `_set_blocks` and has `read_block(number)`. A pickled copy starts with no block in memory.

    Args: as `BaseSource`.
    """

    blocks = None
    sequential = True

    def _set_blocks(self, sizes):
        """Sets `blocks`: `sizes` are the numbers of records of the blocks, ints `[blocks]`."""
        self.blocks = np.asarray(sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.blocks)])
        self._recent = Recent(_KEPT)

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, index):
        number, row = self._place(index)
        return self._recent.get(number, self.read_block)[row]

    def _place(self, index):
        """Returns the block of a record and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    @abc.abstractmethod
    def read_block(self, number):
        """Returns the records of a block, a sequence of `blocks[number]`."""


class Recent:
    """The values of a function for the keys that were asked for last; each is computed once, from any thread.

    Args:
      keep: int, this many values are kept.
    """

    def __init__(self, keep):
        self._keep, self._lock = keep, threading.Lock()
        self._values = OrderedDict()

    def __reduce__(self):
        return Recent, (self._keep,)

    def get(self, key, make):
        """Returns `make(key)`, from memory where it is there; an error of `make` is not kept."""
        with self._lock:
            future, is_new = self._values.get(key), key not in self._values
            if is_new:
                future = self._values[key] = Future()
            self._values.move_to_end(key)
            while len(self._values) > self._keep:
                self._values.popitem(last=False)
        if is_new:
            try:
                future.set_result(make(key))
            except BaseException as error:
                with self._lock:
                    self._values.pop(key, None)
                future.set_exception(error)
        return future.result()


def blocks_of(source):
    """Returns the numbers of records of a source's blocks, int64 `[blocks]`."""
    return runs(len(source)) if getattr(source, "blocks", None) is None else source.blocks


def runs(count):
    """Returns the sizes of blocks of `RUN` records, and a smaller last one, for `count` records, int64 `[blocks]`."""
    whole, rest = divmod(count, RUN)
    return np.append(np.full(whole, RUN), [rest][: rest > 0]).astype(np.int64)


def read_block(source, number):
    """Returns the records of a source's block, a sequence whose items may raise BadRecord."""
    if getattr(source, "blocks", None) is not None:
        return source.read_block(number)
    first = number * RUN
    return Block(min(RUN, len(source) - first), lambda index: source[first + index])


def is_sequential(source):
    """Returns whether single records of a source cost a request, so that training better reads whole blocks."""
    return bool(getattr(source, "sequential", False))
