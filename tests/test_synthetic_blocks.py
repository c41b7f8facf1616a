"""The interface of sources of blocks, by a synthetic source of 2.4 billion records."""

import pickle

import numpy as np
import pytest
from data_helpers import SyntheticBlocks

from clip_jax.data.blocks import Block, blocks_of, is_sequential, read_block, runs
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource

HUGE = 2_400_000_000


@pytest.mark.parametrize(("count", "length"), [(HUGE, 500_000_001), (1100, 512), (1024, 512)])
def test_records_by_number_and_by_block(count, length):
    source = SyntheticBlocks(count, length)
    assert len(source) == count and source.blocks.sum() == count and source.blocks.dtype == np.int64
    assert is_sequential(source) and blocks_of(source) is source.blocks
    copy = pickle.loads(pickle.dumps(source))
    for number in (0, length - 1, length, count - 1):
        assert copy[number]["number"] == source[number]["number"] == number
        block, row = divmod(number, length)
        assert read_block(source, block)[row]["texts"] == [f"picture {number}"]
    with pytest.raises(IndexError):
        source[count]
    with pytest.raises(IndexError):
        read_block(source, 0)[length]
    # Numbers that are equal modulo 2**32 are different records.
    assert not np.array_equal(source.record(5)["image"], source.record(5 + 2**32)["image"])


def test_blocks_of_other_sources():
    source = MemorySource([{"image": b"x", "texts": [], "number": i} for i in range(1030)])
    assert blocks_of(source).tolist() == runs(1030).tolist() == [512, 512, 6] and not is_sequential(source)
    assert [record["number"] for record in read_block(source, 2)] == list(range(1024, 1030))
    assert runs(512).tolist() == [512] and runs(0).tolist() == []


def test_a_bad_record_spoils_no_other():
    def make(index):
        if index == 1:
            raise BadRecord("corrupt")
        return index

    block = Block(3, make)
    assert (len(block), block[0], block[2]) == (3, 0, 2)
    with pytest.raises(BadRecord, match="corrupt"):
        block[1]
