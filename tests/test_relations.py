"""The test of relations and attributes: right captions against wrong ones, by a model whose similarities are known."""

import json

import numpy as np
import pytest
from helpers import render
from PIL import Image

from clip_jax import config, evaluate
from clip_jax.data.loader import check_source
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError
from clip_jax.evaluation.relations import relations_task, summary
from clip_jax.evaluation.results import EvalResult

WRONG = {"wrong_objects": "a dog left of a cat", "wrong_attributes": "a big cat left of a small dog"}


class Stub:
    """The similarity of an image and a text is `scores[red value of the image][text]`, -1 for other texts."""

    image_view = ImageView(size=4)

    def __init__(self, scores):
        self.scores, self.texts, self.largest = scores, [], 0

    def embed_image(self, images):
        return images[:, 0, 0, :1].astype(np.float32)

    def embed_text(self, texts):
        self.texts += texts
        return np.arange(len(self.texts) - len(texts), len(self.texts), dtype=np.float32)[:, None]

    def similarity(self, z_image, z_text):
        self.largest = max(self.largest, len(z_image) * len(z_text))
        rows = [self.scores.get(int(z), {}) for (z,) in z_image]
        return np.asarray([[row.get(self.texts[int(t)], -1.0) for (t,) in z_text] for row in rows], np.float32)


def source(records, name="mine"):
    return MemorySource(
        [{"image": np.full((4, 4, 3), i, np.uint8), **record} for i, record in enumerate(records)], name
    )


def five():
    """Five images: objects right, a tie, right, wrong, right; attributes right, wrong, none, none, a tie."""
    rows = [(2, 1, 1), (2, 2, 3), (2, 1, None), (2, 3, None), (2, 1.5, 2)]
    held_out = ["", "object", "object", "combination", ""]
    records, scores = [], {}
    for i, ((right, objects, attributes), part) in enumerate(zip(rows, held_out, strict=True)):
        texts = [f"right {i}", f"objects {i}", "" if attributes is None else f"attributes {i}"]
        records.append({"texts": texts[:1], "wrong_objects": texts[1], "wrong_attributes": texts[2], "held_out": part})
        scores[i] = dict(zip(texts, (right, objects, attributes), strict=True))
    return records, scores


def test_metrics():
    records, scores = five()
    result = relations_task(Stub(scores), source(records))
    m = {key.removeprefix("scenes/"): value for key, value in result.metrics.items()}
    assert m["relations"] == 3.5 / 5 and (m["images"], m["skipped"]) == (5, 0)
    assert (m["relations_seen"], m["relations_object"], m["relations_combination"]) == (1.0, 0.75, 0.0)
    assert (m["images_seen"], m["images_object"], m["images_combination"]) == (2, 2, 1)
    assert m["attributes"] == 1.5 / 3 and m["images_attributes"] == 3
    assert (m["attributes_seen"], m["attributes_object"], m["images_attributes_seen"]) == (0.75, 0.0, 2)
    assert "attributes_combination" not in m  # there is none
    assert m["image_to_text_R@1"] == m["text_to_image_R@1"] == 1.0
    assert all(type(value) is float for value in result.metrics.values())
    records[3]["texts"] = records[1]["texts"]  # one caption, so one thing in all tests
    scores[3] = {"right 1": 2.0, **scores[3]}
    found = relations_task(Stub(scores), source(records)).outcomes
    assert [len(set(found[f"scenes/{test}"].groups)) for test in ("relations", "image_to_text_R@1")] == [4, 4]
    pairs = result.artefacts["relations"]["scenes/attributes"]
    assert pairs.right == ["right 0", "right 1", "right 4"] and pairs.wrong == [
        "attributes 0",
        "attributes 1",
        "attributes 4",
    ]
    assert pairs.scores.tolist() == [[2, 1], [2, 3], [2, 2]] and pairs.group == ["seen", "object", "seen"]
    assert [p["texts"] for p in pairs.images] == [["right 0"], ["right 1"], ["right 4"]]


def test_not_finite_is_not_right():
    records, scores = five()
    scores[0]["right 0"] = np.nan
    scores[2]["objects 2"] = np.nan
    assert relations_task(Stub(scores), source(records)).metrics["scenes/relations"] == 1.5 / 5


def test_only_the_wrong_objects_are_necessary():
    records, scores = five()
    records = [{key: record[key] for key in ("texts", "wrong_objects")} for record in records]
    del records[1]["wrong_objects"]
    records[2]["wrong_objects"], records[3]["texts"] = " ", []
    records[4]["texts"] += ["another caption"]  # the wrong caption belongs to the first one
    result = relations_task(Stub(scores), source(records), name="mine")
    m = result.metrics
    assert list(result.outcomes["mine/relations"].values) == [1.0, 1.0] and len(result.outcomes) == 7
    assert (m["mine/relations"], m["mine/images"], m["mine/skipped"]) == (1.0, 2, 3)
    assert not [key for key in m if "attributes" in key or "seen" in key]
    assert list(result.artefacts["relations"]) == ["mine/relations"]
    assert result.artefacts["relations"]["mine/relations"].group == ["", ""]


def test_nothing_to_compare_is_one_line():
    records = [{"texts": ["a cat"]}, {"wrong_objects": "a dog"}]
    with pytest.raises(UserError, match="relations: mine has no records with a caption and `wrong_objects`") as error:
        relations_task(Stub({}), source(records), name="relations")
    assert "\n" not in str(error.value)


def test_pairs_are_compared_in_small_blocks():
    """Each image is compared with its own captions only, for any number of images."""
    records = [{"texts": [f"right {i}"], "wrong_objects": f"wrong {i}"} for i in range(37)]
    stub = Stub({i: {f"right {i}": 1.0, f"wrong {i}": 2.0 if i % 3 == 0 else 0.5} for i in range(37)})
    result = relations_task(stub, source(records), limit=None)
    assert result.artefacts["relations"]["scenes/relations"].scores[:, 1].tolist() == [
        2.0 if i % 3 == 0 else 0.5 for i in range(37)
    ]
    assert result.metrics["scenes/relations"] == pytest.approx(24 / 37)
    assert relations_task(stub, source(records), limit=10).metrics["scenes/images"] == 10


def test_table_and_report():
    records, scores = five()
    result = relations_task(Stub(scores), source(records))
    head, objects, attributes, recalls = summary(result.metrics)
    assert head.split()[-6:] == ["all", "seen", "combination", "object", "chance", "pictures"]
    assert objects.split() == "objects exchanged 70.0% 100.0% 0.0% 75.0% 50% 5".split()
    assert attributes.split() == "attributes exchanged 50.0% 75.0% - 0.0% 50% 3".split()
    assert len({len(line) for line in (head, objects, attributes)}) == 1
    assert "R@1 100.0% / 100.0%" in recalls
    page = render(result)
    assert "scenes: objects exchanged 70.0 % (± 40.2) 5 images 100.0 % (± 0.0) 2 images" in page.text
    assert "2 images – 0.0 % (± 0.0) 1 images" in page.text and page.find("section", id="relations")
    assert "Right: 3 of 5 images right 0 2.000 objects 0 1.000 seen +1.000" in page.text
    assert "Wrong: 2 of 5 images right 3 2.000 objects 3 3.000 combination -1.000 right 1" in page.text
    assert len(page.find("select", data_filter="group")) == 2 and "Other metrics" not in page.text
    few = {key: value for key, value in result.metrics.items() if "_" not in key or "R@" in key}
    assert next(iter(summary(few))).split()[-3:] == ["all", "chance", "pictures"]
    assert render(EvalResult(few).credit("clip_jax.evaluation.relations")).text


def test_the_task_by_its_name(tmp_path):
    scores = {}
    result = evaluate.parse_task("relations(source='scenes?objects=2', limit=30)")(Stub(scores))
    assert result.metrics["scenes/relations"] == 0.5 == result.metrics["scenes/attributes"]  # all are ties
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": "a cat left of a dog", **WRONG}, {"image": "a.png", "caption": "a cat"}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = evaluate.parse_task(f"relations(source='{tmp_path}/mine.jsonl', name='mine')")
    m = task(Stub({0: {"a cat left of a dog": 1.0}})).metrics
    assert (m["mine/relations"], m["mine/attributes"], m["mine/images"], m["mine/skipped"]) == (1.0, 1.0, 1, 1)


@pytest.mark.parametrize("method", ["clip", "filip"])
def test_config(method):
    """All captions fit the context, each image is trained with its caption, and no augmentation flips it."""
    c = config.load(f"configs/{method}.py:scenes")
    assert (
        c.method == method and not any("flip" in operation for operation in c.data.augment) and not c.data.word_dropout
    )
    tokenizer, mixture = make_tokenizer(c.tokenizer), make_source(c.data.source)
    view = TextView("text", c.model.text.context, c.data.templates)
    check_source(mixture, [view], tokenizer)
    emoji, scenes = mixture.sources
    for i in range(100):
        record = scenes[i]
        assert view.caption(record, np.random.default_rng(i)) == record["caption"] and "caption" not in emoji[i]
        assert (tokenizer([record["caption"], record["wrong_objects"]], 64) != 0).sum(1).max() <= c.model.text.context
        assert view.caption(emoji[i], np.random.default_rng(i)).startswith(emoji[i]["name"])
    for task in (*c.eval.tasks, *c.eval.train_tasks):
        evaluate.parse_task(task)
