"""Reading the images of sources and embedding them with a model.

A model is any object with

  embed_image(images): uint8 `[n, size, size, 3]` -> float32 `[n, ...]`.
  embed_text(texts): a list of n strings -> float32 `[n, ...]`.
  similarity(z_image, z_text): `[n, ...]`, `[m, ...]` -> `[n, m]`.
  image_view: the `ImageView` that prepares an image.

`clip_jax.inference.Model` is one. A model may also have

  image_features(images): uint8 `[n, size, size, 3]` -> float32 `[n, D]`, before the joint projection, not normalised.
  text_similarity(z_text, z_image): `[m, ...]`, `[n, ...]` -> `[m, n]`, where it is not the transpose of `similarity`.
  patch_similarity(images, texts): n images uint8 `[n, size, size, 3]` and their n texts -> float32 `[n, P, L]`, the
    similarity of each patch and each token of the text, -inf for padding. The attribute may be None.
  scale: the factor of the similarities in the softmax of the loss, a float.
  token_ids(texts): a list of n strings -> an array `[n, ...]`, equal for texts that the model cannot tell apart.
  process_shard: `(index, count)`, which of `count` shards of the images this process reads; with `embed_image_share`
    and `image_features_share`.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clip_jax.data.records import BadRecord, Record, label_tuple, several_labels
from clip_jax.data.sources import make_source
from clip_jax.data.sources.splits import evaluation_split
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import label_hint
from clip_jax.evaluation.results import Images
from clip_jax.runtime import hosts


@dataclass
class Embedded:
    """The usable images of sources.

    Attributes:
      z: float32 `[n, ...]`, their embeddings.
      records: n records without their images.
      images: the n images.
      skipped: how many records could not be used, those that a source counts in `broken` included.
    """

    z: np.ndarray
    records: list[Record]
    images: Images
    skipped: int

    @property
    def concepts(self):
        """The names of the things that the images show, None where a record has no `concept`."""
        names = [record.get("concept") for record in self.records]
        return names if all(isinstance(name, str) for name in names) else None

    def select(self, rows):
        """Returns the images of `rows` (indices or a bool mask)."""
        records = [self.records[i] for i in np.arange(len(self.records))[rows]]
        return Embedded(self.z[rows], records, self.images.select(rows), self.skipped)


def open_source(source, split="", **fields):
    """Returns a data source.

    Args:
      source: a source string (docs/data.md).
      split: name of a split; empty: "test" where there is one, else the only split.
      fields: names of record fields for `make_source`; empty: the usual ones.

    Raises UserError, which lists the splits, when none is named and none is evident; and as `make_source` does.
    """
    fields = {name: value or None for name, value in fields.items()}
    return make_source(source, split or evaluation_split(source), **fields)


def embed(model, sources, batch_size=256, limit=None, function="embed_image"):
    """Returns the `Embedded` images of sources, in order.

    Args:
      limit: at most this many images, evenly spaced.
      function: the name of the model's function that embeds: `embed_image` or `image_features`.

    Raises UserError when no image is usable.
    """
    where = all_images(sources).where
    images = Images(sources, where[evenly(len(where), limit)])
    sharded = len(images) and getattr(model, "process_shard", (0, 1))[1] > 1
    z, rows, records = (_embed_shard if sharded else _embed_all)(model, images, batch_size, function)
    if not rows:
        names = " + ".join(source.name for source in sources)
        raise UserError(f"{names}: no usable image among {len(images)} records")
    broken = sum(sum(source.broken.values()) for source in sources)
    return Embedded(np.concatenate(z), records, images.select(rows), len(images) - len(rows) + broken)


def join(a, b):
    """Returns the images of two `Embedded` as one."""
    where = np.concatenate([a.images.where, b.images.where + [len(a.images.sources), 0]])
    images = Images(a.images.sources + b.images.sources, where)
    return Embedded(np.concatenate([a.z, b.z]), a.records + b.records, images, a.skipped + b.skipped)


def all_images(sources):
    """Returns the `Images` of all records of sources, in order."""
    return Images(sources, [(number, i) for number, source in enumerate(sources) for i in range(len(source))])


def evenly(n, limit):
    """Returns at most `limit` of the indices below n, evenly spaced, int `[m]`; all when `limit` is None."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def read(images, render, batch_size, share=None):
    """Reads and renders images in batches, by threads, one batch ahead.

    Args:
      images: the `Images`.
      render: record -> rendered image.
      batch_size: rows per batch, unusable ones included.
      share: a range of rows; by default all.

    Yields: of each batch (rows, records without their images, rendered images), lists of the usable ones.
    """
    share = range(len(images)) if share is None else share

    def read_row(row):
        try:
            record = images[row]
            return row, {key: value for key, value in record.items() if key != "image"}, render(record)
        except BadRecord:
            return None

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        pending = [pool.submit(read_row, row) for row in share[:batch_size]]
        for start in range(batch_size, len(share) + batch_size, batch_size):
            done = pending
            pending = [pool.submit(read_row, row) for row in share[start : start + batch_size]]
            batch = [item for item in (future.result() for future in done) if item is not None]
            yield tuple(list(part) for part in zip(*batch, strict=True)) if batch else ([], [], [])


def labels_of(embedded, source, task, classes=None):
    """Returns the labels of images that have one label each, int32 `[n]`; raises UserError as `label_sets` does."""
    if any(isinstance(record.get("label"), tuple) for record in embedded.records):
        raise several_labels(source, task)
    return label_sets(embedded, source, task, classes)[:, 0]


def label_sets(embedded, source, task, classes=None):
    """Returns the labels of images, int32 `[n, L]`: each row holds the labels of one image, then -1.

    Raises UserError, which names the task, for records without a label and for labels that are not below `classes`.
    """
    sets = [label_tuple(record) for record in embedded.records]
    labels = np.full((len(sets), max(map(len, sets))), -1, np.int32)
    for row, of_image in zip(labels, sets, strict=True):
        row[: len(of_image)] = of_image
    if unlabelled := sum(not of_image for of_image in sets):
        hint = label_hint(embedded.records[0]) if unlabelled == len(labels) else ""
        raise UserError(f"{task}: {source.name} has records without a label: {unlabelled} of {len(labels)}{hint}")
    if classes is not None and labels.max() >= classes:
        given = f"{source.name} has labels {labels[labels >= 0].min()}..{labels.max()}"
        raise UserError(f"{task}: {given}, but there are names for 0..{classes - 1}")
    return labels


def normalize(z):
    """Returns `z` `[..., E]` with rows of unit length, float32; zero rows stay zero."""
    z = np.asarray(z, np.float32)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def unit_vectors(z):
    """Returns one unit vector per example, float32 `[n, E]`: the normalised mean where `z` is `[n, ..., E]`."""
    return normalize(z.reshape(len(z), -1, z.shape[-1]).mean(1))


def _embed_all(model, images, batch_size, function):
    """Returns the embeddings (a list of batches), rows and records of the usable images."""
    z = []
    rows, records = [], []
    for batch_rows, batch_records, batch in read(images, lambda record: model.image_view(record, None), batch_size):
        if batch:
            z.append(np.asarray(getattr(model, function)(np.stack(batch)), np.float32))
        rows += batch_rows
        records += batch_records
    return z, rows, records


def _embed_shard(model, images, batch_size, function):
    """Like `_embed_all`; each process reads its shard. All take part in equally many batches and exchange records."""
    index, count = model.process_shard
    length, size = -(-len(images) // count), -(-batch_size // count)
    shard = range(len(images))[index * length : (index + 1) * length]
    batches = read(images, lambda record: model.image_view(record, None), size, shard)
    z = []
    rows, records = [], []
    for _ in range(0, length, size):
        batch_rows, batch_records, batch = next(batches, ([], [], []))
        blank = np.zeros((size - len(batch), model.image_view.size, model.image_view.size, 3), np.uint8)
        own = np.concatenate([np.stack(batch), blank]) if batch else blank
        z_batch = getattr(model, function + "_share")(own)
        z.append(z_batch.reshape(count, size, *z_batch.shape[1:]))
        rows.append(batch_rows + [-1] * len(blank))
        records += batch_records
    # Processes of one tensor-parallel group read the same shard.
    shards = dict(hosts.gather((index, (np.concatenate(rows), records))))
    rows = np.concatenate([shards[i][0] for i in range(count)])
    z = np.stack(z, axis=1).reshape(len(rows), *z[0].shape[2:])
    return [z[rows >= 0]], rows[rows >= 0].tolist(), [record for i in range(count) for record in shards[i][1]]
