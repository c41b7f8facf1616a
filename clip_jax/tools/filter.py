"""Filters any data source by ALIGN's rules (Jia et al. 2021, section 3) and writes an index of the kept records.

    python -m clip_jax.tools.filter --source='/data/pairs/{00000..41407}.tar' --out=runs/kept
    python -m clip_jax.train --config=configs/align.py:b7 \\
        --config.data='/data/pairs/{00000..41407}.tar?index=runs/kept' ...

The first pass counts the texts of each image, the images of each text, and the frequency of each word and each pair of
adjacent words. The second pass decides. Every default threshold is the paper's. The folder OUT gets `index.npy`,
`report.txt`, `report.json` and `report.html`; training reads the index.

The paper leaves some points open. This command assumes:

    same image        the bytes are equal.
    same text         the words are equal; case and punctuation do not count.
    word              a run of letters and digits; apostrophes inside it belong to it.
    near duplicate    at most 7 bits of the 128-bit hashes of the image and a test image differ. A bit compares two
                      adjacent grey values of the image at 9 x 9 pixels.
    frequent n-grams  n-grams of equal frequency are all among the most frequent, or none of them is.
    unsafe image      a record field, written by an external classifier, marks it as unsafe.
"""

import collections
import dataclasses
import functools
import itertools
import os
import random
import re

import numpy as np

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, hash64, image_key, records
from clip_jax.data.sources import make_source
from clip_jax.data.sources.index import TEXTS
from clip_jax.errors import UserError, did_you_mean
from clip_jax.runtime import command
from clip_jax.tools import examples
from clip_jax.tools.filter_rules import ALIGN, RULES, Rules, flag
from clip_jax.tools.filter_tables import NearDuplicates, Table, contains, image_hash
from clip_jax.tools.index_writer import IndexWriter, cost, example_lines, headline
from clip_jax.tools.passes import show
from clip_jax.tools.source_arguments import FIELDS, open_source, source_parser

_ROWS = 4096  # rows of the index that are held in memory
_EXAMPLES = 5  # examples of each rule in the report
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text):
    """Returns the words of a text in lower case."""
    return _WORD.findall(text.lower())


_hash_word = functools.lru_cache(2**18)(lambda word: hash64(word.encode("utf-8", "surrogateescape")))


def _text_key(tokens):
    return hash64(" ".join(tokens).encode("utf-8", "surrogateescape"))


def ngrams(tokens):
    """Returns the hashes, uint64 `[max(2 n - 1, 0)]`, of n words and of the pairs of adjacent words."""
    one = np.array([_hash_word(token) for token in tokens], np.uint64)
    two = (one[:-1] * np.uint64(0x9E3779B97F4A7C15)) ^ (one[1:] * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(1))
    return np.concatenate([one, two])


@dataclasses.dataclass
class Counts:
    """The result of the first pass.

    Attributes:
      many_texts: sorted keys, uint64 `[n]`, of the images with too many texts.
      shared_texts: sorted keys, uint64 `[n]`, of the texts of too many images.
      vocabulary: sorted keys, uint64 `[n]`, of the frequent n-grams; None when all n-grams are frequent.
      facts: counts for the report.
    """

    many_texts: np.ndarray
    shared_texts: np.ndarray
    vocabulary: np.ndarray | None
    facts: dict


def count(source, rules, folder):
    """Runs the first pass.

    Args:
      source: the records.
      rules: the thresholds.
      folder: for the tables on disk.

    Returns:
      The `Counts`.
    """
    images, texts = Table(folder, "images"), Table(folder, "texts")
    grams = Table(folder, "ngrams", sums=True)
    for _, record in records(source):
        if isinstance(record, BadRecord):
            continue
        tokens = [words(text) for text in record["texts"][:TEXTS]]
        image, keys = image_key(record.get("image")), np.array([_text_key(t) for t in tokens], np.uint64)
        images.add(np.full(len(keys), image, np.uint64), keys)
        texts.add(keys, np.full(len(keys), image, np.uint64))
        found = ngrams([]) if not tokens else np.concatenate([ngrams(t) for t in tokens])
        grams.add(found, np.ones(len(found), np.uint64))
    vocabulary, facts = grams.most_frequent(rules.vocabulary, os.path.join(folder, "vocabulary"))
    result = Counts(images.more_than(rules.max_texts), texts.more_than(rules.max_images), vocabulary, {"ngrams": facts})
    result.facts |= {
        "pictures_with_many_texts": len(result.many_texts),
        "texts_of_many_pictures": len(result.shared_texts),
        "scratch_bytes": images.bytes + texts.bytes + grams.bytes + 8 * facts["kept"] * (vocabulary is not None),
    }
    return result


def text_hits(text, rules, counts):
    """Returns the names of the rules that remove a text."""
    tokens, hits = words(text), []
    if contains(counts.shared_texts, [_text_key(tokens)])[0]:
        hits.append("shared_text")
    if counts.vocabulary is not None and not contains(counts.vocabulary, ngrams(tokens)).all():
        hits.append("rare_words")
    if len(tokens) < rules.min_words:
        hits.append("too_short")
    if len(tokens) > rules.max_words:
        hits.append("too_long")
    return hits


def image_hits(record, rules, counts, test_images):
    """Returns the names of the rules that remove an image, and its size.

    Args:
      record: a readable record.
      rules: the thresholds.
      counts: the result of the first pass.
      test_images: the `NearDuplicates` of the test images, or None.

    Returns:
      `([rule, ...], (width, height))`; the size is (0, 0) for an unreadable image.
    """
    hits = ["unsafe"] if rules.unsafe and _is_unsafe(record.get(rules.unsafe)) else []
    try:
        image = decode.open_image(record.get("image"))
        size = image.size  # before the hash, which shrinks an image that is not read yet
        if test_images is not None and image_hash(image) in test_images:
            hits.append("test_picture")
    except BadRecord:
        return [*hits, "unreadable"], (0, 0)
    short, long = sorted(size)
    if short <= rules.min_side:
        hits.append("small")
    if long >= rules.max_aspect * short:
        hits.append("elongated")
    if contains(counts.many_texts, [image_key(record["image"])])[0]:
        hits.append("many_texts")
    return hits, size


def _is_unsafe(value):
    if isinstance(value, int | float):
        return value >= 0.5
    return str(value).strip().lower() in ("nsfw", "unsafe", "true", "yes", "1")


class Tally:
    """Counts of the removed records, with a uniform sample of each rule's.

    Attributes:
      removed: records that each rule removed.
      alone: records that this rule alone removed.
      examples: at most five records of each rule.
      texts_removed: removed texts of kept records.
    """

    def __init__(self):
        self.removed, self.alone = collections.Counter(), collections.Counter()
        self.examples = collections.defaultdict(list)
        self.texts_removed = 0
        self._random = random.Random(0)

    def add(self, hits, index, size, texts):
        """Counts a removed record.

        Args:
          hits: names of the rules that removed it.
          index: its number.
          size: width and height of its image.
          texts: its texts.
        """
        hits = set(hits)
        self.removed.update(hits)
        if len(hits) == 1:
            self.alone.update(hits)
        for rule in hits:
            example = {"record": index, "size": list(size), "texts": list(texts[:3])}
            # Reservoir sampling.
            full = self.removed[rule] > _EXAMPLES
            place = self._random.randrange(self.removed[rule]) if full else len(self.examples[rule])
            if place < _EXAMPLES:
                self.examples[rule][place : place + 1] = [example]


def decide(source, rules, counts, test_images, writer):
    """Runs the second pass, which writes the index.

    Args:
      source: the records.
      rules: the thresholds.
      counts: the result of the first pass.
      test_images: the `NearDuplicates` of the test images, or None.
      writer: the `IndexWriter`.

    Returns:
      The `Tally`.
    """
    tally, kept = Tally(), []
    for index, record in records(source):
        if isinstance(record, BadRecord):
            tally.add(["unreadable"], index, (0, 0), [])
            continue
        texts = record["texts"][:TEXTS]
        hits, size = image_hits(record, rules, counts, test_images)
        of_texts = [text_hits(text, rules, counts) for text in texts]
        if not texts:
            hits.append("no_text")
        if hits or all(of_texts):
            tally.add([*hits, *itertools.chain.from_iterable(of_texts)], index, size, texts)
            continue
        bits = sum(1 << i for i, of_text in enumerate(of_texts) if not of_text)
        kept.append((index, bits))
        tally.texts_removed += len(texts) - bits.bit_count()
        if len(kept) == _ROWS:
            writer.add(*zip(*kept, strict=True))
            kept = []
    if kept:
        writer.add(*zip(*kept, strict=True))
    return tally


def run(source, out, rules=ALIGN, exclude=()):
    """Filters a source; writes `index.npy`, `report.json`, `report.txt` and `report.html` into a folder.

    Args:
      source: the records.
      out: the folder; it is created when it does not exist, and an index in it is replaced.
      rules: the thresholds.
      exclude: test sets; their images and near duplicates of them are removed.

    Returns:
      The report, a dict.

    Raises UserError when `out` cannot be written, when none of the first 256 records has the field `rules.unsafe`, or
    when no record is kept.
    """
    if rules.unsafe:
        fields = set().union(
            *(record for _, record in itertools.islice(records(source), 256) if not isinstance(record, BadRecord))
        )
        if rules.unsafe not in fields:
            near = did_you_mean(rules.unsafe, fields)
            raise UserError(f"--unsafe={rules.unsafe}: no such field{near}; fields: {', '.join(sorted(fields))}")
    with IndexWriter(source, out) as writer:
        known = [image_hash(r["image"]) for s in exclude for _, r in records(s) if _is_image(r)]
        counts = count(source, rules, writer.scratch)
        test_images = NearDuplicates(known, rules.near_duplicate) if exclude else None
        tally = decide(source, rules, counts, test_images, writer)
        report = writer.finish(_report(rules, exclude, counts, tally), describe)
    sections = {
        f"Removed by {rule}": [examples.shown(source, e["record"], "x".join(map(str, e["size"]))) for e in found]
        for rule, found in tally.examples.items()
    }
    examples.write_page(out, f"{source.name}: filtered", list(describe(report)), sections)
    return report


def _is_image(record):
    try:
        if not isinstance(record, BadRecord):
            decode.load(decode.open_image(record.get("image")))
            return True
    except BadRecord:
        pass
    return False


def _report(rules, exclude, counts, tally):
    return {
        "texts_removed_from_kept_records": tally.texts_removed,
        "thresholds": dataclasses.asdict(rules),
        "exclude": [s.name for s in exclude],
        "rules": {
            rule: {"removed": tally.removed[rule], "alone": tally.alone[rule], "examples": tally.examples[rule]}
            for rule in RULES
        },
        "counts": counts.facts,
    }


def describe(report):
    """Yields the lines of a report, the dict that `run` returns."""
    grams = report["counts"]["ngrams"]
    yield headline(report)
    yield f"{report['texts_removed_from_kept_records']:,} texts of kept records are removed"
    rarest = grams["occurrences_of_the_rarest_kept"]
    yield f"{grams['kept']:,} of {grams['different']:,} n-grams are frequent: each occurs at least {rarest:,} times"
    yield f"{cost(report)}, temporary files {report['counts']['scratch_bytes'] / report['records']:,.0f} bytes a record"
    yield ""
    yield f"{'rule':14}{'threshold':>12}{'removed':>12}{'by it alone':>13}  removes"
    for rule, (threshold, meaning) in RULES.items():
        value = report["thresholds"][threshold] if threshold else ""
        skipped = (rule == "test_picture" and not report["exclude"]) or (rule == "unsafe" and not value)
        value = "off" if skipped else value if isinstance(value, str) else f"{value:,}"
        counts = report["rules"][rule]
        yield f"{rule:14}{value:>12}{counts['removed']:>12,}{counts['alone']:>13,}  {meaning}"
    yield "(a record removed by several rules counts for each of them)"
    found = {f"examples of {rule}:": counts["examples"] for rule, counts in report["rules"].items()}
    yield from example_lines({heading: some for heading, some in found.items() if some})


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.filter", __doc__, FIELDS)
    parser.add_argument("--out", required=True, help="folder of the index and the report")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="SOURCE[:SPLIT]",
        help="test set whose images are removed; may be given several times",
    )
    meanings = {
        threshold: f"{rule}: removes every {meaning}" for rule, (threshold, meaning) in RULES.items() if threshold
    }
    for field in dataclasses.fields(Rules):
        help_text = f"{meanings[field.name]} (default: {field.default or 'off'})"
        parser.add_argument(
            flag(field.name),
            type=type(field.default),
            default=field.default,
            metavar="FIELD" if isinstance(field.default, str) else "N",
            help=help_text,
        )
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    exclude = [
        make_source(*spec.rsplit(":", 1)) if re.search(r"\w:\w+$", spec) else make_source(spec) for spec in args.exclude
    ]
    show(describe(run(open_source(args), args.out, rules, exclude)), args)


if __name__ == "__main__":
    command.script(main)
