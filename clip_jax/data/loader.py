"""The loader: batches through Grain, where the batch at step t is a pure function of (seed, t).

The rows of each batch come from an endless order (`order.py`). Each source is shuffled anew every epoch, by records or
by blocks. Sources are mixed by weight within a batch, or each batch is from one source. A host computes only its own
rows, so the number of hosts, worker processes and threads changes nothing, and a run starts at any step at no cost. All
randomness of a view comes from (seed, epoch, example id).
"""

import math
import os
import weakref
from collections import Counter

import numpy as np
from absl import flags

from clip_jax.data.batches import (
    PROBED,
    EvaluationBatches,
    TrainingBatches,
    check_hosts,
    choose_blocks,
    list_reasons,
    make_order,
    parts_of,
)
from clip_jax.data.reading import AUTO
from clip_jax.data.records import check_labels
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError


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
        whole source is expected to fit. None are kept where a part of the source is read by blocks.
      reading: a `clip_jax.data.reading.Reading`: the order of the records, by blocks or each by itself.

    Attributes:
      step: int, the step of the next batch. A loader with this `start_step` resumes from there.
      blocks: str, a line that says how blocks are read and what memory they take; empty when records are read one by
        one.
      digest: str, that of the order of the records: it differs where their numbers, blocks, weights or the seed do.
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
        reading=AUTO,
    ):
        import grain

        check_hosts(batch_size, host, hosts)
        if start_step < 0 or workers < 0 or prefetch < 1 or not 0 <= max_bad_share <= 1:
            raise UserError(
                f"loader: start_step={start_step} and workers={workers} must be at least 0, prefetch={prefetch} at "
                f"least 1, and max_bad_share={max_bad_share} in [0, 1]"
            )
        self.step = start_step
        self.skipped = Counter(source.broken)
        self._name, self._max_bad_share = source.name, max_bad_share
        self._used, self._bad = 0, 0
        order = make_order(source, batch_size, seed, one_source, reading)
        self.blocks, self.digest = order.describe(parts_of(source), hosts), order.digest
        batches = TrainingBatches(source, views, tokenizer, cache_bytes, batch_size, host, hosts, seed, order)
        if threads is None:
            threads = 1 if workers or batches.keeps_images else _default_threads()
        # In the order by blocks each process has lanes of its own, so that no block is read twice.
        shares = batches.split(max(1, workers), start_step) if order.lanes else [batches]
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0)
        datasets = [grain.MapDataset.range(start_step, 2**62).map(share).to_iter_dataset(options) for share in shares]
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts processes; a library parses none
                flags.FLAGS.mark_as_parsed()
            count = 1 if order.lanes else workers
            options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=prefetch)
            datasets = [dataset.mp_prefetch(options) for dataset in datasets]
        self._open = [iter(dataset) for dataset in datasets]
        # A finalizer also runs at exit, before Grain's own modules are torn down.
        self._close = weakref.finalize(self, _close, self._open, shares)

    def __iter__(self):
        return self

    def __next__(self):
        if not self._open:
            raise ValueError("the loader is closed")
        batches, counts = zip(*map(next, self._open), strict=True)
        batch = batches[0] if len(batches) == 1 else {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        skipped = sum(counts, Counter())
        self.skipped.update(skipped)
        self._bad += skipped.total()
        self._used += len(batch["example_id"])
        tried = self._bad + self._used
        if tried >= PROBED and self._bad > self._max_bad_share * tried:
            raise UserError(
                f"{self._name}: {self._bad} of {tried} records are unusable ({list_reasons(self.skipped)}), more than "
                f"max_bad_share={self._max_bad_share:g}"
            )
        self.step += 1
        return batch

    def close(self):
        """Ends worker processes and threads; safe to call twice."""
        self._close()


def _close(iterators, shares):
    while iterators:
        iterators.pop().close()
    for batches in shares:
        batches.close()


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

    check_hosts(batch_size, host, hosts)
    for view in views:
        if isinstance(view, ImageView) and view.is_random:
            raise UserError(
                f"view {view.name!r}: augment {list(view.augment)} is random; an evaluation needs deterministic "
                "operations, such as resize and center_crop"
            )
    batches = EvaluationBatches(source, views, tokenizer, 0, batch_size, host, hosts)
    threads = _default_threads() if threads is None else threads
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(batches).to_iter_dataset(reading)
    return _count_skipped(dataset, skipped)


def check_source(source, views, tokenizer, batch_size=1, one_source=False, reading=AUTO):
    """Raises the UserError that a `Loader` would raise for a source and views that do not fit, without starting one."""
    if any(getattr(view, "class_templates", ()) for view in views):
        check_labels(source, "a text of the class (class_templates)")
    EvaluationBatches(source, views, tokenizer, 0, 1, 0, 1)
    choose_blocks(source, batch_size, one_source, reading)


def _count_skipped(dataset, skipped):
    for batch, reasons in dataset:
        if skipped is not None:
            skipped.update(reasons)
        yield batch
