"""Selections of a source by a field of its records: some of them, classes made of a field, one source for each value.

    emoji?where=vendor:noto                     the records whose vendor is noto
    emoji?part=concept:1/2                      the first of two parts of the concepts, drawn by a hash: of a concept all records or none
    emoji?part=record:1/10                      a tenth of the records: the field `record` is their number
    emoji?part=record:!1/10                     all but this tenth
    emoji?part=concept:1/2&label=subgroup       of these the subgroup is the class: `label`, `class_name`, and `class_names` of the source
    emoji?by=vendor                             a mixture of one source for each vendor, in proportion to their records
    openclipart?has=keywords                    the records with keywords
    openclipart?without=emoji                   the records that name nothing that the emoji set holds out of training, in no field

A record without the field, or with an empty one, is left out, or has no label. Making a selection reads every record of the source once.
"""

import hashlib
import itertools
import re

import numpy as np

from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.tfds import embedded
from clip_jax.errors import UserError, did_you_mean

FORMS = {"where": r"(?P<field>[^:]+):(?P<value>.+)", "part": r"(?P<field>[^:]+):(?P<value>!?\d+/\d+)"}
FORMS |= {"label": r"(?P<field>.+)", "by": r"(?P<field>.+)", "has": r"(?P<field>.+)", "without": r"(?P<value>emoji)"}
_EXAMPLES = {
    "where": "vendor:noto",
    "part": "concept:1/2",
    "label": "subgroup",
    "by": "vendor",
    "has": "keywords",
    "without": "emoji",
}
_STRINGS = "strings"  # all that a record says
_PLURAL = re.compile(r"(?:(?<=s|x|z)es|(?<=ch|sh)es|(?<=\w\w[^s])s)$")


class SelectedSource(BaseSource):
    """The records of a source at some places; with `classes` the label of each, -1 for none, is an index of their names."""

    def __init__(self, source, places, name, labels=None, classes=()):
        super().__init__(name)
        self.broken = source.broken
        self._source, self._places, self._labels = source, places, labels
        self.class_names = source.class_names if labels is None else list(classes)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        record = self._source[int(self._places[index])]
        if self._labels is None:
            return record
        record = {key: value for key, value in record.items() if key not in ("label", "class_name")}
        label = int(self._labels[index])
        return record | ({"label": label, "class_name": self._class_name(label)} if label >= 0 else {})


def select(source, options, name):
    """The selection of a source by options.

    Args:
      options: pairs such as `(("where", "vendor:noto"), ("label", "subgroup"))`.
      name: of the selection, for messages.

    Raises UserError for wrong options, and when no record is left.
    """
    wanted = {option: _parse(option, value, name) for option, value in options}
    columns = _read(source, {field for field, _ in wanted.values()}, name)
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
            kept &= ~_names_any(column, _held_out_names())
        elif option in ("by", "has"):
            kept &= column != None  # noqa: E711 - of every element
    if not kept.any():
        raise UserError(f"{name}: no record is left")
    labels, classes = None, ()
    if "label" in wanted:
        column = columns[wanted["label"][0]]
        classes = sorted(set(column[kept]) - {None})
        index = {name: label for label, name in enumerate(classes)}
        labels = np.array([index.get(value, -1) for value in column], np.int32)

    def selected(kept, name):
        return SelectedSource(source, np.flatnonzero(kept), name, labels if labels is None else labels[kept], classes)

    if "by" not in wanted:
        return selected(kept, name)
    field, _ = wanted["by"]
    sources = [
        selected(kept & (columns[field] == value), f"{name}:{value}") for value in sorted(set(columns[field][kept]))
    ]
    return MixtureSource(sources, [len(source) for source in sources], name)


def _parse(option, rest, name):
    """(field, value or None) of an option."""
    if option not in FORMS:
        raise UserError(f"{name}: unknown option {option!r}{did_you_mean(option, FORMS)}; options: {', '.join(FORMS)}")
    if not (match := re.fullmatch(FORMS[option], rest)):
        raise UserError(f"{name}: cannot read {option}={rest}; it is written as {option}={_EXAMPLES[option]}")
    groups = match.groupdict()
    return groups.get("field", _STRINGS), groups.get("value")


def _read(source, fields, name):
    """The values of fields in all records as strings, None where there is none; raises UserError for a field that no record has."""
    columns, known = {field: np.full(len(source), None, object) for field in fields - {"record"}}, set()
    numbers = {"record": np.array([str(i) for i in range(len(source))], object)} if "record" in fields else {}
    if not columns:
        return numbers
    for i in range(len(source)):
        try:
            record = source[i]
        except BadRecord:
            continue
        if _STRINGS in columns:
            values = itertools.chain.from_iterable(
                value if isinstance(value, list) else [value] for value in record.values()
            )
            record = record | {_STRINGS: [value for value in values if isinstance(value, str)]}
        known |= record.keys()
        for field, column in columns.items():
            value = record.get(field)
            if not (value is None or isinstance(value, str | list) and not value):
                column[i] = str(value)
    for field in sorted(columns.keys() - known):
        raise UserError(
            f"{name}: no record has the field {field!r}{did_you_mean(field, known)}; fields: {', '.join(sorted(known))}"
        )
    return columns | numbers


def _is_in_part(column, part, name):
    others, (number, count) = part.startswith("!"), map(int, part.removeprefix("!").split("/"))
    if not 1 <= number <= count:
        raise UserError(f"{name}: part {part} is not one of 1/{count} to {count}/{count}")
    hashes = {
        value: int.from_bytes(hashlib.sha256(value.encode("utf-8", "replace")).digest()[:8], "big")
        for value in set(column) - {None}
    }
    return np.array([value is not None and (hashes[value] % count == number - 1) != others for value in column])


def _held_out_names():
    splits = [f"{part}_{vendor}_vendor" for part in ("val", "test") for vendor in ("seen", "unseen")]
    sources = [embedded("emoji", split) for split in splits]
    return {_words(source[i]["name"]) for source in sources for i in range(len(source))}


def _names_any(texts, names):
    """Whether a name, all its words in a row, is in each text."""
    pattern = re.compile(rf" (?:{'|'.join(map(re.escape, names))}) ")
    return np.array([bool(pattern.search(f" {_words(text or '')} ")) for text in texts])


def _words(text):
    """Words in lower case with a space between them, plurals as their singulars: "Two Cats!" -> "two cat"."""
    words = (re.sub(r"(?<=\w\w)ies$", "y", word) for word in re.findall(r"[^\W_]+", text.lower()))
    return " ".join(_PLURAL.sub("", _PLURAL.sub("", word)) for word in words)  # "abacuses" is "abacu" as "abacus" is
