"""Columns of a data set as Parquet: a file, or a folder of files, whose rows are in the order of the records.

Rows are read by row group, so that memory does not grow with the data set. A writer makes a folder of parts; a part is
written at once, and a writer that is started again continues after the last whole part.
"""

import bisect
import contextlib
import glob
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from clip_jax.data import remote
from clip_jax.data.blocks import Block, Recent
from clip_jax.data.claim import claimed_folder
from clip_jax.data.replacing import replacing
from clip_jax.data.sources import arrow_columns, parquet
from clip_jax.data.sources.parquet_values import ParquetColumn
from clip_jax.errors import UserError

_HEADER = b"clip_jax.columns"  # key of the header in a file's metadata
_GROUP = 512  # rows of a row group that a writer makes
_PART = 2**16  # rows of a part
_LARGE = 2**14  # rows of a row group: larger ones are named in a warning
_KEPT = 8  # row groups in memory
_LATER = {"model", "texts"}  # of `about` of retrieved captions: earlier versions wrote neither


def is_parquet(path):
    """Returns whether a path is a Parquet file, a pattern of them, or a local folder of them."""
    return path.endswith(".parquet") or bool(glob.glob(os.path.join(glob.escape(path), "*.parquet")))


class ParquetRows:
    """The rows of columns.

    Args:
      path: a file, a pattern or address of files, or a local folder of them.

    Attributes:
      header: dict of the data set that the columns were made of; None for files of other programs.
      fields: set of the names of the columns.
      has_hashes: whether each row has the hash of its record's texts in a column `of`.

    Raises UserError for a missing or damaged file.
    """

    def __init__(self, path):
        files = os.path.join(glob.escape(path), "*.parquet") if os.path.isdir(path) else path
        self._path, self._files = path, remote.expand(files)
        try:
            with ThreadPoolExecutor(16) as pool:
                sizes = list(pool.map(parquet.group_sizes, self._files))
            metadata = parquet.schema_of(self._files[0]).metadata or {}
        except parquet.errors() as error:
            raise UserError(f"columns={path}: damaged ({type(error).__name__}: {str(error).splitlines()[0]})") from None
        self.header = json.loads(metadata[_HEADER]) if _HEADER in metadata else None
        self.fields = set(parquet.schema_of(self._files[0]).names)
        self.has_hashes = self.header is not None and "of" in self.fields
        self._arrays = (self.header or {}).get("arrays", {})
        self._groups = np.array([(f, g) for f, some in enumerate(sizes) for g in range(len(some))], np.int32)
        counts = np.array([count for some in sizes for count in some], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._recent = Recent(_KEPT)
        if (largest := int(counts.max(initial=0))) > _LARGE:
            command = f"python -m clip_jax.tools.to_parquet '{files}' --out=FOLDER"
            logging.warning(
                "columns=%s: row groups of up to %d rows are slow; %s writes smaller", path, largest, command
            )

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, index):
        """Returns the fields of a record, a dict."""
        return self.span(index, 1)[0]

    def span(self, first, count):
        """Returns the fields of `count` records from `first` on, a sequence of dicts; reads the row groups they lie in.

        Taking an unreadable row raises BadRecord.
        """
        places = []
        number = bisect.bisect_right(self._starts, first) - 1
        while len(places) < count:
            group = self._recent.get(number, self._group)
            start = first + len(places) - int(self._starts[number])
            places += [(group, i) for i in range(start, min(len(group), start + count - len(places)))]
            number += 1

        def make(index):
            group, i = places[index]
            row = group[i]
            arrays = {f: np.frombuffer(row[f], dtype).reshape(shape) for f, (shape, dtype) in self._arrays.items()}
            return row | arrays

        return Block(count, make)

    def column(self, field):
        """Returns the `ParquetColumn` of a field; None for arrays."""
        return None if field in self._arrays else ParquetColumn(self._files, self._groups, self._starts, field)

    def _group(self, number):
        file, group = self._groups[number].tolist()
        path = self._files[file]
        try:
            return arrow_columns.rows(parquet.batches(path, group, group + 1), None, path)
        except parquet.errors() as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"columns={self._path}: {path} is damaged ({type(error).__name__}: {reason})") from None


class ParquetWriter:
    """Writes columns of a source record by record, in order, as a folder of Parquet files; resumes an existing folder.

    Args:
      path: the folder, NAME.parquet.
      header: dict that identifies the source and what made the columns.
      hash_of: a function of a record that returns the hash of its texts.

    Attributes:
      done: int, the number of records that are written.

    Raises UserError when the folder cannot be written, is written by another process, or has another header.
    """

    def __init__(self, path, header, hash_of):
        self._folder, self._header = str(path), header
        self._hash_of, self._rows = hash_of, []
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self._folder, exist_ok=True)
                stack.enter_context(claimed_folder(self._folder))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from None
            self._part, self.done = len(_parts(path)), 0
            if self._part:
                found = ParquetRows(self._folder)
                check_same(found.header or {}, json.loads(json.dumps(header)), path)
                self.done = len(found)
            self._stack = stack.pop_all()

    def write(self, record, values):
        """Writes `values`, the fields of the next record; `record` is None for an unreadable one."""
        self._rows.append({"of": self._hash_of(record) if record else None, **values})
        self.done += 1
        if len(self._rows) == _PART:
            self._flush()

    def _flush(self):
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys(name for row in self._rows for name in row)
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in self._rows])
        table = table.replace_schema_metadata({_HEADER: json.dumps(self._header).encode()})
        with replacing(os.path.join(self._folder, f"part-{self._part:06d}.parquet")) as file:
            pq.write_table(table, file, row_group_size=_GROUP)
        self._part, self._rows = self._part + 1, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._stack:
            if self._rows:
                self._flush()


def check_replaceable(path):
    """Raises UserError when a path holds something else than arrays, which `write_arrays` would replace."""
    try:
        is_other = os.path.isdir(path) and _parts(path) and "arrays" not in (ParquetRows(path).header or {})
    except UserError:
        raise UserError(f"{path} is damaged; remove it, or give another name") from None
    if is_other or os.path.isfile(path):
        raise UserError(f"{path} exists and holds something else than columns; give another name")


def write_arrays(path, arrays, header):
    """Writes arrays as columns, a folder of Parquet files; replaces an existing one, see `check_replaceable`.

    Args:
      path: the folder, NAME.parquet.
      arrays: `{field: array [records, ...]}`, all of one length, which may be mapped from files.
      header: dict that identifies the source and what made the columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    os.makedirs(path, exist_ok=True)
    for name in _parts(path):
        os.remove(os.path.join(path, name))
    kinds = {field: pa.binary(array[:1].nbytes) for field, array in arrays.items()}
    shapes = {field: (array.shape[1:], array.dtype.str) for field, array in arrays.items()}
    schema = pa.schema([*kinds.items()], {_HEADER: json.dumps(header | {"arrays": shapes})})
    length = len(next(iter(arrays.values())))
    for part, first in enumerate(range(0, length, _PART)):
        with (
            replacing(os.path.join(path, f"part-{part:06d}.parquet")) as file,
            pq.ParquetWriter(file, schema, use_dictionary=False) as writer,
        ):
            for start in range(first, min(first + _PART, length), _GROUP):
                rows = {field: array[start : min(start + _GROUP, first + _PART)] for field, array in arrays.items()}
                columns = [
                    pa.FixedSizeBinaryArray.from_buffers(kinds[field], len(some), [None, pa.py_buffer(some.tobytes())])
                    for field, some in rows.items()
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=_GROUP)


def _parts(path):
    """Returns the sorted names of the parts in a folder."""
    return sorted(name for name in os.listdir(path) if re.fullmatch(r"part-\d{6}\.parquet", name))


def check_same(old, header, path):
    """Raises UserError when an existing file of columns has another header than the one to be written."""
    about = old.get("about")
    if isinstance(about, dict) and "captioner" in about and not about.keys() & _LATER:
        header = header | {"about": {key: value for key, value in header["about"].items() if key not in _LATER}}
    if old != header:
        differs = next((key for key in header if old.get(key) != header[key]), "header")
        raise UserError(f"{path} exists, but was made with another {differs}: {old.get(differs)}; give another file")
