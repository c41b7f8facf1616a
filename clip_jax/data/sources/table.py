"""Tables with a path to each image: CSV, TSV and JSON lines."""

import array
import csv
import itertools
import os

import numpy as np

from clip_jax.data.files import FileReader, read_file, read_json
from clip_jax.data.records import MAX_LABEL, BadRecord, BaseSource, as_list, listed, read_label
from clip_jax.errors import UserError

# Limits of a table that is read as it is. 1 M rows take 16 MB and 9 to 13 s (benchmarks/memory.py).
MAX_BYTES = 2**31
MAX_ROWS = 5_000_000
_JSON_ROWS_PEEKED = 100  # rows of JSON lines that are searched for field names
_CLASS_NAMES = "class_name"  # the column that may name the classes of a column of integers
csv.field_size_limit(2**31 - 1)  # the tokenizer truncates a long text; the default refuses the whole table


class _Table(BaseSource):
    """The rows of a table and the fields and classes that they have; reads all rows once.

    Args:
      path: the file.
      image: name of the column with image paths, or None.
      text: name or names of the caption columns, or None.
      label: name of the label column, or None.

    Raises UserError for an unknown column, a table without image paths, a table without rows, a column that mixes
    integers and class names, labels that are objects, and a quote that is never closed.
    """

    def __init__(self, path, image=None, text=None, label=None):
        super().__init__(os.fspath(path), image, text, label)
        self._path, self._folder = os.fspath(path), os.path.dirname(os.path.abspath(path))
        self._files = FileReader()
        self._is_json = self._path.endswith(".jsonl")
        self._dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if self._path.endswith(".tsv") else {}
        rows = self._scan()
        if self._is_json:
            first = list(itertools.islice(rows, _JSON_ROWS_PEEKED))
            rows = itertools.chain(first, rows)
            names = list(dict.fromkeys(key for _, _, row in first if isinstance(row, dict) for key in row))
        else:
            self._header = [field.strip() for field in next(rows, (0, 0, []))[2]]
            names = self._header
        self._choose_fields(names)
        if self._fields.image is None:
            columns = listed(names) or "none"
            raise UserError(
                f"{path}: no column for the image path; name it with --config.data.image=COLUMN, "
                f"in Python and in tasks with image='COLUMN'; columns: {columns}"
            )
        self._check_header()
        labels, count = _Labels(self._path, self._fields.label), 0
        for count, (start, end, row) in enumerate(rows, 1):
            self._add_row(count, start, end)
            if self._fields.label is not None:
                labels.add(self._row_dict(row), start)
        if not count:
            raise UserError(f"{path}: no rows")
        if names := labels.class_names():
            self._set_classes(names)
        self._numbers = labels.numbers()  # label -> index of its class name
        self._nameless = labels.nameless()
        self.multi_label, self._files_of_labels = labels.has_lists, (self._path,)

    def _add_row(self, count, start, end):
        """Takes the byte range of a row, the `count`-th."""

    def naming(self, record):
        if not self._nameless:
            return f"add a column {_CLASS_NAMES} to {self._path}"
        return f"write the {_CLASS_NAMES} of label {listed(map(str, self._nameless))} in a row of {self._path}"

    def _one_label(self, value):
        number = read_label(value) if self._numbers else None
        return super()._one_label(self._numbers.get(number, value))

    def _raw(self, row):
        """Returns the fields of a row and, under `path`, the path of its image; raises BadRecord."""
        raw = self._row_dict(row)
        path = raw.get(self._fields.image)
        if not path or not isinstance(path, str):
            raise BadRecord("malformed row")
        return raw | {"path": os.path.join(self._folder, path)}

    def _check_header(self):
        """Raises UserError when two columns have the name of a chosen one."""
        chosen = (self._fields.image, *self._fields.texts, self._fields.label)
        for name in [] if self._is_json else filter(None, chosen):
            if self._header.count(name) > 1:
                raise UserError(f"{self._path}: {self._header.count(name)} columns are named {name!r}; rename them")

    def _scan(self):
        """Yields `(start, end, row)` of every row that is not blank, in bytes; a quoted field may hold line ends."""
        end = 0
        with open(self._path, "rb") as file:

            def lines():
                nonlocal end
                for line in file:
                    end += len(line)
                    yield line

            start = last = 0
            try:
                for row in self._parse(lines()):
                    if row:
                        yield start, end, row
                    start, last = end, start
            except csv.Error as error:
                raise UserError(f"{self._path}: {error} in the row that starts at byte {start}") from None
        if not self._is_json and not self._dialect and self._is_unclosed(last, end):
            raise UserError(f"{self._path}: a quote in the row that starts at byte {last} is never closed")

    def _is_unclosed(self, start, end):
        """Returns whether a quoted field of the last row is still open at the end of the table."""
        try:
            list(csv.reader([self._files.read(self._path, start, end - start).decode("utf-8", "replace")], strict=True))
        except csv.Error as error:
            return "unexpected end of data" in str(error)
        return False

    def _parse(self, lines):
        text = (line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape") for line in lines)
        return map(read_json, text) if self._is_json else csv.reader(text, **self._dialect)

    def _row_dict(self, row):
        """Returns a row by column name; empty for a row that does not fit the table."""
        if self._is_json:
            return dict(row) if isinstance(row, dict) else {}
        return dict(zip(self._header, row, strict=True)) if len(row or ()) == len(self._header) else {}


class TableSource(_Table):
    """A table with one row per example: .csv, .tsv (no quoting) or .jsonl.

    Image paths are relative to the table's folder. The table stays on disk: only the byte ranges of its rows are held
    in memory, 16 bytes each.

    The label column holds integers ("10.0" is 10) or class names, which are sorted. An empty cell, NaN and null are no
    label. In JSON lines it may hold lists, several labels of one image; the labels of all records are then tuples.

    Args: as `_Table`. Raises UserError as it does, and for a table that is too large, because each process reads it.
    """

    def __init__(self, path, *, image=None, text=None, label=None):
        self._spans = array.array("q")
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise _too_large(path, f"{size / 2**30:.1f} GiB")
        super().__init__(path, image, text, label)
        self._spans = np.frombuffer(self._spans, np.int64).reshape(-1, 2)

    def _add_row(self, count, start, end):
        if count > MAX_ROWS:
            raise _too_large(self._path, f"more than {MAX_ROWS:,} rows")
        self._spans.extend((start, end))

    def __len__(self):
        return len(self._spans)

    def key_of(self, index):
        """Returns the path of an image as the table has it; raises BadRecord."""
        return self._row(index)[self._fields.image]

    def _row(self, index):
        start, end = self._spans[index].tolist()
        return self._raw(next(iter(self._parse([self._files.read(self._path, start, end - start)])), None))

    def __getitem__(self, index):
        raw = self._row(index)
        return self._canonical(raw | {self._fields.image: read_file(raw["path"])})


class TableStream(_Table):
    """A table of any size whose records are read in order; `image` of a record is the path of its file.

    Args and errors: as `_Table`. An unusable row is given as its BadRecord.
    """

    def __iter__(self):
        rows = self._scan()
        if not self._is_json:
            next(rows)
        for _, _, row in rows:
            try:
                raw = self._raw(row)
                yield self._canonical(raw | {self._fields.image: raw["path"]})
            except BadRecord as bad:
                yield bad


def _too_large(path, size):
    return UserError(
        f"{path}: {size}; a table has at most {MAX_BYTES / 2**30:g} GiB and {MAX_ROWS:,} rows, because every process "
        f"reads all of it; make Parquet of it: python -m clip_jax.tools.to_parquet {path} --out=FOLDER"
    )


class _Labels:
    """The values of a label column: integers or class names.

    Args:
      path: str, the table, for messages.
      field: str, the name of the column.
    """

    def __init__(self, path, field):
        self._where, self._field = f"{path}: label column {field!r}", field
        self._numbers, self._texts = set(), set()
        self._names = {}  # of the numbers, from the column of class names
        self.has_lists = False

    def add(self, row, start):
        """Adds the label of a row, a dict; `start` is the row's first byte in the table."""
        value = row.get(self._field)
        self.has_lists |= isinstance(value, list)
        try:
            labels = [read_label(item) for item in as_list(value)]
        except BadRecord:
            raise UserError(
                f"{self._where} holds {repr(value)[:60]} in the row that starts at byte {start}; a label is an "
                "integer, a class name, or a list of them"
            ) from None
        name = row.get(_CLASS_NAMES) if self._field != _CLASS_NAMES and len(labels) == 1 else None
        for label in labels:
            if isinstance(label, str):
                self._texts.add(label)
            elif label is not None:
                self._check_number(label, name)
                self._numbers.add(label)

    def _check_number(self, label, name):
        """Raises UserError for a number that is no label or that has two class names."""
        if not -1 <= label < MAX_LABEL:
            raise UserError(f"{self._where} holds {label}; labels go from 0 to 2**31 - 1, and -1 is no label")
        name = name.strip() if isinstance(name, str) else ""
        if label >= 0 and name and self._names.setdefault(label, name) != name:
            raise UserError(
                f"{self._where}: label {label} has the class names {self._names[label]!r} and {name!r} in column "
                f"{_CLASS_NAMES!r}"
            )

    def class_names(self):
        """Returns the class names, empty for integers of which one has no name; raises UserError for a mixture.

        Names that are labels are sorted. Names of integers have the order of the integers.
        """
        if self._numbers and self._texts:
            raise UserError(
                f"{self._where} mixes integers, such as {min(self._numbers)}, and class names, such as "
                f"{min(self._texts)!r}; write all as integers or all as names"
            )
        return sorted(self._texts) or [self._names[label] for label in self.numbers()]

    def numbers(self):
        """Returns `{integer label: index of its class name}`, in order.

        It is empty unless every label is an integer with a name. Two labels of one name are two classes.
        """
        is_complete = self._numbers - {-1} == self._names.keys() and not self._texts
        return {label: index for index, label in enumerate(sorted(self._names))} if is_complete else {}

    def nameless(self):
        """Returns the labels, sorted, that have no class name in a table that names others."""
        return sorted(self._numbers - {-1} - self._names.keys()) if self._names else []
