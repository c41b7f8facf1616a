"""ALIGN's noise filters over any data source (Jia et al. 2021, section 3), and the index of what they keep, which training reads.

    python -m clip_jax.data.filter --source='/data/pairs/{00000..41407}.tar' --out=runs/kept
    python -m clip_jax.train --config=configs/align.py:b7 --config.data='/data/pairs/{00000..41407}.tar?index=runs/kept' ...

Two passes: the first counts how many texts a picture has, how many pictures a text has, and how frequent each word and pair of neighbouring
words is; the second decides. Every default is the paper's. The folder OUT gets `index.npy`, `report.txt` and `report.json`.

What the paper leaves open is an assumption here: pictures are the same when their bytes are; texts when their words are, whatever
their case and punctuation; words are runs of letters and digits, with apostrophes inside; a near duplicate of a test picture is one whose
128 comparisons of neighbouring grey values at 9 x 9 pixels differ in at most 7; n-grams of equal frequency are all among the most frequent
or none. Unsafe pictures are found by a field of the records, which somebody else's classifier has filled.
"""

import array
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clip_jax.data import decode
from clip_jax.data.command import open_source, source_parser
from clip_jax.data.sources import BadRecord, Record, Source, make_source, near
from clip_jax.errors import UserError
from clip_jax.training import faults

TEXTS = 64  # of a record: as many bits as the index has for them
_CHUNK = 4096  # records that are read ahead
_BUFFER = 2**21  # rows of a table that are held in memory, 16 bytes each
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
            raise UserError(f"--min-words={self.min_words} is more than --max-words={self.max_words}: nothing would be left")
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


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


_hash_word = functools.lru_cache(2**18)(lambda word: _hash(word.encode("utf-8", "surrogateescape")))


def _text_key(tokens: Sequence[str]) -> int:
    return _hash(" ".join(tokens).encode("utf-8", "surrogateescape"))


def ngrams(tokens: Sequence[str]) -> np.ndarray:
    """Hashes uint64 [max(2n - 1, 0)] of the n words and of their pairs of neighbours."""
    one = np.array([_hash_word(token) for token in tokens], np.uint64)
    two = (one[:-1] * np.uint64(0x9E3779B97F4A7C15)) ^ (one[1:] * np.uint64(0xC2B2AE3D27D4EB4F) + np.uint64(1))
    return np.concatenate([one, two])


def image_key(image) -> int:
    """A hash of the bytes of a picture."""
    return _hash(image.tobytes() + str(image.shape).encode() if isinstance(image, np.ndarray) else bytes(image or b""))


def records(source: Source, first: int = 0) -> Iterator[tuple[int, Record | BadRecord]]:
    """Records from the first one on, with index, in order, read ahead by threads; BadRecord in the place of those that cannot be read."""

    def read(index):
        try:
            return source[index]
        except BadRecord as bad:
            return bad

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(first, len(source), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(source)))
            yield from zip(indices, pool.map(read, indices, chunksize=64), strict=True)


# --- counts on disk ---


class Table:
    """Rows (key, value) of uint64 on disk, in 256 files by the key's first byte, so that each fits into memory; 16 bytes a row."""

    def __init__(self, folder: str, name: str, sums: bool = False):
        """sums: values of the same key may be added up before they are written."""
        self._path, self._sums, self.bytes = os.path.join(folder, name), sums, 0
        self._keys, self._values = array.array("Q"), array.array("Q")

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        self._keys.frombytes(keys.tobytes())
        self._values.frombytes(values.tobytes())
        if len(self._keys) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        keys, values = np.array(self._keys, np.uint64), np.array(self._values, np.uint64)
        self._keys, self._values = array.array("Q"), array.array("Q")
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        if self._sums and len(keys):
            keys, first = np.unique(keys, return_index=True)
            values = np.add.reduceat(values, first)
        ends = np.searchsorted(keys >> np.uint64(56), np.arange(256), "right").tolist()
        for part, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            if start < end:
                with open(f"{self._path}.{part:02x}", "ab") as file:
                    np.stack([keys[start:end], values[start:end]], 1).tofile(file)
        self.bytes += 16 * len(keys)

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, values) of one file after the other, in the order of keys, then of values."""
        self._flush()
        for part in range(256):
            with contextlib.suppress(FileNotFoundError):
                rows = np.fromfile(f"{self._path}.{part:02x}", np.uint64).reshape(-1, 2)
                order = np.lexsort((rows[:, 1], rows[:, 0]))
                yield rows[order, 0], rows[order, 1]

    def more_than(self, limit: int) -> np.ndarray:
        """The keys, in order, that have more than `limit` different values."""
        found = [np.zeros(0, np.uint64)]
        for keys, values in self.parts():
            is_new = np.ones(len(keys), bool)
            is_new[1:] = (keys[1:] != keys[:-1]) | (values[1:] != values[:-1])
            unique, counts = np.unique(keys[is_new], return_counts=True)
            found.append(unique[counts > limit])
        return np.concatenate(found)

    def most_frequent(self, size: int, path: str) -> tuple[np.ndarray | None, dict[str, int]]:
        """The keys, in order, whose values have the largest sums, as a file that is mapped into memory.

        Of equal sums all are among the `size` keys or none. None instead of the keys where that leaves nothing out.
        """
        histogram = collections.Counter()
        for sums in (sums for _, sums in self._summed()):
            histogram.update(dict(zip(*(x.tolist() for x in np.unique(sums, return_counts=True)), strict=True)))
        total, taken, least = histogram.total(), 0, max(histogram, default=0) + 1
        for count, keys in sorted(histogram.items(), reverse=True):
            if taken + keys > size:
                break
            taken, least = taken + keys, count
        facts = {"different": total, "kept": taken, "occurrences_of_the_rarest_kept": least}
        if taken == total:
            return None, facts
        with open(path, "wb") as file:
            for keys, sums in self._summed():
                keys[sums >= least].tofile(file)
        return np.memmap(path, np.uint64, "r") if taken else np.zeros(0, np.uint64), facts

    def _summed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for keys, values in self.parts():
            unique, first = np.unique(keys, return_index=True)
            yield unique, np.add.reduceat(values, first)


def _contains(keys: np.ndarray, wanted) -> np.ndarray:
    """Which of the `wanted` are among the sorted keys, bool like `wanted`."""
    wanted = np.asarray(wanted, np.uint64)
    if not len(keys):
        return np.zeros(wanted.shape, bool)
    return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted


# --- near duplicates ---


def picture_hash(image) -> bytes:
    """16 bytes of a picture: which neighbours, across and down, get brighter at 9 x 9 grey pixels. Raises BadRecord."""
    image = decode.open_image(image)
    image, _ = decode.shrink_on_load(image, (0, 0, *image.size), 9)
    grey = np.asarray(decode.flatten(image).convert("L").resize((9, 9), decode.Image.Resampling.BOX))
    return np.packbits([grey[:8, 1:] > grey[:8, :-1], grey[1:, :8] > grey[:-1, :8]]).tobytes()


class NearDuplicates:
    """Finds hashes within some bits of given ones: two that differ in d bits agree in one of d + 1 pieces, by which they are looked up."""

    def __init__(self, hashes: Iterable[bytes], distance: int):
        self._distance, self._pieces = distance, [(p[0], p[-1] + 1) for p in np.array_split(np.arange(16), distance + 1)]
        self._tables = [collections.defaultdict(set) for _ in self._pieces]
        for known in set(hashes):
            for table, (start, end) in zip(self._tables, self._pieces, strict=True):
                table[known[start:end]].add(known)

    def __contains__(self, wanted: bytes) -> bool:
        number = int.from_bytes(wanted)
        found = (table.get(wanted[start:end], ()) for table, (start, end) in zip(self._tables, self._pieces, strict=True))
        return any((int.from_bytes(known) ^ number).bit_count() <= self._distance for known in itertools.chain.from_iterable(found))


# --- the two passes ---


@dataclasses.dataclass
class Counts:
    """What the first pass found: keys in order. `vocabulary` is None where every n-gram is in it."""

    many_texts: np.ndarray
    shared_texts: np.ndarray
    vocabulary: np.ndarray | None
    facts: dict


def count(source: Source, rules: Rules, folder: str) -> Counts:
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


def text_hits(text: str, rules: Rules, counts: Counts) -> list[str]:
    """The rules that remove a text."""
    tokens, hits = words(text), []
    if _contains(counts.shared_texts, [_text_key(tokens)])[0]:
        hits.append("shared_text")
    if counts.vocabulary is not None and not _contains(counts.vocabulary, ngrams(tokens)).all():
        hits.append("rare_words")
    if len(tokens) < rules.min_words:
        hits.append("too_short")
    if len(tokens) > rules.max_words:
        hits.append("too_long")
    return hits


def picture_hits(record: Record, rules: Rules, counts: Counts, test_pictures: NearDuplicates | None) -> tuple[list[str], tuple[int, int]]:
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
    if _contains(counts.many_texts, [image_key(record["image"])])[0]:
        hits.append("many_texts")
    return hits, image.size


def _is_unsafe(value) -> bool:
    if isinstance(value, int | float):
        return value >= 0.5
    return str(value).strip().lower() in ("nsfw", "unsafe", "true", "yes", "1")


class Tally:
    """How many records each rule removed, with examples that are a fair sample of them."""

    def __init__(self):
        self.removed, self.alone, self.examples = collections.Counter(), collections.Counter(), collections.defaultdict(list)
        self.kept = self.texts_kept = self.texts_removed = 0
        self._random = random.Random(0)

    def add(self, hits: Iterable[str], index: int, size: tuple[int, int], texts: Sequence[str]) -> None:
        hits = set(hits)
        self.removed.update(hits)
        if len(hits) == 1:
            self.alone.update(hits)
        for rule in hits:
            place = self._random.randrange(self.removed[rule]) if self.removed[rule] > _EXAMPLES else len(self.examples[rule])
            if place < _EXAMPLES:  # reservoir sampling
                self.examples[rule][place : place + 1] = [{"record": index, "size": list(size), "texts": list(texts[:3])}]


def decide(source: Source, rules: Rules, counts: Counts, test_pictures: NearDuplicates | None, file) -> Tally:
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
        if len(rows) == _CHUNK:
            np.array(rows, np.int64).tofile(file)
            rows = []
    np.array(rows, np.int64).tofile(file)
    return tally


# --- the index ---


def fingerprint(source: Source) -> str:
    """Tells data sets apart: a hash of their number of records and of 32 records, evenly spaced."""
    digest = hashlib.blake2b(str(len(source)).encode(), digest_size=16)
    for i in range(min(32, len(source))):
        try:
            record = source[i * len(source) // min(32, len(source))]
            digest.update(json.dumps([image_key(record.get("image")), record["texts"]]).encode())
        except BadRecord as bad:
            digest.update(bad.args[0].encode())
    return digest.hexdigest()


class IndexedSource:
    """The records of a source that an index keeps, with the texts that it keeps of each. 16 bytes a record, mapped into memory."""

    def __init__(self, source: Source, folder: str | os.PathLike):
        """Raises UserError when there is no such index, or it is one of another data set."""
        try:
            report = json.loads((Path(folder) / "report.json").read_text())
            self._path = os.path.join(folder, "index.npy")
            self._length = len(np.load(self._path, mmap_mode="r"))
            made_for, length = report["fingerprint"], report["records"]
        except FileNotFoundError:
            raise UserError(f"index={folder}: no index, which clip_jax.data.filter writes, is there") from None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"index={folder}: damaged ({type(error).__name__}: {error})") from None
        if made_for != fingerprint(source):
            raise UserError(
                f"index={folder} was made of another data set: {report['source']}, {length:,} records, not {source.name}, {len(source):,}"
            )
        self._source, self._index = source, None
        self.name, self.class_names, self.broken = f"{source.name}?index={folder}", source.class_names, source.broken

    def __getstate__(self):
        return self.__dict__ | {"_index": None}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if self._index is None:
            self._index = np.load(self._path, mmap_mode="r")
        number, bits = self._index[index].tolist()
        record = self._source[number]
        return record | {"texts": [text for i, text in enumerate(record["texts"][:TEXTS]) if bits >> i & 1]}


def run(source: Source, out: str | os.PathLike, rules: Rules = Rules(), exclude: Sequence[Source] = ()) -> dict:
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
        fields = set().union(*(record for _, record in itertools.islice(records(source), 256) if not isinstance(record, BadRecord)))
        if rules.unsafe not in fields:
            raise UserError(f"--unsafe={rules.unsafe}: no such field{near(rules.unsafe, fields)}; fields: {', '.join(sorted(fields))}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            known = [picture_hash(r["image"]) for s in exclude for _, r in records(s) if _is_picture(r)]
            counts = count(source, rules, folder)
            with open(os.path.join(folder, "index"), "wb") as file:
                tally = decide(source, rules, counts, NearDuplicates(known, rules.near_duplicate) if exclude else None, file)
            report = _report(source, rules, exclude, counts, tally, time.monotonic() - start)
            (out / "report.json").unlink(missing_ok=True)  # until the new index is whole there is none
            rows = np.memmap(file.name, np.int64, "r", shape=(tally.kept, 2)) if tally.kept else np.zeros((0, 2), np.int64)
            np.save(out / "index.npy", rows)
            del counts, rows
        (out / "report.txt").write_text("\n".join(describe(report)) + "\n", errors="replace")
        if not tally.kept:
            raise UserError(f"{source.name}: all {len(source):,} records are removed; {out / 'report.txt'} says by which rules")
        (out / "report.json").write_text(json.dumps(report, indent=1))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return report


def _is_picture(record) -> bool:
    try:
        return not isinstance(record, BadRecord) and decode.load(decode.open_image(record.get("image"))) is not None
    except BadRecord:
        return False


def _report(source, rules, exclude, counts, tally, seconds) -> dict:
    return {
        "source": source.name,
        "fingerprint": fingerprint(source),
        "records": len(source),
        "kept": tally.kept,
        "texts_kept": tally.texts_kept,
        "texts_removed_from_kept_records": tally.texts_removed,
        "thresholds": dataclasses.asdict(rules),
        "exclude": [s.name for s in exclude],
        "rules": {rule: {"removed": tally.removed[rule], "alone": tally.alone[rule], "examples": tally.examples[rule]} for rule in RULES},
        "counts": counts.facts,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def describe(report: dict) -> Iterator[str]:
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
                yield f"  record {example['record']:,}, {size}: " + " | ".join(" ".join(text.split())[:100] for text in example["texts"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.data.filter", __doc__, ("image", "text", "label"))
    parser.add_argument("--out", required=True, help="folder for the index and the report")
    parser.add_argument("--exclude", action="append", default=[], metavar="SOURCE[:SPLIT]", help="a test set; may be given several times")
    meanings = {threshold: f"{rule}: removes {meaning}" for rule, (threshold, meaning) in RULES.items() if threshold}
    for field in dataclasses.fields(Rules):
        help_text = f"{meanings[field.name]} (default: {field.default or 'off'})"
        parser.add_argument(_flag(field.name), type=type(field.default), default=field.default, metavar="N", help=help_text)
    args = parser.parse_args(argv)
    return faults.command(lambda: _main(args))


def _main(args):
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    exclude = [make_source(*spec.rsplit(":", 1)) if re.search(r"\w:\w+$", spec) else make_source(spec) for spec in args.exclude]
    for line in describe(run(open_source(args), args.out, rules, exclude)):
        print(line)
    print(f"\nindex: {args.out}; train on it with --config.data='{args.source}?index={args.out}'")


if __name__ == "__main__":
    sys.exit(main())
