"""Values of tables, folders and fields: labels, captions, class folders. What is ambiguous is an error."""

import csv
import io
import json
import math

import numpy as np
import pytest
from data_helpers import PLAIN, Bytes, encoded, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data.loader import Loader, check_source, iterate_once
from clip_jax.data.records import BadRecord, read_label, read_texts
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView, RewritesView, TextView, make_example
from clip_jax.errors import UserError

quick = settings(max_examples=40, deadline=None, derandomize=True)
_NAMES = ("cat", "dog", "grey whale", "2.5", "1e3", "x7")
_MISSING = ("", "  ", "NaN", None, math.nan)


def labels_of(source):
    return [source[i]["label"] for i in range(len(source))]


def label_table(folder, labels):
    rows = [{"caption": "x", "label": label} for label in labels]
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"image": "a.png", **row}) for row in rows))
    return str(folder / "t.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    (folder / "a.png").write_bytes(encoded(3))
    return folder


# Labels


def spellings(number):
    return st.sampled_from([number, float(number), str(number), f"{number}.0", f" {number}. "])


@quick
@given(st.data())
def test_a_column_of_numbers_is_integers_however_they_are_written(folder, data):
    numbers = data.draw(st.lists(st.none() | st.integers(-1, 2000), min_size=1, max_size=8))
    written = [data.draw(st.sampled_from(_MISSING) if n is None else spellings(n)) for n in numbers]
    source = make_source(label_table(folder, written))
    assert labels_of(source) == [-1 if n is None else n for n in numbers] and source.class_names is None


@quick
@given(st.lists(st.none() | st.sampled_from(_NAMES), min_size=1, max_size=8), st.sampled_from(_MISSING))
def test_a_column_of_text_names_classes(folder, names, missing):
    source = make_source(label_table(folder, [missing if name is None else name for name in names]))
    classes = sorted(set(names) - {None})
    assert (source.class_names or []) == classes
    assert labels_of(source) == [-1 if name is None else classes.index(name) for name in names]
    assert [source[i].get("class_name") for i in range(len(names))] == names


@quick
@given(st.permutations([3, "cat", "", None, "10.0"]))
def test_a_mixture_of_numbers_and_text_names_examples_of_both(folder, labels):
    with pytest.raises(UserError, match="'label' mixes integers, such as 3, and class names, such as 'cat'; write"):
        make_source(label_table(folder, labels))


@quick
@given(st.data())
def test_lists_of_labels_are_tuples(folder, data):
    """Labels are numbers or names. One label of an image becomes a tuple of one; an image without labels has ()."""
    kind = data.draw(st.sampled_from([st.integers(0, 9), st.sampled_from(_NAMES[:3])]))
    lists = data.draw(st.lists(st.lists(kind, max_size=4), min_size=1, max_size=5))
    single = [data.draw(kind), None, ""]
    written = [[data.draw(spellings(v)) if isinstance(v, int) else v for v in values] + [None] for values in lists]
    source = make_source(label_table(folder, written + single))
    expected = [tuple(dict.fromkeys(values)) for values in lists] + [(single[0],), (), ()]
    found = labels_of(source)
    assert source.multi_label and all(isinstance(label, tuple) for label in found)
    if isinstance(single[0], str):
        assert source.class_names == sorted({name for names in expected for name in names})
        found = [tuple(source.class_names[i] for i in label) for label in found]
        assert [source[i].get("class_name", []) for i in range(len(source))] == [list(names) for names in expected]
    assert found == expected


@pytest.mark.parametrize("value", [{"id": 1}, [{"id": 1}], [[1], 2]])
def test_objects_are_no_labels(folder, value):
    with pytest.raises(UserError, match="a label is an integer, a class name, or a list of them") as error:
        make_source(label_table(folder, ["cat", value]))
    assert "\n" not in str(error.value)


def test_several_labels_stay_out_of_batches_and_are_one_line_where_one_is_needed(folder):
    source = make_source(label_table(folder, [["cat", "dog"], "dog", None]))
    joined = MixtureSource([source, MemorySource([source[0] | {"label": 0}], class_names=["Dog"])], [1, 1])
    (batch,) = iterate_once(joined, PLAIN, Bytes(), 4)
    np.testing.assert_array_equal(batch["label"], [-1, -1, -1, 1])
    assert [joined[i]["label"] for i in range(4)] == [(0, 1), (1,), (), 1]
    views = (PLAIN[0], TextView("text", 16, class_templates=("a {class_name}",)))
    for data in (source, joined, make_source(f"{source.name}?part=record:1/1")):
        with pytest.raises(UserError, match="several labels of one image, but a text of the class"):
            check_source(data, views, Bytes())
    check_source(source, PLAIN, Bytes())


def test_a_selection_makes_classes_of_lists_and_none_of_nan_and_objects(folder):
    path = write_table(folder, [{"caption": "x", "kind": kind} for kind in ("a", math.nan, "b")])
    source = make_source(f"{path}?label=kind")
    assert source.class_names == ["a", "b"] and [source[i].get("label") for i in range(3)] == [0, None, 1]
    kinds = [["b", "a", "b"], "a", math.nan, ["c", None], ["z"]]
    path = write_table(folder, [{"caption": "x", "kind": kind, "keep": i < 4} for i, kind in enumerate(kinds)])
    source = make_source(f"{path}?where=keep:True&label=kind")
    assert source.class_names == ["a", "b", "c"] and labels_of(source) == [(1, 0), (0,), (), (2,)]
    assert source[0]["class_name"] == ["b", "a"]
    with pytest.raises(UserError, match="record 0 has .'en': 'a'. in 'kind'; a class is one name, or several names"):
        make_source(f"{write_table(folder, [{'caption': 'x', 'kind': {'en': 'a'}}])}?label=kind")


@pytest.mark.parametrize("label", [-2, 2**31, 10**30])
def test_numbers_that_are_no_labels(folder, label):
    with pytest.raises(UserError, match="holds -?[0-9]+; labels go from 0|mixes integers"):
        make_source(label_table(folder, [0, label]))
    with pytest.raises(BadRecord, match="label out of range|unknown label"):
        MemorySource([{"label": label}])[0]


def test_numbers_and_class_names_of_a_table_agree(folder):
    rows = [{"image": "a.png", "label": i % 2, "class_name": name} for i, name in enumerate(["cat", "dog", "cat"])]
    (folder / "n.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_of(make_source(f"{folder}/n.jsonl")) == [0, 1, 0]
    (folder / "n.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"class_name": "cow"}])))
    (folder / "t.csv").write_text(
        "image,label,class_name\na.png,9,crane\na.png,2,dog\na.png,4,crane \na.png,9, crane\n"
    )
    source = make_source(f"{folder}/t.csv")  # ImageNet has a bird and a machine of this name
    assert source.class_names == ["dog", "crane", "crane"] and labels_of(source) == [2, 0, 1, 2]
    with pytest.raises(UserError, match="label 0 has the class names 'cat' and 'cow' in column 'class_name'"):
        make_source(f"{folder}/n.jsonl")


def test_a_missing_label_is_minus_one_in_batches(folder):
    source = make_source(label_table(folder, [None, 4, "", math.nan]))
    (batch,) = iterate_once(source, PLAIN, Bytes(), 4)
    np.testing.assert_array_equal(batch["label"], [-1, 4, -1, -1])


def test_labels_in_memory():
    source = MemorySource(
        [{"label": value} for value in (1.0, "1", None, math.nan, np.int64(0), "b")], class_names="ab"
    )
    assert labels_of(source) == [1, 1, -1, -1, 0, 1]
    assert labels_of(MemorySource([{"label": 1}, {"label": ["b", None, 0]}], class_names="ab")) == [(1,), (1, 0)]
    for value in (0.5, "x", {"id": 1}):
        with pytest.raises(BadRecord, match="unknown label|several labels"):
            MemorySource([{"label": value}])[0]
    assert read_label(()) is None


# Captions

_texts = st.text("ab 문", max_size=4)
_not_text = st.booleans() | st.dictionaries(st.sampled_from(["en", "id"]), _texts) | st.lists(_texts, max_size=2)
_values = st.one_of(
    _texts.map(lambda t: (t, t)),
    st.integers(-9, 99).map(lambda n: (n, str(n))),
    st.sampled_from([None, math.nan]).map(lambda v: (v, None)),
    _texts.map(lambda t: ({"caption": t, "id": 3}, t)),
    _texts.map(lambda t: ({"raw": t, "tokens": []}, t)),
    _not_text.map(lambda v: (v, False)),
)


@quick
@given(st.lists(_values, max_size=4))
def test_captions_are_text_or_counted(folder, pairs):
    (folder / "c.jsonl").write_text(json.dumps({"image": "a.png", "caption": [value for value, _ in pairs]}))
    record = make_source(f"{folder}/c.jsonl")[0]
    texts, odd = [t for _, t in pairs if isinstance(t, str)], any(t is False for _, t in pairs)
    assert record["texts"] == texts
    usable = [text for text in texts if text.strip()]
    if usable:
        assert TextView().caption(record, None) == usable[0] and "caption_error" not in record
        return
    for view in (TextView(), TextView(templates=("{caption}",))):
        with pytest.raises(BadRecord, match="caption is not text" if odd else "empty caption"):
            view.caption(record, None)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("nan", ["nan"]),
        (b"a \xff", ["a \udcff"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.float32("nan"), []),
        (("a", None), ["a"]),
        ({"caption": None}, None),
        (np.zeros((2, 2)), None),
        ([["a"]], None),
        (True, None),
        (math.inf, None),
    ],
)
def test_values_of_a_caption_field(value, texts):
    assert read_texts(value) == (texts or [], texts is not None)
    source = MemorySource([{"texts": value}])
    assert source[0]["texts"] == (texts or []) and ("caption_error" in source[0]) == (texts is None)


def test_captions_that_are_not_text_are_counted_by_the_loader(tmp_path):
    rows = [{"caption": f"c {i}"} for i in range(15)] + [{"caption": {"en": "c"}}]
    loader = Loader(make_source(write_table(tmp_path, rows)), PLAIN, Bytes(), batch_size=16, seed=0)
    next(loader)
    loader.close()
    assert loader.skipped == {"caption is not text": 1}


def test_rewrites_follow_the_rule_and_keep_their_places():
    view = RewritesView(context=16, rewrites=("rewrites",), count=2)
    blank = {"texts": ["", "a cat", " "], "rewrites": ["x", "the red cat", "z"]}  # no draw may make a record unusable
    for rng in (None, *map(np.random.default_rng, range(9))):
        assert [Bytes().decode(row) for row in view(blank, rng, Bytes())] == ["a cat", "the red cat", "a cat"]
    rows = view({"texts": ["a cat"], "rewrites": [None, "the red cat"]}, None, Bytes())
    assert [Bytes().decode(row) for row in rows] == ["a cat", "a cat", "the red cat"]
    for value in ([True], {"en": "a cat sits"}, [["a cat sits"]]):
        with pytest.raises(BadRecord, match="rewrite is not text"):
            view({"texts": ["a cat"], "rewrites": value}, None, Bytes())


# Tables


@pytest.mark.parametrize(("end", "sep"), [("csv", ","), ("tsv", "\t"), ("jsonl", None)])
def test_one_long_text_is_truncated(folder, end, sep):
    texts = ["red " * (50_000 if i == 2 else 1) for i in range(4)]
    if sep is None:
        text = "\n".join(json.dumps({"image": "a.png", "caption": text}) for text in texts)
    else:
        text = f"image{sep}caption\n" + "".join(f"a.png{sep}{text}\n" for text in texts)
    (folder / f"long.{end}").write_text(text)
    tokenizer, views = make_tokenizer("sentencepiece"), (ImageView("image", 8), TextView("text", 16))
    (batch,) = iterate_once(make_source(f"{folder}/long.{end}"), views, tokenizer, 4)
    assert batch["mask"].all() and batch["text"][2, -1] == tokenizer.eot_id


def test_a_name_that_stands_twice_in_the_header(folder):
    (folder / "twice.csv").write_text("image,caption,caption\na.png,x,y\n")
    with pytest.raises(UserError, match="2 columns are named 'caption'; rename them"):
        make_source(f"{folder}/twice.csv")


_cells = st.text('a ,"\n\t문', max_size=6).filter(lambda t: t == t.strip())


@quick
@given(st.lists(_cells, min_size=1, max_size=6))
def test_cells_of_a_csv(folder, cells):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["image", "caption"], *(["a.png", cell] for cell in cells)])
    (folder / "cells.csv").write_bytes(out.getvalue().encode())
    source = make_source(f"{folder}/cells.csv")
    assert [source[i]["texts"] for i in range(len(source))] == [[cell] for cell in cells]
    (folder / "cells.csv").write_bytes(out.getvalue().encode() + b'a.png,"never\nclosed\n')
    with pytest.raises(UserError, match="a quote in the row that starts at byte [0-9]+ is never closed"):
        make_source(f"{folder}/cells.csv")


# Folders


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(9) if data is None else data)


def test_hidden_entries_and_resource_forks_are_no_classes(tmp_path):
    for name in ("cat", "dog"):
        write(tmp_path / name / "1.png")
        write(tmp_path / name / "._1.png", b"\0\5\x16\7")
        write(tmp_path / name / ".thumbs" / "1.png")
        write(tmp_path / name / "__MACOSX" / "1.png")
        write(tmp_path / name / ".DS_Store", b"x")
    for junk in (".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "._0.png", ".git/x.jpg"):
        write(tmp_path / junk)
    source = make_source(str(tmp_path))
    assert source.class_names == ["cat", "dog"] and labels_of(source) == [0, 1] and not source.broken


def test_every_ending_of_images_is_read_or_counted(tmp_path):
    forms = {
        "jpg": "JPEG",
        "jpeg": "JPEG",
        "jpe": "JPEG",
        "jfif": "JPEG",
        "JPG": "JPEG",
        "avif": "AVIF",
        "tiff": "TIFF",
    }
    for ending, form in forms.items():
        write(tmp_path / "cat" / f"1.{ending}", encoded(200, form))
    write(tmp_path / "cat" / "2.HEIC", b"?")
    write(tmp_path / "cat" / "3.jxl", b"?")
    write(tmp_path / "cat" / "4.PPM", encoded(200, "PPM"))
    source = make_source(str(tmp_path))
    assert source.broken.pop("image that ends in .ppm") == 1
    known = [end for end in (".heic", ".jxl") if end in Image.registered_extensions()]
    assert len(source) == len(forms) + len(known)
    assert source.broken.total() == 2 - len(known)
    if not known:
        assert source.broken == {"HEIC image": 1, "JPEG XL image": 1}


@pytest.mark.parametrize("beside", [".txt", ".json", None])
def test_shards_of_img2dataset_are_no_classes(tmp_path, beside):
    for shard in ("00000", "00001"):
        for i in range(2):
            write(tmp_path / shard / f"{shard}{i:04d}.jpg", encoded(i, "JPEG"))
            if beside:
                write(tmp_path / shard / f"{shard}{i:04d}{beside}", b'{"caption": "x"}')
    source = make_source(str(tmp_path))
    assert source.class_names is None and len(source) == 4
    assert all("label" not in source[i] or source[i]["label"] == -1 for i in range(4))
    assert [source[i]["texts"] for i in range(4)] == [['{"caption": "x"}'] if beside == ".txt" else []] * 4


def test_classes_whose_names_are_numbers(tmp_path):
    for name in ("0", "1", "00012"):
        write(tmp_path / name / "1.png")
    assert make_source(str(tmp_path)).class_names == ["0", "00012", "1"]


def test_templates_follow_the_rule():
    view = TextView(templates=("{name}: {tags}", "{name}"))
    assert view.caption({"name": "cat", "tags": ["a", None, math.nan, 3]}, None) == "cat: a, 3"
    assert view.caption({"name": "cat", "tags": math.nan}, None) == "cat"
    for name, reason in ((None, "empty caption"), (True, "caption is not text"), ({"en": "x"}, "caption is not text")):
        with pytest.raises(BadRecord, match=reason):
            view.caption({"name": name, "tags": ["a"]}, None)


def test_a_label_of_none_from_any_source():
    assert "label" not in make_example({"texts": ["x"], "label": None}, 0, (TextView(context=8),), Bytes())
