"""WebDataset tar shards in img2dataset's layout (000.jpg, 000.txt, 000.json, ...), read by offset.

Each shard is scanned once. The offsets of its members are stored in a small index file next to it, or in the cache
folder when that place is read-only. Every later read is one `pread`. A truncated shard gives its complete samples.
"""

import bisect
import contextlib
import hashlib
import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging

from clip_jax.data.files import FileReader, cache_folder
from clip_jax.data.records import PEEKED, BadRecord, BaseSource, read_label
from clip_jax.data.replacing import replacing
from clip_jax.data.sources import tar
from clip_jax.data.sources.shards import LOCAL, too_many
from clip_jax.data.sources.tar_samples import CLS, REASONS, SLOTS, raw_record
from clip_jax.errors import UserError

# An index row holds the (offset, size) of the member of each slot, and of the whole sample where it has further
# members; size is -1 for a missing one.
_COLUMNS = 2 * (len(SLOTS) + 1)
_ROW = _COLUMNS * 8  # bytes of an index row
_HEAD_ROWS = 2  # rows of the index file before the first sample
_VERSION = 4  # of the index format
_SHARDS_PEEKED = 16  # shards, evenly spaced, whose first sample is looked at for its fields


class _Index(NamedTuple):
    """The index of a shard.

    Attributes:
      place: path of the index file, or the array of `_scan` when no file can be written.
      count: int, number of samples.
      labelled: int, number of samples with a .cls member.
      broken: `{reason: count}`.
    """

    place: str | np.ndarray
    count: int
    labelled: int
    broken: dict[str, int]


class WebDatasetSource(BaseSource):
    """Samples of tar shards: image bytes, captions (.txt, else the JSON's caption), label (.cls) and the JSON's fields.

    Each record chooses for itself between .txt and JSON. A sample whose members are apart, or that has two members of
    one kind, is left out and counted in `broken`.

    Args:
      shards: list of paths.
      name: str, for messages.
      image: name of the image field, or None for the image member.
      text: name or names of the caption fields, or None.
      label: name of the label field, or None for the .cls member. A field of the JSON may hold a list of labels.
      lines: bool, whether each line of a .txt member is a caption.

    Raises UserError when no shard has a usable sample, and when more than `LOCAL` shards have no index.
    """

    def __init__(self, shards, name="webdataset", *, image=None, text=None, label=None, lines=False):
        super().__init__(name, image, text, label)
        self._shards, self._files = list(shards), FileReader()
        if len(self._shards) > LOCAL and (missing := sum(not _has_index(shard) for shard in self._shards)) > LOCAL:
            raise too_many(name, f"{missing:,} shards without an index", f"{LOCAL:,} are indexed")
        with ThreadPoolExecutor(min(16, len(self._shards) or 1)) as pool:
            indexed = list(pool.map(_index_shard, self._shards))
        self._indexes, self._lines = [index.place for index in indexed], lines
        self._ends = list(itertools.accumulate(index.count for index in indexed))
        for shard, index in zip(self._shards, indexed, strict=True):
            self.broken.update(index.broken)
            if index.broken:
                logging.warning("%s: %s; using its %d complete samples", shard, ", ".join(index.broken), index.count)
        if not self._ends or not self._ends[-1]:
            reasons = ", ".join(self.broken) or "empty"
            raise UserError(f"{name}: no usable sample in {len(self._shards)} shards ({reasons})")
        shards = range(0, len(indexed), -(-len(indexed) // _SHARDS_PEEKED))
        names = self._peek(self._members, [self._ends[i] - indexed[i].count for i in shards if indexed[i].count])
        self._choose_fields(names or {"image": None})
        if image is None:
            self._fields = self._fields._replace(image="image")
        self._prefers_txt = text is None
        if label is None:
            has_numbers = any(index.labelled for index in indexed) and not self._names_classes()
            self._fields = self._fields._replace(label="cls" if has_numbers else None)
        else:
            self._check_label_field(names, asked=True)
        self._files_of_labels = self._shards

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        raw = self._members(index)
        return self._canonical(raw, ("txt",) if self._prefers_txt and "txt" in raw else None)

    def _names_classes(self):
        """Returns whether the first .cls members are all text, the names of classes."""
        labels = []
        for index in range(min(len(self), PEEKED)):
            with contextlib.suppress(BadRecord):
                labels.append(read_label(self._members(index).get("cls")))
        labels = [label for label in labels if label is not None]
        return bool(labels) and all(isinstance(label, str) for label in labels)

    def _members(self, index):
        """Returns the raw record: the JSON's fields, `image`, and `txt` and `cls` where the sample has them."""
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        *spans, whole = self._spans(self._indexes[shard], row)
        spans = [span if span[1] >= 0 else None for span in spans]
        if whole[1] >= 0:
            data = self._files.read(self._shards[shard], *whole)
            records = tar.records_of(data, self._lines)
            if len(records) == 1:  # else the rules find something else without the rest of the shard
                return records[0]
        start = min(offset for offset, _ in filter(None, spans))
        end = max(offset + size for offset, size in filter(None, spans))
        data = self._files.read(self._shards[shard], start, end - start)  # the members of a sample are adjacent
        members = (span and data[span[0] - start : sum(span) - start] for span in spans)
        return raw_record(*members, lines=self._lines)

    def _spans(self, index, row):
        """Returns the (offset, size) of each slot of a sample; `index` is the `place` of an `_Index`."""
        if isinstance(index, np.ndarray):
            spans = index[row]
        else:
            spans = np.frombuffer(self._files.read(index, (row + _HEAD_ROWS) * _ROW, _ROW), np.int64)
        return [(offset, size) for offset, size in spans.reshape(-1, 2).tolist()]


def _places(shard):
    """Returns the paths where the index of a shard may be."""
    cached = hashlib.sha256(os.fsencode(os.path.abspath(shard))).hexdigest()[:32]
    return shard + ".index", os.path.join(cache_folder(), "webdataset", cached + ".index")


def _has_index(shard):
    """Returns whether a shard has an index file, valid or not."""
    return any(map(os.path.exists, _places(shard)))


def _index_shard(shard):
    """Returns the `_Index` of a shard; scans it when no valid index file exists."""
    status, places = os.stat(shard), _places(shard)
    stamp = [_VERSION, status.st_size, status.st_mtime_ns]
    for place in places:
        try:
            head = np.fromfile(place, np.int64, _HEAD_ROWS * _ROW // 8).tolist()
            count, labelled, *counts = head[3:]
            if head[:3] == stamp and os.path.getsize(place) == _ROW * (count + _HEAD_ROWS):
                broken = {reason: n for reason, n in zip(REASONS, counts, strict=False) if n}
                return _Index(place, count, labelled, broken)
        except (OSError, ValueError):
            continue
    rows, broken = _scan(shard)
    labelled = int((rows[:, 2 * CLS + 1] >= 0).sum())
    head = np.zeros((_HEAD_ROWS, _ROW // 8), np.int64)
    values = [*stamp, len(rows), labelled, *(broken[reason] for reason in REASONS)]
    head.flat[: len(values)] = values
    for place in places:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
            with replacing(place) as file:
                np.concatenate([head, rows]).tofile(file)
            return _Index(place, len(rows), labelled, broken)
        except OSError:
            continue
    return _Index(rows, len(rows), labelled, broken)


def _scan(shard):
    """Reads the headers of a shard; returns int64 `[samples, columns]` of an index's rows, and `{reason: count}`."""
    broken = Counter()
    samples, _, size = tar.read_shard(shard, broken)
    rows = []
    for sample in samples:
        whole = (sample.start, min(sample.end, size) - sample.start) if sample.others else None
        rows.append([number for span in (*sample.spans, whole) for number in span or (0, -1)])
    return np.array(rows, np.int64).reshape(-1, _COLUMNS), +broken
