"""The values of some fields of all records, chunk by chunk: of the columns of a source, or of its records."""

import functools
import itertools
import json
import math

import numpy as np

from clip_jax.data.records import BadRecord, as_list, listed, plain, records
from clip_jax.data.sources.kept import column_of
from clip_jax.errors import UserError, did_you_mean

INDEX = "record"  # stands for the index of a record
ALL_TEXT = "strings"  # stands for all text of a record
CLASSES = "classes"  # stands for the field of the classes, where a list is several of them
READ = 20_000_000  # a selection reads the records of a source of up to this length
CHUNK = 2**16  # records, a multiple of 8


class Values:
    """The values of a field of some records.

    Args:
      codes: int array `[n]`, which of the distinct values each record has; -1 where the field is missing or empty.
      distinct: a function that returns the list of them: str, or a tuple of str for a list of classes.
    """

    def __init__(self, codes, distinct):
        self.codes, self._distinct = codes, distinct

    @functools.cached_property
    def distinct(self):
        return self._distinct()

    @property
    def is_set(self):
        """Whether each record has the field, bool `[n]`."""
        return self.codes >= 0

    def where(self, test):
        """Returns bool `[n]`: whether a function is true of a record's value; False where there is none."""
        return np.array([*map(test, self.distinct), False], bool)[self.codes]


def chunks(source, fields, label, name):
    """Yields `(first record, number of records, {field: Values})` for all records of a source.

    Args:
      source: the source.
      fields: set of names; `INDEX` and `ALL_TEXT` stand for more than a field.
      label: the field of the classes, whose values are also given as `CLASSES`, or "".
      name: str, for messages.

    Raises UserError for a field that no record has, an object in the field `label`, and where too many records would
    have to be read.
    """
    named = fields - {INDEX}
    columns = {field: column_of(source, field) for field in named - {ALL_TEXT}}
    missing = sorted(field for field in named if columns.get(field) is None)
    if missing and len(source) > READ:
        raise UserError(
            f"{name}: would read {len(source):,} records for {listed(missing)}, more than {READ:,}; make a manifest "
            f"with the column: python -m clip_jax.data.manifest ... --columns={missing[0]}"
        )
    read = _records(source, named, name) if missing else _columns(columns, len(source))
    for start, found in read:
        count = min(CHUNK, len(source) - start)
        values = {field: _values(column) for field, column in found.items()}
        if label:
            values[CLASSES] = _classes(found[label], f"{name}: record", label, start)
        if INDEX in fields:
            values[INDEX] = Values(np.arange(count), functools.partial(_digits, start, count))
        yield start, count, values


def _digits(start, count):
    return [str(i) for i in range(start, start + count)]


def _columns(columns, length):
    """Yields `(first record, {field: array of Arrow, or list where the values are no scalars})`."""
    import pyarrow as pa

    def part(column, start):
        array = column[start : min(start + CHUNK, length)]
        array = pa.array(array) if isinstance(array, np.ndarray) else array
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        if isinstance(array.type, pa.JsonType):
            return _Json(array.storage)
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        is_scalar = pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return array if is_scalar else list(map(plain, array.to_pylist()))

    for start in range(0, length, CHUNK):
        yield start, {field: part(column, start) for field, column in columns.items()}


def _records(source, fields, name):
    """Yields `(first record, {field: list of values})` of the records; reads all of them."""
    known, every = set(), records(source)
    for start in range(0, len(source), CHUNK):
        rows = {field: [] for field in fields}
        for _, record in itertools.islice(every, CHUNK):
            record = {} if isinstance(record, BadRecord) else record
            known |= record.keys()
            if ALL_TEXT in fields:
                values = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in record.values())
                record = record | {ALL_TEXT: "\n".join(value for value in values if isinstance(value, str))}
            for field, values in rows.items():
                values.append(record.get(field))
        yield start, rows
    for field in sorted(fields - known - {ALL_TEXT}):
        hint = did_you_mean(field, known)
        raise UserError(f"{name}: no record has the field {field!r}{hint}; fields: {listed(sorted(known))}")


def _values(column):
    """Returns the `Values` of a list, a `_Json` or an array of Arrow."""
    if isinstance(column, list | _Json):
        return _encode(column, lambda value, index: str(value))
    return _ArrowValues(column)


class _ArrowValues(Values):
    """The `Values` of an array of Arrow of numbers or text."""

    def __init__(self, array):
        import pyarrow as pa
        import pyarrow.compute as pc

        self._array = array if not pa.types.is_floating(array.type) else pc.if_else(pc.is_nan(array), None, array)

    @functools.cached_property
    def _encoded(self):
        return self._array.dictionary_encode()

    @functools.cached_property
    def codes(self):
        codes = self._encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return codes if "" not in self.distinct else np.where(codes == self.distinct.index(""), -1, codes)

    @functools.cached_property
    def distinct(self):
        return [str(value) for value in self._encoded.dictionary.to_pylist()]

    @property
    def is_set(self):
        import pyarrow as pa
        import pyarrow.compute as pc

        is_text = pa.types.is_string(self._array.type) or pa.types.is_large_string(self._array.type)
        is_set = pc.fill_null(pc.not_equal(self._array, ""), False) if is_text else pc.is_valid(self._array)
        return self.codes >= 0 if pa.types.is_dictionary(self._array.type) else is_set.to_numpy(zero_copy_only=False)


def _classes(column, where, field, start):
    """Returns the `Values` of classes: a str, or a tuple of them for a list."""
    if not isinstance(column, list | _Json):
        return _values(column)

    def read(value, index):
        return class_names(value, f"{where} {start + index} has {str(value)[:60]} in {field!r}")

    return _encode(column, read)


class _Json:
    """Values as JSON: an array of Arrow of text, of which each distinct one is read once."""

    def __init__(self, texts):
        encoded = texts.dictionary_encode()
        self.codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        self.distinct = [json.loads(text) for text in encoded.dictionary.to_pylist()]


def _encode(values, read):
    """Returns the `Values` of a list or a `_Json`; `read(value, index)` is what is compared."""
    if isinstance(values, _Json):
        found = _encode(values.distinct, lambda value, code: read(value, int(np.argmax(values.codes == code))))
        return Values(np.append(found.codes, -1)[values.codes], lambda: found.distinct)
    codes, distinct = np.empty(len(values), np.int64), {}
    for i, value in enumerate(values):
        codes[i] = -1 if _is_empty(value) else distinct.setdefault(read(value, i), len(distinct))
    return Values(codes, lambda: list(distinct))


def _is_empty(value):
    if value is None or isinstance(value, str | list | tuple) and not value:
        return True
    return isinstance(value, float) and math.isnan(value)


def class_names(value, where=""):
    """Returns a value as a class name, "" for none, and a list as a tuple of them; raises UserError for an object."""
    if _is_empty(value):
        return ""
    items = as_list(value)
    if any(isinstance(item, dict | list | tuple) for item in items):
        raise UserError(f"{where}; a class is one name, or several names in a list")
    names = tuple(str(item) for item in items if not (item == "" or _is_empty(item)))
    return names if isinstance(value, list | tuple) else names[0]
