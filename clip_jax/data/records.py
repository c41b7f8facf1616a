"""Records, and what every source of them shares.

A record is a dict. `image` is encoded bytes or a uint8 array, `texts` a list of captions of that image, `label` an integer (absent when the
data set has none), `class_name` its name; all other fields keep their own names. Captions that are not UTF-8 carry surrogates, which the
text view refuses, and a record that cannot be read raises `BadRecord`: neither ends a run.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from clip_jax.errors import UserError, did_you_mean

Record = dict[str, Any]


# Names that fields have in practice, best first. Compared in lower case.
_IMAGE_NAMES = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "file",
    "img",
    "image/encoded",
    "image_bytes",
    "jpg",
    "png",
    "webp",
)


_TEXT_NAMES = (
    "captions",
    "caption",
    "texts",
    "text",
    "captions/text",
    "title",
    "alt_text",
    "sentence",
    "sentences",
    "name",
    "description",
)


_CANONICAL = {"image", "texts", "label", "source_id"}  # a data set's own fields of these names give way


_LABEL_NAMES = ("label", "class_id", "class", "category", "target")


_CHUNK = 4096  # records that are read ahead


class BadRecord(Exception):
    """A record that cannot be used. `args[0]` is the reason, a short category such as "corrupt image" under which it is counted."""


class Source(Protocol):
    """Records by index. Picklable, because worker processes get a copy; files are opened on first use in each process."""

    name: str
    class_names: Sequence[str] | None  # by label, where the data set says so
    broken: Mapping[str, int]  # what was found unreadable while indexing, by reason

    def __len__(self): ...

    def __getitem__(self, index): ...


class BaseSource:
    """What all sources below share: the choice of fields and the canonical form of a record."""

    class_names: Sequence[str] | None = None

    def __init__(self, name, image=None, text=None, label=None):
        self.name = name
        self.broken = Counter()
        self._fields = (image, (text,) if isinstance(text, str) else tuple(text or ()), label)

    def _peek(self, read):
        """The first values of all fields that the first 16 readable records have."""
        fields = {}
        for index in range(min(len(self), 16)):
            try:
                fields = read(index) | fields
            except BadRecord:
                continue
        return fields

    def _choose_fields(self, names):
        """Settles which fields are image, captions and label: those asked for, else the first that has a usual name."""
        names = list(names)
        image, texts, label = self._fields
        for field in filter(None, (image, *texts, label)):
            if field not in names:
                raise UserError(
                    f"{self.name}: no field {field!r}{did_you_mean(field, names)}; fields: {', '.join(names)}"
                )
        self._fields = (
            image or _first(_IMAGE_NAMES, names),
            texts or tuple(filter(None, [_first(_TEXT_NAMES, names)])),
            label or _first(_LABEL_NAMES, names),
        )

    def _canonical(self, raw):
        """The record with the chosen fields under their canonical names; bytes other than the image become str."""
        image, texts, label = self._fields
        values = {key: plain(value) for key, value in raw.items() if key != image}
        record = {key: value for key, value in values.items() if key not in _CANONICAL and key != label}
        if image in raw:
            record["image"] = raw[image]
        if values.get(label) is not None:
            record["label"] = self._label(values[label])
        if self.class_names is not None and record.get("label", -1) >= 0:  # TFDS has -1 where it is unknown
            record["class_name"] = self._class_name(record["label"])
        captions = itertools.chain.from_iterable(_as_list(values.get(text)) for text in texts)
        record["texts"] = [str(c) for c in captions] if texts else _as_list(record.get("class_name"))
        return record

    def _drop_text_label(self, raw, asked):
        """Text under a usual name of labels is not a label; asked for by name, it is an error."""
        image, texts, label = self._fields
        if label is not None and self.class_names is None and isinstance(raw.get(label), str | bytes):
            if asked:
                raise UserError(
                    f"{self.name}: label field {label!r} holds text; labels here are integers or a TFDS ClassLabel"
                )
            self._fields = (image, texts, None)

    def _label(self, value):
        """The class's place in the list of names, from 0, or -1 where it is unknown; raises UserError for a label beyond the list."""
        if self.class_names is not None and isinstance(value, str) and value in self._class_index:
            return self._class_index[value]
        try:
            label = int(value)
        except (TypeError, ValueError):
            raise BadRecord("unknown label") from None
        if self.class_names is not None and not -1 <= label < (count := len(self.class_names)):
            raise UserError(
                f"{self.name}: a record has label {label}, but there are {count} class names, 0 to {count - 1}; -1 is no label"
            )
        return label

    def _set_classes(self, names):
        self.class_names = list(names)
        self._class_index = {name: i for i, name in enumerate(self.class_names)}

    def _class_name(self, label):
        return self.class_names[label].replace("_", " ")


def _first(candidates, names):
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[c] for c in candidates if c in lower), None)


def plain(value):
    """NumPy and bytes -> plain Python; invalid UTF-8 becomes surrogates, which the text view refuses."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tolist() if value.ndim == 1 else value
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    return value


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def records(source, first=0):
    """Records from the first one on, with index, in order, read ahead by threads; BadRecord in the place of those that cannot be read."""

    def read(index):
        try:
            return source[index]
        except BadRecord as bad:
            return bad

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(first, len(source), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(source)))
            yield from zip(indices, pool.map(read, indices, chunksize=64), strict=True)


def hash64(data):
    """The first 64 bits of a BLAKE2b hash of bytes, an int."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def image_key(image):
    """A hash of the bytes of a picture."""
    return hash64(image.tobytes() + str(image.shape).encode() if isinstance(image, np.ndarray) else bytes(image or b""))


def fingerprint(source):
    """Tells data sets apart: a hash of their number of records and of 32 records, evenly spaced."""
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=16)
    for i in range(min(32, len(source))):
        try:
            record = source[i * len(source) // min(32, len(source))]
            digest.update(json.dumps([image_key(record.get("image")), record["texts"]]).encode())
        except BadRecord as bad:
            digest.update(bad.args[0].encode())
    return digest.hexdigest()
