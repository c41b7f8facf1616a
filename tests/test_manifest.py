"""Manifests: the same records as without one, their command, and what can be wrong with them."""

import json
import os
import pickle

import numpy as np
import pyarrow.parquet as parquet
import pytest
from data_helpers import write_tar
from test_tar_blocks import pair

from clip_jax.data.records import fingerprint
from clip_jax.data.shared import Shared
from clip_jax.data.sources import make_source, manifest, shards
from clip_jax.data.sources.manifest import Manifest
from clip_jax.errors import UserError
from clip_jax.runtime import faults
from clip_jax.tools import manifest as tool

COLUMNS = ("width", "license", "score", "mixed")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))


def members(number):
    """The members of the samples of a shard: 7 of them, each with a caption and a JSON."""
    found = []
    for i in range(7 * number, 7 * number + 7):
        meta = {"width": i, "license": "cc0" if i % 2 else "by", "mixed": "a" if i % 2 else i}
        meta |= {"score": i / 2 if number else i} if i % 3 else {}
        found += [*pair(f"{i:04d}", i), (f"{i:04d}.json", json.dumps(meta).encode())]
    return found


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", members(number))
    return folder


def make(data, *arguments, out=None, source=None):
    out = str(out or data / "a.manifest.parquet")
    options = [f"--out={out}", "--processes=1", "--length=3", *arguments]
    assert tool.main([source or f"{data}/*.tar", *options]) == 0
    return out


def refused(capsys, *arguments):
    """The line that the command prints for wrong arguments."""
    capsys.readouterr()
    assert tool.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_manifest_has_the_records_of_its_shards(data, tmp_path):
    path = make(data)
    source, expected = make_source(path), make_source(f"{data}/*.tar")
    assert [source[i] for i in range(21)] == [expected[i] for i in range(21)] and len(source) == 21
    assert source.blocks.tolist() == [3, 3, 1] * 3 and source.sequential
    assert [record["texts"] for record in source.read_block(4)] == [["c10"], ["c11"], ["c12"]]
    size = os.path.getsize(data / "0.tar")
    assert size // 7 < source.block_bytes < size / 2  # a shard has three blocks
    copy = pickle.loads(pickle.dumps(source))
    assert copy[20] == expected[20] and copy.numbering == source.numbering
    assert source.column("width") is None and source.column("license") is None
    assert not os.path.exists(f"{path}.parts")
    # Names are relative to the manifest: the folder may move, or the manifest alone with ?shards=.
    data.rename(tmp_path / "moved")
    moved = make_source(str(tmp_path / "moved" / "a.manifest.parquet"))
    assert moved[13] == expected_of(source, 13) and fingerprint(moved) == fingerprint(source)
    os.replace(tmp_path / "moved" / "a.manifest.parquet", tmp_path / "b.parquet")
    assert make_source(f"{tmp_path}/b.parquet?shards={tmp_path}/moved")[13]["texts"] == ["c13"]
    with pytest.raises(UserError, match=r"0.tar: no such file, but the manifest names it; .*b.parquet.shards=FOLDER"):
        make_source(f"{tmp_path}/b.parquet")


def expected_of(source, index):
    """A record as its numbers say; the source's own shards are gone."""
    assert len(source) == 21
    i = index
    return {
        "texts": [f"c{i}"],
        "image": b"image %d" % i,
        "txt": f"c{i}",
        "width": i,
        "license": "cc0" if i % 2 else "by",
        "mixed": "a" if i % 2 else i,
        "score": i / 2,
    }


def test_columns_are_read_without_records(data, monkeypatch):
    monkeypatch.setattr(manifest, "_SAMPLES", 12)  # several row groups
    path = make(data, f"--columns={','.join(COLUMNS)}")
    source = make_source(path)
    monkeypatch.setattr(shards.ShardSource, "read_block", lambda *_: pytest.fail("a record was read"))
    width, license_, score, mixed = map(source.column, COLUMNS)
    assert len(width) == 21 and width[:].to_pylist() == list(range(21)) and str(width[:].type) == "int64"
    assert all(width[a:b].to_pylist() == list(range(a, b)) for a in range(21) for b in range(a, 22))
    assert license_[:].to_pylist() == ["by", "cc0"] * 10 + ["by"]
    assert score[:].to_pylist() == [None if i % 3 == 0 else f"{i / 2 if i >= 7 else i}" for i in range(21)]
    assert mixed[:4].to_pylist() == ["0", '"a"', "2", '"a"'] and source.column("height") is None
    assert pickle.loads(pickle.dumps(source)).column("width")[20:21].to_pylist() == [20]
    chosen = make_source(f"{path}?where=license:by&has=score")
    assert [chosen._kept[i] for i in range(len(chosen))] == [2, 4, 8, 10, 14, 16, 20]
    assert chosen.blocks.tolist() == [1, 1, 0, 1, 1, 0, 2, 0, 1]


def test_a_selection_by_columns_of_any_values_is_that_by_records(tmp_path):
    values = (["a", "b"], [], None, ["b"], 2**64, float("nan"), "b", 1, 1.0, True)
    found = []
    for i, value in enumerate(values):
        meta = {"tags": value if isinstance(value, list) else None, "mixed": value, "label": f"class {i}"}
        found += [*pair(str(i), i), (f"{i}.json", json.dumps(meta).encode())]
    write_tar(tmp_path / "0.tar", found)
    path = make(tmp_path, "--columns=tags,mixed, label,tags")
    fields = ("has=tags", "label=tags", "where=tags:['b']", "part=tags:!1/2", "has=mixed", "label=mixed")
    for option in (*fields, "where=mixed:1", "where=mixed:1.0", "where=mixed:True", "part=mixed:!1/3", "by=mixed"):
        read, chosen = make_source(f"{tmp_path}/0.tar?{option}"), make_source(f"{path}?{option}")
        assert repr([chosen[i] for i in range(len(chosen))]) == repr([read[i] for i in range(len(read))]), option
        assert (chosen.class_names, chosen.multi_label) == (read.class_names, read.multi_label)
    with pytest.raises(UserError, match="no record has the field 'label'"):  # its records have none, as it is text
        make_source(f"{path}?label=label")


def test_parts_are_joined_and_an_interrupted_part_continues(data, monkeypatch, capsys):
    (data / "3.tar").write_bytes(b"")
    (data / "4.tar").write_bytes((data / "0.tar").read_bytes()[:3000])
    whole = make(data, "--columns=width", out=data / "whole.parquet")
    assert "left out: 1 empty shard\nleft out: 1 truncated shard" in capsys.readouterr().out
    scanned, scan = [], tool.scan
    monkeypatch.setattr(tool, "scan", lambda kind, path, **kw: scanned.append(path) or scan(kind, path, **kw))
    out = make(data, "--columns=width", "--part=2/2", out=data / "parts.parquet")
    assert [path[-5] for path in scanned] == ["1", "3"] and not os.path.exists(out)
    line = refused(capsys, f"{data}/*.tar", f"--out={out}", "--columns=width", "--length=3", "--join")
    assert "3 of 5 shards are not done; run the missing --part" in line
    # As after a kill: the line of the last shard is cut off. Threads finish the two shards in any order.
    part = data / "parts.parquet.parts" / "2-of-2.part"
    last = part.read_bytes().splitlines()[-1].split(b"\t")[0]  # the number of its shard
    part.write_bytes(part.read_bytes()[:-20])
    scanned.clear()
    make(data, "--columns=width", "--part=1/2", out=out)
    make(data, "--columns=width", "--part=2/2", out=out)
    assert [path[-5] for path in scanned] == ["0", "2", "4", last.decode()]
    make(data, "--columns=width", "--join", out=out)
    a, b = Manifest(whole), Manifest(out)
    assert parquet.read_table(whole).equals(parquet.read_table(out)) and a.shards == b.shards
    assert a.about["fingerprint"] == b.about["fingerprint"] and len(a.shards) == 4  # one shard is empty
    assert a.about["broken"] == {"empty shard": 1, "truncated shard": 1} == dict(make_source(whole).broken)


def test_a_line_that_was_cut_off_never_counts_as_done(data):
    out = make(data, "--part=1/1", out=data / "x.parquet")
    parts = tool.Parts(out, json.loads((data / "x.parquet.parts" / "job.json").read_text()))
    part = data / "x.parquet.parts" / "1-of-1.part"
    (*whole, last), done = part.read_bytes().splitlines(True), parts.done()
    number = int(last.split(b"\t")[0])
    del done[number]
    for end in range(1, len(last)):
        part.write_bytes(b"".join(whole) + last[:end])
        with parts.writer((0, 1)) as file:
            assert parts.done().keys() == done.keys()
            file.write(last)
        assert parts.done().keys() == {*done, number} and parts.read(parts.done()[number])


def test_data_are_not_replaced_by_their_manifest(tmp_path, capsys):
    import pyarrow

    rows = [{"image": {"bytes": b"image", "path": None}, "caption": "c"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "text.parquet").write_text("mine")
    for name, message in (
        ("a", "is one of the shards; take another name"),
        ("b", "exists and is no manifest; take another name"),
        ("text", "exists and is no manifest"),
        ("folder", "exists and is no manifest"),
    ):
        out = tmp_path / f"{name}.parquet"
        line = refused(capsys, f"{tmp_path}/a.parquet", f"--out={out}", "--processes=1")
        assert message in line and not os.path.exists(f"{out}.parts")
    assert (tmp_path / "text.parquet").read_text() == "mine"
    make(tmp_path, source=f"{tmp_path}/a.parquet", out=tmp_path / "m.parquet")
    make(tmp_path, source=f"{tmp_path}/[ab].parquet", out=tmp_path / "m.parquet")
    assert len(make_source(f"{tmp_path}/m.parquet")) == 2
    line = refused(capsys, f"{tmp_path}/*m.parquet", f"--out={tmp_path}/m.parquet", "--processes=1")
    assert "is one of the shards" in line


def test_what_else_is_in_the_folder_of_parts_stays(data):
    (data / "x.parquet.parts").mkdir()
    (data / "x.parquet.parts" / "notes.txt").write_text("mine")
    make(data, out=data / "x.parquet")
    assert os.listdir(data / "x.parquet.parts") == ["notes.txt"]


def test_processes_give_the_same_manifest(data):
    one, two = make(data, out=data / "1.parquet"), make(data, "--processes=2", out=data / "2.parquet")
    assert parquet.read_table(one).equals(parquet.read_table(two))


def test_interrupted_and_killed(data, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    arguments = [f"{data}/*.tar", f"--out={data}/a.parquet"]
    monkeypatch.setattr(tool, "find_shards", interrupt)
    assert tool.main(arguments) == faults.INTERRUPTED
    assert capsys.readouterr().err == "interrupted; the same command resumes\n"
    monkeypatch.setattr(tool, "find_shards", shards.find_shards)
    monkeypatch.setattr(tool, "scan", _end)
    assert "a worker process was killed" in refused(capsys, *arguments, "--processes=2")


def _end(kind, path, length, columns):
    os.kill(os.getpid(), 9)


def test_parts_of_another_data_set_are_refused(data, capsys):
    out = make(data, "--part=1/2", out=data / "x.parquet")
    line = refused(capsys, f"{data}/[01].tar", f"--out={out}", "--length=3", "--part=2/2")
    assert "holds parts of another manifest: source" in line and "shards 3, not 2" in line
    line = refused(capsys, f"{data}/*.tar", f"--out={out}", "--length=3", "--columns=width")
    assert "columns [], not ['width']" in line
    os.rename(data / "2.tar", data / "4.tar")
    assert "manifest: of other shards; remove it" in refused(capsys, f"{data}/*.tar", f"--out={out}", "--length=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x.txt"], "--out=x.txt must be a local path that ends in .parquet"),
        (["--out=gs://b/x.parquet"], "must be a local path"),
        (["--out=x.parquet", "--part=3/2"], "--part=3/2 must be one of 1/N to N/N"),
        (["--out=x.parquet", "--part=1/2", "--join"], "--join takes no --part"),
        (["--out=x.parquet", "--join"], "x.parquet.parts: no such folder; --part=1/N to --part=N/N make it"),
        (["--out=x.parquet", "--processes=0"], "--processes=0 must be at least 1"),
        (["--out=x.parquet", "--processes=1", "--columns=widht"], "no sample has a field 'widht'"),
    ],
)
def test_wrong_arguments(data, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(data)
    assert message in refused(capsys, f"{data}/*.tar", *arguments)


def test_wrong_sources(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.csv").write_text("x")
    out = f"--out={tmp_path}/x.parquet"
    for source, message in (
        ("a.tar", "no usable sample in 1 shards (empty shard)"),
        ("b.csv", "names no shards; shards end in .tar, "),
        ("c.tar", "no such file"),
    ):
        assert message in refused(capsys, f"{tmp_path}/{source}", out, "--processes=1")


def test_a_shard_that_changed_is_named(data):
    path = make(data)
    source = make_source(path)
    write_tar(data / "2.tar", members(2)[:-3])  # one sample fewer
    for change in (lambda: source.read_block(8), lambda: make_source(path)):
        message = r"2.tar changed since .*make it again: python -m clip_jax.data.manifest '.* --length=3$"
        with pytest.raises(UserError, match=message):
            change()


def test_a_shard_with_other_records_of_the_same_number_is_named(data):
    source = make_source(make(data))
    write_tar(data / "2.tar", [(name, content * 99) for name, content in members(2)])
    with pytest.raises(UserError, match="2.tar changed since the manifest was made"):
        source.read_block(6)


def test_files_that_are_no_manifest_of_this_version(data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "VERSION", 7)
        path = make(data)
    with pytest.raises(
        UserError, match=r"manifest of version 7, but .* reads version 1; make it again: python -m .*tar'"
    ):
        make_source(path)
    table = data / "table.parquet"
    parquet.write_table(parquet.read_table(path, columns=["start"]).replace_schema_metadata(), table)
    (data / "text.parquet").write_text("no parquet")
    (data / "empty.parquet").write_text("")
    for name in ("table", "text", "empty"):
        with pytest.raises(UserError, match=f"{name}.parquet: is no manifest; python -m .* writes one"):
            Manifest(str(data / f"{name}.parquet"))
    with pytest.raises(UserError, match="gone.parquet: no such file"):
        Manifest(str(data / "gone.parquet"))
    with pytest.raises(UserError, match="shards=/x is an option of manifests alone"):
        make_source(f"{data}/*.tar?shards=/x")


def test_many_shards_need_a_manifest(data, monkeypatch, capsys):
    import fsspec

    from clip_jax.data.sources import webdataset

    for name in "012":
        fsspec.filesystem("memory").pipe_file(f"/test_manifest/{name}.tar", (data / f"{name}.tar").read_bytes())
    remote, command = "memory://test_manifest/{0..2}.tar", r"make one: python -m clip_jax.data.manifest '%s' --out="
    assert make_source(remote)[20]["texts"] == ["c20"]
    path = make(data, out=data / "remote.parquet", source=remote)
    assert make_source(path)[20]["texts"] == ["c20"] and Manifest(path).shards[0] == "memory://test_manifest/0.tar"
    path = make(data, out=data / "missing.parquet", source="memory://test_manifest/{0..3}.tar")
    out = capsys.readouterr().out
    assert "left out: 1 unreadable shard\nmemory://test_manifest/3.tar: no such object" in out
    assert len(make_source(path)) == 21
    # A manifest that was copied with its shards into a bucket.
    with open(make(data, "--columns=width"), "rb") as file:
        fsspec.filesystem("memory").pipe_file("/test_manifest/m.parquet", file.read())
    source = make_source("memory://test_manifest/m.parquet")
    assert source[20]["texts"] == ["c20"] and source.column("width")[19:].to_pylist() == [19, 20]
    monkeypatch.setattr(shards, "REMOTE_BYTES", 2**10)
    with pytest.raises(UserError, match=r"shards of 0.0 GiB, but without a manifest"):
        make_source(remote)
    monkeypatch.setattr(shards, "REMOTE", 2)
    with pytest.raises(UserError, match="3 shards, but without a manifest at most 2 are scanned; make one: python -m"):
        make_source(remote)
    monkeypatch.setattr(webdataset, "LOCAL", 2)
    with pytest.raises(UserError, match=r"3 shards without an index, but .* 2 are indexed; " + command % r".*\*.tar"):
        make_source(f"{data}/*.tar")
    make_source(f"{data}/[01].tar")
    monkeypatch.setattr(webdataset, "LOCAL", 1)
    assert len(make_source(f"{data}/*.tar")) == 21  # two of three have an index now


def test_large_arrays_are_shared_among_processes(monkeypatch):
    arrays = [np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int64)]
    for least in (0, 2**22):
        monkeypatch.setattr("clip_jax.data.shared._LEAST", least)
        shared = Shared(arrays)
        text = pickle.dumps(shared)
        assert (b"/proc/" in text) == (least == 0)
        copy = pickle.loads(pickle.dumps(pickle.loads(text)))
        for array, other in zip(arrays, copy.arrays, strict=True):
            np.testing.assert_array_equal(array, other)


def test_what_a_folder_holds(data):
    make(data)
    assert len(make_source(str(data))) == 21  # the tars, not the manifest beside them
    (data / "0.parquet").touch()
    for name in "012":
        os.remove(data / f"{name}.tar")
    assert shards.shards_in(str(data)).endswith("*.parquet")
    assert shards.find_shards(str(data)) == ("parquet", [str(data / "0.parquet")])
    (data / "0").mkdir()  # as img2dataset writes files: 0.parquet describes those of the folder 0
    assert shards.shards_in(str(data)) is None
    with pytest.raises(UserError, match="names manifests alone"):
        shards.find_shards(f"{data}/a*.parquet")
    with pytest.raises(UserError, match=r"s3://b/c: an address names shards: .tar, .*; write a pattern such as s3:"):
        make_source("s3://b/c")


def test_a_manifest_of_parquet(tmp_path, capsys):
    import pyarrow

    image = [{"bytes": b"image %d" % i, "path": None} for i in range(10)]
    table = pyarrow.table({"image": image, "caption": [f"c{i}" for i in range(10)], "width": list(range(10))})
    for name, rows in (("0", table[:6]), ("1", table[6:].drop_columns("width"))):
        parquet.write_table(rows, tmp_path / f"{name}.parquet", row_group_size=2)
    path = make(tmp_path, "--columns=width", source=f"{tmp_path}/*.parquet")
    source = make_source(path)
    assert source.blocks.tolist() == [4, 2, 4] and source.column("width")[:].to_pylist() == [*range(6), *[None] * 4]
    assert [source[i]["texts"] for i in range(10)] == [[f"c{i}"] for i in range(10)]
    size = sum(os.path.getsize(tmp_path / f"{name}.parquet") for name in "01")
    assert source[9]["image"] == b"image 9" and source.block_bytes == size / 3
    parquet.write_table(table.append_column("other", [[b"1"] * 10]), tmp_path / "0.parquet")
    line = refused(capsys, f"{tmp_path}/0.parquet", f"--out={tmp_path}/b.parquet", "--columns=other", "--processes=1")
    assert "no sample has a field 'other'" in line  # records do not have other binary columns
