"""Example ids of 64 bits: the order of a huge source, and the randomness of an example on host and device."""

import itertools

import grain
import jax
import numpy as np
import pytest
from conftest import REPO
from data_helpers import VIEWS, Bytes, SyntheticBlocks, loader
from helpers import losses, tiny_config
from model_helpers import tiny_method

from clip_jax import config as config_lib
from clip_jax import train
from clip_jax.data.order import Stream, randomness
from clip_jax.data.reading import Reading
from clip_jax.data.shuffle import permute
from clip_jax.data.views import make_example
from clip_jax.errors import UserError
from clip_jax.methods import raclip
from clip_jax.models.common import fold_in_ids
from clip_jax.runtime.sharding import id_words, make_mesh, to_global

HUGE = 2_400_000_000
IDS = np.array([7, 2**31 + 7, 2**32 + 7, 5 * 2**32 + 7])


@pytest.mark.parametrize("length", [2**17 - 3, 2**31 + 9, HUGE, 2**33 + 5, 10**12])
def test_the_shuffle_equals_grains_index_by_index(length):
    random = np.random.default_rng(0).integers(0, length, 100)
    places = np.concatenate([np.arange(20), random, [length - 1]])
    for seed in (0, 2**32 - 1):
        expected = [grain.experimental.index_shuffle(int(i), length - 1, seed, 4) for i in places]
        np.testing.assert_array_equal(permute(places, length, seed), expected)


@pytest.mark.parametrize("length", [70_000, 2**18 + 1])
def test_the_shuffle_is_a_permutation(length):
    places = permute(np.arange(length), length, 3)
    assert np.bincount(places, minlength=length).tolist() == [1] * length


@pytest.mark.parametrize("length", [9, 70_000, HUGE])
def test_a_stream_takes_many_positions_at_once(length):
    stream = Stream(2, 1000, length, 5)
    positions = np.concatenate([np.arange(length - 9, length + 9), [7 * length]])
    epochs, ids = stream.take(positions)
    assert epochs[[8, 9, -1]].tolist() == [0, 1, 7]
    assert len(set(ids[:9].tolist())) == 9 and ((ids >= 1000) & (ids < 1000 + length)).all()


@pytest.mark.parametrize("order", ["records", "blocks"])
def test_a_huge_source_is_read_in_a_random_order(order):
    source = SyntheticBlocks(HUGE, 2**14)
    batch = next(loader(source, batch_size=64, threads=0, reading=Reading(order, 64, 1)))
    ids = batch["example_id"]
    assert ids.dtype == np.int64 and len(set(ids.tolist())) == 64 and ids.max() > 2**31 and ids.min() < 2**30
    for i, example_id in enumerate(ids[:3]):
        expected = make_example(source[int(example_id)], example_id, VIEWS, Bytes(), randomness(3, 0, example_id))
        np.testing.assert_array_equal(batch["image"][i], expected["image"])


def test_ids_of_64_bits_cross_to_the_device_in_halves():
    np.testing.assert_array_equal(id_words(np.array([7, -1, 3 * 2**32 + 5])), [[7, 0], [2**32 - 1] * 2, [5, 3]])
    assert id_words(IDS).dtype == np.uint32
    ids = np.tile(IDS, 2)
    batch = to_global({"example_id": ids, "other": np.ones((8, 3), np.int64)}, make_mesh(config_lib.base().mesh))
    assert batch["example_id"].tolist() == id_words(ids).tolist() and batch["other"].shape == (8, 3)


def test_randomness_of_ids_on_the_device():
    """Small ids are folded in as numbers of 32 bits; ids that are equal modulo 2**32 differ."""
    rng = jax.random.key(3)
    keys = jax.random.key_data(fold_in_ids(rng, id_words(IDS)))
    assert len(np.unique(keys, axis=0)) == len(IDS)
    for key, example_id in zip(keys[:2], IDS[:2], strict=True):
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.fold_in(rng, np.uint32(example_id))))
    with pytest.raises(UserError, match=r"example_id \[4\]: on a device it is uint32 \[b, 2\]"):
        fold_in_ids(rng, IDS)


def test_augmentation_of_ids_that_are_equal_modulo_32_bits():
    record = SyntheticBlocks(1)[0]
    images = [make_example(record, i, VIEWS, Bytes(), randomness(3, 0, i))["image"] for i in (*IDS, IDS[2])]
    assert len({image.tobytes() for image in images}) == len(IDS)
    np.testing.assert_array_equal(images[2], images[4])


def test_training_on_a_huge_source(tmp_path, monkeypatch):
    """Two steps with the loader and the step of a run."""
    (tmp_path / "huge_data").mkdir()
    made = f"def make(split):\n    return SyntheticBlocks({HUGE}, 2**14)\n"
    (tmp_path / "huge_data" / "synthetic.py").write_text(f"from data_helpers import SyntheticBlocks\n\n\n{made}")
    monkeypatch.syspath_prepend(tmp_path)
    given = ("data.source=huge_data.synthetic", "data.templates=()", "train.steps=2", "checkpoint.steps=0")
    train.train(tiny_config(*given), tmp_path / "run", print)
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()


def test_patches_are_dropped_by_the_whole_id():
    _, method, params, extra, _ = tiny_method("clip", "model.image.patch_drop=0.5", "model.image.patch=4")
    batch = {key: np.ones(x.shape, x.dtype) for key, x in method.batch_spec(5).items()}
    batch["image"] *= np.random.default_rng(0).integers(0, 256, batch["image"].shape[1:], np.uint8)
    batch["example_id"] = id_words(np.append(IDS, IDS[2]))
    encode = jax.jit(lambda params: method.encode(params, extra, batch, jax.random.key(1), train=True)[0]["image"])
    z = np.asarray(encode(params))
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(z[:4], 2)) > 1e-3
    np.testing.assert_allclose(z[2], z[4], atol=1e-6)


def test_cached_neighbors_of_too_many_records():
    given = ["raclip.reference=emoji", "raclip.retrieval=cached"]
    config = config_lib.load(str(REPO / "configs" / "raclip.py:smoke"), given)
    with pytest.raises(UserError, match="cached.*fewer than 2,147,483,648 records, and data.source has 2,400,000,000"):
        raclip.resolve(config, SyntheticBlocks(HUGE, 2**30))
