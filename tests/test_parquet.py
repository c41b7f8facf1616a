"""Parquet and Arrow files as shards, Hugging Face's folders, and columns as Parquet."""

import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import Bytes, assert_equal, concatenate, encoded, loader, take, write_table
from test_tar_blocks import pair, write_tar
from web_server import serve_as_hub, web_server

from clip_jax.data import clients, decode, remote
from clip_jax.data.reading import Reading
from clip_jax.data.records import BadRecord
from clip_jax.data.records import records as all_records
from clip_jax.data.sources import (
    MemorySource,
    arrow,
    arrow_columns,
    columns,
    make_source,
    parquet,
    parquet_columns,
    table,
)
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError
from clip_jax.tools import manifest, to_parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: What `datasets` writes into the metadata of a schema.
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["wild", "tame"], "_type": "ClassLabel"}, "_type": "Sequence"},
    "caption": {"dtype": "string", "_type": "Value"},
}
SCHEMA = pa.schema([("image", IMAGE), ("label", pa.int64()), ("tags", pa.list_(pa.int64())), ("caption", pa.string())])
SCHEMA = SCHEMA.with_metadata({b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()})


def pets(count):
    return pa.Table.from_pylist(
        [
            {"image": {"bytes": encoded(i), "path": f"{i}.png"}, "label": i % 2, "tags": [1], "caption": f"caption {i}"}
            for i in range(count)
        ],
        schema=SCHEMA,
    )


def write(path, rows, **options):
    """Writes rows, or a table, as a Parquet file; returns its path."""
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, **options)
    return str(path)


def write_arrow(path, table, rows, new=pa.ipc.new_stream):
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def write_saved(folder, table, shards=2):
    """Writes the layout of `Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = table.num_rows // shards
    for i, name in enumerate(names):
        write_arrow(folder / name, table.slice(i * size, size), 3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def check_pets(source, count):
    """The records of `pets(count)`, one by one and by blocks."""
    assert len(source) == count and source.class_names == ["cat", "dog"] and not source.broken
    by_block = [record for number in range(len(source.blocks)) for record in source.read_block(number)]
    for i, record in enumerate(by_block):
        expected = {"label": i % 2, "class_name": ["cat", "dog"][i % 2], "texts": [f"caption {i}"], "tags": [1]}
        assert record == {"image": encoded(i), "caption": f"caption {i}", **expected}
    last = pickle.loads(pickle.dumps(source))[count - 1]
    assert last == by_block[-1]


def test_hugging_face_files_are_read(tmp_path):
    write(tmp_path / "train-0.parquet", pets(70), row_group_size=7)
    check_pets(make_source(f"{tmp_path}/{{split}}-*.parquet"), 70)
    check_pets(make_source(str(tmp_path)), 70)
    tags = make_source(str(tmp_path), label="tags")
    assert tags.class_names == ["wild", "tame"] and tags[0]["label"] == (1,)
    (tmp_path / "wrong").mkdir()
    table = pets(3).set_column(1, "label", pa.array([0, -5, 2]))
    wrong = make_source(write(tmp_path / "wrong" / "a.parquet", table))
    for index, label in ((1, -5), (2, 2)):
        with pytest.raises(UserError, match=f"has label {label}, but there are 2 class names, 0 to 1"):
            wrong[index]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_streams_and_files_are_read(tmp_path, new):
    path = write_arrow(tmp_path / "a.arrow", pets(30), 4, new)
    rows, broken = arrow.scan(path, 9)
    assert [count for _, _, count in rows] == [8, 8, 8, 6] and not broken
    check_pets(make_source(path), 30)


def test_a_folder_of_save_to_disk_is_no_tfds_folder(tmp_path):
    for split, count in (("train", 20), ("test", 8)):
        write_saved(tmp_path / split, pets(count))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    check_pets(make_source(str(tmp_path / "train")), 20)
    check_pets(make_source(str(tmp_path)), 20)
    check_pets(make_source(str(tmp_path), "test"), 8)
    check_pets(make_source(f"{tmp_path}/{{split}}", "test"), 8)
    with pytest.raises(UserError, match=r"no split 'tset' \(did you mean 'test'"):
        make_source(str(tmp_path), "tset")
    with pytest.raises(UserError, match="no split 'test'; this folder is the split 'train' alone"):
        make_source(str(tmp_path / "train"), "test")
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="data-00001-of-00002.arrow: no such file, which state.json"):
        make_source(str(tmp_path))
    for state, message in (({"_indices_data_files": [1], "_data_files": []}, "flatten_indices"), ({}, "_data_files")):
        (tmp_path / "train" / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=message):
            make_source(str(tmp_path))


def test_img2dataset_writes_null_for_a_failed_download(tmp_path):
    rows = [{"key": str(i), "url": "u", "caption": f"c {i}", "width": 12, "jpg": encoded(i)} for i in range(6)]
    path = write(tmp_path / "00000.parquet", [{**rows[0], "jpg": None}, *rows[1:]], row_group_size=100)
    source = make_source(path)
    assert source[1] == {"image": encoded(1), "texts": ["c 1"], **{k: rows[1][k] for k in rows[1] if k != "jpg"}}
    with pytest.raises(BadRecord, match="no image"):
        source[0]


def test_the_table_of_urls_beside_a_folder_of_files_is_not_read(tmp_path):
    write(tmp_path / "00000.parquet", [{"url": "u", "caption": "a"}])
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000000000.jpg").write_bytes(encoded(1, "JPEG"))
    (tmp_path / "00000" / "000000000.txt").write_text("a cat")
    assert make_source(str(tmp_path))[0]["texts"] == ["a cat"]


def test_images_outside_of_the_table(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(encoded(1))
    rows = [{"bytes": None, "path": "images/1.png"}, {"bytes": None, "path": "2.png"}, {"bytes": encoded(3)}, None]
    struct = make_source(write(tmp_path / "a.parquet", [{"image": row, "text": "a"} for row in rows]))
    assert struct[0]["image"] == encoded(1) and struct[2]["image"] == encoded(3)
    for index, reason in ((1, "missing file"), (3, "no image")):
        with pytest.raises(BadRecord, match=reason):
            struct[index]
    paths = make_source(write(tmp_path / "b.parquet", [{"file_name": "images/1.png", "text": "a"}]))
    assert paths[0]["image"] == encoded(1)
    for name, count in (("a", 4), ("b", 1)):
        assert to_parquet.regroup([f"{tmp_path}/{name}.parquet"], f"{tmp_path}/out/{name}") == count
        moved = make_source(f"{tmp_path}/out/{name}")
        assert moved[0]["image"] == encoded(1) and (count == 1 or moved[2]["image"] == encoded(3))


def test_a_table_without_images_names_its_columns(tmp_path):
    path = write(tmp_path / "a.parquet", [{"url": "u", "picture": encoded(1), "caption": "a cat"}])
    assert make_source(path, image="picture")[0]["image"] == encoded(1)
    with pytest.raises(UserError, match=r"no field 'pictures' \(did you mean 'picture'\?\); fields: url, picture"):
        make_source(path, image="pictures")
    with pytest.raises(UserError, match="no field of images found.*fields: url, caption"):
        make_source(write(tmp_path / "b.parquet", [{"url": "u", "caption": "a cat"}]))


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (["a", "b"], "captions"),
        ([{"raw": "a", "id": 1}, {"raw": "b", "id": 2}], "sentences"),
        ({"text": ["a", "b"], "id": [1, 2]}, "captions"),
    ],
)
def test_captions_are_lists_and_structs(tmp_path, value, field):
    source = make_source(write(tmp_path / "a.parquet", [{"image": encoded(1), field: value, "width": 3}]))
    assert source[0]["texts"] == ["a", "b"] and source[0]["width"] == 3


def test_a_block_is_one_request_without_other_images(tmp_path, monkeypatch):
    rows = [{"image": encoded(i), "crop": b"x" * 300_000, "caption": "a", "mask.0": i} for i in range(8)]
    path = write(tmp_path / "a.parquet", rows, row_group_size=4, use_dictionary=False, compression="none")
    wanted = [(start, end) for start, end, _ in parquet.scan(path, 4)[0]]
    calls, read = [], remote.read
    monkeypatch.setattr(remote, "read", lambda *args: calls.append(args) or read(*args))
    records = list(parquet.read(path, *wanted[0]))
    assert records[3] == {"image": encoded(3), "caption": "a", "mask.0": 3}
    size = sum(end - start for _, start, end in calls)
    assert len(calls) == 2 and size == parquet.block_bytes(path, *wanted[0]) < 10_000
    assert make_source(path).block_bytes > size  # all rows are a block
    del calls[:]
    write(path, [{k: row[k] for k in ("image", "caption")} for row in rows], row_group_size=4)
    parquet.scan(path)
    del calls[:]
    list(parquet.read(path, 0, 2))
    assert len(calls) == 1


def test_row_groups_are_joined_or_named(tmp_path, monkeypatch):
    assert arrow_columns.joined([100] * 12, 512) == [(0, 5, 500), (5, 10, 500), (10, 12, 200)]
    assert arrow_columns.joined([1000, 0, 300, 300, 100], 512) == [(0, 2, 1000), (2, 4, 600), (4, 5, 100)]
    assert arrow_columns.joined([], 512) == []
    warnings = []
    monkeypatch.setattr(parquet.logging, "warning", lambda form, *args: warnings.append(form % args))
    path = write(tmp_path / "a.parquet", pets(30))
    assert parquet.scan(path, 7) == ([(0, 1, 30)], {})
    assert "row groups of up to 30 rows" in warnings[0] and f"clip_jax.tools.to_parquet {path} --out" in warnings[0]
    monkeypatch.setattr(parquet, "_MAX_BYTES", 100)
    with pytest.raises(UserError, match=f"too large.*clip_jax.tools.to_parquet {path} --out=FOLDER"):
        parquet.scan(path, 7)
    with pytest.raises(UserError, match="too large"):
        parquet.scan(path, 512)


def test_damaged_files(tmp_path):
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "empty.arrow").write_bytes(b"")
    whole = write(tmp_path / "whole.parquet", pets(8), row_group_size=4, compression="none")
    source = make_source(f"{tmp_path}/*.parquet")
    assert len(source) == 8 and source.broken == {"empty shard": 1}
    for kind, path in ((parquet, whole), (arrow, write_arrow(tmp_path / "a.arrow", pets(8), 4))):
        start, end, _ = kind.scan(path)[0][0]
        with pytest.raises(EOFError):
            kind.read(path, start, end + 1000)
    data = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(BadRecord, match="corrupt row group"):
        parquet.read(str(tmp_path / "cut.parquet"), 0, 1)[0]
    texts = pa.table({"image": [encoded(1)] * 2, "caption": pa.array([b"a cat", b"\xff"]).view(pa.string())})
    source = make_source(write(tmp_path / "t.parquet", texts))
    assert source[0]["texts"] == ["a cat"]
    with pytest.raises(BadRecord, match="text is not UTF-8"):
        source[1]
    stream = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(stream[:-100])
    rows, broken = arrow.scan(str(tmp_path / "cut.arrow"), 4)
    assert [count for _, _, count in rows] == [4] and broken == {"truncated shard": 1}
    assert arrow.scan(str(tmp_path / "empty.arrow")) == ([], {"unreadable shard": 1})
    assert arrow.scan(whole) == ([], {"unreadable shard": 1})
    column = pa.table({"image": [b"a"], "kind": pa.array(["x"]).dictionary_encode()})
    with pytest.raises(UserError, match="encoded by a dictionary"):
        arrow.scan(write_arrow(tmp_path / "d.arrow", column, 1))


def rewrites(path, source, rows):
    """Writes a column of texts; `rows` are the numbers of the records."""
    with columns.text_writer(path, source, {"seed": 0}) as out:
        for i in rows:
            out.write(source[i], {"rewrites": [f"rewrite {i}"]})
    return str(path)


def test_columns_are_read_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_PART", 10)
    monkeypatch.setattr(parquet_columns, "_GROUP", 4)
    source = make_source(write(tmp_path / "a.parquet", pets(33), row_group_size=600 // 75))
    path = rewrites(tmp_path / "r.parquet", source, range(33))
    assert sorted(p.name for p in (tmp_path / "r.parquet").iterdir()) == [f"part-00000{i}.parquet" for i in range(4)]
    write(tmp_path / "more.parquet", [{"number": i, "of": i} for i in range(33)], row_group_size=11)
    joined = pickle.loads(
        pickle.dumps(make_source(f"{tmp_path}/a.parquet?columns={path}?columns={tmp_path}/more.parquet"))
    )
    assert joined.blocks.tolist() == source.blocks.tolist() and joined.sequential
    found = [record for number in range(len(joined.blocks)) for record in joined.read_block(number)]
    assert [(r["rewrites"], r["number"], r["of"]) for r in found] == [([f"rewrite {i}"], i, i) for i in range(33)]
    assert found[30] == joined[30]


def test_arrays_are_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_PART", 10)
    monkeypatch.setattr(parquet_columns, "_GROUP", 4)
    source = make_source(write(tmp_path / "a.parquet", pets(23), row_group_size=6))
    fields = {"regions": ((2, 3), np.float16), "count": ((), np.int32)}
    values = np.random.default_rng(0).normal(size=(23, 2, 3)).astype(np.float16)
    for seed in (0, 1):
        with columns.array_writer(tmp_path / "c.parquet", source, fields, {"seed": seed}) as arrays:
            arrays["regions"][:], arrays["count"][:] = values, np.arange(23) + seed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "c.parquet"]
    joined = make_source(f"{tmp_path}/a.parquet?columns={tmp_path}/c.parquet")
    found = [record for number in range(len(joined.blocks)) for record in joined.read_block(number)]
    for i, record in enumerate(found):
        np.testing.assert_array_equal(record["regions"], values[i])
        assert record["count"] == i + 1 and record["regions"].dtype == np.float16


def test_arrays_do_not_replace_data(tmp_path):
    source, fields = MemorySource([{"texts": ["a"]}]), {"a": ((2,), np.float32)}
    write(tmp_path / "file.parquet", pets(3))
    (tmp_path / "folder.parquet").mkdir()
    write(tmp_path / "folder.parquet" / "part-000000.parquet", pets(3))
    rewrites(tmp_path / "texts.parquet", source, [0])
    for name in ("file", "folder", "texts"):
        with (
            pytest.raises(UserError, match=f"{name}.parquet exists and holds something else than columns; give"),
            columns.array_writer(tmp_path / f"{name}.parquet", source, fields, {}),
        ):
            pass
    assert pq.read_metadata(tmp_path / "folder.parquet" / "part-000000.parquet").num_rows == 3
    assert columns.ColumnsSource(source, f"{tmp_path}/texts.parquet")[0]["rewrites"] == ["rewrite 0"]
    assert sorted(os.listdir(tmp_path)) == ["file.parquet", "folder.parquet", "texts.parquet"]
    (tmp_path / "folder.parquet" / "part-000000.parquet").write_bytes(b"half of it")
    with (
        pytest.raises(UserError, match="folder.parquet is damaged; remove it, or give another name$"),
        columns.array_writer(tmp_path / "folder.parquet", source, fields, {}),
    ):
        pass


def test_an_unreadable_row_of_columns_is_one_bad_record(tmp_path):
    write(tmp_path / "a.parquet", pets(20), row_group_size=20)
    texts = [b"caf\xe9" if i == 7 else b"a" for i in range(20)]
    table = pa.table({"note": pa.Array.from_buffers(pa.string(), 20, pa.array(texts).buffers())})
    pq.write_table(table, tmp_path / "c.parquet")
    source = make_source(f"{tmp_path}/a.parquet?columns={tmp_path}/c.parquet")
    found = [record for _, record in all_records(source)]
    assert [i for i, record in enumerate(found) if isinstance(record, BadRecord)] == [7]
    assert [record["note"] for i, record in enumerate(found) if i != 7] == ["a"] * 19


def test_columns_of_another_data_set_are_refused(tmp_path):
    source = make_source(write(tmp_path / "a.parquet", pets(9)))
    path = rewrites(tmp_path / "r.parquet", source, range(8))
    with pytest.raises(UserError, match="8 rows, but .*a.parquet has 9 records"):
        columns.ColumnsSource(source, path)
    with columns.text_writer(path, source, {"seed": 0}) as out:
        assert out.done == 8
        out.write(None, {"rewrites": []})
    assert columns.ColumnsSource(source, path)[8]["rewrites"] == []
    with pytest.raises(UserError, match="another about: {'seed': 0}"):
        columns.text_writer(path, source, {"seed": 1})
    other = make_source(write(tmp_path / "b.parquet", pets(18).slice(9)))
    with pytest.raises(UserError, match="made of another data set: .*a.parquet, 9 records, not .*b.parquet, 9"):
        columns.ColumnsSource(other, path)
    header = dict(pq.read_schema(f"{path}/part-000000.parquet").metadata)
    table = pq.read_table(f"{path}/part-000000.parquet")
    write(f"{path}/part-000000.parquet", table.take([1, 0, *range(2, 8)]).replace_schema_metadata(header))
    with pytest.raises(UserError, match="row 0: made of other texts than record 0"):
        columns.ColumnsSource(source, path)[0]
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    for name, message in (("damaged", "columns=.*: damaged"), ("missing", "no such file")):
        with pytest.raises(UserError, match=message):
            columns.ColumnsSource(source, str(tmp_path / f"{name}.parquet"))


def run(capsys, *argv):
    """Runs `to_parquet`; returns the status and the last line of each stream."""
    status, (out, err) = to_parquet.main([str(a) for a in argv]), capsys.readouterr()
    return status, (out or err).splitlines()[-1]


def test_a_table_becomes_parquet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_parquet, "ROWS", 2)
    monkeypatch.setattr(to_parquet, "_PEEKED", 3)
    rows = [{"text": [f"a {i}"], "label": "dog" if i % 2 else "cat", "size": i, "box": [0.5, i]} for i in range(5)]
    rows[4] |= {"size": "large", "later": 1}
    path = write_table(tmp_path, rows)
    (tmp_path / "3.png").unlink()
    expected = make_source(path)
    monkeypatch.setattr(table, "MAX_ROWS", 4)
    with pytest.raises(
        UserError, match=r"more than 4 rows; a table has at most 2 GiB.*to_parquet .*pairs.jsonl --out="
    ):
        make_source(path)
    monkeypatch.setattr(table, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"pairs.jsonl: 0.0 GiB; a table has at most"):
        make_source(path)
    status, line = run(capsys, path, f"--out={tmp_path / 'beside'}")
    assert status == 0 and "5 rows. field 'later' came later: 1, column 'size': value of another type: 1" in line
    status, line = run(capsys, path, f"--out={tmp_path / 'embedded'}", "--embed")
    assert status == 0 and "4 rows. missing file: 1" in line
    beside, embedded = make_source(str(tmp_path / "beside")), make_source(str(tmp_path / "embedded"))
    assert beside.class_names == embedded.class_names == ["cat", "dog"]
    assert (
        beside.blocks.tolist() == [5] and pq.read_metadata(tmp_path / "beside/part-000000.parquet").num_row_groups == 3
    )
    for i in (0, 1, 2, 4):
        for found in (beside[i], embedded[i - (i > 3)]):
            assert {k: found[k] for k in ("image", "texts", "label", "class_name", "box")} == {
                k: expected[i][k] for k in ("image", "texts", "label", "class_name", "box")
            }
            assert found["size"] == (None if i == 4 else i)
    with pytest.raises(BadRecord, match="missing file"):
        beside[3]
    assert run(capsys, path, f"--out={tmp_path / 'beside'}") == (
        2,
        f"error: --out={tmp_path / 'beside'}: holds part-000000.parquet already; give an empty folder",
    )


def test_other_sources_become_parquet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_parquet, "ROWS", 4)
    write(tmp_path / "a.parquet", pets(10))
    status, line = run(capsys, tmp_path, f"--out={tmp_path / 'small'}")
    assert (status, line) == (0, f"{tmp_path / 'small'}: 10 rows")
    file = pq.ParquetFile(tmp_path / "small" / "part-000000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [4, 4, 2]
    check_pets(make_source(str(tmp_path / "small")), 10)
    column = rewrites(tmp_path / "r.parquet", make_source(f"{tmp_path}/a.parquet"), range(10))
    source = f"{tmp_path}/a.parquet?columns={column}"
    assert run(capsys, source, f"--out={tmp_path / 'x'}")[1].endswith("write them into Parquet with --embed")
    assert run(capsys, source, f"--out={tmp_path / 'joined'}", "--embed")[0] == 0
    joined = make_source(str(tmp_path / "joined"))
    assert (joined[9]["rewrites"], joined[9]["image"]) == (["rewrite 9"], encoded(9))
    assert joined.class_names == ["cat", "dog"] and joined[9]["class_name"] == "dog"


def test_half_a_copy_is_no_data_set_and_the_same_command_starts_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_parquet, "_PART_ROWS", 4)
    source, out, partial = tmp_path / "a.parquet", tmp_path / "out", tmp_path / "out" / ".partial"
    write(source, pets(10))
    seen, write_part = [], to_parquet.Parts.write
    monkeypatch.setattr(to_parquet, "ROWS", 4)

    def interrupted(parts, rows):
        write_part(parts, rows)
        seen.append(sorted(os.listdir(partial)))
        with pytest.raises(UserError, match="out is being written by another process"), to_parquet.Parts(out):
            pass
        with pytest.raises(UserError, match="out: no images"):
            make_source(str(out))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(to_parquet.Parts, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, source, f"--out={out}", "--embed")
    assert len(seen[-1]) == 2 and not out.exists() and not partial.exists()
    monkeypatch.setattr(to_parquet.Parts, "write", write_part)
    partial.mkdir(parents=True)
    (partial / "part-000007.parquet").write_bytes(b"of a command that was killed")
    (partial / "notes.txt").write_text("mine")
    assert "out/.partial: holds notes.txt; remove it, or" in run(capsys, source, f"--out={out}", "--embed")[1]
    assert len(os.listdir(partial)) == 2
    (partial / "notes.txt").unlink()
    assert run(capsys, source, f"--out={out}") == (0, f"{out}: 10 rows")
    assert sorted(os.listdir(out)) == [f"part-{i:06d}.parquet" for i in range(3)] and not partial.exists()
    check_pets(make_source(str(out)), 10)


def test_parquet_is_written_where_no_folder_can_be_renamed(tmp_path, capsys, monkeypatch):
    """As on a mount of a flat bucket, at a mount point, and in a parent that cannot be written."""
    replace = os.replace

    def of_files(old, new):
        assert not os.path.isdir(old) and os.path.dirname(new) == str(tmp_path)
        replace(old, new)

    monkeypatch.setattr(os, "replace", of_files)
    monkeypatch.setattr(os, "rename", of_files)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    path = write_table(tmp_path, [{"text": ["a"]}] * 3)
    before = set(os.listdir(tmp_path))
    status, line = run(capsys, path, f"--out={tmp_path}")
    assert status == 0 and line.startswith(f"{tmp_path}: 3 rows")
    assert set(os.listdir(tmp_path)) == before | {"part-000000.parquet"}


def test_interrupted_moves_are_completed_and_nothing_reads_the_half(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_parquet, "_PART_ROWS", 4)
    monkeypatch.setattr(to_parquet, "ROWS", 4)
    source, out, replace, moved = write(tmp_path / "a.parquet", pets(10)), tmp_path / "out", os.replace, []

    def failing(old, new):
        if len(moved) == 1:
            raise OSError(5, "Input/output error")
        moved.append(replace(old, new))

    monkeypatch.setattr(os, "replace", failing)
    assert run(capsys, source, f"--out={out}")[0] != 0
    assert len(list(out.glob("*.parquet"))) == 1
    for spec in (out, f"{out}/*.parquet"):
        with pytest.raises(UserError, match=f"out is not whole yet: run .*to_parquet with --out={out} again"):
            make_source(str(spec))
    monkeypatch.setattr(os, "replace", replace)
    status, line = run(capsys, source, f"--out={out}")
    assert status == 2 and "out: has all files of an earlier command now; nothing else was written" in line
    assert sorted(os.listdir(out)) == [f"part-{i:06d}.parquet" for i in range(3)]
    check_pets(make_source(str(out)), 10)


def test_tables_beside_shards_and_manifests_are_not_copied(tmp_path, capsys):
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "0.parquet")
    write_tar(tmp_path / "0.tar", pair("0", 0))
    assert manifest.main([f"{tmp_path}/0.tar", f"--out={tmp_path}/m.parquet", "--processes=1"]) == 0
    capsys.readouterr()
    for source in (tmp_path, tmp_path / "m.parquet"):
        assert "write them into Parquet with --embed" in run(capsys, source, f"--out={tmp_path}/out")[1]


def test_arrays_become_images_of_parquet(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), np.uint8)
    rows = [{"image": pixels[i], "texts": ["a"], "boxes": np.eye(2) * i, "mixed": [1, "a"][i % 2]} for i in range(3)]
    bad = {"image": b"", "texts": ["b"]}
    count, failures = to_parquet.write(
        to_parquet._Records(MemorySource([*rows, bad])), str(tmp_path / "out"), to_parquet._embedded
    )
    source = make_source(str(tmp_path / "out"))
    assert count == len(source) == 3 and failures == {"no image": 1}
    assert [source[i]["mixed"] for i in range(3)] == ["1", "a", "1"]
    for i in range(3):
        assert (np.asarray(decode.open_image(source[i]["image"])) == pixels[i]).all()
        assert source[i]["boxes"] == (np.eye(2) * i).tolist()


def test_data_sets_of_the_hub_are_read(tmp_path, monkeypatch):
    with web_server() as web:
        serve_as_hub(web, monkeypatch)
        monkeypatch.setattr(clients, "_systems", {})
        for i in range(2):
            path = write(tmp_path / "a.parquet", pets(24).slice(12 * i, 12), row_group_size=4)
            web.objects[f"hub/data/train-{i:05d}-of-00002.parquet"] = open(path, "rb").read()
        web.objects["hub/s.arrow"] = open(write_arrow(tmp_path / "s.arrow", pets(12), 4), "rb").read()
        rows = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
        path = write(tmp_path / "b.parquet", [{"image": row, "text": "a"} for row in rows])
        web.objects |= {"hub/b.parquet": open(path, "rb").read(), "hub/a.png": encoded(5)}
        folder = f"hf://datasets/{web.repository}"
        check_pets(make_source(f"{folder}/s.arrow"), 12)
        outside = make_source(f"{folder}/b.parquet")
        assert outside[0]["image"] == encoded(5)
        with pytest.raises(BadRecord, match="missing file"):
            outside[1]
        source = make_source(f"{folder}/data/{{split}}-*.parquet")
        web.requests.clear()
        check_pets(source, 24)
        assert len(web.requests) == 3  # a block each, and a block again for the copy of the source


def test_training_reads_blocks_of_a_table_and_its_columns(tmp_path):
    rows = [{"image": encoded(i % 7), "caption": f"caption {i}"} for i in range(1100)]
    write(tmp_path / "a.parquet", rows, row_group_size=100)
    write(tmp_path / "c.parquet", [{"number": i} for i in range(1100)], row_group_size=300)
    source = make_source(f"{tmp_path}/a.parquet?columns={tmp_path}/c.parquet")
    assert source.blocks.tolist() == [500, 500, 100]
    views = (ImageView("image", 8), TextView("text", 16, ("{number}",)))
    settings = dict(batch_size=100, reading=Reading("blocks", lanes=4, window=1))
    whole = take(loader(source, views, **settings), 11)
    shares = [take(loader(source, views, host=host, hosts=2, **settings), 3) for host in range(2)]
    assert_equal(concatenate(shares), whole[:3])
    ids = np.concatenate([batch["example_id"] for batch in whole])
    numbers = [int(Bytes().decode(row)) for batch in whole for row in batch["text"].tolist()]
    assert ids.tolist() == numbers and sorted(numbers) == list(range(1100))
