"""ALIGN's noise filters: every rule at its threshold, counts on disk, near duplicates, the index, and bad input."""

import io
import json
import pickle

import numpy as np
import PIL.Image
import pytest
from helpers import Page

from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.index import IndexedSource
from clip_jax.errors import UserError
from clip_jax.tools import filter as filters
from clip_jax.tools import filter_tables
from clip_jax.tools.filter import Rules
from clip_jax.tools.filter_tables import NearDuplicates, Table

EMPTY = np.zeros(0, np.uint64)
NOTHING = filters.Counts(EMPTY, EMPTY, None, {})


def image(width, height, seed=0, kind="PNG"):
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), PIL.Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def filtered(tmp_path, records, exclude=(), **rules):
    """Returns the report, and the kept records as training reads them."""
    rules = dict(min_side=20, min_words=1) | rules
    source = MemorySource(records)
    report = filters.run(source, tmp_path / "kept", Rules(**rules), exclude)
    kept = IndexedSource(source, tmp_path / "kept")
    return report, [kept[i] for i in range(len(kept))]


def removed(report):
    return {rule: counts["removed"] for rule, counts in report["rules"].items() if counts["removed"]}


# align.md, test oracle 7: 200 pixels rejected, 201 kept; ratio 3.0 rejected
@pytest.mark.parametrize(
    "size, hits",
    [
        ((200, 400), ["small"]), ((201, 400), []), ((400, 200), ["small"]), ((201, 603), ["elongated"]),
        ((603, 201), ["elongated"]), ((201, 602), []), ((200, 600), ["small", "elongated"]),
    ],
)  # fmt: skip
def test_sizes_at_the_papers_thresholds(size, hits):
    assert filters.image_hits({"image": image(*size)}, Rules(), NOTHING, None) == (hits, size)


def test_a_large_jpeg_has_its_own_size_also_where_it_is_compared_with_test_images():
    jpeg = {"image": image(800, 600, kind="JPEG")}
    assert filters.image_hits(jpeg, Rules(), NOTHING, NearDuplicates([], 7)) == ([], (800, 600))


# align.md, test oracle 7: 20 unigrams kept, 21 dropped
@pytest.mark.parametrize("words, hits", [(2, ["too_short"]), (3, []), (20, []), (21, ["too_long"]), (0, ["too_short"])])
def test_lengths_at_the_papers_thresholds(words, hits):
    assert filters.text_hits(" ".join(["word"] * words), Rules(), NOTHING) == hits


def test_words_are_runs_of_letters_and_digits():
    assert filters.words("It's a  CAT_and-dog, Nr. 7 (문어)!") == ["it's", "a", "cat", "and", "dog", "nr", "7", "문어"]


def test_texts_of_many_images_are_removed_whatever_their_case(tmp_path):
    records = [
        {"image": image(30, 30, i), "texts": [("Stock PHOTO!", "stock photo")[i % 2] if i < 4 else f"number {i}"]}
        for i in range(6)
    ]
    records += [{"image": image(30, 30, 9), "texts": ["twice"]}] * 3  # one image
    assert removed(filtered(tmp_path, records, max_images=4)[0]) == {}
    report, kept = filtered(tmp_path, records, max_images=3)
    assert removed(report) == {"shared_text": 4} and [r["texts"] for r in kept] == [
        ["number 4"],
        ["number 5"],
        *[["twice"]] * 3,
    ]


def test_images_with_many_texts_are_removed(tmp_path):
    records = [{"image": image(30, 30, 0), "texts": [f"text {i // 2}"]} for i in range(8)]  # 4 different texts
    records.append({"image": image(30, 30, 1), "texts": ["text 0", "text 9"]})
    assert removed(filtered(tmp_path, records, max_texts=4)[0]) == {}
    report, kept = filtered(tmp_path, records, max_texts=3)
    assert removed(report) == {"many_texts": 8} and [r["texts"] for r in kept] == [["text 0", "text 9"]]


def test_rare_words_and_rare_pairs_are_removed(tmp_path):
    texts = ["red cat"] * 3 + ["cat red"] * 2 + ["red cat xyzzy"]
    records = [{"image": image(30, 30, i), "texts": [text]} for i, text in enumerate(texts)]
    # red 6, cat 6, "red cat" 4, "cat red" 2, xyzzy 1, "cat xyzzy" 1
    for size, kept_ngrams, expected in (
        (6, 6, {}),
        (5, 4, {"rare_words": 1}),
        (4, 4, {"rare_words": 1}),
        (3, 3, {"rare_words": 3}),
    ):
        report, _ = filtered(tmp_path, records, vocabulary=size)
        assert report["counts"]["ngrams"]["kept"] == kept_ngrams and removed(report) == expected
    with pytest.raises(UserError, match="all 6 records are removed"):
        filtered(tmp_path, records, vocabulary=1)


def test_unsafe_unreadable_and_empty_records_are_removed(tmp_path):
    records = [
        {"image": image(30, 30, i), "texts": ["a cat"], "rating": rating}
        for i, rating in enumerate(("NSFW", 0.7, 0.2, "safe"))
    ]
    records += [{"image": b"no image", "texts": ["a cat"]}, {"image": image(30, 30, 9), "texts": []}]
    report, kept = filtered(tmp_path, records, unsafe="rating")
    assert removed(report) == {"unsafe": 2, "unreadable": 1, "no_text": 1} and len(kept) == 2
    assert removed(filtered(tmp_path, records)[0]) == {"unreadable": 1, "no_text": 1}
    with pytest.raises(UserError, match="no such field .did you mean 'rating'"):
        filtered(tmp_path, records, unsafe="ratings")


def test_a_record_keeps_its_good_texts(tmp_path):
    texts = ["one", "one two", "one two three four", "two three"]
    report, kept = filtered(tmp_path, [{"image": image(30, 30), "texts": texts, "tag": 5}], min_words=2, max_words=3)
    assert [(r["texts"], r["tag"]) for r in kept] == [(["one two", "two three"], 5)]
    assert (report["texts_kept"], report["texts_removed_from_kept_records"], removed(report)) == (2, 2, {})
    many = [{"image": image(30, 30), "texts": [f"word{i}" + " two" * (i == 63) for i in range(70)]}]
    assert filtered(tmp_path, many, min_words=2)[1][0]["texts"] == ["word63 two"]  # the highest bit


def test_near_duplicates_of_test_images_are_removed(tmp_path):
    test = MemorySource([{"image": image(64, 64, 1), "texts": []}, {"image": b"broken", "texts": []}])
    records = [
        {"image": image(64, 64, 1, "JPEG"), "texts": ["a recoded one"]},
        {"image": image(120, 100, 1), "texts": ["resized"]},
    ]
    records += [{"image": image(64, 64, i), "texts": ["another"]} for i in range(2, 12)]
    report, kept = filtered(tmp_path, records, [test])
    assert removed(report) == {"test_picture": 2} and len(kept) == 10


@pytest.mark.parametrize("distance", [0, 1, 7, 15])
def test_near_duplicates_are_found_up_to_the_distance(distance):
    rng = np.random.default_rng(0)
    known = rng.bytes(16)
    table = NearDuplicates([known, rng.bytes(16)], distance)
    for bits in (distance, distance + 1):
        changed = int.from_bytes(known)
        for bit in rng.choice(128, bits, replace=False).tolist():
            changed ^= 1 << bit
        assert (changed.to_bytes(16) in table) == (bits <= distance)


def test_tables_on_disk_count_like_a_dictionary(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_tables, "_BUFFER", 100)  # many spills
    rng = np.random.default_rng(0)
    keys = (rng.zipf(1.5, 3000) % 200).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    pairs, sums = Table(str(tmp_path), "pairs"), Table(str(tmp_path), "sums", sums=True)
    values = rng.integers(0, 2**63, 3000, dtype=np.uint64) | np.uint64(1)  # too large for any float
    values[1::2] = values[::2]
    for start in range(0, 3000, 37):
        pairs.add(keys[start : start + 37], values[start : start + 37])
        sums.add(keys[start : start + 37], np.ones(len(keys[start : start + 37]), np.uint64))
    different = {int(k): len(set(values[keys == k].tolist())) for k in np.unique(keys)}
    assert pairs.more_than(5).tolist() == sorted(k for k, n in different.items() if n > 5)
    counts = {int(k): int(n) for k, n in zip(*np.unique(keys, return_counts=True), strict=True)}
    found, facts = sums.most_frequent(20, str(tmp_path / "vocabulary"))
    least = facts["occurrences_of_the_rarest_kept"]
    assert found.tolist() == sorted(k for k, n in counts.items() if n >= least) and facts["kept"] == len(found) <= 20
    assert (
        sum(n >= max(n for n in counts.values() if n < least) for n in counts.values()) > 20
    )  # the next frequency would exceed the vocabulary


def test_the_report_counts_records_and_shows_examples(tmp_path):
    records = [{"image": image(30, 30, i), "texts": ["short" if i < 20 else "two words"]} for i in range(30)]
    records.append({"image": image(10, 60), "texts": ["short"]})
    report, _ = filtered(tmp_path, records, min_words=2, max_images=100)
    assert (report["records"], report["kept"]) == (31, 10)
    assert (
        removed(report) == {"too_short": 21, "small": 1, "elongated": 1} and report["rules"]["too_short"]["alone"] == 20
    )
    examples = report["rules"]["too_short"]["examples"]
    assert (
        len(examples) == 5
        and len({e["record"] for e in examples}) == 5
        and all(e["texts"] == ["short"] for e in examples)
    )
    assert json.loads((tmp_path / "kept" / "report.json").read_text()) == report
    page = Page((tmp_path / "kept" / "report.html").read_text())
    assert "Removed by too_short" in page.text and len(page.find("i", role="img")) == 7
    text = (tmp_path / "kept" / "report.txt").read_text()
    assert "10 of 31 records are kept (32.3%)" in text and "10x60: short" in text


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(12):
        (tmp_path / "data" / f"{i:02}.png").write_bytes(image(30 + i, 40, i))
        (tmp_path / "data" / f"{i:02}.txt").write_text("a picture of something" if i % 3 else "short")
    return tmp_path / "data"


def test_training_reads_the_index_by_the_name_of_the_source(folder, tmp_path, capsys):
    out = tmp_path / "kept"
    assert filters.main([f"--source={folder}", f"--out={out}", "--min-side=31"]) == 0
    printed = capsys.readouterr().out
    assert "7 of 12 records are kept" in printed and f"{folder}?index={out}" in printed
    source = make_source(f"{folder}?index={out}")
    assert (
        len(source) == 7 and source[0]["path"].endswith("02.png") and source[0]["texts"] == ["a picture of something"]
    )
    assert pickle.loads(pickle.dumps(source))[6]["path"] == source[6]["path"]
    mixture = make_source(f"{folder}?index={out}*3 + {folder}*1")
    assert len(mixture) == 19 and mixture.weights == [3.0, 1.0]


def test_an_index_of_other_data_is_refused(folder, tmp_path):
    out = tmp_path / "kept"
    filters.run(make_source(str(folder)), out, Rules(min_side=20))
    (folder / "03.txt").write_text("another picture of something")
    with pytest.raises(UserError, match="made of another data set"):
        make_source(f"{folder}?index={out}")
    with pytest.raises(UserError, match="no index in this folder; docs/curation.md has commands"):
        make_source(f"{folder}?index={tmp_path}/none")
    (out / "report.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        make_source(f"{folder}?index={out}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--min-words=5", "--max-words=4"], "--min-words=5 is more than --max-words=4"),
        (["--max-images=-1"], "--max-images=-1: must be at least 0"),
        (["--near-duplicate=16"], "--near-duplicate=16: must be at most 15"),
        (["--exclude=/nowhere"], "/nowhere: no such file"),
        (["--min-side=1000"], "all 12 records are removed"),
        (["--out=/dev/null/x"], "--out=/dev/null/x cannot be written"),
        (["--out=."], "--out=. holds an index.npy that no command of the package made"),
    ],
)
def test_bad_input_is_one_clear_line(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index.npy").write_bytes(b"mine")
    assert filters.main([f"--source={folder}", f"--out={tmp_path}/kept", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
