"""`Method.scale` is the factor of the similarities in a method's loss, and `Model.classify` uses it."""

import math

import jax
import numpy as np
import PIL.Image
import pytest
from model_helpers import tiny_method

from clip_jax import plugins
from clip_jax.inference import Model
from clip_jax.runtime import sharding

LEARNED = {"logit_scale": 1.5}
#: (method, overrides, values of scalar parameters, the scale of the loss with them).
CASES = [
    ("align", [], {"temperature": 0.05}, 20.0),
    ("alip", [], LEARNED, math.exp(1.5)),
    ("clip", [], LEARNED, math.exp(1.5)),
    ("clippo", [], LEARNED, math.exp(1.5)),
    ("declip", [], LEARNED, math.exp(1.5)),
    ("declip", [], {"logit_scale": 6.0}, 100.0),
    ("filip", [], LEARNED, math.exp(1.5)),
    ("laclip", [], LEARNED, math.exp(1.5)),
    ("oner", ["oner.temperature=0.1"], {}, 10.0),
    ("otter", [], LEARNED, math.exp(1.5)),
    ("otter", [], {"logit_scale": 6.0}, 100.0),
    ("otter", [], {"logit_scale": -1.0}, 1.0),
    ("pyramidclip", [], LEARNED, math.exp(1.5)),
    ("raclip", [], LEARNED, math.exp(1.5)),
    ("siglip", [], {"logit_scale": 6.0}, math.exp(6.0)),
    ("unicl", [], LEARNED, math.exp(1.5)),
    ("zerovl", ["zerovl.temperature=0.02"], {}, 50.0),
    ("zerovl", ["zerovl.temperature=0"], LEARNED, math.exp(1.5)),
]
NAMES = ["a cat", "a dog", "a house"]


def test_every_method_has_a_case():
    # The loss of classify has no similarities of pictures and texts.
    assert {name for name, *_ in CASES} == set(plugins.names("clip_jax.methods", "make")) - {"classify"}


@pytest.mark.parametrize("name, overrides, scalars, expected", CASES)
def test_scale_is_that_of_the_loss(name, overrides, scalars, expected):
    c, method, params, extra, tokenizer = tiny_method(name, *overrides)
    assert scalars.keys() <= params.keys()
    params = params | {key: np.float32(value) for key, value in scalars.items()}
    scale = method.scale(params)
    assert scale.dtype == np.float32 and scale.shape == ()
    np.testing.assert_allclose(scale, expected, rtol=1e-4)

    rng = jax.random.key(1)

    def inputs_of_loss(params, extra, batch):
        batch = method.prepare(batch, rng)
        features, extra = method.encode(params, extra, batch, rng, True)
        return *method.heads(params, extra, features, batch, rng), batch

    def metrics(params, features, extra, batch):
        return method.loss(params, extra, features, batch, rng)[1]

    inputs = jax.eval_shape(inputs_of_loss, params, extra, method.batch_spec(4))
    if "logit_scale" in jax.eval_shape(metrics, params, *inputs):
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), inputs)  # the scale is that of any features
        np.testing.assert_array_equal(jax.jit(metrics)(params, *ones)["logit_scale"], scale)


@pytest.mark.parametrize("name, overrides, scalars", [case[:3] for case in CASES])
def test_classify_uses_the_scale(name, overrides, scalars):
    c, method, params, extra, tokenizer = tiny_method(name, *overrides)
    params = params | {key: np.float32(value) for key, value in scalars.items()}
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model = Model(c, method, params, extra, tokenizer, mesh)
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(2)]
    found = model.classify(images, NAMES)
    similarities = model.similarity(model.embed_image(images), model.embed_text(NAMES))
    expected = np.asarray(jax.nn.softmax(method.scale(params) * similarities, axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.ptp(found, axis=1).min() > 0


def test_the_released_temperatures():
    for name, overrides, expected in (
        ("zerovl", ("zerovl.temperature=0.02",), 50),
        ("oner", ("oner.temperature=0.1",), 10),
    ):
        _, method, params, _, _ = tiny_method(name, *overrides)
        np.testing.assert_allclose(method.scale(params), expected, rtol=1e-6)
