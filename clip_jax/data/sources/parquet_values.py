"""The values of a column of Parquet files, in order, for selections."""

import bisect

import numpy as np

from clip_jax.data.sources import parquet
from clip_jax.errors import UserError

_READ = 2**18  # values that are read at once, or one row group


class ParquetColumn:
    """A column; `column[start:stop]` is a `pyarrow.ChunkedArray`. Neighbouring row groups are read at once and kept.

    Args:
      files: list of paths.
      groups: int array `[groups, 2]` of (number of the file, number of the row group).
      starts: int64 `[groups + 1]`, the number of values before each row group, then that of all.
      name: the name of the column.
      is_list: bool, whether a row is a list of values.
    """

    def __init__(self, files, groups, starts, name, is_list=False):
        self._files, self._groups = files, groups
        self._starts = starts
        self._name, self._is_list = name, is_list
        self._span, self._values = range(0), None  # what was read last

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, span):
        """Returns the values of a slice; raises UserError for a damaged file."""
        import pyarrow as pa

        at, stop, _ = span.indices(len(self))
        kind = parquet.schema_of(self._files[0]).field(self._name).type
        parts = []
        while at < stop:
            if at not in self._span:
                self._read(at)
            end = min(stop, self._span.stop)
            parts += self._values.slice(at - self._span.start, end - at).chunks
            at = end
        return pa.chunked_array(parts, kind.value_type if self._is_list else kind)

    def _read(self, at):
        """Reads the row group of value `at` and some that follow in its file."""
        import pyarrow as pa

        first = bisect.bisect_right(self._starts, at) - 1
        file, group = self._groups[first].tolist()
        last = max(first + 1, bisect.bisect_right(self._starts, int(self._starts[first]) + _READ) - 1)
        last = first + int(np.searchsorted(self._groups[first:last, 0], file, "right"))
        path = self._files[file]
        try:
            batches = parquet.batches(path, group, group + last - first, [self._name])
        except parquet.errors() as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise UserError(f"{path}: column {self._name!r} is damaged ({reason})") from None
        arrays = [batch.column(0) for batch in batches]
        self._values = pa.chunked_array([array.flatten() if self._is_list else array for array in arrays])
        self._span = range(int(self._starts[first]), int(self._starts[last]))
