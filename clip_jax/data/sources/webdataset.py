"""WebDataset tar shards in img2dataset's layout (000.jpg, 000.txt, 000.json, ...), read by offset.

Each shard is scanned once. The offsets of its members are stored in a small index file next to it, or in the cache
folder when that place is read-only. Every later read is one `pread`. A truncated shard gives its complete samples.
"""

import bisect
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from clip_jax.data.files import IMAGE_EXTENSIONS, FileReader
from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.errors import UserError

# The members of a sample, by the part of their name after the first dot. An index row holds (offset, size) of each;
# size is -1 for a missing member.
_SLOTS = ({extension[1:] for extension in IMAGE_EXTENSIONS}, {"txt", "text", "caption"}, {"json"}, {"cls"})
_ROW = 2 * len(_SLOTS) * 8  # bytes of an index row
_VERSION = 1  # of the index format
_CUT = "truncated shard"
_UNREADABLE = "unreadable shard"
_NO_IMAGE = "sample without image"
_REASONS = (_CUT, _UNREADABLE, _NO_IMAGE)


class WebDatasetSource(BaseSource):
    """Samples of tar shards: image bytes, captions (.txt, else the JSON's caption), label (.cls) and the JSON's fields.

    Args:
      shards: list of paths.
      name: str, for messages.
      image: name of the image field, or None for the image member.
      text: name or names of the caption fields, or None.
      label: name of the label field, or None for the .cls member.

    Raises UserError when no shard has a usable sample.
    """

    def __init__(self, shards, name="webdataset", *, image=None, text=None, label=None):
        super().__init__(name, image, text, label)
        self._shards, self._files = list(shards), FileReader()
        with ThreadPoolExecutor(min(16, len(self._shards) or 1)) as pool:
            indexed = list(pool.map(_index_shard, self._shards))
        self._indexes = [index for index, _, _ in indexed]
        self._ends = list(itertools.accumulate(count for _, count, _ in indexed))
        for shard, (_, count, broken) in zip(self._shards, indexed, strict=True):
            self.broken.update(broken)
            if broken:
                logging.warning("%s: %s; using its %d complete samples", shard, ", ".join(broken), count)
        if not self._ends or not self._ends[-1]:
            reasons = ", ".join(self.broken) or "empty"
            raise UserError(f"{name}: no usable sample in {len(self._shards)} shards ({reasons})")
        names = self._peek(self._members) or {"image": None}
        self._choose_fields(names)
        if image is None:
            self._fields = self._fields._replace(image="image")
        if text is None and "txt" in names:
            self._fields = self._fields._replace(texts=("txt",))
        if label is None:
            self._fields = self._fields._replace(label="cls" if "cls" in names else None)

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        return self._canonical(self._members(index))

    def _members(self, index):
        """Returns the raw record: the JSON's fields, `image`, and `txt` and `cls` where the sample has them."""
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        spans = self._spans(self._indexes[shard], row)
        start = min(offset for offset, size in spans if size >= 0)
        end = max(offset + size for offset, size in spans if size >= 0)
        data = self._files.read(self._shards[shard], start, end - start)  # the members of a sample are adjacent
        image, txt, meta, cls = (
            data[offset - start : offset - start + size] if size >= 0 else None for offset, size in spans
        )
        try:
            record = dict(json.loads(meta)) if meta is not None else {}
        except (ValueError, TypeError):
            raise BadRecord("malformed json") from None
        record["image"] = image
        if txt is not None:
            record["txt"] = txt
        if cls is not None:
            record["cls"] = cls.strip()
        return record

    def _spans(self, index, row):
        """Returns the (offset, size) of each slot of a sample; `index` is as from `_index_shard`."""
        if isinstance(index, np.ndarray):
            spans = index[row]
        else:
            spans = np.frombuffer(self._files.read(index, (row + 1) * _ROW, _ROW), np.int64)
        return [(offset, size) for offset, size in spans.reshape(-1, 2).tolist()]


def _index_shard(shard):
    """Returns `(index, number of samples, {reason: count})` of a shard; scans it when no valid index file exists.

    `index` is the path of the index file, or the array of `_scan` when no file can be written.
    """
    status = os.stat(shard)
    cached = hashlib.sha256(os.path.abspath(shard).encode()).hexdigest()[:32]
    folder = os.environ.get("CLIP_JAX_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "clip_jax"))
    places = (shard + ".index", os.path.join(folder, "webdataset", cached + ".index"))
    stamp = [_VERSION, status.st_size, status.st_mtime_ns]
    for place in places:
        try:
            head = np.fromfile(place, np.int64, _ROW // 8).tolist()
            if head[:3] == stamp and os.path.getsize(place) == _ROW * (head[3] + 1):
                return place, head[3], {reason: n for reason, n in zip(_REASONS, head[4:7], strict=True) if n}
        except (OSError, IndexError):
            continue
    rows, broken = _scan(shard)
    head = stamp + [len(rows)] + [broken[reason] for reason in _REASONS] + [0]
    for place in places:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
            partial = f"{place}.{os.getpid()}.tmp"
            np.concatenate([np.array([head], np.int64), rows]).tofile(partial)
            os.replace(partial, place)  # atomic: several processes may write the same index
            return place, len(rows), broken
        except OSError:
            continue
    return rows, len(rows), broken


def _scan(shard):
    """Reads the headers of a shard; returns int64 `[samples, 2 * slots]` of (offset, size), and `{reason: count}`."""
    rows, keys = [], []
    broken, size = Counter(), os.path.getsize(shard)
    clean = False
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # else tarfile keeps every header in memory
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    break
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                slot = next((i for i, names in enumerate(_SLOTS) if extension.lower() in names), None)
                if slot is None:
                    continue
                if not keys or keys[-1] != (folder, stem):
                    keys.append((folder, stem))
                    rows.append([0, -1] * len(_SLOTS))
                rows[-1][2 * slot : 2 * slot + 2] = member.offset_data, member.size
            with open(shard, "rb") as file:
                file.seek(tar.offset)
                clean = file.read(512) == bytes(512)  # the end-of-archive mark
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass
    if not clean:
        broken[_CUT if rows else _UNREADABLE] = 1
        # The last sample may lack members that lay behind the cut.
        if rows and not _filled(rows[-1]) >= (set.union(*map(_filled, rows[:-1])) if len(rows) > 1 else {0, 1}):
            rows.pop()
    usable = [row for row in rows if row[1] >= 0]
    broken[_NO_IMAGE] = len(rows) - len(usable)
    return np.array(usable, np.int64).reshape(-1, 2 * len(_SLOTS)), +broken


def _filled(row):
    return {slot for slot in range(len(_SLOTS)) if row[2 * slot + 1] >= 0}
