"""Pieces that every tower shares: initialisers, activations, sharding of activations, position embeddings."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

#: Mesh axes over which the examples of a batch are spread; the rest of a mesh holds parts of parameters.
BATCH_AXES = ("data", "fsdp")

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
}


def shard_batch(x, axis=0):
    """Constrains the batch axis of ``x`` to be split over the batch axes of the mesh in use (``jax.set_mesh``); identity without one.

    Left to itself the partitioner may gather activations on every device; one constraint at the input of every block
    prevents that.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, BATCH_AXES))


def l2_normalize(x, axis=-1):
    """Unit vectors along ``axis``, computed in float32 whatever the input's dtype. A zero vector stays zero."""
    x = x.astype(jnp.float32)
    # The maximum keeps the gradient finite at zero; it changes no vector longer than 1e-12.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-24))


def torch_uniform(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch gives the weight and bias of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def sincos_2d(height, width, dim, temperature=10_000.0):
    """Fixed 2-D sine-cosine position embedding, float32 ``[height * width, dim]`` (MoCo v3); ``dim`` divisible by 4."""
    y, x = jnp.mgrid[:height, :width]
    omega = 1.0 / temperature ** (jnp.arange(dim // 4) / (dim // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
