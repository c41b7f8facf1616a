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
from collections.abc import Sequence

import numpy as np

from clip_jax.data.sources import BadRecord, BaseSource, MixtureSource, Record, Source, make_source, near
from clip_jax.errors import UserError

_FORMS = {"where": r"(?P<field>[^:]+):(?P<value>.+)", "part": r"(?P<field>[^:]+):(?P<value>!?\d+/\d+)"}
_FORMS |= {"label": r"(?P<field>.+)", "by": r"(?P<field>.+)", "has": r"(?P<field>.+)", "without": r"(?P<value>emoji)"}
_EXAMPLES = {"where": "vendor:noto", "part": "concept:1/2", "label": "subgroup", "by": "vendor", "has": "keywords", "without": "emoji"}
_STRINGS = "strings"  # all that a record says
_PLURAL = re.compile(r"(?:(?<=s|x|z)es|(?<=ch|sh)es|(?<=\w\w[^s])s)$")
#: What is a selection among the strings of `make_source`.
PATTERN = re.compile(rf"(.+)\?((?:{'|'.join(_FORMS)})=[^?]*)")


class SelectedSource(BaseSource):
    """The records of a source at some places; with `classes` the label of each, -1 for none, is an index of their names."""

    def __init__(self, source: Source, places: np.ndarray, name: str, labels: np.ndarray | None = None, classes: Sequence[str] = ()):
        super().__init__(name)
        self.broken = source.broken
        self._source, self._places, self._labels = source, places, labels
        self.class_names = source.class_names if labels is None else list(classes)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._places[index])]
        if self._labels is None:
            return record
        record = {key: value for key, value in record.items() if key not in ("label", "class_name")}
        label = int(self._labels[index])
        return record | ({"label": label, "class_name": self._class_name(label)} if label >= 0 else {})


def select(source: Source, options: str, name: str) -> Source:
    """The selection of `options`, "where=vendor:noto&label=subgroup"; raises UserError for wrong ones and when nothing is left."""
    wanted = dict(_parse(option, name) for option in options.split("&"))
    columns = _read(source, {field for field, _ in wanted.values()}, name)
    kept = np.ones(len(source), bool)
    for option, (field, value) in wanted.items():
        column = columns[field]
        if option == "where":
            kept &= column == value
            if not (column == value).any():
                raise UserError(f"{name}: no record has {field} {value!r}{near(value, set(column) - {None})}")
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
    sources = [selected(kept & (columns[field] == value), f"{name}:{value}") for value in sorted(set(columns[field][kept]))]
    return MixtureSource(sources, [len(source) for source in sources], name)


def _parse(text: str, name: str) -> tuple[str, tuple[str, str | None]]:
    """(option, (field, value or None))."""
    option, _, rest = text.partition("=")
    if option not in _FORMS:
        raise UserError(f"{name}: unknown option {option!r}{near(option, _FORMS)}; options: {', '.join(_FORMS)}")
    if not (match := re.fullmatch(_FORMS[option], rest)):
        raise UserError(f"{name}: cannot read {option}={rest}; it is written as {option}={_EXAMPLES[option]}")
    groups = match.groupdict()
    return option, (groups.get("field", _STRINGS), groups.get("value"))


def _read(source: Source, fields: set[str], name: str) -> dict[str, np.ndarray]:
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
            values = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in record.values())
            record = record | {_STRINGS: [value for value in values if isinstance(value, str)]}
        known |= record.keys()
        for field, column in columns.items():
            value = record.get(field)
            if not (value is None or isinstance(value, str | list) and not value):
                column[i] = str(value)
    for field in sorted(columns.keys() - known):
        raise UserError(f"{name}: no record has the field {field!r}{near(field, known)}; fields: {', '.join(sorted(known))}")
    return columns | numbers


def _is_in_part(column: np.ndarray, part: str, name: str) -> np.ndarray:
    others, (number, count) = part.startswith("!"), map(int, part.removeprefix("!").split("/"))
    if not 1 <= number <= count:
        raise UserError(f"{name}: part {part} is not one of 1/{count} to {count}/{count}")
    hashes = {value: int.from_bytes(hashlib.sha256(value.encode("utf-8", "replace")).digest()[:8], "big") for value in set(column) - {None}}
    return np.array([value is not None and (hashes[value] % count == number - 1) != others for value in column])


def _held_out_names() -> set[str]:
    splits = [f"{part}_{vendor}_vendor" for part in ("val", "test") for vendor in ("seen", "unseen")]
    sources = [make_source("emoji", split) for split in splits]
    return {_words(source[i]["name"]) for source in sources for i in range(len(source))}


def _names_any(texts: np.ndarray, names: set[str]) -> np.ndarray:
    """Whether a name, all its words in a row, is in each text."""
    pattern = re.compile(rf" (?:{'|'.join(map(re.escape, names))}) ")
    return np.array([bool(pattern.search(f" {_words(text or '')} ")) for text in texts])


def _words(text: str) -> str:
    """Words in lower case with a space between them, plurals as their singulars: "Two Cats!" -> "two cat"."""
    words = (re.sub(r"(?<=\w\w)ies$", "y", word) for word in re.findall(r"[^\W_]+", text.lower()))
    return " ".join(_PLURAL.sub("", _PLURAL.sub("", word)) for word in words)  # "abacuses" is "abacu" as "abacus" is
