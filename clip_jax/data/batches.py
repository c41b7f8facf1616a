"""Batches of examples: what a step's rows are, how an unusable record is replaced, and what a batch holds."""

import abc
import copy
import functools
import itertools
import math
from collections import Counter

import numpy as np

from clip_jax.data import decode
from clip_jax.data.blocks import Block, blocks_of, is_sequential, read_block
from clip_jax.data.lanes import choose_lanes
from clip_jax.data.order import Order, randomness
from clip_jax.data.records import BadRecord, listed
from clip_jax.data.threads import end_with_parent
from clip_jax.data.views import RenderView, TextView, make_example
from clip_jax.data.windows import WindowReader
from clip_jax.errors import UserError, did_you_mean

PROBED = 256  # records: tried before a source counts as unusable, counted before its share of bad records is judged
_MAX_BAD_RUN = 2048  # bad records in a row
_RESERVED = {"example_id", "label", "source_id", "text_pair", "mask"}
_DEFAULTS = {"label": -1, "text_pair": 0}  # for records without them, when another part of the mixture has them


def check_hosts(batch_size, host, hosts):
    """Raises UserError when the hosts do not divide the batch."""
    if batch_size < 1 or hosts < 1 or batch_size % hosts:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the number of hosts, {hosts}")
    if not 0 <= host < hosts:
        raise UserError(f"host={host} is not in 0..{hosts - 1}")


def check_one_source(source, batch_size):
    """Raises UserError when a part of a mixture has fewer records than a batch."""
    for part in parts_of(source):
        if len(part) < batch_size:
            raise UserError(
                f"data.sampling='one_source': {part.name} has {len(part)} records, fewer than a batch, "
                f"data.batch_size={batch_size}"
            )


def parts_of(source):
    """Returns the parts of a mixture; any other source is its only part."""
    return getattr(source, "sources", [source])


def _first_ids(parts):
    """Returns the first example id of each part of a mixture, then the number of all examples, a list of int."""
    return [0, *itertools.accumulate(len(part) for part in parts)]


def list_reasons(skipped):
    """Returns the most common reasons of a Counter as text."""
    return ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common(5))


class Batches(abc.ABC):
    """Makes this host's batches: `batches(step)` is `(batch, Counter of skipped records)`.

    Keeps small decoded images and the ids of bad records. A copy in a worker process starts with neither.

    Attributes:
      rows: range, this host's rows of the global batch.
      starts: list of int, the first example id of each part of a mixture, then the number of all examples.
      padding: `{key: array}`, an example of zeros with example_id -1.
    """

    def __init__(self, source, views, tokenizer, cache_bytes, batch_size, host, hosts):
        names = [view.name for view in views]
        if len(set(names)) < len(names) or set(names) & _RESERVED:
            raise UserError(f"views: names {names} must differ from each other and from {', '.join(sorted(_RESERVED))}")
        for view in views:
            if isinstance(view, TextView) and isinstance(view, RenderView) == bool(tokenizer.vocab_size):
                needed = "a font, tokenizer=unifont" if tokenizer.vocab_size else "token ids, which no font gives"
                raise UserError(f"view {view.name!r} needs {needed}, but the tokenizer is {tokenizer.kind}")
        self.source, self.views = source, tuple(views)
        self.tokenizer = tokenizer
        self.batch_size, self.rows = batch_size, range(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        self._cache_bytes, self._cache = cache_bytes, {}
        self._bad, self._defaults = {}, {}
        self._fields = set()  # of the records that were looked at
        parts = parts_of(source)
        self.starts = _first_ids(parts)
        self._strides = [_stride(len(part)) for part in parts]
        probes = [self._probe(part) for part in range(len(parts))]
        keys = set().union(*probes) | ({"label"} if source.class_names is not None else set())
        self._defaults = {key: np.int32(value) for key, value in _DEFAULTS.items() if key in keys}
        self._check_fields()
        zeros = {key: np.zeros_like(value) for key, value in self._with_defaults(probes[0]).items()}
        self.padding = zeros | {"example_id": np.int64(-1)}

    def __setstate__(self, state):
        self.__dict__ |= state
        end_with_parent()  # a worker process gets a copy

    def __getstate__(self):
        return self.__dict__ | {"_cache": {}, "_bad": {}}

    @property
    def keeps_images(self):
        return bool(self._cache)

    def __call__(self, step):
        skipped = Counter()
        batch = {key: np.empty((len(self.rows), *value.shape), value.dtype) for key, value in self.padding.items()}
        for i, example in enumerate(self.examples(step, skipped)):  # stacking would hold all examples twice
            for key, array in batch.items():
                array[i] = example[key]
        return batch, skipped

    @abc.abstractmethod
    def examples(self, step, skipped):
        """Yields the examples of this host's rows; counts the records that it skips in the Counter `skipped`."""

    def candidates(self, part, example_id):
        """Yields all ids of a part of a mixture, `example_id` first.

        It goes in large strides, as bad records tend to be adjacent.
        """
        start, length = self.starts[part], self.starts[part + 1] - self.starts[part]
        stride = self._strides[part]
        return (start + (example_id - start + k * stride) % length for k in range(length))

    def make(self, example_id, rng, read):
        """Returns the example of the record `read(example_id)`; raises BadRecord."""
        if example_id in self._bad:
            raise BadRecord(self._bad[example_id])
        try:
            example = make_example(read(example_id), example_id, self.views, self.tokenizer, rng)
        except BadRecord as bad:
            self._bad[example_id] = bad.args[0]
            raise
        return self._with_defaults(example)

    def _with_defaults(self, example):
        """Returns an example with the keys that all examples have, though only some parts of a mixture have labels."""
        return self._defaults | example

    def _record(self, example_id):
        if (record := self._cache.get(example_id)) is not None:
            return record
        record = self.source[example_id]
        if self._cache_bytes > 0 and record.get("image") is not None:
            image = decode.open_image(record["image"])
            size = 4 * image.width * image.height + 2048
            is_small = image.width * image.height <= decode.SMALL_PIXELS
            if not is_small or (not self._cache and size * len(self.source) > self._cache_bytes):
                self._cache_bytes = 0  # the images are large, or too many
            else:
                record = self._cache[example_id] = record | {"image": image}
                self._cache_bytes -= size
        return record

    def _probe(self, part):
        """Returns the first usable example of a part; raises UserError when there is none.

        A source or view that cannot work fails here, before the first batch.
        """
        reasons = Counter()
        for example_id in itertools.islice(self.candidates(part, self.starts[part]), PROBED):
            try:
                self._fields |= set(self.source[example_id])
                return self.make(example_id, np.random.default_rng(0), self._record)
            except BadRecord as bad:
                reasons[bad.args[0]] += 1
        self._check_fields()
        raise UserError(
            f"{self.source.name}: no usable record among {reasons.total()} tried ({list_reasons(reasons)}); fields: "
            f"{listed(sorted(self._fields)) or 'none'}"
        )

    def _check_fields(self):
        """Raises UserError for a field that a view names and none of the first records has.

        Several records are read, since a row of JSON need not have all fields.
        """
        wanted = {}
        for view in self.views:
            wanted |= getattr(view, "fields", {})
        for example_id in range(min(len(self.source), PROBED)):
            if wanted.keys() <= self._fields:
                return
            try:
                self._fields |= set(self.source[example_id])
            except BadRecord:
                continue
        for field in sorted(wanted.keys() - self._fields):
            hint = did_you_mean(field, self._fields)
            raise UserError(
                f"{self.source.name}: no record has the field {field!r} of {wanted[field]}{hint}; fields: "
                f"{listed(sorted(self._fields))}"
            )


@functools.lru_cache(maxsize=1024)
def _stride(length):
    """Returns a stride near the golden section of `length` that is coprime to it, so that it visits every id."""
    return next(s for s in range(max(1, round(0.618 * length)), length + 1) if math.gcd(s, length) == 1)


def choose_blocks(source, batch_size, one_source, reading):
    """Returns how a source is read: the number of lanes, 0 without any, and of each part the sizes of its blocks.

    The sizes are None for a part that is read by records. Raises UserError for wrong arguments.
    """
    parts = parts_of(source)
    if one_source:
        check_one_source(source, batch_size)
    by_blocks = [reading.order == "blocks" or reading.order == "auto" and is_sequential(part) for part in parts]
    blocks = [blocks_of(part) if chosen else None for part, chosen in zip(parts, by_blocks, strict=True)]
    lanes = choose_lanes(batch_size, reading.lanes) if any(by_blocks) else 0
    if lanes and batch_size % lanes:
        raise UserError(f"data.lanes={lanes} must divide data.batch_size={batch_size}")
    for part, chosen in zip(parts, by_blocks, strict=True):
        if chosen and len(part) < lanes:
            raise UserError(
                f"{part.name} has {len(part)} records, fewer than data.lanes={lanes}; take fewer lanes, or "
                "data.order=records"
            )
    return lanes, blocks


def make_order(source, batch_size, seed, one_source, reading):
    """Returns the `Order` of a source; raises UserError for wrong arguments."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is not in 0..2**32-1")
    lanes, blocks = choose_blocks(source, batch_size, one_source, reading)
    starts, weights = _first_ids(parts_of(source)), getattr(source, "weights", [1.0])
    return Order(starts, weights, seed, batch_size, one_source, lanes=lanes, blocks=blocks, window=reading.window)


class TrainingBatches(Batches):
    """Batches of the endless, shuffled order of examples.

    Args: as `clip_jax.data.loader.Loader`; `order` is the `Order`.
    """

    def __init__(self, source, views, tokenizer, cache_bytes, batch_size, host, hosts, seed, order):
        cache_bytes = 0 if order.lanes else cache_bytes
        super().__init__(source, views, tokenizer, cache_bytes, batch_size, host, hosts)
        if order.lanes and order.lanes % hosts:
            raise UserError(f"data.lanes={order.lanes} must be a multiple of the number of hosts, {hosts}")
        self._seed, self._order = seed, order
        self._readers = []  # of windows, one per part, None for a part that is read by records

    def close(self):
        """Ends the threads that read."""
        for reader in filter(None, self._readers):
            reader.close()

    def split(self, count, start_step):
        """Returns the batches, from a step on, of each of `count` workers, which share this host's rows by whole lanes.

        There are fewer when the host has fewer lanes. For orders in which some part is read by blocks.
        """
        length = self.batch_size // self._order.lanes
        shares = np.array_split(range(self.rows.start // length, self.rows.stop // length), count)
        return [self._share(lanes.tolist(), length, start_step) for lanes in shares if len(lanes)]

    def _share(self, lanes, length, start_step):
        """Returns the batches of adjacent lanes of `length` rows, from a step on."""
        share = copy.copy(self)
        share._readers, share.rows = [], range(lanes[0] * length, (lanes[-1] + 1) * length)
        first = {lane: self._order.first_draws(start_step, lane) for lane in lanes}
        for number, part in enumerate(self._order.parts):
            read = functools.partial(_read_part, self.source, number)
            first_of_part = {lane: numbers[number] for lane, numbers in first.items()}
            share._readers.append(part and WindowReader(part, read, first_of_part))
        return share

    def examples(self, step, skipped):
        for draw in self._order.rows(step, self.rows.start, self.rows.stop):
            yield self._from_window(draw, skipped) if draw.lane >= 0 else self._from_record(draw, skipped)

    def _from_record(self, draw, skipped):
        for example_id in itertools.islice(self.candidates(draw.part, draw.example_id), _MAX_BAD_RUN):
            try:
                return self.make(example_id, randomness(self._seed, draw.epoch, example_id), self._record)
            except BadRecord as bad:
                skipped[bad.args[0]] += 1
        raise UserError(
            f"{self.source.name}: no usable record among {skipped.total()} tried in a row ({list_reasons(skipped)})"
        )

    def _from_window(self, draw, skipped):
        """Returns the example of a draw; an unusable record is replaced by another one of its window.

        A window may hold a single record, or those of one damaged block. Then it is replaced by any record of the part.
        """
        reader = self._readers[draw.part]
        opened = reader.get(draw)
        ids, stride = opened.window.ids, _stride(len(opened.window.ids))
        for k in range(min(len(ids), _MAX_BAD_RUN)):
            place = (draw.place + k * stride) % len(ids)
            example_id = self.starts[draw.part] + int(ids[place])
            try:
                rng = randomness(self._seed, draw.epoch, example_id)
                example = self.make(example_id, rng, lambda _, place=place: opened.record(place))
                reader.release(draw)
                return example
            except BadRecord as bad:
                skipped[bad.args[0]] += 1
        reader.release(draw)
        return self._from_record(draw._replace(example_id=example_id), skipped)


def _read_part(source, part, number):
    """Returns the records of a block of a part of a source."""
    records = read_block(parts_of(source)[part], number)
    if not hasattr(source, "of_part"):
        return records
    return Block(len(records), lambda index: source.of_part(part, records[index]))


class EvaluationBatches(Batches):
    """Batches of one pass in order, with `mask`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.padding |= {"mask": np.False_}

    def examples(self, step, skipped):
        for row in self.rows:
            yield self._example(step * self.batch_size + row, skipped)

    def _example(self, example_id, skipped):
        if example_id >= len(self.source):
            return self.padding
        try:
            return self.make(example_id, None, self._record) | {"mask": np.True_}
        except BadRecord as bad:
            skipped[bad.args[0]] += 1
            return self.padding
