"""The loader: batches through Grain, in which the batch at step t is a pure function of (seed, t).

Row r of the global batch of step t is position t * batch_size + r of an endless order (`order.py`): each source shuffled anew every epoch,
sources mixed by weight within a batch, or each batch from one source. A host computes only its own rows of that order, so the number of
hosts, worker processes and threads changes nothing, and a run starts at any step at no cost. All randomness of a view comes from (seed,
epoch, example id).
"""

import abc
import itertools
import math
import os
import weakref
from collections import Counter

import numpy as np
from absl import flags

from clip_jax.data import decode
from clip_jax.data.order import make_order, randomness
from clip_jax.data.records import BadRecord
from clip_jax.data.views import ImageView, RenderView, TextView, make_example
from clip_jax.errors import UserError, did_you_mean

Batch = dict[str, np.ndarray]

_PROBED = (
    256  # records that are tried before a source is called unusable, and counted before its share of bad ones is judged
)
_GIVE_UP = 2048  # bad records in a row
_RESERVED = {"example_id", "label", "source_id", "text_pair", "mask"}
_MISSING = {"label": -1, "text_pair": 0}  # in batches where a record of another part of the mixture has them


class Loader:
    """Endless iterator over this host's rows of the training batches, dicts of arrays [batch_size / hosts, ...].

    A record that cannot be used is replaced by the next usable one in a fixed order, counted by reason in `skipped`, and an error once more
    than `max_bad_share` of the records (of at least 256) were unusable. `step` is the step of the next batch: a loader made with it as
    `start_step` goes on from there.
    one_source: each batch is from one part of a mixture, the same on all hosts, which is drawn by the parts' weights (debiased sampling).
    workers: processes, 0 = none (a script that uses them needs the `__main__` guard); threads: in each process, by default one where small
    pictures are kept in memory, else one per core; prefetch: batches that each process keeps ready; cache_bytes: decoded pictures of at
    most 256 x 256 pixels are kept in memory up to this size in each process, if the whole source promises to fit.
    Raises UserError for wrong arguments and for a source without a usable record.
    """

    def __init__(
        self,
        source,
        views,
        tokenizer,
        *,
        batch_size,
        seed,
        start_step=0,
        host=0,
        hosts=1,
        one_source=False,
        workers=0,
        threads=None,
        prefetch=2,
        max_bad_share=0.1,
        cache_bytes=2**28,
    ):
        import grain

        _check_hosts(batch_size, host, hosts)
        if start_step < 0 or workers < 0 or prefetch < 1 or not 0 <= max_bad_share <= 1:
            raise UserError(
                f"loader: start_step={start_step} >= 0, workers={workers} >= 0, prefetch={prefetch} >= 1 and max_bad_share="
                f"{max_bad_share} in [0, 1] do not all hold"
            )
        self.step = start_step
        self.skipped = Counter(source.broken)  # what was not used, by reason, since this loader was made
        self._name, self._max_bad_share = source.name, max_bad_share
        self._used, self._bad = 0, 0
        batches = _TrainingBatches(source, views, tokenizer, cache_bytes, batch_size, host, hosts, seed, one_source)
        if threads is None:
            threads = 1 if workers or batches.keeps_pictures else _threads()
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
        dataset = grain.MapDataset.range(start_step, 2**62).map(batches).to_iter_dataset(reading)
        if workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain reads absl flags when it starts processes; in a library nobody has parsed them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            )
        self._open = [iter(dataset)]
        self._close = weakref.finalize(
            self, _close, self._open
        )  # also at exit, and before Grain's own modules are taken apart

    def __iter__(self):
        return self

    def __next__(self):
        if not self._open:
            raise ValueError("the loader is closed")
        batch, skipped = next(self._open[0])
        self.skipped.update(skipped)
        self._bad += skipped.total()
        self._used += len(batch["example_id"])
        tried = self._bad + self._used
        if tried >= _PROBED and self._bad > self._max_bad_share * tried:
            raise UserError(
                f"{self._name}: {self._bad} of {tried} records are unusable ({_reasons(self.skipped)}), more than "
                f"max_bad_share={self._max_bad_share:g}"
            )
        self.step += 1
        return batch

    def close(self):
        """Ends worker processes and threads; safe to call twice."""
        self._close()


def _close(iterators):
    while iterators:
        iterators.pop().close()


def _threads():
    """Pillow decodes and resizes without the interpreter's lock; beyond some threads the rest of the work is what counts."""
    return min(8, os.cpu_count() or 1)


def iterate_once(
    source,
    views,
    tokenizer,
    batch_size,
    host=0,
    hosts=1,
    *,
    threads=None,
    skipped=None,
):
    """One pass in order, without randomness: this host's rows of each batch, [batch_size / hosts, ...], with a bool `mask`.

    Rows where it is False are padding (zeros, example_id -1): after the last record, and in place of records that cannot be used, which
    are counted by reason in `skipped` if a Counter is given. Raises UserError as `Loader` does, and for a view with a random operation.
    """
    import grain

    _check_hosts(batch_size, host, hosts)
    for view in views:
        if isinstance(view, ImageView) and view.is_random:
            raise UserError(
                f"view {view.name!r}: augment {list(view.augment)} is random; a pass over the data for evaluation needs "
                "deterministic operations, such as resize and center_crop"
            )
    batches = _EvaluationBatches(source, views, tokenizer, 0, batch_size, host, hosts)
    threads = _threads() if threads is None else threads
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return _unpack(
        grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(batches).to_iter_dataset(reading), skipped
    )


def check_source(source, views, tokenizer, batch_size=1, one_source=False):
    """Raises the UserError that a loader would for a source and views that do not go together, without starting one."""
    _EvaluationBatches(source, views, tokenizer, 0, 1, 0, 1)
    if one_source:
        _check_one_source(source, batch_size)


def _unpack(dataset, skipped):
    for batch, reasons in dataset:
        if skipped is not None:
            skipped.update(reasons)
        yield batch


def _check_hosts(batch_size, host, hosts):
    if batch_size < 1 or hosts < 1 or batch_size % hosts:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of the number of hosts, {hosts}")
    if not 0 <= host < hosts:
        raise UserError(f"host={host} is not in 0..{hosts - 1}")


def _check_one_source(source, batch_size):
    for part in _parts(source):
        if len(part) < batch_size:
            raise UserError(
                f"data.sampling='one_source': {part.name} has {len(part)} records, fewer than a batch, data.batch_size={batch_size}"
            )


def _parts(source):
    return getattr(source, "sources", [source])


def _reasons(skipped):
    return ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common(5))


class _Batches(abc.ABC):
    """Makes batches out of examples. Keeps decoded small pictures and the ids of bad records; worker processes start with neither."""

    def __init__(self, source, views, tokenizer, cache_bytes, batch_size, host, hosts):
        names = [view.name for view in views]
        if len(set(names)) < len(names) or set(names) & _RESERVED:
            raise UserError(f"views: names {names} must differ from each other and from {', '.join(sorted(_RESERVED))}")
        for view in views:
            if isinstance(view, TextView) and isinstance(view, RenderView) == bool(tokenizer.vocab_size):
                needed = "a font, tokenizer=unifont" if tokenizer.vocab_size else "token ids, which no font gives"
                raise UserError(f"view {view.name!r} needs {needed}, but the tokenizer is {tokenizer.kind}")
        self.source, self.views, self.tokenizer = source, tuple(views), tokenizer
        self.batch_size, self.rows = batch_size, range(host * batch_size // hosts, (host + 1) * batch_size // hosts)
        self._cache_bytes, self._cache, self._bad = cache_bytes, {}, {}
        self._missing, self._fields = {}, set()
        parts = _parts(source)
        self.starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self._strides = [_stride(len(part)) for part in parts]
        probes = [self._probe(part) for part in range(len(parts))]
        found = set().union(*probes) | ({"label"} if source.class_names is not None else set())
        self._missing = {key: np.int32(value) for key, value in _MISSING.items() if key in found}
        self._check_templates()
        self.blank = {key: np.zeros_like(value) for key, value in self._complete(probes[0]).items()} | {
            "example_id": np.int32(-1)
        }

    def __getstate__(self):
        return self.__dict__ | {"_cache": {}, "_bad": {}}

    @property
    def keeps_pictures(self):
        return bool(self._cache)

    def __call__(self, step):
        """This host's rows of a step's batch, and what was skipped for it by reason."""
        skipped = Counter()
        batch = {key: np.empty((len(self.rows), *value.shape), value.dtype) for key, value in self.blank.items()}
        for i, row in enumerate(self.rows):  # example by example, which spares the memory for all of them at once
            example = self.example(step * self.batch_size + row, skipped)
            for key, array in batch.items():
                array[i] = example[key]
        return batch, skipped

    @abc.abstractmethod
    def example(self, position, skipped):
        """The example at a position of the pass over the data; counts what it skips."""

    def candidates(self, part, example_id):
        """All ids of one part of a mixture from `example_id` on, in steps that spread over it: bad records tend to lie together."""
        start, length, stride = self.starts[part], self.starts[part + 1] - self.starts[part], self._strides[part]
        return (start + (example_id - start + k * stride) % length for k in range(length))

    def make(self, example_id, rng):
        """The example; raises BadRecord."""
        if example_id in self._bad:
            raise BadRecord(self._bad[example_id])
        try:
            return self._complete(make_example(self._record(example_id), example_id, self.views, self.tokenizer, rng))
        except BadRecord as bad:
            self._bad[example_id] = bad.args[0]
            raise

    def _complete(self, example):
        """All examples have the same keys, though only some parts of a mixture may be labelled, or pairs of texts."""
        return self._missing | example

    def _record(self, example_id):
        if (record := self._cache.get(example_id)) is not None:
            return record
        record = self.source[example_id]
        if self._cache_bytes > 0 and record.get("image") is not None:
            image = decode.open_image(record["image"])
            size = 4 * image.width * image.height + 2048
            if image.width * image.height > decode.SMALL_PIXELS or (
                not self._cache and size * len(self.source) > self._cache_bytes
            ):
                self._cache_bytes = 0  # the pictures are large, or too many
            else:
                record = self._cache[example_id] = record | {"image": image}
                self._cache_bytes -= size
        return record

    def _probe(self, part):
        """The first usable example of a part, so that a source or view that cannot work fails now; raises UserError when there is none."""
        reasons = Counter()
        for example_id in itertools.islice(self.candidates(part, self.starts[part]), _PROBED):
            try:
                self._fields |= set(self.source[example_id])
                return self.make(example_id, np.random.default_rng(0))
            except BadRecord as bad:
                reasons[bad.args[0]] += 1
        self._check_templates()
        raise UserError(
            f"{self.source.name}: no usable record among {reasons.total()} tried ({_reasons(reasons)}); fields: "
            f"{', '.join(sorted(self._fields)) or 'none'}"
        )

    def _check_templates(self):
        """A field that no record among some has is a mistake; in JSON a record need not have all fields."""
        wanted = {}
        for view in self.views:
            wanted |= getattr(view, "fields", {})
        for example_id in range(min(len(self.source), _PROBED)):
            if wanted.keys() <= self._fields:
                return
            try:
                self._fields |= set(self.source[example_id])
            except BadRecord:
                continue
        for field in sorted(wanted.keys() - self._fields):
            raise UserError(
                f"{self.source.name}: no record has the field {field!r} of {wanted[field]}{did_you_mean(field, self._fields)}; "
                f"fields: {', '.join(sorted(self._fields))}"
            )


def _stride(length):
    return next(s for s in range(max(1, round(0.618 * length)), length + 1) if math.gcd(s, length) == 1)


class _TrainingBatches(_Batches):
    """Batches of the endless, shuffled stream of examples."""

    def __init__(self, source, views, tokenizer, cache_bytes, batch_size, host, hosts, seed, one_source):
        super().__init__(source, views, tokenizer, cache_bytes, batch_size, host, hosts)
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} is not in 0..2**32-1")
        if one_source:
            _check_one_source(source, batch_size)
        self._seed = seed
        self._order = make_order(self.starts, getattr(source, "weights", [1.0]), seed, batch_size, one_source)

    def example(self, position, skipped):
        part, epoch, first_id = self._order[position]
        for example_id in itertools.islice(self.candidates(part, first_id), _GIVE_UP):
            try:
                return self.make(example_id, randomness(self._seed, epoch, example_id))
            except BadRecord as bad:
                skipped[bad.args[0]] += 1
        raise UserError(f"{self.source.name}: no usable record among {_GIVE_UP} tried in a row ({_reasons(skipped)})")


class _EvaluationBatches(_Batches):
    """Batches of one pass in order, with `mask`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.blank |= {"mask": np.False_}

    def example(self, example_id, skipped):
        if example_id >= len(self.source):
            return self.blank
        try:
            return self.make(example_id, None) | {"mask": np.True_}
        except BadRecord as bad:
            skipped[bad.args[0]] += 1
            return self.blank
