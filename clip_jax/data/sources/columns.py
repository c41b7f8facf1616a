"""Columns: fields that lie beside a data set, one row for each of its records in order, such as rewrites, captions, regions, neighbours.

`SPEC?columns=PATH` joins them to the records of SPEC. PATH is one of

    NAME.jsonl, NAME.jsonl.xz   texts: a header, then an object a record, {"of": check of the record's texts, field: value, ...}
    a folder                    features: FIELD.npy, arrays [records, ...], and header.json
    FIELD.txt                   one text a line, as other programs write them; their number is all that can be checked
    a name                      columns of an embedded set, such as emoji_rewrites

The header says what data set they were made of; columns of another one, or in another order, are refused.
"""

import contextlib
import hashlib
import json
import lzma
import os
from pathlib import Path

import numpy as np

from clip_jax.data.files import FileReader
from clip_jax.data.records import BaseSource, fingerprint
from clip_jax.data.sources.tfds import EMBEDDED
from clip_jax.errors import UserError


def _check(record):
    """A hash of the texts of a record."""
    return hashlib.blake2b(json.dumps(record["texts"]).encode(), digest_size=4).hexdigest()


def _header(source, about):
    return {"source": source.name, "records": len(source), "fingerprint": fingerprint(source), "about": dict(about)}


def _check_header(header, source, path):
    """Raises UserError for columns of another data set."""
    if header["fingerprint"] != fingerprint(source):
        made_for = f"{header['source']}, {header['records']:,} records"
        raise UserError(f"columns={path} were made of another data set: {made_for}, not {source.name}, {len(source):,}")


class TextWriter:
    """Writes text columns of a source record by record, in order; of a file that is there already it goes on.

    about: goes into the header: what made the columns. A file made with something else is refused, with UserError.
    Attribute `done`: the number of records that are written.
    """

    def __init__(self, path, source, about):
        if not str(path).endswith(".jsonl"):
            raise UserError(f"{path}: the name of a file of texts ends in .jsonl")
        header, self.done, end = _header(source, about), 0, 0
        try:
            self._file = open(path, "a+b")
            self._file.seek(0)
            for number, line in enumerate(self._file):
                if not line.endswith(b"\n"):  # half-written
                    break
                if number == 0 and (old := _loads(line, path)) != json.loads(json.dumps(header)):
                    differs = next((key for key in header if old.get(key) != header[key]), "header")
                    raise UserError(
                        f"{path} exists, but was made with another {differs}: {old.get(differs)}; give another file"
                    )
                self.done, end = number, end + len(line)
            self._file.truncate(end)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        if not end:
            self._write(header)

    def write(self, record, values):
        """The fields of the next record; None for a record that cannot be read."""
        self._write({"of": _check(record) if record else None, **values})
        self.done += 1

    def _write(self, row):
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@contextlib.contextmanager
def array_writer(folder, source, fields, about):
    """Gives, to be filled in, zeros `[records, *shape]` on disk for each field of `{field: (shape, dtype)}`: columns of a source.

    They count only once the block has ended without an error. Raises UserError when the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "header.json").unlink(missing_ok=True)  # until all are whole there are none
        arrays = {
            field: np.lib.format.open_memmap(folder / f"{field}.npy", "w+", dtype, (len(source), *shape))
            for field, (shape, dtype) in fields.items()
        }
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    yield arrays
    for array in arrays.values():
        array.flush()
    (folder / "header.json").write_text(json.dumps(_header(source, about) | {"fields": sorted(arrays)}, indent=1))


class ColumnsSource(BaseSource):
    """The records of a source with the fields of columns beside their own."""

    def __init__(self, source, path):
        """Raises UserError for columns that are missing, damaged, not complete, or of another data set."""
        super().__init__(f"{source.name}?columns={path}")
        self.class_names, self.broken, self._source = source.class_names, source.broken, source
        shipped = EMBEDDED / "columns" / f"{path}.jsonl.xz"
        self._path = os.fspath(shipped) if shipped.is_file() else path
        kinds = {".jsonl": _Lines, ".xz": _Lines, ".txt": _PlainLines}
        kind = _Arrays if os.path.isdir(self._path) else kinds.get(os.path.splitext(self._path)[1])
        if kind is None or not os.path.exists(self._path):
            raise UserError(
                f"columns={path}: no such file or folder of columns (.jsonl, .jsonl.xz, .txt, or a folder with header.json)"
            )
        try:
            self._rows = kind(self._path, source)
        except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
            raise UserError(f"columns={path}: damaged, or no columns ({type(error).__name__}: {error})") from None
        if len(self._rows) != len(source):
            raise UserError(
                f"columns={path}: {len(self._rows):,} rows, but {source.name} has {len(source):,} records; the command that makes them goes"
                " on where it stopped"
            )

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record = self._source[index]
        return record | self._rows.read(index, record)


class _PlainLines:
    """Lines of text; of a compressed file they are held in memory, of others their places in the file, 8 bytes each."""

    def __init__(self, path, source):
        self._path, self._files = path, FileReader()
        with lzma.open(path) if path.endswith(".xz") else open(path, "rb") as file:
            lines = file.readlines() if path.endswith(".xz") else file
            self._lines = lines if path.endswith(".xz") else None
            self._ends = np.cumsum([0, *map(len, lines)])

    def __len__(self):
        return len(self._ends) - 1

    def line(self, index):
        if self._lines is not None:
            return self._lines[index]
        start, end = self._ends[index : index + 2].tolist()
        return self._files.read(self._path, start, end - start)

    def read(self, index, record):
        field = os.path.splitext(os.path.basename(self._path))[0]
        return {field: self.line(index).decode("utf-8", "surrogateescape").strip()}


class _Lines(_PlainLines):
    """A header and a JSON object a line."""

    def __init__(self, path, source):
        super().__init__(path, source)
        _check_header(_loads(self.line(0), path), source, path)

    def __len__(self):
        return super().__len__() - 1

    def read(self, index, record):
        row = _loads(self.line(index + 1), self._path)
        if row.pop("of") not in (None, _check(record)):
            raise UserError(
                f"columns={self._path}, line {index + 2}: made of other texts than record {index} of the data set has"
            )
        return row


class _Arrays:
    """Arrays mapped into memory, once in each process."""

    def __init__(self, folder, source):
        header = json.loads((Path(folder) / "header.json").read_text())
        _check_header(header, source, folder)
        self._paths = {field: os.path.join(folder, f"{field}.npy") for field in header["fields"]}
        lengths = {len(array) for array in self._map().values()}
        self._length = lengths.pop() if len(lengths) == 1 else 0

    def __getstate__(self):
        return self.__dict__ | {"_arrays": None}

    def _map(self):
        self._arrays = {field: np.load(path, mmap_mode="r") for field, path in self._paths.items()}
        return self._arrays

    def __len__(self):
        return self._length

    def read(self, index, record):
        return {field: np.asarray(array[index]) for field, array in (self._arrays or self._map()).items()}


def _loads(line, path):
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
    except ValueError:
        pass
    raise UserError(f"columns={path}: damaged: not a JSON object: {line[:60].decode('utf-8', 'replace')!r}")


def join(source, path):
    """The source of "SPEC?columns=PATH"; raises UserError as `ColumnsSource`."""
    return ColumnsSource(source, path)
