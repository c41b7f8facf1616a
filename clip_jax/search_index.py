"""Exact search on the devices, and embeddings of a data set that are kept on disk."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clip_jax.data import remote
from clip_jax.data.files import cache_folder, expand
from clip_jax.data.records import BadRecord, fingerprint, records
from clip_jax.data.sources.folder import files_below
from clip_jax.data.sources.spec import parse
from clip_jax.errors import UserError

_BLOCK, _QUERIES = 8192, 256  # embeddings, and queries, that are compared at a time: 8 MB of scores
_FOLDER = ".clip_jax_search"
_FILES = ("z.f32", "where.i64", "meta.json")  # of an index; without the last one a folder is no index
_PARTIAL = ".partial-"  # begins the names of the folders in it in which they are made
_READERS = 16  # requests at once for the sizes of objects


# --- exact search on the devices ---


class Bank:
    """Embeddings on the devices of a mesh; each device holds and searches its shard of the rows.

    Args:
      z: float32 `[n, ...]`, in memory or memory-mapped; n is at least 1.
      mesh: a mesh of `clip_jax.runtime.sharding.make_mesh`.
    """

    def __init__(self, z, mesh):
        import jax

        from clip_jax.runtime import sharding

        self.count, self.mesh = len(z), mesh
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        share = -(-len(z) // devices)
        block = min(_BLOCK, share)
        shape = (-(-share // block) * block * devices, *z.shape[1:])

        def rows(index):
            part = np.asarray(z[index[0]], np.float32)
            start, stop, _ = index[0].indices(shape[0])
            return np.concatenate([part, np.zeros((stop - start - len(part), *shape[1:]), np.float32)])

        self.z = jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), rows)

    def search(self, queries, k, scores=None):
        """Returns the k rows with the largest scores, best first; the lower row comes first among equal scores.

        The search is exact, in float32.

        Args:
          queries: `[q, ...]`.
          k: a k larger than the number of rows is cut to it.
          scores: `(queries [q, ...], rows [b, ...]) -> [q, b]`, a pure function; by default the dot product.

        Returns: rows int32 `[q, k]`, scores float32 `[q, k]`.
        """
        queries, nearest = np.asarray(queries, np.float32), program(self.mesh, min(k, self.count), scores)
        found = []
        for start in range(0, len(queries), _QUERIES):
            values, rows = nearest(self.z, queries[start : start + _QUERIES], self.count)
            found.append((np.asarray(rows), np.asarray(values)))
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))


@functools.cache
def program(mesh, k, scores=None):
    """Returns the jitted `(bank [n, ...], queries [q, ...], count) -> (values, rows)` of `Bank.search`.

    Only the first `count` rows of the bank are searched.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from clip_jax.evaluation.topk import dot_similarity, merge_top_k
    from clip_jax.models.common import BATCH_AXES

    scores = scores or dot_similarity

    def search_shard(bank, queries, count):
        """Searches the rows of one device block by block; only the scores of one block exist."""
        block = min(_BLOCK, len(bank))
        blocks = bank.reshape(-1, block, *bank.shape[1:])
        starts = jax.lax.axis_index(BATCH_AXES) * len(bank) + block * jnp.arange(len(blocks), dtype=jnp.int32)

        def step(best, block):
            rows, start = block
            return merge_top_k(*best, scores(queries, rows), start, count), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
        return jax.lax.scan(step, none, (blocks, starts))[0]

    def nearest(bank, queries, count):
        specs = (PartitionSpec(BATCH_AXES), PartitionSpec(), PartitionSpec()), (PartitionSpec(None, BATCH_AXES),) * 2
        sharded = jax.shard_map(search_shard, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
        values, rows = sharded(bank, queries, count)
        # The devices' results are concatenated in the order of their rows, so ties keep the lower row first.
        values, place = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(rows, place, axis=1)

    return jax.jit(nearest)


def scores_of(method, of_texts):
    """Returns the `scores` of `Bank.search` for queries that are texts (`of_texts`) or images.

    A method's similarity also compares images with images and texts with texts.
    """
    from clip_jax.evaluation.topk import transposed
    from clip_jax.methods.interface import Method

    if method.similarity is Method.similarity:
        return None
    if not of_texts:
        return method.similarity
    return method.text_similarity or functools.partial(transposed, method.similarity)


# --- embeddings on disk ---


@dataclasses.dataclass
class Index:
    """Embeddings of the images or texts of a data set.

    Attributes:
      z: float32 `[n, ...]`, memory-mapped.
      where: int64 `[n, 2]`, the record and the number of its text (0 for its image).
      skipped: number of unusable records by reason.
    """

    z: np.ndarray
    where: np.ndarray
    skipped: dict


def model_key(model):
    """Returns a hash of everything that decides a model's embeddings: weights, configuration, transform, tokenizer."""
    import jax

    config = model.config
    settings = [
        config.method,
        config.model.to_dict(),
        list(config.eval.transform),
        model.tokenizer and model.tokenizer.fingerprint(),
    ]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.extra)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def data_key(source, spec, split):
    """Returns a hash of a data set: 32 of its records, and what tells a change of its files if it has any."""
    listing = []
    for part in parse(spec):
        path = part.base.replace("{split}", split)
        with ThreadPoolExecutor(_READERS) as pool:
            listing += pool.map(functools.partial(_state_of, path), sorted(_files_of(path)))
    return hashlib.blake2b(json.dumps([fingerprint(source), split, listing]).encode(), digest_size=16).hexdigest()


def _state_of(path, file):
    """Returns the name of a file of a data set, its size and its time; of an object the address and the size."""
    if not remote.is_remote(file):
        status = os.stat(file) if os.path.exists(file) else os.lstat(file)  # a link may lead nowhere
        return os.path.relpath(file, path), status.st_size, status.st_mtime_ns
    try:
        return file, remote.size(file)
    except UserError:  # a range may name an object that is missing
        return file, None


def _files_of(path):
    """Returns the files of a folder or pattern; none for the name of a data set."""
    try:
        return files_below(path) if os.path.isdir(path) else expand(path)
    except UserError:
        return []


def make_index(model, source, kind, spec, split="train", folder=None, log=print):
    """Returns the `Index` of a data set: the one on disk if it still fits, else a new one.

    Args:
      model: a `clip_jax.inference.Model`.
      source: the opened data set.
      kind: `"images"`, or `"texts"`, each distinct text once.
      spec: the source string of `source`.
      split: the split of `source`.
      folder: where the index is kept; by default a folder `.clip_jax_search` next to the data, or in `CLIP_JAX_CACHE`.
      log: function of a line.

    Raises UserError when `folder` holds an index of another checkpoint or data set, nothing can be embedded, or nothing
    can be written, and as `check_folder` does.
    """
    if folder:
        check_folder(folder)
    key = {"version": 2, "kind": kind, "model": model_key(model), "data": data_key(source, spec, split)}
    spec_key = hashlib.blake2b(f"{spec} {split}".encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    name = f"{kind}-{spec_key}-{key['model'][:12]}"
    places = [pathlib.Path(folder)] if folder else [place / name for place in _places(spec)]
    for place in places:
        found, index = _read_index(place)
        if index is not None and all(found[field] == value for field, value in key.items()):
            log(f"{kind}: {len(index.z):,} embeddings of {place}")
            return index
        if folder and index is not None:
            raise _mismatch(folder, key, found)
    for number, place in enumerate(places):
        try:
            place.mkdir(parents=True, exist_ok=True)
            partial = pathlib.Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=place))
        except OSError as error:
            if number + 1 < len(places):
                continue
            raise UserError(
                f"the embeddings cannot be kept in {place}: {error.strerror}; name a folder with --index"
            ) from None
        try:
            _write_index(partial, key, model, source, kind, log)
            (place / "meta.json").unlink(missing_ok=True)
            for file in _FILES:  # some mounts rename no folder
                os.replace(partial / file, place / file)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return _read_index(place)[1]


def check_folder(folder):
    """Raises UserError when a path holds no index that can be read, and something else than a damaged one."""
    place = pathlib.Path(folder)
    if _read_index(place)[1] is not None:
        return
    names = {path.name for path in place.iterdir()} if place.is_dir() else set()
    names = {name for name in names if not name.startswith(_PARTIAL)}
    is_other = bool(names) and not (names <= set(_FILES) and _read_meta(place))
    if is_other or place.is_file():
        raise UserError(f"--index={folder}: holds something else than an index; name a new folder")


def _mismatch(folder, key, found):
    field = next(field for field, value in key.items() if found[field] != value)
    origins = {
        "model": "with another checkpoint",
        "data": "of another data set",
        "kind": f"of {found['kind']}, not of {key['kind']}",
    }
    origin = origins.get(field, "by another version")
    return UserError(f"--index={folder} was made {origin}; remove it, or name another folder")


def _places(spec):
    """Returns the folders where embeddings of a data set may be kept, the best one first."""
    base = parse(spec)[0].base
    path = pathlib.Path("" if remote.is_remote(base) else base)
    folder = next((p for p in (path, *path.parents) if p.is_dir()), None)
    return ([folder / _FOLDER] if len(path.parts) > 1 and folder else []) + [pathlib.Path(cache_folder()) / "search"]


def _read_meta(folder):
    """Returns the key of the index in a folder, a dict; {} where there is none."""
    try:
        key = json.loads((folder / "meta.json").read_text())
        return key if {"version", "kind", "model", "data", "shape", "skipped"} <= key.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _read_index(folder):
    """Returns the key and the `Index` of a folder; `({}, None)` when the index is missing or damaged."""
    try:
        key = _read_meta(folder)
        z = np.memmap(folder / "z.f32", np.float32, "r", shape=tuple(key["shape"]))
        where = np.memmap(folder / "where.i64", np.int64, "r", shape=(key["shape"][0], 2))
        return key, Index(z, where, key["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


def _write_index(folder, key, model, source, kind, log):
    skipped, shape = collections.Counter(source.broken), ()
    count, reported = 0, 0
    parts = _embed_images(model, source, skipped) if kind == "images" else _embed_texts(model, source, skipped)
    with open(folder / "z.f32", "wb") as z_file, open(folder / "where.i64", "wb") as where_file:
        for where, z in parts:
            z.astype(np.float32).tofile(z_file)
            np.asarray(where, np.int64).tofile(where_file)
            count, shape = count + len(z), z.shape[1:]
            if count >= 2 * reported + 10_000:
                reported = count
                log(f"{kind}: {count:,} embedded ...")
    if not count:
        raise UserError(f"{source.name}: no {kind} to search among {len(source):,} records")
    (folder / "meta.json").write_text(json.dumps(dict(key, shape=(count, *shape), skipped=skipped)))
    log(f"{kind}: {count:,} embedded" + "".join(f", {n:,} records left out: {reason}" for reason, n in skipped.items()))


def _embed_images(model, source, skipped):
    """Yields `(where, z)` of each batch of images; counts unusable records in `skipped`."""
    from clip_jax.data.loader import iterate_once

    views, batch_size = [model.image_view], model.config.eval.batch_size
    for batch in iterate_once(source, views, model.tokenizer, batch_size, skipped=skipped):
        used = batch["mask"]
        if used.any():
            numbers = batch["example_id"][used]
            yield np.stack([numbers, np.zeros_like(numbers)], 1), model.embed_image(batch["image"])[used]


def _embed_texts(model, source, skipped):
    """Yields `(where, z)` of each batch of distinct texts; counts unusable records in `skipped`."""
    seen = set()
    where, texts = [], []
    for index, record in records(source):
        if isinstance(record, BadRecord):
            skipped[record.args[0]] += 1
            continue
        for number, text in enumerate(record["texts"]):
            text = text.encode("utf-8", "replace").decode().strip()
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if text and digest not in seen:
                seen.add(digest)
                where.append((index, number))
                texts.append(text)
        if len(texts) >= model.config.eval.batch_size:
            yield where, model.embed_text(texts)
            where, texts = [], []
    if texts:
        yield where, model.embed_text(texts)
