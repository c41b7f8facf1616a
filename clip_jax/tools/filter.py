"""ALIGN's noise filters over any data source (Jia et al. 2021, section 3), and the index of what they keep, which training reads.

    python -m clip_jax.tools.filter --source='/data/pairs/{00000..41407}.tar' --out=runs/kept
    python -m clip_jax.train --config=configs/align.py:b7 --config.data='/data/pairs/{00000..41407}.tar?index=runs/kept' ...

Two passes: the first counts how many texts a picture has, how many pictures a text has, and how frequent each word and pair of neighbouring
words is; the second decides. Every default is the paper's. The folder OUT gets `index.npy`, `report.txt` and `report.json`.

What the paper leaves open is an assumption here: pictures are the same when their bytes are; texts when their words are, whatever
their case and punctuation; words are runs of letters and digits, with apostrophes inside; a near duplicate of a test picture is one whose
128 comparisons of neighbouring grey values at 9 x 9 pixels differ in at most 7; n-grams of equal frequency are all among the most frequent
or none. Unsafe pictures are found by a field of the records, which somebody else's classifier has filled.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, fingerprint, hash64, image_key, records
from clip_jax.data.sources import make_source
from clip_jax.data.sources.index import TEXTS
from clip_jax.errors import UserError, did_you_mean
from clip_jax.runtime import command
from clip_jax.tools.filter_tables import NearDuplicates, Table, contains, picture_hash
from clip_jax.tools.source_arguments import open_source, source_parser

_ROWS = 4096  # of the index that are held before they are written
_EXAMPLES = 5  # of each rule in the report
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The thresholds; in parentheses what is removed."""

    min_side: int = 200  # shorter side in pixels (not above it)
    max_aspect: float = 3.0  # longer side over shorter side (not below it)
    max_texts: int = 1000  # texts of one picture (more)
    max_images: int = 10  # pictures of one text (more)
    vocabulary: int = 100_000_000  # most frequent words and pairs of words (a text with another one)
    min_words: int = 3  # words of a text (fewer)
    max_words: int = 20  # (more)
    near_duplicate: int = 7  # bits in which a picture differs from a test picture (not more)
    unsafe: str = ""  # field of a record that says "NSFW", "unsafe", "true", "yes", or a number from 0.5 on (those)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and value < 0:
                raise UserError(f"{_flag(field.name)}={value}: must be at least 0")
        if self.min_words > self.max_words:
            raise UserError(
                f"--min-words={self.min_words} is more than --max-words={self.max_words}: nothing would be left"
            )
        if self.near_duplicate > 15:
            raise UserError(f"--near-duplicate={self.near_duplicate}: at most 15 of the 128 bits")


#: Rule -> (its threshold, what it removes). The first ones look at a record and its picture, those from shared_text on at each text.
RULES = {
    "unreadable": (None, "the record or its picture cannot be read"),
    "unsafe": ("unsafe", "marked as unsafe"),
    "small": ("min_side", "shorter side of at most this many pixels"),
    "elongated": ("max_aspect", "longer side at least so many times the shorter"),
    "many_texts": ("max_texts", "picture with more texts"),
    "test_picture": ("near_duplicate", "picture of a test set, but for so many of 128 bits"),
    "shared_text": ("max_images", "text of more pictures"),
    "rare_words": ("vocabulary", "words or pairs of words outside of the most frequent"),
    "too_short": ("min_words", "fewer words"),
    "too_long": ("max_words", "more words"),
    "no_text": (None, "record without a text"),
}


# --- the records ---


def words(text):
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


_hash_word = functools.lru_cache(2**18)(lambda word: hash64(word.encode("utf-8", "surrogateescape")))


def _text_key(tokens):
    return hash64(" ".join(tokens).encode("utf-8", "surrogateescape"))


def ngrams(tokens):
    """Hashes uint64 [max(2n - 1, 0)] of the n words and of their pairs of neighbours."""
    one = np.array([_hash_word(token) for token in tokens], np.uint64)
    two = (one[:-1] * np.uint64(0x9E3779B97F4A7C15)) ^ (one[1:] * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(1))
    return np.concatenate([one, two])


# --- the two passes ---


@dataclasses.dataclass
class Counts:
    """What the first pass found: keys in order. `vocabulary` is None where every n-gram is in it."""

    many_texts: np.ndarray
    shared_texts: np.ndarray
    vocabulary: np.ndarray | None
    facts: dict


def count(source, rules, folder):
    """The first pass; `folder` is for its files."""
    images, texts, grams = Table(folder, "images"), Table(folder, "texts"), Table(folder, "ngrams", sums=True)
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
    """The rules that remove a text."""
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


def picture_hits(record, rules, counts, test_pictures):
    """The rules that remove a picture, whatever its texts, and its size in pixels."""
    hits = ["unsafe"] if rules.unsafe and _is_unsafe(record.get(rules.unsafe)) else []
    try:
        image = decode.open_image(record.get("image"))
        if test_pictures is not None and picture_hash(image) in test_pictures:
            hits.append("test_picture")
    except BadRecord:
        return [*hits, "unreadable"], (0, 0)
    short, long = sorted(image.size)
    if short <= rules.min_side:
        hits.append("small")
    if long >= rules.max_aspect * short:
        hits.append("elongated")
    if contains(counts.many_texts, [image_key(record["image"])])[0]:
        hits.append("many_texts")
    return hits, image.size


def _is_unsafe(value):
    if isinstance(value, int | float):
        return value >= 0.5
    return str(value).strip().lower() in ("nsfw", "unsafe", "true", "yes", "1")


class Tally:
    """How many records each rule removed, with examples that are a fair sample of them."""

    def __init__(self):
        self.removed, self.alone, self.examples = (
            collections.Counter(),
            collections.Counter(),
            collections.defaultdict(list),
        )
        self.kept = self.texts_kept = self.texts_removed = 0
        self._random = random.Random(0)

    def add(self, hits, index, size, texts):
        hits = set(hits)
        self.removed.update(hits)
        if len(hits) == 1:
            self.alone.update(hits)
        for rule in hits:
            place = (
                self._random.randrange(self.removed[rule])
                if self.removed[rule] > _EXAMPLES
                else len(self.examples[rule])
            )
            if place < _EXAMPLES:  # reservoir sampling
                self.examples[rule][place : place + 1] = [
                    {"record": index, "size": list(size), "texts": list(texts[:3])}
                ]


def decide(source, rules, counts, test_pictures, file):
    """The second pass: writes rows int64 (index, bits of the texts that stay) of the records that stay to `file`."""
    tally, rows = Tally(), []
    for index, record in records(source):
        if isinstance(record, BadRecord):
            tally.add(["unreadable"], index, (0, 0), [])
            continue
        texts = record["texts"][:TEXTS]
        hits, size = picture_hits(record, rules, counts, test_pictures)
        of_texts = [text_hits(text, rules, counts) for text in texts]
        if not texts:
            hits.append("no_text")
        if hits or all(of_texts):
            tally.add([*hits, *itertools.chain.from_iterable(of_texts)], index, size, texts)
            continue
        bits = sum(1 << i for i, of_text in enumerate(of_texts) if not of_text)
        rows.append((index, bits - (1 << 64) if bits >> 63 else bits))
        tally.kept, tally.texts_kept = tally.kept + 1, tally.texts_kept + bits.bit_count()
        tally.texts_removed += len(texts) - bits.bit_count()
        if len(rows) == _ROWS:
            np.array(rows, np.int64).tofile(file)
            rows = []
    np.array(rows, np.int64).tofile(file)
    return tally


def run(source, out, rules=Rules(), exclude=()):
    """Filters a source; writes `index.npy`, `report.json` and `report.txt` into the folder `out`.

    Args:
        source: the records.
        out: made if it is not there; an index in it is replaced.
        rules: the thresholds.
        exclude: test sets, whose pictures and near duplicates of them are removed.

    Returns: the report.
    Raises UserError when `out` cannot be written, none of the first records has the field `rules.unsafe`, or nothing is left.
    """
    out, start = Path(out), time.monotonic()
    if rules.unsafe:
        fields = set().union(
            *(record for _, record in itertools.islice(records(source), 256) if not isinstance(record, BadRecord))
        )
        if rules.unsafe not in fields:
            raise UserError(
                f"--unsafe={rules.unsafe}: no such field{did_you_mean(rules.unsafe, fields)}; fields: {', '.join(sorted(fields))}"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            known = [picture_hash(r["image"]) for s in exclude for _, r in records(s) if _is_picture(r)]
            counts = count(source, rules, folder)
            with open(os.path.join(folder, "index"), "wb") as file:
                tally = decide(
                    source, rules, counts, NearDuplicates(known, rules.near_duplicate) if exclude else None, file
                )
            report = _report(source, rules, exclude, counts, tally, time.monotonic() - start)
            (out / "report.json").unlink(missing_ok=True)  # until the new index is whole there is none
            rows = (
                np.memmap(file.name, np.int64, "r", shape=(tally.kept, 2)) if tally.kept else np.zeros((0, 2), np.int64)
            )
            np.save(out / "index.npy", rows)
            del counts, rows
        (out / "report.txt").write_text("\n".join(describe(report)) + "\n", errors="replace")
        if not tally.kept:
            raise UserError(
                f"{source.name}: all {len(source):,} records are removed; {out / 'report.txt'} says by which rules"
            )
        (out / "report.json").write_text(json.dumps(report, indent=1))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return report


def _is_picture(record):
    try:
        return not isinstance(record, BadRecord) and decode.load(decode.open_image(record.get("image"))) is not None
    except BadRecord:
        return False


def _report(source, rules, exclude, counts, tally, seconds):
    return {
        "source": source.name,
        "fingerprint": fingerprint(source),
        "records": len(source),
        "kept": tally.kept,
        "texts_kept": tally.texts_kept,
        "texts_removed_from_kept_records": tally.texts_removed,
        "thresholds": dataclasses.asdict(rules),
        "exclude": [s.name for s in exclude],
        "rules": {
            rule: {"removed": tally.removed[rule], "alone": tally.alone[rule], "examples": tally.examples[rule]}
            for rule in RULES
        },
        "counts": counts.facts,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def describe(report):
    """The lines of a report."""
    n, kept, grams = report["records"], report["kept"], report["counts"]["ngrams"]
    yield f"{report['source']}: {kept:,} of {n:,} records are kept ({kept / n:.1%}) with {report['texts_kept']:,} texts"
    yield f"{report['texts_removed_from_kept_records']:,} texts were removed from records that are kept"
    yield f"{grams['kept']:,} of {grams['different']:,} n-grams are frequent: {grams['occurrences_of_the_rarest_kept']:,} times or more"
    yield (
        f"{report['seconds']:,.0f} s, peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"on disk meanwhile {report['counts']['scratch_bytes'] / n:,.0f} bytes a record"
    )
    yield ""
    yield f"{'rule':14}{'threshold':>12}{'removed':>12}{'by it alone':>13}  removes"
    for rule, (threshold, meaning) in RULES.items():
        value = report["thresholds"][threshold] if threshold else ""
        skipped = (rule == "test_picture" and not report["exclude"]) or (rule == "unsafe" and not value)
        value = "off" if skipped else value if isinstance(value, str) else f"{value:,}"
        counts = report["rules"][rule]
        yield f"{rule:14}{value:>12}{counts['removed']:>12,}{counts['alone']:>13,}  {meaning}"
    yield "(a record that several rules remove counts for each of them)"
    for rule, counts in report["rules"].items():
        if counts["examples"]:
            yield ""
            yield f"{rule}, for example:"
            for example in counts["examples"]:
                size = "x".join(map(str, example["size"]))
                yield f"  record {example['record']:,}, {size}: " + " | ".join(
                    " ".join(text.split())[:100] for text in example["texts"]
                )


def _flag(name):
    return "--" + name.replace("_", "-")


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.filter", __doc__, ("image", "text", "label"))
    parser.add_argument("--out", required=True, help="folder for the index and the report")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="SOURCE[:SPLIT]",
        help="a test set; may be given several times",
    )
    meanings = {threshold: f"{rule}: removes {meaning}" for rule, (threshold, meaning) in RULES.items() if threshold}
    for field in dataclasses.fields(Rules):
        help_text = f"{meanings[field.name]} (default: {field.default or 'off'})"
        parser.add_argument(
            _flag(field.name), type=type(field.default), default=field.default, metavar="N", help=help_text
        )
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    exclude = [
        make_source(*spec.rsplit(":", 1)) if re.search(r"\w:\w+$", spec) else make_source(spec) for spec in args.exclude
    ]
    for line in describe(run(open_source(args), args.out, rules, exclude)):
        print(line)
    print(f"\nindex: {args.out}; train on it with --config.data='{args.source}?index={args.out}'")


if __name__ == "__main__":
    sys.exit(main())
