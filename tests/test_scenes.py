"""Composed scenes: captions agree with images, held-out objects and pairs, determinism, wrong options."""

import collections
import itertools
import pickle
import re

import numpy as np
import pytest

from clip_jax.data.loader import Loader
from clip_jax.data.sources import make_source, scenes
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError

COUNT = 600


@pytest.fixture(scope="module")
def sources():
    return {split: make_source("scenes", split) for split in scenes.SPLITS}


@pytest.fixture(scope="module")
def records(sources):
    return {split: [source[i] for i in range(COUNT)] for split, source in sources.items()}


def everything(records):
    return list(itertools.chain.from_iterable(records.values()))


def places(record):
    """The middle of each object, x and y."""
    boxes = record["boxes"]
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def holds(record, relation, i, k):
    x, y = places(record)[i] - places(record)[k]
    along, across = (x, y) if "the" in relation else (y, x)
    return abs(along) > 2 * abs(across) and (along < 0) == (relation in ("to the left of", "above"))


def test_the_relation_is_unambiguous_in_the_image(records):
    seen = set()
    for record in everything(records):
        assert holds(record, record["relation"], 0, 1)
        seen.add(record["relation"])
        first, *rest = record["texts"][0].split(", ")
        assert f" {record['relation']} " in first
        for clause, k in zip(rest, (1, 2), strict=False):  # the third is placed by the second, the fourth by the third
            relation = next(
                r for r in ("to the left of", "to the right of", "above", "below") if f" {r} the " in clause
            )
            assert clause.endswith(f"the {record['objects'][k]}") and record["objects"][k + 1] in clause
            assert holds(record, relation, k + 1, k)
    assert len(seen) == 4


def test_boxes_lie_in_the_image_and_hold_the_objects(records):
    for record in records["train"]:
        boxes, image = record["boxes"], record["image"]
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and boxes.dtype == np.float32
        assert len(boxes) == len(record["objects"]) == len(record["tags"]) and boxes.min() >= 0 and boxes.max() <= 64
        outside = np.ones((64, 64), bool)
        for x1, y1, x2, y2 in boxes.astype(int):
            assert len(np.unique(image[y1:y2, x1:x2].reshape(-1, 3), axis=0)) > 4
            assert outside[y1:y2, x1:x2].all(), "boxes do not overlap"
            outside[y1:y2, x1:x2] = False
        assert len(np.unique(image[outside], axis=0)) == 1, "all but the objects is background"


def test_attributes_are_true(records):
    kinds = set()
    for record in everything(records):
        sides = (record["boxes"][:, 2] - record["boxes"][:, 0]) / 32
        for tag, name, side, (x, y, *_) in zip(
            record["tags"], record["objects"], sides, record["boxes"].astype(int), strict=True
        ):
            attribute = tag.removesuffix(name).strip()
            kinds.add(attribute)
            if attribute.endswith("-framed"):
                color = attribute.removesuffix("-framed")
                assert tuple(record["image"][y, x]) == scenes.COLORS[color] and f" in a {color} frame" in record[
                    "texts"
                ][0].replace(" an ", " a ")
            else:
                np.testing.assert_allclose(side, scenes.SIDES[attribute], atol=0.03)
                assert f"{attribute} {name}".strip() in record["texts"][0]
    assert kinds == {"", "big", "small", *(f"{color}-framed" for color in scenes.COLORS)}


def test_wrong_captions(records):
    with_attributes = 0
    for record in records["test"]:
        text, (a, b, *_), (tag_a, *_) = record["texts"][0], record["objects"], record["tags"]
        first, wrong = text.split(", ")[0], record["wrong_objects"].split(", ")[0]
        left, right = first.split(f" {record['relation']} ")
        assert wrong == f"{right} {record['relation']} {left}"
        if tag_a == a:
            assert not record["wrong_attributes"]
            continue
        with_attributes += 1
        assert record["wrong_attributes"] != text and sorted(record["wrong_attributes"].split()) == sorted(text.split())
        assert record["wrong_attributes"].replace(tag_a.removesuffix(a).strip(), "?") != text
        parts = record["wrong_attributes"].split(", ")[0].split(f" {record['relation']} ")
        assert [re.sub(r"^an? |(big|small) | in an? .* frame", "", part) for part in parts] == [a, b], (
            "only the attributes"
        )
    assert 0.5 < with_attributes / COUNT < 0.8


def test_summary(records):
    for record in records["train"]:
        assert all(name in record["summary"] for name in record["objects"]) and len(record["summary"]) < len(
            record["texts"][0]
        )
    assert scenes._with_article("apple") == "an apple" and scenes._with_article("grapes") == "grapes"
    assert scenes._with_article("unicorn") == "a unicorn" and scenes._with_article("rhinoceros") == "a rhinoceros"
    assert scenes._with_article("octopus") == "an octopus" and scenes._with_article("cat") == "a cat"


def names(split):
    emoji = make_source("emoji", split)
    return {emoji[i]["name"] for i in range(len(emoji))}


def test_held_out_objects_and_pairs_are_never_in_training(records):
    known = names("train")
    assert {name for record in records["train"] for name in record["objects"]} <= known
    assert {record["held_out"] for record in records["train"]} == {""}
    shown = {frozenset(pair) for record in records["train"] for pair in itertools.combinations(record["objects"], 2)}
    for split in ("val", "test"):
        new = names(f"{split}_seen_vendor")
        assert not new & known
        assert all(
            COUNT / 4 < n < COUNT / 2
            for n in collections.Counter(record["held_out"] for record in records[split]).values()
        )
        for record in records[split]:
            objects, first = record["objects"], frozenset(record["objects"][:2])
            assert sum(name in new for name in objects[:2]) == (record["held_out"] == "object")
            assert not new & set(objects[2:])
            pairs = {frozenset(pair): scenes._split_of_pair(*pair) for pair in itertools.combinations(objects, 2)}
            assert pairs.pop(first) == (split if record["held_out"] == "combination" else "train")
            assert set(pairs.values()) <= {"train"}
            assert record["held_out"] != "combination" or first not in shown
    assert all(
        scenes._split_of_pair(*pair) == scenes._split_of_pair(*reversed(list(pair))) == "train"
        for pair in map(tuple, shown)
    )


def test_a_record_is_a_function_of_its_place(sources, records):
    copy = pickle.loads(pickle.dumps(sources["test"]))
    for i in (7, 3, 599):
        again = copy[i]
        for key, value in records["test"][i].items():
            np.testing.assert_array_equal(again[key], value, err_msg=key)
    assert len({record["texts"][0] for record in records["train"]}) > 0.99 * COUNT
    assert records["train"][0]["texts"] != records["val"][0]["texts"]


def test_options():
    source = make_source("scenes?objects=3&size=96&records=50&groups=objects,activities")
    assert len(source) == 50 and source[49]["image"].shape == (96, 96, 3) and len(source[0]["objects"]) == 3
    emoji = make_source("emoji")
    group = {emoji[i]["name"]: emoji[i]["group"] for i in range(len(emoji))}
    assert {group[name] for i in range(50) for name in source[i]["objects"]} == {"objects", "activities"}


def test_few_objects():
    """As few as are allowed: no scene is without an object that goes with the others, and pairs come back."""
    train, test = (make_source("scenes?groups=activities&concepts=24", split) for split in ("train", "test"))
    assert len({name for i in range(300) for name in train[i]["objects"]}) == 24
    for i in range(300):
        record = test[i]
        assert record["caption"] == record["texts"][0] and len(set(record["objects"])) == len(record["objects"])


def test_few_pairs():
    train, test = (make_source("scenes?objects=2&concepts=24&pairs=48", split) for split in ("train", "test"))
    shown = {tuple(train[i]["objects"]) for i in range(1000)}
    assert len({frozenset(pair) for pair in shown}) == 48 and len(shown) == 96  # either of the two comes first
    for i in range(300):
        record = test[i]
        assert (tuple(record["objects"]) in shown) == (record["held_out"] == "")


def test_told_as_one_reads():
    plain, reading = (make_source(f"scenes?objects=2-4{told}", "val") for told in ("", "&told=reading"))
    turned = 0
    for i in range(300):
        a, b = plain[i], reading[i]
        x1, y1 = (b["boxes"][1] - b["boxes"][0])[:2]
        assert b["relation"] in ("to the left of", "above") and (x1 if b["relation"] == "to the left of" else y1) > 0
        assert (a["objects"], a["tags"], a["held_out"]) == (b["objects"], b["tags"], b["held_out"])
        if a["relation"] == b["relation"]:
            assert a["caption"] == b["caption"] and (a["image"] == b["image"]).all()
        else:
            turned += 1
    assert 100 < turned < 200


def test_the_loader_takes_them(sources):
    views = ImageView("image", 32), TextView("text", 40), TextView("summary", 20, ("{summary}",))
    loader = Loader(sources["train"], views, make_tokenizer("sentencepiece"), batch_size=8, seed=0, threads=0)
    batch = next(loader)
    assert batch["image"].shape == (8, 32, 32, 3) and (batch["text"] != 0).any(1).all()
    loader.close()


@pytest.mark.parametrize(
    "spec, split, message",
    [
        ("scenes?object=2", "train", "unknown option 'object' .did you mean 'objects'"),
        ("scenes?objects=two", "train", "cannot read objects=two; options are written as in scenes"),
        ("scenes?objects=1-3", "train", "objects=1-3: at least 2 and at most 4"),
        ("scenes?size=8", "train", "size=8 must be at least 32 pixels"),
        ("scenes?groups=fods", "train", "no group 'fods'.*groups: activities"),
        ("scenes?groups=component", "train", "groups=component have 2 objects with a short name; at least 24"),
        ("scenes?concepts=24&pairs=999", "train", "pairs=999: training has 251 pairs of 24 objects"),
        ("scenes?told=read", "train", "told=read .did you mean 'reading'.*: any, reading"),
        ("scenes?concepts=300", "train", "concepts=300: groups=animals-nature,food-drink have 215 objects"),
        ("scenes", "training", "no split 'training' .did you mean 'train'"),
    ],
)
def test_wrong_input_is_one_line(spec, split, message):
    with pytest.raises(UserError, match=message) as error:
        make_source(spec, split)
    assert "\n" not in str(error.value)


def test_no_fields_to_choose():
    with pytest.raises(UserError, match="no fields to choose from"):
        make_source("scenes", text="summary")
