"""Towers: parameter counts of the size table, golden outputs and gradients, the oracles of clip.md, and the switches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_files
from safetensors.numpy import load_file

from clip_jax import config
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import infonce
from clip_jax.models.common import l2_normalize, sincos_2d
from clip_jax.models.towers import CLIP_SIZES, image_tower, text_tower
from clip_jax.models.transformer import stack_blocks, unstack_blocks
from clip_jax.models.vit import drop_patches, patches


def tiny(**image):
    c = config.base()
    c.model.dtype, c.model.embed_dim = "float32", 16
    c.model.image.update(dict(size=16, patch=8, width=32, depth=2, heads=2, mlp_dim=64, **image))
    c.model.text.update(dict(vocab_size=64, eot_id=63, context=10, width=32, depth=2, heads=2, mlp_dim=64))
    return c.model


def count(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "size, image_count, text_count",
    [
        ("ViT-B/32", 87_849_216, 63_428_096),
        ("ViT-B/16", 86_192_640, 63_428_096),
        ("ViT-L/14", 303_966_208, 123_650_304),
        ("ViT-L/14@336", 427_944_193 - 123_650_304 - 1, 123_650_304),
        ("ViT-H/14", 632_076_800, 354_032_640),
    ],
)
def test_published_parameter_counts(size, image_count, text_count):
    model = config.base().model
    image, text, model.embed_dim = CLIP_SIZES[size]
    model.image.update(image)
    model.text.update(text)
    model.text.update(dict(vocab_size=49408, eot_id=49407))
    assert count(image_tower(model), jnp.zeros((1, model.image.size, model.image.size, 3))) == image_count
    assert count(text_tower(model), jnp.zeros((1, 77), jnp.int32)) == text_count


def open_clip_params(folder, file="model.safetensors"):
    """The golden open_clip model, or the gradients in its layout, as our parameters, by the map of the canonical tree."""
    w = load_file(folder / file)

    def block(prefix, heads):
        width = w[f"{prefix}.ln_1.weight"].shape[0]
        qkv, qkv_bias = np.split(w[f"{prefix}.attn.in_proj_weight"], 3), np.split(w[f"{prefix}.attn.in_proj_bias"], 3)
        attn = {
            name: {"kernel": k.T.reshape(width, heads, -1), "bias": b.reshape(heads, -1)}
            for name, k, b in zip(("query", "key", "value"), qkv, qkv_bias, strict=True)
        }
        attn["out"] = {"kernel": w[f"{prefix}.attn.out_proj.weight"].T.reshape(heads, -1, width), "bias": w[f"{prefix}.attn.out_proj.bias"]}
        mlp = {
            ours: {"kernel": w[f"{prefix}.mlp.{n}.weight"].T, "bias": w[f"{prefix}.mlp.{n}.bias"]}
            for ours, n in (("fc1", "c_fc"), ("fc2", "c_proj"))
        }
        return {"ln1": norm(f"{prefix}.ln_1"), "ln2": norm(f"{prefix}.ln_2"), "attn": attn, "mlp": mlp}

    def norm(name):
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    c = json.loads((folder / "config.json").read_text())
    vision, text = c["vision_cfg"], c["text_cfg"]
    params = {
        "img": {
            "patch": {"kernel": w["visual.conv1.weight"].transpose(2, 3, 1, 0)},
            "cls": w["visual.class_embedding"][None, None],
            "pos": w["visual.positional_embedding"][None],
            "ln_pre": norm("visual.ln_pre"),
            "ln_post": norm("visual.ln_post"),
            "proj": {"kernel": w["visual.proj"]},
            **{
                f"block_{i}": block(f"visual.transformer.resblocks.{i}", vision["width"] // vision["head_width"])
                for i in range(vision["layers"])
            },
        },
        "txt": {
            "embed": {"embedding": w["token_embedding.weight"]},
            "pos": w["positional_embedding"][None],
            "ln_final": norm("ln_final"),
            "proj": {"kernel": w["text_projection"]},
            **{f"block_{i}": block(f"transformer.resblocks.{i}", text["heads"]) for i in range(text["layers"])},
        },
        "logit_scale": w["logit_scale"],
    }
    model = config.base().model
    model.embed_dim, model.dtype, act = c["embed_dim"], "float32", "quick_gelu" if c["quick_gelu"] else "gelu"
    model.image.update(dict(size=vision["image_size"], patch=vision["patch_size"], width=vision["width"], depth=vision["layers"],
                            heads=vision["width"] // vision["head_width"], mlp_dim=4 * vision["width"], act=act))  # fmt: skip
    model.text.update(dict(vocab_size=text["vocab_size"], eot_id=text["vocab_size"] - 1, context=text["context_length"], act=act))
    model.text.update(dict(width=text["width"], depth=text["layers"], heads=text["heads"], mlp_dim=4 * text["width"]))
    return params, model


@pytest.mark.parametrize("folder", golden_files("openclip_vit_*"))
def test_golden_open_clip_vit(folder):
    params, model = open_clip_params(folder)
    io = np.load(folder / "io.npz")
    images, ids = io["pixel_values_nchw"].transpose(0, 2, 3, 1), io["input_ids"]
    # The tiny vocabulary has no fixed end-of-text id: open_clip pools at the largest id of each row.
    ids_with_end = np.where(np.arange(ids.shape[1]) == ids.argmax(1)[:, None], model.text.eot_id, ids)
    assert (ids_with_end == ids).all(), "the fixture's largest id is the last of the vocabulary"
    image_model, text_model = image_tower(model), text_tower(model)

    def forward(params, images):
        z_image = image_model.apply({"params": params["img"]}, images)[0]
        z_text = text_model.apply({"params": params["txt"]}, ids)[0]
        scale = jnp.exp(params["logit_scale"])
        loss, _ = infonce(l2_normalize(z_image), l2_normalize(z_text), scale)
        return loss, (z_image, z_text, scale * l2_normalize(z_image) @ l2_normalize(z_text).T)

    (loss, (z_image, z_text, logits)), (grads, grad) = jax.jit(jax.value_and_grad(forward, argnums=(0, 1), has_aux=True))(params, images)
    tolerance = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z_image, io["image_embed_unnormalised"], **tolerance)
    np.testing.assert_allclose(z_text, io["text_embed_unnormalised"], **tolerance)
    np.testing.assert_allclose(logits, io["logits_per_image"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, io["loss"], **tolerance)
    np.testing.assert_allclose(grad.transpose(0, 3, 1, 2), io["grad_pixel_values"], **tolerance)
    expected_grads, _ = open_clip_params(folder, "grads.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected_grads)


def embed(model, ids):
    module = text_tower(model)
    params = module.init(jax.random.key(0), ids)
    return module.apply(params, ids)[0]


def test_causal_text_sees_nothing_after_the_end():
    ids = np.array([[5, 9, 63, 0, 0, 0], [5, 9, 63, 7, 8, 9], [5, 10, 63, 0, 0, 0]])
    z = embed(tiny(), ids)
    np.testing.assert_array_equal(z[0], z[1])
    assert np.abs(z[0] - z[2]).max() > 1e-4


def test_mask_padding_hides_what_follows_the_end():
    model = tiny()
    model.text.update(dict(causal=False, mask_padding=True))
    z = embed(model, np.array([[5, 9, 63, 0, 0, 0], [5, 9, 63, 7, 8, 9]]))
    np.testing.assert_allclose(z[0], z[1], atol=1e-6)
    model.text.mask_padding = False
    z = embed(model, np.array([[5, 9, 63, 0, 0, 0], [5, 9, 63, 7, 8, 9]]))
    assert np.abs(z[0] - z[1]).max() > 1e-4


@pytest.mark.parametrize("pool", ["last", "first", "mean", "max", "map"])
def test_text_pools(pool):
    model = tiny()
    model.text.pool = pool
    z = embed(model, np.array([[5, 9, 63, 0, 0, 0]]))
    assert z.shape == (1, 16) and np.isfinite(z).all()
    assert np.abs(z - embed(tiny(), np.array([[5, 9, 63, 0, 0, 0]]))).max() > 1e-4, "another pooling, another embedding"


@pytest.mark.parametrize(
    "switches, tokens",
    [
        (dict(pool="gap", cls_token=False), 4),
        (dict(pool="mean_all"), 5),
        (dict(pool="map", cls_token=False, patch_bias=True, ln_pre=False, act="gelu_tanh", weight_init="xavier"), 4),
        (dict(pool="gap", cls_token=False, posemb="sincos2d"), 4),
        (dict(pool="gap", cls_token=False, stem=(8, 16)), 16),
    ],
)
def test_image_switches(switches, tokens):
    module = image_tower(tiny(**switches))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = module.init(jax.random.key(0), images)["params"]
    z, x = module.apply({"params": params}, images)
    assert z.shape == (2, 16) and x.shape == (2, tokens, 32) and np.isfinite(z).all()
    assert ("pos" in params) == (switches.get("posemb") != "sincos2d") and ("ln_pre" in params) == switches.get("ln_pre", True)
    assert ("bias" in params.get("patch", {})) == switches.get("patch_bias", False)


def test_a_text_tower_without_blocks_is_a_bag_of_words():
    model = tiny()
    model.text.update(dict(depth=0, pool="mean"))
    module = text_tower(model)
    ids = np.array([[5, 9, 63, 0], [9, 5, 63, 0]])
    params = module.init(jax.random.key(0), ids)
    params["params"]["pos"] = jnp.zeros_like(params["params"]["pos"])
    z = module.apply(params, ids)[0]
    np.testing.assert_allclose(z[0], z[1], atol=1e-6)


def test_overlapping_patches_are_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(patches(x, 3, 2) @ kernel.reshape(27, 5), expected, rtol=1e-4, atol=1e-5)


def test_patch_drop_keeps_the_same_patches_for_the_same_key():
    x = jnp.arange(2 * 16.0).reshape(2, 16, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    kept = drop_patches(x, 0.75, keys)
    assert kept.shape == (2, 4, 1)
    np.testing.assert_array_equal(kept[1], drop_patches(x[1:], 0.75, keys[1:])[0])
    assert (np.diff(kept[..., 0], axis=1) > 0).all() and not np.array_equal(kept[0], kept[1] - 16)


def test_sincos_matches_its_formula():
    table = np.asarray(sincos_2d(3, 4, 8))
    omega = 1 / 10_000 ** (np.arange(2) / 1)
    row, column = 2, 3
    expected = np.concatenate([np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)])
    np.testing.assert_allclose(table[row * 4 + column], expected, atol=1e-6)


def test_bfloat16_compute_keeps_float32_weights():
    model = tiny()
    model.dtype = "bfloat16"
    module = image_tower(model)
    params = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    z, tokens = module.apply(params, jnp.ones((1, 16, 16, 3)))
    assert z.dtype == jnp.float32 and tokens.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("image", dict(size=20), "not divisible by the patch size 8"),
        ("image", dict(heads=5), "not divisible by model.image.heads=5"),
        ("image", dict(pool="avg"), "model.image.pool='avg'"),
        ("image", dict(kind="resnet"), "model.image.kind='resnet'"),
        ("image", dict(act="gleu"), "model.image.act='gleu'"),
        ("image", dict(cls_token=False), "needs model.image.cls_token=True"),
        ("text", dict(pool="eos"), "model.text.pool='eos'"),
    ],
)
def test_impossible_towers(part, change, message):
    model = tiny()
    model[part].update(change)
    with pytest.raises(UserError, match=message):
        image_tower(model), text_tower(model)


def run_tower(name, model, params, inputs):
    """Embedding and gradient of a tower."""
    tower = {"image": image_tower, "text": text_tower}[name](model)

    def fn(params):
        embedding = tower.apply({"params": params}, inputs)[0]
        return (embedding**2).sum(), embedding

    (_, embedding), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(params)
    return embedding, grads


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("scan, remat", [(True, "none"), (False, "dots"), (True, "full")])
def test_scan_and_remat_change_nothing_but_the_layout(name, scan, remat):
    model = tiny()
    inputs = {"image": jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), "text": jnp.arange(30).reshape(3, 10)}[name]
    params = {"image": image_tower, "text": text_tower}[name](model).init(jax.random.key(0), inputs)["params"]
    expected, expected_grads = run_tower(name, model, params, inputs)
    model.scan, model.remat = scan, remat
    embedding, grads = run_tower(name, model, stack_blocks(params) if scan else params, inputs)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), unstack_blocks(grads) if scan else grads, expected_grads
    )


def test_scanned_layers_start_different_and_as_large_as_single_ones():
    model = tiny()
    model.scan = True
    stacked = image_tower(model).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert stacked["block"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 64)
    first, second = (unstack_blocks(stacked)[f"block_{i}"] for i in range(2))
    assert not np.allclose(first["mlp"]["fc1"]["kernel"], second["mlp"]["fc1"]["kernel"])
    model.scan = False
    single = image_tower(model).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]["block_0"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.std(), b.std(), rtol=0.2, atol=0.02), first, single)
