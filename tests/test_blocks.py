"""The order by blocks: the same rows on any hosts and workers, each record once an epoch, each block read once."""

import pickle
from collections import Counter

import numpy as np
import pytest
from data_helpers import PLAIN, Bytes, assert_equal, concatenate, loader, records, take

from clip_jax.data.blocks import Block, BlockSource
from clip_jax.data.lanes import Lanes
from clip_jax.data.loader import check_source, iterate_once
from clip_jax.data.order import Draw, Order
from clip_jax.data.reading import Reading
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.windows import WindowReader
from clip_jax.errors import StorageError, UserError

SIZES = (5, 7, 0, 6, 3, 8, 4, 7, 6, 5, 9, 4)  # 64 records


class Shards(BlockSource):
    """Records in blocks in memory, which counts what is read."""

    block_bytes = 1000

    def __init__(self, sizes=SIZES, bad=(), name="shards", failing=()):
        super().__init__(name)
        self._set_blocks(sizes)
        self._records, self._bad, self._failing = records(sum(sizes)), set(bad), set(failing)
        self.reads = Counter()

    def read_block(self, number):
        self.reads[number] += 1
        if number in self._failing:
            raise StorageError("gs://bucket/shard.tar: 503")
        first = sum(self.blocks[:number].tolist())
        return Block(int(self.blocks[number]), lambda index: self._record(first + index))

    def _record(self, index):
        if index in self._bad:
            raise BadRecord("corrupt image")
        return self._records[index]


def by_blocks(source, views=PLAIN, lanes=4, window=2, order="auto", **arguments):
    return loader(source, views, reading=Reading(order, lanes, window), **(dict(threads=0) | arguments))


def ids(batches):
    return np.concatenate([batch["example_id"] for batch in batches])


@pytest.mark.parametrize("window", [1, 3, 100])
def test_every_epoch_has_every_record_once_in_a_new_order(window):
    epochs = ids(take(by_blocks(Shards(), window=window), 24)).reshape(3, 64)
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs.tolist())
    assert len(set(map(tuple, epochs.tolist()))) == 3


def test_fewer_records_than_lanes_are_left_out_and_others_each_epoch():
    source = Shards((*SIZES, 3))
    epochs = ids(take(by_blocks(source, lanes=8), 24)).reshape(3, 64).tolist()
    left_out = [set(range(67)) - set(epoch) for epoch in epochs]
    assert [len(out) for out in left_out] == [3, 3, 3] and len(set.union(*left_out)) > 3


def test_blocks_and_records_are_shuffled_independently():
    lanes = Lanes(np.ones(50, int), 3, 1, 50)
    blocks, _ = lanes._epoch(0)
    assert lanes.window(0, 0, 0).ids.tolist() != blocks[blocks].tolist()  # as by one permutation for both


def test_a_row_is_near_the_rows_of_its_lane_and_lanes_are_apart():
    sizes = np.full(400, 16)
    order = Order([0, 6400], [1.0], 0, 64, False, lanes=4, blocks=[sizes], window=4)
    draws = [draw for step in range(8) for draw in order.rows(step, 0, 64)]
    blocks = {}
    for draw in draws:
        window = order.parts[0].window(draw.lane, draw.epoch, draw.window)
        blocks.setdefault(draw.lane, set()).add(int(window.ids[draw.place]) // 16)
    # 128 records of a lane lie in at most three windows, which are 4 blocks long, and the two at their ends.
    assert all(8 <= len(found) <= 13 for found in blocks.values())
    assert len(set.union(*blocks.values())) == sum(map(len, blocks.values()))


def test_the_digest_of_an_order_tells_its_blocks_and_records():
    def digest(starts=(0, 64), seed=0, sizes=(32, 32), window=4):
        blocks = [np.array(sizes)] if sizes else None
        return Order(list(starts), [1.0], seed, 16, False, lanes=4 * bool(sizes), blocks=blocks, window=window).digest

    others = [digest(starts=(0, 65)), digest(seed=1), digest(sizes=(16, 48)), digest(window=2), digest(sizes=None)]
    assert digest() == digest() and len({digest(), *others}) == 6


@pytest.fixture(scope="module")
def sources():
    mixture = MixtureSource([Shards(), Shards((6,) * 9, name="other"), MemorySource(records(40))], [3, 1.5, 1])
    return {"alone": Shards(), "mixture": mixture}


@pytest.mark.parametrize("one_source", [False, True])
@pytest.mark.parametrize("kind", ["alone", "mixture"])
def test_hosts_and_resumption_change_nothing(kind, one_source, sources):
    source, common = sources[kind], dict(lanes=8, batch_size=16, one_source=one_source)
    straight = take(by_blocks(source, **common), 12)
    for hosts in (1, 2, 4, 8):
        for start in (0, 3, 7):  # the end of the epoch of 64 records is in step 4
            shares = [by_blocks(source, host=h, hosts=hosts, start_step=start, **common) for h in range(hosts)]
            assert_equal(concatenate([take(share, 2) for share in shares]), straight[start : start + 2])
    far = [take(by_blocks(source, start_step=777, host=h, hosts=2, **common), 2) for h in range(2)]
    assert_equal(concatenate(far), take(by_blocks(source, start_step=777, **common), 2))


def test_threads_change_nothing(sources):
    plain = take(by_blocks(sources["mixture"], lanes=8, batch_size=16), 6)
    assert_equal(take(by_blocks(sources["mixture"], lanes=8, batch_size=16, threads=4), 6), plain)


def test_each_block_is_read_once_and_by_one_lane():
    source = Shards((16,) * 40)
    taken = take(by_blocks(source, lanes=2, batch_size=16, window=3), 40)
    assert sorted(ids(taken)) == list(range(640))
    # The next epoch's first blocks are asked for ahead. A block on the border of two lanes is read by both.
    assert sum(source.reads.values()) <= 40 + 1 + 2 * 4


def test_a_window_starts_with_no_more_than_two_windows_in_memory():
    source = Shards((16,) * 40)
    order_of = by_blocks(source, lanes=1, batch_size=16, window=4)
    next(order_of)
    assert sum(source.reads.values()) <= 8


def test_a_window_that_is_used_up_before_its_predecessor_is_not_opened_again():
    """A thread may be late with the last draw of a window."""
    reader = WindowReader(Lanes(np.full(8, 4), 0, 1, 1), lambda block: [], {0: 0})
    first, second = ([Draw(0, 0, lane=0, window=window, place=i) for i in range(4)] for window in range(2))
    for draw in first + second:
        reader.get(draw)
    for draw in first[1:] + second + first[:1]:
        reader.release(draw)
    reader.close()
    assert list(reader._open[0]) == [(0, 2)]


def test_copies_of_the_order_share_its_table_of_blocks(monkeypatch):
    monkeypatch.setattr("clip_jax.data.shared._LEAST", 0)
    lanes = Lanes(np.full(1000, 4), 0, 2, 3)
    text = pickle.dumps(lanes)
    assert len(text) < 1000
    np.testing.assert_array_equal(pickle.loads(text).window(1, 0, 2).ids, lanes.window(1, 0, 2).ids)


def test_the_shares_of_a_mixture_are_exact_in_every_batch(sources):
    batches = take(by_blocks(sources["mixture"], lanes=8, batch_size=16), 20)
    counts = np.array([np.bincount(batch["source_id"], minlength=3) for batch in batches])
    np.testing.assert_allclose(counts, np.tile(np.array([3, 1.5, 1]) / 5.5 * 16, (20, 1)), atol=1.5)


def test_a_bad_record_is_replaced_within_its_window():
    source = Shards((16,) * 8, bad=range(32, 48))
    loader = by_blocks(source, lanes=2, window=2, batch_size=16, max_bad_share=0.5)
    taken = take(loader, 8)
    assert loader.skipped["corrupt image"] >= 16 and not set(range(32, 48)) & set(ids(taken).tolist())
    again = [by_blocks(source, lanes=2, window=2, batch_size=16, max_bad_share=0.5, host=h, hosts=2) for h in range(2)]
    assert_equal(concatenate([take(share, 8) for share in again]), taken)


def test_a_window_without_a_usable_record_is_replaced_by_records_from_anywhere():
    source, common = Shards((16,) * 8, bad=range(32, 48)), dict(lanes=2, window=1, batch_size=16, max_bad_share=1)
    taken = take(by_blocks(source, **common), 8)
    assert set(ids(taken).tolist()) <= set(range(128)) - set(range(32, 48))
    assert_equal(concatenate([take(by_blocks(source, host=h, hosts=2, **common), 8) for h in range(2)]), taken)


def test_any_source_can_be_read_by_blocks_and_auto_leaves_it_as_it_was():
    source = MemorySource(records(1100))
    assert_equal(take(by_blocks(source, order="auto"), 2), take(loader(source, PLAIN, threads=0), 2))
    epoch = ids(take(by_blocks(source, order="blocks", lanes=2, batch_size=22), 50))
    assert sorted(epoch) == list(range(1100))
    records_order = ids(take(by_blocks(Shards(), order="records"), 8))
    assert sorted(records_order) == list(range(64))


def test_a_source_of_blocks_reads_record_by_record_too():
    source = pickle.loads(pickle.dumps(Shards()))
    assert [source[i]["number"] for i in range(64)] == list(range(64))
    assert source.reads == Counter({number: 1 for number, size in enumerate(SIZES) if size})
    with pytest.raises(IndexError):
        source[64]
    evaluated = ids(list(iterate_once(source, PLAIN, Bytes(), 16)))
    assert evaluated.tolist() == list(range(64))


@pytest.mark.parametrize(
    ("lanes", "hosts", "message"),
    [
        (3, 1, "data.lanes=3 must divide data.batch_size=8"),
        (2, 4, "data.lanes=2 must be a multiple of the number of hosts, 4"),
    ],
)
def test_lanes_that_do_not_fit(lanes, hosts, message):
    with pytest.raises(UserError, match=message):
        by_blocks(Shards(), lanes=lanes, hosts=hosts)


def test_more_lanes_than_records():
    with pytest.raises(UserError, match="shards has 2 records, fewer than data.lanes=8"):
        check_source(Shards((2,)), PLAIN, Bytes(), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_store_ends_the_loader_with_its_error(workers):
    failing = by_blocks(Shards(failing=[3, 4]), workers=workers)
    with pytest.raises(StorageError, match="gs://bucket/shard.tar: 503"):
        take(failing, 16)


def test_the_line_says_what_is_read_and_how_much_memory_it_takes():
    lines = by_blocks(Shards((16,) * 40), lanes=4, window=2, host=0, hosts=2).blocks
    assert lines == "order by blocks: 2 of 4 lanes, windows of 32 records, at most 0 MiB on each host"
    assert not by_blocks(MemorySource(records(9))).blocks
