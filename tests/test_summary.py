"""The lines about a sample of a source that training prints before its first step."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import summary
from clip_jax.data.blocks import Block, BlockSource
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import make_source
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView, TextView

LONG = "a very long caption that goes far beyond the six tokens of this view"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("sentencepiece")


def views():
    return [ImageView(size=32), TextView(context=6)]


def write_table(folder):
    """10 rows: pictures 0 and 1 are equal, 2 is missing, 3 is cut off; one caption in four is long."""
    rows = ["image,caption"]
    for i in range(10):
        pixels = np.random.default_rng(max(i, 1)).integers(0, 256, (20, 30, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        if i != 2:
            (folder / f"{i}.png").write_bytes(data.getvalue()[: 300 if i == 3 else None])
        rows.append(f"{i}.png,{LONG if i in (4, 5) else 'a cat'}")
    (folder / "data.csv").write_text("\n".join(rows))
    return str(folder / "data.csv")


def test_a_table_with_duplicates_and_broken_pictures(tmp_path, tokenizer):
    source = make_source(write_table(tmp_path))
    first, *examples = summary.describe(source, views(), tokenizer, seconds=60)
    assert first.startswith("sample of 10 of 10 records: captions per record: 1, longer than 6 tokens and cut off: 25%")
    assert "exact duplicates of pictures: 1, unusable: 2 (" in first
    assert "missing" in first and "corrupt image: 1" in first
    assert len(examples) == 3 and all(line.startswith("  30 x 20: a ") for line in examples)
    assert list(summary.describe(source, views(), tokenizer, seconds=60)) == [first, *examples]
    few = next(summary.describe(source, views(), tokenizer, records=4, seconds=60))
    assert few.startswith("sample of 4 of 10 records")


class Blocks(BlockSource):
    def __init__(self):
        super().__init__("blocks")
        self._set_blocks([50] * 100)
        self.asked = []

    def read_block(self, number):
        self.asked.append(number)
        return Block(50, self._make)

    def _make(self, index):
        if index == 1:
            raise BadRecord("corrupt image")
        return {"image": np.full((8, 8, 3), index, np.uint8), "texts": ["one", "two"]}


def test_a_source_of_blocks_is_read_at_four_places(tokenizer):
    source = Blocks()
    first = next(summary.describe(source, views(), tokenizer, records=40, seconds=60))
    assert source.asked == [0, 33, 66, 99]
    assert first.startswith("sample of 40 of 5,000 records: captions per record: 2, longer")
    assert "unusable: 4 (corrupt image: 4)" in first and "duplicates of pictures: 27," in first


def test_reading_ends_when_the_time_is_over(tokenizer):
    first, *_ = summary.describe(Blocks(), views(), tokenizer, seconds=-1)
    assert first.startswith("sample of 1 of 5,000 records")  # a block is one part, which ends at its first record
