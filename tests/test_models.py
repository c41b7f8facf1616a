"""Towers: published parameter counts, golden outputs and gradients, fields, initialisation, rematerialisation, scan."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_files
from helpers import tiny_config
from model_helpers import TOWERS, initialise, parameter_shapes, run_tower, starting_state, tiny
from safetensors.numpy import load_file

from clip_jax import config
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import make_method
from clip_jax.models.common import l2_normalize, sincos_2d
from clip_jax.models.efficientnet import EfficientNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.towers import image_tower, text_tower, use_size
from clip_jax.models.transformer import stack_layers, unstack_layers
from clip_jax.models.two_tower import TwoTower
from clip_jax.models.vit import VisionTransformer, drop_patches, patches
from clip_jax.program import jaxpr_flops
from clip_jax.runtime import sharding
from clip_jax.training.step import make_init, make_step, state_shapes


def count(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(x.size for x in jax.tree.leaves(shapes))


# Parameters of image tower, text tower and the whole model, including logit scale and bias. None: not published.
@pytest.mark.parametrize(
    "size, image_count, text_count, total",
    [
        ("ViT-B/32", 87_849_216, 63_428_096, 151_277_313),
        ("ViT-B/16", 86_192_640, 63_428_096, 149_620_737),
        ("ViT-L/14", 303_966_208, 123_650_304, 427_616_513),
        ("ViT-L/14@336", None, 123_650_304, 427_944_193),
        ("ViT-H/14", 632_076_800, 354_032_640, 986_109_441),
        ("RN50", 38_316_896, 63_690_240, 102_007_137),
        ("RN101", None, None, 119_688_033),
        ("RN50x4", None, None, 178_300_601),
        ("SigLIP-B/16-224", 92_884_224, 110_271_744, 203_155_970),
        ("SigLIP-L/16-256", None, None, 652_150_786),
        ("SigLIP-So400m/14-224", None, None, 877_360_306),
        ("SigLIP2-B/16-256", None, None, 375_234_050),
    ],
)
def test_published_parameter_counts(size, image_count, text_count, total):
    c = config.base()
    use_size(c.model, size)
    vocabulary = {"SigLIP-": 32_000, "SigLIP2": 256_000}.get(size[:7], 49_408)
    c.model.text.update(dict(vocab_size=vocabulary, eot_id=1))
    c.method = "siglip" if size.startswith("SigLIP") else "clip"
    c.model.scan = size.startswith(("ViT-L", "ViT-H", "SigLIP"))  # the same parameters; one layer is traced
    method = make_method(c)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec(2))
    counts = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sum(counts.values()) == total
    assert image_count in (None, counts["img"]) and text_count in (None, counts["txt"])


@pytest.mark.parametrize("tower, total", [("SigLIP-B/16-224", 93_474_817), ("SigLIP-L/16-256", 316_681_985)])
def test_one_tower_for_pixels_and_text_has_the_published_parameter_count(tower, total):
    model = config.base().model
    use_size(model, tower)
    model.image.update(dict(size=224, proj=True, proj_bias=True))  # CLIPPO: one tower for images and rendered texts
    model.embed_dim, model.scan = 768, True
    assert count(image_tower(model), jnp.zeros((1, 224, 224, 3))) + 1 == total


def open_clip_params(folder, file="model.safetensors"):
    """Returns `(params, config.model)` of the golden open_clip model, or its gradients in the same tree."""
    w = load_file(folder / file)

    def block(prefix, heads):
        width = w[f"{prefix}.ln_1.weight"].shape[0]
        qkv, qkv_bias = np.split(w[f"{prefix}.attn.in_proj_weight"], 3), np.split(w[f"{prefix}.attn.in_proj_bias"], 3)
        attn = {
            name: {"kernel": k.T.reshape(width, heads, -1), "bias": b.reshape(heads, -1)}
            for name, k, b in zip(("query", "key", "value"), qkv, qkv_bias, strict=True)
        }
        attn["out"] = {
            "kernel": w[f"{prefix}.attn.out_proj.weight"].T.reshape(heads, -1, width),
            "bias": w[f"{prefix}.attn.out_proj.bias"],
        }
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
    model.embed_dim, model.dtype = c["embed_dim"], "float32"
    act = "quick_gelu" if c["quick_gelu"] else "gelu"
    model.image.update(dict(size=vision["image_size"], patch=vision["patch_size"], act=act))
    model.image.update(dict(width=vision["width"], depth=vision["layers"], mlp_dim=4 * vision["width"]))
    model.image.heads = vision["width"] // vision["head_width"]
    model.text.update(
        dict(vocab_size=text["vocab_size"], eot_id=text["vocab_size"] - 1, context=text["context_length"], act=act)
    )
    model.text.update(dict(width=text["width"], depth=text["layers"], heads=text["heads"], mlp_dim=4 * text["width"]))
    return params, model


@pytest.mark.parametrize("folder", golden_files("openclip_vit_*"))
def test_golden_open_clip_vit(folder):
    params, model = open_clip_params(folder)
    io = np.load(folder / "io.npz")
    images, ids = io["pixel_values_nchw"].transpose(0, 2, 3, 1), io["input_ids"]
    # open_clip pools at the largest id of each row. This equals our pooling only if that is the end-of-text id.
    ids_with_end = np.where(np.arange(ids.shape[1]) == ids.argmax(1)[:, None], model.text.eot_id, ids)
    assert (ids_with_end == ids).all(), "in the fixture the largest id of a row is not the end-of-text id"
    image_model, text_model = image_tower(model), text_tower(model)

    def forward(params, images):
        z_image = image_model.apply({"params": params["img"]}, images)[0]
        z_text = text_model.apply({"params": params["txt"]}, ids)[0]
        scale = jnp.exp(params["logit_scale"])
        loss, _ = infonce(l2_normalize(z_image), l2_normalize(z_text), scale)
        return loss, (z_image, z_text, scale * l2_normalize(z_image) @ l2_normalize(z_text).T)

    (loss, (z_image, z_text, logits)), (grads, grad) = jax.jit(
        jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
    )(params, images)
    tolerance = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z_image, io["image_embed_unnormalised"], **tolerance)
    np.testing.assert_allclose(z_text, io["text_embed_unnormalised"], **tolerance)
    np.testing.assert_allclose(logits, io["logits_per_image"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, io["loss"], **tolerance)
    np.testing.assert_allclose(grad.transpose(0, 3, 1, 2), io["grad_pixel_values"], **tolerance)
    expected_grads, _ = open_clip_params(folder, "grads.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected_grads)


@functools.cache
def text_parameters(pool):
    model = tiny()
    model.text.pool = pool
    return initialise(text_tower(model).init, np.zeros((1, 10), np.int32))


def embed(model, ids):
    params = text_parameters("map" if model.text.pool == "map" else "last")  # the other pools have no parameters
    return np.asarray(jax.jit(text_tower(model).apply)(params, ids)[0])


def test_causal_text_ignores_what_follows_the_end():
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


@functools.cache
def embed_by(pool):
    model = tiny()
    model.text.pool = pool
    return embed(model, np.array([[5, 9, 63, 0, 0, 0]]))


@pytest.mark.parametrize("pool", ["last", "first", "mean", "max", "map"])
def test_text_pools(pool):
    z = embed_by(pool)
    assert z.shape == (1, 16) and np.isfinite(z).all()
    assert np.abs(z - embed_by(tiny().text.pool)).max() > 1e-4, "the pooling has no effect"


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
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    (z, x), variables = jax.jit(module.init_with_output)(jax.random.key(0), images)
    params = variables["params"]
    assert z.shape == (2, 16) and x.shape == (2, tokens, 32) and np.isfinite(z).all()
    assert ("pos" in params) == (switches.get("posemb") != "sincos2d") and ("ln_pre" in params) == switches.get(
        "ln_pre", True
    )
    assert ("bias" in params.get("patch", {})) == switches.get("patch_bias", False)


def test_a_text_tower_without_blocks_is_a_bag_of_words():
    model = tiny()
    model.text.update(dict(depth=0, pool="mean"))
    model.scan = True  # there is nothing to stack
    module = text_tower(model)
    ids = np.array([[5, 9, 63, 0], [9, 5, 63, 0]])
    params = initialise(module.init, ids)
    params["params"]["pos"] = np.zeros_like(params["params"]["pos"])
    assert jax.tree.structure(stack_layers(unstack_layers(params), params)) == jax.tree.structure(params)
    z = np.asarray(jax.jit(module.apply)(params, ids)[0])
    np.testing.assert_allclose(z[0], z[1], atol=1e-6)


def test_overlapping_patches_are_a_convolution():
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((2, 9, 9, 3), (3, 3, 3, 5)))
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = np.asarray(jax.jit(patches, static_argnums=(1, 2))(x, 3, 2))
    np.testing.assert_allclose(found @ kernel.reshape(27, 5), expected, rtol=1e-4, atol=1e-5)


def test_patch_drop_keeps_the_same_patches_for_the_same_key():
    x = np.arange(2 * 16, dtype=np.float32).reshape(2, 16, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    drop = jax.jit(drop_patches, static_argnums=1)
    kept = np.asarray(drop(x, 0.75, keys))
    assert kept.shape == (2, 4, 1)
    np.testing.assert_array_equal(kept[1], drop(x[1:], 0.75, keys[1:])[0])
    assert (np.diff(kept[..., 0], axis=1) > 0).all() and not np.array_equal(kept[0], kept[1] - 16)


def test_sincos_matches_its_formula():
    table = np.asarray(jax.jit(sincos_2d, static_argnums=(0, 1, 2))(3, 4, 8))
    omega = 1 / 10_000 ** (np.arange(2) / 1)
    row, column = 2, 3
    expected = np.concatenate(
        [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
    )
    np.testing.assert_allclose(table[row * 4 + column], expected, atol=1e-6)


def test_bfloat16_compute_keeps_float32_weights():
    model = tiny()
    model.dtype = "bfloat16"
    module = image_tower(model)
    (z, tokens), params = jax.jit(module.init_with_output)(jax.random.key(0), np.ones((1, 16, 16, 3), np.float32))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert z.dtype == jnp.float32 and tokens.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("image", dict(size=20), "not divisible by the patch size 8"),
        ("image", dict(heads=5), "not divisible by model.image.heads=5"),
        ("image", dict(pool="avg"), "model.image.pool='avg'"),
        ("image", dict(kind="resent"), "model.image.kind='resent'"),
        ("image", dict(act="gleu"), "model.image.act='gleu'"),
        ("image", dict(weight_init="xaver"), "model.image.weight_init='xaver'"),
        ("image", dict(posemb="sincos"), "model.image.posemb='sincos': allowed are learn, sincos2d"),
        ("image", dict(proj=False), "model.image.proj=False needs model.embed_dim=32, the width of the tower, not 16"),
        (
            "image",
            dict(kind="resnet", size=48),
            "model.image.size=48 is not divisible by 32, the stride of a 'resnet' tower",
        ),
        ("image", dict(kind="efficientnet"), "model.image.act is no field of a 'efficientnet' tower"),
        ("image", dict(cls_token=False), "needs model.image.cls_token=True"),
        ("text", dict(pool="eos"), "model.text.pool='eos'"),
    ],
)
def test_invalid_towers(part, change, message):
    model = tiny()
    model[part].update(change)
    with pytest.raises(UserError, match=message):
        image_tower(model), text_tower(model)


def test_big_vision_initialisation():
    model = config.base().model
    use_size(model, "SigLIP-B/16-224")
    tower = dict(width=64, depth=1, heads=2, mlp_dim=128)
    model.embed_dim = 64
    model.image.update(dict(tower, size=128))
    model.text.update(dict(tower, vocab_size=1000, eot_id=1))
    image = initialise(image_tower(model).init, np.zeros((1, 128, 128, 3), np.float32))["params"]
    text = initialise(text_tower(model).init, np.zeros((1, 64), np.int32))["params"]
    image, text = jax.device_get((image, text))
    assert "proj" not in image and text["proj"]["bias"].shape == (64,)
    for x, std in (
        (image["patch"]["kernel"], (16 * 16 * 3) ** -0.5), (image["pos"], 64**-0.5), (text["pos"], 64**-0.5),
        (text["embed"]["embedding"], 64**-0.5), (text["block_0"]["mlp"]["fc1"]["kernel"], (2 / (64 + 128)) ** 0.5),
    ):  # fmt: skip
        np.testing.assert_allclose(x.std(), std, rtol=0.04)


def test_a_field_that_was_added_later_counts_as_its_default():
    old, new = config.base().unlock(), config.base()
    del old.model.logit_bias_init, old.model.image["proj"]
    assert config.differences(old, new) == []
    new.model.image.proj = False
    assert config.differences(old, new, ["model"]) == [("model.image.proj", None, False)]


INPUTS = {
    "image": np.random.default_rng(1).standard_normal((3, 16, 16, 3), np.float32),
    "text": np.arange(30).reshape(3, 10),
}


@functools.cache
def plain(name):
    """Returns parameters, embedding and gradients of a tower without scan and rematerialisation."""
    params = jax.device_get(initialise(TOWERS[name](tiny()).init, INPUTS[name])["params"])
    return params, *run_tower(name, tiny(), params, INPUTS[name])


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("scan, remat", [(True, "none"), (False, "dots"), (True, "full")])
def test_scan_and_remat_change_only_the_layout(name, scan, remat):
    model, inputs = tiny(), INPUTS[name]
    params, expected, expected_grads = plain(name)
    model.scan, model.remat = scan, remat
    embedding, grads = run_tower(name, model, stack_layers(params, parameter_shapes(name, model, inputs)), inputs)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-5)
    assert ("block" in grads) == scan
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        unstack_layers(jax.device_get(grads)),
        expected_grads,
    )


def test_products_that_are_stored_are_not_computed_again():
    """In bfloat16 a linear layer has its own rule for the gradient. A policy must find the product within it."""
    b, tokens, images = 3, 5, jnp.zeros((3, 16, 16, 3))

    def flops(scan, remat):
        model = tiny(pool="mean_all")
        model.dtype, model.scan, model.remat = "bfloat16", scan, remat
        tower = image_tower(model)
        params = jax.eval_shape(tower.init, jax.random.key(0), images)
        return jaxpr_flops(jax.make_jaxpr(jax.grad(lambda params: tower.apply(params, images)[0].sum()))(params))

    plain, attention = flops(False, "none"), 4 * b * tokens**2 * 32  # of a block of width 32
    assert flops(True, "none") == plain
    for scan in (False, True):
        assert flops(scan, "dots") == plain + 2 * attention
        assert flops(scan, "full") > 1.15 * plain


def test_scanned_layers_are_initialised_like_single_ones():
    model = tiny()
    model.scan = True
    stacked = jax.device_get(initialise(image_tower(model).init, INPUTS["image"])["params"])
    assert stacked["block"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 64)
    first, second = (unstack_layers(stacked)[f"block_{i}"] for i in range(2))
    assert not np.allclose(first["mlp"]["fc1"]["kernel"], second["mlp"]["fc1"]["kernel"])
    single = plain("image")[0]["block_0"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.std(), b.std(), rtol=0.2, atol=0.02), first, single)


RESNET = dict(kind="resnet", size=32, layers=(1,), width=16)
EFFICIENTNET = dict(kind="efficientnet", size=32, stages=((8, 2, 3, 1, 1),), proj=False)
BERT = dict(kind="bert", context=12, vocab_size=64, eot_id=63, width=32, depth=1, heads=2, mlp_dim=64, dropout=0.1)


@pytest.mark.parametrize(
    "method, image, text, devices, micro_batches",
    [
        ("clip", RESNET, None, 8, 1),
        ("align", EFFICIENTNET, BERT, 1, 2),
        ("align", EFFICIENTNET | dict(bn_group=4), BERT, 8, 2),
    ],
)
def test_steps_with_batch_norm(method, image, text, devices, micro_batches):
    """Devices do not change the result. Micro-batches do, by their own statistics, unless they hold whole groups."""
    c = tiny_config(f"model.embed_dim={8 if method == 'align' else 16}")
    c.method, c.model.image = method, image
    c.model.text = text or dict(c.model.text, vocab_size=64, eot_id=63)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
        "text": rng.integers(1, 64, (16, 12), np.int32),
        "example_id": sharding.id_words(np.arange(16)),
    }

    start, tx = starting_state(c, make_method(c), batch)

    def run(devices=1, micro_batches=1):
        c.micro_batches, method = micro_batches, make_method(c)
        mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = jax.device_put(start, sharding.state_shardings(start, mesh))
            step = jax.jit(make_step(c, method, tx))
            for _ in range(2):
                state, metrics = step(state, sharding.to_global(batch, mesh))
        return jax.device_get((state, metrics))

    state, metrics = run()
    assert np.isfinite(metrics["grad_norm"]) and metrics["bad_steps"] == 0
    for a, b in zip(
        jax.tree.leaves(start.extra["batch_stats"]), jax.tree.leaves(state.extra["batch_stats"]), strict=True
    ):
        assert (a != b).any()
    other, other_metrics = run(devices, micro_batches)
    if micro_batches == 1 or "bn_group" in image:
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other.extra, state.extra)
    else:
        assert np.isfinite(other_metrics["grad_norm"]) and other_metrics["loss"] != metrics["loss"]
        np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=0.3)
        assert any(
            (a != b).any() for a, b in zip(jax.tree.leaves(other.extra), jax.tree.leaves(state.extra), strict=True)
        )

    method = make_method(c)
    embed = jax.jit(method.embed_image)
    z = np.asarray(embed(state.params, state.extra, batch["image"]))
    np.testing.assert_allclose(embed(state.params, state.extra, batch["image"][:3]), z[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(z - embed(state.params, start.extra, batch["image"])).max() > 1e-4, (
        "the running statistics have no effect"
    )


def test_a_resnet_has_no_features_before_its_projection():
    c = config.base()
    c.model = tiny()
    c.model.image = dict(kind="resnet", size=32, layers=(1, 1, 1, 1), width=4, head_width=32)
    towers, images = TwoTower(c.model), np.zeros((2, 32, 32, 3), np.uint8)
    batch = {"image": images, "text": np.zeros((2, 10), np.int32)}
    params, extra = jax.eval_shape(towers.init, jax.random.key(0), batch)
    assert jax.eval_shape(towers.image_features, params, extra, images).shape == (2, 16)


def test_micro_batches_that_cut_groups_are_one_line():
    c = tiny_config("micro_batches=4")
    c.model.image = RESNET | dict(bn_group=6)
    method = make_method(config.resolve(c, make_tokenizer(c.tokenizer)))
    batch = method.batch_spec(16)
    init, tx = make_init(c, method, batch)
    with pytest.raises(UserError, match="model.image.bn_group=6 times micro_batches=4 does not divide the 16 examples"):
        jax.eval_shape(make_step(c, method, tx), state_shapes(init), batch)


def test_towers_without_batch_norm_have_no_state():
    c = config.base()
    c.model = tiny()
    batch = {"image": np.zeros((1, 16, 16, 3), np.float32), "text": np.zeros((1, 10), np.int32)}
    params, extra = jax.eval_shape(TwoTower(c.model).init, jax.random.key(0), batch)
    assert extra == {} and params.keys() == {"img", "txt"}


def initial(tower, *args):
    """The parameters of a tower, `{path: array}`."""
    from flax import traverse_util

    params = initialise(tower.init, *args)["params"]
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize(
    "scheme, bounds, stds",
    [
        # A fused [3D, D] matrix has the bound sqrt(6 / 4D), a patch as a matrix sqrt(6 / (3 P P + D)).
        (
            "flip",
            {
                "block_0/attn/query/kernel": (6 / 512) ** 0.5,
                "block_0/attn/out/kernel": (6 / 256) ** 0.5,
                "block_0/mlp/fc1/kernel": (6 / 640) ** 0.5,
                "patch/kernel": (6 / (192 + 128)) ** 0.5,
                "proj/kernel": (6 / 224) ** 0.5,
                "block_0/mlp/fc1/bias": 0.0,
            },
            {"cls": 0.02},
        ),
        (
            "declip",
            {"block_0/attn/query/bias": 0.0, "block_0/mlp/fc1/bias": 128**-0.5, "patch/kernel": 192**-0.5},
            {
                "block_0/attn/query/kernel": 128**-0.5,
                "block_1/attn/out/kernel": 128**-0.5 * 4**-0.5,
                "block_0/mlp/fc1/kernel": 256**-0.5,
                "block_0/mlp/fc2/kernel": 128**-0.5 * 4**-0.5,
                "pos": 0.01,
                "cls": 128**-0.5,
                "proj/kernel": 128**-0.5,
            },
        ),
        (
            "timm_qk_norm",
            {f"block_0/{layer}/{x}": n**-0.5 for x in ("kernel", "bias") for layer, n in (
                ("attn/query", 128), ("attn/out", 128), ("mlp/fc1", 128), ("mlp/fc2", 512))},
            {"cls": 0.02, "pos": 0.02},
        ),
    ],
)  # fmt: skip
def test_initialisation_of_released_image_towers(scheme, bounds, stds):
    posemb = "sincos2d_moco" if scheme == "flip" else "learn"
    tower = VisionTransformer(64, 8, 128, 2, 4, 512, 96, weight_init=scheme, patch_bias=True, posemb=posemb)
    params = initial(tower, jnp.zeros((1, 64, 64, 3)))
    for name, bound in bounds.items():
        largest = np.abs(params[name]).max()
        assert bound * 0.93 <= largest <= bound * 1.0001, (name, largest, bound)
    for name, std in stds.items():
        np.testing.assert_allclose(params[name].std(), std, rtol=0.25 if name == "cls" else 0.05, err_msg=name)


def test_initialisation_of_text_towers():
    for scheme, pos, bias in (("clip_text", 0.01, 128**-0.5), ("flip", 0.02, 0.0), ("unicl", 0.02, 0.0)):
        tower = TextTransformer(100, 64, 128, 2, 4, 512, 96, 99, weight_init=scheme)
        params = initial(tower, jnp.zeros((1, 64), jnp.int32))
        np.testing.assert_allclose(params["embed/embedding"].std(), 0.02, rtol=0.05)
        np.testing.assert_allclose(params["pos"].std(), pos, rtol=0.05)
        assert bias * 0.93 <= np.abs(params["block_0/mlp/fc1/bias"]).max() <= bias * 1.0001
    for name in ("block_1/attn/out/kernel", "block_0/mlp/fc1/kernel", "block_0/mlp/fc2/kernel", "proj/kernel"):
        np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.05, err_msg=f"unicl {name}")
    assert (6 / 512) ** 0.5 * 0.93 <= np.abs(params["block_0/attn/query/kernel"]).max() <= (6 / 512) ** 0.5


def test_projections_of_align_start_as_dense_layers_of_tensorflow():
    """Glorot and Bengio 2010: uniform, the bound sqrt(6 / (fan in + fan out))."""
    model = tiny()
    model.embed_dim = 96
    model.text = BERT | dict(proj_init="glorot")
    params = initial(text_tower(model), jnp.zeros((1, 8), jnp.int32))
    image = EfficientNet(32, 96, stages=((8, 1, 3, 2, 1), (40, 1, 3, 2, 1)), proj_init="glorot")
    for tower, width in ((params, 32), (initial(image, jnp.zeros((1, 32, 32, 3))), 40)):
        bound = (6 / (width + 96)) ** 0.5
        assert bound * 0.98 <= np.abs(tower["proj/kernel"]).max() <= bound, width
        np.testing.assert_allclose(tower["proj/kernel"].std(), bound / 3**0.5, rtol=0.05)


def test_sine_cosine_positions_of_moco_v3():
    """MAE's and FLIP's `get_2d_sincos_pos_embed`: columns first, exponents k / (D / 4)."""
    table = jax.jit(functools.partial(sincos_2d, 2, 3, 16, includes_last=False))
    found = np.asarray(table())
    omega = 1 / 10_000 ** (np.arange(4) / 4)
    for y in range(2):
        for x in range(3):
            wanted = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
            np.testing.assert_allclose(found[3 * y + x], np.concatenate(wanted), atol=1e-5)
