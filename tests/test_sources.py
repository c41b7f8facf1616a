import io
import json
import pickle

import numpy as np
import pytest
from example_helpers import write_array_record
from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, check_labels
from clip_jax.data.records import records as all_records
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.kept import Places, starts_of
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.selection import SelectedSource
from clip_jax.data.sources.spec import Spec, parse
from clip_jax.data.sources.tfds import TfdsSource
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import names_of


def jpeg(value=0, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 255 - value, 0)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def colour(record):
    return int(decode.decode_image(record["image"])[0, 0, 0])


def check(source, length):
    """What every source must do: its length, images that decode, and a copy in a worker that reads the same."""
    assert len(source) == length
    copy = pickle.loads(pickle.dumps(source))
    for index in range(length):
        record = source[index]
        assert decode.decode_image(record["image"]).dtype == np.uint8
        assert isinstance(record["texts"], list) and all(isinstance(text, str) for text in record["texts"])
        assert copy[index] == record
    assert source.name and isinstance(source.broken, dict)


# Source strings


def spec(base, *steps, weight=""):
    """A `Spec` whose steps are given as text, "key=value&key=value"."""
    pairs = (tuple(tuple(option.split("=", 1)) for option in step.split("&")) for step in steps)
    return Spec(base, tuple(pairs), weight)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("emoji", [spec("emoji")]),
        (" emoji ", [spec("emoji")]),
        ("scenes?objects=2-3&size=96", [spec("scenes", "objects=2-3&size=96")]),
        # Without a key and "=" a "?" is a wildcard and a "&" is part of a name.
        ("/data/?.tar", [spec("/data/?.tar")]),
        ("/data/000?.tar?index=x", [spec("/data/000?.tar", "index=x")]),
        ("/data/R&D/*.tar", [spec("/data/R&D/*.tar")]),
        ("a.csv?where=maker:R&D", [Spec("a.csv", ((("where", "maker:R&D"),),))]),
        ("a.csv?where=is:1=1", [Spec("a.csv", ((("where", "is:1=1"),),))]),
        ("a.csv?columns=b?.txt", [spec("a.csv", "columns=b?.txt")]),
        ("{00..09}.tar", [spec("{00..09}.tar")]),
        # Steps follow one another.
        (
            "a.tar?index=x?columns=y?where=k:v&label=z",
            [spec("a.tar", "index=x", "columns=y", "where=k:v&label=z")],
        ),
        ("my.source?a=1?by=k", [spec("my.source", "a=1", "by=k")]),
        # Weights belong to a mixture; a single part keeps its "*".
        ("emoji*3", [spec("emoji*3")]),
        ("/data/*", [spec("/data/*")]),
        ("a + b", [spec("a"), spec("b")]),
        ("a*3 + b*0.5", [spec("a", weight="3"), spec("b", weight="0.5")]),
        ("a*size + /data/*.tar", [spec("a", weight="size"), spec("/data/*.tar")]),
        ("/data/*.tar*2 + b", [spec("/data/*.tar", weight="2"), spec("b")]),
        ("a?by=k*2 + b?index=x*size", [spec("a", "by=k", weight="2"), spec("b", "index=x", weight="size")]),
        ("a?where=k:v*2", [spec("a", "where=k:v*2")]),
        ("a+b", [spec("a+b")]),
    ],
)
def test_grammar(text, parts):
    assert parse(text) == tuple(parts)


def test_the_text_of_the_first_steps():
    (part,) = parse("a.tar?index=x?where=k:v&label=z")
    assert [part.prefix(n) for n in range(3)] == ["a.tar", "a.tar?index=x", "a.tar?index=x?where=k:v&label=z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data: no data set is named in ''; write a name such as emoji, or a path"),
        ("  ", "data: no data set is named"),
        ("emoji + ", r"data: no data set is named in 'emoji \+ '"),
        ("?index=x", "data: no data set is named"),
        ("emoji?wher=vendor:noto", r"emoji\?wher=vendor:noto: unknown option 'wher' \(did you mean 'where'\?\)"),
        ("a.tar?captions=lines&where=a:b", "where= is a step of its own; write it after another '.'$"),
        ("https://h/{split}.jsonl", "a table is read from a local disk alone; clip_jax.tools.to_parquet"),
        ("a.tar?shard=b", "unknown option 'shard' .did you mean 'shards'"),
        ("emoji?xyz=1", "option 'xyz'; allowed: index, columns, uids, holdout, exchange, where, part, label, by, has"),
        ("emoji?where=vendor:noto&lable=group", "unknown option 'lable' .did you mean 'label'"),
        ("emoji?has=tags?colums=x", "emoji.has=tags.colums=x: unknown option 'colums' .did you mean 'columns'"),
        ("emoji?index=x&where=vendor:noto", r"emoji\?index=x&where=vendor:noto: index= takes no second option"),
        ("emoji?columns=x&label=group", "columns= takes no second option"),
    ],
)
def test_wrong_source_strings_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        make_source(text, "val_seen_vendor")
    assert "\n" not in str(error.value)


# TFDS


def write_tfds(folder, records, features, name="tiny", version="1.0.0", split="train"):
    from clip_jax.tools.build.tfds_writer import write_dataset

    splits = records if isinstance(records, dict) else {split: records}
    write_dataset(
        folder,
        name=name,
        version=version,
        features=features,
        splits=splits,
        description="",
        homepage="",
        citation="",
        license_text="",
    )
    return folder


def test_a_damaged_chunk_of_a_tfds_folder_is_bad_records(tmp_path):
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    records = [{"caption": f"c {i} {rng.bytes(500).hex()}"} for i in range(300)]
    folder = write_tfds(tmp_path / "t", records, {"caption": tfds.features.Text()})
    (file,) = (path for path in folder.rglob("*array_record*"))
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 40):
        data[place] ^= 255
    file.write_bytes(data)
    found = [record for _, record in all_records(make_source(str(folder)))]
    bad = [i for i, record in enumerate(found) if isinstance(record, BadRecord)]
    assert bad and all(record["texts"][0].startswith(f"c {i} ") for i, record in enumerate(found) if i not in bad)
    with pytest.raises(BadRecord, match="unreadable record"):
        make_source(str(folder))[bad[0]]


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    import tensorflow_datasets as tfds

    features = {
        "picture": tfds.features.Image(),
        "caption": tfds.features.Text(),
        "tags": tfds.features.Sequence(tfds.features.Text()),
        "kind": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["red_cat", "green dog"]),
        "score": np.float32,
    }
    records = [
        {
            "picture": jpeg(10 * i),
            "caption": f"thing {i} 문어",
            "tags": [f"t{j}" for j in range(i % 3)],
            "kind": "k",
            "label": i % 2,
            "score": i / 4,
        }
        for i in range(8)
    ]
    return write_tfds(
        tmp_path_factory.mktemp("tfds") / "tiny" / "1.0.0", {"train": records, "test": records[:3]}, features
    )


def test_tfds_folder(tiny_tfds):
    source = make_source(str(tiny_tfds))
    check(source, 8)
    record = source[5]
    assert isinstance(record["image"], bytes) and abs(colour(record) - 50) < 6 and "picture" not in record
    assert record["texts"] == ["thing 5 문어"] and record["tags"] == ["t0", "t1"] and record["score"] == 1.25
    assert (
        record["label"] == 1 and record["class_name"] == "green dog" and source.class_names == ["red_cat", "green dog"]
    )
    assert source[6]["tags"] == [] and source[0]["class_name"] == "red cat"


def test_examples_that_are_parsed_here_are_those_of_tfds(tmp_path, tiny_tfds, monkeypatch):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "text": tfds.features.Text(),
        "numbers": tfds.features.Sequence(np.int32),
        "names": tfds.features.Sequence(tfds.features.Text(), length=1),
        "half": np.float32,
        "long": tfds.features.Scalar(np.int64),
        "label": tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog"])),
    }
    some = {"image": jpeg(0), "text": "", "half": 0.1, "long": -(2**62), "names": ["문어"]}
    records = [some | {"numbers": [7] * n, "label": [1] * n} for n in (0, 1, 3)]
    folder = write_tfds(tmp_path / "1.0.0", {"train": records}, features)
    for path in (folder, tiny_tfds):
        source = TfdsSource(path)
        assert "<function _parse" in repr(source._parse)
        found = [record for _, record in all_records(source)]
        with monkeypatch.context() as patch:
            patch.setattr("clip_jax.data.sources.tfds._is_plain", lambda feature: False)
            of_tfds = TfdsSource(path)
        assert "deserialize_example_np" in repr(of_tfds._parse)
        assert found == [record for _, record in all_records(of_tfds)] == [source[i] for i in range(len(source))]
    assert source[6]["score"] == 1.5


def test_selections_of_a_tfds_folder_by_its_fields(tiny_tfds):
    assert make_source(f"{tiny_tfds}?where=score:1.25&has=tags")[0] == TfdsSource(tiny_tfds)[5]
    with pytest.raises(UserError, match="no record has the field 'tag' .did you mean 'tags'.*; fields: .*image, kind"):
        make_source(f"{tiny_tfds}?where=tag:t1")


@pytest.mark.parametrize(
    "feature, value, read",
    [
        ("Scalar(np.bool_)", True, True),
        ("Scalar(np.float64)", 0.5, 0.5),
        ("Tensor(shape=(2,), dtype=np.float32)", [0.5, 1.5], [0.5, 1.5]),
        ("Tensor(shape=(), dtype=np.int64, encoding='zlib')", 7, 7),
        ("Scalar(np.int64, optional=True)", None, None),
        ("Sequence({'id': np.int64})", [{"id": 1}], {"id": [1]}),
        ("Translation(['en', 'de'])", {"en": "a", "de": "b"}, {"en": "a", "de": "b"}),
    ],
)
def test_tfds_parses_examples_of_other_features(feature, value, read, tmp_path):
    import tensorflow_datasets as tfds

    features = {"x": eval(f"features.{feature}", vars(tfds) | {"np": np}), "text": tfds.features.Text()}
    source = TfdsSource(write_tfds(tmp_path / "1.0.0", {"train": [{"x": value, "text": "a"}]}, features))
    assert "deserialize_example_np" in repr(source._parse)
    expected = {f"x/{key}": item for key, item in read.items()} if isinstance(read, dict) else {"x": read}
    (record,) = (record for _, record in all_records(source))
    assert {key: np.asarray(item).tolist() for key, item in record.items() if key.startswith("x")} == expected


def test_tfds_splits_versions_and_fields(tiny_tfds, monkeypatch):
    assert len(make_source(str(tiny_tfds.parent), "test")) == 3
    assert len(make_source(str(tiny_tfds), "train[:50%]+test")) == 7
    assert make_source(str(tiny_tfds), text=["kind", "caption"])[0]["texts"] == ["k", "thing 0 문어"]
    assert make_source(str(tiny_tfds), label="kind").class_names == ["k"]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds.parent.parent))
    assert len(make_source("tfds:tiny")) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="tset"), "no split 'tset' \\(did you mean 'test'\\?\\); splits: "),
        (dict(split="test[:0]"), "split 'test\\[:0\\]' is empty"),
        (dict(text="captoin"), "no field 'captoin' \\(did you mean 'caption'\\?\\); fields: "),
    ],
)
def test_tfds_mistakes(tiny_tfds, arguments, message):
    with pytest.raises(UserError, match=message):
        make_source(str(tiny_tfds), **arguments)


def test_tfds_name_that_is_not_prepared(tiny_tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds.parent.parent))
    with pytest.raises(
        UserError,
        match="tny: not prepared in .* \\(did you mean .tiny.\\?\\).*tfds build tny --file_format=array_record",
    ):
        make_source("tfds:tny")


def test_tfds_configs(tmp_path, monkeypatch, tiny_tfds):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "small").symlink_to(tiny_tfds.parent)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(make_source("tfds:many/small")) == 8
    with pytest.raises(UserError, match="name one of its configurations: small"):
        make_source("tfds:many")


def test_tfds_in_tfrecord_format(tiny_tfds, tmp_path):
    for file in tiny_tfds.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        UserError, match="tfrecord, which cannot be read by index; prepare it with --file_format=array_record"
    ):
        make_source(str(tmp_path))


def test_tfds_several_captions_of_one_image(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
    }
    records = [
        {"image": jpeg(), "captions": [{"text": f"caption {j}", "id": j} for j in range(i + 1)]} for i in range(3)
    ]
    source = make_source(str(write_tfds(tmp_path / "coco", records, features, name="coco")))
    assert source[2]["texts"] == ["caption 0", "caption 1", "caption 2"] and source[0]["texts"] == ["caption 0"]


def test_tfds_text_under_a_label_name_is_no_label(tmp_path):
    import tensorflow_datasets as tfds

    records = [{"image": jpeg(), "category": "animals", "title": "cat"}]
    features = {"image": tfds.features.Image(), "category": tfds.features.Text(), "title": tfds.features.Text()}
    record = make_source(str(write_tfds(tmp_path / "t", records, features)))[0]
    assert "label" not in record and record["category"] == "animals"


def test_tfds_several_labels_of_one_image(tmp_path):
    import tensorflow_datasets as tfds

    label = tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "red_dog"]))
    features = {"image": tfds.features.Image(), "label": label, "title": tfds.features.Text()}
    records = [{"image": jpeg(), "label": labels, "title": "x"} for labels in ([1, 0], [])]
    source = make_source(str(write_tfds(tmp_path / "t", records, features)))
    assert [source[i]["label"] for i in range(2)] == [(1, 0), ()]
    assert source[0]["class_name"] == ["red dog", "cat"] and "class_name" not in source[1]


def test_embedded_emoji():
    source = make_source("emoji", "val_seen_vendor")
    record = source[0]
    assert decode.decode_image(record["image"]).shape == (64, 64, 3)
    assert record["texts"] == [record["name"]] and isinstance(record["tags"], list) and record["vendor"]


def test_unknown_names():
    with pytest.raises(
        UserError, match="emojis: no such file or folder \\(did you mean 'emoji'\\?\\); embedded data sets: "
    ):
        make_source("emojis")


# ArrayRecord


def test_array_record(tmp_path):
    for shard in range(2):
        examples = [
            {"jpeg_data": jpeg(10 * i + shard), "caption": f"{shard} {i}", "label": i, "tags": ["a", "b"]}
            for i in range(3)
        ]
        write_array_record(tmp_path / f"x.array_record-{shard:05d}-of-00002", examples)
    for path in (f"{tmp_path}/x.array_record*", str(tmp_path)):
        source = make_source(path)
        check(source, 6)
        assert source[4]["texts"] == ["1 1"] and source[4]["label"] == 1 and source[4]["tags"] == ["a", "b"]


def test_array_record_with_a_malformed_record(tmp_path):
    write_array_record(tmp_path / "x.array_record", [{"image": jpeg(), "text": "fine"}, b"\xff\xff\xff"])
    source = make_source(str(tmp_path / "x.array_record"))
    assert source[0]["texts"] == ["fine"]
    with pytest.raises(BadRecord, match="malformed record"):
        source[1]


@pytest.mark.parametrize("labels", [([1, 2], 3), (3, [2, 1, 2])])
def test_array_record_with_several_labels_of_one_image(tmp_path, labels):
    """A feature with one value is read as a scalar: the list in any of the first records decides for all."""
    rows = [{"image": jpeg(), "text": "a", "label": label} for label in labels]
    write_array_record(tmp_path / "x.array_record", rows)
    source = make_source(str(tmp_path / "x.array_record"))
    assert source.multi_label
    assert [source[i]["label"] for i in range(2)] == [tuple(dict.fromkeys(np.atleast_1d(label))) for label in labels]


def test_array_record_with_names_in_the_label_field(tmp_path):
    write_array_record(tmp_path / "x.array_record", [{"image": jpeg(), "text": "a", "label": ["dog", "cat"]}])
    path = str(tmp_path / "x.array_record")
    assert "label" not in make_source(path)[0]
    source = make_source(path, label="label")
    assert (source.class_names, source[0]["label"], source[0]["class_name"]) == (["cat", "dog"], (1, 0), ["dog", "cat"])


@pytest.mark.parametrize("content", [b"", b"not an array record" * 100])
def test_array_record_that_is_none(tmp_path, content):
    (tmp_path / "x.array_record").write_bytes(content)
    with pytest.raises(UserError, match="x.array_record"):
        make_source(str(tmp_path / "x.array_record"))


def test_array_record_without_records(tmp_path):
    write_array_record(tmp_path / "x.array_record", [])
    with pytest.raises(UserError, match=r"x.array_record: no usable sample in 1 shards \(empty\)"):
        make_source(str(tmp_path / "x.array_record"))


# Tables


def write_images(folder, count):
    (folder / "images").mkdir()
    for i in range(count):
        (folder / "images" / f"{i}.jpg").write_bytes(jpeg(10 * i))


def test_csv(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "a.csv").write_bytes(
        "\ufefffilepath,caption,class,extra\r\n"
        'images/0.jpg,"a cat, asleep",cat,1\r\n'
        'images/1.jpg,"two\nlines and ""quotes""",dog,2\r\n'
        "\r\n"
        "images/2.jpg,문어,cat,3\r\n"
        f"{tmp_path}/images/3.jpg,,dog,4\r\n".encode()
    )
    source = make_source(str(tmp_path / "a.csv"))
    check(source, 4)
    assert [source[i]["texts"] for i in range(4)] == [["a cat, asleep"], ['two\nlines and "quotes"'], ["문어"], [""]]
    assert [abs(colour(source[i]) - 10 * i) < 6 for i in range(4)] == [True] * 4
    assert source.class_names == ["cat", "dog"] and [source[i]["label"] for i in range(4)] == [0, 1, 0, 1]
    assert source[1]["extra"] == "2" and source[1]["class_name"] == "dog"
    assert make_source(str(tmp_path / "a.csv"), text=("extra", "caption"))[0]["texts"] == ["1", "a cat, asleep"]


def test_tsv_has_no_quoting(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "a.tsv").write_text('title\tpath\tlabel\n"unbalanced\timages/0.jpg\t7\nfine\timages/1.jpg\t9\n')
    source = make_source(str(tmp_path / "a.tsv"))
    check(source, 2)
    assert source[0]["texts"] == ['"unbalanced'] and source[1]["label"] == 9 and source.class_names is None


def test_jsonl(tmp_path):
    write_images(tmp_path, 3)
    rows = [
        {"image": "images/0.jpg", "captions": ["one", "two"]},
        {"image": "images/1.jpg", "captions": "only", "tags": ["x"]},
        {"image": "images/2.jpg"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    source = make_source(str(tmp_path / "{split}.jsonl"), "a")
    check(source, 3)
    assert [source[i]["texts"] for i in range(3)] == [["one", "two"], ["only"], []] and source[1]["tags"] == ["x"]


def test_bad_rows_are_bad_records(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "a.csv").write_bytes(
        b"path,text\nimages/0.jpg,fine\nnowhere.jpg,text\nonly one column\n,text\nimages/0.jpg,\xff\xfe\nimages,x\n"
    )
    source = make_source(str(tmp_path / "a.csv"))
    assert len(source) == 6 and source[0]["texts"] == ["fine"]
    for index, reason in {1: "missing file", 2: "malformed row", 3: "malformed row", 5: "unreadable file"}.items():
        with pytest.raises(BadRecord, match=reason):
            source[index]
    with pytest.raises(UnicodeEncodeError):  # invalid UTF-8 is kept as surrogates; the text view refuses it
        source[4]["texts"][0].encode("utf-8")

    (tmp_path / "a.jsonl").write_text(
        '{"image": "images/0.jpg", "text": "fine"}\n{"image": "images\n[1]\n{"text": "x"}\n{"image":3}\n'
    )
    source = make_source(str(tmp_path / "a.jsonl"))
    assert len(source) == 5 and source[0]["texts"] == ["fine"]
    for index in range(1, 5):
        with pytest.raises(BadRecord, match="malformed row"):
            source[index]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no column for the image path; name it with --config.data.image=COLUMN.*columns: none"),
        ("a.csv", b"foo,caption\n1,2\n", "no column for the image path.*columns: foo, caption"),
        ("a.csv", b'foo,"two\nlines \xff"\n', r"columns: foo, two lines \?$"),
        ("a.csv", b"path,caption\n", "no rows"),
        ("a.jsonl", b"\n", "no column for the image path"),
        (
            "a.csv",
            b'path,caption\nx,"' + b"y" * 200000,
            "a quote in the row that starts at byte 13 is never closed",
        ),
    ],
)
def test_unusable_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_source(str(tmp_path / name))


# Folders


def test_class_folders(tmp_path):
    for i, name in enumerate(["tabby_cat", "dog"]):
        (tmp_path / "train" / name / "deep").mkdir(parents=True)
        (tmp_path / "train" / name / "a.jpg").write_bytes(jpeg(50 * i))
        (tmp_path / "train" / name / "deep" / "b.PNG").write_bytes(jpeg(50 * i + 20))
        (tmp_path / "train" / name / "notes.md").write_text("not an image")
    (tmp_path / "train" / "tabby_cat" / "a.txt").write_text("my cat\n")
    (tmp_path / "train" / "empty").mkdir()
    for source in (
        make_source(str(tmp_path)),
        make_source(str(tmp_path / "train")),
        make_source(f"{tmp_path}/{{split}}"),
    ):
        check(source, 4)
        assert source.class_names == ["dog", "tabby_cat"] and [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]
        assert [source[i]["texts"] for i in range(4)] == [["dog"], ["dog"], ["my cat"], ["tabby cat"]]
        assert [abs(colour(source[i]) - c) < 6 for i, c in enumerate((50, 70, 0, 20))] == [True] * 4
    with pytest.raises(UserError, match="no split 'val'"):
        make_source(str(tmp_path), "val")


def test_flat_folder_with_captions_beside(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(jpeg())
    (tmp_path / "a.txt").write_text("a cat")
    source = make_source(str(tmp_path))
    check(source, 2)
    assert (
        source[0]["texts"] == ["a cat"]
        and source[1]["texts"] == []
        and "label" not in source[0]
        and source.class_names is None
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "no such file or folder"),
        (lambda p: p, "no images"),
        (lambda p: p / "*.tar", "no such file"),
        (lambda p: p / "{00000..00003}.tar", "00000.tar: no such file"),
        (lambda p: p / "*.array_record*", "no such file"),
        (lambda p: p / "a.tar.gz", "decompress it"),
        (lambda p: p / "a.xyz", "unknown kind of data"),
        (lambda p: p / "a.csv", "no such file"),
    ],
)
def test_missing_or_empty_paths(tmp_path, make, message):
    (tmp_path / "a.xyz").write_bytes(b"?")
    with pytest.raises(UserError, match=message) as error:
        make_source(str(make(tmp_path)))
    assert "\n" not in str(error.value)


# Memory and mixtures


def test_memory():
    check(MemorySource([{"image": jpeg(), "texts": ["x"]}, {"image": jpeg()}]), 2)
    with pytest.raises(UserError, match="empty"):
        MemorySource([])


def test_mixture(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name / "c").mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / "c" / f"{i}.jpg").write_bytes(jpeg(i))
    source = make_source(f"{tmp_path}/a*3 + {tmp_path}/b*0.5 + {tmp_path}/a")
    check(source, 7)
    assert [source[i]["source_id"] for i in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert source.weights == [3.0, 0.5, 1.0] and source.class_names == ["c"]
    with pytest.raises(UserError, match="weights must be positive"):
        make_source(f"{tmp_path}/a*0 + {tmp_path}/b")
    with pytest.raises(UserError, match="nowhere: no such file"):
        make_source(f"{tmp_path}/a + nowhere")
    assert isinstance(source, MixtureSource)


def test_classes_of_a_mixture_are_told_apart_by_name(folder_of_tables):
    """Two tables of integer labels: the names of a column class_name decide, whatever the numbers."""
    animals, cars = (make_source(str(path)) for path in folder_of_tables("named"))
    assert animals.class_names == ["cat", "dog"] and cars.class_names == ["car", "cat"]
    both = MixtureSource([animals, cars], [1, 1])
    assert both.class_names == ["cat", "dog", "car"]
    assert [(r["label"], r["class_name"]) for r in map(both.__getitem__, range(4))] == [
        (0, "cat"), (1, "dog"), (2, "car"), (0, "cat"),
    ]  # fmt: skip
    both.check_labels()


def pets(*names, label=0, name="pets"):
    """A source of one image of each class."""
    image = np.zeros((4, 4, 3), np.uint8)
    return MemorySource([{"image": image, "label": label + i} for i in range(len(names))], name, class_names=names)


def test_classes_of_a_mixture_are_compared_by_their_canonical_names():
    """A class has the name of the first source; synonyms of a record stay."""
    a, b = pets("Cat", "fire_truck", "St. Bernard"), pets("fire truck", "cat", "st bernard", "owl", "Owl's")
    synonyms = MemorySource([{"label": 0, "class_name": ["CAT", "tom cat"]}], class_names=["CAT"])
    both = MixtureSource([a, b, synonyms], [1, 1, 1])
    assert both.class_names == ["Cat", "fire_truck", "St. Bernard", "owl", "Owl's"]
    assert [both[i]["label"] for i in range(9)] == [0, 1, 2, 1, 0, 2, 3, 4, 0]
    assert [both[i]["class_name"] for i in (1, 3, 4, 8)] == ["fire truck", "fire truck", "Cat", ["Cat", "tom cat"]]
    both.check_labels()
    with pytest.raises(UserError, match="a record has label 9"):
        MixtureSource([a, pets("cat", label=9)], [1, 1])[3]


def test_classes_that_one_source_tells_apart_stay_apart():
    """Then the spelling counts, and a name that fits several of them is an error where labels count."""
    apart = pets("Cat", "cat", name="apart")
    both = MixtureSource([pets("cat"), apart], [1, 1])
    both.check_labels()
    assert both.class_names == ["cat", "Cat"] and [both[i]["label"] for i in range(3)] == [0, 1, 0]
    either = MixtureSource([apart, pets("CAT", name="loud")], [1, 1])
    with pytest.raises(UserError, match=r"the class 'CAT' of loud may be each of the classes \['Cat', 'cat'\]"):
        check_labels(either)


def test_numbers_without_names_in_several_sources_are_an_error_where_labels_count(folder_of_tables):
    paths = folder_of_tables("numbers")
    tables = [make_source(str(path)) for path in paths]
    both = MixtureSource(tables, [1, 1])
    with pytest.raises(UserError, match="the labels of .* are numbers without class names.*; add a column class_name"):
        both.check_labels()
    with pytest.raises(UserError, match="numbers without class names"):
        names_of(both, None, "task")
    late = MemorySource([{"label": label} for label in (None, -1, 3)], "late")
    with pytest.raises(UserError, match="the labels of .*animals_numbers.jsonl, late are numbers"):
        MixtureSource([tables[0], late], [1, 1]).check_labels()
    MixtureSource([tables[0], MemorySource([{"label": None}])], [1, 1]).check_labels()
    kept = Places(np.arange(2), starts_of(both))
    with pytest.raises(UserError, match="numbers without class names"):
        check_labels(SelectedSource(both, kept, "some"))
    check_labels(SelectedSource(both, kept, "some", "name", ["pet"]))


def test_the_same_table_has_the_same_numbers(folder_of_tables, tmp_path):
    """Whatever the weight, the way to the file and the selection; another label column has other numbers."""
    path = folder_of_tables("numbers")[0]
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "words.txt").write_text("a\nb\n")
    parts = [f"{path}*2", f"{tmp_path}/../{tmp_path.name}/{path.name}?where=vendor:cat", f"{tmp_path}/link.jsonl"]
    parts += [f"{path}?columns={tmp_path}/words.txt?part=record:1/2"]
    same = make_source(" + ".join(parts))
    same.check_labels()
    assert [same[i]["label"] for i in range(len(same) - 1)] == [3, 7, 3, 3, 7]
    make_source(f"{path}?by=vendor").check_labels()
    other = MixtureSource([make_source(str(path)), make_source(str(path), label="size")], [1, 1])
    with pytest.raises(UserError, match="numbers without class names"):
        other.check_labels()


def test_numbers_without_names_say_how_to_name_them(folder_of_tables, tmp_path):
    numbers, named = folder_of_tables("numbers")[0], folder_of_tables("named")[1]
    with numbers.open("a") as file:
        file.write('\n{"image": "x.png", "label": 8, "class_name": "cow"}')
    for mixture in (f"{numbers} + {named}", f"{numbers}?part=record:1/2 + {named}"):
        with pytest.raises(UserError, match="write the class_name of label 3, 7 in a row of .*animals_numbers.jsonl"):
            make_source(mixture).check_labels()
    with pytest.raises(UserError, match="have class names; write the class_name of label 3, 7"):
        make_source(f"{numbers} + {named}")[0]
    memory = MemorySource([{"label": 0}], "mine")
    with pytest.raises(UserError, match="; give the class_names of mine"):
        check_labels(MixtureSource([memory, pets("cat")], [1, 1]))


@pytest.fixture
def folder_of_tables(tmp_path):
    def make(kind):
        paths = []
        rows = {"animals": [(3, "cat"), (7, "dog")], "cars": [(3, "car"), (9, "cat")]}
        for table, labels in rows.items():
            Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
            lines = []
            for number, name in labels:
                row = {"image": "x.png", "text": name, "label": number, "vendor": name, "size": number % 2}
                lines.append(json.dumps(row | ({"class_name": name} if kind == "named" else {})))
            paths.append(tmp_path / f"{table}_{kind}.jsonl")
            paths[-1].write_text("\n".join(lines))
        return paths

    return make
