"""Tables of the filter: counts on disk of which each part fits into memory, and near duplicates of images."""

import array
import collections
import contextlib
import itertools
import os

import numpy as np

from clip_jax.data import decode

_BUFFER = 2**21  # rows of a table in memory; a row takes 16 bytes


class Table:
    """Rows (key, value) of uint64 on disk, 16 bytes each, in 256 files by the key's first byte.

    Each file fits into memory.

    Args:
      folder: for the files.
      name: the beginning of their names.
      sums: whether values of one key may be added up before they are written.

    Attributes:
      bytes: number of bytes written.
    """

    def __init__(self, folder, name, sums=False):
        self._path, self._sums = os.path.join(folder, name), sums
        self.bytes = 0
        self._keys, self._values = array.array("Q"), array.array("Q")

    def add(self, keys, values):
        """Adds rows: keys and values are uint64 `[n]`."""
        self._keys.frombytes(keys.tobytes())
        self._values.frombytes(values.tobytes())
        if len(self._keys) >= _BUFFER:
            self._flush()

    def _flush(self):
        keys, values = np.array(self._keys, np.uint64), np.array(self._values, np.uint64)
        self._keys, self._values = array.array("Q"), array.array("Q")
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        if self._sums and len(keys):
            keys, first = np.unique(keys, return_index=True)
            values = np.add.reduceat(values, first)
        ends = np.searchsorted(keys >> np.uint64(56), np.arange(256), "right").tolist()
        for part, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            if start < end:
                with open(f"{self._path}.{part:02x}", "ab") as file:
                    np.stack([keys[start:end], values[start:end]], 1).tofile(file)
        self.bytes += 16 * len(keys)

    def parts(self):
        """Yields the keys and values, uint64 `[n]`, of one file at a time, sorted by key, then by value."""
        self._flush()
        for part in range(256):
            with contextlib.suppress(FileNotFoundError):
                rows = np.fromfile(f"{self._path}.{part:02x}", np.uint64).reshape(-1, 2)
                order = np.lexsort((rows[:, 1], rows[:, 0]))
                yield rows[order, 0], rows[order, 1]

    def more_than(self, limit):
        """Returns the sorted keys, uint64 `[n]`, that have more than `limit` distinct values."""
        found = [np.zeros(0, np.uint64)]
        for keys, values in self.parts():
            is_new = np.ones(len(keys), bool)
            is_new[1:] = (keys[1:] != keys[:-1]) | (values[1:] != values[:-1])
            unique, counts = np.unique(keys[is_new], return_counts=True)
            found.append(unique[counts > limit])
        return np.concatenate(found)

    def most_frequent(self, size, path):
        """Returns the keys whose values have the largest sums.

        Keys of equal sums are all among them, or none of them is.

        Args:
          size: at most this many keys.
          path: the file of the keys, which is mapped into memory.

        Returns:
          `(keys, facts)`: the sorted keys, uint64 `[n]`, or None when they are all the keys; counts for the report.
        """
        histogram = collections.Counter()
        for sums in (sums for _, sums in self._summed()):
            histogram.update(dict(zip(*(x.tolist() for x in np.unique(sums, return_counts=True)), strict=True)))
        total, taken = histogram.total(), 0
        least = max(histogram, default=0) + 1
        for count, keys in sorted(histogram.items(), reverse=True):
            if taken + keys > size:
                break
            taken, least = taken + keys, count
        facts = {"different": total, "kept": taken, "occurrences_of_the_rarest_kept": least}
        if taken == total:
            return None, facts
        with open(path, "wb") as file:
            for keys, sums in self._summed():
                keys[sums >= least].tofile(file)
        return np.memmap(path, np.uint64, "r") if taken else np.zeros(0, np.uint64), facts

    def _summed(self):
        for keys, values in self.parts():
            unique, first = np.unique(keys, return_index=True)
            yield unique, np.add.reduceat(values, first)


def contains(keys, wanted):
    """Returns which of `wanted`, uint64 `[n]`, are among the sorted `keys`, uint64 `[m]`: bool `[n]`."""
    wanted = np.asarray(wanted, np.uint64)
    if not len(keys):
        return np.zeros(wanted.shape, bool)
    return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted


def image_hash(image):
    """Returns the 16-byte hash of an image.

    The image is reduced to 9 x 9 grey pixels. Each bit says whether a pixel is brighter than its left or upper
    neighbour. An opened JPEG whose pixels are not read yet is read at a reduced scale, and has that size afterwards.
    Raises BadRecord for an unreadable image.
    """
    image = decode.open_image(image)
    image, _ = decode.shrink_on_load(image, (0, 0, *image.size), 9)
    grey = np.asarray(decode.resize(decode.flatten(image).convert("L"), (9, 9), decode.Image.Resampling.BOX))
    return np.packbits([grey[:8, 1:] > grey[:8, :-1], grey[1:, :8] > grey[:-1, :8]]).tobytes()


class NearDuplicates:
    """A set of 16-byte hashes that also contains every hash within some bits of one of them.

    Two hashes that differ in d bits agree in one of d + 1 pieces. Tables of the pieces find the candidates.

    Args:
      hashes: 16 bytes each.
      distance: the number of bits, at most 15.
    """

    def __init__(self, hashes, distance):
        self._distance = distance
        self._pieces = [(p[0], p[-1] + 1) for p in np.array_split(np.arange(16), distance + 1)]
        self._tables = [collections.defaultdict(set) for _ in self._pieces]
        for known in set(hashes):
            for table, (start, end) in zip(self._tables, self._pieces, strict=True):
                table[known[start:end]].add(known)

    def __contains__(self, wanted):
        number = int.from_bytes(wanted)
        found = (
            table.get(wanted[start:end], ()) for table, (start, end) in zip(self._tables, self._pieces, strict=True)
        )
        return any(
            (int.from_bytes(known) ^ number).bit_count() <= self._distance
            for known in itertools.chain.from_iterable(found)
        )
