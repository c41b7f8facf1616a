"""Shards that are read block by block, of any format: tar, Parquet, TFRecord and others.

A format is a module of this folder, named in `FORMATS`, with

    scan(path, length=512)    (rows, broken): `rows` is a list of the (start, end, samples) of the shard's blocks in
                              order, `broken` a Counter {reason: count}. One pass from front to end, or of the footer
    read(path, start, end)    the raw records (dicts) of a block, a sequence; taking an unusable one raises BadRecord.
                              It raises EOFError where the shard is shorter than the block's end

and, where they apply,

    BYTES = True              start and end of a block are offsets in bytes
    block_bytes(path, start, end)    the bytes of a block, where its start and end are no offsets
    FOOTER = True             `scan` reads a footer alone
    preferred(fields)         {"image": field, "label": field or None}, or one of them, by the first values of all
                              fields; without it the usual names decide
    captions(raw)             the names of the caption fields of a raw record, or None for those of the source
    classes(path)             {field: class names} that the shard holds
    check(path)               raises UserError for a path that the format does not read, such as a remote one
    local_source              the class of sources of local shards without a manifest; without it `ShardSource`
    values(path, start, end, fields)    {field: values of all records} of a block, without its images
    COLUMNS = True            `read` takes `column`, the image field that the user names, and reads no other image

A path may be remote (`clip_jax.data.remote`). Where the shards are is in a manifest (`manifest`), or found by scanning
few of them.
"""

import glob
import importlib
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from absl import logging

from clip_jax.data.blocks import Block, BlockSource
from clip_jax.data.records import CANONICAL, PEEKED, hash64, listed
from clip_jax.data.shared import Shared
from clip_jax.errors import UserError

# Formats by the ending of a shard's name.
FORMATS = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".tfrec": "tfrecord",
    ".array_record": "arrayrecord",
    ".mds": "mds",
}
MANIFEST = ".manifest.parquet"  # the ending of manifests that lie beside Parquet shards
PARTIAL = ".partial"  # the folder beside Parquet shards in which to_parquet writes them
UNMOVED = os.path.join(PARTIAL, "unmoved")  # a file that is there while written shards are moved out of it
# The shards of a folder, first match: img2dataset writes a table 00000.parquet of URLs beside its other shards.
_ENDINGS = ("*.tar", "*.array_record*", "*.arrow", "*.tfrecord*", "*.mds", "*.mds*", "*.parquet")
# Without a manifest, this many shards are scanned when a source is made. More are an error.
LOCAL = 1000
REMOTE = 16  # and at most REMOTE_BYTES, because they are read from front to end
REMOTE_BYTES = 2**30
FOOTERS = 10_000  # local shards of a format with a footer; a tenth of it where they are remote
_PEEKED_BLOCKS = 8  # blocks, at the front of evenly spaced shards, whose records are looked at for their fields
_SCANNERS = 8  # shards that are scanned at once


class Blocks(NamedTuple):
    """The blocks of a data set, in order.

    Attributes:
      shard: int32 `[blocks]`, numbers of shards.
      start, end: int64 `[blocks]`, as the format's `read` takes them.
      samples: integers `[blocks]`, numbers of records.
    """

    shard: np.ndarray
    start: np.ndarray
    end: np.ndarray
    samples: np.ndarray


def format_of(path):
    """Returns the name of the format of a path or pattern, a value of `FORMATS`, or None.

    The ending may have a number or a wildcard behind it, as in `x.tfrecord-00000-of-00010` and `*.array_record*`.
    """
    endings = "|".join(map(re.escape, FORMATS))
    match = re.search(rf"({endings})([-*?\[{{].*)?$", path.rpartition("/")[2])
    return FORMATS[match[1]] if match else None


def load_format(name):
    """Returns the module of a format, a value of `FORMATS`."""
    return importlib.import_module(f"clip_jax.data.sources.{name}")


def find_shards(spec):
    """Returns the format and the sorted shards, `(kind, list of paths)`, of a path, pattern or folder of shards.

    Raises UserError for what names no shards, and for a folder that `to_parquet` has not filled yet.
    """
    from clip_jax.data import remote
    from clip_jax.data.sources import arrow

    if os.path.isdir(spec) and (saved := arrow.saved_files(spec)):
        return "arrow", saved
    spec = shards_in(spec) or spec
    if (kind := format_of(spec)) is None:
        raise UserError(f"{spec}: names no shards; shards end in {', '.join(FORMATS)}")
    if not (shards := [path for path in remote.expand(spec) if not path.endswith(MANIFEST)]):
        raise UserError(f"{spec}: names manifests alone, no shards")
    for folder in dict.fromkeys(map(os.path.dirname, shards)) if kind == "parquet" else ():
        if os.path.exists(os.path.join(folder, UNMOVED)):
            command = f"clip_jax.tools.to_parquet with --out={folder or '.'}"
            raise UserError(f"{folder or '.'} is not whole yet: run {command} again, which moves the rest into it")
    return kind, shards


def shards_in(folder):
    """Returns the pattern of the shards in a local folder, or None.

    `00000.parquet` beside a folder `00000` is no shard: img2dataset describes in it the files in that folder.
    """
    for ending in _ENDINGS if os.path.isdir(folder) else ():
        pattern = os.path.join(glob.escape(folder), ending)
        found = (path for path in glob.iglob(pattern) if not path.endswith(MANIFEST))
        if any(not os.path.isdir(path.rpartition(".")[0]) for path in found):
            return pattern
    return None


def scan_shard(kind, path, length=512):
    """Returns the size of a shard in bytes, its blocks and what is broken, as a format's `scan` does."""
    from clip_jax.data import remote

    form = load_format(kind)
    getattr(form, "check", lambda path: None)(path)
    size = remote.size(path)
    if not size:
        return 0, [], Counter({"empty shard": 1})
    return size, *form.scan(path, length)


def scan_shards(kind, shards):
    """Returns the `Blocks` of shards and what is broken, `{reason: count}`; reads every shard once.

    Args:
      kind: the name of the format.
      shards: list of paths.
    """
    rows, broken = [], Counter()
    with ThreadPoolExecutor(min(_SCANNERS, len(shards) or 1)) as pool:
        for number, (_, found, bad) in enumerate(pool.map(lambda path: scan_shard(kind, path), shards)):
            rows += [(number, *row) for row in found]
            broken.update(bad)
            if bad:
                logging.warning("%s: %s", shards[number], ", ".join(bad))
    table = np.array(rows, np.int64).reshape(-1, 4).T
    return Blocks(table[0].astype(np.int32), *table[1:]), broken


def too_many(spec, found, allowed):
    """Returns the UserError for shards that need a manifest."""
    return UserError(
        f"{spec}: {found}, but without a manifest at most {allowed}; make one: "
        f"python -m clip_jax.data.manifest '{spec}' --out=NAME.manifest.parquet"
    )


def scanned_source(spec, name, **options):
    """Returns the source of few shards, which are scanned now.

    Args:
      spec: str, a path, pattern or folder.
      name: str, for messages.
      options: keyword arguments of `ShardSource`.

    Raises UserError for more shards than are scanned without a manifest, and as `find_shards` and `ShardSource`.
    """
    from clip_jax.data import remote

    kind, shards = find_shards(spec)
    form, is_remote = load_format(kind), remote.is_remote(shards[0])
    has_footer = getattr(form, "FOOTER", False)
    limit = (FOOTERS // 10 if is_remote else FOOTERS) if has_footer else REMOTE if is_remote else LOCAL
    if len(shards) > limit:
        raise too_many(spec, f"{len(shards):,} shards", f"{limit:,} are scanned")
    if is_remote and not has_footer and (size := sum(map(remote.size, shards))) > REMOTE_BYTES:
        raise too_many(spec, f"shards of {size / 2**30:.1f} GiB", f"{REMOTE_BYTES / 2**30:.0f} GiB are scanned")
    blocks, broken = scan_shards(kind, shards)
    return getattr(form, "local_source", ShardSource)(kind, shards, blocks, name, broken=broken, **options)


class ShardSource(BlockSource):
    """The records of shards of one format, which are read block by block.

    Args:
      kind: the name of the format, a value of `FORMATS`.
      shards: list of paths.
      blocks: the `Blocks`.
      name: str, for messages.
      image: name of the image field, or None to choose it.
      text: name or names of the caption fields, or None.
      label: name of the label field, or None.
      broken: `{reason: count}` of what the scan left out.
      manifest: the `clip_jax.data.sources.manifest.Manifest` that the blocks are from, or None.
      options: passed to the format's `read`.

    Attributes:
      block_bytes: mean bytes of a block on the storage; None where it is not known.

    Raises UserError when there is no record, a named field does not exist, or no field holds images.
    """

    def __init__(
        self, kind, shards, blocks, name, *, image=None, text=None, label=None, broken=(), manifest=None, **options
    ):
        super().__init__(name, image, text, label)
        self._kind, self._shards = kind, list(shards)
        named = {"column": image} if image and getattr(load_format(kind), "COLUMNS", False) else {}
        self._options = options | named
        self._manifest = manifest
        self.broken.update(broken)
        self._set_blocks(blocks.samples)
        sizes = np.empty(0, np.int64) if manifest is None else manifest.sizes
        self._shared = Shared([blocks.shard, blocks.start, blocks.end, self.blocks, self._starts, sizes])
        self._use_shared()
        if not len(self):
            reasons = ", ".join(self.broken) or "empty"
            raise UserError(f"{name}: no usable sample in {len(self._shards)} shards ({reasons})")
        self.block_bytes = None
        if getattr(load_format(kind), "BYTES", False):
            self.block_bytes = float(np.mean(blocks.end - blocks.start))
        elif manifest is not None:
            self.block_bytes = float(manifest.sizes.sum() / len(self.blocks))
        elif size := getattr(load_format(kind), "block_bytes", None):
            self.block_bytes = float(np.mean([size(*self._span_of(number)) for number in self._peeked_blocks()]))
        self._has_own_captions = text is None
        self._choose(self._first_values(), label)
        self._numbering = hash64("\0".join(self._shards).encode("utf-8", "surrogateescape"))

    def __getstate__(self):
        return self.__dict__ | {"_rows": None, "blocks": None, "_starts": None, "_sizes": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._use_shared()

    def _use_shared(self):
        """Sets the arrays of the blocks to those that copies of this source share."""
        *rows, self._starts, self._sizes = self._shared.arrays
        self._rows = Blocks(*rows)
        self.blocks = self._rows.samples

    @property
    def numbering(self):
        return type(self), self._kind, self._numbering, self._fields.label

    @property
    def fingerprint(self):
        """A hex digest that identifies the records: of the manifest and the fields; None without a manifest."""
        if self._manifest is None:
            return None
        return f"{hash64(repr((self._manifest.about['fingerprint'], self._fields)).encode()):016x}"

    def read_block(self, number):
        raw, captions = self._raw(number), getattr(load_format(self._kind), "captions", None)
        if captions is None or not self._has_own_captions:
            return Block(len(raw), lambda index: self._canonical(raw[index]))

        def record(index):
            found = raw[index]
            return self._canonical(found, captions(found))

        return Block(len(raw), record)

    def _raw(self, number):
        """Returns the raw records of a block; raises UserError when the shard is not what it was."""
        from clip_jax.data import remote

        shard, start, end, samples = (column[number].item() for column in self._rows)
        path = self._shards[shard]
        if not remote.is_remote(path):  # of a remote one the size is a request
            self._check_size(shard)
        try:
            raw = load_format(self._kind).read(path, start, end, **self._options)
        except EOFError:
            raw = ()
        if len(raw) != samples:
            raise self._changed(path)
        return raw

    def _changed(self, path):
        if self._manifest is None:
            return UserError(f"{path} changed since its blocks were found; start again")
        return UserError(f"{path} changed since the manifest was made; make it again: {self._manifest.remedy}")

    def column(self, field):
        """Returns the values of a field of all records, from the manifest.

        A slice of them is a `pyarrow.ChunkedArray`. None where the manifest has no such column, and where the records
        do not have the field as it is in the shards, such as the names of labels.
        """
        column = self._manifest.column(field) if self._manifest else None
        if column is None or field not in (*CANONICAL, self._fields.image, self._fields.label):
            return column
        return column if field == self._fields.label == "label" and str(column[:1].type) == "int64" else None

    def _span_of(self, number):
        """Returns the path, start and end of a block."""
        shard, start, end, _ = (column[number].item() for column in self._rows)
        return self._shards[shard], start, end

    def _peeked_blocks(self):
        """Returns the numbers of the first blocks of some shards."""
        firsts = np.flatnonzero(np.diff(self._rows.shard, prepend=-1))
        return firsts[np.linspace(0, len(firsts) - 1, min(_PEEKED_BLOCKS, len(firsts))).astype(int)]

    def _first_values(self):
        """Returns the first value of each field in the first blocks of some shards."""
        firsts = self._peeked_blocks()
        with ThreadPoolExecutor(len(firsts)) as pool:
            list(pool.map(self._check_size, self._rows.shard[firsts].tolist()))
            blocks = dict(zip(firsts.tolist(), pool.map(self._raw, firsts.tolist()), strict=True))
        where = [(raw, index) for raw in blocks.values() for index in range(min(PEEKED, len(raw)))]

        def read(index):
            raw, row = where[index]
            return raw[row]

        return self._peek(read, range(len(where)), first=0)

    def _check_size(self, shard):
        """Raises UserError when a shard is missing, or its size is not that in the manifest."""
        from clip_jax.data import remote

        if self._manifest is None:
            return
        path = self._shards[shard]
        try:
            size = remote.size(path)
        except UserError as error:
            raise UserError(f"{error}, but the manifest names it; {self.name}?shards=FOLDER says where it is") from None
        if size != self._sizes[shard]:
            raise self._changed(path)

    def _choose(self, fields, label):
        """Sets the fields and the class names; `fields` holds the first value of each."""
        if not fields:
            raise UserError(f"{self.name}: none of the first records can be read")
        form, asked = load_format(self._kind), self._fields
        self._choose_fields(fields)
        preferred = getattr(form, "preferred", lambda fields: {})(fields)
        self._fields = self._fields._replace(**{k: v for k, v in preferred.items() if getattr(asked, k) is None})
        if self._fields.image is None:
            raise UserError(f"{self.name}: no field of images found; name it (data.image); fields: {listed(fields)}")
        classes = getattr(form, "classes", lambda path: {})(self._shards[int(self._rows.shard[0])])
        if self._fields.label in classes:
            self._set_classes(classes[self._fields.label])
        if label is not None or "label" not in preferred:
            self._check_label_field(fields, asked=label is not None)
