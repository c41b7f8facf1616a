"""Helpers for tests of data: a byte tokenizer, small records, loaders, tables on disk, random ids of texts."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from clip_jax.data.blocks import Block, BlockSource
from clip_jax.data.loader import Loader
from clip_jax.data.views import ImageView, TextView

#: The end-of-text id of `texts`.
EOT = 1
VIEWS = (ImageView("image", 8, ("rrc(0.3, 1.0)", "flip", "jitter")), TextView("text", 16, ("{number}", "n {number}")))
PLAIN = (ImageView("image", 8), TextView("text", 16))


class Bytes:
    """A tokenizer whose ids are bytes + 2; end of text is 1, padding 0."""

    vocab_size, pad_id = 258, 0
    eot_id, sot_id = 1, None
    mask_id = None

    def encode(self, text):
        return [byte + 2 for byte in text.encode()]

    def decode(self, ids):
        return bytes(i - 2 for i in ids if i > 1).decode()

    def __call__(self, texts, context):
        rows = [self.encode(text)[: context - 1] + [1] for text in texts]
        return np.array([row + [0] * (context - len(row)) for row in rows], np.int32)


def encoded(value, form="PNG", size=12):
    """The bytes of an image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size + 4), (value % 256, 7, 9)).save(buffer, form)
    return buffer.getvalue()


def records(count, **fields):
    """Records with an image, a caption and their number."""
    return [{"image": encoded(i), "texts": [f"caption {i}"], "number": i} | fields for i in range(count)]


def loader(source, views=VIEWS, **arguments):
    return Loader(source, views, Bytes(), **(dict(batch_size=8, seed=3) | arguments))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def concatenate(shares):
    """The global batches of what several hosts were given, `[[batch of each step] of each host]`."""
    return [
        {key: np.concatenate([share[key] for share in step]) for key in step[0]} for step in zip(*shares, strict=True)
    ]


def assert_equal(first, second):
    """Two lists of batches are equal, dtypes included."""
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


def write_table(folder, rows, name="pairs.jsonl"):
    """Writes a table of small images, a row for the fields of each record; returns its path."""
    lines = []
    for i, row in enumerate(rows):
        Image.new("RGB", (20, 20), (7 * i % 256, 40 * i % 256, 99)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", **row}))
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Writes a tar archive of members, `[(name, bytes), ...]`."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def texts(seed, shape=(16, 12), vocab=4000):
    """Random ids int32 of texts of different lengths; `EOT` ends each text, zeros pad it."""
    rng = np.random.default_rng(seed)
    ids, length = rng.integers(5, vocab, shape, np.int32), rng.integers(3, shape[-1], (*shape[:-1], 1))
    place = np.arange(shape[-1])
    return np.where(place < length, ids, np.where(place == length, EOT, 0)).astype(np.int32)


class SyntheticBlocks(BlockSource):
    """Records of an image, a caption and their number, made of their index; no memory beyond the table of blocks.

    2,400,000,000 records in blocks of 512 have a table of 72 MiB; few blocks of any length have none to speak of.

    Args:
      count: int, records.
      length: int, records of a block; the last one may be shorter.
    """

    def __init__(self, count, length=512):
        super().__init__("synthetic")
        whole, rest = divmod(count, length)
        self._set_blocks(np.append(np.full(whole, length), rest) if rest else np.full(whole, length))

    def read_block(self, number):
        first = int(self._starts[number])
        return Block(int(self.blocks[number]), lambda index: self.record(first + index))

    def record(self, number):
        """The record of this number."""
        image = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        return {"image": image, "texts": [f"picture {number}"], "number": number}
