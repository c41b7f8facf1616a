"""Pieces that the towers share: activations, initialisers, batch norm, dropout, sharding, position embeddings."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from clip_jax.errors import UserError

#: Mesh axes that split the examples of a batch. The other axes of a mesh split parameters only.
BATCH_AXES = ("data", "fsdp")

#: The `checkpoint_name` of values that blocks in a loop store for the backward pass; see `transformer.REMAT`.
KEPT = "kept"

#: Key of the marks of `mark_frozen`.
FROZEN = "frozen"

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
}


def platform():
    """Returns the platform that a program is traced for, such as `"tpu"`.

    It is that of the mesh in use (`jax.set_mesh`), whose devices may be absent, or that of JAX's default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def devices_along(axes):
    """Returns the number of devices of the mesh in use along a mesh axis or a tuple of them; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ([axes] if isinstance(axes, str) else axes or ()))


def shard_batch(x, axis=0):
    """Returns `x` with dimension `axis` constrained to be split over `BATCH_AXES` of the mesh in use (`jax.set_mesh`).

    Without a mesh it returns `x`. An unconstrained partitioner may gather activations on every device; one constraint
    at the input of every block prevents that.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None,) * axis, BATCH_AXES))


def row_major(x):
    """Returns `x`, on the GPUs of the mesh in use with its last dimension contiguous in memory, and so its gradient.

    The gradient of a position embedding is a sum over the batch. XLA would make the batch contiguous for it in all
    blocks, and transpose the input of every matrix product: 15 % of a step of ViT-B/16 on an H200.
    """
    # Without a mesh the platform would be that of the devices, which the shapes of a model do not need.
    return x if jax.sharding.get_abstract_mesh().empty or platform() != "gpu" else _row_major(x)


@jax.custom_vjp
def _row_major(x):
    constrain = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    if len(x) % devices_along(BATCH_AXES):
        return x
    # The partitioner of JAX 0.10 gathers the batch on every device for a constraint that is not local.
    spec = PartitionSpec(BATCH_AXES)
    return jax.shard_map(constrain, in_specs=spec, out_specs=spec, check_vma=False)(x)


# The transpose of `shard_map` would sum over the other axes of the mesh, for values that are equal along them.
_row_major.defvjp(lambda x: (_row_major(x), None), lambda _, gradient: (_row_major(gradient),))


def gather(x):
    """Returns the parameter `x` constrained to be whole on every device of the mesh in use; without a mesh, `x`.

    If a convolution's kernel stays split over its channels, the partitioner gathers the activations instead.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def l2_normalize(x, axis=-1):
    """Returns `x` scaled to unit L2 norm along `axis`, float32 of the same shape. A zero vector stays zero.

    The norm is computed in float32 whatever the dtype of `x`.
    """
    x = x.astype(jnp.float32)
    # The lower bound keeps the gradient finite at zero. It changes no vector longer than 1e-12.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-24))


def torch_uniform(fan_in):
    """Returns the initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for a linear layer and its bias."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


#: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the kernel of a convolution.
torch_conv = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sincos_2d(height, width, dim, temperature=10_000.0, includes_last=True):
    """Returns the fixed 2-D sine-cosine position embedding of MoCo v3 (Chen et al. 2021).

    Its `dim // 4` frequencies fall geometrically from 1. In MoCo v3, MAE and FLIP the next one would be
    1 / `temperature`; in big_vision the last one is.

    Args:
      height, width: size of the grid of patches.
      dim: width of the embedding, divisible by 4.
      temperature: see above.
      includes_last: whether the last frequency is 1 / `temperature`.

    Returns:
      float32 `[height * width, dim]`, row after row of the grid.
    """
    y, x = jnp.mgrid[:height, :width]
    omega = 1.0 / temperature ** (jnp.arange(dim // 4) / (dim // 4 - includes_last))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


def moving_average(average, new, decay):
    """Returns the exponential moving average of pytrees; where `average` and `new` are equal it does not change."""
    return jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), average, new)


#: Between the two halves of an id beyond 32 bits; no method folds this number into the key of an example.
_BEYOND = 2**32 - 1


def fold_in_ids(rng, ids):
    """Returns the PRNG key of each example, `rng` with the id folded in, keys `[b]`.

    An id below 2**32 gives `jax.random.fold_in(rng, id)`.

    Args:
      rng: PRNG key.
      ids: uint32 `[b, 2]`, the low and the high half of each id: `batch["example_id"]`.

    Raises UserError for ids of another shape, such as those of the loader (`clip_jax.runtime.sharding.to_global`).
    """
    if ids.ndim != 2 or ids.shape[1] != 2:
        raise UserError(
            f"example_id {list(ids.shape)}: on a device it is uint32 [b, 2]; clip_jax.runtime.sharding.to_global takes "
            "a batch of the loader there"
        )

    def fold(low, high):
        key = jax.random.fold_in(rng, low)
        beyond = jax.random.fold_in(jax.random.fold_in(key, _BEYOND), high)
        return jnp.where(high == 0, key, beyond)

    return jax.vmap(fold)(ids[:, 0], ids[:, 1])


def drop(x, rate, keys, index, whole=False):
    """Returns `x` after dropout, drawn per example; what is kept is divided by `1 - rate`.

    Args:
      x: `[b, ...]`.
      rate: the chance of dropping, a float or a scalar array. The float 0 is the identity.
      keys: PRNG keys `[b]`. None is the identity.
      index: number of this dropout within its tower, an int or a scalar array. It is folded into the keys.
      whole: drops or keeps each example as a whole (stochastic depth, Huang et al. 2016).
    """
    if keys is None or isinstance(rate, int | float) and not rate:
        return x
    shape = (1,) * (x.ndim - 1) if whole else x.shape[1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), 1 - rate, shape))(keys)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


class BatchNorm(nn.Module):
    """Batch normalisation of `x[b, ..., c]`, computed in float32.

    Training uses the statistics of the batch. Under `jit` this is the global batch, however it is sharded. The running
    statistics `mean` and `var` in the collection `batch_stats` move towards them by `1 - decay`. As in PyTorch and
    TensorFlow, and unlike `flax.linen.BatchNorm`, the running variance is the unbiased one. Evaluation uses the running
    statistics and does not change them. The same holds in training for a norm with a mark of `mark_frozen`.

    Attributes:
      decay: the factor of the running statistics in an update.
      epsilon: added to the variance.
      group: 0, or the number of successive examples that are normalised by their own statistics ("ghost" batch norm,
        Hoffer et al. 2017). Training with per-device statistics computes the same. The running statistics move towards
        the mean over the groups.
      dtype: dtype of the output.
      scale_init: initialiser of the parameter `scale`.
      affine: False omits the parameters `scale` and `bias`.

    Raises UserError when `group` does not divide the batch in training.
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
        if train and not self.has_variable("batch_stats", FROZEN):
            group = self.group or shape[0]
            if shape[0] % group:
                raise UserError(
                    f"model.image.bn_group={group} does not divide the {shape[0]} examples of a batch or micro-batch"
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


def mark_frozen(extra, is_frozen):
    """Returns `extra` with marks on the frozen modules, which run as in evaluation while others train.

    A mark is an entry `FROZEN` without arrays, so that it is static under `jit`:
      `extra[FROZEN]` is a dict. Its keys are the top-level parts of the parameters that are frozen as a whole.
      `extra["batch_stats"]` has a mark next to `mean` and `var` of each `BatchNorm` whose parameters are all frozen. A
      `BatchNorm` without parameters is frozen if all parameters of the module around it are.

    Args:
      extra: a method's state without a gradient.
      is_frozen: pytree of bool like the parameters, as `clip_jax.training.optimizers.frozen` returns it.

    Returns:
      `extra` itself if nothing is frozen.
    """
    if not any(jax.tree.leaves(is_frozen)):
        return extra

    def mark(stats, frozen):
        if not any(isinstance(x, dict) for x in stats.values()):
            return stats | ({FROZEN: None} if all(jax.tree.leaves(frozen)) else {})
        return {name: mark(x, frozen.get(name, frozen)) for name, x in stats.items()}

    parts = {name: None for name, part in is_frozen.items() if all(jax.tree.leaves(part))}
    stats = {"batch_stats": mark(extra["batch_stats"], is_frozen)} if "batch_stats" in extra else {}
    return extra | stats | {FROZEN: parts}


def unmark_frozen(extra):
    """Returns `extra` without the marks of `mark_frozen`."""

    def unmark(stats):
        return {name: unmark(x) for name, x in stats.items() if name != FROZEN} if isinstance(stats, dict) else stats

    return {name: unmark(x) if name == "batch_stats" else x for name, x in extra.items() if name != FROZEN}


def stack_views(views, keys):
    """Interleaves v views of b examples into one batch.

    The views of an example become adjacent rows. A device that holds an example therefore holds all its views.

    Args:
      views: list of v arrays `[b, ...]`.
      keys: PRNG keys `[b, k]`, k at least v.

    Returns:
      `(rows [b * v, ...], keys [b * v])`; row `i * v + j` is view j of example i.
    """
    x, keys = jnp.stack(views, axis=1), keys[:, : len(views)]
    return x.reshape(-1, *x.shape[2:]), keys.reshape(-1)


def unstack_views(x, b):
    """Returns the rows `[b * v, ...]` of `stack_views` by example, `[b, v, ...]`."""
    return x.reshape(b, -1, *x.shape[1:])
