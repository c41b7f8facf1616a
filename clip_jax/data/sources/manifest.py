"""Manifests: one Parquet file that says where the blocks of a data set are, so that training opens it at once.

`python -m clip_jax.data.manifest` writes one. A row is a block: `shard`, `start` and `end` as the format's `read` takes
them, `samples`, and a list `column.FIELD` of one value a sample for each field that was asked for. The key
`clip_jax.manifest` of the file's metadata tells a manifest from a table; it holds, as JSON, `version`, `format`,
`source`, `command`, `columns`, `sizes` of the shards in bytes, the `broken` counts and a `fingerprint` of the rows.

Names of shards that lie below the manifest's folder are relative to it.
"""

import hashlib
import json
import os

import numpy as np

from clip_jax.data.replacing import replacing
from clip_jax.data.sources.parquet_values import ParquetColumn
from clip_jax.data.sources.shards import Blocks, ShardSource
from clip_jax.errors import UserError

KEY = "clip_jax.manifest"
VERSION = 1
COLUMN = "column."  # before the name of a field
_ROWS = 2**18  # blocks of a row group without columns
_SAMPLES = 2**21  # of a row group with columns


class Manifest:
    """A manifest in memory: 24 bytes a block, and the names of the shards. A pickled copy holds no rows.

    Args:
      path: of the file, which may be remote.
      folder: the folder where the shards are now; empty for where they were.

    Attributes:
      path: str.
      about: the dict of the metadata.
      shards: list of paths.
      sizes: int64 `[shards]`, bytes.
      blocks: `clip_jax.data.sources.shards.Blocks`.

    Raises UserError when the file is no manifest, is damaged, or is of a version that this program does not read.
    """

    def __init__(self, path, folder=""):
        import pyarrow
        import pyarrow.parquet as parquet

        self.path, self.about = path, read_about(path)
        if self.about is None:
            raise UserError(f"{path}: is no manifest; python -m clip_jax.data.manifest SOURCE --out={path} writes one")
        if self.about.get("version") != VERSION:
            command = self.about.get("command", "python -m clip_jax.data.manifest SOURCE --out=" + path)
            raise UserError(
                f"{path}: is a manifest of version {self.about.get('version')}, but this program reads version "
                f"{VERSION}; make it again: {command}"
            )
        with _opened(path) as file:
            names = ["shard", "start", "end", "samples"]
            opened = parquet.ParquetFile(file, read_dictionary=["shard"], pre_buffer=True)
            table, groups = opened.read(names), opened.metadata
        shard = table["shard"].unify_dictionaries().combine_chunks()
        codes = shard.indices.to_numpy()
        firsts = np.flatnonzero(np.diff(codes, prepend=-1))
        names = shard.dictionary.to_pylist()
        self.shards = _moved([names[code] for code in codes[firsts].tolist()], path, folder)
        self.sizes = np.array(self.about.pop("sizes"), np.int64)
        number = np.repeat(np.arange(len(firsts), dtype=np.int32), np.diff(firsts, append=len(codes)))
        rest = (table[name].to_numpy() for name in ("start", "end", "samples"))
        self.blocks = Blocks(number, *rest)
        ends = np.cumsum([groups.row_group(i).num_rows for i in range(groups.num_row_groups)])
        self._groups = np.diff(np.concatenate([[0], np.cumsum(self.blocks.samples, dtype=np.int64)])[ends], prepend=0)
        pyarrow.default_memory_pool().release_unused()
        if len(self.sizes) != len(self.shards):
            raise UserError(f"{path}: damaged; make it again: {self.remedy}")

    def __getstate__(self):
        return {"path": self.path, "about": self.about, "_groups": self._groups}

    @property
    def remedy(self):
        """The command that makes the manifest again."""
        return self.about["command"]

    def column(self, field):
        """Returns the `ParquetColumn` of a field of all samples; None where the manifest has no such column."""
        if field not in self.about["columns"]:
            return None
        groups = np.stack([np.zeros_like(self._groups), np.arange(len(self._groups))], axis=1)
        starts = np.concatenate([[0], np.cumsum(self._groups)])
        return ParquetColumn([self.path], groups, starts, COLUMN + field, is_list=True)


def read_about(path):
    """Returns the metadata of a manifest, a dict; None for another Parquet file. Raises UserError for no such file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with _opened(path) as file:
            found = parquet.read_metadata(file).metadata or {}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        return None
    return json.loads(found[KEY.encode()]) if KEY.encode() in found else None


def manifest_source(path, name, folder="", **options):
    """Returns the `ShardSource` of a manifest.

    Args:
      path: of the manifest.
      name: str, for messages.
      folder: where the shards are now; empty for where they were.
      options: keyword arguments of `ShardSource`.

    Raises UserError as `Manifest` and `ShardSource`, and when a shard is missing or has another size than it had.
    """
    manifest = Manifest(path, folder)
    about = manifest.about
    source = ShardSource(
        about["format"], manifest.shards, manifest.blocks, name, broken=about["broken"], manifest=manifest, **options
    )
    del manifest.shards, manifest.blocks
    return source


def relative(shard, manifest):
    """Returns the name of a shard in a manifest: relative where it lies below the manifest's folder, else absolute."""
    if "://" in shard or "://" in manifest:
        folder = manifest.rpartition("/")[0] + "/"
        return shard.removeprefix(folder) if "://" in manifest else shard
    shard, folder = os.path.abspath(shard), os.path.dirname(os.path.abspath(manifest))
    return os.path.relpath(shard, folder) if shard.startswith(folder.rstrip("/") + "/") else shard


def _moved(names, manifest, folder):
    """Returns the paths of the shards with these names in a manifest; `folder` replaces what the names share."""
    parent = manifest.rpartition("/")[0] if "://" in manifest else os.path.dirname(os.path.abspath(manifest))
    if not folder:
        return [name if "://" in name or name.startswith("/") else f"{parent}/{name}" for name in names]
    common = os.path.commonprefix(names[:1] + names[-1:]).rpartition("/")[0]
    start = len(common) + 1 if common else 0
    return [f"{folder.rstrip('/')}/{name[start:]}" for name in names]


def write(path, shards, about, types):
    """Writes a manifest.

    Args:
      path: of the file; it appears when it is whole.
      shards: iterable of (name, size, rows, columns): str, int, a list of the (start, end, samples) of the blocks, and
        `{field: values of all samples of the shard}`. A shard without blocks is left out.
      about: dict with the `format`, `source`, `command` and `broken` of the metadata.
      types: `{field: pyarrow type}` of the columns.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    schema = pyarrow.schema(
        [
            ("shard", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
            ("start", pyarrow.int64()),
            ("end", pyarrow.int64()),
            ("samples", pyarrow.int32()),
            *((COLUMN + field, pyarrow.list_(kind)) for field, kind in types.items()),
        ]
    )
    digest = hashlib.blake2b(digest_size=16)
    sizes, group = [], []
    size = 0  # of the group
    with (
        replacing(path) as file,
        parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=["shard"]) as writer,
    ):
        for shard in shards:
            if not shard[2]:
                continue
            digest.update(shard[0].encode("utf-8", "surrogateescape") + np.array(shard[2], np.int64).tobytes())
            sizes.append(shard[1])
            group.append(shard)
            size += sum(row[2] for row in shard[2]) if types else len(shard[2])
            if size >= (_SAMPLES if types else _ROWS):
                writer.write_table(_table(group, schema, types))
                group, size = [], 0
        if group or not sizes:
            writer.write_table(_table(group, schema, types))
        facts = {"version": VERSION, **about, "columns": list(types), "fingerprint": digest.hexdigest()}
        writer.add_key_value_metadata({KEY: json.dumps(facts | {"sizes": sizes})})


def _table(group, schema, types):
    """Returns the rows of some shards as a pyarrow table."""
    import pyarrow

    rows = np.array([row for _, _, blocks, _ in group for row in blocks], np.int64).reshape(-1, 3)
    codes = np.repeat(np.arange(len(group), dtype=np.int32), [len(blocks) for _, _, blocks, _ in group])
    arrays = [
        pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array([name for name, *_ in group], pyarrow.string())),
        rows[:, 0],
        rows[:, 1],
        rows[:, 2].astype(np.int32),
    ]
    offsets = np.concatenate([[0], np.cumsum(rows[:, 2])]).astype(np.int32)
    for field, kind in types.items():
        values = pyarrow.array([value for *_, columns in group for value in columns[field]], kind)
        arrays.append(pyarrow.ListArray.from_arrays(offsets, values))
    return pyarrow.table([pyarrow.array(a) if isinstance(a, np.ndarray) else a for a in arrays], schema=schema)


def _opened(path):
    """Returns a manifest as a file for pyarrow."""
    import pyarrow

    from clip_jax.data import remote

    if remote.is_remote(path):
        return pyarrow.PythonFile(remote.opened(path), "r")
    remote.size(path)  # a UserError where it is missing
    return pyarrow.memory_map(path)
