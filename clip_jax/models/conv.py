"""Convolutions. The depthwise one has an implementation for CPUs and one for accelerators."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.models.common import gather
from clip_jax.models.layers import matmul


def _native(stride, padding, x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _native_transposed(stride, padding, x, kernel, gradient):
    """Returns the gradients of `x`, in its dtype, and of `kernel`, accumulated in the kernel's dtype."""
    convolution = functools.partial(_native, stride, padding)
    d_x = jax.vjp(lambda x: convolution(x, kernel), x)[1](gradient)[0]
    # At its default precision an accelerator multiplies float32 numbers as fast as bfloat16 ones.
    x, gradient = x.astype(kernel.dtype), gradient.astype(kernel.dtype)
    return d_x, jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](gradient)[0]


def _shifted(stride, padding, x, size):
    """Returns for each of the `size * size` taps the elements of the padded `x` that it multiplies, in output shape."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, cols = ((n - size) // stride + 1 for n in x.shape[1:3])
    taps = [(i, j) for i in range(size) for j in range(size)]
    return [x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride] for i, j in taps]


def _by_taps(stride, padding, x, kernel):
    """Computes a depthwise convolution as the sum over the kernel's taps of tap times shifted image."""
    taps = kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])
    return sum(part * tap for part, tap in zip(_shifted(stride, padding, x, kernel.shape[0]), taps, strict=True))


def _by_taps_transposed(stride, padding, x, kernel, gradient):
    """Returns the gradients of `x` and `kernel` as sums over taps."""
    # Without the barrier XLA recomputes the gradient for each tap.
    size, g = kernel.shape[0], lax.optimization_barrier(gradient)
    parts = (part.astype(kernel.dtype) for part in _shifted(stride, padding, x, size))
    d_kernel = jnp.stack([jnp.sum(part * g.astype(kernel.dtype), axis=(0, 1, 2)) for part in parts])
    before = [size - 1 - low for low, _ in padding]
    after = [x.shape[k + 1] + size - 1 - before[k] - ((g.shape[k + 1] - 1) * stride + 1) for k in (0, 1)]
    spread = [(0, 0, 0), *((before[k], after[k], stride - 1) for k in (0, 1)), (0, 0, 0)]
    d_x = _by_taps(1, ((0, 0), (0, 0)), lax.pad(g, jnp.zeros((), g.dtype), spread), kernel[::-1, ::-1])
    return d_x, d_kernel.reshape(kernel.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise(stride, padding, x, kernel):
    """Returns the depthwise convolution of `x[b, h, w, c]` with `kernel[k, k, 1, c]`.

    On a CPU it is a sum over taps: XLA's depthwise convolution and its gradient are an order of magnitude slower there.
    The explicit gradient rule stores only the inputs for the backward pass on every platform.

    Args:
      stride: of both axes, in pixels.
      padding: `((top, bottom), (left, right))`, in pixels.
    """
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_by_taps, stride, padding), default=functools.partial(_native, stride, padding)
    )  # fmt: skip


def _forward(stride, padding, x, kernel):
    return depthwise(stride, padding, x, kernel), (x, kernel)


def _backward(stride, padding, inputs, gradient):
    by_taps = functools.partial(_by_taps_transposed, stride, padding)
    native = functools.partial(_native_transposed, stride, padding)
    return lax.platform_dependent(*inputs, gradient, cpu=by_taps, default=native)


depthwise.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cast_and_convolve(stride, padding, x, kernel):
    return _native(stride, padding, x, kernel)


_cast_and_convolve.defvjp(
    lambda stride, padding, x, kernel: (_native(stride, padding, x, kernel), (x, kernel)),
    lambda stride, padding, inputs, gradient: _native_transposed(stride, padding, *inputs, gradient),
)


def convolve(stride, padding, x, kernel):
    """Returns the convolution of `x[b, h, w, c]` with `kernel[k, k, c, n]` in the dtype of `x`.

    The gradient of the kernel is accumulated in the kernel's dtype, see `clip_jax.models.layers`.

    Args:
      stride: of both axes, in pixels.
      padding: `((top, bottom), (left, right))`, in pixels.
    """
    function = _native if kernel.dtype == x.dtype else _cast_and_convolve
    return function(stride, padding, x, kernel)


def same_padding(size, stride, height, width):
    """Returns the padding of TensorFlow's SAME, `((top, bottom), (left, right))`.

    The output has `ceil(n / stride)` rows and columns. An odd amount of padding is larger at the bottom or right.

    Args:
      size, stride: of the kernel, in pixels.
      height, width: of the image, in pixels.
    """
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (height, width)]
    return tuple((t // 2, t - t // 2) for t in total)


class Conv(nn.Module):
    """A convolution without bias, `[b, h, w, c] -> [b, h', w', features]`.

    Attributes:
      features: channels of the output.
      size: height and width k of the kernel, float32 `[k, k, c, features]`, depthwise `[k, k, 1, features]`.
      stride: of both axes, in pixels.
      padding: `((top, bottom), (left, right))`, or None for TensorFlow's SAME.
      depthwise: convolves each channel with its own filter; `features` then equals c.
      dtype: dtype of the computation and the output.
      kernel_init: initialiser of the kernel.
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
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, channels, self.features))
        x, kernel = x.astype(self.dtype), gather(kernel)
        padding = self.padding or same_padding(self.size, self.stride, *x.shape[1:3])
        if self.size == self.stride == 1:
            return matmul(x, kernel[0, 0])
        return (depthwise if self.depthwise else convolve)(self.stride, padding, x, kernel)
