"""ALIGN's loss: the oracles of align.md, its temperature, and steps of training with its towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import unit
from model_helpers import BERT, EFFICIENTNET

from clip_jax import config
from clip_jax.methods import align
from clip_jax.models.towers import image_tower, use_size


def tiny_align(**image):
    c = config.base()
    c.method, c.model.dtype = "align", "float32"
    c.model.embed_dim = 16
    c.model.image, c.model.text = dict(EFFICIENTNET, **image), BERT
    return c


def loss(z_image, z_text, temperature):
    params = {"temperature": jnp.asarray(temperature, jnp.float32)}
    value, metrics = align.make(tiny_align()).loss(params, {}, {"image": z_image, "text": z_text}, {}, None)
    return float(value), metrics


def smoothed_cross_entropy(logits):
    """The sum of both directions by the formula, with targets of 0.9 on the diagonal plus 0.1 / B everywhere."""
    b = len(logits)
    targets = 0.9 * np.eye(b) + 0.1 / b
    return sum(-(targets * np.asarray(jax.nn.log_softmax(logits, axis))).sum(axis).mean() for axis in (0, 1))


@pytest.mark.parametrize("temperature", [1.0, 1 / 64])
def test_the_loss_is_the_sum_of_both_smoothed_directions_with_a_divisor(temperature):
    z_image, z_text = unit(0, 64, 16), unit(1, 64, 16)
    value, metrics = loss(z_image, z_text, temperature)
    np.testing.assert_allclose(value, smoothed_cross_entropy(z_image @ z_text.T / temperature), rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_scale"], 1 / temperature)


def test_collapsed_embeddings_cost_twice_ln_b():
    z = jnp.broadcast_to(unit(0, 1, 16), (64, 16))
    np.testing.assert_allclose(loss(z, z, 0.5)[0], 2 * np.log(64), rtol=1e-5)


def test_label_smoothing_has_a_floor_at_a_known_gap():
    b, eps = 64, 0.1
    gap = np.log((1 - eps + eps / b) / (eps / b))
    z = jnp.eye(b)
    at = {g: loss(z, z, 1 / g)[0] for g in (0.9 * gap, gap, 1.1 * gap)}
    targets = (1 - eps) * np.eye(b)[0] + eps / b
    np.testing.assert_allclose(at[gap], -2 * (targets * np.log(targets)).sum(), rtol=1e-4)
    assert at[gap] < min(at[0.9 * gap], at[1.1 * gap])


def test_the_temperature_starts_as_configured_and_stays_positive():
    c = tiny_align()
    c.model.temperature_init = 0.5
    method = align.make(c)
    params, extra = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec(2))
    assert "logit_scale" not in params and params["temperature"].shape == () and extra["batch_stats"].keys() == {"img"}
    assert method.constrain({"temperature": jnp.asarray(-0.2)})["temperature"] == np.float32(1e-3)
    assert method.constrain({"temperature": jnp.asarray(0.2)})["temperature"] == np.float32(0.2)


def test_pooled_features_are_the_embedding_where_the_paper_has_no_projection():
    for size, projected in (("ALIGN-B3-mini", True), ("ALIGN-B7-base", False), ("ALIGN-L2-large", False)):
        c = config.base()
        use_size(c.model, size)
        c.model.text.update(vocab_size=30522, eot_id=102, depth=1)
        c.model.image.depth_coefficient = 0.1  # one block a stage at the published widths
        method = align.make(c)
        batch = method.batch_spec(2)
        params, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
        assert ("proj" in params["img"]) == projected
        shape = jax.eval_shape(method.embed_image, params, extra, batch["image"]).shape
        features = jax.eval_shape(method.image_features, params, extra, batch["image"])
        assert features.shape == (2, image_tower(c.model).width)
        assert shape == jax.eval_shape(method.embed_text, params, extra, batch["text"]).shape == (2, c.model.embed_dim)
