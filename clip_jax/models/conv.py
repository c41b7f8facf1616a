"""Convolutions, the depthwise one in a form that depends on the platform."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.models.common import gather


def _native(stride, padding, x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1] // kernel.shape[2]
    )  # fmt: skip


def _shifted(stride, padding, x, size):
    """For each of the size * size taps the part of the padded `x` that it meets, of the output's shape."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, cols = ((n - size) // stride + 1 for n in x.shape[1:3])
    taps = [(i, j) for i in range(size) for j in range(size)]
    return [x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride] for i, j in taps]


def _by_taps(stride, padding, x, kernel):
    """A depthwise convolution as a sum over the kernel's taps, each a product with the shifted image."""
    taps = kernel.reshape(-1, kernel.shape[-1])
    return sum(part * tap for part, tap in zip(_shifted(stride, padding, x, kernel.shape[0]), taps, strict=True))


def _by_taps_transposed(stride, padding, x, kernel, gradient):
    """The gradients of `x` and `kernel` in the same form."""
    size, g = kernel.shape[0], lax.optimization_barrier(gradient)  # else it is computed anew for each tap
    d_kernel = jnp.stack([jnp.sum(part * g, axis=(0, 1, 2)) for part in _shifted(stride, padding, x, size)])
    before = [size - 1 - low for low, _ in padding]
    after = [x.shape[k + 1] + size - 1 - before[k] - ((g.shape[k + 1] - 1) * stride + 1) for k in (0, 1)]
    spread = [(0, 0, 0), *((before[k], after[k], stride - 1) for k in (0, 1)), (0, 0, 0)]
    d_x = _by_taps(1, ((0, 0), (0, 0)), lax.pad(g, jnp.zeros((), g.dtype), spread), kernel[::-1, ::-1])
    return d_x, d_kernel.reshape(kernel.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise(stride, padding, x, kernel):
    """Depthwise convolution of `x[b, h, w, c]` with `kernel [k, k, 1, c]`.

    On a CPU a sum over taps: XLA's depthwise convolution with its gradient is an order of magnitude slower there. The gradient is
    written out so that only the inputs are kept for it, whichever form it takes.

    Args:
      stride: of both axes.
      padding: `((top, bottom), (left, right))`.
    """
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_by_taps, stride, padding), default=functools.partial(_native, stride, padding)
    )  # fmt: skip


def _forward(stride, padding, x, kernel):
    return depthwise(stride, padding, x, kernel), (x, kernel)


def _backward(stride, padding, inputs, gradient):
    def transposed(x, kernel, g):
        return jax.vjp(functools.partial(_native, stride, padding), x, kernel)[1](g)

    return lax.platform_dependent(
        *inputs, gradient, cpu=functools.partial(_by_taps_transposed, stride, padding), default=transposed
    )


depthwise.defvjp(_forward, _backward)


def same_padding(size, stride, height, width):
    """TensorFlow's SAME: the output has `ceil(n / stride)` rows, an odd row of padding comes last."""
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (height, width)]
    return tuple((t // 2, t - t // 2) for t in total)


class Conv(nn.Module):
    """A convolution without bias, `[b, h, w, c] -> [b, h', w', features]`; the kernel is float32 `[k, k, c or 1, features]`.

    `padding` is `((top, bottom), (left, right))`, or None for TensorFlow's SAME.
    """

    features: int
    size: int
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    depthwise: bool = False
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        channels = 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, channels, self.features)).astype(
            self.dtype
        )
        x, kernel = x.astype(self.dtype), gather(kernel)
        padding = self.padding or same_padding(self.size, self.stride, *x.shape[1:3])
        if self.size == self.stride == 1:
            return x @ kernel[0, 0]
        return (depthwise if self.depthwise else _native)(self.stride, padding, x, kernel)
