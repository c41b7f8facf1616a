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

A record whose field is missing or empty is left out; with `label=` it has no label. A selection is made of the columns
of a source (`column` of `clip_jax.data.blocks`), or else by reading every record once, of up to 20,000,000.
"""

import functools
import hashlib
import re

import numpy as np

from clip_jax.data.records import records
from clip_jax.data.shuffle import SPLITMIX_STEP, splitmix64
from clip_jax.data.sources import field_values
from clip_jax.data.sources.kept import KeptSource, keep, starts_of
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
_HINTS = 1000  # values that are compared with one that no record has


class SelectedSource(KeptSource):
    """The records of a source that are kept, with other labels if given.

    Args:
      source: the source.
      kept: `clip_jax.data.sources.kept.Bits` or `Places`.
      name: str, for messages.
      label: the field whose values are the classes; "" keeps the source's labels.
      classes: list of str, the class names.
      multi_label: bool, whether records have several classes.
    """

    def __init__(self, source, kept, name, label="", classes=(), multi_label=False):
        super().__init__(source, kept, name)
        self._label = label
        if label:
            self._set_classes(classes)
            self.multi_label = multi_label

    def _make(self, record, index):
        if not self._label:
            return record
        names = field_values.class_names(record.get(self._label))
        names = names if isinstance(names, tuple) else (names,)
        labels = tuple(dict.fromkeys(self._class_index[name] for name in names if name in self._class_index))
        record = {key: value for key, value in record.items() if key not in ("label", "class_name")}
        if self.multi_label:
            return record | {"label": labels, "class_name": [self._class_name(label) for label in labels]}
        return record | ({"label": labels[0], "class_name": self._class_name(labels[0])} if labels else {})

    def check_labels(self):
        if not self._label:
            super().check_labels()

    def column(self, field):
        return None if self._label and field in ("label", "class_name") else super().column(field)


def select(source, options, name):
    """Returns a selection of a source: a `SelectedSource`, or a mixture of them for `by=`.

    Args:
      source: the source.
      options: pairs such as `(("where", "vendor:noto"), ("label", "subgroup"))`.
      name: str, the name of the selection, for messages.

    Raises UserError for wrong options, when no record is left, and when too many records would have to be read.
    """
    wanted = {option: _parse(option, value, name) for option, value in options}
    label, by = (wanted.get(option, ("", None))[0] for option in ("label", "by"))
    if by and len(source) > field_values.READ:
        raise UserError(
            f"{name}: by= is for sources of up to {field_values.READ:,} records, not {len(source):,}; write a mixture "
            "of where= selections"
        )
    rules = {option: _rule(option, *wanted[option], len(source), name) for option in wanted}
    bits = np.zeros(-(-len(source) // 8), np.uint8)
    groups, classes = _Numbering(len(source) if by else 0), _Classes()
    for start, count, values in field_values.chunks(source, {field for field, _ in wanted.values()}, label, name):
        kept = np.ones(count, bool)
        for option, (field, _) in wanted.items():
            kept &= rules[option](values[field], start)
        bits[start // 8 : -(-(start + count) // 8)] = np.packbits(kept)
        if by:
            groups.add(values[by], kept, start)
        if label:
            classes.add(values[field_values.CLASSES], kept)
    for rule in rules.values():
        rule.finish()
    if not bits.any():
        raise UserError(f"{name}: no record is left")
    starts, given = starts_of(source), (label, sorted(classes.names), classes.are_several)
    if not by:
        return SelectedSource(source, keep(bits, starts), name, *given)
    sources = [
        SelectedSource(source, keep(np.packbits(groups.numbers == number), starts), f"{name}:{value}", *given)
        for value, number in sorted(groups.found.items())
    ]
    return MixtureSource(sources, [len(source) for source in sources], name)


class _Numbering:
    """Numbers the values of a field: `numbers`, int32 `[records]`, -1 for none; `found` is {value: number}."""

    def __init__(self, length):
        self.numbers, self.found = np.full(length, -1, np.int32), {}

    def add(self, values, kept, start):
        for code in np.unique(values.codes[kept]).tolist():
            self.found.setdefault(values.distinct[code], len(self.found))
        table = np.array([*(self.found.get(value, -1) for value in values.distinct), -1], np.int32)
        self.numbers[start : start + len(kept)] = np.where(kept, table[values.codes], -1)


class _Classes:
    """Collects the class names of the kept records: `names`, and whether a record may have several, `are_several`."""

    def __init__(self):
        self.names, self.are_several = set(), False

    def add(self, values, kept):
        self.are_several |= any(isinstance(value, tuple) for value in values.distinct)
        for code in np.unique(values.codes[kept & values.is_set]).tolist():
            value = values.distinct[code]
            self.names.update(value if isinstance(value, tuple) else (value,))


def _parse(option, text, name):
    """Returns the `(field, value or None)` of an option."""
    if option not in FORMS:
        raise UserError(f"{name}: unknown option {option!r}{did_you_mean(option, FORMS)}; options: {', '.join(FORMS)}")
    if not (match := re.fullmatch(FORMS[option], text)):
        raise UserError(f"{name}: cannot read {option}={text}; it is written as {option}={_EXAMPLES[option]}")
    groups = match.groupdict()
    return groups.get("field", field_values.ALL_TEXT), groups.get("value")


class _Rule:
    """What an option keeps: `rule(values, start)` is bool `[n]`, of the `Values` of the records from `start` on."""

    def __init__(self, test=None):
        self._test = test

    def __call__(self, values, start):
        return values.where(self._test)

    def finish(self):
        """Raises UserError when the option is wrong, after all records."""


class _Where(_Rule):
    """The records with a value; keeps some other values for the message that no record has it."""

    def __init__(self, field, value, name):
        super().__init__(value.__eq__)
        self._what, self._value = f"{name}: no record has {field} {value!r}", value
        self._others, self._is_found = set(), False

    def __call__(self, values, start):
        matches = super().__call__(values, start)
        self._is_found |= bool(matches.any())
        if not self._is_found and len(self._others) < _HINTS:
            self._others.update(values.distinct)
        return matches

    def finish(self):
        if not self._is_found:
            raise UserError(f"{self._what}{did_you_mean(self._value, self._others)}")


class _Part(_Rule):
    """The records whose hash falls into a part such as "1/2" or "!1/2".

    The hash is that of the text of the value. Many indices of records have one that is computed for all at once.
    """

    def __init__(self, part, of_indices, name):
        super().__init__(lambda value: self._is_in(_hash_text(value)))
        self._negated, self._of_indices = part.startswith("!"), of_indices
        self._number, self._count = map(int, part.removeprefix("!").split("/"))
        if not 1 <= self._number <= self._count:
            raise UserError(f"{name}: part {part} is not one of 1/{self._count} to {self._count}/{self._count}")

    def __call__(self, values, start):
        if self._of_indices:
            return self._is_in(_hash_indices(start, len(values.codes)))
        return super().__call__(values, start)

    def _is_in(self, hashes):
        return (hashes % self._count == self._number - 1) != self._negated


class _Has(_Rule):
    """The records with the field."""

    def __call__(self, values, start):
        return values.is_set


class _Without(_Rule):
    """The records whose text names nothing that the emoji set holds out; one without text is kept."""

    def __call__(self, values, start):
        return ~super().__call__(values, start)


class _All(_Rule):
    """All records, with any label or none."""

    def __call__(self, values, start):
        return np.True_


def _rule(option, field, value, length, name):
    """Returns the rule of an option; `length` is the number of records of the source."""
    if option == "where":
        return _Where(field, value, name)
    if option == "part":
        return _Part(value, field == field_values.INDEX and length > field_values.READ, name)
    if option == "without":
        return _Without(_held_out_finder())
    return _Has() if option in ("by", "has") else _All()


def _hash_text(text):
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big")


def _hash_indices(start, count):
    """Returns hashes of indices, uint64 `[count]`: numbers of SplitMix64 from seed 0."""
    return splitmix64(np.arange(start, start + count, dtype=np.uint64) * SPLITMIX_STEP)


@functools.cache
def _held_out_finder():
    """Returns the `_finder` of the names of the concepts that the emoji set holds out of training."""
    splits = [f"{part}_{vendor}_vendor" for part in ("val", "test") for vendor in ("seen", "unseen")]
    sources = [embedded("emoji", split) for split in splits]
    return _finder({_words(record["name"]) for source in sources for _, record in records(source)})


def _finder(names):
    """Returns a function of a text that tells whether it contains all words of some name in a row."""
    pattern = re.compile(rf" (?:{'|'.join(map(re.escape, names))}) ")
    return lambda text: bool(pattern.search(f" {_words(text)} "))


_PLURAL = re.compile(r"(?:(?<=s|x|z)es|(?<=ch|sh)es|(?<=\w\w[^s])s)$")


def _words(text):
    """Returns the words of a text in lower case and singular, separated by single spaces: "Two Cats!" -> "two cat"."""
    return " ".join(map(_singular, re.findall(r"[^\W_]+", text.lower())))


@functools.lru_cache(2**16)
def _singular(word):
    word = re.sub(r"(?<=\w\w)ies$", "y", word)
    return _PLURAL.sub("", _PLURAL.sub("", word))  # twice, so that "abacuses" and "abacus" both become "abacu"
