"""Pieces that every tower shares: initialisers, activations, batch norm, dropout, sharding of activations, position embeddings."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clip_jax.errors import UserError

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
    """Constrains the batch axis of `x` to be split over the batch axes of the mesh in use (`jax.set_mesh`); identity without one.

    Left to itself the partitioner may gather activations on every device; one constraint at the input of every block
    prevents that.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, BATCH_AXES))


def gather(x):
    """Constrains a parameter to be whole on every device of the mesh in use; identity without one.

    A convolution by a kernel that is split over its channels else has the partitioner gather the activations instead.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def l2_normalize(x, axis=-1):
    """Unit vectors along `axis`, computed in float32 whatever the input's dtype. A zero vector stays zero."""
    x = x.astype(jnp.float32)
    # The maximum keeps the gradient finite at zero; it changes no vector longer than 1e-12.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-24))


def torch_uniform(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch gives the weight and bias of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


#: What PyTorch gives the weight of a convolution: uniform in 1/sqrt(fan_in).
torch_conv = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sincos_2d(height, width, dim, temperature=10_000.0):
    """Fixed 2-D sine-cosine position embedding, float32 `[height * width, dim]` (MoCo v3); `dim` divisible by 4."""
    y, x = jnp.mgrid[:height, :width]
    omega = 1.0 / temperature ** (jnp.arange(dim // 4) / (dim // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


def drop(x, rate, keys, index, whole=False):
    """Dropout of `x[b, ...]`, drawn per example from `keys[b]` and `index`, the number of the place where it is used.

    With `whole` an example is dropped or kept as a whole (stochastic depth, Huang et al. 2016). Identity where `keys` is None.
    """
    if keys is None or isinstance(rate, int | float) and not rate:
        return x
    shape = (1,) * (x.ndim - 1) if whole else x.shape[1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, shape))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


class BatchNorm(nn.Module):
    """Batch normalisation of `x[b, ..., c]`, computed in float32; parameters `scale` and `bias`, statistics `mean` and `var`.

    In training by the statistics of the batch, under `jit` of the global batch, whatever devices hold it; the running ones in the
    collection `batch_stats` move towards them by `1 - decay`. As in PyTorch and TensorFlow, and unlike `flax.linen.BatchNorm`,
    the running variance is the unbiased one. With `group` the statistics are those of each `group` examples ("ghost" batch norm,
    Hoffer et al. 2017; what training with statistics per device computes), and the running ones move towards their average.
    Without `affine` there are no parameters.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    group: int = 0
    dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones
    affine: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        width = x.shape[-1:]
        scale = self.param("scale", self.scale_init, width) if self.affine else 1.0
        bias = self.param("bias", nn.initializers.zeros, width) if self.affine else 0.0
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32),
            self.variable("batch_stats", "var", jnp.ones, width, jnp.float32),
        ]
        mean, var = (r.value for r in running)
        shape, x = x.shape, x.astype(jnp.float32)
        if train:
            group = self.group or shape[0]
            if shape[0] % group:
                raise UserError(
                    f"model.image.bn_group={group} does not divide the {shape[0]} examples of a (micro-)batch"
                )
            x = x.reshape(-1, group, *shape[1:])
            axes = tuple(range(1, x.ndim - 1))
            mean = x.mean(axes, keepdims=True)
            var = jnp.maximum(jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean), 0.0)
            count = group * math.prod(shape[1:-1])
            if self.is_mutable_collection("batch_stats"):
                for r, new in zip(running, (mean, var * count / max(count - 1, 1)), strict=True):
                    r.value = self.decay * r.value + (1 - self.decay) * new.reshape(-1, *width).mean(0)
        y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(shape).astype(self.dtype)


def stack_views(views, keys):
    """Views `[b, ...]`, v of them, as `[b * v, ...]`, an example's side by side, so that every device keeps its own rows; and as many
    of the `keys[b, >= v]`."""
    x, keys = jnp.stack(views, axis=1), keys[:, : len(views)]
    return x.reshape(-1, *x.shape[2:]), keys.reshape(-1)


def unstack_views(x, b):
    """`[b * v, ...]` as `[b, v, ...]`."""
    return x.reshape(b, -1, *x.shape[1:])
