import json
import zlib

import numpy as np
import pytest
from helpers import render
from PIL import Image

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError
from clip_jax.evaluation import outcomes
from clip_jax.evaluation.emoji import emoji_task
from clip_jax.evaluation.knn import knn_task
from clip_jax.evaluation.linear_probe import LAMBDAS
from clip_jax.evaluation.probe import probe_task
from clip_jax.evaluation.relations import relations_task
from clip_jax.evaluation.report.page import Page
from clip_jax.evaluation.results import EvalResult, Images, merge_results
from clip_jax.evaluation.retrieval import retrieval_task
from clip_jax.evaluation.tasks import parse_task
from clip_jax.evaluation.zeroshot import zeroshot_task

SIZE = 8


def make_image(key, noise=0):
    """Returns an image of uint8 noise that depends on `key` alone."""
    rng = np.random.default_rng(zlib.crc32(str(key).encode()))
    return np.clip(rng.integers(0, 256, (SIZE, SIZE, 3)) + noise, 0, 255).astype(np.uint8)


class OracleModel:
    """Embeds an image and its text as the same random unit vector. All others get vectors of their own."""

    image_view = ImageView(size=SIZE)

    def __init__(self, text_of_image=()):
        self.text_of_image = {image.tobytes(): text for image, text in text_of_image}
        self.image_calls, self.text_calls = [], []

    def _vector(self, key):
        z = np.random.default_rng(zlib.crc32(key)).normal(size=16)
        return (z / np.linalg.norm(z)).astype(np.float32)

    def embed_image(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
        self.image_calls.append(len(images))
        keys = (self.text_of_image.get(image.tobytes()) for image in images)
        return np.stack(
            [
                self._vector(image.tobytes() if key is None else key.encode())
                for key, image in zip(keys, images, strict=True)
            ]
        )

    def embed_text(self, texts):
        self.text_calls.append(list(texts))
        return np.stack([self._vector(text.encode()) for text in texts])

    def similarity(self, z_image, z_text):
        return z_image @ z_text.T


class Flaky(MemorySource):
    """A source with unreadable records."""

    def __init__(self, records, bad):
        super().__init__(records, "flaky")
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord("corrupt image")
        return super().__getitem__(index)


# --- zero-shot classification ---

NAMES = ["cat", "dog", "hot_dog", "bird", "fish", "frog", "goat"]


def labelled(n=21, wrong=()):
    """Records with labels i % 7, and an oracle for them that names the images in `wrong` "cat"."""
    records = [{"image": make_image(i), "label": i % 7} for i in range(n)]
    known = [(r["image"], "cat" if i in wrong else NAMES[r["label"]].replace("_", " ")) for i, r in enumerate(records)]
    return records, OracleModel(known)


def check_outcomes(result, count):
    """Checks that as many metrics have outcomes, whose mean each of them is."""
    assert len(result.outcomes) == count
    for name, found in result.outcomes.items():
        assert found.values.mean() == pytest.approx(result.metrics[name]), name
        assert len(found.values) == len(found.groups)


def test_things_are_shared_by_their_names_alone(tmp_path):
    """Tasks that are pooled have the same things where they name them, and others where they count them."""
    result = EvalResult({})
    result.keep("a/top1", [1, 0, 1], ["cat", "dog", "cat"])
    result.keep("b/top1", [1], ["dog"])
    result.keep("a/R@1", [1, 0])
    result.keep("a/R@5", [1, 0], np.arange(2, dtype=np.int32))
    result.keep("b/R@1", [1, 0])
    a, b, one, five, other = (found.groups.tolist() for found in result.outcomes.values())
    assert a[0] == a[2] != a[1] == b[0] and one == five and len({*a, *one, *other}) == 2 + 2 + 2

    outcomes.write(tmp_path / "x.npz", 3, result.outcomes)
    assert outcomes.read(tmp_path / "x.npz", 3)["a/top1"].groups.tolist() == a
    data = (tmp_path / "x.npz").read_bytes()
    for i in range(len(data)):  # one damaged byte: the outcomes, or {}
        (tmp_path / "x.npz").write_bytes(data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :])
        outcomes.read(tmp_path / "x.npz", 3)


def test_pictures_of_one_concept_are_one_thing():
    records, model = labelled()
    named = [record | {"concept": str(i % 2)} for i, record in enumerate(records)]
    for task in (
        lambda source, name: zeroshot_task(model, source, name=name),
        lambda source, name: knn_task(model, MemorySource(records, class_names=NAMES), source, name=name),
    ):
        for given, things in ((named, 2), (records, 21), (named[:20] + records[20:], 21)):
            result = task(MemorySource(given, class_names=NAMES), "x")
            assert {len(set(found.groups)) for found in result.outcomes.values()} == {things}


def test_zeroshot_task():
    records, model = labelled(wrong=(1, 2, 8))  # two of three dogs, one of three hot dogs
    result = zeroshot_task(model, MemorySource(records, class_names=NAMES), name="pets", batch_size=8)
    m = result.metrics
    assert m["pets/top1"] == pytest.approx(18 / 21)
    assert m["pets/mean_per_class"] == pytest.approx((5 + 1 / 3 + 2 / 3) / 7)
    assert (m["pets/chance_top1"], m["pets/chance_top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
    assert (m["pets/images"], m["pets/classes"], m["pets/skipped"]) == (21, 7, 0)
    assert all(type(value) is float for value in m.values())
    assert model.image_calls == [8, 8, 5]
    check_outcomes(result, 2)

    table = result.artefacts["classification"]["pets"]
    assert table.class_names[2] == "hot dog"
    assert table.top.shape == table.scores.shape == (21, 5)
    assert table.top[1, 0] == 0 and table.labels[1] == 1
    assert (table.images[4]["image"] == records[4]["image"]).all()
    matrix = result.artefacts["similarity"]["pets"]
    assert matrix.values.shape == (7, 7) and matrix.values.argmax(1).tolist()[3:] == [3, 4, 5, 6]
    assert [p["label"] for p in matrix.images] == list(range(7)) and matrix.texts == table.class_names
    points = result.artefacts["map"]["pets"]
    assert points.z_image.shape == (21, 16) and points.z_text.shape == (7, 16)
    assert [points.texts[i] for i in points.text_of_image] == [NAMES[i % 7].replace("_", " ") for i in range(21)]


def several_labels(n=40, classes=9):
    """Records with up to four of the classes "class 0", ..., and what a model of random vectors should score."""
    rng = np.random.default_rng(1)
    sets = [rng.choice(classes, rng.integers(1, 5), replace=False).tolist() for _ in range(n)]
    records = [{"image": make_image(i), "label": labels} for i, labels in enumerate(sets)]
    names = [f"class {i}" for i in range(classes)]
    z = OracleModel().embed_image(np.stack([record["image"] for record in records])).astype(np.float64)
    order = np.argsort(-z @ OracleModel().embed_text(names).T.astype(np.float64), axis=1)
    return records, names, sets, order


def test_flat_hits_of_images_with_several_labels():
    """F@K counts an image when one of its labels is among the K best classes; each figure against NumPy's ranking."""
    records, names, sets, order = several_labels()
    source = MemorySource(records, class_names=names)
    result = zeroshot_task(OracleModel(), source, name="oi", flat_hit=(1, 2, 7, 20))
    m = result.metrics
    for k in (1, 2, 7):
        hits = [bool(set(row[:k]) & set(labels)) for row, labels in zip(order.tolist(), sets, strict=True)]
        assert 0 < m[f"oi/F@{k}"] == pytest.approx(np.mean(hits))
    assert m["oi/F@20"] == m["oi/chance_F@20"] == 1  # there are 9 classes
    assert m["oi/chance_F@1"] == pytest.approx(np.mean([len(labels) / 9 for labels in sets]))
    task = parse_task("zeroshot('x', name='oi', flat_hit=(1, 2, 7, 20))")
    assert sorted(task.metric_names()) == sorted(m) and "oi/top1" not in m
    gallery = result.artefacts["classification"]["oi"].draw(Page())
    right = sum(bool({row[0]} & set(labels)) for row, labels in zip(order.tolist(), sets, strict=True))
    assert f"Right: {right} of 40 images" in gallery and f"<b>{', '.join(f'class {i}' for i in sets[0])}</b>" in gallery
    page = render(result)
    assert "F@20" in page.text and "chance F@7" in page.text and "top-5" not in page.text.split("F@K:")[0]


def test_flat_hits_of_images_with_one_label_are_top_k_accuracies():
    records, names, sets, _ = several_labels()
    records = [record | {"label": labels[0]} for record, labels in zip(records, sets, strict=True)]
    source = MemorySource(records, class_names=names)
    plain = zeroshot_task(OracleModel(), source).metrics
    flat = zeroshot_task(OracleModel(), source, flat_hit=[1, 5]).metrics
    assert (flat["zeroshot/F@1"], flat["zeroshot/F@5"]) == (plain["zeroshot/top1"], plain["zeroshot/top5"])
    assert flat["zeroshot/chance_F@5"] == plain["zeroshot/chance_top5"]


class Unsaid:
    """The records of a source, without its `multi_label`: as a user may write a source."""

    name, broken = "unsaid", {}

    def __init__(self, source):
        self.class_names, self._source = source.class_names, source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def test_several_labels_are_refused_where_one_is_needed(tmp_path):
    """Before anything is embedded, and by the check before training."""
    records, names, _, _ = several_labels()
    source, model = MemorySource(records, "many", class_names=names), OracleModel()
    with pytest.raises(UserError, match="zeroshot: many has several labels of one image.*set flat_hit=.1, 5, 10."):
        zeroshot_task(model, source)
    one = MemorySource([record | {"label": 0} for record in records], "one", class_names=names)
    for train, test in ((source, one), (one, source)):
        with pytest.raises(UserError, match="many has several labels of one image, but probe needs one label"):
            probe_task(model, train, test)
    assert not model.image_calls
    with pytest.raises(UserError, match="unsaid has several labels of one image, but zeroshot needs one label"):
        zeroshot_task(model, Unsaid(source))
    Image.fromarray(make_image(0)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "labels": ["cat", "dog"]}, {"image": "a.png", "labels": "dog"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "t.jsonl"
    for task in (
        f"probe('{path}', '{path}', test_split='train', label='labels')",
        f"zeroshot('{path}', label='labels')",
    ):
        with pytest.raises(UserError, match="t.jsonl has several labels of one image, but"):
            parse_task(task).open_sources()
    for option, message in (("templates='{no}'", "templates="), ("duplicates='first'", "duplicates='first'; allowed")):
        with pytest.raises(UserError, match=message):
            parse_task(f"zeroshot('{path}', {option})").check_sources()
    task = parse_task(f"zeroshot('{path}', label='labels', flat_hit=1)")
    task.open_sources()
    assert task(model).metrics["zeroshot/F@1"] in (0.5, 1.0)  # one of two classes is best, and one image has both
    for value in (0, (1, 0), True, 1.5, "1"):
        with pytest.raises(UserError, match="flat_hit=.*; allowed: integers from 1 on"):
            parse_task(f"zeroshot('{path}', flat_hit={value!r})").metric_names()


def test_labels_of_one_class_under_two_names_are_merged():
    records, _, sets, _ = several_labels(classes=6)
    names = ["a", "b", "c", "a", "b", "d"]
    source = MemorySource(records, class_names=[f"{i}" for i in range(6)])
    m = zeroshot_task(
        OracleModel(), source, dict(zip("012345", names, strict=True)), name="z", duplicates="merge", flat_hit=3
    ).metrics
    single = np.mean([len({names[i] for i in labels}) == 1 for labels in sets])
    assert m["z/classes"] == 4 and 0 < single < 1
    assert m["z/chance_F@3"] == pytest.approx(1 - single / 4)


def test_zeroshot_task_with_templates_duplicates_and_a_limit():
    records, _ = labelled()
    model = OracleModel(
        [(r["image"], "a cat" if r["label"] in (0, 3) else "a dog") for r in records if r["label"] in (0, 1, 3)]
    )
    source = MemorySource(records)
    names = ["cat", "dog", "x", "cat", "y", "z", "w"]
    with pytest.raises(UserError, match="'cat'"):
        zeroshot_task(model, source, names)
    merged = zeroshot_task(model, source, names, ["a {}"], duplicates="merge")
    assert merged.metrics["zeroshot/classes"] == 6
    table = merged.artefacts["classification"]["zeroshot"]
    assert (table.top[table.labels == 0, 0] == 0).all() and (table.labels == 0).sum() == 6
    assert model.text_calls[0] == ["a cat", "a dog", "a x", "a y", "a z", "a w"]
    limited = zeroshot_task(model, source, names, ["a {}"], duplicates="keep", limit=7)
    assert limited.metrics["zeroshot/images"] == 7
    assert [int(i) for _, i in limited.artefacts["classification"]["zeroshot"].images.where] == [
        0,
        3,
        6,
        9,
        12,
        15,
        18,
    ]


def test_unusable_records_are_skipped_and_counted():
    records, model = labelled()
    records[3] = {"image": b"no image", "label": 3}
    result = zeroshot_task(model, Flaky(records, bad={0, 20}), NAMES, batch_size=4)
    assert (result.metrics["zeroshot/images"], result.metrics["zeroshot/skipped"]) == (18, 3)
    images = result.artefacts["classification"]["zeroshot"].images
    assert [p["label"] for p in images][:4] == [1, 2, 4, 5]
    source = MemorySource(records)
    source.broken.update({"HEIC image": 2, "truncated shard": 1})  # what indexing has left out
    assert zeroshot_task(model, source, NAMES).metrics["zeroshot/skipped"] == 4


def test_zeroshot_task_refuses():
    records, model = labelled()
    with pytest.raises(UserError, match="does not name its classes"):
        zeroshot_task(model, MemorySource(records))
    with pytest.raises(UserError, match=r"labels 0\.\.6, but there are names for 0\.\.1"):
        zeroshot_task(model, MemorySource(records), ["cat", "dog"])
    for unlabelled in ({"image": make_image(0)}, {"image": make_image(0), "label": -1}):
        with pytest.raises(UserError, match="without a label: 1 of 2"):
            zeroshot_task(model, MemorySource([unlabelled, records[1]]), ["cat", "dog"])
    with pytest.raises(UserError, match="no usable image among 2 records"):
        zeroshot_task(model, Flaky(records[:2], bad={0, 1}), NAMES)


# --- retrieval and probe ---


def test_retrieval_task():
    records = [{"image": make_image(i), "texts": [f"first {i}", " ", f"second {i}"]} for i in range(30)]
    records[7]["texts"] = []
    model = OracleModel([(r["image"], r["texts"][-1]) for r in records if r["texts"]])
    result = retrieval_task(model, MemorySource(records), name="coco", batch_size=16)
    m = result.metrics
    assert (m["coco/images"], m["coco/texts"], m["coco/skipped"]) == (30, 58, 0)
    assert m["coco/image_to_text_R@1"] == 1.0  # any caption of the image counts
    check_outcomes(result, 6)
    assert len(set(result.outcomes["coco/text_to_image_R@1"].groups)) == 29  # the captions of an image are one thing
    assert 0.5 <= m["coco/text_to_image_R@1"] < 0.7  # every second caption is known, the others are random
    found = result.artefacts["retrieval"]["coco"]
    assert found.image_to_text.shape == (30, 10) and found.text_to_image.shape == (58, 10)
    assert all(found.texts[found.image_to_text[i, 0]] == f"second {i}" for i in range(30) if i != 7)
    matrix = result.artefacts["similarity"]["coco"]
    assert matrix.texts == [f"first {i}" for i in range(30) if i != 7]
    assert matrix.images[7]["texts"][0] == "first 8"
    with pytest.raises(UserError, match="no captions"):
        retrieval_task(model, MemorySource([{"image": make_image(0)}]))


def test_images_whose_captions_are_unusable_are_counted():
    texts = ["one", {"en": "two"}, "caf\udce9", ["three", None, True, "caf\udce9"], None, "six"]
    records = [{"image": make_image(i), "texts": text} for i, text in enumerate(texts)]
    model = OracleModel([(records[0]["image"], "one"), (records[3]["image"], "three"), (records[5]["image"], "six")])
    m = retrieval_task(model, MemorySource(records), name="r").metrics
    assert (m["r/images"], m["r/texts"], m["r/skipped"]) == (4, 3, 2)
    assert m["r/image_to_text_R@1"] == m["r/text_to_image_R@1"] == 1.0
    assert model.text_calls == [["one", "three", "six"]]
    for record, wrong in zip(records, ["1", "2", "3", {"a": "4"}, "5", [None, "6"]], strict=True):
        record["wrong_objects"] = wrong
    model.text_calls.clear()
    m = relations_task(model, MemorySource(records), name="r").metrics
    assert (m["r/images"], m["r/skipped"]) == (2, 4)
    assert model.text_calls[:2] == [["one", "six"], ["1", "6"]]


def test_probe_task():
    rng = np.random.default_rng(0)

    def source(n):
        labels = rng.integers(0, 3, n)
        return MemorySource(
            [
                {
                    "image": np.clip(make_image(f"class{y}") + rng.integers(-9, 9, (SIZE, SIZE, 3)), 0, 255).astype(
                        np.uint8
                    ),
                    "label": int(y),
                }
                for y in labels
            ]
        )

    class PixelModel(OracleModel):
        def image_features(self, images):
            return images.reshape(len(images), -1).astype(np.float32) / 255

        def embed_image(self, images):
            return np.random.default_rng(0).normal(size=(len(images), 3 * SIZE**2))

    result = probe_task(PixelModel(), source(60), source(30), val=source(30), name="p")
    assert result.metrics["p/accuracy"] == result.metrics["p/val_accuracy"] == 1.0
    assert result.metrics["p/l2"] in LAMBDAS
    assert probe_task(PixelModel(), source(90), source(30), features="embedding").metrics["probe/accuracy"] < 0.8
    with pytest.raises(UserError, match="p: features='image': allowed are before_projection, embedding"):
        probe_task(PixelModel(), source(60), source(30), features="image", name="p")
    with pytest.raises(UserError, match="the model has no image_features; features='embedding' needs none"):
        probe_task(OracleModel(), source(60), source(30))
    assert (result.metrics["p/images"], result.metrics["p/classes"]) == (30, 3)
    random = MemorySource([{"image": make_image(f"r{i}"), "label": i % 3} for i in range(90)])
    assert probe_task(PixelModel(), random, source(30)).metrics["probe/accuracy"] < 0.9


def test_merge_results():
    a, b = EvalResult({"x": 1.0, "y": 2.0}).credit("task_a"), EvalResult({"y": 3.0}).credit("task_b")
    a.artefacts["map"]["one"], b.artefacts["map"]["two"] = 1, 2
    merged = merge_results([a, b])
    assert merged.metrics == {"x": 1.0, "y": 3.0} and merged.tasks == {"x": "task_a", "y": "task_b"}
    assert merged.artefacts["map"] == {"one": 1, "two": 2}
    assert a.artefacts["map"] == {"one": 1}


def test_images_are_read_from_several_sources():
    sources = [MemorySource([{"image": make_image(i), "name": f"{s}{i}"} for i in range(3)]) for s in "ab"]
    images = Images(sources, np.array([[1, 2], [0, 0], [1, 0]]))
    assert [p["name"] for p in images] == ["b2", "a0", "b0"]
    assert images.select(np.array([True, False, True]))[1]["name"] == "b0"
    assert [p["name"] for p in images[1:]] == ["a0", "b0"]


# --- the emoji protocol ---

SEEN = (
    "red apple,tiger,flag: Chile,one o’clock,eleven-thirty,keycap: 3,woman pilot,pilot,family: man & boy,watch".split(
        ","
    )
)
UNSEEN = {
    "val": ["octopus", "flag: Peru", "man judge", "mug", "same name"],
    "test": ["tree", "two o’clock", "family", "men wrestling", "same name"],
}
KIND = {
    ("flags", "country-flag"): ("flag",),
    ("travel-places", "time"): ("one", "two", "eleven", "watch"),
    ("symbols", "keycap"): ("keycap",),
    ("people-body", "person-role"): ("woman", "man", "men", "pilot"),
    ("people-body", "person-symbol"): ("family",),
}


def emoji_record(name, vendor, key=None, noise=0):
    first = name.replace("-", " ").split()[0].strip(":")
    group, subgroup = next(
        (kind for kind, words in KIND.items() if first in words), ("animals-nature", "animal-marine")
    )
    return {
        "image": make_image(key or (name, vendor), noise),
        "name": name,
        "texts": [name],
        "vendor": vendor,
        "group": group,
        "subgroup": subgroup,
        "concept": name.upper(),
    }


def emoji_splits():
    """Noto and Twemoji differ by one grey level; EmojiOne draws all seen concepts but the last two like Noto."""
    splits = {"train": [emoji_record(n, v, n, noise) for n in SEEN for v, noise in (("noto", 0), ("twemoji", 1))]}
    splits["train_unseen_vendor"] = [emoji_record(n, "emojione", n if n in SEEN[:-2] else None, 2) for n in SEEN]
    for part, names in UNSEEN.items():
        splits[f"{part}_seen_vendor"] = [emoji_record(n, v) for n in names for v in ("noto", "twemoji")]
        splits[f"{part}_unseen_vendor"] = [emoji_record(n, "emojione") for n in names]
    return splits


def emoji_oracle(splits, fails=()):
    """Names every image correctly, except for those in `fails`, which it names "octopus"."""
    records = [r for split in splits.values() for r in split]
    return OracleModel([(r["image"], "octopus" if (r["name"], r["vendor"]) in fails else r["name"]) for r in records])


def run_emoji(model, splits, *args, **kwargs):
    opened = []

    def open_split(name):
        opened.append(name)
        return MemorySource(splits[name], name)

    return emoji_task(model, *args, open_split=open_split, **kwargs), opened


def test_emoji_task_counts_classes_and_kinds():
    splits = emoji_splits()
    model = emoji_oracle(splits)
    m = run_emoji(model, splits)[0].metrics
    for cell, classes, images, no_signs, no_compositions in [
        ("unseen_concept_seen_vendor", 9, 20, 16, 10),  # "same name" is one class
        ("unseen_concept_unseen_vendor", 9, 10, 8, 5),
        ("seen_concept_seen_vendor", 10, 20, 12, 8),
        ("seen_concept_unseen_vendor", 10, 10, 6, 4),
    ]:
        assert m[f"emoji/{cell}/top1"] == m[f"emoji/{cell}/top5"] == m[f"emoji/{cell}/top1_without_compositions"] == 1.0
        assert m[f"emoji/{cell}/classes"] == classes
        assert m[f"emoji/{cell}/images"] == images
        assert m[f"emoji/{cell}/images_without_flags_clocks_keycaps"] == no_signs
        assert m[f"emoji/{cell}/images_without_compositions"] == no_compositions
        assert m[f"emoji/{cell}/chance_top1"] == pytest.approx(1 / classes)
        assert m[f"emoji/{cell}/chance_top5"] == pytest.approx(5 / classes)
    assert m["emoji/skipped"] == 0
    assert sum(model.image_calls) == 60  # every image once
    assert all(type(value) is float for value in m.values())


def test_emoji_task_excludes_images_but_no_classes():
    splits = emoji_splits()
    fails = {("flag: Peru", "emojione"), ("man judge", "emojione")}
    result = run_emoji(emoji_oracle(splits, fails), splits)[0]
    m, cell = result.metrics, "emoji/unseen_concept_unseen_vendor"
    check_outcomes(result, 4 * 2 * 3)
    both = [result.outcomes[f"emoji/unseen_concept_{vendor}_vendor/top1"].groups for vendor in ("seen", "unseen")]
    assert sorted(both[0]) == sorted([*both[1]] * 2)  # two vendors and one drew the same concepts
    assert m[f"{cell}/top1"] == pytest.approx(0.8)
    assert m[f"{cell}/top1_without_flags_clocks_keycaps"] == pytest.approx(7 / 8)
    assert m[f"{cell}/top1_without_compositions"] == 1.0
    assert m[f"{cell}/image_to_text_R@1"] == pytest.approx(0.8)
    assert m["emoji/unseen_concept_seen_vendor/top1"] == 1.0


def test_emoji_task_pixel_baseline():
    m = run_emoji(emoji_oracle(emoji_splits()), emoji_splits())[0].metrics
    assert m["emoji/seen_concept_seen_vendor/pixel_1nn_top1"] == 1.0  # found in the other vendor's image, not in itself
    assert m["emoji/seen_concept_unseen_vendor/pixel_1nn_top1"] == pytest.approx(0.8)
    assert not any("pixel" in key for key in m if "unseen_concept" in key)
    alone = emoji_splits()
    alone["train"] = [r for r in alone["train"] if r["vendor"] == "noto"]
    assert run_emoji(emoji_oracle(alone), alone)[0].metrics["emoji/seen_concept_seen_vendor/pixel_1nn_top1"] == 0.0


@pytest.mark.parametrize("subset", ["val", "test"])
def test_emoji_task_on_a_subset_reads_nothing_else(subset):
    splits = emoji_splits()
    result, opened = run_emoji(emoji_oracle(splits), splits, subset)
    assert set(opened) == {f"{subset}_seen_vendor", f"{subset}_unseen_vendor"}
    cell = f"emoji_{subset}/unseen_concept_unseen_vendor"
    assert result.metrics[f"{cell}/classes"] == 5 and result.metrics[f"{cell}/top1"] == 1.0
    assert not any("/seen_concept" in key for key in result.metrics)


def test_emoji_task_samples_the_training_images():
    splits = emoji_splits()
    model = emoji_oracle(splits)
    result, _ = run_emoji(model, splits, seen_images=7)
    assert result.metrics["emoji/seen_concept_seen_vendor/images"] == 7
    assert result.metrics["emoji/seen_concept_seen_vendor/classes"] == 10
    assert sum(model.image_calls) == 47


def test_emoji_task_artefacts():
    splits = emoji_splits()
    result, _ = run_emoji(emoji_oracle(splits), splits)
    cells = {f"emoji/{c}_concept_{v}_vendor" for c in ("seen", "unseen") for v in ("seen", "unseen")}
    assert set(result.artefacts["classification"]) == cells
    assert (
        set(result.artefacts["retrieval"])
        == set(result.artefacts["similarity"])
        == {c for c in cells if "unseen_concept" in c}
    )
    assert set(result.artefacts["map"]) == {"emoji/unseen_concept"}
    table = result.artefacts["classification"]["emoji/unseen_concept_seen_vendor"]
    for i, record in enumerate(table.images):
        assert table.class_names[table.labels[i]] == record["name"] and table.group[i] == record["vendor"]
    found = result.artefacts["retrieval"]["emoji/unseen_concept_unseen_vendor"]
    for i, record in enumerate(found.images):
        assert found.texts[found.image_to_text[i, 0]] == record["name"]
    points = result.artefacts["map"]["emoji/unseen_concept"]
    assert len(points.z_image) == len(points.group) == 30
    for i, record in enumerate(points.images):
        assert points.texts[points.text_of_image[i]] == record["name"] and points.group[i] == record["group"]


def test_emoji_task_skips_and_refuses():
    splits = emoji_splits()
    splits["val_seen_vendor"][0]["image"] = b""
    splits["train"][0]["image"] = b"broken"
    m = run_emoji(emoji_oracle(emoji_splits()), splits)[0].metrics
    assert m["emoji/skipped"] == 2
    assert m["emoji/unseen_concept_seen_vendor/images"] == 19
    with pytest.raises(UserError, match="allowed: all, val, test"):
        run_emoji(OracleModel(), splits, "train")


def test_data_of_tasks_is_opened_before_training(tmp_path):
    """A wrong column, missing labels and class names that do not fit end in one line before the first step."""
    from clip_jax import config
    from clip_jax.evaluation import tasks

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = [{"image": "x.png", "text": "a cat", "animal": "cat"}, {"image": "x.png", "text": "a dog", "animal": "dog"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    c = config.base()
    for task, message in (
        ("zeroshot('{a}', label='animl')", "no field 'animl'"),
        ("zeroshot('{a}')", "has no labels"),
        ("zeroshot('{a}', label='animal', classes=['cat', 'horse'])", "horse"),
        ("retrieval('{a}', text='caption')", "no field 'caption'"),
    ):
        c.eval.tasks = (task.format(a=tmp_path / "a.jsonl"),)
        with pytest.raises(UserError, match=message):
            tasks.check(c)
    c.eval.tasks = (f"zeroshot('{tmp_path / 'a.jsonl'}', label='animal', classes=['dog', 'cat'])",)
    tasks.check(c)


def test_a_parser_replaces_the_tilde(monkeypatch):
    from clip_jax.runtime import command

    monkeypatch.setenv("HOME", "/home/me")
    parser = command.make_parser("x", "doc")
    parser.add_argument("--checkpoint")
    parser.add_argument("path")
    args, rest = parser.parse_known_args(["--checkpoint=~/run", "~/x", "--config.data=~/a.tar", "--config.x=a~/b"])
    assert (args.checkpoint, args.path) == ("/home/me/run", "/home/me/x")
    assert rest == ["--config.data=/home/me/a.tar", "--config.x=a~/b"]
