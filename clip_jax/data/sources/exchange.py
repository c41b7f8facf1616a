"""Noise: `SOURCE?exchange=0.3` exchanges the captions of three of ten records among these.

An exchanged record keeps its image. All its other fields are those of another exchanged record: captions, names, tags,
labels. `SOURCE?exchange=0.3:synthetic,boxes` leaves the fields `synthetic` and `boxes` with their image as well.

A hash of a record's number decides, so that the choice and the exchange are the same in every run, and that what a
smaller share exchanges, a larger one does too. Two records may have equal captions; then the exchange changes nothing.
An exchanged record is read with its partner, which may lie anywhere: only sources whose records are read one by one
have this step.
"""

import re

import numpy as np

from clip_jax.data.blocks import is_sequential
from clip_jax.data.records import DerivedSource
from clip_jax.data.shuffle import splitmix64
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.errors import UserError


def join(source, value):
    """Returns the source of "SOURCE?exchange=VALUE"; raises UserError for a wrong value and for a source of blocks."""
    if isinstance(source, MixtureSource):
        return MixtureSource([join(part, value) for part in source.sources], source.weights)
    name = f"{source.name}?exchange={value}"
    match = re.fullmatch(r"([01]?\.\d+|[01])(?::(\w+(?:,\w+)*))?", value)
    if not match or not 0 <= float(match[1]) <= 1:
        raise UserError(f"{name}: cannot read exchange={value}; it is written as exchange=0.3 or exchange=0.3:FIELD")
    if is_sequential(source):
        raise UserError(f"{name}: exchange= reads records from anywhere, and this source is read in blocks")
    return ExchangedSource(source, float(match[1]), (match[2] or "").split(","), name)


class ExchangedSource(DerivedSource):
    """The records of a source, of which a share has the captions of others.

    Args:
      source: the source.
      share: of the records, in [0, 1]. Fewer than two chosen records stay as they are.
      kept: fields that stay with their image.
      name: str, for messages.
    """

    def __init__(self, source, share, kept, name):
        super().__init__(source, name)
        self._kept = ("image", *kept)
        hashes = splitmix64(np.arange(len(source), dtype=np.uint64))
        chosen = np.flatnonzero(hashes / 2.0**64 < share)
        chosen = chosen[np.argsort(splitmix64(hashes[chosen]), kind="stable")]
        self._partners = np.arange(len(source))
        self._partners[chosen] = np.roll(chosen, 1)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        record, partner = self._source[index], int(self._partners[index])
        if partner == index:
            return record
        other = self._source[partner]
        own = {field: record[field] for field in self._kept if field in record}
        return {field: value for field, value in other.items() if field not in self._kept} | own
