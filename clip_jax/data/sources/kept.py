"""Which records of a source are kept, and the source of them: of a selection and of an index.

Kept records are held as one bit for each record of the source or, where few are kept, by their places.
"""

import bisect
import functools

import numpy as np

from clip_jax.data.blocks import Block, blocks_of, is_sequential, read_block
from clip_jax.data.records import DerivedSource
from clip_jax.data.shared import Shared

_SPARSE = 64  # where fewer than one record in 64 is kept, places of 8 bytes take less memory than bits
_SPAN = 2**22  # records whose bits are unpacked at once, a multiple of 8


def starts_of(source):
    """Returns the first record of each block of a source, then the number of all records, int64 `[blocks + 1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks_of(source))])


def keep(bits, starts):
    """Returns the kept records of a source, `Bits` or `Places`, whichever is smaller.

    Args:
      bits: uint8 `[records / 8]`, rounded up: of each record one bit, in the order of `np.packbits`.
      starts: `starts_of` the source.
    """
    kept = Bits(bits, starts)
    return kept if len(kept) * _SPARSE >= starts[-1] else Places(kept.between(0, len(kept)), starts)


class _Shareable:
    """What shares its arrays, the attributes `_names`, with its pickled copies."""

    _names, _shared = (), None

    def __getstate__(self):
        self._shared = self._shared or Shared([getattr(self, name) for name in self._names])
        return {"_shared": self._shared}

    def __setstate__(self, state):
        self._shared = state["_shared"]
        self.__dict__ |= dict(zip(self._names, self._shared.arrays, strict=True))


class Places(_Shareable):
    """Kept records by their places, increasing ints `[kept]`; `kept[number]` is a place.

    Attributes:
      firsts: int64 `[blocks + 1]`, the number of kept records before each block of the source, then that of all.
    """

    _names = ("_places", "_starts")

    def __init__(self, places, starts):
        self._places, self._starts = places, starts

    def __len__(self):
        return len(self._places)

    def __getitem__(self, number):
        return int(self._places[number])

    @functools.cached_property
    def firsts(self):
        # NumPy would copy the places to convert them to another type.
        return np.searchsorted(self._places, self._starts.astype(self._places.dtype)).astype(np.int64)

    def between(self, start, stop):
        """Returns the places of the kept records `start` to `stop` - 1, int64."""
        return np.asarray(self._places[start:stop], np.int64)

    def inside(self, block):
        """Returns the kept records of a block, as indices in the block, int64."""
        start, stop = self.firsts[block : block + 2].tolist()
        return self.between(start, stop) - int(self._starts[block])


class Bits(_Shareable):
    """Kept records by one bit for each record of the source; the attributes and methods are those of `Places`."""

    _names = ("_bits", "_starts", "firsts")

    def __init__(self, bits, starts):
        self._bits, self._starts = bits, starts
        self.firsts = np.empty(len(starts), np.int64)
        total, length = 0, int(starts[-1])
        for start in range(0, length, _SPAN):
            counts = np.cumsum(self._unpack(start, min(start + _SPAN, length)), dtype=np.int32)
            here = slice(*np.searchsorted(starts, (start, start + len(counts))))
            self.firsts[here] = total + np.append(np.int32(0), counts)[starts[here] - start]
            total += int(counts[-1])
        self.firsts[starts == length] = total

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, number):
        block = bisect.bisect_right(self.firsts, number) - 1
        return int(self._starts[block] + self.inside(block)[number - self.firsts[block]])

    def between(self, start, stop):
        if start >= stop:
            return np.empty(0, np.int64)
        first, last = (bisect.bisect_right(self.firsts, number) - 1 for number in (start, stop - 1))
        records = range(int(self._starts[first]), int(self._starts[last + 1]), _SPAN)
        found = [np.flatnonzero(self._unpack(at, min(at + _SPAN, records.stop))) + at for at in records]
        skipped = start - int(self.firsts[first])
        return np.concatenate(found)[skipped : skipped + stop - start]

    def inside(self, block):
        return np.flatnonzero(self._unpack(*self._starts[block : block + 2].tolist()))

    def _unpack(self, start, stop):
        """Returns whether each of the records from `start` to `stop` - 1 is kept, uint8."""
        return np.unpackbits(self._bits[start // 8 : -(-stop // 8)])[start % 8 : start % 8 + stop - start]


class KeptSource(DerivedSource):
    """The kept records of a source, in order. Its blocks are what is kept of the source's blocks.

    A subclass may change the records in `_make`.

    Args:
      source: the source.
      kept: `Bits` or `Places`.
      name: str, for messages.
    """

    def __init__(self, source, kept, name):
        super().__init__(source, name)
        self._kept = kept
        if getattr(source, "blocks", None) is not None:
            self.blocks, self.sequential = np.diff(kept.firsts), is_sequential(source)
            self.block_bytes = getattr(source, "block_bytes", None)

    def __len__(self):
        return len(self._kept)

    def __getitem__(self, index):
        return self._make(self._source[self._kept[index]], index)

    def read_block(self, number):
        """Returns the kept records of a block, a sequence; nothing is read where none is kept."""
        places = self._kept.inside(number).tolist()
        if not places:
            return Block(0, None)
        records, first = read_block(self._source, number), int(self._kept.firsts[number])
        return Block(len(places), lambda index: self._make(records[places[index]], first + index))

    def _make(self, record, index):
        """Returns the kept record `index` of the source's record."""
        return record

    def column(self, field):
        """Returns the values of a field of all records by the source's columns, or None (`column_of`)."""
        column = column_of(self._source, field)
        return None if column is None else _KeptColumn(column, self._kept)


class _KeptColumn:
    def __init__(self, column, kept):
        self._column, self._kept = column, kept

    def __getitem__(self, span):
        import pyarrow as pa

        places = self._kept.between(span.start, span.stop)
        cuts = np.searchsorted(places, np.arange(int(places[0]), int(places[-1]) + 1, _SPAN))
        parts = []
        for some in np.split(places, cuts[1:]):
            if len(some):
                values = self._column[int(some[0]) : int(some[-1]) + 1]
                parts.append((pa.array(values) if isinstance(values, np.ndarray) else values).take(some - some[0]))
        return pa.concat_arrays([array for part in parts for array in getattr(part, "chunks", [part])])


def column_of(source, field):
    """Returns the values of a field of all records without reading these, or None where the source has no such column.

    A slice of the values is a NumPy array, a `pyarrow.Array` or a `pyarrow.ChunkedArray`.
    """
    return source.column(field) if hasattr(source, "column") else None
