"""InfoNCE: golden values and gradients, the oracles of clip.md, and the same result on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_files

from clip_jax.losses.contrastive import cross_entropy, infonce
from clip_jax.models.common import l2_normalize
from clip_jax.training.sharding import batch_sharding


def loss(z_image, z_text, log_scale, smoothing=0.0):
    return infonce(z_image, z_text, jnp.exp(log_scale), smoothing)[0]


def unit(seed, b, e):
    return l2_normalize(jax.random.normal(jax.random.key(seed), (b, e)))


@pytest.mark.parametrize("path", golden_files("loss_clip_infonce_*.npz"))
def test_golden_value_and_gradients(path):
    g = np.load(path)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(g["image_features"], g["text_features"], g["log_scale"])
    np.testing.assert_allclose(value, g["loss"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("grad_image", "grad_text", "grad_log_scale"), strict=True):
        np.testing.assert_allclose(grad, g[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", golden_files("loss_align_smoothed*.npz"))
def test_golden_label_smoothing(path):
    g = np.load(path)

    def summed(image, text, temperature):
        return 2 * infonce(image, text, 1 / temperature, float(g["label_smoothing"]))[0]

    value, grads = jax.value_and_grad(summed, argnums=(0, 1, 2))(g["image_features"], g["text_features"], g["temperature"])
    np.testing.assert_allclose(value, g["loss_sum"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("image", "text", "temperature"), strict=True):
        np.testing.assert_allclose(grad, g[f"grad_{name}_of_sum"], rtol=1e-4, atol=1e-5)


def test_equal_embeddings_give_ln_b():
    z = jnp.tile(unit(0, 1, 16), (32, 1))
    np.testing.assert_allclose(loss(z, z, 2.0), np.log(32), rtol=1e-6)


def test_random_unit_embeddings():
    value = loss(unit(0, 1024, 512), unit(1, 1024, 512), jnp.log(1 / 0.07))
    np.testing.assert_allclose(value, np.log(1024) + (1 / 0.07) ** 2 / (2 * 512), atol=0.05)


def test_orthonormal_pairs():
    z = jnp.eye(512)
    np.testing.assert_allclose(loss(z, z, jnp.log(1 / 0.07)), np.log1p(511 * np.exp(-1 / 0.07)), rtol=1e-3)


def test_order_of_pairs_does_not_matter():
    z_image, z_text, order = unit(0, 24, 8), unit(1, 24, 8), np.random.default_rng(0).permutation(24)
    np.testing.assert_allclose(loss(z_image, z_text, 1.0), loss(z_image[order], z_text[order], 1.0), rtol=1e-6)


def test_accuracy_counts_both_directions():
    z_image = jnp.eye(4)
    z_text = jnp.eye(4).at[3].set(jnp.eye(4)[2] * 0.9 + jnp.eye(4)[3] * 0.1)  # text 3 looks like image 2
    _, metrics = infonce(z_image, z_text, 10.0)
    assert metrics["image_to_text_acc"] == 1.0 and metrics["text_to_image_acc"] == 0.75


def test_bfloat16_features_give_a_float32_loss():
    value, _ = infonce(unit(0, 64, 32).astype(jnp.bfloat16), unit(1, 64, 32).astype(jnp.bfloat16), 100.0)
    assert value.dtype == jnp.float32
    exact = loss(*(unit(i, 64, 32).astype(jnp.bfloat16).astype(jnp.float32) for i in (0, 1)), jnp.log(100.0))
    np.testing.assert_allclose(value, exact, rtol=1e-4)


def test_sharded_value_and_gradients_equal_one_device(mesh8):
    args = unit(0, 32, 16), unit(1, 32, 16), jnp.float32(2.5)
    expected, expected_grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*args)
    sharded = [jax.device_put(x, batch_sharding(mesh8)) for x in args[:2]]
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*sharded, args[2])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_cross_entropy_takes_soft_targets():
    logits, targets = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.2, 0.3, 0.5]])
    expected = -(targets * (logits - jax.scipy.special.logsumexp(logits))).sum()
    np.testing.assert_allclose(cross_entropy(logits, targets), [expected], rtol=1e-6)
