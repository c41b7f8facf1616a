"""The state of training and the step: a pure function ``(state, batch) -> (state, metrics)``."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from clip_jax.training import optimizers


@flax.struct.dataclass
class TrainState:
    """All that training is.

    Attributes:
      step: int32 scalar, the number of steps done; with the seed it gives the next batch and its randomness.
      params: trained parameters, float32.
      extra: the method's state without a gradient.
      opt_state: the optimizer's state.
      ema: moving average of the parameters, or None.
      bad_steps: int32 scalar, the steps in a row up to now whose update was skipped because it was not finite.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    ema: Any
    bad_steps: jax.Array


def make_init(config, method, batch):
    """``(init, tx)``: ``init(rng) -> TrainState``, to be jitted with the shardings of its result, and the optimizer.

    Args:
      config: the configuration.
      method: a :class:`~clip_jax.methods.interface.Method`.
      batch: arrays or shapes of a batch; only a few rows of it are used, and none of its values.
    """
    small = {name: jnp.zeros((2, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    params_shape, _ = jax.eval_shape(method.init, jax.random.key(0), small)
    tx = optimizers.make_optimizer(config.optim, config.train.steps, params_shape)

    def init(rng):
        params, extra = method.init(rng, small)
        ema = params if config.optim.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, extra, tx.init(params), ema, jnp.zeros((), jnp.int32))

    return init, tx


def make_step(config, method, tx):
    """``step(state, batch) -> (state, metrics)``; metrics are float32 scalars.

    A loss or gradient that is not finite leaves everything but ``step`` and ``bad_steps`` as it was.
    """
    schedule = optimizers.make_schedule(config.optim, config.train.steps)
    decay = config.optim.ema_decay

    def step(state, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = method.prepare(batch, rng)
        is_frozen = optimizers.frozen(config.optim, state.params)

        def loss_fn(params):
            # Without a gradient of frozen parameters the compiler leaves their whole backward pass out.
            params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, is_frozen)
            features, extra = method.encode(params, state.extra, batch, rng, train=True)
            loss, metrics = method.loss(params, extra, features, batch, rng)
            return loss, (features, extra, metrics)

        (loss, (features, extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = method.constrain(optax.apply_updates(state.params, updates))
        new = TrainState(
            step=state.step,
            params=params,
            extra=method.update(params, extra, features, state.step),
            opt_state=opt_state,
            ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params) if decay else None,
            bad_steps=jnp.zeros_like(state.bad_steps),
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.replace(bad_steps=state.bad_steps + 1))
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new.params),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "bad_steps": new.bad_steps,
        }
        return new.replace(step=state.step + 1), metrics

    return step
