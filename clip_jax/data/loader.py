"""The loader: batches through Grain, where the batch at step t is a pure function of (seed, t).

Row r of the global batch of step t is position t * batch_size + r of an endless order (`order.py`). Each source is
shuffled anew every epoch. Sources are mixed by weight within a batch, or each batch is from one source. A host computes
only its own rows, so the number of hosts, worker processes and threads changes nothing, and a run starts at any step at
no cost. All randomness of a view comes from (seed, epoch, example id).
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
from clip_jax.data.records import BadRecord, check_labels, listed
from clip_jax.data.views import ImageView, RenderView, TextView, make_example
from clip_jax.errors import UserError, did_you_mean

_PROBED = 256  # records: tried before a source counts as unusable, counted before its share of bad records is judged
_MAX_BAD_RUN = 2048  # bad records in a row
_RESERVED = {"example_id", "label", "source_id", "text_pair", "mask"}
_DEFAULTS = {"label": -1, "text_pair": 0}  # for records without them, when another part of the mixture has them


class Loader:
    """Endless iterator over this host's rows of the training batches.

    A batch is a dict of arrays `[batch_size / hosts, ...]`: one per view under the view's name, int64 `example_id`, and
    int32 `label`, `source_id` and `text_pair` where the records have them. `label` is -1 and `text_pair` 0 for a record
    without them.

    An unusable record is replaced by the next usable one in a fixed order, and counted in `skipped`.

    Args:
      source: a `clip_jax.data.records.Source`.
      views: list of views, such as `ImageView` and `TextView`.
      tokenizer: a `clip_jax.data.tokenizers.TextInput`.
      batch_size: int, rows of the global batch; a multiple of `hosts`.
      seed: int in [0, 2**32).
      start_step: int, the step of the first batch.
      host: int, the index of this host.
      hosts: int, the number of hosts.
      one_source: bool, whether each batch is from one part of a mixture, drawn by the parts' weights and the same on
        all hosts (debiased sampling).
      workers: int, number of worker processes. A script that uses them needs the `if __name__ == "__main__":` guard.
      threads: int, threads in each process; None for one where small images are kept in memory or processes do the
        work, else one per core, at most 8.
      prefetch: int, batches that each process keeps ready.
      max_bad_share: float in [0, 1], the largest share of unusable records, judged after 256 records.
      cache_bytes: int, memory in each process for decoded images of at most 256 x 256 pixels; they are kept if the
        whole source is expected to fit.

    Attributes:
      step: int, the step of the next batch. A loader with this `start_step` resumes from there.
      skipped: `Counter` of the records that were not used, by reason.

    Raises UserError for wrong arguments, for a source without a usable record, and, while iterating, when more than
    `max_bad_share` of the records are unusable.
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
                f"loader: start_step={start_step} and workers={workers} must be at least 0, prefetch={prefetch} at "
                f"least 1, and max_bad_share={max_bad_share} in [0, 1]"
            )
        self.step = start_step
        self.skipped = Counter(source.broken)
        self._name, self._max_bad_share = source.name, max_bad_share
        self._used, self._bad = 0, 0
        batches = _TrainingBatches(source, views, tokenizer, cache_bytes, batch_size, host, hosts, seed, one_source)
        if threads is None:
            threads = 1 if workers or batches.keeps_images else _default_threads()
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
        dataset = grain.MapDataset.range(start_step, 2**62).map(batches).to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts processes; a library parses none
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            dataset = dataset.mp_prefetch(options)
        self._open = [iter(dataset)]
        # A finalizer also runs at exit, before Grain's own modules are torn down.
        self._close = weakref.finalize(self, _close, self._open)

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


def _default_threads():
    """One per core, at most 8: Pillow releases the interpreter's lock, but the rest of the work holds it."""
    return min(8, os.cpu_count() or 1)


def iterate_once(source, views, tokenizer, batch_size, host=0, hosts=1, *, threads=None, skipped=None):
    """Yields this host's rows of the batches of one pass in order, without randomness.

    Args:
      source: a `clip_jax.data.records.Source`.
      views: list of views without random operations.
      tokenizer: a `clip_jax.data.tokenizers.TextInput`.
      batch_size: int, rows of the global batch; a multiple of `hosts`.
      host: int, the index of this host.
      hosts: int, the number of hosts.
      threads: int, threads that read; None for one per core, at most 8.
      skipped: `Counter` that counts unusable records by reason, or None.

    Yields:
      Batches as `Loader` does, `[batch_size / hosts, ...]`, with a bool `mask`. It is False for rows of padding (zeros,
      example_id -1): after the last record, and instead of unusable records.

    Raises UserError as `Loader` does, and for a view with a random operation.
    """
    import grain

    _check_hosts(batch_size, host, hosts)
    for view in views:
        if isinstance(view, ImageView) and view.is_random:
            raise UserError(
                f"view {view.name!r}: augment {list(view.augment)} is random; an evaluation needs deterministic "
                "operations, such as resize and center_crop"
            )
    batches = _EvaluationBatches(source, views, tokenizer, 0, batch_size, host, hosts)
    threads = _default_threads() if threads is None else threads
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(batches).to_iter_dataset(reading)
    return _count_skipped(dataset, skipped)


def check_source(source, views, tokenizer, batch_size=1, one_source=False):
    """Raises the UserError that a `Loader` would raise for a source and views that do not fit, without starting one."""
    if any(getattr(view, "class_templates", ()) for view in views):
        check_labels(source, "a text of the class (class_templates)")
    _EvaluationBatches(source, views, tokenizer, 0, 1, 0, 1)
    if one_source:
        _check_one_source(source, batch_size)


def _count_skipped(dataset, skipped):
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
                f"data.sampling='one_source': {part.name} has {len(part)} records, fewer than a batch, "
                f"data.batch_size={batch_size}"
            )


def _parts(source):
    return getattr(source, "sources", [source])


def _reasons(skipped):
    return ", ".join(f"{reason}: {count}" for reason, count in skipped.most_common(5))


class _Batches(abc.ABC):
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
        parts = _parts(source)
        self.starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self._strides = [_stride(len(part)) for part in parts]
        probes = [self._probe(part) for part in range(len(parts))]
        keys = set().union(*probes) | ({"label"} if source.class_names is not None else set())
        self._defaults = {key: np.int32(value) for key, value in _DEFAULTS.items() if key in keys}
        self._check_fields()
        zeros = {key: np.zeros_like(value) for key, value in self._with_defaults(probes[0]).items()}
        self.padding = zeros | {"example_id": np.int64(-1)}

    def __getstate__(self):
        return self.__dict__ | {"_cache": {}, "_bad": {}}

    @property
    def keeps_images(self):
        return bool(self._cache)

    def __call__(self, step):
        skipped = Counter()
        batch = {key: np.empty((len(self.rows), *value.shape), value.dtype) for key, value in self.padding.items()}
        for i, row in enumerate(self.rows):  # one by one: stacking would hold all examples twice
            example = self.example(step * self.batch_size + row, skipped)
            for key, array in batch.items():
                array[i] = example[key]
        return batch, skipped

    @abc.abstractmethod
    def example(self, position, skipped):
        """Returns the example at a position of the pass over the data; counts records that it skips in `skipped`."""

    def candidates(self, part, example_id):
        """Yields all ids of a part of a mixture, `example_id` first.

        It goes in large strides, as bad records tend to be adjacent.
        """
        start, length = self.starts[part], self.starts[part + 1] - self.starts[part]
        stride = self._strides[part]
        return (start + (example_id - start + k * stride) % length for k in range(length))

    def make(self, example_id, rng):
        """Returns the example of a record; raises BadRecord."""
        if example_id in self._bad:
            raise BadRecord(self._bad[example_id])
        try:
            example = make_example(self._record(example_id), example_id, self.views, self.tokenizer, rng)
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
        for example_id in itertools.islice(self.candidates(part, self.starts[part]), _PROBED):
            try:
                self._fields |= set(self.source[example_id])
                return self.make(example_id, np.random.default_rng(0))
            except BadRecord as bad:
                reasons[bad.args[0]] += 1
        self._check_fields()
        raise UserError(
            f"{self.source.name}: no usable record among {reasons.total()} tried ({_reasons(reasons)}); fields: "
            f"{listed(sorted(self._fields)) or 'none'}"
        )

    def _check_fields(self):
        """Raises UserError for a field that a view names and none of the first records has.

        Several records are read, since a row of JSON need not have all fields.
        """
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
            hint = did_you_mean(field, self._fields)
            raise UserError(
                f"{self.source.name}: no record has the field {field!r} of {wanted[field]}{hint}; fields: "
                f"{listed(sorted(self._fields))}"
            )


def _stride(length):
    """Returns a stride near the golden section of `length` that is coprime to it, so that it visits every id."""
    return next(s for s in range(max(1, round(0.618 * length)), length + 1) if math.gcd(s, length) == 1)


class _TrainingBatches(_Batches):
    """Batches of the endless, shuffled order of examples."""

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
        for example_id in itertools.islice(self.candidates(part, first_id), _MAX_BAD_RUN):
            try:
                return self.make(example_id, randomness(self._seed, epoch, example_id))
            except BadRecord as bad:
                skipped[bad.args[0]] += 1
        raise UserError(
            f"{self.source.name}: no usable record among {_MAX_BAD_RUN} tried in a row ({_reasons(skipped)})"
        )


class _EvaluationBatches(_Batches):
    """Batches of one pass in order, with `mask`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.padding |= {"mask": np.False_}

    def example(self, example_id, skipped):
        if example_id >= len(self.source):
            return self.padding
        try:
            return self.make(example_id, None) | {"mask": np.True_}
        except BadRecord as bad:
            skipped[bad.args[0]] += 1
            return self.padding
