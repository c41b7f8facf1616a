"""Selections of a source by a field of its records.

    emoji?where=vendor:noto                    the records whose vendor is noto
    emoji?part=concept:1/2                     the first of two parts of the concepts, chosen by a hash; all records of
                                               a concept are in the same part
    emoji?part=record:1/10                     a tenth of the records: the field `record` is a record's index
    emoji?part=record:!1/10                    the other nine tenths
    emoji?part=concept:1/2&label=subgroup      a part whose classes are the subgroups: sets `label`, `class_name` and
                                               the source's `class_names`
    emoji?by=vendor                            a mixture of one source per vendor, in proportion to their records
    openclipart?has=keywords                   the records with keywords
    openclipart?without=emoji                  the records that name, in any field, none of the concepts that the emoji
                                               set holds out of training

A record whose field is missing or empty is left out; with `label=` it has no label. Making a selection reads every
record of the source once.
"""

import hashlib
import itertools
import math
import re

import numpy as np

from clip_jax.data.records import BadRecord, DerivedSource, as_list, listed
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.tfds import embedded
from clip_jax.errors import UserError, did_you_mean

FORMS = {
    "where": r"(?P<field>[^:]+):(?P<value>.+)",
    "part": r"(?P<field>[^:]+):(?P<value>!?\d+/\d+)",
    "label": r"(?P<field>.+)",
    "by": r"(?P<field>.+)",
    "has": r"(?P<field>.+)",
    "without": r"(?P<value>emoji)",
}
_EXAMPLES = {
    "where": "vendor:noto",
    "part": "concept:1/2",
    "label": "subgroup",
    "by": "vendor",
    "has": "keywords",
    "without": "emoji",
}
_INDEX_FIELD = "record"  # stands for the index of a record
_ALL_TEXT = "strings"  # stands for all text of a record
_CLASSES = "classes"  # stands for the field of label=, where a list is several classes


class SelectedSource(DerivedSource):
    """The records of a source at some indices, with other labels if given.

    Args:
      source: the source.
      indices: int array `[n]`.
      name: str, for messages.
      labels: int32 `[n]`, -1 for a record without a class; or an object array `[n]` of tuples of int, for several
        classes of a record. None keeps the source's labels.
      classes: list of str, the class names of `labels`.
    """

    def __init__(self, source, indices, name, labels=None, classes=()):
        super().__init__(source, name)
        self._indices, self._labels = indices, labels
        if labels is not None:
            self.class_names, self.multi_label = list(classes), labels.dtype == object

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        record = self._source[int(self._indices[index])]
        if self._labels is None:
            return record
        record = {key: value for key, value in record.items() if key not in ("label", "class_name")}
        if self.multi_label:
            names = [self._class_name(label) for label in self._labels[index]]
            return record | {"label": self._labels[index], "class_name": names}
        label = int(self._labels[index])
        return record | ({"label": label, "class_name": self._class_name(label)} if label >= 0 else {})

    def check_labels(self):
        if self._labels is None:
            super().check_labels()


def select(source, options, name):
    """Returns a selection of a source: a `SelectedSource`, or a mixture of them for `by=`.

    Args:
      source: the source.
      options: pairs such as `(("where", "vendor:noto"), ("label", "subgroup"))`.
      name: str, the name of the selection, for messages.

    Raises UserError for wrong options, and when no record is left.
    """
    wanted = {option: _parse(option, value, name) for option, value in options}
    label, _ = wanted.get("label", ("", None))
    columns = _read_fields(source, {field for field, _ in wanted.values()}, name, label)
    kept = np.ones(len(source), bool)
    for option, (field, value) in wanted.items():
        column = columns[field]
        if option == "where":
            kept &= column == value
            if not (column == value).any():
                raise UserError(f"{name}: no record has {field} {value!r}{did_you_mean(value, set(column) - {None})}")
        elif option == "part":
            kept &= _is_in_part(column, value, name)
        elif option == "without":
            kept &= ~_contains_any(column, _held_out_names())
        elif option in ("by", "has"):
            kept &= np.not_equal(column, None)
    if not kept.any():
        raise UserError(f"{name}: no record is left")
    labels, classes = None, ()
    if "label" in wanted:
        labels, classes = _classes_of(columns[_CLASSES], kept)

    def selected(kept, name):
        return SelectedSource(source, np.flatnonzero(kept), name, labels if labels is None else labels[kept], classes)

    if "by" not in wanted:
        return selected(kept, name)
    column = columns[wanted["by"][0]]
    sources = [selected(kept & (column == value), f"{name}:{value}") for value in sorted(set(column[kept]))]
    return MixtureSource(sources, [len(source) for source in sources], name)


def _classes_of(column, kept):
    """Returns the argument `labels` of `SelectedSource` for all records, and the class names of those that are kept.

    Args:
      column: object array `[records]` of a class name, a list of them, or None.
      kept: bool `[records]`.
    """
    of_record = [value if isinstance(value, list) else [] if value is None else [value] for value in column]
    classes = sorted({value for values, keep in zip(of_record, kept, strict=True) if keep for value in values})
    index = {name: label for label, name in enumerate(classes)}
    if not any(isinstance(value, list) for value in column):
        return np.array([index.get(value, -1) for value in column], np.int32), classes
    labels = np.empty(len(column), object)
    for i, values in enumerate(of_record):
        labels[i] = tuple(dict.fromkeys(index[value] for value in values if value in index))
    return labels, classes


def _parse(option, text, name):
    """Returns the `(field, value or None)` of an option."""
    if option not in FORMS:
        raise UserError(f"{name}: unknown option {option!r}{did_you_mean(option, FORMS)}; options: {', '.join(FORMS)}")
    if not (match := re.fullmatch(FORMS[option], text)):
        raise UserError(f"{name}: cannot read {option}={text}; it is written as {option}={_EXAMPLES[option]}")
    groups = match.groupdict()
    return groups.get("field", _ALL_TEXT), groups.get("value")


def _read_fields(source, fields, name, label):
    """Returns `{field: object array [records]}` of str, None where a record has no such field or an empty one.

    The column `_CLASSES` is that of the field `label`, with a list of str for a list. Raises UserError for a field that
    no record has, and for an object in the field `label`.
    """
    columns = {field: np.full(len(source), None, object) for field in fields - {_INDEX_FIELD}}
    if _INDEX_FIELD in fields:
        numbers = {_INDEX_FIELD: np.array([str(i) for i in range(len(source))], object)}
    else:
        numbers = {}
    if not columns:
        return numbers
    known, classes = set(), np.full(len(source), None, object)
    for i in range(len(source)):
        try:
            record = source[i]
        except BadRecord:
            continue
        if _ALL_TEXT in columns:
            values = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in record.values())
            record = record | {_ALL_TEXT: [value for value in values if isinstance(value, str)]}
        known |= record.keys()
        for field, column in columns.items():
            value = record.get(field)
            if value is None or isinstance(value, str | list | tuple) and not value:
                continue
            if isinstance(value, float) and math.isnan(value):
                continue
            column[i] = str(value)
            if field == label:
                classes[i] = _class_values(value, f"{name}: record {i} has {str(value)[:60]} in {field!r}")
    for field in sorted(columns.keys() - known):
        hint = did_you_mean(field, known)
        raise UserError(f"{name}: no record has the field {field!r}{hint}; fields: {listed(sorted(known))}")
    return columns | numbers | {_CLASSES: classes}


def _class_values(value, where):
    """Returns a value as a class name, a list as a list of them; raises UserError for an object."""
    items = as_list(value)
    if any(isinstance(item, dict | list | tuple) for item in items):
        raise UserError(f"{where}; a class is one name, or several names in a list")
    is_single = not isinstance(value, list | tuple)
    names = [str(item) for item in items if item not in (None, "") and not (isinstance(item, float) and item != item)]
    return names[0] if is_single else names


def _is_in_part(column, part, name):
    """Returns bool `[records]`: whether the hash of a value falls into a part such as "1/2" or "!1/2"."""
    negated = part.startswith("!")
    number, count = map(int, part.removeprefix("!").split("/"))
    if not 1 <= number <= count:
        raise UserError(f"{name}: part {part} is not one of 1/{count} to {count}/{count}")
    hashes = {
        value: int.from_bytes(hashlib.sha256(value.encode("utf-8", "replace")).digest()[:8], "big")
        for value in set(column) - {None}
    }
    return np.array([value is not None and (hashes[value] % count == number - 1) != negated for value in column])


def _held_out_names():
    """Returns the names of the concepts that the emoji set holds out of training, in the form of `_words`."""
    splits = [f"{part}_{vendor}_vendor" for part in ("val", "test") for vendor in ("seen", "unseen")]
    sources = [embedded("emoji", split) for split in splits]
    return {_words(source[i]["name"]) for source in sources for i in range(len(source))}


def _contains_any(texts, names):
    """Returns bool `[texts]`: whether a text contains all words of some name in a row."""
    pattern = re.compile(rf" (?:{'|'.join(map(re.escape, names))}) ")
    return np.array([bool(pattern.search(f" {_words(text or '')} ")) for text in texts])


_PLURAL = re.compile(r"(?:(?<=s|x|z)es|(?<=ch|sh)es|(?<=\w\w[^s])s)$")


def _words(text):
    """Returns the words of a text in lower case and singular, separated by single spaces: "Two Cats!" -> "two cat"."""
    words = (re.sub(r"(?<=\w\w)ies$", "y", word) for word in re.findall(r"[^\W_]+", text.lower()))
    # Applied twice, so that "abacuses" and "abacus" both become "abacu".
    return " ".join(_PLURAL.sub("", _PLURAL.sub("", word)) for word in words)
