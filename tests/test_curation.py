"""Commands that select records: parts that resume, CLIP scores, MetaCLIP's balancing, duplicates, and bad input."""

import copy
import json
import pickle

import jax
import numpy as np
import pytest
from data_helpers import encoded
from helpers import Page
from model_helpers import tiny_method
from test_filter import image

from clip_jax import inference
from clip_jax.data.blocks import Block, BlockSource
from clip_jax.data.records import BadRecord, records
from clip_jax.data.sources import MemorySource
from clip_jax.data.sources.index import IndexedSource
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.errors import UserError
from clip_jax.runtime import sharding
from clip_jax.tools import balance, clip_score, dedup, duplicates, examples, index_writer, passes
from clip_jax.tools.entries import Matcher, read_entries

COUNT = 23
WORDS = ("red", "cat", "dog", "big red", "sea.", "the sea", "a", "house")
COMMANDS = {
    "clip_score": (clip_score, ["--checkpoint=tiny", "--keep=0.5"]),
    "balance": (balance, ["--per-entry=4", "--seed=1"]),
    "dedup": (dedup, ["--by=hash", "--near=3"]),
    "content": (dedup, ["--by=content"]),
    "embedding": (dedup, ["--by=embedding", "--checkpoint=tiny", "--similarity=0.9"]),
}


@pytest.fixture(scope="session")
def model():
    return inference.Model(*tiny_method("clip", "eval.batch_size=8"))


def pairs():
    """Records with zero to three captions, some copies of pictures, a broken picture, and captions that are no text."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(COUNT):
        texts = [" ".join(rng.choice(WORDS, 3)) + "," for _ in range(i % 4)]
        found.append({"image": image(40 + i % 3, 40, i // 2), "texts": texts})
    found[5]["image"] = b"broken"
    found[6]["texts"] = ["  ", "a cat", "\udcff"]
    found[7]["texts"] = [f"red {i}" for i in range(70)]
    return MemorySource(found)


@pytest.fixture
def command(tmp_path, monkeypatch, model):
    """Runs a command of `COMMANDS` on `pairs()` in parts of 5 records; returns its exit status."""
    monkeypatch.setattr(passes, "PART", 5)
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    (tmp_path / "entries.txt").write_text("\n".join(WORDS))

    def run(name, out, *more, source=None):
        module, arguments = COMMANDS[name]
        monkeypatch.setattr(module, "open_source", lambda args: source or pairs())
        if name == "balance":
            arguments = [*arguments, f"--entries={tmp_path}/entries.txt"]
        return module.main(["--source=pairs", f"--out={out}", *arguments, *more])

    return run


def files(out):
    """The index, and the report without the time and memory of the command."""
    report = json.loads((out / "report.json").read_text())
    del report["seconds"], report["peak_memory_bytes"]
    return (out / "index.npy").read_bytes(), report


def kept(out, source=None):
    """`[(number of the record, its captions)]` as training reads the index."""
    source = source or pairs()
    numbered = MemorySource([record | {"number": i} for i, record in enumerate(source._records)])
    index = IndexedSource(numbered, out)
    return [(index[i]["number"], index[i]["texts"]) for i in range(len(index))]


# --- the pass ---


class Counting(BlockSource):
    """Blocks of these sizes; records are their numbers, and every seventh is bad."""

    def __init__(self, sizes):
        super().__init__("blocks")
        self._set_blocks(sizes)
        self.read = []

    def read_block(self, number):
        self.read.append(number)
        begin = int(self._starts[number])

        def make(index):
            if (begin + index) % 7 == 0:
                raise BadRecord("seventh")
            return {"number": begin + index, "texts": []}

        return Block(int(self.blocks[number]), make)


@pytest.mark.parametrize("sizes", [[3] * 400, [0, 700, 0, 2, 600], [1500, 1]])
@pytest.mark.parametrize("first, end", [(0, None), (1, 600), (599, 601), (4, 4)])
def test_each_block_is_read_once(sizes, first, end):
    source = Counting(sizes)
    found = list(records(source, first, end))
    expected = range(first, sum(sizes) if end is None else end)
    assert [index for index, _ in found] == list(expected)
    assert all(isinstance(r, BadRecord) if i % 7 == 0 else r["number"] == i for i, r in found)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    assert sorted(source.read) == sorted(set(owner[expected].tolist()))


@pytest.mark.parametrize("sizes", [[3, 4] * 20, [0, 17, 0, 2, 6, 0], [1]])
def test_no_block_is_in_two_parts(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "PART", 5)
    source, found = Counting(sizes), []
    made = passes.Pass(source, tmp_path, "test")
    made.begin({})
    del source.read[:]

    def work(first, end):
        found.extend(index for index, _ in records(source, first, end))
        return {"rows": np.arange(first, end)}

    made.run(work, log=lambda line: None)
    assert found == list(range(sum(sizes))) == np.concatenate([part["rows"] for part in made]).tolist()
    assert sorted(source.read) == [number for number, size in enumerate(sizes) if size]
    assert len(made) == {140: 28, 25: 2, 1: 1}[sum(sizes)]


def test_an_index_of_blocks_is_read_block_by_block(tmp_path):
    source, rows = Counting([3] * 300), np.arange(900)[np.random.default_rng(0).random(900) < 0.3]
    with index_writer.IndexWriter(source, tmp_path) as writer:
        writer.add(rows, np.zeros(len(rows), np.uint64))
        writer.finish({}, lambda report: [])
    index = IndexedSource(source, tmp_path)
    del source.read[:]
    found = list(records(index))
    assert [r["number"] for _, r in found if not isinstance(r, BadRecord)] == rows[rows % 7 > 0].tolist()
    assert len(found) == len(rows) and sorted(source.read) == sorted(set((rows // 3).tolist()))


def cut(out, *rows):
    with index_writer.IndexWriter(pairs(), out) as writer:
        writer.add(rows, [1] * len(rows))
        writer.finish({}, lambda report: [index_writer.headline(report)])


def test_a_second_cut_leaves_the_index_of_a_running_training(tmp_path):
    cut(tmp_path, 0, 1)
    running = IndexedSource(pairs(), tmp_path)
    copied = pickle.dumps(running)
    assert pickle.loads(copied)._kept[1] == 1
    cut(tmp_path, 2, 3)
    assert [running._kept[i] for i in range(2)] == [0, 1]
    with pytest.raises(UserError, match="index.npy was made anew since it was opened; start again"):
        pickle.loads(copied)
    assert [IndexedSource(pairs(), tmp_path)._kept[i] for i in range(2)] == [2, 3]


def test_a_cut_that_keeps_nothing_leaves_the_former_index(tmp_path):
    cut(tmp_path, 0, 1)
    former = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"all {COUNT} records are removed; .*removed.txt says why"):
        cut(tmp_path)
    assert f"0 of {COUNT} records are kept" in (tmp_path / "removed.txt").read_text()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "removed.txt"} == former
    cut(tmp_path, 2)
    assert not (tmp_path / "removed.txt").exists()


def test_a_source_without_blocks_is_read_from_and_to_any_record():
    source = MemorySource([{"texts": [str(i)]} for i in range(200)])
    assert [(i, r["texts"]) for i, r in records(source, 63, 130)] == [(i, [str(i)]) for i in range(63, 130)]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_resumes_and_gives_the_same_index(name, command, tmp_path, monkeypatch, capsys):
    assert command(name, tmp_path / "whole") == 0
    expected = files(tmp_path / "whole")
    out, read = tmp_path / "resumed", []

    def until(stop):
        def some(source, first, end):
            for index, record in records(source, first, end):
                if index == stop:
                    raise KeyboardInterrupt
                read.append(index)
                yield index, record

        return some

    for stop in (0, 7, 16):  # in the first, the second and the fourth part
        for module in (passes, balance):
            monkeypatch.setattr(module, "records", until(stop))
        assert command(name, out) == 130 and capsys.readouterr().err == "interrupted; the same command resumes\n"
        assert len(list((out / "parts").glob("*.npz"))) == stop // 5 and not list(out.glob("parts/*.tmp"))
        with pytest.raises(ValueError, match="no index in this folder"):
            IndexedSource(pairs(), out)
    for module in (passes, balance):
        monkeypatch.setattr(module, "records", until(None))
    add = index_writer.IndexWriter.add
    monkeypatch.setattr(index_writer.IndexWriter, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(name, out) == 130 and not list(out.glob("*.json")) and not list(out.glob("tmp*"))
    monkeypatch.setattr(index_writer.IndexWriter, "add", add)
    del read[:]
    assert command(name, out) == 0 and files(out) == expected and not read


@pytest.mark.parametrize("name", ["clip_score", "balance", "dedup"])
def test_shares_of_several_hosts_give_the_same_index(name, command, tmp_path, capsys):
    assert command(name, tmp_path / "whole") == 0
    assert command(name, tmp_path / "shares", "--part=2/2") == 0
    assert "2 parts of others are missing" in capsys.readouterr().out
    assert command(name, tmp_path / "shares", "--part=1/2") == 0 and not (tmp_path / "shares" / "report.json").exists()
    assert command(name, tmp_path / "shares") == 0 and files(tmp_path / "shares") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["clip_score", "balance", "dedup"])
def test_an_array_of_others_is_not_overwritten(name, command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.npy").write_bytes(b"mine")
    assert command(name, tmp_path / "out") == 2
    assert "holds an index.npy that no command of the package made: name another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"index.npy": b"mine"}


def test_parts_of_something_else_are_refused(command, tmp_path, model, monkeypatch, capsys):
    def refused(name, *more, source=None):
        assert command(name, tmp_path, *more, source=source) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    assert command("clip_score", tmp_path) == 0
    assert "holds parts of another data set" in refused("clip_score", source=MemorySource(pairs()._records[1:]))
    assert "holds parts of another command" in refused("dedup")
    other = copy.copy(model)
    other.params = jax.tree.map(lambda x: x + 1, model.params)
    monkeypatch.setattr(inference, "load", lambda *_, **__: other)
    assert "holds parts of another checkpoint" in refused("clip_score")
    (tmp_path / "parts" / "0000002.npz").write_bytes(b"PK")
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    assert "0000002.npz is damaged" in refused("clip_score")
    (tmp_path / "parts" / "key.json").write_text("{}")
    assert "key.json is damaged" in refused("clip_score")


# --- CLIP scores ---


def pair_scores(model):
    """`{(record, caption): score}` by the model, one record at a time."""
    found = {}
    for number, record in enumerate(pairs()._records):
        texts = [(i, t) for i, t in enumerate(record["texts"][:64]) if t.strip() and t != "\udcff"]
        if number != 5 and texts:
            z_text = model.embed_text([text for _, text in texts])
            scores = np.asarray(model.similarity(model.embed_image([record["image"]]), z_text))[0]
            found |= {(number, i): score for (i, _), score in zip(texts, scores.tolist(), strict=True)}
    return found


@pytest.mark.parametrize("method", ["clip", "filip"])
def test_scores_are_those_of_each_pair(method, model):
    model = model if method == "clip" else inference.Model(*tiny_method("filip", "eval.batch_size=8"))
    part = clip_score.score(model, pairs(), 0, COUNT)
    owner, place = index_writer.places(part["captions"])
    found = {(r, c): s for r, c, s in zip(owner.tolist(), place.tolist(), part["scores"], strict=True) if s == s}
    expected = pair_scores(model)
    assert found.keys() == expected.keys() and not part["readable"][5] and part["readable"].sum() == COUNT - 1
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), atol=1e-5)


def test_the_share_and_the_threshold_decide_on_each_caption(command, tmp_path, model, capsys):
    assert command("clip_score", tmp_path) == 0
    expected = pair_scores(model)
    ranked = sorted(expected, key=expected.get, reverse=True)

    def texts(chosen):
        numbers = sorted({record for record, _ in chosen})
        rows = pairs()._records
        return [(r, [t for i, t in enumerate(rows[r]["texts"]) if (r, i) in set(chosen)]) for r in numbers]

    assert kept(tmp_path) == texts(ranked[: round(len(ranked) / 2)])
    report = files(tmp_path)[1]
    assert (report["pairs"], report["captions_without_text"], report["unreadable_records"]) == (len(ranked), 2, 1)
    assert report["pairs_kept"] == round(len(ranked) / 2) == report["texts_kept"]
    low = np.mean([expected[ranked[9]], expected[ranked[10]]])
    # The scores of the first command are cut elsewhere, without the model.
    arguments = ["--source=pairs", f"--out={tmp_path}", f"--threshold={low}"]
    assert clip_score.main(arguments) == 0 and kept(tmp_path) == texts(ranked[:10])
    printed = capsys.readouterr().out
    assert f"10 of {len(ranked)} pairs" in printed and "pairs?index=" in printed


@pytest.mark.parametrize("seed", range(4))
def test_the_kth_largest_is_exact(seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.standard_normal(500), 1 + 3 * (seed % 2)).astype(np.float32)
    values[rng.random(500) < 0.1] = np.nan
    ranked = np.sort(values[~np.isnan(values)])[::-1]
    for k in (1, 2, 100, len(ranked) - 1, len(ranked)):
        assert clip_score.kth_largest(lambda: np.array_split(values, 7), k) == ranked[k - 1]


def test_bits_cover_up_to_64_captions():
    captions = np.array([0, 64, 3], np.uint8)
    flags = np.random.default_rng(0).random(67) < 0.5
    bits = index_writer.bits_of(captions, flags)
    text = [
        "".join("1" if f else "0" for f in flags[part][::-1]) or "0" for part in (slice(0), slice(64), slice(64, 67))
    ]
    assert bits.dtype == np.uint64 and bits.tolist() == [int(t, 2) for t in text]


# --- balancing ---


def contained(text, entries):
    """The numbers of the entries in a text, by the rule as it is told."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        text = text.replace(blank, " ")
    return [number for number, entry in enumerate(entries) if f" {entry} " in f" {text} "]


def test_the_matcher_finds_every_substring():
    rng = np.random.default_rng(0)

    def text(length):
        return "".join(rng.choice(list("aab  ,.!\t\n-A"), length))

    entries = list(dict.fromkeys(filter(None, (text(n).strip() for n in rng.integers(1, 6, 60)))))
    matcher, hits = Matcher(entries), 0
    for length in rng.integers(0, 40, 300):
        found = matcher(sample := text(length))
        assert found == contained(sample, entries), sample
        hits += len(found)
    assert hits > 500
    assert Matcher(["cat", "red cat", "Cat", "St. Louis"])("A red cat, in St. Louis!") == [0, 1]
    assert Matcher(["cat", "St. Louis", ","]).never == ["St. Louis"] and Matcher(["cat"])("concatenate cats") == []


def test_captions_are_balanced_over_the_entries(command, tmp_path):
    assert command("balance", tmp_path) == 0
    captions = {(r, c): t for r, row in enumerate(pairs()._records) for c, t in enumerate(row["texts"][:64])}
    found = {key: contained(text, WORDS) for key, text in captions.items()}
    counts = np.bincount([entry for entries in found.values() for entry in entries], minlength=len(WORDS))
    probability = np.minimum(1, 4 / np.maximum(counts, 1))
    chosen = [
        (r, c) for (r, c), e in found.items() if any(examples.uniform(1, [r], [c], [i])[0] < probability[i] for i in e)
    ]
    expected = {r: [captions[r, c] for c in range(64) if (r, c) in chosen] for r in sorted({r for r, _ in chosen})}
    assert kept(tmp_path) == list(expected.items())
    rows = json.loads((tmp_path / "entry_counts.json").read_text())
    after = np.bincount([entry for key in chosen for entry in found[key]], minlength=len(WORDS))
    assert {e: (n, k) for e, n, k in rows} == {e: (counts[i], after[i]) for i, e in enumerate(WORDS)}
    report = files(tmp_path)[1]
    assert report["captions_with_entries"] == sum(map(bool, found.values())) < report["captions"] == len(found)
    assert report["tail_share"] == pytest.approx(counts[counts <= 4].sum() / counts.sum())


def test_a_frequent_entry_keeps_about_its_limit_and_a_rare_one_all():
    part = {"captions": np.ones(4050, np.uint8), "matches": np.ones(4050, np.uint32)}
    part["entries"] = np.repeat(np.array([0, 1], np.uint32), [4000, 50])
    drawn, caption = balance.drawn(part, 10, np.minimum(1, 500 / np.array([4000, 50])), 3)
    assert abs(drawn[:4000].sum() - 500) < 5 * np.sqrt(500 * 7 / 8) and drawn[4000:].all()
    assert caption.tolist() == list(range(4050))
    assert 0.4 < (drawn[:2000] == drawn[2000:4000]).mean() and (drawn[:2000] != drawn[2000:4000]).any()


def test_draws_are_uniform_and_depend_on_each_column():
    # The first number of SplitMix64 with the seed 0.
    assert int(examples.hashed(0)) == 0xE220A8397B1DCDAF
    rows = examples.uniform(5, np.arange(4000), np.zeros(4000, int))
    assert abs(rows.mean() - 0.5) < 5 / np.sqrt(12 * 4000) and len(np.unique(rows)) == 4000
    np.testing.assert_array_equal(rows[7:9], examples.uniform(5, [7, 8], [0, 0]))
    assert (examples.uniform(6, np.arange(9), np.zeros(9, int)) != rows[:9]).all()


def test_a_sample_is_the_smallest_keys_however_they_come():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 20, 100)
    best = np.argsort(keys, kind="stable")[:7]
    for size in (1, 10, 100):
        sample = examples.Smallest(7)
        for start in range(0, 100, size):
            sample.add(keys[start : start + size], np.arange(start, start + size)[:, None])
        assert sample.rows() == best[:, None].tolist()


# --- duplicates ---


def greedy(near, pixels):
    """Which picture stays for each, one after the other from the best; `near` is bool `[n, n]`."""
    stays = np.full(len(pixels), -2)
    for i in sorted(np.flatnonzero(pixels), key=lambda i: (-int(pixels[i]), i)):
        better = [j for j in np.flatnonzero(near[i]) if stays[j] == j]
        stays[i] = min(better, key=lambda j: (-int(pixels[j]), j)) if better else i
    return stays.tolist()


@pytest.mark.parametrize("distance, large", [(0, 256), (1, 4), (3, 1), (7, 4), (7, 256), (15, 1)])
def test_near_hashes_are_judged_from_the_best(distance, large, tmp_path, monkeypatch):
    for name, value in (("_CHUNK", 50), ("_LARGE", large), ("_ROWS", 7), ("_COLUMNS", 11)):
        monkeypatch.setattr(duplicates, name, value)
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 2, (12, 128), np.uint8)
    bits = centres[rng.integers(0, 12, 200)] ^ (rng.random((200, 128)) < rng.choice([0, 0.02, 0.06], (200, 1)))
    hashes, pixels = np.packbits(bits, axis=1), rng.integers(0, 6, 200).astype(np.uint32)
    stays = duplicates.start(pixels)
    duplicates.join_equal(str(tmp_path), duplicates.hash_keys(hashes), pixels, stays)
    duplicates.join_near(str(tmp_path), hashes, pixels, stays, distance)
    duplicates.settle(stays)
    expected = greedy((bits[:, None] != bits[None]).sum(-1) <= distance, pixels)
    # A picture with the hash of another one has that one's picture stay, which may not be the best of its own.
    assert [s == i for i, s in enumerate(stays)] == [s == i for i, s in enumerate(expected)]
    assert [s if s < 0 else None for s in stays] == [s if s < 0 else None for s in expected]
    gone = np.flatnonzero((stays >= 0) & (stays != np.arange(200)))
    assert ((bits[gone] != bits[stays[gone]]).sum(1) <= distance).all() and len(gone) > 10


@pytest.mark.parametrize("devices", [1, 8])
def test_similar_embeddings_are_judged_from_the_best(devices, monkeypatch):
    monkeypatch.setattr(duplicates, "_QUERIES", 16)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((9, 6))[rng.integers(0, 9, 90)] + 0.25 * rng.standard_normal((90, 6))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    pixels = rng.integers(1, 5, 90).astype(np.uint32)
    rows, stays = duplicates.best_first(pixels, np.arange(90)), duplicates.start(pixels)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
    duplicates.join_similar(z[rows], rows, stays, 0.9, mesh)
    duplicates.settle(stays)
    near = z @ z.T >= 0.9
    assert [s == i for i, s in enumerate(stays)] == [s == i for i, s in enumerate(greedy(near, pixels))]
    assert near[np.arange(90), stays].all() and (stays != np.arange(90)).sum() > 30


def test_copies_go_and_the_largest_stays(command, tmp_path):
    base = image(64, 64, 1)
    rows = [image(40, 40, 1, "JPEG"), base, b"broken", base, image(64, 64, 2), image(64, 64, 3)]
    source = MemorySource([{"image": picture, "texts": [f"<b>{i}", "two"]} for i, picture in enumerate(rows)])
    assert command("content", tmp_path / "content", source=source) == 0
    assert [number for number, _ in kept(tmp_path / "content", source)] == [0, 1, 4, 5]
    assert command("dedup", tmp_path / "hash", "--near=7", source=source) == 0
    assert kept(tmp_path / "hash", source) == [(i, [f"<b>{i}", "two"]) for i in (1, 4, 5)]
    report = files(tmp_path / "hash")[1]
    assert (report["duplicates"], report["groups"], report["largest_group"], report["unusable_records"]) == (2, 1, 3, 1)
    assert report["examples"]["Large group of 3: record 1"][1] == {
        "record": 0, "note": "goes, 1,600 pixels", "texts": ["<b>0", "two"]
    }  # fmt: skip
    page = Page((tmp_path / "hash" / "report.html").read_text())
    assert "<b>0 | two" in page.text and "stays, 4,096 pixels" in page.text and len(page.find("i", role="img")) == 6


# --- bad input ---


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("clip_score", ["--threshold=0.2"], "give either --keep=SHARE or --threshold=SCORE"),
        ("clip_score", ["--keep=1.5"], "--keep=1.5: must be more than 0 and at most 1"),
        ("clip_score", ["--checkpoint="], "5 of 5 parts of"),
        ("clip_score", ["--part=0/2"], "--part=0/2 must be one of 1/N to N/N"),
        ("clip_score", ["--out=/dev/null/x"], "--out=/dev/null/x cannot be written"),
        ("balance", ["--per-entry=0"], "--per-entry=0: must be at least 1"),
        ("balance", ["--entries=/nowhere.txt"], "--entries=/nowhere.txt cannot be read: No such file"),
        ("dedup", ["--by=pixels"], "--by: unknown 'pixels'; allowed: content, hash, embedding"),
        ("dedup", ["--near=16"], "--near=16: must be 0 to 15"),
        ("dedup", ["--similarity=0.9"], "--similarity is for --by=embedding, not --by=hash"),
        ("embedding", ["--similarity=0"], "--similarity=0: must be more than 0 and at most 1"),
        ("embedding", ["--checkpoint="], "parts of"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    name, arguments, message, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(inference, "load", lambda *_, **__: pytest.fail("loaded"))
    assert command(name, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_mixture_has_no_index(command, tmp_path, capsys):
    assert command("balance", tmp_path, source=MixtureSource([pairs(), pairs()], [1, 1])) == 2
    assert "is a mixture: make an index of each part" in capsys.readouterr().err


def test_bad_entries_are_one_line(tmp_path):
    for name, text, message in (
        ("a.json", '["a", 1]', "must be a JSON list of texts"),
        ("b.json", "[", "cannot be read"),
        ("c.txt", "\n \n", "holds no entry"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_entries(tmp_path / name)
    (tmp_path / "d.json").write_text('["cat", "a dog ", "cat", ""]')
    assert read_entries(tmp_path / "d.json") == ["cat", "a dog"]


def test_nothing_left_is_one_line(command, tmp_path, capsys):
    blank = MemorySource([{"image": encoded(i), "texts": [" "]} for i in range(3)])
    assert command("clip_score", tmp_path / "a", source=blank) == 2
    assert "no readable image with a caption among 3 records" in capsys.readouterr().err
    assert command("balance", tmp_path / "b", source=blank) == 2
    assert "all 3 records are removed" in capsys.readouterr().err
    assert command("dedup", tmp_path / "c", source=MemorySource([{"image": b"", "texts": []}])) == 2
    assert "no usable picture among 1 records" in capsys.readouterr().err
