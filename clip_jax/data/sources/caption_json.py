"""Captions in one JSON file: Karpathy's splits of COCO and Flickr, and COCO's own annotations.

dataset_coco.json, dataset_flickr30k.json   {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
captions_val2017.json                       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
"""

import functools
import gc
import json
import os
from typing import NamedTuple

import numpy as np

from clip_jax.data.files import read_file
from clip_jax.data.records import BaseSource
from clip_jax.data.shared import Shared
from clip_jax.errors import UserError, unknown

_RESTVAL = "restval"  # COCO's validation pictures outside of Karpathy's val and test
_LOOKED_AT = 16  # pictures, evenly spaced, of which one must exist


class CaptionJsonSource(BaseSource):
    """The pictures of one split of a JSON file with their captions.

    A record has `image`, `texts` and `path`, and the other fields of the file's entry that are text or numbers, `split`
    among them. The split "train" of COCO includes "restval", as in the literature since VSE++ (Faghri et al. 2018);
    `?where=split:train` leaves it out.

    Args:
      path: the JSON file.
      split: name of a split; a file without splits has "train" alone.
      images: folder of the pictures, by default that of the file. They lie in it under `filepath` and `filename`, or
        under `filename` alone.

    Raises UserError for another kind of JSON, an unknown split, and when no picture is found.
    """

    def __init__(self, path, split="train", images=""):
        super().__init__(os.fspath(path))
        entries = _read(path, os.path.getmtime(path))
        if split not in (splits := _splits(entries)):
            raise unknown(f"{path}: no split", split, splits)
        wanted = {split, _RESTVAL} if split == "train" else {split}
        self._rows = np.flatnonzero([name in wanted for name in entries.splits])
        self._shared = Shared([entries.data, entries.ends])
        self._folder = images or os.path.dirname(os.path.abspath(path))
        some = [self._entry(index) for index in range(0, len(self), max(1, len(self) // _LOOKED_AT))]
        for self._below in (True, False):
            if any(os.path.exists(self._path(entry)) for entry in some):
                return
        self._below = True
        raise UserError(
            f"{path}: no picture found, such as {self._path(some[0])}; give the folder of the pictures: "
            f"{path}?images=FOLDER"
        )

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        entry = self._entry(index)
        path = self._path(entry)
        return entry | {"image": read_file(path), "path": path}

    def _entry(self, index):
        (data, ends), row = self._shared.arrays, int(self._rows[index])
        return json.loads(data[ends[row] : ends[row + 1]].tobytes())

    def _path(self, entry):
        below = entry.get("filepath", "") if self._below else ""
        return os.path.join(self._folder, below, entry["filename"])


class _Entries(NamedTuple):
    """The entries of a file.

    Attributes:
      data: uint8 `[n]`, the JSON of each entry, one after the other.
      ends: int64 `[entries + 1]`, 0 and where each entry ends.
      splits: the split of each, a list of str.
    """

    data: np.ndarray
    ends: np.ndarray
    splits: list[str]


def list_splits(path):
    """Returns the splits of a file, in its order; raises UserError for another kind of JSON."""
    return _splits(_read(path, os.path.getmtime(path)))


def _splits(entries):
    splits = list(dict.fromkeys(entries.splits))
    return splits if "train" in splits or _RESTVAL not in splits else ["train", *splits]


@functools.lru_cache(maxsize=2)
def _read(path, changed):
    """Returns the `_Entries` of a file that was last changed at a time; each has filename, split and texts."""
    is_collecting = gc.isenabled()
    gc.disable()  # it takes more than half of the time for millions of small objects, of which none is garbage
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    finally:
        if is_collecting:
            gc.enable()
    try:
        make = _of_annotations if "annotations" in content else _of_karpathy
        entries = make(content)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: neither Karpathy's JSON, with images and their sentences, nor COCO's captions, with images and "
            f"annotations ({type(error).__name__}: {error})"
        ) from None
    if not entries:
        raise UserError(f"{path}: no images in it")
    texts = [json.dumps(entry).encode() for entry in entries]
    ends = np.cumsum([0, *map(len, texts)])
    return _Entries(np.frombuffer(b"".join(texts), np.uint8), ends, [entry["split"] for entry in entries])


def _of_karpathy(content):
    return [
        _fields(image) | {"split": str(image["split"]), "texts": [text["raw"] for text in image["sentences"]]}
        for image in content["images"]
    ]


def _of_annotations(content):
    texts = {}
    for annotation in content["annotations"]:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [
        _fields(image) | {"filename": image["file_name"], "split": "train", "texts": texts.get(image["id"], [])}
        for image in content["images"]
    ]


def _fields(entry):
    return {key: value for key, value in entry.items() if isinstance(value, str | int | float) and key != "image"}


def check_fields(name, fields):
    """Raises UserError when the user names fields of a file, which has no others to choose from."""
    if given := [f"{key}={value}" for key, value in fields.items() if value]:
        raise UserError(f"{name}: {given[0]}: a JSON file of captions has no fields to choose from")
