"""SigLIP: the oracles of siglip.md, its configuration, and steps of training on meshes and in micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, unit
from model_helpers import BATCH, initialise, run_steps, starting_state

from clip_jax import config
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.losses import pairwise
from clip_jax.losses.contrastive import sigmoid
from clip_jax.methods.interface import make_method
from clip_jax.models.common import l2_normalize


def setup(*overrides):
    c = config.load("configs/siglip.py", [*TINY, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


@pytest.mark.parametrize("b, expected", [(256, 10.0116), (1024, 10.0465)])
def test_loss_at_the_published_start(b, expected):
    z_image, z_text = unit(0, b, 4096), unit(1, b, 4096)  # random vectors of many dimensions are nearly orthogonal
    np.testing.assert_allclose(sigmoid(z_image, z_text, 10.0, -10.0)[0], expected, rtol=8e-4)


def test_gradient_of_the_bias_at_the_start():
    z = jnp.concatenate([jnp.eye(64), jnp.zeros((64, 64))], axis=1)
    other = jnp.roll(z, 64, axis=1)  # all cosines are 0
    grad = jax.jit(jax.grad(lambda bias: sigmoid(z, other, jnp.asarray(10.0), bias)[0]))(jnp.asarray(-10.0))
    np.testing.assert_allclose(grad, 64 * jax.nn.sigmoid(-10.0) - 1, rtol=1e-5)


def test_the_two_directions_are_one_and_a_shift_of_a_row_counts():
    z_image, z_text = unit(0, 32, 16), unit(1, 32, 16)
    value = sigmoid(z_image, z_text, 5.0, -2.0)[0]
    np.testing.assert_allclose(sigmoid(z_text, z_image, 5.0, -2.0)[0], value, rtol=1e-6)
    assert abs(sigmoid(z_image, z_text, 5.0, -1.0)[0] - value) > 0.1  # a softmax over rows would be invariant


def test_what_is_found_together_with_the_gradient_is_the_same(monkeypatch, mesh8):
    monkeypatch.setattr(pairwise, "TILE_ENTRIES", 16)
    z = unit(0, 40, 8), l2_normalize(unit(0, 40, 8) + unit(1, 40, 8)), jnp.float32(5.0), jnp.float32(-2.0)

    def thrice(*args):
        value, metrics = sigmoid(*args)
        return 3 * value, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(thrice, argnums=(0, 1, 2, 3), has_aux=True))(*z)
    expected, expected_metrics = jax.jit(sigmoid)(*z)
    np.testing.assert_allclose(value, 3 * expected, rtol=1e-6)
    assert metrics == expected_metrics and 0 < metrics["image_to_text_acc"] < 1
    for grad, once in zip(
        grads, jax.jit(jax.grad(lambda *args: sigmoid(*args)[0], argnums=(0, 1, 2, 3)))(*z), strict=True
    ):
        np.testing.assert_allclose(grad, 3 * once, rtol=1e-5, atol=1e-7)


def test_perfect_pairs_cost_nothing_at_a_large_scale():
    assert sigmoid(jnp.eye(16), jnp.eye(16), 100.0, -50.0)[0] < 1e-6


def test_scalars_start_as_configured_and_are_not_clamped():
    c, method = setup("model.logit_scale_init=6.0", "model.logit_bias_init=-3")
    params, extra = initialise(method.init, BATCH)
    assert params["logit_scale"] == 6 and params["logit_bias"] == -3 and extra == {}
    assert method.constrain(params)["logit_scale"] == 6  # beyond ln 100
    features = {"image": unit(0, 16, 16), "text": unit(1, 16, 16)}
    value, metrics = method.loss(params, extra, features, BATCH, None)
    np.testing.assert_allclose(value, sigmoid(features["image"], features["text"], np.exp(6.0), -3.0)[0])
    np.testing.assert_allclose((metrics["logit_scale"], metrics["logit_bias"]), (np.exp(6.0), -3), rtol=1e-6)


def test_a_mesh_and_micro_batches_give_the_result_of_one_device():
    c, method = setup()
    expected, _ = run_steps(c, method, None, steps=3, devices=jax.devices()[:1])
    assert expected[-1]["loss"] < expected[0]["loss"]
    c = c.copy_and_resolve_references()
    c.micro_batches = 2
    history, _ = run_steps(c, method, dict(data=2, fsdp=2, tensor=2), steps=3)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "logit_bias"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


def test_locked_image_tuning_moves_text_and_scalars_only():
    c, method = setup("optim.freeze=^img/")
    before = starting_state(c, method)[0].params
    _, state = run_steps(c, method, None, steps=1, devices=jax.devices()[:1])
    moved = {
        name: any(
            (a != b).any() for a, b in zip(*map(jax.tree.leaves, (before[name], state.params[name])), strict=True)
        )
        for name in before
    }
    assert moved == {"img": False, "txt": True, "logit_scale": True, "logit_bias": True}


def test_the_pooled_token_is_the_sticky_end_of_text():
    tokenizer = make_tokenizer("sentencepiece?pad_with_eot=true")
    ids = tokenizer(["a", "octopus " * 100], 16)
    assert (ids[:, -1] == tokenizer.eot_id).all()


@pytest.mark.parametrize("variant", ["b16_224", "l16_256", "so400m_14_224", "siglip2_b16_256", "smoke", ""])
def test_variants_are_complete(variant):
    c = config.load(f"configs/siglip.py:{variant}")
    config.validate(c)
    assert c.method == "siglip"
    if variant not in ("", "smoke"):
        c.model.text.update(dict(vocab_size=32000, eot_id=1))
        assert c.model.text.pool == "last" and not c.model.text.causal and c.model.image.pool == "map"
        method = make_method(c)
        batch = method.batch_spec(2)
        params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
        assert "proj" not in params["img"] and "bias" in params["txt"]["proj"]
