"""Tables with a path to each image: CSV, TSV and JSON lines."""

import array
import csv
import itertools
import os
import re

import numpy as np

from clip_jax.data.files import FileReader, read_file, read_json
from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.errors import UserError

_JSON_ROWS_PEEKED = 100  # rows of JSON lines that are searched for field names


class TableSource(BaseSource):
    """A table with one row per example: .csv, .tsv (no quoting) or .jsonl.

    Image paths are relative to the table's folder. The table stays on disk: only the byte ranges of its rows are held
    in memory, 16 bytes each. A label column that holds anything but integers names classes, sorted by name.

    Args:
      path: the file.
      image: name of the column with image paths, or None.
      text: name or names of the caption columns, or None.
      label: name of the label column, or None.

    Raises UserError for an unknown column, a table without image paths and a table without rows.
    """

    def __init__(self, path, *, image=None, text=None, label=None):
        super().__init__(os.fspath(path), image, text, label)
        self._path, self._folder = os.fspath(path), os.path.dirname(os.path.abspath(path))
        self._files = FileReader()
        self._is_json = self._path.endswith("l")
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
            columns = ", ".join(names) or "none"
            raise UserError(f"{path}: no column for the image path; name it with image=..., columns: {columns}")
        spans, labels = array.array("q"), set()
        for start, end, row in rows:
            spans.extend((start, end))
            if self._fields.label is not None and (value := self._row_dict(row).get(self._fields.label)) is not None:
                labels.add(value)
        self._spans = np.frombuffer(spans, np.int64).reshape(-1, 2)
        if not len(self):
            raise UserError(f"{path}: no rows")
        if not all(isinstance(value, int) or re.fullmatch(r"-?\d+", str(value)) for value in labels):
            self._set_classes(sorted(map(str, labels)))

    def __len__(self):
        return len(self._spans)

    def __getitem__(self, index):
        start, end = self._spans[index].tolist()
        raw = self._row_dict(next(iter(self._parse([self._files.read(self._path, start, end - start)])), None))
        path = raw.get(self._fields.image)
        if not path or not isinstance(path, str):
            raise BadRecord("malformed row")
        raw["path"] = os.path.join(self._folder, path)
        return self._canonical(raw | {self._fields.image: read_file(raw["path"])})

    def _scan(self):
        """Yields `(start, end, row)` of every row that is not blank, in bytes; a quoted field may hold line ends."""
        end = 0
        with open(self._path, "rb") as file:

            def lines():
                nonlocal end
                for line in file:
                    end += len(line)
                    yield line

            start = 0
            try:
                for row in self._parse(lines()):
                    if row:
                        yield start, end, row
                    start = end
            except csv.Error as error:
                raise UserError(f"{self._path}: {error} in the row that starts at byte {start}") from None

    def _parse(self, lines):
        text = (line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape") for line in lines)
        return map(read_json, text) if self._is_json else csv.reader(text, **self._dialect)

    def _row_dict(self, row):
        """Returns a row by column name; empty for a row that does not fit the table."""
        if self._is_json:
            return dict(row) if isinstance(row, dict) else {}
        return dict(zip(self._header, row, strict=True)) if len(row or ()) == len(self._header) else {}
