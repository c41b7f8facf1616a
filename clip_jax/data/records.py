"""Records, and what every source of them shares.

A record is a dict that describes one example:

    image        encoded bytes, or a uint8 array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]`
    texts        list of str, the captions of the image
    label        int, the index of its class; absent when the data set has no labels, -1 when the class is unknown.
                 A tuple of int, empty when no class is known, where the source has several labels of one image
    class_name   str, the name of that class; a list of them where `label` is a tuple
    caption_error   str, why a record whose caption field is filled has no caption; else absent

All other fields of a data set keep their own names. Text that is not UTF-8 carries surrogate escapes, which the text
view rejects. An unreadable record raises `BadRecord`. Neither ends a run.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from clip_jax.data.threads import mapped, runs_of
from clip_jax.errors import TextLabelError, UserError, did_you_mean

Record = dict[str, Any]


class BadRecord(Exception):
    """Raised for an unusable record.

    `args[0]` is the reason: a short category such as "corrupt image", under which the record is counted.
    """


class Source(Protocol):
    """Records by index.

    A source is picklable, because each worker process gets a copy. It opens files on first use in each process.

    Attributes:
      name: str, for messages.
      class_names: list of str, indexed by label, or None when the data set does not name its classes.
      broken: `{reason: count}` of what was unreadable while the source was indexed.

    Optional attributes:
      multi_label: bool, whether labels are tuples; False by default.
      numbering: hashable. Sources with equal ones give the same numbers to the same classes. By default a source of its
        own.
      naming(record): str, how numbered classes get names, for messages; `record` is a record of the source.
    """

    name: str
    class_names: Sequence[str] | None
    broken: Mapping[str, int]

    def __len__(self):
        """Returns the number of records."""

    def __getitem__(self, index):
        """Returns the record at `index`, an int in [0, len); raises BadRecord when it cannot be read."""


class Fields(NamedTuple):
    """The fields of a data set that become `image`, `texts` and `label` of its records."""

    image: str | None
    texts: tuple[str, ...]
    label: str | None


# Usual names of fields, best first; compared in lower case.
_IMAGE_NAMES = ("image", "image_path", "filepath", "file_path", "path", "file_name", "filename", "file", "img")
_IMAGE_NAMES += ("image/encoded", "image_bytes", "jpg", "png", "webp")
_TEXT_NAMES = ("captions", "caption", "texts", "text", "captions/text", "title", "alt_text", "sentence", "sentences")
_TEXT_NAMES += ("name", "description")
_LABEL_NAMES = ("label", "class_id", "class", "category", "target")
_CAPTION_KEYS = ("caption", "raw")  # of the objects that COCO's annotations hold instead of a text
_NO_TEXT = "caption is not text"
# Set by this package; a data set's own fields are dropped.
CANONICAL = {"image", "texts", "label", "source_id", "caption_error"}
LABEL_TEXT = "label_text"  # the record field of a text in a field "label" that is not the source's label
MAX_LABEL = 2**31  # labels of a batch are int32
PEEKED = 16  # records whose fields are looked at when a source is made


class BaseSource:
    """What the sources share: the choice of fields, class names, and the canonical form of a record.

    Args:
      name: str, for messages.
      image: name of the image field, or None to choose it by its usual names.
      text: name or names of the caption fields, or None.
      label: name of the label field, or None.
    """

    class_names: Sequence[str] | None = None
    multi_label: bool = False

    def __init__(self, name, image=None, text=None, label=None):
        self.name = name
        self.broken = Counter()
        self._files_of_labels = ()  # paths of the files that hold the labels
        self._fields = Fields(image, (text,) if isinstance(text, str) else tuple(text or ()), label)

    @property
    def numbering(self):
        """Equal for sources that number classes in the same way: of the same files and the same label field."""
        files = map(os.path.realpath, self._files_of_labels)
        return (type(self), *files, self._fields.label) if self._files_of_labels else id(self)

    def naming(self, record):
        """Returns how numbered classes get names, for messages."""
        if isinstance(record.get("class_name"), str):
            return f"write {self.name}?label=class_name, which takes the classes from this field"
        return f"write {self.name}?label=FIELD with a field that names the class"

    def _peek(self, read, more=(), first=PEEKED):
        """Returns the first value of each field of some readable records; `read(index)` returns a raw record.

        The records are the first `first` ones and those at the indices `more`. A list is preferred to a single value.
        """
        fields = {}
        for index in (*range(min(len(self), first)), *more):
            try:
                found = read(index)
            except BadRecord:
                continue
            fields |= {k: v for k, v in found.items() if k not in fields or is_list(v) and not is_list(fields[k])}
        return fields

    def _choose_fields(self, names):
        """Sets the image, caption and label fields: those asked for, else the first of `names` with a usual name."""
        names = list(names)
        image, texts, label = self._fields
        for field in filter(None, (image, *texts, label)):
            if field not in names:
                hint = did_you_mean(field, names)
                raise UserError(f"{self.name}: no field {field!r}{hint}; fields: {listed(names)}")
        self._fields = Fields(
            image or _first(_IMAGE_NAMES, names),
            texts or tuple(filter(None, [_first(_TEXT_NAMES, names)])),
            label or _first(_LABEL_NAMES, names),
        )

    def _canonical(self, raw, texts=None):
        """Returns a raw record with the chosen fields under their canonical names, and bytes of other fields as str.

        `texts` names the caption fields of this record, if they differ from those of the source.
        """
        image, chosen, label = self._fields
        texts = chosen if texts is None else texts
        values = {key: plain(value) for key, value in raw.items() if key != image}
        record = {key: value for key, value in values.items() if key not in CANONICAL and key != label}
        if image in raw:
            record["image"] = raw[image]
        if label is not None:
            record["label"] = self._label(values.get(label))
        if label != "label" and any(isinstance(value, str) for value in as_list(values.get("label"))):
            record[LABEL_TEXT] = values["label"]
        self._add_class_name(record, replace=True)
        if texts:
            return with_texts(record, [values.get(text) for text in texts])
        return record | {"texts": [record["class_name"]] if isinstance(record.get("class_name"), str) else []}

    def _check_label_field(self, raw, asked):
        """Sets `multi_label` by a value of the label field; drops a field of text that no class names explain.

        Args:
          raw: a raw record.
          asked: whether the user named the field. Then text is a UserError.
        """
        label = self._fields.label
        value = plain(raw.get(label))
        self.multi_label = label is not None and is_list(value)
        is_text = any(isinstance(read, str) for read in map(_read_or_none, as_list(value)))
        if label is None or self.class_names is not None or not is_text:
            return
        if asked:
            label = LABEL_TEXT if label == "label" else label
            raise TextLabelError(self.name, label)
        self._fields, self.multi_label = self._fields._replace(label=None), False

    def _label(self, value):
        """Returns the class index of a label or class name, -1 for none; with `multi_label` a tuple of all.

        Raises BadRecord for an unknown one, and UserError for a number that has no class name.
        """
        if not self.multi_label:
            return self._one_label(value)
        labels = dict.fromkeys(map(self._one_label, as_list(value)))
        return tuple(label for label in labels if label >= 0)

    def _one_label(self, value):
        """Returns the class index of a label or class name, -1 for none; raises as `_label` does."""
        if self.class_names is not None and isinstance(value, str) and value in self._class_index:
            return self._class_index[value]
        label = read_label(value)
        if label is None:
            return -1
        if isinstance(label, str):
            if self.class_names is None or label not in self._class_index:
                raise BadRecord("unknown label")
            return self._class_index[label]
        if self.class_names is not None and not -1 <= label < len(self.class_names):
            count = len(self.class_names)
            raise UserError(
                f"{self.name}: a record has label {label}, but there are {count} class names, 0 to {count - 1}; "
                "-1 is no label"
            )
        if not -1 <= label < MAX_LABEL:
            raise BadRecord("label out of range")
        return label

    def _add_class_name(self, record, replace=False):
        """Sets `class_name` of a record with a label, if the classes have names; `replace` says whether it may be set.

        TFDS has the label -1 for an unknown class.
        """
        if self.class_names is not None and (replace or "class_name" not in record) and label_tuple(record):
            names = [self._class_name(label) for label in label_tuple(record)]
            record["class_name"] = names if self.multi_label else names[0]

    def _set_classes(self, names):
        self.class_names = list(names)
        self._class_index = {name: i for i, name in enumerate(self.class_names)}

    def _class_name(self, label):
        return self.class_names[label].replace("_", " ")


def usual_image(names):
    """Returns the name among `names` that is the most usual one of a field of images, or None."""
    return _first(_IMAGE_NAMES, names)


def _first(candidates, names):
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[c] for c in candidates if c in lower), None)


def read_any(source, tries=20, wanted=lambda record: True):
    """Returns the first usable and wanted record among the first `tries` of a source; None when there is none."""
    for index in range(min(len(source), tries)):
        try:
            record = source[index]
        except BadRecord:
            continue
        if wanted(record):
            return record
    return None


class DerivedSource(BaseSource):
    """A source whose records are those of another one, selected or with more fields; its labels are the same.

    Args:
      source: the other source.
      name: str, for messages.
    """

    def __init__(self, source, name):
        super().__init__(name)
        self._source = source
        self.class_names, self.broken = source.class_names, source.broken
        self.multi_label = getattr(source, "multi_label", False)

    @property
    def numbering(self):
        return getattr(self._source, "numbering", id(self._source))

    def naming(self, record):
        return BaseSource.naming(self, record) if not hasattr(self._source, "naming") else self._source.naming(record)

    def check_labels(self):
        check_labels(self._source)


def several_labels(source, task):
    """Returns the UserError for a source with several labels of one image, of which `task` needs one."""
    return UserError(f"{source.name} has several labels of one image, but {task} needs one label")


def check_labels(source, task=""):
    """Raises UserError when equal labels of a source may mean different classes, which only a mixture's can.

    Args:
      source: the source.
      task: what needs one label of each image, for the message; several are then an error. Empty: they are allowed.
    """
    if task and getattr(source, "multi_label", False):
        raise several_labels(source, task)
    getattr(source, "check_labels", lambda: None)()


def label_tuple(record):
    """Returns the class indices of a record, a tuple; empty where it has no label."""
    label = record.get("label")
    if isinstance(label, tuple):
        return label
    return () if label is None or label < 0 else (label,)


def listed(names):
    """Returns the names of fields as one line for a message; a damaged header has line ends and bytes in its names."""
    text = ", ".join(" ".join(name.split()) for name in names)
    return (text if len(text) <= 1000 else text[:1000] + " ...").encode("utf-8", "replace").decode()


def plain(value):
    """Returns NumPy values and bytes as plain Python values; bytes that are not UTF-8 become surrogate escapes.

    An array of two or more dimensions stays an array.
    """
    if isinstance(value, str | bytes):  # most values
        return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tolist() if value.ndim == 1 else value
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    return value


def as_list(value):
    """Returns the items of a list, tuple or array as plain Python values; any other value as a list of one."""
    value = plain(value)
    return list(value) if is_list(value) else [value]


def is_list(value):
    """Returns whether a value is a list, a tuple, or an array of at least one dimension."""
    return isinstance(value, list | tuple) or isinstance(value, np.ndarray) and value.ndim > 0


def _read_or_none(value):
    """Returns `read_label(value)`, None for what is no label."""
    try:
        return read_label(value)
    except BadRecord:
        return None


def read_label(value):
    """Returns a label: an int for an integral number or its text ("10.0" is 10), a str for a class name, None for none.

    None, NaN, blank text and an empty list are no label. Raises BadRecord for any other list and for an object.
    """
    value = plain(value)
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        if isinstance(value, list | tuple) and not value:
            return None
        raise BadRecord("several labels of one image")
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = str(value).strip()
    if text in ("", "nan", "NaN"):
        return None
    return int(text.partition(".")[0]) if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", text) else text


def read_texts(value):
    """Returns `(texts, is_text)` of a caption field: its texts in order, and whether all of its values are text.

    A field holds a text or a list of texts. None and NaN are no text, in a list too. A number is its digits. An object
    `{"caption": text}` or `{"raw": text}`, as in COCO's annotations, is this text. Anything else is left out.
    """
    texts, is_text = [], True
    values = plain(value)
    for item in values if isinstance(values, list | tuple) else [values]:
        if isinstance(item, dict):
            item = next((plain(item[key]) for key in _CAPTION_KEYS if isinstance(item.get(key), str | bytes)), item)
        if item is None or isinstance(item, float) and math.isnan(item):
            continue
        is_number = isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
        if isinstance(item, str) or is_number:
            texts.append(str(item))
        else:
            is_text = False
    return texts, is_text


def with_texts(record, values):
    """Returns a record whose `texts` are read from the values of its caption fields by `read_texts`.

    When no text is left because a value is not text, `caption_error` holds the reason.
    """
    read = [read_texts(value) for value in values]
    texts = [text for some, _ in read for text in some]
    if all(is_text for _, is_text in read) or any(text.strip() for text in texts):
        return record | {"texts": texts}
    return record | {"texts": texts, "caption_error": _NO_TEXT}


def records(source, first=0, end=None):
    """Returns an iterator of `(index, record)` in order, from index `first` on and below `end`; threads read ahead.

    An unreadable record is its `BadRecord`. Each block of a source of blocks (`clip_jax.data.blocks`) is read once.
    """
    runs, ahead = runs_of(source, first, len(source) if end is None else end)
    return itertools.chain.from_iterable(mapped(_read_run, runs, ahead))


def _read_run(run):
    (read, begin, indices), found = run, []
    some = read()
    for index in indices:
        try:
            found.append((begin + index, some[index]))
        except BadRecord as bad:
            found.append((begin + index, bad))
    return found


def hash64(data):
    """Returns the first 64 bits of the BLAKE2b hash of bytes, an int."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def image_key(image):
    """Returns a 64-bit hash of an image: of its encoded bytes, or of the values and shape of an array."""
    return hash64(image.tobytes() + str(image.shape).encode() if isinstance(image, np.ndarray) else bytes(image or b""))


def fingerprint(source):
    """Returns a hex digest that identifies a data set: of its number of records and of 32 evenly spaced records.

    A source may have its own as an attribute `fingerprint`.
    """
    if known := getattr(source, "fingerprint", None):
        return known
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=16)
    for i in range(min(32, len(source))):
        try:
            record = source[i * len(source) // min(32, len(source))]
            digest.update(json.dumps([image_key(record.get("image")), record["texts"]]).encode())
        except BadRecord as bad:
            digest.update(bad.args[0].encode())
    return digest.hexdigest()
