import io
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from data_helpers import PLAIN, VIEWS, Bytes, assert_equal, concatenate, encoded, loader, records, take
from PIL import Image

from clip_jax.data import batches
from clip_jax.data.loader import Loader, iterate_once
from clip_jax.data.records import BadRecord, BaseSource
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.views import ImageView, TextView, make_example
from clip_jax.errors import UserError

# What a batch is


def test_contents():
    source = MemorySource(records(20, label=4))
    batch = next(loader(source))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((8, 8, 8, 3), np.uint8),
        "text": ((8, 16), np.int32),
        "example_id": ((8,), np.int64),
        "label": ((8,), np.int32),
    }
    for i, text, label in zip(batch["example_id"], batch["text"], batch["label"], strict=True):
        assert Bytes().decode(text) in (str(i), f"n {i}") and label == 4


def test_every_epoch_has_every_example_once_in_a_new_order():
    source = MemorySource(records(24))
    epochs = [
        np.concatenate([b["example_id"] for b in chunk]).tolist()
        for chunk in np.array_split(take(loader(source), 9), 3)
    ]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3 and epochs[0] != list(range(24))


def test_batches_run_across_epochs_of_any_length():
    ids = np.concatenate([b["example_id"] for b in take(loader(MemorySource(records(5)), batch_size=7), 10)])
    assert all(sorted(ids[i : i + 5]) == list(range(5)) for i in range(0, 70, 5))


def test_seeds_and_epochs_differ():
    source = MemorySource(records(8))
    two = {seed: take(loader(source, seed=seed), 2) for seed in (0, 1)}

    def by_id(batch):
        return batch["image"][np.argsort(batch["example_id"])]

    images = [by_id(batch) for pair in two.values() for batch in pair]
    assert len({image.tobytes() for image in images}) == 4


@pytest.mark.parametrize("length", [2**16, 2**16 + 2])  # the two ways of shuffling
def test_large_sources_are_shuffled_anew_every_epoch(length):
    class Many(MemorySource):
        def __len__(self):
            return length

        def __getitem__(self, index):
            return {"texts": [str(index)]}

    source = Many(records(1))
    iterator = loader(source, [TextView("text", 8)], batch_size=2 * length, threads=0)
    ids = next(iterator)["example_id"]
    np.testing.assert_array_equal(np.sort(ids[:length]), np.arange(length))
    np.testing.assert_array_equal(np.sort(ids[length:]), np.arange(length))
    assert (ids[:length] == ids[length:]).mean() < 0.001
    for epoch in (ids[:length], ids[length:]):
        assert abs(np.corrcoef(epoch, np.arange(length))[0, 1]) < 0.02


def test_one_record():
    batch = next(loader(MemorySource(records(1)), batch_size=4))
    assert batch["example_id"].tolist() == [0] * 4
    assert len({image.tobytes() for image in batch["image"]}) == 4  # four epochs: four crops


# The batch at step t is a function of (seed, t) alone


@pytest.fixture(scope="module")
def reference():
    source = MemorySource(records(30) + [{"image": b"broken", "texts": ["x"], "number": 0}] * 3)
    return source, take(loader(source, max_bad_share=0.5), 9)


def test_again(reference):
    source, batches = reference
    assert_equal(take(loader(source, max_bad_share=0.5), 9), batches)


@pytest.mark.parametrize(
    "arguments",
    [dict(threads=0), dict(threads=1), dict(threads=4, prefetch=6), dict(cache_bytes=0), dict(cache_bytes=100_000)],
)
def test_threads_and_cache_change_nothing(reference, arguments):
    source, batches = reference
    assert_equal(take(loader(source, max_bad_share=0.5, **arguments), 9), batches)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_global_batch(reference, hosts):
    source, batches = reference
    shares = [take(loader(source, max_bad_share=0.5, host=host, hosts=hosts), 9) for host in range(hosts)]
    assert all(len(share[0]["image"]) == 8 // hosts for share in shares)
    assert_equal(concatenate(shares), batches)


@pytest.mark.parametrize("start", [1, 4, 8])
def test_restart(reference, start):
    source, batches = reference
    restarted = loader(source, max_bad_share=0.5, start_step=start)
    assert_equal(take(restarted, 9 - start), batches[start:])
    assert restarted.step == 9


def test_restart_far_away_needs_no_replay():
    class Counting(MemorySource):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    source = Counting(records(10))
    far = loader(source, start_step=10**12, threads=0)
    batch = next(far)
    assert len(batch["image"]) == 8 and Counting.reads <= 20


def test_worker_processes_change_nothing(reference, tmp_path):
    source, batches = reference
    with_workers = loader(source, max_bad_share=0.5, workers=2)
    assert_equal(take(with_workers, 9), batches)
    skipped = Counter(with_workers.skipped)
    with_workers.close()
    without = loader(source, max_bad_share=0.5)
    take(without, 9)
    assert skipped == without.skipped and skipped["corrupt image"] > 0
    restarted = loader(source, max_bad_share=0.5, workers=2, start_step=5)
    assert_equal(take(restarted, 4), batches[5:])
    restarted.close()


def test_a_closed_loader_says_so():
    iterator = loader(MemorySource(records(4)))
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_worker_processes_report_a_source_that_goes_bad():
    source = MemorySource(records(3) + [{"image": b"", "texts": ["x"]}] * 30)
    iterator = loader(source, PLAIN, workers=1, batch_size=64, max_bad_share=0.2)
    with pytest.raises(
        UserError, match=r"memory: \d+ of \d+ records are unusable \(empty image: \d+\), more than max_bad_share=0.2"
    ):
        take(iterator, 100)
    iterator.close()


# Mixtures


def test_mixture_keeps_its_proportions_and_all_its_examples():
    small, large = MemorySource(records(6), "small"), MemorySource(records(40), "large")
    source = MixtureSource([small, large], [1, 3])
    batches = take(loader(source, batch_size=16), 10)
    ids = np.concatenate([b["example_id"] for b in batches])
    source_ids = np.concatenate([b["source_id"] for b in batches])
    np.testing.assert_array_equal(source_ids, ids >= 6)
    assert (source_ids == 1).sum() == 120 and (source_ids == 0).sum() == 40
    assert sorted(ids[source_ids == 1][:40]) == list(range(6, 46)) and sorted(ids[source_ids == 0][:6]) == list(
        range(6)
    )
    assert_equal(concatenate([take(loader(source, batch_size=16, host=h, hosts=2), 10) for h in range(2)]), batches)


def test_mixture_of_labelled_and_unlabelled():
    source = MixtureSource([MemorySource(records(6, label=2)), MemorySource(records(6))], [1, 1])
    batch = next(loader(source, batch_size=16))
    np.testing.assert_array_equal(batch["label"], np.where(batch["source_id"] == 0, 2, -1))


# Bad records


BAD = {
    "corrupt image": {"image": encoded(3)[:60]},
    "empty image": {"image": b""},
    "no image": {"image": None},
    "empty caption": {"texts": [" \n"]},
    "caption is not UTF-8": {"texts": [b"\xff\xfe".decode("utf-8", "surrogateescape")]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_records_are_replaced_and_counted(reason):
    rows = records(20)
    for i in (3, 4, 5, 17):
        rows[i] = rows[i] | BAD[reason]
    iterator = loader(MemorySource(rows), PLAIN, batch_size=20, max_bad_share=0.3)
    batches = take(iterator, 3)
    for batch in batches:
        assert len(batch["example_id"]) == 20 and not set(batch["example_id"].tolist()) & {3, 4, 5, 17}
        assert set(range(20)) - {3, 4, 5, 17} == set(batch["example_id"].tolist())
    assert set(iterator.skipped) == {reason} and iterator.skipped[reason] >= 12
    assert_equal(take(loader(MemorySource(rows), PLAIN, batch_size=20, max_bad_share=0.3), 3), batches)
    assert_equal(
        take(loader(MemorySource(rows), PLAIN, batch_size=20, max_bad_share=0.3, start_step=1), 2), batches[1:]
    )


def test_a_missing_caption_list_is_an_empty_caption():
    rows = records(4)
    del rows[1]["texts"]
    iterator = loader(MemorySource(rows), PLAIN, batch_size=4, max_bad_share=0.5)
    assert 1 not in next(iterator)["example_id"] and iterator.skipped["empty caption"] >= 1


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_too_many_bad_records_stop_the_run(share):
    rows = records(100)
    for i in range(0, 100, 3):
        rows[i]["image"] = b""
    iterator = loader(MemorySource(rows), PLAIN, batch_size=32, max_bad_share=share)
    with pytest.raises(UserError, match=f"more than max_bad_share={share:g}"):
        take(iterator, 60)
    assert iterator.step < 60


def test_few_bad_records_do_not():
    rows = records(100)
    for i in range(0, 100, 25):
        rows[i]["image"] = b""
    iterator = loader(MemorySource(rows), PLAIN, batch_size=32, max_bad_share=0.1)
    assert len(take(iterator, 60)) == 60 and 60 <= iterator.skipped["empty image"] <= 140


def test_the_share_is_not_judged_on_a_few_records():
    rows = records(40)
    rows[0]["image"] = b""
    assert len(take(loader(MemorySource(rows), PLAIN, batch_size=40, max_bad_share=0.03), 6)) == 6


@pytest.mark.parametrize(
    "rows", [[{"image": b"", "texts": ["x"], "extra": 1}] * 5, [{"image": encoded(0), "texts": [], "extra": 1}] * 400]
)
def test_no_usable_record(rows):
    with pytest.raises(UserError, match="memory: no usable record among .* tried .*; fields: extra, image, texts"):
        loader(MemorySource(rows), PLAIN)
    with pytest.raises(UserError, match="memory: no usable record"):
        iterate_once(MemorySource(rows), PLAIN, Bytes(), 4)


def test_a_single_usable_record_is_found():
    rows = [{"image": b"", "texts": ["x"]}] * 99 + records(1)
    assert next(loader(MemorySource(rows), PLAIN, max_bad_share=1.0))["example_id"].tolist() == [99] * 8


def test_what_was_broken_while_indexing_is_reported_from_the_start():
    source = MemorySource(records(4))
    source.broken["truncated shard"] = 2
    assert loader(source).skipped == {"truncated shard": 2}


def test_records_that_cannot_be_read():
    class Half(BaseSource):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index % 2:
                raise BadRecord("missing file")
            return {"image": encoded(index), "texts": ["x"]}

    iterator = loader(Half("half"), PLAIN, max_bad_share=0.9)
    assert (
        all((batch["example_id"] % 2 == 0).all() for batch in take(iterator, 5))
        and iterator.skipped["missing file"] > 5
    )


# Views


def example(record, *views, rng=None):
    return make_example(record, 0, views, Bytes(), rng)


def caption(view, record, rng=None):
    return view.caption(record, rng)


def test_captions_without_templates():
    view, record = TextView(), {"texts": ["", "one", "  ", "two", "three"]}
    assert caption(view, record) == "one"
    assert {caption(view, record, np.random.default_rng(seed)) for seed in range(40)} == {"one", "two", "three"}


def test_templates():
    view = TextView(templates=("{name}", "{name}: {tags}", "<{keywords}>"))
    record = {"name": "cat", "tags": ["a", "b", "c"], "keywords": []}
    assert caption(view, record) == "cat"
    texts = {caption(view, record, np.random.default_rng(seed)) for seed in range(400)}
    assert {"cat", "cat: a", "cat: b", "cat: c", "cat: a, b, c", "cat: c, a"} <= texts and not any(
        "<" in text for text in texts
    )
    assert len(texts) == 1 + 3 + 6 + 6  # every ordered subset
    assert caption(TextView(templates=("{tags} {number} {{x}}",)), {"tags": ("a", "b"), "number": 3}) == "a, b 3 {x}"
    for empty in ({}, {"keywords": ["", " "]}, {"keywords": None}):
        with pytest.raises(BadRecord, match="empty caption"):
            caption(TextView(templates=("{keywords}",)), empty)


def test_word_dropout_leaves_words_out_in_training_only():
    view, text, tokenizer = TextView(context=64, word_dropout=0.5), "one two three four five six seven eight", Bytes()

    def caption(text, seed=None):
        return tokenizer.decode(
            view({"texts": [text]}, None if seed is None else np.random.default_rng(seed), tokenizer)
        )

    words = [caption(text, seed).split() for seed in range(200)]
    assert all(w and set(w) <= set(text.split()) for w in words)
    assert 3.5 < np.mean([len(w) for w in words]) < 5.5
    assert caption(text) == text
    assert {caption("one", seed) for seed in range(9)} == {"one"}


@pytest.mark.parametrize("text", ["plain", "", "{", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>10}", "{0}}"])
def test_template_mistakes(text):
    with pytest.raises(UserError, match="template"):
        TextView(templates=(text,))


def test_a_template_field_that_no_record_has():
    with pytest.raises(
        UserError, match="no record has the field 'nmuber' of a template \\(did you mean 'number'\\?\\); fields: im"
    ):
        loader(MemorySource(records(4)), (TextView(templates=("{number}", "{nmuber}")),))
    rows = records(4)
    rows[3]["rare"] = "x"
    assert next(loader(MemorySource(rows), (TextView(templates=("{number}", "{rare}")),)))


def test_over_long_captions_end_with_eot():
    text = example({"texts": ["x" * 1000]}, TextView(context=10))["text"]
    assert text.shape == (10,) and text[-1] == 1 and (text[:-1] == ord("x") + 2).all()


def test_non_utf8_captions_give_way_to_good_ones():
    bad = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert caption(TextView(), {"texts": [bad, "good"]}) == "good"
    assert caption(TextView(), {"texts": ["문어 🐙"]}) == "문어 🐙"
    with pytest.raises(BadRecord, match="not UTF-8"):
        caption(TextView(), {"texts": [bad]})


def test_several_image_views_are_independent():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    views = ImageView("a", 16, ("rrc",)), ImageView("b", 16, ("rrc",)), ImageView("clean", 16)
    made = example({"image": noise, "texts": []}, *views, rng=np.random.default_rng(0))
    assert (made["a"] != made["b"]).any()
    np.testing.assert_array_equal(made["clean"], example({"image": noise}, ImageView("clean", 16))["clean"])


def test_large_jpeg_trains_and_a_truncated_one_is_bad():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)).save(buffer, "JPEG")
    view = ImageView("image", 32, ("rrc",))
    assert example({"image": buffer.getvalue()}, view, rng=np.random.default_rng(0))["image"].shape == (32, 32, 3)
    with pytest.raises(BadRecord, match="corrupt image"):
        example({"image": buffer.getvalue()[:5000]}, view, rng=np.random.default_rng(0))


def test_views_fail_early_and_can_be_pickled():
    with pytest.raises(UserError, match="unknown operation"):
        ImageView(augment=("rcc",))
    for view in VIEWS:
        assert pickle.loads(pickle.dumps(view)) == view
    assert ImageView(augment=["rrc", "flip"]).augment == ("rrc", "flip") and hash(ImageView())


# Evaluation


def test_one_pass_in_order():
    source = MemorySource(records(21, label=1))
    batches = list(iterate_once(source, PLAIN, Bytes(), 8))
    assert [len(batch["mask"]) for batch in batches] == [8, 8, 8] and batches[0]["mask"].dtype == bool
    ids = np.concatenate([batch["example_id"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert ids.tolist() == [*range(21), -1, -1, -1] and mask.tolist() == [True] * 21 + [False] * 3
    assert (
        not batches[2]["image"][5:].any()
        and batches[2]["image"][:5].any()
        and batches[2]["label"].tolist() == [1] * 5 + [0] * 3
    )
    assert Bytes().decode(batches[1]["text"][2]) == "caption 10"
    shares = [list(iterate_once(source, PLAIN, Bytes(), 8, host=host, hosts=4)) for host in range(4)]
    assert_equal(concatenate(shares), batches)
    assert_equal(list(iterate_once(source, PLAIN, Bytes(), 8, threads=0)), batches)


def test_one_pass_masks_bad_records():
    rows, skipped = records(10), Counter()
    rows[4]["image"], rows[7]["texts"] = b"x", [""]
    batches = iterate_once(MemorySource(rows), PLAIN, Bytes(), 4, skipped=skipped)
    ids = np.concatenate([batch["example_id"][batch["mask"]] for batch in batches])
    assert ids.tolist() == [0, 1, 2, 3, 5, 6, 8, 9] and skipped == {"corrupt image": 1, "empty caption": 1}


def test_one_pass_refuses_random_views():
    with pytest.raises(UserError, match="view 'image': augment .* is random"):
        iterate_once(MemorySource(records(3)), VIEWS, Bytes(), 4)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=8, hosts=3), "batch_size=8 must be a positive multiple of the number of hosts, 3"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(host=2, hosts=2), "host=2 is not in 0..1"),
        (dict(seed=-1), "seed=-1"),
        (dict(start_step=-1), "start_step=-1"),
        (dict(prefetch=0), "prefetch=0"),
        (dict(max_bad_share=2), "max_bad_share"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        loader(MemorySource(records(4)), **arguments)


@pytest.mark.parametrize("names", [("a", "a"), ("label", "text"), ("image", "mask")])
def test_wrong_view_names(names):
    with pytest.raises(UserError, match="names"):
        loader(MemorySource(records(4)), [ImageView(name, 8) for name in names])


def test_the_embedded_set_with_its_tokenizer():
    from clip_jax.data.tokenizers import make_tokenizer

    views = (
        ImageView("image", 32, ("rrc(0.9, 1.0)", "flip")),
        TextView("text", 16, ("{name}", "{name}: {tags}", "{keywords}")),
    )
    iterator = Loader(make_source("emoji"), views, make_tokenizer("sentencepiece"), batch_size=64, seed=0)
    batch = next(iterator)
    assert batch["image"].shape == (64, 32, 32, 3) and batch["image"].std() > 30 and batch["text"].shape == (64, 16)
    assert not iterator.skipped


def test_worker_processes_end_with_a_parent_that_is_killed(monkeypatch):
    script = (
        "import multiprocessing, os, time; from clip_jax.data.threads import end_with_parent\n"
        "context = multiprocessing.get_context('fork')\n"
        "child = context.Process(target=lambda: (end_with_parent(), os.close(0), time.sleep(60)))\n"
        "child.start(); os.kill(os.getpid(), 9)"
    )
    # The pipe ends with the last process that holds it.
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=30).returncode == -9
    started = []
    monkeypatch.setattr(batches, "end_with_parent", lambda: started.append(1))
    pickle.loads(pickle.dumps(batches.EvaluationBatches(MemorySource(records(2)), VIEWS, Bytes(), 0, 1, 0, 1)))
    assert started
