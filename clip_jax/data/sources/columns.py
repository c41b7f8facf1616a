"""Columns: additional fields of a data set, one row per record in order, such as rewrites, captions and regions.

`SOURCE?columns=PATH` joins them to the records of SOURCE. PATH is one of

    NAME.jsonl, NAME.jsonl.xz   texts: a header, then one object per record, {"of": hash of its texts, FIELD: value}
    a folder                    features: FIELD.npy, arrays `[records, ...]`, and header.json
    NAME.parquet, or a folder   either: rows in the order of the records, read by row group, so that memory does not
      of .parquet files         grow with the data set. Without our header only the rows are counted
    FIELD.txt                   one text per line, as other programs write them; only the number of lines is checked
    a name                      columns of an embedded set, such as emoji_rewrites

The header identifies the data set that the columns were made of. Columns of another data set, or in another order, are
rejected.
"""

import contextlib
import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np

from clip_jax.data import blocks
from clip_jax.data.claim import claim
from clip_jax.data.files import FileReader
from clip_jax.data.records import DerivedSource, fingerprint
from clip_jax.data.sources.index import mapped
from clip_jax.data.sources.kept import column_of
from clip_jax.data.sources.parquet_columns import (
    ParquetRows,
    ParquetWriter,
    check_replaceable,
    check_same,
    is_parquet,
    write_arrays,
)
from clip_jax.data.sources.tfds import EMBEDDED
from clip_jax.errors import UserError


def _hash_texts(record):
    return hashlib.blake2b(json.dumps(record["texts"]).encode(), digest_size=4).hexdigest()


def _header(source, about):
    return {"source": source.name, "records": len(source), "fingerprint": fingerprint(source), "about": dict(about)}


def _check_header(header, source, path):
    """Raises UserError for columns of another data set."""
    if header["fingerprint"] != fingerprint(source):
        made_of = f"{header['source']}, {header['records']:,} records"
        raise UserError(f"columns={path} were made of another data set: {made_of}, not {source.name}, {len(source):,}")


def text_writer(path, source, about):
    """Returns the writer of text columns by the ending of a path: .jsonl is one file, .parquet a folder of parts."""
    if str(path).endswith(".parquet"):
        return ParquetWriter(path, _header(source, about), _hash_texts)
    return TextWriter(path, source, about)


class TextWriter:
    """Writes text columns of a source record by record, in order; resumes an existing file.

    Args:
      path: the file, NAME.jsonl.
      source: the source.
      about: dict for the header, what made the columns.

    Attributes:
      done: int, the number of records that are written.

    Raises UserError for another file name, an unwritable file, a file that another process writes, one that was made of
    another source or with another `about`, and one of something else.
    """

    def __init__(self, path, source, about):
        if not str(path).endswith(".jsonl"):
            raise UserError(f"{path}: the name of a file of texts ends in .jsonl or .parquet")
        header, self.done = _header(source, about), 0
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(open(path, "a+b"))
                claim(self._file, path)
                end = self._read(header, path)
                self._file.truncate(end)
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from None
            if not end:
                self._write(header)
            self._stack = stack.pop_all()

    def _read(self, header, path):
        """Returns the end of the whole lines, and counts them; raises UserError for another header."""
        end = 0
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):  # half-written
                if number == 0 and not _line(header).startswith(line):
                    raise UserError(f"{path} exists and holds something else; give another file")
                break
            if number == 0:
                check_same(_loads(line, path), json.loads(json.dumps(header)), path)
            self.done, end = number, end + len(line)
        return end

    def write(self, record, values):
        """Writes `values`, the fields of the next record; `record` is None for an unreadable one."""
        self._write({"of": _hash_texts(record) if record else None, **values})
        self.done += 1

    def _write(self, row):
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()


def _line(row):
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


@contextlib.contextmanager
def array_writer(folder, source, fields, about):
    """A context that yields arrays on disk, to be filled in, as columns of a source.

    The columns are valid only after the block has ended without an error. A process of this machine that has mapped
    former ones keeps them. One that maps them later, and a copy of the source in it, ends with an error.

    Args:
      folder: the folder to write. NAME.parquet holds Parquet files, made of NAME.parquet.arrays at the end.
      source: the source.
      fields: `{field: (shape, dtype)}` of one record.
      about: dict for the header, what made the columns.

    Yields:
      `{field: array [records, *shape]}` of zeros.

    Raises UserError when the folder cannot be written, and for NAME.parquet that holds something else than columns.
    """
    is_parquet, path = str(folder).endswith(".parquet"), str(folder)
    if is_parquet:
        check_replaceable(path)
    folder = Path(f"{folder}.arrays" if is_parquet else folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("header.json", *(f"{field}.npy" for field in fields)):  # without a header the columns are invalid
            (folder / name).unlink(missing_ok=True)
        arrays = {
            field: np.lib.format.open_memmap(folder / f"{field}.npy", "w+", dtype, (len(source), *shape))
            for field, (shape, dtype) in fields.items()
        }
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    yield arrays
    for array in arrays.values():
        array.flush()
    if is_parquet:
        write_arrays(path, arrays, _header(source, about))
        shutil.rmtree(folder)
        return
    (folder / "header.json").write_text(json.dumps(_header(source, about) | {"fields": sorted(arrays)}, indent=1))


class ColumnsSource(DerivedSource):
    """The records of a source with the fields of columns added.

    Args:
      source: the source that the columns were made of.
      path: str, see the docstring of this module.

    Raises UserError for columns that are missing, damaged, incomplete, or of another data set.
    """

    def __init__(self, source, path):
        super().__init__(source, f"{source.name}?columns={path}")
        shipped = EMBEDDED / "columns" / f"{path}.jsonl.xz"
        self._path = os.fspath(shipped) if shipped.is_file() else path
        kinds = {".jsonl": _Lines, ".xz": _Lines, ".txt": _PlainLines}
        kind = _Arrays if os.path.isdir(self._path) else kinds.get(os.path.splitext(self._path)[1])
        kind = _Parquet if is_parquet(self._path) else kind
        if kind is None or not (kind is _Parquet or os.path.exists(self._path)):
            allowed = ".jsonl, .jsonl.xz, .txt, .parquet, or a folder with header.json or with .parquet files"
            raise UserError(f"columns={path}: no such file or folder of columns ({allowed})")
        try:
            self._rows = kind(self._path, source)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
            raise UserError(f"columns={path}: damaged, or no columns ({type(error).__name__}: {error})") from None
        if len(self._rows) != len(source):
            raise UserError(
                f"columns={path}: {len(self._rows):,} rows, but {source.name} has {len(source):,} records; the command "
                "that makes them resumes where it stopped"
            )
        self.sequential, self.block_bytes = blocks.is_sequential(source), getattr(source, "block_bytes", None)
        self._starts = None

    def __getstate__(self):
        return self.__dict__ | {"_starts": None}

    @property
    def blocks(self):
        return getattr(self._source, "blocks", None)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        return record | self._rows.read(index, record)

    def column(self, field):
        """Returns the values of a field of all records in Parquet or in the source's columns, or None (`column_of`)."""
        fields = getattr(self._rows, "fields", None)  # those of other kinds are read with the records
        if fields is None:
            return None
        return self._rows.column(field) if field in fields else column_of(self._source, field)

    def read_block(self, number):
        """Returns the records of a block of the source, a sequence; rows of Parquet files are read for all of it."""
        if self._starts is None:
            self._starts = np.cumsum(self.blocks, dtype=np.int64) - self.blocks
        records, first = blocks.read_block(self._source, number), int(self._starts[number])
        rows = self._rows.span(first, len(records)) if isinstance(self._rows, _Parquet) else self._rows

        def make(index):
            record = records[index]
            return record | rows.read(first + index, record)

        return blocks.Block(len(records), make)


class _PlainLines:
    """One text per line. A compressed file is held in memory; of another, the offsets of its lines, 8 bytes each."""

    def __init__(self, path, source):
        self._path, self._files = path, FileReader()
        is_compressed = path.endswith(".xz")
        with lzma.open(path) if is_compressed else open(path, "rb") as file:
            lines = file.readlines() if is_compressed else file
            self._lines = lines if is_compressed else None
            self._ends = np.cumsum([0, *map(len, lines)])

    def __len__(self):
        return len(self._ends) - 1

    def line(self, index):
        if self._lines is not None:
            return self._lines[index]
        start, end = self._ends[index : index + 2].tolist()
        return self._files.read(self._path, start, end - start)

    def read(self, index, record):
        """Returns the fields of a record."""
        field = os.path.splitext(os.path.basename(self._path))[0]
        return {field: self.line(index).decode("utf-8", "surrogateescape").strip()}


class _Lines(_PlainLines):
    """A header, then one JSON object per line."""

    def __init__(self, path, source):
        super().__init__(path, source)
        _check_header(_loads(self.line(0), path), source, path)

    def __len__(self):
        return super().__len__() - 1

    def read(self, index, record):
        row = _loads(self.line(index + 1), self._path)
        if row.pop("of") not in (None, _hash_texts(record)):
            raise UserError(
                f"columns={self._path}, line {index + 2}: made of other texts than record {index} of the data set has"
            )
        return row


class _Arrays:
    """Arrays mapped into memory, once per process."""

    def __init__(self, folder, source):
        header = json.loads((Path(folder) / "header.json").read_text())
        _check_header(header, source, folder)
        self._paths = {field: os.path.join(folder, f"{field}.npy") for field in header["fields"]}
        self._stamps = {}
        lengths = {len(array) for array in self._map().values()}
        self._length = lengths.pop() if len(lengths) == 1 else 0

    def __getstate__(self):
        return self.__dict__ | {"_arrays": None}

    def _map(self):
        found = {field: mapped(path, self._stamps.get(field)) for field, path in self._paths.items()}
        self._arrays = {field: array for field, (array, _) in found.items()}
        self._stamps = {field: stamp for field, (_, stamp) in found.items()}
        return self._arrays

    def __len__(self):
        return self._length

    def read(self, index, record):
        return {field: np.asarray(array[index]) for field, array in (self._arrays or self._map()).items()}


class _Parquet:
    """Rows of Parquet files, see `parquet_columns.py`."""

    def __init__(self, path, source):
        self._path, self._rows = path, ParquetRows(path)
        if self._rows.header is not None:
            _check_header(self._rows.header, source, path)
        self.fields, self.column = self._rows.fields, self._rows.column

    def __len__(self):
        return len(self._rows)

    def read(self, index, record):
        return self.span(index, 1).read(index, record)

    def span(self, first, count):
        """Returns the rows of `count` records from `first` on, with `read`."""
        return _Span(self._path, first, self._rows.span(first, count), self._rows.has_hashes)


class _Span:
    def __init__(self, path, first, rows, has_hashes):
        self._path, self._first = path, first
        self._rows, self._has_hashes = rows, has_hashes

    def read(self, index, record):
        row = dict(self._rows[index - self._first])
        if self._has_hashes and row.pop("of") not in (None, _hash_texts(record)):
            raise UserError(
                f"columns={self._path}, row {index}: made of other texts than record {index} of the data set has"
            )
        return row


def _loads(line, path):
    """Returns the JSON object of a line; raises UserError."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    raise UserError(f"columns={path}: damaged: not a JSON object: {line[:60].decode('utf-8', 'replace')!r}")


def join(source, path):
    """Returns the source of "SOURCE?columns=PATH"; raises UserError as `ColumnsSource` does."""
    return ColumnsSource(source, path)
