"""configs/align.py: the published recipes of align.md, the places of crops, and training of the small variant."""

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

from clip_jax import config, train
from clip_jax.data.views import ImageView
from clip_jax.program import make_program

ALIGN = str(REPO / "configs" / "align.py")


@pytest.fixture
def vocabulary(tmp_path):
    """A WordPiece vocabulary of BERT's size."""
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30522 - 4))])
    )
    return f"tokenizer=wordpiece:{tmp_path}/vocab.txt"


@pytest.mark.parametrize(
    "variant, batch, steps, warmup, lr, width, embed_dim, text_width, text_depth",
    [
        ("b3", 16384, 100_000, 10_000, 5e-3, 1.2, 640, 256, 4),
        ("b7", 65536, 300_000, 40_000, 2e-3, 2.0, 640, 768, 12),
        ("l2", 16384, 1_200_000, 10_000, 1e-3, 4.3, 1376, 1024, 24),
    ],
)
def test_published_recipes(variant, batch, steps, warmup, lr, width, embed_dim, text_width, text_depth):
    c = config.load(f"{ALIGN}:{variant}")
    config.validate(c)
    assert (c.data.batch_size, c.train.steps, c.optim.warmup_steps, c.optim.lr) == (batch, steps, warmup, lr)
    assert (c.optim.name, c.optim.schedule, c.optim.b1, c.optim.b2, c.optim.eps, c.optim.weight_decay) == (
        "lamb", "linear", 0.9, 0.999, 1e-6, 1e-5,
    )  # fmt: skip
    assert (c.model.image.width_coefficient, c.model.image.size, c.model.image.bn_group, c.model.embed_dim) == (
        width,
        289,
        16,
        embed_dim,
    )
    text = c.model.text
    assert text.dropout == text.attention_dropout == 0.1 and text.proj_init == c.model.image.proj_init == "glorot"
    assert (text.width, text.depth, text.heads, text.mlp_dim, text.context) == (
        text_width,
        text_depth,
        text_width // 64,
        4 * text_width,
        64,
    )
    assert c.model.image_mean == c.model.image_std == (0.5, 0.5, 0.5) and c.model.temperature_init == 1.0


def test_pictures_are_squashed_to_346_and_cropped_to_289():
    c = config.load(f"{ALIGN}:b7")
    gradient = np.stack([np.tile(np.arange(346, dtype=np.int64), (346, 1))] * 2 + [np.zeros((346, 346), np.int64)], 2)
    gradient[..., 1] = gradient[..., 1].T
    record = {"image": Image.fromarray((gradient // 2).astype(np.uint8))}
    middle = ImageView("image", 289, c.eval.transform)(record, None)
    # align.md: offset (346 - 289) // 2.
    np.testing.assert_array_equal(middle, (gradient // 2)[28 : 28 + 289, 28 : 28 + 289])
    view, lefts = ImageView("image", 289, c.data.augment), set()
    flipped = 0
    for seed in range(40):
        crop = view(record, np.random.default_rng(seed)).astype(int)
        assert crop.shape == (289, 289, 3)
        flipped += crop[0, 0, 0] > crop[0, -1, 0]
        lefts.add(min(crop[0, 0, 0], crop[0, -1, 0]))
    assert 8 < flipped < 32 and min(lefts) >= 0 and max(lefts) <= (346 - 289) // 2 and len(lefts) > 10
    wide = ImageView("image", 289, c.eval.transform)({"image": Image.new("RGB", (900, 300), "red")}, None)
    assert (wide == [255, 0, 0]).all()  # the aspect ratio is ignored, so nothing is padded


def test_a_published_size_is_built_with_its_tokenizer_and_optimizer(vocabulary):
    c = config.load(f"{ALIGN}:b3", [vocabulary])
    program = make_program(c)
    assert program.config.model.text.vocab_size == 30522 and program.config.model.text.eot_id == 3
    trunk = sum(x.size for name, part in program.state.params["img"].items() if name != "proj" for x in _leaves(part))
    assert trunk == 10_103_336 and program.batch["image"].shape == (16384, 289, 289, 3)


def _leaves(tree):
    return [leaf for part in tree.values() for leaf in _leaves(part)] if isinstance(tree, dict) else [tree]


def test_the_small_variant_trains_on_the_embedded_pictures(tmp_path):
    quick = ["train.steps=2", "data.batch_size=16", "eval.tasks=()", "log.tensorboard=false", "eval.report=false"]
    c = config.load(f"{ALIGN}:smoke", [*quick, "model.image.stages=((8, 1, 3, 2, 1), (16, 1, 3, 2, 4))"])
    lines = []
    train.train(c, tmp_path, lines.append)
    assert any("img" in line and "temperature" in line for line in lines) and (tmp_path / "checkpoints" / "2").is_dir()
