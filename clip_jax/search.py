"""Search with a checkpoint: by text, by picture, by picture plus or minus text, over a folder or any data set.

    python -m clip_jax.search --checkpoint=runs/clip --images=/data/photos --text="a red apple" --text="a dog in the snow"
    python -m clip_jax.search --checkpoint=runs/clip --images=/data/photos --image=query.jpg --minus="snow" --plus="beach" --html=found.html
    python -m clip_jax.search --checkpoint=runs/clip --images=emoji --image='#120' --find=texts

Every --text and every --image is a query; --plus and --minus change each of them: the sum or difference of unit vectors (Jia et al.
2021, figure 5). Searched are the pictures of the data set or, with --find=texts, its captions or the lines of --texts=FILE. The search
is exact. The embeddings are kept beside the data and made anew when the weights or the data have changed: docs/search.md.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import html
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

import numpy as np

from clip_jax.data import decode
from clip_jax.data.files import read_file
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source
from clip_jax.errors import UserError
from clip_jax.runtime import command

_BLOCK, _QUERIES = 8192, 256  # embeddings, and queries, that are compared at a time: 8 MB of scores
_FOLDER = ".clip_jax_search"


# --- exact search on the devices ---


class Bank:
    """Embeddings `[n, ...]` on the devices of a mesh, each of which holds and searches its share of the rows.

    Args:
      z: float32 `[n, ...]`, in memory or mapped into it; n at least 1.
      mesh: a mesh of `clip_jax.runtime.sharding.make_mesh`.
    """

    def __init__(self, z, mesh):
        import jax

        from clip_jax.runtime import sharding

        self.count, self.mesh = len(z), mesh
        share = -(-len(z) // (mesh.shape["data"] * mesh.shape["fsdp"]))
        block = min(_BLOCK, share)
        shape = (-(-share // block) * block * (mesh.shape["data"] * mesh.shape["fsdp"]), *z.shape[1:])

        def rows(index):
            part = np.asarray(z[index[0]], np.float32)
            start, stop, _ = index[0].indices(shape[0])
            return np.concatenate([part, np.zeros((stop - start - len(part), *shape[1:]), np.float32)])

        self.z = jax.make_array_from_callback(shape, sharding.batch_sharding(mesh), rows)

    def search(self, queries, k, scores=None):
        """The k rows with the largest scores, best first; of equal ones the lower row. Exact, in float32.

        Args:
          queries: `[q, ...]`.
          k: more than there are rows is cut to their number.
          scores: `(queries [q, ...], rows [b, ...]) -> [q, b]`, a pure function; by default the dot product.

        Returns:
          `(rows int32 [q, k], scores float32 [q, k])`.
        """
        queries, nearest, found = np.asarray(queries, np.float32), program(self.mesh, min(k, self.count), scores), []
        for start in range(0, len(queries), _QUERIES):
            values, rows = nearest(self.z, queries[start : start + _QUERIES], self.count)
            found.append((np.asarray(rows), np.asarray(values)))
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))


@functools.cache
def program(mesh, k, scores=None):
    """The compiled `(bank [n, ...], queries [q, ...], count) -> (values, rows)` of `Bank.search` of the first `count` rows."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from clip_jax.evaluation.retrieval import _merge, dot_similarity
    from clip_jax.models.common import BATCH_AXES

    scores = scores or dot_similarity

    def share(bank, queries, count):
        """One device: the best of its rows, block after block; only the scores of one block exist."""
        block = min(_BLOCK, len(bank))
        blocks = bank.reshape(-1, block, *bank.shape[1:])
        starts = jax.lax.axis_index(BATCH_AXES) * len(bank) + block * jnp.arange(len(blocks), dtype=jnp.int32)

        def step(best, block):
            rows, start = block
            return _merge(*best, scores(queries, rows), start, count), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)
        return jax.lax.scan(step, none, (blocks, starts))[0]

    def nearest(bank, queries, count):
        specs = (PartitionSpec(BATCH_AXES), PartitionSpec(), PartitionSpec()), (PartitionSpec(None, BATCH_AXES),) * 2
        values, rows = jax.shard_map(share, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)(
            bank, queries, count
        )
        values, place = jax.lax.top_k(values, k)  # the devices' results lie in the order of their rows
        return values, jnp.take_along_axis(rows, place, axis=1)

    return jax.jit(nearest)


def scores_of(method, of_texts):
    """What ranks candidates for queries that are texts, or pictures: `scores` of `Bank.search`.

    A method's own similarity compares like with like as well.
    """
    from clip_jax.evaluation.retrieval import transposed
    from clip_jax.methods.interface import Method

    if method.similarity is Method.similarity:
        return None
    return (
        (method.text_similarity or functools.partial(transposed, method.similarity)) if of_texts else method.similarity
    )


# --- embeddings that are kept ---


@dataclasses.dataclass
class Index:
    """Embeddings of what a data set holds.

    Attributes:
      z: float32 `[n, ...]`, mapped into memory.
      where: int64 `[n, 2]`: the record, and which of its texts (0 for its picture).
      skipped: how many records could not be used, by reason.
    """

    z: np.ndarray
    where: np.ndarray
    skipped: dict


def model_key(model):
    """A hash of all that decides what a model's embeddings are: weights, configuration, transform, tokenizer."""
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
    """A hash of a data set: names, sizes and times of its files where it is a folder or files, and 32 of its records."""
    from clip_jax.data.records import fingerprint

    path = spec.partition("?")[0].replace("{split}", split)
    files = [
        os.path.join(root, name) for root, _, names in os.walk(path) if _FOLDER not in root for name in names
    ] or glob.glob(path)
    listing = [
        (os.path.relpath(file, path), (status := os.stat(file)).st_size, status.st_mtime_ns) for file in sorted(files)
    ]
    return hashlib.blake2b(json.dumps([fingerprint(source), split, listing]).encode(), digest_size=16).hexdigest()


def make_index(model, source, kind, spec, split="train", folder=None, log=print):
    """The `Index` of a data set, the one that is kept if it still fits.

    Args:
      model: of `clip_jax.load`.
      source: the data set, made of `spec` and `split`.
      kind: `"images"`, or `"texts"`, of which each counts once.
      folder: where it is kept; by default in a folder `.clip_jax_search` beside the data, or in `CLIP_JAX_CACHE`.

    Raises:
      UserError: `folder` holds one of another checkpoint or data set, nothing can be embedded, or nothing can be written.
    """
    key = {"version": 2, "kind": kind, "model": model_key(model), "data": data_key(source, spec, split)}
    name = f"{kind}-{hashlib.blake2b(f'{spec} {split}'.encode(), digest_size=4).hexdigest()}-{key['model'][:12]}"
    places = [pathlib.Path(folder)] if folder else [place / name for place in _places(spec)]
    for place in places:
        found, index = _read_index(place)
        if index is not None and all(found[field] == value for field, value in key.items()):
            log(f"{kind}: {len(index.z):,} embeddings of {place}")
            return index
        if folder and index is not None:
            other = next(field for field, value in key.items() if found[field] != value)
            what = {
                "model": "with another checkpoint",
                "data": "of another data set",
                "kind": f"of {found['kind']}, not of {kind}",
            }
            raise UserError(
                f"--index={folder} was made {what.get(other, 'by another version')}; remove it, or name another folder"
            )
    for number, place in enumerate(places):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = pathlib.Path(tempfile.mkdtemp(dir=place.parent))
        except OSError as error:
            if number + 1 < len(places):
                continue
            raise UserError(
                f"the embeddings cannot be kept in {place.parent}: {error.strerror}; name a folder with --index"
            ) from None
        try:
            _write_index(partial, key, model, source, kind, log)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return _read_index(place)[1]


def _places(spec):
    """Where embeddings of a data set may be kept, the best place first."""
    path = pathlib.Path(spec.partition("?")[0])
    folder = next((p for p in (path, *path.parents) if p.is_dir()), None)
    cache = os.environ.get("CLIP_JAX_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "clip_jax"))
    return ([folder / _FOLDER] if len(path.parts) > 1 and folder else []) + [pathlib.Path(cache) / "search"]


def _read_index(folder):
    """`(its key, the Index)` of a folder; None instead of the Index when there is none, or a damaged one."""
    try:
        key = json.loads((folder / "meta.json").read_text())
        z, where = (
            np.memmap(folder / "z.f32", np.float32, "r", shape=tuple(key["shape"])),
            np.memmap(folder / "where.i64", np.int64, "r", shape=(key["shape"][0], 2)),
        )
        return key, Index(z, where, key["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


def _write_index(folder, key, model, source, kind, log):
    skipped, count, shape, told = collections.Counter(), 0, (), 0
    parts = _embed_images(model, source, skipped) if kind == "images" else _embed_texts(model, source, skipped)
    with open(folder / "z.f32", "wb") as z_file, open(folder / "where.i64", "wb") as where_file:
        for where, z in parts:
            z.astype(np.float32).tofile(z_file)
            np.asarray(where, np.int64).tofile(where_file)
            count, shape = count + len(z), z.shape[1:]
            if count >= 2 * told + 10_000:
                told = count
                log(f"{kind}: {count:,} embedded ...")
    if not count:
        raise UserError(f"{source.name}: no {kind} to search among {len(source):,} records")
    (folder / "meta.json").write_text(json.dumps(dict(key, shape=(count, *shape), skipped=skipped)))
    log(f"{kind}: {count:,} embedded" + "".join(f", {n:,} records left out: {reason}" for reason, n in skipped.items()))


def _embed_images(model, source, skipped):
    from clip_jax.data.loader import iterate_once

    for batch in iterate_once(
        source, [model.image_view], model.tokenizer, model.config.eval.batch_size, skipped=skipped
    ):
        used = batch["mask"]
        if used.any():
            records = batch["example_id"][used].astype(np.int64)
            yield np.stack([records, np.zeros_like(records)], 1), model.embed_image(batch["image"])[used]


def _embed_texts(model, source, skipped):
    from clip_jax.tools import filter as filters

    seen, where, texts = set(), [], []
    for index, record in filters.records(source):
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


# --- queries and results ---


@dataclasses.dataclass
class Query:
    """What was asked: a line that says it, its picture (or None), and its embedding, float32 `[E]`, or of each token `[n, E]`."""

    label: str
    picture: object
    z: np.ndarray


def read_picture(value, source):
    """`(name, picture)` of a file, or of the record N of `source` for "#N"; raises UserError when it cannot be read."""
    try:
        if match := re.fullmatch(r"#(\d+)", value):
            if int(match[1]) >= len(source):
                raise UserError(f"--image={value}: {source.name} has the records #0 to #{len(source) - 1}")
            record = source[int(match[1])]
            name, data = " ".join([value, *record["texts"][:1]]), record.get("image")
        else:
            name, data = value, read_file(value)
        return name, decode.flatten(decode.open_image(data))
    except BadRecord as bad:
        raise UserError(f"--image={value}: {bad.args[0]}") from None


def make_queries(model, texts=(), pictures=(), plus=(), minus=()):
    """Queries of strings and of pairs `(name, picture)`, each with all of `plus` added and of `minus` taken away.

    Raises UserError where these are given, but embeddings are no single vectors.
    """
    z_texts = model.embed_text([*plus, *minus, *texts]) if (*plus, *minus, *texts) else ()
    if (plus or minus) and z_texts.ndim > 2:
        raise UserError(f"--plus and --minus add vectors, but method {model.config.method!r} has one for each token")
    z = iter(z_texts)
    change = sum([next(z) for _ in plus], 0.0) - sum([next(z) for _ in minus], 0.0)
    from clip_jax.evaluation.zeroshot import normalize

    signs = "".join([f" + {text}" for text in plus] + [f" - {text}" for text in minus])
    queries = [Query(text, None, next(z) + change) for text in texts]
    if pictures:
        z_images = model.embed_image([picture for _, picture in pictures])
        queries += [
            Query(name, picture, z_image + change) for (name, picture), z_image in zip(pictures, z_images, strict=True)
        ]
    for query in queries:
        query.label, query.z = query.label + signs, normalize(query.z)
    return queries


def lookup(source, texts, where):
    """What was found, as a dict with `text`, and of a data set `record`, `path` (if known) and `image`; `texts`: of a file."""
    if texts:
        return {"text": texts[where[0]]}
    number, of_texts = map(int, where)
    try:
        record = source[number]
    except BadRecord:  # it was there when the index was made
        return {"record": number, "text": "", "path": "", "image": None}
    text = record["texts"][of_texts] if record["texts"] else ""
    return {"record": number, "text": text, "path": str(record.get("path", "")), "image": record.get("image")}


def table(query, hits):
    """The lines of a query's results on the terminal."""
    yield ""
    yield f"{query.label}"
    for rank, hit in enumerate(hits, 1):
        cells = [f"#{hit['record']}" if "record" in hit else "", " ".join(hit["text"].split()), hit.get("path", "")]
        yield f"{rank:>4}  {hit['score']:6.3f}  " + "  ".join(cell for cell in cells if cell)


def write_html(path, title, results):
    """Writes a page with pictures; results: `[(Query, hits)]`. Raises UserError when it cannot be written."""
    from clip_jax.evaluation import report

    page, pictures, blocks = report.Page(), [], []
    for query, hits in results:
        pictures += [{"image": query.picture}, *({"image": hit.get("image")} for hit in hits)]
    _, thumbnail = page.thumbnails(
        pictures, [row for row, picture in enumerate(pictures) if picture["image"] is not None], 128
    )
    row = 0
    for query, hits in results:
        head = thumbnail(row, query.label) if query.picture is not None else ""
        cards = []
        for rank, hit in enumerate(hits, 1):
            picture = thumbnail(row + rank, hit["text"]) if hit.get("image") is not None else ""
            name = f"#{hit['record']} {hit['path']}" if "record" in hit else ""
            text = html.escape(" ".join(hit["text"].split()))
            cards.append(
                f'<div class="card">{picture}<div><b>{text}</b><span class="small">{rank}. {hit["score"]:.3f}</span>'
                f'<span class="small">{html.escape(name)}</span></div></div>'
            )
        blocks.append(f'<h3>{head} {html.escape(query.label)}</h3><div class="cards">{"".join(cards)}</div>')
        row += 1 + len(hits)
    return report.write_page(path, page.html(title, {"Found": "".join(blocks)}))


def make_parser():
    parser = command.make_parser("clip_jax.search", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        help="a work folder, a checkpoint, or weights of others, as clip_jax.load takes them",
    )
    add("--which", default="latest", help="latest (default), best, or a step")
    add("--images", required=True, metavar="SOURCE", help="a folder of pictures or any data set (docs/data.md)")
    add("--split", default="train", help="of the data set (default: train)")
    add("--text", action="append", default=[], help="a query; may be given several times, like the next three")
    add("--image", action="append", default=[], metavar="FILE|#N", help="a query: a file, or record N of the data set")
    add("--plus", action="append", default=[], metavar="TEXT", help="added to every query")
    add("--minus", action="append", default=[], metavar="TEXT", help="taken away from every query")
    add("--find", choices=("images", "texts"), default="images", help="what is searched (default: images)")
    add("--texts", metavar="FILE", help="with --find=texts: search its lines instead of the data set's captions")
    add("--k", type=int, default=10, help="results of each query (default: 10)")
    add(
        "--index", metavar="FOLDER", help="keep the embeddings there; one of another checkpoint or data set is an error"
    )
    add("--html", metavar="FILE", help="write a page with pictures")
    add("--json", metavar="FILE", help="write the results as JSON")
    return parser


def read_lines(path):
    """The lines of a text file that are not empty; raises UserError."""
    try:
        lines = [line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts={path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not any(lines):
        raise UserError(f"--texts={path}: no text in it")
    return [line for line in lines if line]


def search(args, log=print):
    """The work of the command; `args`: its parsed arguments. Returns `[(Query, hits)]`. Raises UserError."""
    if not args.text and not args.image:
        raise UserError("nothing is asked: give --text or --image")
    if args.k < 1:
        raise UserError(f"--k={args.k}: must be at least 1")
    if args.texts and args.find != "texts":
        raise UserError("--texts needs --find=texts")
    source = make_source(args.images, args.split)
    pictures = [read_picture(value, source) for value in args.image]
    texts = read_lines(args.texts) if args.texts else None

    from clip_jax.inference import load

    model = load(args.checkpoint, args.which)
    if texts:
        z, where = model.embed_text(texts), np.stack([np.arange(len(texts))] * 2, 1)
    else:
        index = make_index(model, source, args.find, args.images, args.split, args.index, log)
        z, where = index.z, index.where
    queries = make_queries(model, args.text, pictures, args.plus, args.minus)
    bank, found, results = Bank(z, model.mesh), [], []
    for of_texts in (True, False):  # in the order of make_queries
        if of_kind := [query.z for query in queries if (query.picture is None) == of_texts]:
            found += zip(*bank.search(np.stack(of_kind), args.k, scores_of(model.method, of_texts)), strict=True)
    for query, (rows, values) in zip(queries, found, strict=True):
        hits = [
            lookup(source, texts, where[row]) | {"score": float(score)} for row, score in zip(rows, values, strict=True)
        ]
        results.append((query, hits))
        for line in table(query, hits):
            log(line)
    if args.html:
        log(f"\npage: {write_html(args.html, f'{args.find.capitalize()} of {args.images}', results)}")
    if args.json:
        found = [
            {"query": q.label, "found": [{k: v for k, v in hit.items() if k != "image"} for hit in hits]}
            for q, hits in results
        ]
        try:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
        except OSError as error:
            raise UserError(f"--json={args.json} cannot be written: {error.strerror}") from None
    return results


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    args = make_parser().parse_args(argv)
    return command.run(lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
