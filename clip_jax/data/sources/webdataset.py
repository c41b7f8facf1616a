"""WebDataset tar shards in img2dataset's layout (000.jpg, 000.txt, 000.json, ...), read by offset.

Each shard is scanned once. The offsets of its members are stored in a small index file next to it, or in the cache
folder when that place is read-only. Every later read is one `pread`. A truncated shard gives its complete samples.
"""

import bisect
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging

from clip_jax.data.files import IMAGE_EXTENSIONS, PLUGIN_EXTENSIONS, FileReader, cache_folder, is_hidden
from clip_jax.data.records import BadRecord, BaseSource, plain
from clip_jax.errors import UserError

# The members of a sample, by the ending of their name. An index row holds (offset, size) of each; size is -1 for a
# missing member.
_SLOTS = (
    {extension[1:] for extension in (*IMAGE_EXTENSIONS, *PLUGIN_EXTENSIONS)},
    {"txt", "text", "caption"},
    {"json"},
    {"cls"},
)
_IMAGE, _TXT, _JSON, _CLS = range(len(_SLOTS))
_ROW = 2 * len(_SLOTS) * 8  # bytes of an index row
_HEAD_ROWS = 2  # rows of the index file before the first sample
_VERSION = 3  # of the index format
_CUT = "truncated shard"
_UNREADABLE = "unreadable shard"
_TAIL = "unreadable data after the end of an archive"
_NO_IMAGE = "sample without image"
_APART = "members of a sample are apart"
_DOUBLE = "two members of one kind in a sample"
_DOTS = "sample name that continues another one after a dot"
_LINK = "link to another member or file"
_REASONS = (_CUT, _UNREADABLE, _TAIL, _NO_IMAGE, _APART, _DOUBLE, _DOTS, _LINK)
_NO_DATA = -1  # size of a member that is a link
_LINE_END = re.compile(r"\r\n?|\n")  # alone: str.splitlines also splits at U+2028, U+0085 and others
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

    Raises UserError when no shard has a usable sample.
    """

    def __init__(self, shards, name="webdataset", *, image=None, text=None, label=None, lines=False):
        super().__init__(name, image, text, label)
        self._shards, self._files = list(shards), FileReader()
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
            self._fields = self._fields._replace(label="cls" if any(index.labelled for index in indexed) else None)
        else:
            self._check_label_field(names, asked=True)
        self._files_of_labels = self._shards

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        raw = self._members(index)
        return self._canonical(raw, ("txt",) if self._prefers_txt and "txt" in raw else None)

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
        except (ValueError, TypeError, RecursionError):
            raise BadRecord("malformed json") from None
        record["image"] = image
        if txt is not None:
            record["txt"] = [line for line in _LINE_END.split(plain(txt)) if line.strip()] if self._lines else txt
        if cls is not None:
            record["cls"] = cls.strip()
        return record

    def _spans(self, index, row):
        """Returns the (offset, size) of each slot of a sample; `index` is the `place` of an `_Index`."""
        if isinstance(index, np.ndarray):
            spans = index[row]
        else:
            spans = np.frombuffer(self._files.read(index, (row + _HEAD_ROWS) * _ROW, _ROW), np.int64)
        return [(offset, size) for offset, size in spans.reshape(-1, 2).tolist()]


def _index_shard(shard):
    """Returns the `_Index` of a shard; scans it when no valid index file exists."""
    status = os.stat(shard)
    cached = hashlib.sha256(os.fsencode(os.path.abspath(shard))).hexdigest()[:32]
    places = (shard + ".index", os.path.join(cache_folder(), "webdataset", cached + ".index"))
    stamp = [_VERSION, status.st_size, status.st_mtime_ns]
    for place in places:
        try:
            head = np.fromfile(place, np.int64, _HEAD_ROWS * _ROW // 8).tolist()
            count, labelled, *counts = head[3:]
            if head[:3] == stamp and os.path.getsize(place) == _ROW * (count + _HEAD_ROWS):
                broken = {reason: n for reason, n in zip(_REASONS, counts, strict=False) if n}
                return _Index(place, count, labelled, broken)
        except (OSError, ValueError):
            continue
    rows, broken = _scan(shard)
    labelled = int((rows[:, 2 * _CLS + 1] >= 0).sum())
    head = np.zeros((_HEAD_ROWS, _ROW // 8), np.int64)
    values = [*stamp, len(rows), labelled, *(broken[reason] for reason in _REASONS)]
    head.flat[: len(values)] = values
    for place in places:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(place)), exist_ok=True)
            partial = f"{place}.{os.getpid()}.tmp"
            np.concatenate([head, rows]).tofile(partial)
            os.replace(partial, place)  # atomic: several processes may write the same index
            return _Index(place, len(rows), labelled, broken)
        except OSError:
            continue
    return _Index(rows, len(rows), labelled, broken)


def _scan(shard):
    """Reads the headers of a shard; returns int64 `[samples, 2 * slots]` of (offset, size), and `{reason: count}`."""
    (members, damage), broken = _read_headers(shard), Counter()
    samples = _group(members, broken)
    if damage:
        broken[damage if samples or damage == _TAIL else _UNREADABLE] = 1
    # The last sample may lack members that lay behind the cut.
    if damage == _CUT and samples:
        others = [set(sample) for _, sample in samples[:-1]]
        if not set(samples[-1][1]) >= (set.union(*others) if others else {_IMAGE, _TXT}):
            samples.pop()
    rows = []
    for sample in _whole_samples(samples, broken):
        spans = ([*sample[slot][0]] if slot in sample else [0, -1] for slot in range(len(_SLOTS)))
        rows.append(list(itertools.chain.from_iterable(spans)))
    return np.array(rows, np.int64).reshape(-1, 2 * len(_SLOTS)), +broken


def _read_headers(shard):
    """Returns the members of a shard with a known ending, and the reason why it is damaged or None.

    A member is (archive, folder, file, offset, size): several archives may be joined in one file.
    """
    members, size = [], os.path.getsize(shard)
    with open(shard, "rb") as file:
        for archive in itertools.count():
            start = file.tell()
            try:
                clean = _read_archive(file, size, archive, members)
            except (tarfile.TarError, OSError, EOFError, ValueError):
                clean = False
            if not clean:
                return members, _TAIL if archive and not _is_header(file, start) else _CUT
            if (start := _skip_zeros(file, file.tell())) is None:
                return members, None
            file.seek(start)


def _read_archive(file, size, archive, members):
    """Adds the members of the archive at the file's position.

    Returns whether the end-of-archive mark follows the last member; the file's position is then after the mark.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # else tarfile keeps every header in memory
            is_link = member.islnk() or member.issym()
            if not (member.isfile() or is_link):
                continue
            length = _NO_DATA if is_link else member.size
            if member.offset_data + length > size:
                return False
            folder, _, name = member.name.rpartition("/")
            if not is_hidden(member.name) and _slot(name) is not None:
                members.append((archive, folder, name, member.offset_data, length))
        file.seek(tar.offset)
    return file.read(512) == bytes(512)


def _is_header(file, start):
    """Returns whether the header of a member begins at an offset."""
    file.seek(start)
    try:
        tarfile.TarInfo.frombuf(file.read(512), tarfile.ENCODING, "surrogateescape")
        return True
    except tarfile.HeaderError:
        return False


def _skip_zeros(file, start):
    """Returns the offset of the first block from `start` on that is not all zeros, or None at the end of the file."""
    file.seek(start)
    while block := file.read(2**20):
        if kept := block.lstrip(b"\0"):
            return start + (len(block) - len(kept)) // 512 * 512
        start += len(block)
    return None


def _slot(name):
    """Returns the slot of a file name by its ending, or None."""
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    return next((i for i, endings in enumerate(_SLOTS) if ending in endings), None)


def _group(members, broken):
    """Returns samples `(key, {slot: [(offset, size), ...]})` of adjacent members with the same key.

    The key of `a.seg.png` is `a`, up to the first dot, as in the webdataset package. There it is the member `seg.png`
    of the sample `a`, which is not read. Where no sample `a` exists, as in `shot v1.2.png`, the dot belongs to the key.
    """
    plain_keys = {(*place, name.rpartition(".")[0]) for *place, name, _, _ in members if name.count(".") == 1}
    samples, dotted = [], {}
    for archive, folder, name, offset, size in members:
        stem, slot = name.rpartition(".")[0], _slot(name)
        key = (archive, folder, stem)
        if "." in stem and (archive, folder, stem.partition(".")[0]) in plain_keys:
            dotted.setdefault(key, set()).add(slot)
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1].setdefault(slot, []).append((offset, size))
    # `a.v2.png` with a caption `a.v2.txt` looks like a sample of its own beside `a.png`.
    broken[_DOTS] = sum(_IMAGE in slots and len(slots) > 1 for slots in dotted.values())
    return samples


def _whole_samples(samples, broken):
    """Returns the samples that are whole, `{slot: [(offset, size)]}`; counts the others.

    Samples of the same name are kept where each of them has all members.
    """
    same_key = {}
    for key, sample in samples:
        same_key.setdefault(key, []).append(sample)
    apart = set()
    for key, parts in same_key.items():
        if len(parts) > 1 and not all(_IMAGE in part and part.keys() == parts[0].keys() for part in parts):
            apart.add(key)
    broken[_APART] = len(apart)
    whole = []
    for key, sample in samples:
        if key in apart:
            continue
        if _IMAGE not in sample:
            broken[_NO_IMAGE] += 1
        elif any(len(spans) > 1 for spans in sample.values()):
            broken[_DOUBLE] += 1
        elif any(size == _NO_DATA for spans in sample.values() for _, size in spans):
            broken[_LINK] += 1
        else:
            whole.append(sample)
    return whole
