"""MDS shards: a shard that mosaicml-streaming 0.13.0 wrote, and shards of our own with every kind of damage."""

import base64
import json
import struct
import zlib

import fsspec
import numpy as np
import pytest
from data_helpers import encoded

from clip_jax.data import decode, remote
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source, mds
from clip_jax.errors import UserError

# Three samples, with a column of each encoding but "bytes" images and "jpeg".
GOLDEN = zlib.decompress(
    base64.b85decode(
        "c-obc&ui2`6vt<iSeMcj{LvnyNElH(gp#D|x&)!EtmuL+BAzT^jrq}z<j0a^wcD~#dh_NV;NRe1;6c%YibuWsFL>xdi;eSUCf03(*avUs"
        "&E(B{-_K-Zgped5v`77ijL=U7p)Kqt;V_E(e(WY5iPti0sjE2loHTVtSW|J9r!WO!;^d1agyN$mwk%UygzYC;62na59Hs#Y*%YtA^mvr}n"
        "JCxye3wK{ST0$eav@HaJ?PSC!N!nAt!5duu}vc(J$53W%cf@_!*vEZ;bH=IBp@5U$2GFzNA;!7Gp2xLWdR!rjQME5j}ArmiPjm}<gMdj7"
        "-}jXo0@7i%SF2k{%54g2Cp6sQa{T8!V=$bkfag4CribV$1v8NY@K(vncPjkACibbO6!`Tx7#hM0zdUrQO6ul(-$y9y+Qpf^&a9z9|EEe0"
        "?mrJUYBH4lVs(DxJp%5-@Qivur2I>5JOXSd(3u<qJWb0t)UwAJM+w*-|O9KOrHlKjqdHvebHE|L*ALW?{`5(x3ltK<E86;yZ-hKv-dRV)"
        "MfPb;b*A}wYxWaomV#=?HCJ&t}p0xIBH7mkGSm*Rp63<RRs8y0B77&CAh)CmuQtrKL9uEaRIh}2>c4O<A8se06%>J{d%#xy7xCYDmc1%w"
        "Tj(PB<L+JVEbbgy>jTc*9AR;KUvb7j2=kQa+M#@oA!9WioVJ0IP^0U^ylVkmu8oCFHX{z{FV5oB13bDiGU0E^cx?YBen"
    )
)


def shard(rows, columns=(("caption", "str", None), ("image", "jpeg", None), ("number", "int", 8))):
    """The bytes of a shard of samples, each a list of bytes in the order of the columns (name, encoding, size)."""
    names, encodings, sizes = map(list, zip(*columns, strict=True))
    about = {"version": 2, "format": "mds", "column_names": names, "column_encodings": encodings, "column_sizes": sizes}
    about = json.dumps(about | {"compression": None, "hashes": [], "size_limit": None}).encode()
    samples = []
    for row in rows:
        given = [len(value) for value, size in zip(row, sizes, strict=True) if size is None]
        samples.append(struct.pack(f"<{len(given)}I", *given) + b"".join(row))
    offsets = np.cumsum([8 + 4 * len(samples) + len(about), *map(len, samples)])
    return struct.pack(f"<{len(samples) + 2}I", len(samples), *offsets) + about + b"".join(samples)


def rows(count, first=0):
    return [[b"caption %d" % i, encoded(i, "JPEG"), struct.pack("<q", i)] for i in range(first, first + count)]


def write(path, data):
    path.write_bytes(data)
    return str(path)


def test_a_shard_of_the_library(tmp_path):
    path = write(tmp_path / "shard.00000.mds", GOLDEN)
    found, broken = mds.scan(path, 2)
    records = [record for start, end, _ in found for record in mds.read(path, start, end)]
    assert [samples for *_, samples in found] == [2, 1] and not broken
    for i, record in enumerate(records):
        arrays = {name: record.pop(name) for name in ("arr", "fixed", "typed", "pil")}
        assert decode.decode_image(record.pop("png"))[0, 0].tolist() == [40 * i, 9, 200]
        assert record == {
            "caption": f"caption {i} ü",
            "f4": 0.5 * i,
            "js": {"a": [1, i]},
            "n": -i - 2**40,
            "raw": b"\0\xff" * i,
            "sd": "1.10",
            "sf": 0.25 * i,
            "si": 10**20 + i,
            "u64": 2**63 + i,
            "u8": 200 + i,
        }
        grey = round((40 * i * 299 + 9 * 587 + 200 * 114) / 1000)
        right = {
            "arr": np.arange(6, dtype=np.uint8).reshape(2, 3) + i,
            "fixed": np.full((2, 3), i, np.float32),
            "typed": np.arange(1 + i, dtype=np.int16),
            "pil": np.full((2, 3), grey, np.uint8),
        }
        for name, value in arrays.items():
            np.testing.assert_array_equal(value, right[name], err_msg=name, strict=True)


def test_source(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "index.json").write_text("{}")
    for number in range(2):
        write(tmp_path / "train" / f"shard.{number:05d}.mds", shard(rows(5, 5 * number)))
    write(tmp_path / "val" / "shard.00000.mds", shard(rows(1, 90)))
    for spec in (f"{tmp_path}/train", f"{tmp_path}/train/*.mds", str(tmp_path)):
        source = make_source(spec)
        assert len(source) == 10 and source.blocks.tolist() == [5, 5] and source.sequential
    assert make_source(str(tmp_path), "val")[0]["number"] == 90
    assert source[7] == {"image": encoded(7, "JPEG"), "texts": ["caption 7"], "caption": "caption 7", "number": 7}
    write(tmp_path / "train" / "shard.00000.mds", shard(rows(4)))
    with pytest.raises(UserError, match="shard.00000.mds changed since its blocks were found"):
        source.read_block(0)


def test_images_that_are_not_encoded(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    raw = struct.pack("<3I", 4, 2, 3) + b"RGB" + pixels.tobytes()
    palette = struct.pack("<3I", 4, 2, 1) + b"P" + bytes(8)
    path = write(tmp_path / "a.mds", shard([[raw], [palette]], [("image", "pil", None)]))
    source = make_source(path)
    np.testing.assert_array_equal(source[0]["image"], pixels)
    with pytest.raises(BadRecord, match="malformed record"):
        source[1]


def test_damage(tmp_path):
    data = shard(rows(4))
    starts = struct.unpack_from("<5I", data, 4)
    path = tmp_path / "a.mds"
    for cut in (starts[2], starts[2] + 9, starts[3] - 1):
        write(path, data[:cut])
        found, broken = mds.scan(str(path), 1)
        assert [row[:2] for row in found] == [*zip(starts[:2], starts[1:3], strict=True)][: len(found)]
        assert len(found) == 2 and broken == {"truncated shard": 1}
    for content in (b"", b"\0", b"no shard" * 100, data[: starts[0] - 5], data[: starts[1] - 1], bytes(100)):
        write(path, content)
        with pytest.raises(UserError, match=r"a.mds: no usable sample in 1 shards \(.*(unreadable|empty)"):
            make_source(str(path))
    write(path, data[: starts[1] - 8] + b"\xff" * 8 + data[starts[1] :])  # of the number of the first sample
    assert mds.read(str(path), starts[0], starts[1])[0]["number"] == -1
    with pytest.raises(EOFError):
        mds.read(str(path), starts[3], starts[4] + 1)


def test_what_is_not_read(tmp_path):
    path = write(tmp_path / "a.mds", shard([[b""]], [("x", "pkl", None)]))
    with pytest.raises(UserError, match="a.mds: column 'x' is encoded as 'pkl', which is not read; known are bytes, "):
        make_source(path)
    (tmp_path / "z").mkdir()
    write(tmp_path / "z" / "shard.00000.mds.zstd", shard(rows(1)))
    for spec in (f"{tmp_path}/z/shard.00000.mds.zstd", f"{tmp_path}/z"):
        with pytest.raises(UserError, match="shard.00000.mds.zstd: a compressed shard cannot be read by offset"):
            make_source(spec)


def test_a_remote_shard(monkeypatch):
    """Its front is read once to find the blocks and once to read them; a block is one request."""
    data = shard(rows(6))
    fsspec.filesystem("memory").pipe_file("/mds/a.mds", data)
    reads, read = [], remote.read
    monkeypatch.setattr(remote, "read", lambda *place: reads.append(place[1:]) or read(*place))
    path = "memory://mds/a.mds"
    found, _ = mds.scan(path, 2)
    assert reads == [(0, mds._FRONT)]
    numbers = [record["number"] for start, end, _ in found for record in mds.read(path, start, end)]
    assert numbers == list(range(6)) and reads[1:] == [found[0][:2], (0, mds._FRONT), *(row[:2] for row in found[1:])]
