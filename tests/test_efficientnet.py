"""EfficientNet as ALIGN's image tower: sizes, golden outputs, padding, stochastic depth."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_files
from model_helpers import EFFICIENTNET, initialise, tiny

import clip_jax
from clip_jax.models.common import drop, l2_normalize
from clip_jax.models.efficientnet import EfficientNet, conv, scaled
from clip_jax.models.towers import EFFICIENTNETS, image_tower
from clip_jax.models.transformer import stack_layers, unstack_layers


# Parameters, width and blocks of the published models without top convolution and classifier.
@pytest.mark.parametrize(
    "name, parameters, width, blocks",
    [
        ("B0", 3_595_388, 320, 16),
        ("B1", 6_101_024, 320, 23),
        ("B2", 7_202_562, 352, 23),
        ("B3", 10_103_336, 384, 26),
        ("B4", 16_742_216, 448, 32),
        ("B5", 27_288_112, 512, 39),
        ("B6", 39_403_992, 576, 45),
        ("B7", 62_143_440, 640, 55),
        ("L2", 467_219_796, 1376, 88),
    ],
)
def test_published_sizes(name, parameters, width, blocks):
    tower = EfficientNet(64, 0, *EFFICIENTNETS[name])
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    assert tower.width == width == shapes[f"mbconv_{blocks - 1}"]["project_conv"]["kernel"].shape[-1]
    assert sum(name.startswith("mbconv_") for name in shapes) == blocks


def test_published_stage_widths():
    base = (32, 16, 24, 40, 80, 112, 192, 320)  # channels of the stem and the stages of B0
    assert [scaled(c, 2.0) for c in base] == [64, 32, 48, 80, 160, 224, 384, 640]
    assert [scaled(c, 4.3) for c in base] == [136, 72, 104, 176, 344, 480, 824, 1376]


@pytest.mark.parametrize("folder", golden_files("hf_align"))
def test_golden_image_tower_of_align(folder):
    model, io = clip_jax.load(folder), np.load(folder / "io.npz")
    variables = {"params": model.params["img"], "batch_stats": model.extra["batch_stats"]["img"]}
    tower = image_tower(model.config.model)

    def loss(images):
        params = {"temperature": model.params["temperature"]}
        features = {"image": l2_normalize(tower.apply(variables, images)[0]), "text": io["text_embed"]}
        value, _ = model.method.loss(params, {}, features, {}, None)
        return 0.5 * value, features["image"]  # transformers averages both directions

    images = io["pixel_values_nchw"].transpose(0, 2, 3, 1)
    (value, embedding), grad = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(images))
    np.testing.assert_allclose(embedding, io["image_embed"], rtol=1e-4, atol=5e-5)
    logits = embedding @ io["text_embed"].T / np.asarray(model.params["temperature"])
    np.testing.assert_allclose(logits, io["logits_per_image"], rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(value, io["loss"], rtol=2e-4)
    np.testing.assert_allclose(
        grad.transpose(0, 3, 1, 2), io["grad_pixel_values"], rtol=1e-3, atol=1e-3 * abs(io["grad_pixel_values"]).max()
    )


IMAGES = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


def efficientnet(**fields):
    model = tiny()
    model.image, model.embed_dim = dict(EFFICIENTNET, **fields), 16
    return image_tower(model)


@pytest.mark.parametrize("size, same, even", [(48, (0, 1), (0, 1)), (289, (1, 1), (0, 1))])
def test_a_stride_of_two_pads_as_tensorflow_or_as_for_an_even_size(size, same, even):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((1, size, size, 3), (3, 3, 3, 4)))
    for padding, pad in (("same", same), ("even", even)):

        class Conv(nn.Module):
            @nn.compact
            def __call__(self, x, padding=padding):
                return conv(x, 4, 3, 2, padding, jnp.float32, "conv")

        padded = np.pad(x, ((0, 0), pad, pad, (0, 0)))
        expected = jax.lax.conv_general_dilated(
            padded, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        found = jax.jit(Conv().apply)({"params": {"conv": {"kernel": kernel}}}, x)
        assert found.shape == expected.shape and found.shape[1] == (size + sum(pad) - 3) // 2 + 1
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_projection_is_optional():
    for proj in (False, True):
        (embedding, tokens), variables = jax.eval_shape(
            efficientnet(proj=proj).init_with_output, jax.random.key(0), np.zeros((2, 32, 32, 3), np.float32)
        )  # fmt: skip
        assert embedding.shape == (2, 16) and tokens.shape == (2, 8 * 8, 16)
        assert ("proj" in variables["params"]) == proj
    assert {name: x.shape for name, x in variables["params"]["proj"].items()} == {"kernel": (16, 16), "bias": (16,)}


def test_depthwise_kernels_are_initialised_by_the_fan_of_a_filter():
    variables = initialise(efficientnet().init, np.zeros((1, 32, 32, 3), np.float32))
    params = jax.device_get(variables["params"])
    for kernel, fan in (
        (params["mbconv_2"]["depthwise_conv"]["kernel"], 25),
        (params["mbconv_3"]["expand_conv"]["kernel"], 64),
    ):
        np.testing.assert_allclose(kernel.std(), (2 / fan) ** 0.5, rtol=0.1)


def test_stochastic_depth_drops_whole_examples_by_their_keys():
    x, keys = np.ones((512, 2, 2, 3), np.float32), jax.random.split(jax.random.key(0), 512)

    @jax.jit
    def dropped(keys, index):
        return drop(x[: len(keys)], 0.25, keys, index, whole=True)

    y = np.asarray(dropped(keys, 3))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)} and (y == y[:, :1, :1, :1]).all()
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.05)
    np.testing.assert_array_equal(y[100:], dropped(keys[100:], 3))
    assert (y != dropped(keys, 4)).any()
    assert drop(x, 0.25, None, 3, whole=True) is x


def test_stochastic_depth_acts_in_training_only_and_spares_the_first_block():
    images, keys = IMAGES, jax.random.split(jax.random.key(0), 8)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(stages, train, key, keys):
        """Returns the embeddings with and without keys."""
        tower = efficientnet(stages=stages, stochastic_depth=0.9)
        variables = tower.init(key, images)
        apply = functools.partial(tower.apply, variables, images, train=train, mutable=["batch_stats"])
        return [apply(keys=some)[0][0] for some in (keys, None)]

    stages = ((32, 1, 3, 1, 1), (16, 2, 3, 2, 4))  # of the three blocks, the first and the third have a residual
    dropped, whole = jax.device_get(run(stages, True, jax.random.key(0), keys))
    assert (dropped != whole).any()
    np.testing.assert_array_equal(*run(stages, False, jax.random.key(0), keys))
    alone = ((32, 1, 3, 1, 1), (16, 1, 3, 2, 4))
    np.testing.assert_array_equal(*run(alone, True, jax.random.key(0), keys))


def test_scanned_blocks_equal_single_ones():
    images, keys = IMAGES, jax.random.split(jax.random.key(0), 8)
    model = tiny()
    model.image = dict(EFFICIENTNET, stages=((8, 1, 3, 1, 1), (16, 4, 3, 2, 4)), stochastic_depth=0.9)
    variables = initialise(image_tower(model).init, images)

    def run(variables):
        def fn(params):
            (z, _), new = image_tower(model).apply(
                {**variables, "params": params}, images, True, keys, mutable=["batch_stats"]
            )
            return jnp.sin(z).sum(), new

        return jax.jit(jax.grad(fn, has_aux=True))(variables["params"])

    expected = run(variables)
    model.scan, model.remat = True, "full"
    shapes = jax.eval_shape(image_tower(model).init, jax.random.key(0), images)
    assert (
        shapes["params"]["mbconv_2_to_4"]["project_conv"]["kernel"].shape == (3, 1, 1, 64, 16)
        and "mbconv_1" in shapes["params"]
    )
    found = jax.device_get(run(jax.jit(functools.partial(stack_layers, like=shapes))(variables)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), unstack_layers(found[0]), expected[0]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), unstack_layers(found[1]), expected[1]
    )


def test_rematerialisation_drops_the_same_blocks():
    images, keys = IMAGES, jax.random.split(jax.random.key(0), 8)
    model = tiny()
    model.image = dict(EFFICIENTNET, stochastic_depth=0.9)
    variables = initialise(image_tower(model).init, images)

    def run():
        def fn(params):
            (z, _), new = image_tower(model).apply(
                {**variables, "params": params}, images, True, keys, mutable=["batch_stats"]
            )
            return jnp.sin(z).sum(), new

        return jax.jit(jax.grad(fn, has_aux=True))(variables["params"])

    expected = run()
    model.remat = "full"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), run(), expected)
