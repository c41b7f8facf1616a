import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc

import numpy as np
import pytest
from data_helpers import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source, webdataset
from clip_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value, size=32):
    """An image that does not compress, so that a cut hits images and not only padding."""
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = value
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, start=0, count=5, **extra):
    members = []
    for i in range(start, start + count):
        meta = json.dumps({"caption": f"json {i}", "width": i, "label": "not a number", "source_id": "x"}).encode()
        members += [(f"{i:05d}.png", png(i)), (f"{i:05d}.txt", f"caption {i} 문어".encode()), (f"{i:05d}.json", meta)]
        members += [(f"{i:05d}.{key}", value) for key, value in extra.items()]
    write_tar(path, members)


def value(record):
    return int(decode.decode_image(record["image"])[0, 0, 0])


@pytest.mark.parametrize("spec", ["{}", "{}/*.tar", "{}/{{00000..00002}}.tar", "{}/0000{{0..2}}.tar"])
def test_img2dataset_layout(tmp_path, spec):
    for shard in range(3):
        write_shard(tmp_path / f"{shard:05d}.tar", 5 * shard, 5)
    source = make_source(spec.format(tmp_path))
    assert len(source) == 15 and not source.broken
    copy = pickle.loads(pickle.dumps(source))
    for i in (14, 0, 7, 4, 5):
        record = source[i]
        assert value(record) == i and record["texts"] == [f"caption {i} 문어"] and record["width"] == i
        assert copy[i] == record
    assert (
        "label" not in source[0] and "source_id" not in source[0]
    )  # the JSON's fields of these names are something else


def test_fields_can_be_chosen_and_classes_are_read(tmp_path):
    write_shard(tmp_path / "a.tar", cls=b"7\n")
    source = make_source(str(tmp_path / "a.tar"), text="caption")
    assert source[2]["texts"] == ["json 2"] and source[2]["label"] == 7
    with pytest.raises(UserError, match="no field 'captoin' \\(did you mean 'caption'"):
        make_source(str(tmp_path / "a.tar"), text="captoin")


def test_without_txt_the_caption_is_the_json_s(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", png(3)), ("a.json", b'{"caption": "from json"}')])
    assert make_source(str(tmp_path / "a.tar"))[0]["texts"] == ["from json"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_dots_and_long_names(tmp_path, form):
    stem = "folder.v1/" + "x" * 90
    members = [
        (f"{stem}{i}.{end}", data)
        for i in range(3)
        for end, data in (("jpg", png(i)), ("seg.png", b"other"), ("txt", b"c%d" % i))
    ]
    write_tar(tmp_path / "a.tar", members, form)
    source = make_source(str(tmp_path / "a.tar"))
    assert len(source) == 3 and [value(source[i]) for i in range(3)] == [0, 1, 2] and source[2]["texts"] == ["c2"]


def test_the_shard_is_gone_through_once(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar")
    make_source(str(tmp_path / "a.tar"))
    assert (tmp_path / "a.tar.index").exists()
    monkeypatch.setattr(webdataset, "_scan", lambda shard: pytest.fail("indexed again"))
    source = make_source(str(tmp_path / "a.tar"))
    assert len(source) == 5 and value(source[3]) == 3


def test_a_changed_shard_is_indexed_again(tmp_path):
    write_shard(tmp_path / "a.tar", count=5)
    make_source(str(tmp_path / "a.tar"))
    write_shard(tmp_path / "a.tar", start=3, count=7)
    source = make_source(str(tmp_path / "a.tar"))
    assert len(source) == 7 and value(source[0]) == 3


@pytest.mark.parametrize("damage", [b"", b"x" * 100, b"x" * 6000])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    write_shard(tmp_path / "a.tar")
    make_source(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar.index").write_bytes(damage)
    assert value(make_source(str(tmp_path / "a.tar"))[4]) == 4


def test_the_index_goes_to_the_cache_folder_where_shards_are_read_only(tmp_path, cache_folder, monkeypatch):
    write_shard(tmp_path / "a.tar")
    replace = os.replace

    def refuse_next_to_the_shard(source, target):
        if "cache" not in target:
            os.remove(source)
            raise PermissionError(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_next_to_the_shard)
    assert value(make_source(str(tmp_path / "a.tar"))[1]) == 1
    assert len(list((cache_folder / "webdataset").iterdir())) == 1 and not (tmp_path / "a.tar.index").exists()
    monkeypatch.setattr(webdataset, "_scan", lambda shard: pytest.fail("indexed again"))
    assert len(make_source(str(tmp_path / "a.tar"))) == 5


def test_without_any_writable_place_the_index_is_held_in_memory(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError()))
    source = make_source(str(tmp_path / "a.tar"))
    assert [value(source[i]) for i in range(5)] == list(range(5))
    assert value(pickle.loads(pickle.dumps(source))[2]) == 2


def test_a_shard_cut_anywhere_gives_its_complete_samples(tmp_path):
    write_shard(tmp_path / "whole.tar", count=6)
    data = (tmp_path / "whole.tar").read_bytes()
    whole = make_source(str(tmp_path / "whole.tar"))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith("json")]
        after = [-(-end // 512) * 512 for end in ends]
    for cut in sorted({*range(after[1], after[4], 301), *ends, *after[1:5], *(e + 512 for e in ends[1:5])}):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        os.utime(tmp_path / "cut.tar", ns=(cut, cut))
        source = make_source(str(tmp_path / "cut.tar"))
        assert len(source) == sum(end <= cut for end in ends), cut
        assert source.broken == {"truncated shard": 1}
        last = source[len(source) - 1]
        assert last == whole[len(source) - 1]


def test_a_broken_shard_among_others_is_counted(tmp_path):
    write_shard(tmp_path / "0.tar")
    write_shard(tmp_path / "1.tar", 5)
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(b"this is no tar file" * 1000)
    source = make_source(f"{tmp_path}/*.tar")
    assert 5 < len(source) < 10 and source.broken == {"truncated shard": 1, "unreadable shard": 2}
    assert [value(source[i]) for i in range(len(source))] == list(range(len(source)))
    assert make_source(f"{tmp_path}/*.tar").broken == source.broken  # the same from the kept index


@pytest.mark.parametrize("content", [b"", b"this is no tar file" * 1000, bytes(10240)])
def test_nothing_usable(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="a.tar: no usable sample in 1 shards"):
        make_source(str(tmp_path / "a.tar"))


def test_samples_without_image_are_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"alone"), ("b.jpg", png(1)), ("b.txt", b"pair"), ("c.jpg", png(2))])
    source = make_source(str(tmp_path / "a.tar"))
    assert len(source) == 2 and source.broken == {"sample without image": 1}
    assert source[0]["texts"] == ["pair"] and source[1]["texts"] == []


def test_bad_members_are_bad_records(tmp_path):
    members = {"a.jpg": png(1), "a.txt": b"x", "a.json": b"{broken", "b.jpg": png(2), "b.txt": b"y", "b.cls": b"?"}
    members |= {"c.jpg": png(3), "c.cls": b"3"}
    write_tar(tmp_path / "a.tar", members.items())
    source = make_source(str(tmp_path / "a.tar"))
    for index, reason in ((0, "malformed json"), (1, "unknown label")):
        with pytest.raises(BadRecord, match=reason):
            source[index]


def test_a_shard_that_vanishes_later_is_a_bad_record(tmp_path):
    write_shard(tmp_path / "a.tar")
    source = make_source(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadRecord, match="unreadable file"):
        pickle.loads(pickle.dumps(source))[0]  # as in a process that has not opened it yet


def test_reading_does_not_hold_the_index_in_memory(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i:06d}.jpg", b"x") for i in range(4000)])
    make_source(str(tmp_path / "a.tar"))
    tracemalloc.start()
    source = make_source(str(tmp_path / "a.tar"))
    assert source[3999]["image"] == b"x"
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 50_000  # the index has 256,000 bytes


# Layouts that other readers refuse or split otherwise


def pair(key, number):
    return [(f"{key}.png", png(number)), (f"{key}.txt", b"c%d" % number)]


def read(path):
    """`[(image value, texts), ...]` of a shard, and what is broken."""
    source = make_source(str(path))
    return [(value(source[i]), source[i]["texts"]) for i in range(len(source))], source.broken


@pytest.mark.parametrize(
    ("members", "numbers", "broken"),
    [
        (pair("1", 1) + pair("shot v1.2 (b)", 2) + pair("3", 3), [1, 2, 3], {}),
        (pair("2021.05.01", 1) + pair("2021.05.02", 2), [1, 2], {}),
        (pair("a", 1) + [("a.seg.png", b"no")] + pair("b", 2), [1, 2], {}),
        ([("a.depth.png", b"no")] + pair("a", 1), [1], {}),
        (pair("a", 1) + pair("a.v2", 2), [1], {"sample name that continues another one after a dot": 1}),
        (pair("a", 1)[::-1] + pair("b", 2), [1, 2], {}),
        (pair("1", 1) + [("1.png", png(2))] + pair("3", 3), [3], {"two members of one kind in a sample": 1}),
        (pair("1", 1) + [("1.jpg", png(2))] + pair("3", 3), [3], {"two members of one kind in a sample": 1}),
        (pair("1", 1)[:1] + pair("2", 2) + pair("1", 1)[1:], [2], {"members of a sample are apart": 1}),
        (pair("1", 1) + pair("2", 2) + pair("1", 3), [1, 2, 3], {}),
        (pair("x/1", 1) + pair("y/1", 2) + pair("./z/1", 3), [1, 2, 3], {}),
        (pair("1", 1) + [("._2.png", b"?"), ("__MACOSX/2.png", b"?"), (".x/2.png", b"?")] + pair("2", 2), [1, 2], {}),
    ],
)
def test_layouts(tmp_path, members, numbers, broken):
    write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # scanned, then from the index
        assert read(tmp_path / "a.tar") == ([(n, [f"c{n}"]) for n in numbers], broken)


def test_members_apart_are_named_when_nothing_else_is_there(tmp_path):
    write_tar(tmp_path / "a.tar", sorted(pair("1", 1) + pair("2", 2), key=lambda member: member[0][-3:]))
    with pytest.raises(UserError, match="no usable sample in 1 shards .members of a sample are apart."):
        make_source(str(tmp_path / "a.tar"))


def test_samples_of_links_are_counted(tmp_path):
    """`tar` writes the second of two hard-linked files as a link, without its data."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data, kind in (
            ("1.png", png(1), tarfile.REGTYPE),
            ("1.txt", b"c1", tarfile.REGTYPE),
            ("2.png", b"", tarfile.LNKTYPE),
            ("2.txt", b"", tarfile.LNKTYPE),
            ("3.png", b"", tarfile.SYMTYPE),
            ("3.txt", b"c3", tarfile.REGTYPE),
            ("4.png", png(4), tarfile.REGTYPE),
            ("4.txt", b"", tarfile.LNKTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(data), "" if data else "1" + name[1:]
            tar.addfile(member, io.BytesIO(data))
    for _ in range(2):  # scanned, then from the index
        assert read(tmp_path / "a.tar") == ([(1, ["c1"])], {"link to another member or file": 3})


def test_joined_archives(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pair("same", i))
    data = [(tmp_path / f"{i}.tar").read_bytes() for i in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(data))
    assert read(tmp_path / "a.tar") == ([(i, [f"c{i}"]) for i in range(3)], {})
    (tmp_path / "b.tar").write_bytes(data[0] + data[1][:3000])
    assert read(tmp_path / "b.tar") == ([(0, ["c0"])], {"truncated shard": 1})
    (tmp_path / "c.tar").write_bytes(data[0] + b"no archive" * 1000)
    assert read(tmp_path / "c.tar") == ([(0, ["c0"])], {"unreadable data after the end of an archive": 1})


def test_each_record_chooses_between_txt_and_json(tmp_path):
    meta = [(f"{i:02d}.json", json.dumps({"caption": f"c{i}"}).encode()) for i in range(40)]
    write_tar(tmp_path / "0.tar", [m for i in range(20) for m in ((f"{i:02d}.png", png(i)), meta[i])])
    write_tar(tmp_path / "1.tar", [m for i in range(20, 40) for m in pair(f"{i:02d}", i)])
    assert read(tmp_path) == ([(i, [f"c{i}"]) for i in range(40)], {})
    write_tar(tmp_path / "2.tar", [*pair("a", 40), ("a.json", b'{"caption": "json"}'), ("a.cls", b"3")])
    source = make_source(str(tmp_path))
    assert source[40]["texts"] == ["c40"] and [source[i]["label"] for i in (0, 40)] == [-1, 3]


def test_several_labels_in_the_json(tmp_path):
    members = [(f"{i}.{e}", v) for i, labels in enumerate(([1, 3], 2, [])) for e, v in pair_with_json(i, tags=labels)]
    write_tar(tmp_path / "a.tar", members)
    source = make_source(str(tmp_path / "a.tar"), label="tags")
    assert [source[i]["label"] for i in range(3)] == [(1, 3), (2,), ()]
    assert "label" not in make_source(str(tmp_path / "a.tar"))[0]


def test_numbered_classes_get_the_names_of_the_json(tmp_path):
    """The error of a mixture gives the source string that joins the classes by name."""
    for shard, names in (("a", ("cat", "dog")), ("b", ("dog", "cow"))):
        lines = [
            (f"{i}.{ending}", value)
            for i, name in enumerate(names)
            for ending, value in (*pair_with_json(i, class_name=name), ("cls", str(i).encode()))
        ]
        write_tar(tmp_path / f"{shard}.tar", lines)
    a, b = f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"
    with pytest.raises(UserError, match=r"class_name, which takes the classes from this field; write ") as error:
        make_source(f"{a} + {b}").check_labels()
    named = make_source(" + ".join(re.findall(r"write (\S+),", str(error.value))))
    assert named.class_names == ["cat", "dog", "cow"] and [named[i]["label"] for i in range(4)] == [0, 1, 1, 2]
    make_source(f"{a}*2 + {a}").check_labels()
    assert make_source(a, label="class_name").class_names == ["cat", "dog"]


def pair_with_json(number, **meta):
    """The image and the JSON of a sample, `(ending, bytes)`."""
    return ("jpg", png(number)), ("json", json.dumps(meta).encode())


@pytest.mark.parametrize(("cls", "label"), [(b"7.0\n", 7), (b"", -1), (b" nan ", -1)])
def test_spellings_of_labels(tmp_path, cls, label):
    write_shard(tmp_path / "a.tar", cls=cls)
    assert make_source(str(tmp_path / "a.tar"))[0]["label"] == label


def test_lines_of_a_txt_are_captions_on_request(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("1.png", png(1)), ("1.txt", "a red\u2028square\r\n\nred\x85 \x0c!\n".encode()), *pair("2", 2)],
    )
    source = make_source(f"{tmp_path}/a.tar?captions=lines")
    assert [source[i]["texts"] for i in range(2)] == [["a red\u2028square", "red\x85 \x0c!"], ["c2"]]
    assert make_source(str(tmp_path / "a.tar"))[0]["texts"] == ["a red\u2028square\r\n\nred\x85 \x0c!\n"]
    with pytest.raises(UserError, match="captions=words: allowed is captions=lines"):
        make_source(f"{tmp_path}/a.tar?captions=words")
    with pytest.raises(UserError, match="emoji: captions=lines is an option of tar shards"):
        make_source("emoji?captions=lines")


def test_brackets_nested_too_deep_are_malformed(tmp_path):
    write_tar(tmp_path / "a.tar", [*pair("1", 1), ("1.json", b"[" * 100_000)])
    with pytest.raises(BadRecord, match="malformed json"):
        make_source(str(tmp_path / "a.tar"))[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_the_layout_an_image_keeps_its_caption(tmp_path_factory, data):
    """Members of a few samples in any order: each sample is read whole, or counted."""
    keys = data.draw(st.lists(st.sampled_from(["a", "b", "a.b", "v1.2 x", "d/a"]), min_size=1, max_size=4, unique=True))
    members = [(f"{key}.{end}", key.encode()) for key in keys for end in ("jpg", "txt")]
    members = data.draw(st.permutations(members) | st.just(members))
    path = tmp_path_factory.mktemp("layout") / "a.tar"
    write_tar(path, members)
    dotted = [key for key in keys if "." in key and key.partition(".")[0] in keys]
    whole = [
        key
        for key in keys
        if key not in dotted and len({m[0].rpartition(".")[0] for m in _between(members, key)} - {*dotted, key}) == 0
    ]
    rows, broken = webdataset._scan(str(path))
    assert len(rows) == len(whole) and broken.total() == len(keys) - len(whole)
    if whole:
        source = make_source(str(path))
        read = [(source[i]["image"].decode(), source[i]["texts"]) for i in range(len(source))]
        assert sorted(read) == sorted((key, [key]) for key in whole)


def _between(members, key):
    places = [i for i, (name, _) in enumerate(members) if name.rpartition(".")[0] == key]
    return members[places[0] : places[-1] + 1]
