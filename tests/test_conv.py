"""Convolutions: both depthwise implementations and their gradients against lax, padding, memory of the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from clip_jax.models import conv


@pytest.mark.parametrize("form", [conv._native, conv.depthwise])
@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 6), (3, 2, 7), (3, 2, 8), (5, 2, 8), (5, 1, 5)])
def test_values_and_gradients_are_those_of_lax(form, size, stride, side):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, side, side, 4)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 1, 4)).astype(np.float32)
    padding = conv.same_padding(size, stride, side, side)

    def reference(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )  # fmt: skip

    weights = rng.normal(size=jax.eval_shape(reference, x, kernel).shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(form, x, kernel):
        _, transpose = jax.vjp(form, x, kernel)
        return form(x, kernel), transpose(weights)

    (found, gradients), (expected, wanted) = (
        run(f, x, kernel) for f in (functools.partial(form, stride, padding), reference)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_gradient_stores_one_image_and_not_one_per_tap():
    x, kernel = np.zeros((8, 32, 32, 64), np.float32), np.zeros((5, 5, 1, 64), np.float32)
    padding = conv.same_padding(5, 1, 32, 32)

    def through(layers):
        def f(x):
            for _ in range(layers):
                x = jnp.sin(conv.depthwise(1, padding, x, kernel))
            return x.sum()

        return jax.jit(jax.grad(f)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert through(8) - through(4) <= 4 * 3 * x.nbytes  # 4 more layers; storing 25 taps for each would take 100 images


def test_a_tpu_uses_the_native_convolution():
    text = jax.jit(lambda x, k: conv.depthwise(1, ((1, 1), (1, 1)), x, k)).trace(
        np.zeros((1, 4, 4, 2), np.float32), np.zeros((3, 3, 1, 2), np.float32)
    )
    assert "stablehlo.convolution" in text.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in text.lower(lowering_platforms=("cpu",)).as_text()
