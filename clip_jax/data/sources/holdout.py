"""Held-out records: `SOURCE?holdout=0.1` is a tenth of the records, `SOURCE?holdout=!0.1` the others.

A hash of a record's image decides, or of its texts where it has no image. Equal images are therefore on the same side,
in all parts of a mixture and in other data sets too. Neither the order of the records nor records that are added later
move one to the other side, and what a smaller share holds out, a larger one does too. `SOURCE?holdout=0.1:NAME` draws
another tenth.

The images of up to `IMAGES` records are read once for it; from `CACHED` records on, their hashes are kept in the cache
folder. In a larger source the key decides: the path of the image in a table or folder, else the first of the columns
`KEYS` that the source has. Equal images with different keys may then be on different sides, which a line says. Where a
source has no key either, its images are read.
"""

import os
import re

import numpy as np
from absl import logging

from clip_jax.data import threads
from clip_jax.data.files import cache_folder
from clip_jax.data.records import BadRecord, fingerprint, hash64, image_key
from clip_jax.data.replacing import replacing
from clip_jax.data.sources.kept import KeptSource, column_of, keep, starts_of
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.errors import UserError

IMAGES = 200_000
CACHED = 2_000
KEYS = ("uid", "__key__", "key", "path", "filepath", "url")
_CHUNK = 2**16
_hashes = {}  # of sources whose images this process has read, by fingerprint


def join(source, value):
    """Returns the source of "SOURCE?holdout=VALUE"; raises UserError for a wrong value and when no record is left."""
    if isinstance(source, MixtureSource):
        return MixtureSource([join(part, value) for part in source.sources], source.weights)
    name = f"{source.name}?holdout={value}"
    match = re.fullmatch(r"(!?)(0?\.\d+)(?::(\w+))?", value)
    if not match or not float(match[2]):
        raise UserError(f"{name}: cannot read holdout={value}; it is written as holdout=0.1 or holdout=!0.1")
    hashes, salt = hashes_of(source), match[3]
    if salt:
        hashes = _mixed(hashes ^ np.uint64(hash64(salt.encode())))
    is_out = hashes < np.uint64(int(float(match[2]) * 2**64))
    kept = ~is_out if match[1] else is_out
    if not kept.any():
        raise UserError(
            f"{name}: no record is left of {len(source):,}; set another share, such as data.holdout=0.3, "
            "or data.holdout=0 to hold none out"
        )
    return KeptSource(source, keep(np.packbits(kept), starts_of(source)), name)


def hashes_of(source):
    """Returns the hashes that decide, uint64 `[records]`; an unreadable record has the largest value."""
    if len(source) > IMAGES:
        key = next((name for name in KEYS if column_of(source, name) is not None), None)
        if key or hasattr(source, "key_of"):
            logging.warning(
                "%s: %d records, more than %d: the %s decides what is held out, and equal images may be on both sides",
                source.name, len(source), IMAGES, f"column {key!r}" if key else "path of an image",
            )  # fmt: skip
            return _of_column(column_of(source, key), len(source)) if key else _of_paths(source)
    digest = fingerprint(source)
    if digest not in _hashes:
        _hashes[digest] = _cached(source, digest) if len(source) >= CACHED else _of_images(source)
    return _hashes[digest]


def _cached(source, digest):
    path = os.path.join(cache_folder(), "holdout", f"{digest}.npy")
    try:
        hashes = np.load(path)
        if hashes.shape == (len(source),) and hashes.dtype == np.uint64:
            return hashes
    except (OSError, ValueError, EOFError):
        pass
    logging.warning("%s: reading %d images once, to hash them", source.name, len(source))
    hashes = _of_images(source)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as file:
            np.save(file, hashes)
    except OSError as error:
        logging.warning("%s: the hashes are not kept (%s)", source.name, error)
    return hashes


def _of_images(source):
    runs, ahead = threads.runs_of(source, 0, len(source))
    found = threads.mapped(lambda run: _hashes_of_run(*run, _image_hash), runs, ahead)
    return np.concatenate([np.empty(0, np.uint64), *found])


def _of_paths(source):
    return _hashes_of_run(lambda: range(len(source)), 0, range(len(source)), lambda i: _text_hash(source.key_of(i)))


def _hashes_of_run(read, begin, indices, function):
    some, hashes = read(), np.full(len(indices), np.iinfo(np.uint64).max, np.uint64)
    for row, index in enumerate(indices):
        try:
            hashes[row] = function(some[index])
        except BadRecord:
            continue
    return hashes


def _image_hash(record):
    image = record.get("image")
    return _text_hash(record["texts"]) if image is None else image_key(image)


def _text_hash(text):
    return hash64(str(text).encode("utf-8", "replace"))


def _of_column(column, length):
    parts = []
    for start in range(0, length, _CHUNK):
        values = column[start : min(start + _CHUNK, length)]
        values = values.tolist() if isinstance(values, np.ndarray) else values.to_pylist()
        parts.append([_text_hash(value) for value in values])
    return np.concatenate([np.asarray(part, np.uint64) for part in parts])


def _mixed(x):
    """Returns the finalizer of SplitMix64 (Steele et al. 2014) of uint64 values."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
