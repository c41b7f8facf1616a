"""Selections and indexes of sources with blocks, of columns, and of many records."""

import hashlib
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.blocks import Block, BlockSource, read_block
from clip_jax.data.records import BadRecord, BaseSource, fingerprint
from clip_jax.data.sources import MemorySource, field_values, parquet_values
from clip_jax.data.sources.columns import ColumnsSource
from clip_jax.data.sources.index import IndexedSource
from clip_jax.data.sources.kept import Bits, Places, keep
from clip_jax.data.sources.selection import select
from clip_jax.errors import UserError

LANGUAGES = ("en", "de", None, "", "fr")


class Blocks(BlockSource):
    """Records of blocks of the given sizes; counts the blocks that are read, and has columns where asked for."""

    block_bytes = 1000.0

    def __init__(self, sizes, columns=()):
        super().__init__("blocks")
        self._set_blocks(sizes)
        self.reads, self._columns = 0, columns

    def read_block(self, number):
        self.reads += 1
        return Block(int(self.blocks[number]), lambda index: record(int(self._starts[number]) + index))

    def column(self, field):
        if field not in self._columns:
            return None
        values = [values_of(i).get(field) for i in range(len(self))]
        if isinstance(self._columns, dict):
            return self._columns[field](values)
        return np.array(values)


def values_of(i):
    """Fields of record i of each kind of value, some of them empty."""
    score = float("nan") if i % 9 == 0 else i % 5 / 4
    tags = None if i % 8 == 0 else [] if i % 8 == 1 else [f"t{i % 3}", "x"]
    return {"language": LANGUAGES[i % 5], "score": score, "size": i % 11, "good": i % 2 == 0, "tags": tags}


def record(i):
    if i == 13:
        raise BadRecord("corrupt image")
    return {"image": b"", "texts": [f"c{i}", "more"], "number": i} | values_of(i)


SIZES = (7, 0, 1, 20, 12, 30)


def numbers(source):
    return [source[i]["number"] for i in range(len(source))]


def check_blocks(source, base):
    """Blocks agree with single records, are read once each, and are as many as those of the source's source."""
    assert len(source.blocks) == len(SIZES) and source.blocks.sum() == len(source) and source.sequential
    assert source.block_bytes == 1000.0 and source.blocks.dtype == np.int64
    base.reads = 0
    found = [read_block(source, number) for number in range(len(SIZES))]
    assert base.reads == np.count_nonzero(source.blocks)
    assert [len(block) for block in found] == source.blocks.tolist()
    records = [block[i] for block in found for i in range(len(block))]
    assert repr(records) == repr([source[i] for i in range(len(source))])
    copy = pickle.loads(pickle.dumps(source))
    assert repr(records) == repr([copy[i] for i in range(len(copy))])


def test_a_selection_has_the_blocks_of_its_source():
    base = Blocks(SIZES)
    source = select(base, (("where", "language:de"),), "some")
    assert numbers(source) == list(range(1, 70, 5)) and source.blocks.tolist() == [2, 0, 0, 4, 2, 6]
    check_blocks(source, base)
    again = select(source, (("where", "size:3"),), "fewer")
    assert numbers(again) == [i for i in range(1, 70, 5) if i % 11 == 3]
    check_blocks(again, base)
    classes = select(base, (("label", "tags"), ("where", "good:True")), "classes")
    assert classes.class_names == ["t0", "t1", "t2", "x"] and [classes[i]["label"] for i in (0, 1)] == [(), (2, 3)]
    check_blocks(classes, base)


def test_a_selection_of_a_source_without_blocks():
    source = select(MemorySource([{"n": i % 3, "texts": []} for i in range(2000)]), (("where", "n:1"),), "some")
    assert getattr(source, "blocks", None) is None and len(source) == 667
    assert all(source[i]["n"] == 1 for i in (0, 300, 666))
    assert [len(read_block(source, number)) for number in (0, 1)] == [512, 155]


def test_an_index_has_the_blocks_of_its_source(tmp_path):
    base = Blocks(SIZES)
    rows = np.array([(0, 3), (6, 1), (7, 2), (40, 3), (69, 1)], np.int64)
    np.save(tmp_path / "index.npy", rows)
    report = {"fingerprint": fingerprint(base), "records": len(base), "source": "blocks"}
    (tmp_path / "report.json").write_text(json.dumps(report))
    source = IndexedSource(base, tmp_path)
    assert source.blocks.tolist() == [2, 0, 1, 0, 0, 2]
    assert [source[i]["texts"] for i in range(5)] == [["c0", "more"], ["c6"], ["more"], ["c40", "more"], ["c69"]]
    check_blocks(source, base)
    assert len(pickle.dumps(source)) < 10_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    share=st.sampled_from([0, 0.01, 0.3, 1]),
    seed=st.integers(0, 9),
)
def test_bits_and_places_agree_with_a_list(sizes, share, seed):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    mask = np.random.default_rng(seed).random(starts[-1]) < share
    places = np.flatnonzero(mask)
    for kept in (Bits(np.packbits(mask), starts), Places(places, starts)):
        assert len(kept) == len(places) and [kept[i] for i in range(len(kept))] == places.tolist()
        assert np.diff(kept.firsts).tolist() == [int(mask[a:b].sum()) for a, b in zip(starts, starts[1:], strict=False)]
        for block, start in enumerate(starts[:-1]):
            np.testing.assert_array_equal(kept.inside(block), np.flatnonzero(mask[start : starts[block + 1]]))
        middle = len(places) // 2
        np.testing.assert_array_equal(kept.between(middle // 2, middle), places[middle // 2 : middle])


def test_copies_share_what_is_kept(monkeypatch):
    monkeypatch.setattr("clip_jax.data.shared._LEAST", 0)
    starts = np.arange(0, 20_001, 10)
    for step in (7, 100):
        kept = keep(np.packbits(np.arange(20_000) % step == 0), starts)
        text = pickle.dumps(kept)
        copy = pickle.loads(text)
        assert len(text) < 500 and type(copy) is type(kept) and [*copy.inside(70)] == [*kept.inside(70)]
        assert len(copy) == len(kept) and copy[5] == kept[5] == 5 * step and pickle.dumps(copy)


def test_many_bits():
    """More than are unpacked at once; few kept records are held by their places."""
    starts = np.arange(0, 10_000_001, 1000)
    for step, kind in ((7, Bits), (100, Places)):
        mask = np.zeros(10_000_000, bool)
        mask[5::step] = True
        kept = keep(np.packbits(mask), starts)
        assert isinstance(kept, kind) and len(kept) == mask.sum() and kept[len(kept) - 3] == 5 + step * (len(kept) - 3)
        np.testing.assert_array_equal(kept.inside(9999), np.flatnonzero(mask[-1000:]))
        np.testing.assert_array_equal(kept.between(10, len(kept)), np.arange(5, 10_000_000, step)[10:])


# Columns

ARRAYS = {
    "language": lambda v: pa.array([x.encode() if x else x for x in v]).cast(pa.string()).dictionary_encode(),
    "score": lambda v: pa.chunked_array([pa.array(v[:10]), pa.array(v[10:])]),
    "size": lambda v: np.array(v, np.int16),
    "good": pa.array,
    "tags": pa.array,
}
SELECTIONS = (
    [("where", "language:de")],
    [("where", "size:3")],
    [("where", "score:0.5")],
    [("where", "good:True")],
    [("has", "language")],
    [("has", "score")],
    [("has", "tags"), ("where", "language:fr")],
    [("part", "language:1/2")],
    [("part", "size:!1/3")],
    [("part", "record:2/3"), ("has", "good")],
    [("label", "language"), ("has", "score")],
    [("label", "tags")],
    [("label", "size"), ("where", "size:3")],
)


@pytest.mark.parametrize("options", SELECTIONS, ids=repr)
def test_a_selection_by_columns_is_that_by_records(options, monkeypatch):
    monkeypatch.setattr(field_values, "CHUNK", 16)
    read = select(BlocksWithoutBad(SIZES), options, "some")
    base = BlocksWithoutBad(SIZES, ARRAYS)
    of_columns = select(base, options, "some")
    assert base.reads == 0
    assert repr([of_columns[i] for i in range(len(of_columns))]) == repr([read[i] for i in range(len(read))])
    assert of_columns.class_names == read.class_names and of_columns.multi_label == read.multi_label


class BlocksWithoutBad(Blocks):
    def read_block(self, number):
        block = super().read_block(number)
        return Block(len(block), lambda i: block[i] if self._starts[number] + i != 13 else record(12) | values_of(13))


def test_columns_of_a_selection_and_of_an_index(monkeypatch):
    monkeypatch.setattr(field_values, "CHUNK", 16)
    base = Blocks(SIZES, ARRAYS)
    for field in ARRAYS:
        some = select(base, (("has", "score"),), "some")
        values = some.column(field)[3:20]
        assert pa.array(values).to_pylist() == [values_of(i)[field] for i in range(70) if i % 9][3:20]
    again = select(some, (("where", "language:en"), ("label", "tags")), "fewer")
    assert base.reads == 0 and numbers(again) == [i for i in range(0, 70, 5) if i % 9]
    assert again.column("class_name") is None and again.column("number") is None


def test_where_no_record_has_the_value():
    for base in (Blocks(SIZES), Blocks(SIZES, ARRAYS)):
        with pytest.raises(UserError, match=r"some: no record has language 'enn' \(did you mean 'en'\?\)"):
            select(base, (("where", "language:enn"),), "some")


# Many records


class Synthetic(BaseSource):
    """Many records; one that is read fails the test. `column` makes values when they are asked for."""

    def __init__(self, length, field=None):
        super().__init__("synthetic")
        self._length, self._field = length, field

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if self._field is None:
            raise AssertionError("a record was read")
        return {"image": b"", "texts": [str(index)], "number": index}

    def column(self, field):
        return Remainders() if field == self._field else None


class Remainders:
    def __getitem__(self, span):
        return np.arange(span.start, span.stop) % 1000


def test_many_records_are_not_read_for_a_selection():
    base = Synthetic(30_000_000)
    message = r"would read 30,000,000 records for url, more than 20,000,000; make a manifest .*--columns=url$"
    with pytest.raises(UserError, match=message):
        select(base, (("where", "url:x"),), "some")
    with pytest.raises(UserError, match="by= is for sources of up to 20,000,000 records, not 30,000,000; write a mix"):
        select(base, (("by", "url"),), "some")


def test_parts_of_records(monkeypatch):
    """Up to 20,000,000 records by SHA-256 of their digits; of more by a hash that is computed for all at once."""
    base = MemorySource([{"texts": []}] * 3000)
    kept = [i for i in range(3000) if int(hashlib.sha256(str(i).encode()).hexdigest()[:16], 16) % 3 == 1]
    part = select(base, (("part", "record:2/3"),), "some")
    assert part._kept.between(0, len(part)).tolist() == kept
    monkeypatch.setattr(field_values, "READ", 1000)
    parts = [select(base, (("part", f"record:{i}/3"),), "some") for i in (1, 2, "!1")]
    parts = [part._kept.between(0, len(part)).tolist() for part in parts]
    assert not set(parts[0]) & set(parts[1]) and sorted(parts[0] + parts[2]) == list(range(3000))
    assert set(parts[1]) < set(parts[2]) and 900 < len(parts[0]) < 1100
    # The first numbers of SplitMix64 from seed 0.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [i for i in parts[1] if i < 4] == [i for i, x in enumerate(first) if x % 3 == 1]


def test_a_selection_by_a_column_of_many_records():
    source = select(Synthetic(21_000_000, "kind"), (("where", "kind:77"),), "some")
    assert len(source) == 21_000 and source[20_999]["number"] == 20_999_077


def test_a_side_table_in_parquet(tmp_path, monkeypatch):
    """Its columns are read in runs of row groups, and a selection reads no record."""
    monkeypatch.setattr(field_values, "CHUNK", 16)
    monkeypatch.setattr(parquet_values, "_READ", 12)
    rows = [{"score2": i / 4, "kind": "ab"[i % 2] if i % 7 else None} for i in range(70)]
    for number, (start, stop) in enumerate([(0, 33), (33, 70)]):
        table = pa.Table.from_pylist(rows[start:stop])
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=5)
    base = Blocks(SIZES, ARRAYS)
    source = ColumnsSource(base, str(tmp_path))
    assert source.column("kind")[3:60].to_pylist() == [row["kind"] for row in rows[3:60]]
    assert source.column("number") is None and source.column("size")[2:4].tolist() == [2, 3]
    some = select(source, (("where", "kind:b"), ("has", "score")), "some")
    assert base.reads == 0
    assert len(some) == sum(i % 2 and i % 7 and i % 9 and 1 for i in range(70))
    assert [(some[i]["number"], some[i]["score2"]) for i in (0, 1, len(some) - 1)] == [
        (1, 0.25),
        (3, 0.75),
        (69, 17.25),
    ]
