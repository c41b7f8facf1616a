"""Removes duplicates of pictures within a data set, and writes an index of the others.

    python -m clip_jax.tools.dedup --source='/data/pairs/{00000..41407}.tar' --by=hash --near=7 --out=runs/distinct
    python -m clip_jax.tools.dedup --source=... --by=embedding --checkpoint=/weights/ViT-B-16.pt --similarity=0.95 ...
    python -m clip_jax.train --config=configs/clip.py:b16 --config.data='...?index=runs/distinct' ...

    --by=content     the bytes are equal
    --by=hash        at most --near of the 128 bits of the hashes differ (that of clip_jax.tools.filter, of the picture
                     at 9 x 9 pixels): resized and recompressed copies
    --by=embedding   the cosine of the embeddings is at least --similarity: pictures that show the same, too

A larger picture is better, then an earlier one. From the best to the worst, a picture goes when a near one has stayed.

The hashes or embeddings stay in OUT/parts: the same command with another --near or --similarity, without --checkpoint,
does not read the source again.
"""

import functools
import os

import numpy as np

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, image_key
from clip_jax.data.sources.index import TEXTS
from clip_jax.errors import UserError, unknown
from clip_jax.runtime import command
from clip_jax.tools import duplicates, examples
from clip_jax.tools.filter_tables import image_hash
from clip_jax.tools.index_writer import IndexWriter, bits_of, cost, example_lines, headline
from clip_jax.tools.passes import (
    Pass,
    checkpoint_arguments,
    load_model,
    pass_parser,
    prepared,
    run_command,
    share_of,
    show,
)
from clip_jax.tools.source_arguments import open_source

METHODS = ("content", "hash", "embedding")
_GROUPS, _MEMBERS = 8, 6  # groups of each kind in the report, and pictures of each


class Contents:
    """Keys of the bytes of pictures, uint64 `[n]`; the three classes share `batch`, `prepare` and `rows`."""

    batch = 1024

    def prepare(self, record, image):
        """Returns what a thread makes of a record and its opened image."""
        return image_key(record["image"])

    def rows(self, batch):
        """Returns the rows of the features, of a list of what `prepare` returned."""
        return np.array(batch, np.uint64)


class Hashes:
    """Perceptual hashes of pictures, uint8 `[n, 16]`."""

    batch = 1024

    def prepare(self, record, image):
        return np.frombuffer(image_hash(image), np.uint8)

    def rows(self, batch):
        return np.stack(batch)


class Embeddings:
    """Embeddings of pictures, float32 `[n, E]` of unit length; of tokens, the normalised mean."""

    def __init__(self, model):
        self._model, self.batch = model, model.config.eval.batch_size

    def prepare(self, record, image):
        return self._model.image_view({"image": image}, None)

    def rows(self, batch):
        from clip_jax.evaluation.embed import unit_vectors

        return unit_vectors(self._model.embed_image(np.stack(batch)))


def look(features, source, first, end):
    """Returns what decides about the pictures of the records first..end-1.

    Returns: `captions`, uint8 `[records]`, the number of captions, 64 at most; `pixels`, uint32 `[records]`, 0 for an
    unusable picture; `features`, the rows of the usable ones.
    """
    captions, pixels = np.zeros(end - first, np.uint8), np.zeros(end - first, np.uint32)
    rows, batch = [], []

    def work(record):
        image = decode.open_image(record.get("image"))
        return len(record["texts"][:TEXTS]), image.width * image.height, features.prepare(record, image)

    for index, found in prepared(source, first, end, work):
        if isinstance(found, BadRecord):
            continue
        captions[index - first], pixels[index - first], ready = found
        batch.append(ready)
        if len(batch) == features.batch:
            rows.append(features.rows(batch))
            batch = []
    if batch:
        rows.append(features.rows(batch))
    return {"captions": captions, "pixels": pixels, "features": np.concatenate(rows) if rows else np.zeros(0)}


def gather(made, folder):
    """Returns `captions` `[n]`, `pixels` `[n]` and `features` `[n, ...]` of all records, memory-mapped files.

    Unusable pictures have zeros as features. Raises UserError when no picture is usable.
    """
    arrays = {}
    for number, part in enumerate(made):
        first, end = made.bounds(number)
        usable = part["pixels"] > 0
        if usable.any() and "features" not in arrays:
            shape = (len(made.source), *part["features"].shape[1:])
            arrays["features"] = _mapped(folder, "features", shape, part["features"].dtype)
        if usable.any():
            arrays["features"][first + np.flatnonzero(usable)] = part["features"]
        for name in ("captions", "pixels"):
            if name not in arrays:
                arrays[name] = _mapped(folder, name, (len(made.source),), part[name].dtype)
            arrays[name][first:end] = part[name]
    if "features" not in arrays:
        raise UserError(f"{made.source.name}: no usable picture among {len(made.source):,} records")
    return arrays["captions"], arrays["pixels"], arrays["features"]


def _mapped(folder, name, shape, dtype):
    return np.memmap(os.path.join(folder, f"{name}.map"), dtype, "w+", shape=shape)


def judge(folder, by, pixels, features, near, similarity):
    """Returns the number of the picture that stays for each record, int64 `[n]`, or `duplicates.UNUSABLE`."""
    stays = duplicates.start(pixels)
    if by == "content":
        duplicates.join_equal(folder, features, pixels, stays)
    elif by == "hash":
        keys = _mapped(folder, "keys", (len(pixels),), np.uint64)
        for start in range(0, len(pixels), 2**18):
            keys[start : start + 2**18] = duplicates.hash_keys(features[start : start + 2**18])
        duplicates.join_equal(folder, keys, pixels, stays)
        duplicates.join_near(folder, features, pixels, stays, near)
    else:
        from clip_jax import config
        from clip_jax.runtime import sharding

        rows = duplicates.best_first(pixels, np.flatnonzero(stays == duplicates.OPEN))
        z = _mapped(folder, "sorted", (len(rows), features.shape[1]), features.dtype)
        for start in range(0, len(rows), 2**12):
            z[start : start + 2**12] = features[rows[start : start + 2**12]]
        duplicates.join_similar(z, rows, stays, similarity, sharding.make_mesh(config.base().mesh))
    duplicates.settle(stays)
    return stays


def select(made, out, by, near=7, similarity=0.95):
    """Writes the index of the pictures that stay.

    Args:
      made: the finished `Pass` of `look`.
      out: the folder.
      by: one of `METHODS`.
      near: bits, for "hash".
      similarity: the least cosine, for "embedding".

    Returns: the report. Raises UserError when no picture is usable.
    """
    with IndexWriter(made.source, out, made.start) as writer:
        captions, pixels, features = gather(made, writer.scratch)
        stays = judge(writer.scratch, by, pixels, features, near, similarity)
        for number in range(len(made)):
            first, end = made.bounds(number)
            rows = first + np.flatnonzero(stays[first:end] == np.arange(first, end))
            writer.add(rows, bits_of(captions[rows], np.ones(captions[rows].sum(), bool)))
        gone = np.flatnonzero((stays != np.arange(len(stays))) & (stays != duplicates.UNUSABLE))
        best, sizes = np.unique(stays[gone], return_counts=True)
        groups = _groups(best, sizes, gone, stays)
        sections = {
            heading: [_example(made.source, row, stays, pixels) for row in rows] for heading, rows in groups.items()
        }
        report = {
            "by": by,
            "near": near if by == "hash" else None,
            "similarity": similarity if by == "embedding" else None,
            "checkpoint": made.about.get("checkpoint"),
            "duplicates": len(gone),
            "unusable_records": int((stays == duplicates.UNUSABLE).sum()),
            "groups": len(best),
            "largest_group": int(sizes.max(initial=0)) + bool(len(sizes)),
            "examples": examples.without_images(sections),
        }
        report = writer.finish(report, describe)
    examples.write_page(out, f"{made.source.name}: duplicates", list(describe(report)), sections)
    return report


def _groups(best, sizes, gone, stays):
    """Returns `{heading: records}` of the largest groups and of random ones; the picture that stays comes first."""
    largest = np.argsort(-sizes, kind="stable")[:_GROUPS]
    random = np.argsort(examples.hashed(0, best), kind="stable")[:_GROUPS] if len(best) else largest
    found = {}
    for kind, chosen in (("Large group", largest), ("Random group", random)):
        for number in chosen.tolist():
            members = gone[stays[gone] == best[number]][: _MEMBERS - 1].tolist()
            found[f"{kind} of {sizes[number] + 1:,}: record {best[number]:,}"] = [int(best[number]), *members]
    return found


def _example(source, row, stays, pixels):
    return examples.shown(source, row, f"{'stays' if stays[row] == row else 'goes'}, {pixels[row]:,} pixels")


def describe(report):
    """Yields the lines of a report, the dict that `select` returns."""
    rule = {"content": "equal bytes", "hash": f"at most {report['near']} of 128 bits of the hash"}
    rule["embedding"] = f"a cosine of at least {report['similarity']} by {report['checkpoint']}"
    yield headline(report)
    yield f"{report['duplicates']:,} duplicates of {report['groups']:,} pictures are removed: {rule[report['by']]}"
    yield f"the largest group has {report['largest_group']:,} pictures"
    yield f"{report['unusable_records']:,} unusable records are removed"
    yield cost(report)
    yield from example_lines(report["examples"])


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 after a one-line error, 130 after Ctrl-C."""
    parser = pass_parser("clip_jax.tools.dedup", __doc__)
    add = parser.add_argument
    add("--by", default="hash", metavar="|".join(METHODS), help="what is compared (default: hash)")
    add("--near", type=int, metavar="BITS", help="for --by=hash: at most this many bits differ (default: 7)")
    add("--similarity", type=float, metavar="COSINE", help="for --by=embedding: the least cosine (default: 0.95)")
    checkpoint_arguments(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def _check(args):
    if args.by not in METHODS:
        raise unknown("--by: unknown", args.by, METHODS)
    for flag, method in (("near", "hash"), ("similarity", "embedding"), ("checkpoint", "embedding")):
        if getattr(args, flag) is not None and args.by != method:
            raise UserError(f"--{flag} is for --by={method}, not --by={args.by}")
    if args.near is not None and not 0 <= args.near <= 15:
        raise UserError(f"--near={args.near}: must be 0 to 15 of the 128 bits")
    if args.similarity is not None and not 0 < args.similarity <= 1:
        raise UserError(f"--similarity={args.similarity:g}: must be more than 0 and at most 1")


def run(args, log=print):
    """Runs the command with parsed arguments; `log` is a function of a line. Raises UserError for wrong ones."""
    share = share_of(args.part)
    _check(args)
    source = open_source(args)
    made = Pass(source, args.out, f"dedup --by={args.by}")
    if args.by != "embedding":
        made.begin({})
        features = Contents() if args.by == "content" else Hashes()
    elif model := load_model(args, made):
        features = Embeddings(model)
    if made.missing(share):
        made.run(functools.partial(look, features, source), share, log)
    if not share:
        near, similarity = 7 if args.near is None else args.near, 0.95 if args.similarity is None else args.similarity
        show(describe(select(made, args.out, args.by, near, similarity)), args, log)


if __name__ == "__main__":
    command.script(main)
