"""The records of a subset that DataComp publishes: `SOURCE?uids=FILE.npy`.

A subset is a sorted array of pairs of uint64, the upper and the lower half of a sample's 128-bit uid, which the field
`uid` has as 32 hexadecimal digits (Gadre et al. 2023; the format is that of resharder.py in mlfoundations/datacomp).
"""

import io

import numpy as np
from absl import logging

from clip_jax.data import remote
from clip_jax.data.sources import field_values
from clip_jax.data.sources.kept import KeptSource, column_of, keep, starts_of
from clip_jax.errors import UserError

_FIELD = "uid"
_PAIR = np.dtype("u8,u8")
_DIGITS = 32
_NO_DIGIT = 255
_VALUES = np.full(256, _NO_DIGIT, np.uint8)  # of hexadecimal digits, by their character
for _value, _pair in enumerate(zip("0123456789abcdef", "0123456789ABCDEF", strict=True)):
    _VALUES[[ord(character) for character in _pair]] = _value
_BITS = 16  # upper bits of a uid, by which a search begins
_SORTED = 2**20  # pairs that are compared at once to see whether a file is sorted


def join(source, path):
    """Returns the source of "SOURCE?uids=FILE.npy": the records whose uid is in the file, in their order.

    The file is mapped into memory. Uids are read from the column `uid` of a manifest, else from all records.

    Raises UserError for a file that is no subset, records without uids, and when no record is left.
    """
    name, subset = f"{source.name}?uids={path}", Subset(path)
    if column_of(source, _FIELD) is None:
        logging.info(
            "%s: reading %d records for their uids; a manifest with --columns=uid saves this", name, len(source)
        )
    bits, with_uid = np.zeros(-(-len(source) // 8), np.uint8), 0
    for start, count, values in field_values.chunks(source, {_FIELD}, "", name):
        codes, halves = values[_FIELD].codes, halves_of(values[_FIELD].distinct)
        with_uid += int((codes >= 0).sum())
        kept = np.append(subset.contains(*halves), False)[codes]
        bits[start // 8 : -(-(start + count) // 8)] = np.packbits(kept)
    if not bits.any():
        raise UserError(f"{name}: no record is left: of {with_uid:,} uids of the records none is in the file")
    return KeptSource(source, keep(bits, starts_of(source)), name)


def halves_of(uids):
    """Returns the upper and the lower halves of uids, uint64 `[n]` each, and which are uids, bool `[n]`.

    Args:
      uids: list of str, hexadecimal digits; leading zeros may be missing.
    """
    text = "".join(uids if set(map(len, uids)) <= {_DIGITS} else map(_padded, uids))
    characters = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    digits = _VALUES[characters.reshape(-1, _DIGITS)]
    halves = (digits[:, ::2] << 4 | digits[:, 1::2]).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1], (digits != _NO_DIGIT).all(1)


def _padded(uid):
    """Returns a uid with its leading zeros; what is too long becomes no uid."""
    return uid.rjust(_DIGITS, "0") if len(uid) <= _DIGITS else "-" * _DIGITS


class Subset:
    """The pairs of a file, sorted.

    Args:
      path: of a .npy file of dtype u8,u8.

    Raises UserError for a missing file and another dtype.
    """

    def __init__(self, path):
        try:
            pairs = np.load(io.BytesIO(remote.read(path))) if remote.is_remote(path) else np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(f"uids={path}: no such file") from None
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"uids={path}: not readable as .npy: {str(error).splitlines()[0]}") from None
        if pairs.dtype != _PAIR or pairs.ndim != 1:
            raise UserError(f"uids={path}: must hold pairs of uint64 (dtype u8,u8), not {pairs.dtype} {pairs.shape}")
        self._high, self._low = pairs["f0"], pairs["f1"]
        if not self._is_sorted():
            order = np.lexsort((self._low, self._high))
            self._high, self._low = self._high[order], self._low[order]
        edges = np.arange(2**_BITS, dtype=np.uint64) << np.uint64(64 - _BITS)
        bounds = (np.zeros(2**_BITS, np.int64), np.full(2**_BITS, len(self)))
        self._buckets = np.append(self._count_below(edges, np.zeros_like(edges), *bounds), len(self))

    def __len__(self):
        return len(self._high)

    def _is_sorted(self):
        for start in range(0, len(self), _SORTED):
            high, low = (half[start : start + _SORTED + 1] for half in (self._high, self._low))
            if ((high[1:] < high[:-1]) | (high[1:] == high[:-1]) & (low[1:] < low[:-1])).any():
                return False
        return True

    def contains(self, high, low, valid):
        """Returns bool `[n]`: which of some uids are in the subset; the arguments are what `halves_of` returns."""
        bucket = (high >> np.uint64(64 - _BITS)).astype(np.int64)
        place = self._count_below(high, low, self._buckets[bucket], self._buckets[bucket + 1])
        found = np.flatnonzero(valid & (place < len(self)))
        contained, place = np.zeros(len(high), bool), place[found]
        contained[found] = (self._high[place] == high[found]) & (self._low[place] == low[found])
        return contained

    def _count_below(self, high, low, first, last):
        """Returns how many pairs are below some uids, int64 `[n]`: numbers from `first` to `last`, found bit by bit.

        NumPy's own search would copy the mapped file.
        """
        place = first.copy()
        for bit in reversed(range(int((last - first).max(initial=0)).bit_length())):
            ahead = place + (1 << bit)
            at = np.minimum(ahead, last) - 1
            found = self._high[at]
            is_below = (found < high) | (found == high) & (self._low[at] < low)
            place = np.where((ahead <= last) & is_below, ahead, place)
        return place
