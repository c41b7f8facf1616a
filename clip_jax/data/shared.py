"""Arrays that worker processes share instead of copying."""

import os

import numpy as np

_LEAST = 2**22  # bytes; smaller arrays are copied


class Shared:
    """Arrays whose pickled copies use the same memory, where the system has anonymous files in memory (Linux).

    The memory is kept until the process that pickled them ends. Copies are read-only.

    Args:
      arrays: list of arrays `[n]`.

    Attributes:
      arrays: the arrays.
    """

    def __init__(self, arrays):
        self.arrays, self._path = [np.ascontiguousarray(array) for array in arrays], None

    def __reduce__(self):
        if self._path is None and sum(array.nbytes for array in self.arrays) >= _LEAST and hasattr(os, "memfd_create"):
            self._path = _place(self.arrays)
        if self._path is None:
            return Shared, (self.arrays,)
        return _attach, (self._path, [(array.dtype.str, len(array)) for array in self.arrays])


def _place(arrays):
    """Writes arrays to an anonymous file in memory; returns a path under which other processes open it."""
    number = os.memfd_create("clip_jax")
    with os.fdopen(number, "wb", closefd=False) as file:  # stays open, or the memory is gone
        for array in arrays:
            file.write(array.data)
            file.write(bytes(-array.nbytes % 16))
    return f"/proc/{os.getpid()}/fd/{number}"


def _attach(path, kinds):
    """Returns the `Shared` of the arrays that `_place` wrote; `kinds` are their (type, length)."""
    data = np.memmap(path, np.uint8, "r")
    start, arrays = 0, []
    for kind, length in kinds:
        size = np.dtype(kind).itemsize * length
        arrays.append(np.frombuffer(data, kind, length, start))
        start += size + -size % 16
    shared = Shared(arrays)
    shared._path = path
    return shared
