import base64
import io
import json
import os
import re

import numpy as np
import pytest
from helpers import Page, render
from PIL import Image

from clip_jax.data.sources import MemorySource, make_source
from clip_jax.errors import UserError
from clip_jax.evaluation import emoji, tasks
from clip_jax.evaluation.report import assembly, charts, figures, galleries
from clip_jax.evaluation.report import page as html_page
from clip_jax.evaluation.report.confusion import Confusion, confused_pairs
from clip_jax.evaluation.report.embedding_map import EmbeddingMap
from clip_jax.evaluation.report.figures import Retrieval, SimilarityMatrix
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.report.head import describe_task
from clip_jax.evaluation.results import EvalResult, Images

EVIL = """</script><script>alert(1)</script><!--data--><img src=x onerror="alert('x')"> & 'quotes' "double" """
COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 200, 0), (120, 0, 120), (0, 0, 0)]


def make_images(n, broken=()):
    """n images of one colour each."""
    records = [
        {"image": b"not an image" if i in broken else np.full((20, 20, 3), COLOURS[i % 6], np.uint8)} for i in range(n)
    ]
    return Images([MemorySource(records)] if n else [], np.stack([np.zeros(n, int), np.arange(n)], 1))


def make_classification(n=6, names=("cat", "dog", "fox"), groups=("a", "b")):
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((n, len(names))), axis=1)[:, ::-1].astype(np.float32)
    top = np.argsort(rng.random((n, len(names))), axis=1).astype(np.int32)
    labels = np.arange(n, dtype=np.int32) % len(names)
    return Classification(list(names), labels, top, scores, make_images(n), [groups[i % len(groups)] for i in range(n)])


def make_retrieval(texts=("cat", "dog", "fox")):
    n = len(texts)
    ranks = np.asarray([[(i + k) % n for k in range(n)] for i in range(n)], np.int32)  # the right one first
    return Retrieval(list(texts), np.arange(n), np.arange(n), ranks, ranks, make_images(n))


def make_map(n=6, texts=("cat", "dog", "fox"), groups=("a", "b")):
    rng = np.random.default_rng(0)
    images, text = rng.normal(size=(n, 8)) + 1, rng.normal(size=(len(texts), 8)) - 1
    of_image = np.arange(n, dtype=np.int32) % len(texts)
    return EmbeddingMap(
        images, text, list(texts), of_image, [groups[i % len(groups)] for i in range(n)], make_images(n)
    )


def make_result(metrics=None, name="pets", texts=("cat", "dog", "fox"), groups=("a", "b")):
    similarity = SimilarityMatrix(np.eye(len(texts), dtype=np.float32), list(texts), make_images(len(texts)))
    result = EvalResult(
        metrics or {f"{name}/top1": 0.5, f"{name}/top5": 1.0, f"{name}/images": 6.0, f"{name}/classes": 3.0}
    )
    result.artefacts = {
        "classification": {name: make_classification(names=texts, groups=groups)},
        "retrieval": {name: make_retrieval(texts)},
        "similarity": {name: similarity},
        "map": {name: make_map(texts=texts, groups=groups)},
    }
    return result


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_uris(text, kind):
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(rf"data:image/{kind};base64,([\w+/=]+)", text)
    ]


# The page as a whole


def test_page_is_whole_and_loads_nothing(tmp_path):
    metrics = write_metrics(
        tmp_path / "metrics.jsonl", [{"step": 1, "time": 1.0, "loss": 2.5}, {"step": 2, "time": 2.0, "loss": 2.0}]
    )
    path = assembly.write_report(
        tmp_path / "new" / "r.html", make_result(), title="t", config={"optim": {"lr": 0.1}}, metrics_jsonl=metrics
    )
    text = path.read_text("utf-8")
    page = Page(text)
    anchors = [a["href"] for a in page.find("a")]
    assert anchors == [
        "#results",
        "#training",
        "#predictions",
        "#retrieval",
        "#similarity",
        "#map",
        "#all-metrics",
        "#configuration",
    ]
    assert all(page.find("section", id=anchor[1:]) for anchor in anchors)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object") and "href" not in attributes or tag == "a"
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith("data:image/")
    assert re.findall(r"url\((?!data:image/)|@import|https?:|fetch\(|XMLHttpRequest", text) == []
    assert os.listdir(path.parent) == ["r.html"]
    assert "optim.lr 0.1" in page.text


@pytest.mark.parametrize("content", [EvalResult({}), EvalResult({}, {}), EvalResult({"x": float("nan")})])
def test_page_of_nothing(content, tmp_path):
    page = render(content, metrics_jsonl=tmp_path / "missing.jsonl", config={})
    assert "There are no metrics of a training run" in page.text
    assert not page.find("section", id="map") and not page.find("section", id="configuration")


def test_empty_artefacts():
    empty = make_images(0)
    no, none = np.zeros((0, 1), np.int32), np.zeros(0, np.int32)
    result = EvalResult({})
    result.artefacts = {
        "classification": {"x": Classification([], none, no, no, empty, [])},
        "retrieval": {"x": Retrieval([], none, none, no, no, empty)},
        "similarity": {"x": SimilarityMatrix(np.zeros((0, 0), np.float32), [], empty)},
        "map": {"x": EmbeddingMap(np.zeros((0, 4)), np.zeros((0, 4)), [], none, [], empty)},
    }
    page = render(result)
    assert page.data["maps"] == page.data["matrices"] == []
    for sentence in (
        "There are no images.",
        "There is no image with a text.",
        "no finite similarity",
        "too few embeddings",
    ):
        assert sentence in page.text


def test_untrusted_text_stays_text(tmp_path):
    metrics = write_metrics(
        tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0, EVIL: 2.0}, {"step": 1, EVIL + "/top1": 0.5}]
    )
    result = make_result(
        {EVIL: 1.0, EVIL + "/top1": 0.5}, name=EVIL, texts=(EVIL, EVIL + "2", "fox"), groups=(EVIL, "b")
    )
    page = render(result, title=EVIL, config={EVIL: {EVIL: EVIL}}, metrics_jsonl=metrics)
    harmless = render(make_result())
    assert len(page.find("script")) == len(harmless.find("script")) == 2
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert not [a for a in page.find("img") if not a["src"].startswith("data:image/")]
    shown = " ".join(EVIL.split())
    assert page.text.count(shown) > 20
    assert page.data["maps"][0]["texts"][0] == page.data["matrices"][0]["texts"][0] == shown
    assert page.data["maps"][0]["groups"][0] == shown
    assert len(page.find("i", title=shown)) > 3  # of thumbnails


def test_unusual_characters(tmp_path):
    texts = ("문어 🐙 עברית", "bad \udcff bytes\0", "long " * 1000)
    path = assembly.write_report(
        tmp_path / "r.html", make_result(texts=texts), title="ümlaut \udcff", config={"k": "\udcff"}
    )
    page = Page(path.read_text("utf-8"))
    assert "문어 🐙 עברית" in page.text and "bad ? bytes" in page.text and "\0" not in page.text
    long = page.data["maps"][0]["texts"][2]
    assert len(long) == 120 and long.endswith("long…")


def test_old_page_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html_page.os, "replace", fail)
    with pytest.raises(UserError, match=r"r\.html' cannot be written: No space left on device"):
        assembly.write_report(path, EvalResult({}), title="t")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["r.html"]
    with pytest.raises(UserError, match="cannot be written"):
        assembly.write_report(path / "below_a_file.html", EvalResult({}), title="t")


def test_size_with_a_full_map_of_emoji(tmp_path):
    source = make_source("emoji", "train")
    n, classes = 2000, 395
    rng = np.random.default_rng(0)
    images = Images([source], np.stack([np.zeros(n, int), np.arange(n)], 1))
    texts = [f"a name of usual length, {i}" for i in range(classes)]
    of_image = rng.integers(classes, size=n)
    result = EvalResult({})
    result.artefacts["map"]["emoji"] = EmbeddingMap(
        rng.normal(size=(n, 16)),
        rng.normal(size=(classes, 16)),
        texts,
        of_image,
        [str(i % 10) for i in range(n)],
        images,
    )
    path = assembly.write_report(tmp_path / "r.html", result, title="t")
    assert 300_000 < path.stat().st_size < 2_000_000


# Headline numbers


def emoji_result(prefix="emoji", cells=emoji.CELLS):
    metrics = {f"{prefix}/skipped": 0.0}
    for i, (concept, vendor) in enumerate(cells):
        cell = {
            "top1": 0.1 + i / 10,
            "top5": 0.15 + i / 10,
            "chance_top1": 0.0026,
            "chance_top5": 0.013,
            "classes": 384.0,
            "images": 275.0,
            "top1_without_flags_clocks_keycaps": 0.31,
            "top5_without_flags_clocks_keycaps": 0.32,
            "images_without_compositions": 0.0,
            "images_without_flags_clocks_keycaps": 200.0,
            "top1_without_compositions": 0.0,
            "top5_without_compositions": 0.0,
        }
        if concept == "seen":
            cell |= {"pixel_1nn_top1": 0.44, "pixel_1nn_top5": 0.6}
        else:
            cell |= {f"{d}_R@{k}": 0.7 for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        metrics |= {f"{prefix}/{concept}_concept_{vendor}_vendor/{key}": value for key, value in cell.items()}
    return EvalResult(metrics).credit(emoji.__name__)


def test_emoji_headline():
    text = render(emoji_result()).text
    numbers_of = {
        "Seen concepts, seen vendors": "10.0 % 15.0 %",
        "Seen concepts, unseen vendor": "20.0 % 25.0 %",
        "Unseen concepts, seen vendors": "30.0 % 35.0 %",
        "Unseen concepts, unseen vendor": "40.0 % 45.0 %",
    }
    for cell, numbers in numbers_of.items():
        pixel = "44.0 % 60.0 %" if cell.startswith("Seen") else "– –"
        numbers = f"model {numbers} chance 0.26 % 1.3 % nearest in pixels {pixel}"
        middle = rf"{cell} [^%]* top-1 top-5 {numbers} 275 images, 384 names"
        assert re.search(middle, text), cell
    assert "(± 5.8)" in text  # 196 sqrt(0.4 0.6 / 275)
    assert "it memorised" in text
    # Nothing is left without compositions.
    row = "10.0 % / 15.0 % 275 images, pixels 44.0 % 31.0 % / 32.0 % 200 images –"
    assert row in text
    assert text.count("70.0 % " * 6) == 2 and "Other metrics" not in text


def test_headline_of_a_subset_has_its_cells_only():
    text = render(emoji_result("emoji_val", emoji.CELLS[2:])).text
    assert "Naming emoji (validation concepts)" in text and "Seen concepts, seen vendors" not in text
    assert "10.0 % 15.0 %" in text and "memorised" not in text


def test_headline_of_other_tasks():
    metrics = {
        "pets/top1": 0.5,
        "pets/top5": 0.905,
        "pets/mean_per_class": 0.25,
        "pets/chance_top1": 0.027,
        "pets/chance_top5": 0.13,
        "pets/majority_top1": 0.06,
        "pets/images": 3669.0,
        "pets/classes": 37.0,
        "pets/skipped": 2.0,
        "a/b/accuracy": 0.8,
        "a/b/val_accuracy": float("nan"),
        "a/b/l2": 1e-4,
        "a/b/images": 100.0,
        "mine/score": 12.5,
        "alone": 3.0,
    }
    metrics |= {f"coco/{d}_R@{k}": k / 100 for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)} | {
        "coco/texts": 25010.0
    }
    result = EvalResult(metrics)
    for name, task in (("pets", "zeroshot"), ("a/b", "probe"), ("coco", "retrieval")):
        result.tasks |= dict.fromkeys(
            (key for key in metrics if key.startswith(name + "/")), f"clip_jax.evaluation.{task}"
        )
    text = render(result).text
    assert "pets 50.0 % (± 1.6) 90.5 % 25.0 % 2.7 % 13.0 % 6.0 % 3,669 37 2" in text
    assert "coco 1.0 % 5.0 % 10.0 % 1.0 % 5.0 % 10.0 % 25,010" in text
    assert "a/b 80.0 % (± 7.8) – – 0.0001 100" in text
    assert "Other metrics mine/score 12.5 alone 3" in text


# Training curves


def test_read_metrics(tmp_path):
    rows = [
        {"step": 10, "time": 1, "loss": 3.0, "lr": 0.1},
        {"step": 20, "time": 2, "loss": 2.0, "lr": 0.2},
        {"step": 20, "time": 2, "val/top1": 0.1},
        {"step": 10, "time": 3, "loss": None, "lr": 0.3, "text": "x", "list": [1]},  # the resumed run
        {"step": 5, "loss": float("nan")},
        {"step": "7", "loss": 1.0},
        [1, 2],
    ]
    path = write_metrics(tmp_path / "metrics.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b'\xff\xfe\n\n{"step": 30, "loss": 1.')
    training, evaluation = charts.read_metrics(path)
    assert training == {"loss": [(5, None), (10, None), (20, 2.0)], "lr": [(10, 0.3), (20, 0.2)]}
    assert evaluation == {"val/top1": [(20, 0.1)]}
    assert charts.read_metrics(tmp_path / "missing") == ({}, {})


def test_curves(tmp_path):
    rows = [
        {
            "step": step,
            "loss": None if step == 5 else 10.0 - step,
            "image_to_text_acc": 0.1,
            "text_to_image_acc": 0.2,
            "odd": None,
            "grad_norm": 1e4 if step == 3 else 1.0,
        }
        for step in range(1, 10)
    ]
    rows += [
        {
            "step": 4,
            "emoji_val/unseen_concept_seen_vendor/top1": 0.25,
            "emoji_val/unseen_concept_seen_vendor/chance_top1": 0.1,
        },
        {"step": 9, "emoji_val/unseen_concept_seen_vendor/top1": 0.5, "pets/top1": 0.9, "pets/loss": 1.0},
    ]
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    charts = {a["aria-label"].removesuffix(" over steps"): a for a in page.find("svg")}
    assert list(charts) == ["Loss", "Accuracy in the batch", "Gradient norm", "Top-1"]
    loss, accuracy, gradient, top1 = page.data["charts"]
    assert (loss["first"], loss["last"]) == (1, 9)
    assert loss["curves"] == [["loss", list(range(1, 10)), [9, 8, 7, 6, None, 4, 3, 2, 1]]]
    assert [name for name, *_ in accuracy["curves"]] == ["image → text", "text → image"]
    assert top1["curves"] == [["Unseen concepts, seen vendors (validation)", [4, 9], [0.25, 0.5]]]
    line = page.find("path", class_="line c0")[0]["d"]
    points = [[tuple(map(float, point.split())) for point in piece.split("L")] for piece in line.split("M")[1:]]
    assert [len(piece) for piece in points] == [4, 4]  # a gap where the loss was not finite
    flat = sum(points, [])
    assert flat[0][0] == 46 and flat[-1][0] == 346 and flat[0][1] == 10  # the plotting area
    assert np.allclose(np.diff([x for x, _ in points[0]]), 37.5)
    assert np.allclose(np.diff([y for _, y in points[0]]), 150 / 9, atol=0.11)  # from 0 to 9
    assert "Gradient norm 1 logarithmic" in page.text and "More curves (1) odd No finite value was logged." in page.text
    assert "Unseen concepts, seen vendors (validation)" in page.text


def test_nothing_is_drawn_of_a_single_step(tmp_path):
    rows = [{"step": 3, "loss": 2.0, "lr": 0.1}, {"step": 3, "pets/top1": 0.5}]
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    assert not page.find("svg") and "Nothing was logged at two steps or more" in page.text


def test_changes_of_the_learning_rate_are_marked(tmp_path):
    rates = [0.1, 0.5, 1.0, 0.99, 0.97, 0.94, 0.3, 0.29, 0.27, 0.24]  # warm-up, cosine, a restart with a lower one
    changes = charts.learning_rate_changes(list(enumerate(rates)))
    assert [step for step, _ in changes] == [2, 6]
    assert [text.split("rate ")[1] for _, text in changes] == ["reaches its peak, 1", "jumps from 0.94 to 0.3"]
    for plain in ([1.0] * 9, [0.0] * 5, [1 - i / 9 for i in range(10)], [0.5]):
        assert charts.learning_rate_changes(list(enumerate(plain))) == []
    rows = [{"step": step, "loss": 1.0, "lr": rate} for step, rate in enumerate(rates)]
    history = [{"step": 0, "changes": {}}, {"step": 5, "changes": {"optim.lr": [1.0, EVIL]}}]
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "m.jsonl", rows), history=history)
    assert "its peak, 1; step 5, optim.lr from 1.0 to </script>" in page.text and "jumps" not in page.text
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    assert [a["d"] for a in page.find("path", class_="mark")] == ["M112.7 10v150", "M246.0 10v150"] * 2
    assert "Dashed: step 2, the learning rate reaches its peak, 1; step 6, the learning rate jumps" in page.text


def test_the_head_says_what_was_trained_and_evaluated(tmp_path):
    rows = [{"step": 4, "seconds/training": 100.0, "seconds/data": 25.0}]
    task = "zeroshot(source='/nowhere/{split}.csv', split='val', templates=['a {}', '{}'], name='pets')"
    result = EvalResult({}, model={"step": 4, "parameters": 12345, "ema": True})
    result.evaluated = [describe_task(tasks.parse_task(text)) for text in (task, "emoji(subset='val')")]
    settings = {
        "method": "clip", "train": {"steps": 8},
        "data": {"source": "/d/{split}.csv", "split": "train", "batch_size": 16},
        "model": {"image": {"size": 32}, "text": {"context": 12}},
    }  # fmt: skip
    page = render(result, config=settings, metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    for text in (
        "Trained on /d/train.csv",
        "Checkpoint step 4 of 8, moving average of the weights",
        "Examples seen 64 in batches of 16",
        "Pictures 32 × 32 pixels",
        "Parameters 12,345",
        "Time of the run 2m05s",
        "pets /nowhere/val.csv 2 prompts, such as “a {}” zeroshot(",
        "emoji {} emoji(subset='val')",
    ):
        assert text in page.text, text
    history = [{"step": 1, "forked_from": "runs/a"}, {"step": 3, "changes": {"data.batch_size": [8, 16]}}]
    page = render(result, config=settings, history=history)
    assert "Examples seen 32 in batches of 16, after step 1 of runs/a" in page.text  # steps 2 and 3 of 8, step 4 of 16
    assert "Training 8 steps of 16 examples" in render(EvalResult({}), config=settings).text


@pytest.mark.parametrize("values", [[-3.0, -3.0], [1e-30, 1e30], [-1e-9, 1e9], [0, 1]])
def test_curves_of_any_range(values, tmp_path):
    rows = [{"step": i, "loss": value} for i, value in enumerate(values)]
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    marks = page.find("circle")
    assert len(marks) == len(values)
    assert all(46 <= float(mark["cx"]) <= 346 and 10 <= float(mark["cy"]) <= 160 for mark in marks)


def test_long_runs_are_thinned(tmp_path):
    rows = [{"step": step, "loss": float(step % 2)} for step in range(1, 8001)]
    page = render(EvalResult({}), metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", rows))
    [[_, steps, values]] = page.data["charts"][0]["curves"]
    assert len(steps) == 400 and steps[0] == 20 and steps[-1] == 8000 and set(values) == {0.5}
    assert "each point is a mean" in page.text


def test_ticks_are_round():
    assert charts.ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(1, 1000, 5) == [200, 400, 600, 800, 1000]
    assert charts._log_ticks(-1.5, 1) == pytest.approx([0.1, 1, 10])
    assert [charts._steps(step) for step in (200, 9999, 20000, 1.5e6)] == ["200", "9999", "20k", "1.5M"]


# Images


def test_thumbnails_lie_where_their_tags_say():
    page = html_page.Page()
    name, tag = page.thumbnails(make_images(70, broken=(40,)), [*range(1, 70), 5], 16)
    [sheet] = data_uris(page.sheets[0], "webp")
    assert sheet.size == (32 * 16, 3 * 16)  # 69 tiles, the repeated one once
    for row in (1, 32, 33, 69):
        x, y = map(int, re.search(r"--x:(\d+);--y:(\d+)", tag(row, "")).groups())
        assert np.allclose(sheet.getpixel((16 * x + 8, 16 * y + 8)), COLOURS[row % 6], atol=30)
        assert (x, y) == ((row - 1) % 32, (row - 1) // 32)
    x, y = map(int, re.search(r"--x:(\d+);--y:(\d+)", tag(40, "")).groups())
    assert sheet.getpixel((16 * x + 8, 16 * y + 8)) == (255, 255, 255)  # not readable
    assert f'class="t {name}"' in tag(1, "") and "calc(32*var(--s)) calc(3*var(--s))" in page.sheets[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (300, 200)])
def test_thumbnails_keep_the_shape_of_an_image(shape):
    images = Images([MemorySource([{"image": np.zeros((*shape, 3), np.uint8)}])], np.zeros((1, 2), int))
    thumbnail = html_page.thumbnail(images, 0, 64)
    dark = np.argwhere(thumbnail[..., 0] < 128)
    assert thumbnail.shape == (64, 64, 3)
    height, width = np.ptp(dark, axis=0) + 1
    expected = [max(1, round(62 * side / max(shape))) for side in shape]
    assert [height, width] == expected


# Predictions


def test_gallery_takes_the_most_confident_of_every_name():
    n = 200
    labels = np.arange(n, dtype=np.int32) % 40
    right = np.arange(n) < 120
    top = np.stack([np.where(right, labels, (labels + 1) % 40), (labels + 2) % 40], 1).astype(np.int32)
    scores = np.stack([1 + np.arange(n) / n, np.ones(n)], 1).astype(np.float32)  # the later, the more confident
    names = [f"n{i:02d}" for i in range(40)]
    result = EvalResult({})
    result.artefacts["classification"]["x"] = Classification(names, labels, top, scores, make_images(n), ["g"] * n)
    page = render(result)
    assert "Right: 120 of 200 images" in page.text and "Wrong: 80 of 200 images" in page.text
    cards = [thumbnail["title"] for thumbnail in page.find("i", class_="t t0")]
    assert cards[:24] == [names[row % 40] for row in range(119, 95, -1)]
    assert cards[24:] == [names[row % 40] for row in range(199, 175, -1)]
    assert len(page.find("li", class_="hit")) == 24
    assert not page.find("select", data_filter="group")  # there is one group only


def test_gallery_repeats_names_only_when_they_run_out():
    chosen = galleries._most_confident(np.arange(10), np.arange(10.0), np.asarray([0] * 9 + [1]))
    assert chosen.tolist() == list(range(9, -1, -1))
    many = galleries._most_confident(np.arange(100), -np.arange(100.0), np.asarray([0] * 99 + [1]))
    assert len(many) == 24 and many[-1] == 99 and many[:23].tolist() == list(range(23))


def test_gallery_with_scores_that_are_not_finite():
    item = make_classification()
    item.scores[0], item.scores[1], item.scores[2, 0] = np.nan, np.inf, -np.inf
    result = EvalResult({})
    result.artefacts["classification"]["x"] = item
    page = render(result)
    assert len(page.find("div", class_="card")) == 6
    assert page.text.count("–") == 3 + 3 + 1
    assert [len(page.find("div", class_="card", data_group=str(i))) for i in range(2)] == [3, 3]
    assert len(page.find("select", data_filter="group")) == 1


def test_gallery_with_a_single_class():
    result, scores = EvalResult({}), np.full((2, 1), 0.5, np.float32)
    item = Classification(["cat"], np.zeros(2, int), np.zeros((2, 1), int), scores, make_images(2), ["", ""])
    result.artefacts["classification"]["x"] = item
    assert "Right: 2 of 2 images cat cat 0.500 cat cat 0.500 Wrong: 0 of 2 images None." in render(result).text


# Classes


def confusion_page(names, labels, predicted):
    result = EvalResult({})
    result.artefacts["confusion"]["x"] = Confusion(names, np.asarray(labels), np.asarray(predicted))
    return render(result)


def test_the_confusion_matrix_counts_each_pair():
    names = ["ant", EVIL, "cat", "never seen"]
    page = confusion_page(names, [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2])
    assert confused_pairs(np.asarray([0, 0, 0, 1, 1, 2]), np.asarray([0, 1, 1, 1, 2, 2])) == [(0, 1, 2), (1, 2, 1)]
    shown = " ".join(EVIL.split())
    cells = [(a["class"], a.get("style", "")) for a in page.find("td") if a.get("class") in ("hit", "miss")]
    assert [style for _, style in cells] == [
        "--v:33%", "--v:67%", "", "", "--v:50%", "--v:50%", "", "", "--v:100%",
    ]  # fmt: skip
    assert [kind for kind, _ in cells] == ["hit", "miss", "miss", "miss", "hit", "miss", "miss", "miss", "hit"]
    assert f"share of the class ant {shown} 2 66.7 % {shown} cat 1 50.0 %" in page.text
    # The worst class first: its images, the right ones of them, the right ones of its predictions.
    assert f"often taken for ant 3 33.3 % 100.0 % {shown} (2) {shown} 2 50.0 % 33.3 % cat (1) cat 1" in page.text
    assert "never seen" not in page.text and not page.find("script", onerror="alert('x')")
    assert "There are no images." in confusion_page(names, [], []).text


def test_many_classes_have_no_matrix():
    page = confusion_page([f"n{i}" for i in range(40)], np.arange(40), np.arange(40) // 2)
    assert not page.find("table", class_="confusion") and "40 classes" in page.text
    assert len(page.find("table", class_="pairs")) == 1


# Retrieval, similarity, map


def test_retrieval_marks_the_right_ones():
    ranks = np.asarray([[1, 0], [1, 2], [0, 1]], np.int32)
    item = Retrieval(["cat", "dog", "fox"], np.asarray([0, 1, 5]), np.asarray([0, 1, 1]), ranks, ranks, make_images(3))
    result = EvalResult({})
    result.artefacts["retrieval"]["x"] = item
    page = render(result)
    # Text 0 retrieves images 1, 0 (hit); text 1: 1 (hit), 2; text 2, also of image 1: 0, 1 (hit).
    # Image 2 has no text, so it is no query.
    assert [a.get("class") for a in page.find("span")][:6] == [None, "hit", "hit", None, None, "hit"]
    assert [a.get("class") for a in page.find("li")] == [None, "hit", "hit", "hit"]
    assert len(page.find("div", class_="card")) == 2 and page.find("i", title="an image without a text")


def test_similarity_colours():
    values = np.asarray([[1.0, 0.0], [0.5, np.nan]], np.float32)
    result = EvalResult({})
    result.artefacts["similarity"]["x"] = SimilarityMatrix(values, ["cat", "dog"], make_images(2))
    text = assembly.render(result, title="t")
    ramp_dark, ramp_light, dark, light = data_uris(text, "png")
    assert light.size == (2, 2) and ramp_light.size == (128, 1)
    pixels = [light.getpixel((x, y)) for y in (0, 1) for x in (0, 1)]
    assert pixels[0] == (*figures._LIGHT_MAP[-1], 255) == ramp_light.getpixel((127, 0))
    assert pixels[1] == (*figures._LIGHT_MAP[0], 255) == ramp_light.getpixel((0, 0))
    assert pixels[2] == (*figures._LIGHT_MAP[2], 255) and pixels[3][3] == 0
    assert dark.getpixel((0, 0)) == (*figures._DARK_MAP[-1], 255) == ramp_dark.getpixel((127, 0))
    page = Page(text)
    assert page.data["matrices"] == [{"values": [[1.0, 0.0], [0.5, None]], "texts": ["cat", "dog"]}]
    assert "on the diagonal 1, elsewhere 0.25; in 50.0 % of the rows" in page.text


def test_map_projects_both_views():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(6, 2)))[0].T  # two directions of six
    flat = rng.normal(size=(30, 2)) @ plane
    gap = 50 * np.linalg.svd(plane)[2][-1]  # at a right angle to them
    texts = flat[::10] + gap
    item = EmbeddingMap(
        flat, texts, ["a", "b", "c"], np.arange(30) // 10, [f"g{i % 12:02d}" for i in range(30)], make_images(30)
    )
    result = EvalResult({})
    result.artefacts["map"]["x"] = item
    [data] = render(result).data["maps"]
    joint, centred = (np.asarray(view["points"]).reshape(-1, 2) for view in data["views"])
    assert (
        np.ptp(joint[:, 0]) == 1000 and abs(joint[:30, 0].mean() - joint[30:, 0].mean()) > 900
    )  # the gap is the main direction
    assert np.ptp(joint[:30, 0]) < 50
    wanted = np.concatenate([flat - flat.mean(0), texts - texts.mean(0)])
    distance = np.linalg.norm(wanted[:, None] - wanted, axis=-1)
    drawn = np.linalg.norm(centred[:, None] - centred, axis=-1)
    assert np.allclose(drawn / drawn.max(), distance / distance.max(), atol=0.005)  # a plane stays what it is
    assert data["views"][1]["share"] == "100.0\u202f%"
    assert data["images"] == 30 and data["textOfImage"] == [0] * 10 + [1] * 10 + [2] * 10
    # Twelve groups, ten colours: the nine most frequent have their own.
    assert data["groups"] == [f"g{i:02d}" for i in range(9)] + ["other"]
    assert data["group"][:12] == [*range(9), 9, 9, 9] and data["group"][30:] == [0, 9, 8]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(z_image=np.zeros((6, 3, 8))), "An example has several embeddings"),
        (dict(z_text=np.full((3, 8), np.nan)), "not finite"),
        (dict(z_text=np.zeros((0, 8)), texts=[]), "too few"),
    ],
)
def test_map_is_left_out_with_a_reason(change, sentence):
    item = make_map()
    for name, value in change.items():
        setattr(item, name, value)
    result = EvalResult({})
    result.artefacts["map"]["x"] = item
    page = render(result)
    assert sentence in page.text and page.data["maps"] == []


@pytest.mark.parametrize("width", [1, 2])
def test_map_of_collapsed_and_narrow_embeddings(width):
    item = make_map()
    item.z_image, item.z_text = np.ones((6, width)), np.ones((3, width))
    result = EvalResult({})
    result.artefacts["map"]["x"] = item
    [data] = render(result).data["maps"]
    assert set(data["views"][0]["points"]) == {500}


def test_panels_begin_with_the_cell_that_says_most():
    names = [f"emoji/{c}_concept_{v}_vendor" for c, v in emoji.CELLS]
    result = EvalResult({})
    result.artefacts["map"] = {name: make_map() for name in [*names, "mine"]}
    titles = re.findall("<h3>(.*?)</h3>", assembly.render(result, title="t").split('<section id="map">')[1])
    panel_of = tasks.panel_finder(result)
    assert titles == ["mine", *(panel_of(name)[1] for name in reversed(names))]
    assert panel_of(names[3]) == (1, "Unseen concepts, unseen vendor")
    assert panel_of("emoji_val/unseen_concept") == (0, "Unseen concepts (validation)")
    assert panel_of("emoji_val_ko/seen_concept_seen_vendor")[1] == "emoji_val_ko/seen_concept_seen_vendor"
