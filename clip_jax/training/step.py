"""The training state and the training step, a pure function `(state, batch) -> (state, metrics)`."""

import contextlib
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import UserError
from clip_jax.models.common import mark_frozen, moving_average, shard_batch, unmark_frozen
from clip_jax.training import optimizers
from clip_jax.training.schedules import make_schedule


@flax.struct.dataclass
class TrainState:
    """The complete state of training.

    Attributes:
      step: int32 scalar, the number of steps done. With the seed it determines the next batch and its randomness.
      params: the trained parameters, float32.
      extra: the method's state without a gradient.
      opt_state: the optimizer's state.
      ema: the moving average of the parameters, or None.
      bad_steps: int32 scalar, the number of latest consecutive steps whose update was skipped because it was not
        finite.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    ema: Any
    bad_steps: jax.Array


def make_init(config, method, batch):
    """Returns `(init, tx)`: the function `init(rng) -> TrainState` and the optimizer.

    `first_state` runs `init`, and `state_shapes` gives the shapes of its result. The model is traced once in all.

    Args:
      config: the configuration.
      method: a `Method`.
      batch: arrays or shapes of a batch, `[B, ...]`; only shapes and dtypes are used.
    """
    small = {name: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for name, x in batch.items()}

    def model(rng):
        # Made here: outside of this program each array would be a program of its own.
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in small.items()}
        return jax.jit(method.init)(rng, zeros)  # JAX keeps its trace for the next call

    params_shape, _ = state_shapes(model)
    tx = optimizers.make_optimizer(config.optim, config.train.steps, params_shape)

    def init(rng):
        params, extra = model(rng)
        ema = params if config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, extra, tx.init(params), ema, jnp.zeros((), jnp.int32))

    return init, tx


def state_shapes(init):
    """Returns the result of `first_state` as shapes."""
    with short_random():  # under other settings `first_state` would trace again
        return jax.eval_shape(init, jax.random.key(0))


def first_state(init, rng, shardings=None):
    """Returns the result of `init(rng)`, compiled, such as the `TrainState` of `make_init`.

    Args:
      init: a function of a key.
      rng: the key.
      shardings: None, or the shardings of the result.
    """
    with short_random():
        return jax.jit(init, out_shardings=shardings)(rng)


@contextlib.contextmanager
def short_random():
    """Within it, a program for an NVIDIA GPU draws random numbers by calls of JAX's kernel; the numbers are the same.

    Otherwise XLA spells out the 20 rounds of Threefry for each draw. Compiling the first state of ViT-B/16 then took
    over a minute. The step keeps them: XLA can split them over devices and fuse them, but not the kernel.
    """
    name = "jax_threefry_gpu_kernel_lowering"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _cut(x, parts, group):
    """Cuts the rows of `x[b, ...]` into `parts`, `[parts, b / parts, ...]`, by groups of successive rows.

    A part takes every k-th group, so that each device works on its own rows in each micro-batch. Raises UserError when
    parts of whole groups do not divide the rows.
    """
    if len(x) % (parts * group):
        raise UserError(
            f"model.image.bn_group={group} times micro_batches={parts} does not divide the {len(x)} examples of a batch"
        )
    groups = jnp.moveaxis(x.reshape(-1, parts, group, *x.shape[1:]), 1, 0)
    return shard_batch(groups.reshape(parts, -1, *x.shape[1:]), axis=1)


def _join(x, group):
    """The inverse of `_cut`."""
    groups = x.reshape(len(x), -1, group, *x.shape[2:])
    return shard_batch(jnp.moveaxis(groups, 0, 1).reshape(-1, *x.shape[2:]))


def make_gradients(method, micro_batches, group=1):
    """Returns `gradients(params, extra, batch, rng, view) -> (loss, metrics, features, extra, grads)`.

    It differentiates `loss(heads(encode(view(params))))`.

    With several micro-batches the loss is still that of the whole batch, with all its negatives (gradient caching, Gao
    et al. 2021). All parts are encoded without a gradient, the loss gives the gradient of the features, and each part
    is encoded again to carry this gradient to the parameters. Memory holds one part and all features. The extra work is
    one forward pass. The result is the same up to rounding, unless `encode` computes statistics over the batch, as
    `BatchNorm` without `group` does. Running statistics move once, towards their mean over the parts.

    Args:
      method: a `Method`.
      micro_batches: the number of parts of a batch.
      group: the number of successive examples that stay together in a part, the `group` of `BatchNorm`.

    `gradients` raises UserError when parts of whole groups do not divide the batch.
    """

    def finish(params, extra, features, batch, rng):
        features, extra = method.heads(params, extra, features, batch, rng)
        with jax.named_scope("loss"):
            loss, metrics = method.loss(params, extra, features, batch, rng)
        return loss, (metrics, features, extra)

    def whole(params, extra, batch, rng, view):
        def loss_fn(params):
            params = view(params)
            features, new_extra = method.encode(params, extra, batch, rng, train=True)
            return finish(params, new_extra, features, batch, rng)

        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return loss, *aux, grads

    def in_parts(params, extra, batch, rng, view):
        part, join = functools.partial(_cut, parts=micro_batches, group=group), functools.partial(_join, group=group)

        parts = jax.tree.map(part, batch)
        old, structure = jax.tree.flatten(extra)

        # `extra` goes through the loop, or XLA would move collectives that use it before the loop, in no fixed order
        # among the step's other ones: CPU devices could wait for each other forever.
        def encode(carried, part):
            features, new = method.encode(view(params), carried, part, rng, train=True)
            before, new = jax.tree.leaves(carried), structure.flatten_up_to(new)
            # What `encode` passes on unchanged, such as a teacher's parameters, is not stacked over the parts.
            return carried, (features, {i: x for i, x in enumerate(new) if x is not before[i]})

        _, (features, moved) = jax.lax.scan(encode, extra, parts)
        new = [x + (moved[i] - x).mean(0).astype(x.dtype) if i in moved else x for i, x in enumerate(old)]
        new_extra = structure.unflatten(new)
        leaves, treedef = jax.tree.flatten(jax.tree.map(join, features))
        floats = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]  # masks and indices carry no gradient

        def loss_fn(params, with_gradient):
            with_gradient = iter(with_gradient)
            joined = treedef.unflatten([next(with_gradient) if f else x for x, f in zip(leaves, floats, strict=True)])
            return finish(view(params), new_extra, joined, batch, rng)

        chosen = [x for x, f in zip(leaves, floats, strict=True) if f]
        (loss, aux), (grads, d_features) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, chosen)

        def add(grads, part):
            part, d_part = part

            def encode_again(params):
                found = jax.tree.leaves(method.encode(view(params), extra, part, rng, train=True)[0])
                return [x for x, f in zip(found, floats, strict=True) if f]

            _, transpose = jax.vjp(encode_again, params)
            return jax.tree.map(jnp.add, grads, transpose(d_part)[0]), None

        grads, _ = jax.lax.scan(add, grads, (parts, [part(x) for x in d_features]))
        return loss, *aux, grads

    return whole if micro_batches == 1 else in_parts


def cast_kernels(params, dtype):
    """Returns the parameters with the kernels in a dtype. The sum of their gradients over devices then has it too."""

    def cast(path, x):
        return x.astype(dtype) if x.ndim > 1 and path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def make_step(config, method, tx):
    """Returns `step(state, batch) -> (state, metrics)`; metrics are scalars.

    When the loss or a gradient is not finite, only `step` and `bad_steps` of the state change. Frozen modules run as in
    evaluation (`clip_jax.models.common.mark_frozen`). Their parameters, the moving average of these and their running
    statistics do not change.

    Args:
      config: the configuration.
      method: a `Method`.
      tx: its optimizer.
    """
    schedule = make_schedule(config.optim, config.train.steps)
    decay = config.optim.ema_decay
    gradients = make_gradients(method, config.micro_batches, config.model.get("image", {}).get("bn_group") or 1)

    def step(state, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = method.prepare(batch, rng)
        is_frozen = optimizers.frozen(config.optim, state.params)

        def view(params):
            # Stop-gradient lets the compiler drop the whole backward pass of frozen parameters.
            params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, is_frozen)
            return cast_kernels(params, config.optim.grad_dtype)

        marked = mark_frozen(state.extra, is_frozen)
        loss, metrics, features, extra, grads = gradients(state.params, marked, batch, rng, view)
        extra = unmark_frozen(extra)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
            params = method.constrain(optax.apply_updates(state.params, updates))
            # A constraint may move a frozen parameter, such as a scale above its bound.
            params = jax.tree.map(lambda old, new, f: old if f else new, state.params, params, is_frozen)
            new = TrainState(
                step=state.step,
                params=params,
                extra=method.update(params, extra, features, state.step),
                opt_state=opt_state,
                ema=moving_average(state.ema, params, decay) if decay else None,
                bad_steps=jnp.zeros_like(state.bad_steps),
            )
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.replace(bad_steps=state.bad_steps + 1))
            metrics = {
                **metrics,
                "loss": loss,
                "grad_norm": grad_norm,
                "param_norm": optax.tree.norm(new.params),
                "lr": schedule(state.step),
                "bad_steps": new.bad_steps,
            }
        return new.replace(step=state.step + 1), metrics

    return step
