"""Linear layers and tables with float32 parameters, low-precision outputs, and gradients that are summed in float32.

The gradient of a parameter is a sum over examples, tokens and devices. A sum of equal bfloat16 numbers, which have 8
bits of mantissa, stops growing after 256 terms. So a parameter that is broadcast or gathered stays float32 until the
result is cast: then the cotangent is float32 before it is summed. A matrix product accumulates the gradient of its
kernel in float32. The gradient leaves the product in the dtype of the kernel, and this is the dtype of the all-reduce
over devices: float32, or what the train step casts kernels to (`optim.grad_dtype`).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def add(x, parameter):
    """Returns `x + parameter` in the dtype of `x`; the float32 parameter is broadcast to the shape of `x`."""
    return (x.astype(jnp.float32) + parameter).astype(x.dtype)


def multiply(x, factor):
    """Returns `x * factor` in the dtype of `x`; the factor of any dtype is broadcast to the shape of `x`."""
    return (x.astype(jnp.float32) * factor.astype(jnp.float32)).astype(x.dtype)


def replace(x, where, parameter):
    """Returns `x` in its dtype, with the float32 parameter where the bool array, broadcast to `x`, is True."""
    return jnp.where(where, parameter, x.astype(jnp.float32)).astype(x.dtype)


def matmul(x, kernel, apart=False):
    """Returns the product of `x[..., k]` and `kernel[k, n]`, `[..., n]` in the dtype of `x`.

    The kernel is float32 or has the dtype of `x`. With `apart` the kernel's gradient stands behind an optimization
    barrier: XLA chooses its layout without regard to what reads it.
    """
    # Equal dtypes need no rule of their own, and a custom rule would exclude forward-mode differentiation.
    return x @ kernel if kernel.dtype == x.dtype and not apart else _cast_and_dot(x, kernel, apart)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cast_and_dot(x, kernel, apart):
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel, apart):
    # The product itself, not `_cast_and_dot`, whose result a policy of rematerialisation would not find.
    return x @ kernel.astype(x.dtype), (x, kernel)


def _backward(apart, residuals, gradient):
    x, kernel = residuals
    d_x, batch = gradient @ kernel.astype(x.dtype).T, tuple(range(x.ndim - 1))

    def d_kernel(x, gradient):
        return lax.dot_general(x, gradient, ((batch, batch), ((), ())), preferred_element_type=kernel.dtype)

    def d_kernel_on_cpu(x, gradient):  # XLA's CPU backend refuses some products of bfloat16 that give float32
        return d_kernel(x.astype(kernel.dtype), gradient.astype(kernel.dtype))

    found = lax.platform_dependent(x, gradient, cpu=d_kernel_on_cpu, default=d_kernel)
    return d_x, lax.optimization_barrier(found) if apart else found


_cast_and_dot.defvjp(_forward, _backward)


def float32_matmul(x, kernel):
    """Returns the product of `x[..., k]` and the float32 `kernel[k, n]` in float32, `[..., n]`, such as logits.

    The factors have the dtype of `x`. The gradients are those of `matmul`.
    """
    return x @ kernel if x.dtype == jnp.float32 else _dot_to_float32(x, kernel)


@jax.custom_vjp
def _dot_to_float32(x, kernel):
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


_dot_to_float32.defvjp(
    lambda x, kernel: (_dot_to_float32(x, kernel), (x, kernel)),
    lambda residuals, gradient: _backward(False, residuals, gradient.astype(residuals[0].dtype)),
)


class Dense(nn.Module):
    """A linear layer, `[..., *k] -> [..., *features]`, with the parameters of flax's `Dense` and `DenseGeneral`.

    With `flat=True` a call returns `(y [..., prod(features)] before the bias is added, float32 bias [prod(features)] or
    None)`, for a caller that adds the bias itself.

    Attributes:
      features: size of the output axis, or a tuple of sizes.
      use_bias: adds a bias.
      axes: number of contracted axes k of the input, its last ones.
      dtype: dtype of the product and of the output.
      kernel_init, bias_init: initialisers. The kernel is initialised as a matrix `[prod(k), prod(features)]`.
      apart: as for `matmul`.
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    axes: int = 1
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    apart: bool = False

    @nn.compact
    def __call__(self, x, flat=False):
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        batch, inputs = x.shape[: x.ndim - self.axes], x.shape[x.ndim - self.axes :]
        shape = math.prod(inputs), math.prod(features)

        def kernel_init(key):
            return self.kernel_init(key, shape, jnp.float32).reshape(*inputs, *features)

        # A product of matrices has the layout that fused attention on TPUs reads.
        kernel = self.param("kernel", kernel_init).reshape(shape)
        y, bias = matmul(x.astype(self.dtype).reshape(*batch, shape[0]), kernel, self.apart), None
        if self.use_bias:
            bias = self.param("bias", lambda key: self.bias_init(key, shape[1:], jnp.float32).reshape(features))
            bias = bias.reshape(shape[1:])
        if flat:
            return y, bias
        return (y if bias is None else add(y, bias)).reshape(*batch, *features)


class Embed(nn.Module):
    """A table of vectors, int32 ids `[...] -> [..., width]`, with the parameter of flax's `Embed`.

    Attributes:
      vocab_size: number of rows.
      width: size of a row.
      dtype: dtype of the output. The rows are gathered in float32.
      embedding_init: initialiser of the table.
    """

    vocab_size: int
    width: int
    dtype: Any = jnp.float32
    embedding_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, ids):
        table = self.param("embedding", self.embedding_init, (self.vocab_size, self.width))
        return jnp.take(table, ids, axis=0).astype(self.dtype)
