"""Layouts of published data: Karpathy's JSON, COCO's annotations, ImageFolder's table, captions on lines."""

import io
import json
import pickle
import tarfile

import pytest

from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source, tar
from clip_jax.data.sources.splits import evaluation_split, list_splits
from clip_jax.errors import UserError
from clip_jax.evaluation.tasks import parse_task
from tests.data_helpers import encoded


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value) if not isinstance(value, str) else value.encode())


def texts(source):
    return [record["texts"] for record in map(source.__getitem__, range(len(source)))]


def karpathy(splits, **fields):
    images = [
        {"filename": f"{i}.png", "imgid": i, "split": split, "sentids": [i], "cocoid": 10 + i}
        | {"sentences": [{"raw": f"one of {i}", "tokens": ["one"]}, {"raw": f"two of {i}", "tokens": ["two"]}]}
        | fields
        for i, split in enumerate(splits)
    ]
    return json.dumps({"images": images, "dataset": "coco"})


def test_karpathys_coco(tmp_path):
    for i in range(5):
        put(tmp_path / "pictures" / "val2014" / f"{i}.png", i)
    put(tmp_path / "dataset_coco.json", karpathy(["test", "restval", "train", "val", "test"], filepath="val2014"))
    base = f"{tmp_path}/dataset_coco.json"
    spec = f"{base}?images={tmp_path}/pictures"
    assert list_splits(spec) == ["test", "restval", "train", "val"] and evaluation_split(spec) == "test"
    assert texts(make_source(spec, "test")) == [["one of 0", "two of 0"], ["one of 4", "two of 4"]]
    train = make_source(spec)
    assert [train[i]["split"] for i in range(2)] == ["restval", "train"]  # restval is trained on, as since VSE++
    assert len(make_source(f"{spec}?where=split:train")) == 1 and len(make_source(spec, "restval")) == 1
    train = pickle.loads(pickle.dumps(train))  # as in a worker process
    assert train[1]["image"] == encoded(2) and train[1]["cocoid"] == 12 and train[1]["path"].endswith("2.png")
    task = parse_task(f"retrieval(source='{spec}', name='coco')")
    task.check_sources()
    task.open_sources()
    (tmp_path / "pictures" / "val2014" / "3.png").unlink()
    for wrong, split, message in [
        (base, "train", "no picture found, such as .*1.png; give the folder of the pictures: .*json.images=FOLDER"),
        (spec, "tets", "no split 'tets' .did you mean 'test'"),
        (spec + "&captions=lines", "train", "the only option of a JSON file of captions is images=FOLDER"),
        (f"{tmp_path}/pictures?images=x", "train", "images=x is an option of JSON files of captions alone"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            make_source(wrong, split)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no picture found"):
        make_source(spec, "val")
    with pytest.raises(UserError, match="text=raw: a JSON file of captions has no fields"):
        make_source(spec, text="raw")


def test_karpathys_flickr_and_coco_annotations(tmp_path):
    for i in range(2):
        put(tmp_path / f"{i}.png", i)
    put(tmp_path / "dataset_flickr30k.json", karpathy(["train", "test"]))
    source = make_source(f"{tmp_path}/dataset_flickr30k.json", "test")
    assert len(source) == 1 and source[0]["texts"] == ["one of 1", "two of 1"] and source[0]["image"] == encoded(1)
    images = [{"id": 7, "file_name": "0.png", "license": 3}, {"id": 8, "file_name": "1.png"}]
    found = [{"image_id": 8, "caption": "b"}, {"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "c"}]
    put(tmp_path / "captions_val2017.json", json.dumps({"images": images, "annotations": found}))
    source = make_source(f"{tmp_path}/captions_val2017.json")
    assert texts(source) == [["a"], ["b", "c"]] and source[0]["license"] == 3
    (tmp_path / "0.png").unlink()
    with pytest.raises(BadRecord, match="missing file"):
        source[0]
    for name, content, message in [("a", "[1]", "neither Karpathy's"), ("b", "{", "cannot be read as JSON")]:
        put(tmp_path / f"{name}.json", content)
        with pytest.raises(UserError, match=message):
            make_source(f"{tmp_path}/{name}.json")
    with pytest.raises(UserError, match="no such file or folder"):
        make_source("no_such.json")


def test_image_folder_with_a_table(tmp_path):
    """As `datasets.load_dataset("imagefolder")`: a table in each split, or one for all."""
    for split in ("train", "test"):
        for i, name in enumerate(("a.png", "b.png")):
            put(tmp_path / "each" / split / name, i)
        rows = f"file_name,text,source\na.png,{split} a,x\nb.png,{split} b,y\n"
        put(tmp_path / "each" / split / "metadata.csv", rows)
        put(tmp_path / "one" / split / "c.png", 2)
    each = make_source(f"{tmp_path}/each", "test")
    assert texts(each) == [["test a"], ["test b"]] and each[1]["source"] == "y" and each[1]["image"] == encoded(1)
    assert (
        texts(make_source(f"{tmp_path}/each"))
        == texts(make_source(f"{tmp_path}/each/{{split}}"))
        == [
            ["train a"],
            ["train b"],
        ]
    )
    lines = [{"file_name": f"{split}/c.png", "caption": [split, "c"]} for split in ("test", "train")]
    put(tmp_path / "one" / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert texts(make_source(f"{tmp_path}/one", "test")) == [["test", "c"]]
    assert list_splits(f"{tmp_path}/one") == ["test", "train"]
    assert make_source(f"{tmp_path}/each", text="source")[0]["texts"] == ["x"]
    with pytest.raises(UserError, match="no field 'txet' .did you mean 'text'"):
        make_source(f"{tmp_path}/each", text="txet")
    with pytest.raises(UserError, match="a folder with metadata.csv has no captions= and no shards="):
        make_source(f"{tmp_path}/each?captions=lines")
    put(tmp_path / "each" / "train" / "metadata.jsonl", "{}")
    with pytest.raises(UserError, match="holds metadata.csv and metadata.jsonl; remove one"):
        make_source(f"{tmp_path}/each")
    put(tmp_path / "bad" / "metadata.csv", "filename,text\na.png,b\n")
    with pytest.raises(
        UserError, match="no column 'file_name' with the paths of the pictures; columns: filename, text"
    ):
        make_source(f"{tmp_path}/bad")


def test_image_folder_with_a_table_and_classes(tmp_path):
    for i, name in enumerate(("dog/1.png", "cat/1.png", "cat/2.png")):
        put(tmp_path / name, i)
    put(tmp_path / "metadata.csv", "file_name,text\ndog/1.png,runs\ncat/1.png,sleeps\n./cat/2.png,eats\n")
    source = make_source(str(tmp_path))
    assert source.class_names == ["cat", "dog"]
    assert [(source[i]["label"], source[i]["class_name"], source[i]["texts"]) for i in range(3)] == [
        (1, "dog", ["runs"]),
        (0, "cat", ["sleeps"]),
        (0, "cat", ["eats"]),
    ]
    put(tmp_path / "metadata.csv", "file_name,label\ndog/1.png,x\ncat/1.png,y\n")
    assert make_source(str(tmp_path)).class_names == ["x", "y"]
    put(tmp_path / "one" / "images" / "1.png", 1)
    put(tmp_path / "one" / "metadata.csv", "file_name,text\nimages/1.png,a picture\n")
    assert make_source(f"{tmp_path}/one").class_names is None  # a folder of pictures is no class


def test_captions_on_the_lines_of_a_text_file(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / f"{name}.png")
    put(tmp_path / "a.txt", "a cat\r\n\na tabby cat\n")
    assert texts(make_source(f"{tmp_path}?captions=lines")) == [["a cat", "a tabby cat"], []]
    assert texts(make_source(f"{tmp_path}")) == [["a cat\r\n\na tabby cat"], []]
    put(tmp_path / "t.csv", "image\na.png\n")
    with pytest.raises(UserError, match="an option of tar shards and folders of images alone"):
        make_source(f"{tmp_path}/t.csv?captions=lines")


def test_class_names_in_the_json_of_tar_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, breed in enumerate(("pug", "husky", "pug")):
            for name, data in (
                (f"{i}.png", encoded(i)),
                (f"{i}.cls", f"{breed} dog".encode()),
                (f"{i}.json", json.dumps({"breed": breed, "label": breed}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    spec = f"{tmp_path}/a.tar"
    for field, names in (("breed", ["husky", "pug"]), ("label", ["husky", "pug"]), ("cls", ["husky dog", "pug dog"])):
        source = make_source(spec, label=field)
        assert source.class_names == names and [source[i]["label"] for i in range(3)] == [1, 0, 1]
        assert source[1]["class_name"] == names[0]
    assert "label" not in make_source(spec)[0]
    labels = [tar.preferred({"cls": cls})["label"] for cls in (b"pug dog", b"3", b"?", b"nan")]
    assert labels == [None, "cls", "cls", "cls"] and tar.preferred({})["label"] is None
    with pytest.raises(UserError, match="has no labels; its field 'label' holds text: set label='label'"):
        parse_task(f"zeroshot('{spec}')").open_sources()
    parse_task(f"zeroshot('{spec}', label='breed')").open_sources()
