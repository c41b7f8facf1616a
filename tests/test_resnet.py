"""CLIP's modified ResNet and batch norm: golden outputs and statistics, initialisation, groups, meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from model_helpers import initialise, tiny

import clip_jax
from clip_jax import config
from clip_jax.errors import UserError
from clip_jax.models.common import BatchNorm
from clip_jax.models.resnet import AttentionPool
from clip_jax.models.towers import image_tower
from clip_jax.models.two_tower import TwoTower
from clip_jax.runtime.sharding import batch_sharding, make_mesh, state_shardings

RESNET = dict(kind="resnet", size=32, layers=(1, 2), width=16)


def resnet(**fields):
    model = tiny()
    model.image = dict(RESNET, **fields)
    return image_tower(model)


@pytest.mark.parametrize("folder", golden_files("openclip_rn"))
def test_golden_open_clip_resnet(folder):
    model = clip_jax.load(folder)
    io, after = np.load(folder / "io.npz"), np.load(folder / "train_mode.npz")
    tower, images = image_tower(model.config.model), io["pixel_values_nchw"].transpose(0, 2, 3, 1)
    variables = {"params": model.params["img"], "batch_stats": model.extra["batch_stats"]["img"]}
    np.testing.assert_allclose(
        jax.jit(tower.apply)(variables, images)[0], io["image_embed_unnormalised"], rtol=1e-4, atol=5e-5
    )
    train = jax.jit(lambda images: tower.apply(variables, images, train=True, mutable=["batch_stats"]))
    (embedding, _), new = train(images)
    np.testing.assert_allclose(embedding, after["image_embed_unnormalised"], rtol=1e-4, atol=5e-5)
    expected = {
        name.removeprefix("bn_after.visual."): after[name] for name in after.files if name.startswith("bn_after.")
    }
    assert 0 < len(expected) == len(jax.tree.leaves(new["batch_stats"]))
    for name, x in expected.items():
        *block, norm, statistic = name.replace("downsample.1", "downsample_bn").replace("layer", "layer_").split(".")
        found = new["batch_stats"]["_".join(block) or "stem"][norm][statistic.removeprefix("running_")]
        np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6, err_msg=name)


def test_initialisation():
    params = jax.device_get(initialise(resnet().init, np.zeros((1, 32, 32, 3), np.float32)))["params"]
    block = params["layer_2_1"]
    assert not block["bn3"]["scale"].any() and (block["bn2"]["scale"] == 1).all()
    assert params["layer_2_0"].keys() - block.keys() == {"downsample_conv", "downsample_bn"}
    bound = (3 * 3 * 32) ** -0.5
    assert 0.98 * bound < np.abs(block["conv2"]["kernel"]).max() < bound
    np.testing.assert_allclose(params["pool"]["query"]["kernel"].std(), 128**-0.5, rtol=0.02)


@pytest.mark.parametrize("head_width", [32, 64, 128])
def test_heads_of_the_attention_pooling(head_width):
    """The mean of the tokens asks, in heads of `head_width` of the 128 channels; every number in float64."""
    x = np.random.default_rng(0).normal(size=(2, 4, 128)).astype(np.float32)
    pool = AttentionPool(6, head_width=head_width)
    found, variables = jax.jit(pool.init_with_output)(jax.random.key(0), x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    assert p["query"]["kernel"].shape == (128, 128 // head_width, head_width)
    tokens = np.concatenate([x.mean(1, keepdims=True), x], axis=1) + p["pos"]
    q, k, v = (
        np.einsum("bnd,dhe->bhne", tokens, p[n]["kernel"]) + p[n]["bias"][:, None] for n in ("query", "key", "value")
    )
    weights = np.exp(q[:, :, :1] @ k.swapaxes(2, 3) / np.sqrt(head_width))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    expected = np.einsum("bhe,hed->bd", y[:, :, 0], p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    tower = resnet(head_width=head_width)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    kernel = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]["pool"]["query"]["kernel"]
    assert kernel.shape == (128, 128 // head_width, head_width)


def test_rematerialisation_changes_neither_result_nor_statistics():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = tiny()
    model.image = RESNET | dict(layers=(1, 1))
    variables = initialise(image_tower(model).init, images)

    def run():
        tower = image_tower(model)

        def fn(params):
            (z, _), new = tower.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sin(z).sum(), new

        return jax.jit(jax.grad(fn, has_aux=True))(variables["params"])

    expected = run()
    model.remat = "full"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), run(), expected)


def batch_norm(x, train=True, **fields):
    norm = jax.jit(functools.partial(BatchNorm(decay=0.75, **fields).apply, train=train, mutable=["batch_stats"]))
    start = {"params": {"scale": 2.0, "bias": 1.0}, "batch_stats": {"mean": 0.5, "var": 4.0}}
    y, new = jax.device_get(norm(jax.tree.map(lambda value: np.full(3, value, np.float32), start), x))
    return y, new["batch_stats"]


def test_batch_norm_follows_its_formula():
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 6, 3)).astype(np.float32)
    y, new = batch_norm(x)
    np.testing.assert_allclose(
        y, 2 * (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) + 1, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(new["mean"], 0.75 * 0.5 + 0.25 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.75 * 4 + 0.25 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    y, new = batch_norm(x, train=False)
    np.testing.assert_allclose(y, 2 * (x - 0.5) / np.sqrt(4 + 1e-5) + 1, rtol=1e-5)
    assert (new["mean"] == 0.5).all() and (new["var"] == 4).all()


def test_statistics_of_groups_are_those_of_each_group():
    x = np.random.default_rng(0).normal(3, 2, (6, 5, 5, 3)).astype(np.float32)
    y, new = batch_norm(x, group=2)
    parts = [batch_norm(part) for part in np.split(x, 3)]
    np.testing.assert_allclose(y, np.concatenate([p[0] for p in parts]), rtol=1e-4, atol=1e-5)
    for name, found in new.items():
        np.testing.assert_allclose(found, np.mean([p[1][name] for p in parts], axis=0), rtol=1e-5)
    with pytest.raises(UserError, match="bn_group=4 does not divide the 6 examples"):
        batch_norm(x, group=4)


@pytest.mark.parametrize("group", [0, 2])
def test_a_mesh_has_the_statistics_of_the_whole_batch(mesh8, group):
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    tower = resnet(bn_group=group)
    variables = initialise(tower.init, images)
    run = jax.jit(lambda x: tower.apply(variables, x, train=True, mutable=["batch_stats"]))
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])):
        expected = run(images)
    found = run(jax.device_put(images, batch_sharding(mesh8)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.device_get(found),
        jax.device_get(expected),
    )


# The 8 devices do not divide some widths of the EfficientNet.
@pytest.mark.parametrize(("image", "share"), [("resnet", 0.14), ("efficientnet", 0.2)])
def test_fsdp_splits_the_convolutions(image, share):
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    model = config.load(
        str(REPO / "configs" / {"resnet": "clip.py:rn50", "efficientnet": "align.py:b3"}[image])
    ).model.unlock()
    model.text.update(dict(vocab_size=512, eot_id=1))
    batch = {
        "image": jax.ShapeDtypeStruct((2, model.image.size, model.image.size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((2, model.text.context), jnp.int32),
    }
    params = jax.eval_shape(TwoTower(model).init, jax.random.key(0), batch)[0]["img"]
    layout = state_shardings({"img": params}, mesh)["img"]
    sizes = jax.tree.map(lambda x, s: (math.prod(x.shape), math.prod(s.shard_shape(x.shape))), params, layout)
    whole, part = np.sum(jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple)), axis=0)
    assert part < share * whole
