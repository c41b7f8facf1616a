"""Keeps the image-text pairs that a CLIP-like model finds most similar, and writes an index of them.

    python -m clip_jax.tools.clip_score --source='/data/pairs/{00000..41407}.tar' --checkpoint=/weights/ViT-L-14.pt \\
        --out=runs/scored --keep=0.3
    python -m clip_jax.train --config=configs/clip.py:b16 \\
        --config.data='/data/pairs/{00000..41407}.tar?index=runs/scored' ...

DataComp (Gadre et al. 2023) keeps the best 30 % of the pairs by OpenAI's ViT-L/14. DFN (Fang et al. 2023) does the same
with a model trained for it on good pairs; any checkpoint of this package is one. The score of a pair is the model's
similarity: the cosine, or what the method compares texts and images with. Each caption of an image is a pair.

The scores stay in OUT/parts. The same command without --checkpoint cuts them elsewhere, without a second pass.
"""

import functools

import numpy as np

from clip_jax.data.records import BadRecord
from clip_jax.data.sources.index import TEXTS
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools import examples
from clip_jax.tools.index_writer import IndexWriter, bits_of, cost, example_lines, headline, places
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

_PAIRS = 32  # pairs whose similarities are computed at a time for methods that compare tokens


def is_text(text):
    """Returns whether a text tower can read a caption: it is not blank, and it is UTF-8."""
    try:
        return bool(text.encode().strip())
    except UnicodeEncodeError:
        return False


def score(model, source, first, end):
    """Returns the scores of the records first..end-1.

    Args:
      model: a `clip_jax.inference.Model` with a tokenizer.
      source: the source.
      first, end: the records.

    Returns: `captions`, uint8 `[records]`, the number of captions of each record, 64 at most, 0 where it is unreadable;
    `readable`, bool `[records]`; `scores`, float32 `[captions]`, NaN for captions that are no text.
    """
    captions, readable = np.zeros(end - first, np.uint8), np.zeros(end - first, bool)
    scores, batch = [], []

    def work(record):
        return model.image_view(record, None), record["texts"][:TEXTS]

    for index, found in prepared(source, first, end, work):
        if isinstance(found, BadRecord):
            continue
        readable[index - first] = True
        captions[index - first] = len(found[1])
        batch.append(found)
        if len(batch) == model.config.eval.batch_size:
            scores.append(_pair_scores(model, batch))
            batch = []
    scores.append(_pair_scores(model, batch))
    return {"captions": captions, "readable": readable, "scores": np.concatenate(scores)}


def _pair_scores(model, batch):
    """Returns the scores, float32 `[captions]`, of the captions of a list of `(image, texts)`."""
    texts = [text for _, of_image in batch for text in of_image]
    usable = np.array([is_text(text) for text in texts], bool)
    scores = np.full(len(texts), np.nan, np.float32)
    if not usable.any():
        return scores
    z_image = model.embed_image(np.stack([image for image, _ in batch]))
    z_text = model.embed_text([text for text, ok in zip(texts, usable, strict=True) if ok])
    owner, _ = places(np.array([len(of_image) for _, of_image in batch]))
    scores[usable] = _similarities(model, z_image, z_text, owner[usable])
    return scores


def _similarities(model, z_image, z_text, owner):
    """Returns the similarity, float32 `[m]`, of texts `[m, ...]` and their images, rows `owner` of `[n, ...]`."""
    if z_image.ndim == 2:
        return np.einsum("me,me->m", z_image[owner], z_text)
    found = []
    for start in range(0, len(owner), _PAIRS):
        rows = np.resize(owner[start : start + _PAIRS], _PAIRS)  # the last ones are repeated: one compiled shape
        of_texts = np.resize(np.arange(start, min(start + _PAIRS, len(owner))), _PAIRS)
        found.append(np.diag(model.similarity(z_image[rows], z_text[of_texts])))
    return np.concatenate(found)[: len(owner)]


# --- the cut ---


def kth_largest(arrays, k):
    """Returns the k-th largest value of float32 arrays, exactly, and reads them twice.

    Args:
      arrays: a function that returns an iterable of float32 `[n]`; NaN does not count.
      k: int, from 1 to the number of values.
    """
    rest, prefix = k, None
    for shift in (16, 0):
        counts = np.zeros(2**16, np.int64)
        for array in arrays():
            order = _ordered(array[~np.isnan(array)])
            if prefix is not None:
                order = order[order >> np.uint32(16) == prefix]
            counts += np.bincount(order >> np.uint32(shift) & np.uint32(0xFFFF), minlength=2**16)
        above = np.cumsum(counts[::-1])[::-1]  # values in this bin or a higher one
        place = int(np.flatnonzero(above >= rest)[-1])
        rest -= int(above[place] - counts[place])
        prefix = np.uint32(place if prefix is None else int(prefix) << 16 | place)
    bits = prefix ^ np.uint32(0x80000000) if prefix >> np.uint32(31) else ~prefix
    return float(np.array(bits, np.uint32).view(np.float32))


def _ordered(values):
    """Returns uint32 in the order of float32 values: negative ones have all bits flipped, others the sign bit."""
    bits = values.view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))


def select(made, out, keep=None, threshold=None):
    """Writes the index of the pairs with the highest scores.

    Args:
      made: the finished `Pass` of `score`.
      out: the folder.
      keep: share of all pairs, in (0, 1]; pairs as similar as the last one are kept as well. None: `threshold` decides.
      threshold: the least score of a kept pair.

    Returns: the report. Raises UserError when no pair has a score or none is kept.
    """
    edges = np.linspace(-1, 1, 41)
    histogram, total = np.zeros(40, np.int64), 0.0
    pairs = unreadable = no_text = 0
    for part in made:
        scores = part["scores"][~np.isnan(part["scores"])]
        histogram += np.histogram(np.clip(scores, -1, 1), edges)[0]
        total, pairs = total + float(scores.sum(dtype=np.float64)), pairs + len(scores)
        unreadable, no_text = unreadable + int((~part["readable"]).sum()), no_text + len(part["scores"]) - len(scores)
    if not pairs:
        raise UserError(f"{made.source.name}: no readable image with a caption among {len(made.source):,} records")
    if keep is not None:
        threshold = kth_largest(lambda: (part["scores"] for part in made), max(1, round(keep * pairs)))
    with IndexWriter(made.source, out, made.start) as writer:
        samples = _cut(made, threshold, writer)
        sections = {
            heading: [examples.shown(made.source, r, f"{s:.3f}", [int(c)]) for r, c, s in _rows(sample)]
            for heading, sample in samples.items()
        }
        report = {
            "checkpoint": made.about["checkpoint"],
            "pairs": pairs,
            "keep": keep,
            "threshold": threshold,
            "pairs_kept": writer.texts,
            "mean_score": total / pairs,
            "unreadable_records": unreadable,
            "captions_without_text": no_text,
            "pairs_by_score": [
                [float(f"{low:.2f}"), int(n)] for low, n in zip(edges[:-1], histogram, strict=True) if n
            ],
            "examples": examples.without_images(sections),
        }
        report = writer.finish(report, describe)
    examples.write_page(out, f"{made.source.name}: pairs by score", list(describe(report)), sections)
    return report


def _rows(sample):
    """Returns the rows of a sample, the highest score first."""
    rows = [(int(record), caption, score) for record, caption, score in sample.rows()]
    return sorted(rows, key=lambda row: -row[2])


def _cut(made, threshold, writer):
    """Adds what has at least the threshold to the index; returns the samples for the report by their headings."""
    samples = {name: examples.Smallest() for name in ("Kept", "Removed", "Barely kept", "Barely removed")}
    for number, part in enumerate(made):
        first, _ = made.bounds(number)
        scores = part["scores"]
        kept = scores >= np.float32(threshold)  # False for NaN
        owner, place = places(part["captions"])
        bits = bits_of(part["captions"], kept)
        rows = np.flatnonzero(bits)
        writer.add(first + rows, bits[rows])
        table = np.stack([first + owner, place, scores.astype(np.float64)], 1)
        random, distance = examples.uniform(0, first + owner, place), np.abs(scores.astype(np.float64) - threshold)
        for some, chosen in (("kept", kept), ("removed", ~kept & ~np.isnan(scores))):
            samples[some.capitalize()].add(random[chosen], table[chosen])
            samples[f"Barely {some}"].add(distance[chosen], table[chosen])
    return samples


def describe(report):
    """Yields the lines of a report, the dict that `select` returns."""
    pairs, kept = report["pairs"], report["pairs_kept"]
    yield headline(report)
    yield f"{kept:,} of {pairs:,} pairs ({kept / pairs:.1%}) have a score of {report['threshold']:.4f} or more"
    yield f"scores by {report['checkpoint']}, mean {report['mean_score']:.4f}"
    yield (
        f"without a score: {report['unreadable_records']:,} unreadable records and "
        f"{report['captions_without_text']:,} captions that are no text"
    )
    yield cost(report)
    yield ""
    yield f"{'score at least':>14}{'pairs':>14}{'share':>9}"
    above = 0
    for low, count in reversed(report["pairs_by_score"]):
        above += count
        yield f"{low:>14.2f}{above:>14,}{above / pairs:>9.1%}"
    yield from example_lines({f"{heading.lower()}:": found for heading, found in report["examples"].items()})


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 after a one-line error, 130 after Ctrl-C."""
    parser = pass_parser("clip_jax.tools.clip_score", __doc__)
    add = parser.add_argument
    checkpoint_arguments(parser)
    add("--keep", type=float, metavar="SHARE", help="keep this share of the pairs, in (0, 1]")
    add("--threshold", type=float, metavar="SCORE", help="keep the pairs of at least this score")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args, log=print):
    """Runs the command with parsed arguments; `log` is a function of a line. Raises UserError for wrong ones."""
    share = share_of(args.part)
    if (args.keep is None) == (args.threshold is None):
        raise UserError("give either --keep=SHARE or --threshold=SCORE")
    if args.keep is not None and not 0 < args.keep <= 1:
        raise UserError(f"--keep={args.keep:g}: must be more than 0 and at most 1")
    source = open_source(args)
    made = Pass(source, args.out, "clip_score")
    if model := load_model(args, made):
        made.run(functools.partial(score, model, source), share, log)
    if not share:
        report = select(made, args.out, args.keep, args.threshold)
        show(describe(report), args, log)


if __name__ == "__main__":
    command.script(main)
