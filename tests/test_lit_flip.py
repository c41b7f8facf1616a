"""LiT and FLIP: their configurations, and the oracles of both methods."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import TINY, tiny_config
from model_helpers import initialise

import clip_jax
from clip_jax import config as config_lib
from clip_jax import train
from clip_jax.errors import UserError
from clip_jax.methods.interface import make_method
from clip_jax.models.common import sincos_2d
from clip_jax.models.towers import image_tower
from clip_jax.models.transformer import Block, block_init
from clip_jax.runtime.sharding import id_words
from clip_jax.training.step import make_init, make_step, state_shapes

LIT, FLIP = "configs/lit.py", "configs/flip.py"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A WordPiece vocabulary of BERT's size."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"piece{i}" for i in range(30522 - 5))]))
    return path


@pytest.mark.parametrize(
    "spec, options, total",
    [
        # conventions.md, section 4: ViT-B/16 without projection and pre-norm, with a patch bias; BERT-base without
        # pooler; 768 x 768 + 768
        (f"{LIT}:b16", "eot=false", 85_798_656 + 108_891_648 + 590_592 + 1),
        (f"{FLIP}:b16", "sot=false", None),
        (f"{FLIP}:b16_tune", "sot=false", None),
        (f"{FLIP}:l16", "sot=false", None),
        (f"{FLIP}:h14", "sot=false", None),
        (LIT, "", None),
        (FLIP, "", None),
    ],
)
def test_every_variant_describes_a_model(spec, options, total, vocabulary):
    c = config_lib.load(spec, [f"tokenizer=wordpiece:{vocabulary}?{options}"] if options else [])
    config_lib.validate(c)
    c = config_lib.resolve(c, train_tokenizer(c))
    method = make_method(c)
    batch = method.batch_spec(2)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    make_init(c, method, batch)  # every pattern of the optimizer matches
    if total:
        assert sum(x.size for x in jax.tree.leaves(params)) == total
    if spec.startswith(FLIP):
        assert c.model.image.patch_drop == (0.0 if spec.endswith("_tune") else 0.5) and c.model.image.pool == "mean_all"
        assert bool(c.init_from) == spec.endswith("_tune")


def train_tokenizer(c):
    from clip_jax.data.tokenizers import make_tokenizer

    return make_tokenizer(c.tokenizer)


def test_published_schedules():
    c = config_lib.load(f"{FLIP}:b16")
    assert c.optim.lr == pytest.approx(1.024e-3)
    assert c.train.steps * c.data.batch_size == pytest.approx(12.8e9, rel=0.01)
    assert c.optim.warmup_steps / c.train.steps == pytest.approx(0.004, rel=0.01)
    c = config_lib.load(f"{FLIP}:l16_tune")
    assert c.optim.lr == pytest.approx(1.024e-5)
    assert c.train.steps * c.data.batch_size == pytest.approx(1.28e8, rel=0.01)
    with pytest.raises(UserError, match="has no variant 'b32'"):
        config_lib.load(f"{FLIP}:b32")
    with pytest.raises(UserError, match="has no variant 'b32'"):
        config_lib.load(f"{LIT}:b32")


def test_unlocked_lit_is_clip():
    lit = config_lib.load(LIT, ["init_from=", "init_from_params=", "optim.freeze="])
    assert config_lib.differences(lit, config_lib.load("configs/clip.py")) == []


def test_lit_says_what_to_run_first(tmp_path):
    missing = tmp_path / "clip"
    with pytest.raises(UserError, match=f"train it first with --workdir={missing}, or name another"):
        train.train(config_lib.load(LIT, [*TINY, f"init_from={missing}"]), tmp_path / "lit", str)


def test_lit_locks_the_image_tower(tmp_path):
    train.train(tiny_config("train.steps=1"), tmp_path / "clip", str)
    overrides = [*TINY, "train.steps=3", "optim.weight_decay=0.5", "optim.lr=0.01", f"init_from={tmp_path / 'clip'}"]
    train.train(config_lib.load(LIT, overrides), tmp_path / "lit", str)
    before, after = (
        traverse_util.flatten_dict(clip_jax.load(tmp_path / name).params, sep="/") for name in ("clip", "lit")
    )
    for path, x in after.items():
        assert np.array_equal(x, before[path]) == path.startswith("img/"), path


def flops(*freeze):
    """Returns the FLOPs of a step and of the image tower's forward pass. The tower is most of the model."""
    c = tiny_config("model.image.depth=3", "model.image.size=32", "model.text.context=4", "data.batch_size=8")
    c.optim.freeze = freeze
    c = config_lib.resolve(c, train_tokenizer(c))
    method = make_method(c)
    batch = method.batch_spec(8)
    init, tx = make_init(c, method, batch)
    state = state_shapes(init)
    forward = (
        jax.jit(method.embed_image).lower(state.params, state.extra, batch["image"]).compile().cost_analysis()["flops"]
    )
    return jax.jit(make_step(c, method, tx)).lower(state, batch).compile().cost_analysis()["flops"], forward


def test_the_gradient_of_a_locked_tower_is_not_computed():
    free, forward = flops()
    locked, _ = flops("^img/")
    assert locked < free - 1.8 * forward, "a backward pass costs two forward passes"


def test_embeddings_of_a_locked_tower_may_be_computed_before():
    c = config_lib.load(LIT, [*TINY, "model.dtype=float32"])
    c = config_lib.resolve(c, train_tokenizer(c))
    method = make_method(c)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
        "text": rng.integers(0, 50, (4, c.model.text.context), np.int32),
        "example_id": id_words(np.arange(4)),
    }
    params, extra = initialise(method.init, batch)

    @jax.jit
    def losses(params, extra, batch):
        features, _ = method.encode(params, extra, batch, jax.random.key(1), train=True)
        cached = features | {"image": method.embed_image(params, extra, batch["image"])}
        return [method.loss(params, extra, f, batch, jax.random.key(1))[0] for f in (features, cached)]

    np.testing.assert_allclose(*losses(params, extra, batch), rtol=1e-6)


def flip_tower(patch_drop):
    c = config_lib.load(
        FLIP, [*TINY, "model.image.patch=4", f"model.image.patch_drop={patch_drop}", "model.image.depth=2"]
    )
    return image_tower(c.model), c.model.image


def test_flip_drops_no_patch_in_evaluation():
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    dropping, whole = flip_tower(0.5)[0], flip_tower(0.0)[0]
    params = initialise(whole.init, images)
    z, tokens = jax.jit(dropping.apply)(params, images)
    np.testing.assert_array_equal(z, jax.jit(whole.apply)(params, images)[0])
    assert tokens.shape[1] == 1 + 16
    keys = jax.random.split(jax.random.key(1), 2)
    _, kept = jax.eval_shape(functools.partial(dropping.apply, train=True), params, images, keys=keys)
    assert kept.shape[1] == 1 + 8, "half of the patches and the class token"


def kept(keys, n=16, drop=0.5):
    """Returns the patches that each key keeps."""
    from clip_jax.models.vit import drop_patches

    index = np.broadcast_to(np.arange(n)[None, :, None], (len(keys), n, 1))
    return np.asarray(jax.jit(drop_patches, static_argnums=1)(index, drop, keys))[..., 0]


def test_the_masked_forward_pass_is_that_of_the_kept_patches():
    tower, image = flip_tower(0.5)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    params = jax.device_get(initialise(tower.init, images)["params"])
    keys = jax.random.split(jax.random.key(1), 2)
    z, _ = jax.jit(functools.partial(tower.apply, train=True))({"params": params}, images, keys=keys)
    block = Block(
        image.heads,
        image.mlp_dim,
        image.act,
        image.ln_eps,
        block_init("xavier", image.width, image.mlp_dim, image.depth),
    )
    apply = jax.jit(block.apply)
    sincos = functools.partial(sincos_2d, 4, 4, image.width, includes_last=image.posemb == "sincos2d")
    positions = np.asarray(jax.jit(sincos)())
    for i, patches in enumerate(kept(keys)):
        x = []
        for patch in patches:
            row, column = divmod(int(patch), 4)
            pixels = images[i, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            embedded = np.einsum("hwc,hwcd->d", pixels, params["patch"]["kernel"]) + params["patch"]["bias"]
            x.append(embedded + positions[patch])
        x = np.stack([params["cls"][0, 0], *x])[None]  # the class token has no position and is never dropped
        for layer in range(image.depth):
            x = apply({"params": params[f"block_{layer}"]}, x, None)
            x = np.asarray(x[0] if isinstance(x, tuple) else x)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + image.ln_eps)
        pooled = (x * params["ln_post"]["scale"] + params["ln_post"]["bias"]).mean(1)[0]
        np.testing.assert_allclose(z[i], pooled @ params["proj"]["kernel"], rtol=1e-4, atol=1e-5)


def test_kept_patches_are_uniform_and_new_for_each_image_and_step():
    draws = kept(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(draws.ravel(), minlength=16)
    # Variance n p (1 - p); a draw keeps a patch at most once.
    chi2 = ((counts - 1000) ** 2 / (1000 * 0.5)).sum() * 15 / 16
    assert chi2 < 37.7, "99.9 % of the distribution with 15 degrees of freedom"
    assert len({tuple(row) for row in draws.tolist()}) > 1500
