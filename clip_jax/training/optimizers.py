"""Optimizers.

Regular expressions on parameter paths choose what is decayed, frozen, or trained at another rate.
"""

import collections
import re

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import UserError
from clip_jax.models.transformer import STACKED
from clip_jax.runtime.sharding import path_name
from clip_jax.training.schedules import make_momentum_schedule, make_schedule


def _matches(patterns, params):
    """A pytree of bool: whether one of the patterns matches the parameter's path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(p, path_name(path)) for p in patterns), params
    )


def frozen(optim, params):
    """Returns a pytree of bool like `params`: True where `optim.freeze` matches or `optim.lr_mult` gives 0."""
    by_factor = jax.tree.map(lambda factor: factor == 0, _factors(optim, params))
    return jax.tree.map(lambda a, b: a or b, _matches(optim.freeze, params), by_factor)


def _factors(optim, params):
    def factor(path, _):
        return next((float(f) for pattern, f in optim.lr_mult if re.search(pattern, path_name(path))), 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def _is_masked(update):
    """Whether a frozen parameter has this in the place of an update."""
    return isinstance(update, optax.MaskedNode)


def _map_updates(function, updates, *trees):
    """Maps `function` over the updates of all parameters that are not frozen."""
    return jax.tree.map(lambda u, *x: u if _is_masked(u) else function(u, *x), updates, *trees, is_leaf=_is_masked)


def _scale_by_factors(factors):
    """Multiplies each update by its factor."""
    return optax.stateless(lambda updates, _: _map_updates(lambda update, factor: update * factor, updates, factors))


def _adam(optim, steps):
    """Adam's direction (Kingma & Ba 2015), with the state of `optax.scale_by_adam`.

    Its bias correction counts the updates that were applied, as the moments hold no others.
    """
    if not optim.b1_cycle and optim.lamb_bias_correction:
        return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
    momentum = make_momentum_schedule(optim, steps)

    def update(updates, state, params=None, *, step=None, **_):
        count = optax.safe_increment(state.count)
        b1 = momentum(state.count if step is None else step)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, optim.b2, 2)
        first, second = mu, nu
        if optim.name != "lamb" or optim.lamb_bias_correction:
            first, second = (optax.tree.bias_correction(m, b, count) for m, b in ((mu, b1), (nu, optim.b2)))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + optim.eps), first, second)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def _scale_by_trust_ratio(optim, params):
    """LAMB's trust ratio, norm of the parameter over norm of its update (You et al. 2020, algorithm 2).

    It is 1 where a norm is 0, and for the parameters that `lamb_adapt_all` leaves out. Each layer of a stack has its
    own ratio.
    """
    stacked, left_out = _matches((STACKED,), params), _matches(() if optim.lamb_adapt_all else optim.no_decay, params)

    def squares(x, is_stacked):
        x = jnp.square(x.astype(jnp.float32))
        return x.sum(tuple(range(1, x.ndim)), keepdims=True) if is_stacked else x.sum()

    def group(path):
        name = path_name(path)
        return re.sub("/(query|key|value)/", "/qkv/", name) if optim.lamb_fuse_qkv else name

    def update(updates, params):
        def norms(tree):
            sums = collections.defaultdict(list)
            flat = jax.tree_util.tree_leaves_with_path(_map_updates(squares, tree, stacked))
            for path, value in flat:
                sums[group(path)].append(value.reshape(-1))
            return {name: jnp.sqrt(sum(values)) for name, values in sums.items()}

        update_norms = norms(updates)
        param_norms = norms(_map_updates(lambda _, param: param, updates, params))

        def scale(path, update, is_left_out):
            if is_left_out or _is_masked(update):
                return update
            old, new = param_norms[group(path)], update_norms[group(path)]
            if optim.lamb_max_norm:
                old = jnp.minimum(old, optim.lamb_max_norm)
            ratio = jnp.where((old > 0) & (new > 0), old / jnp.where(new > 0, new, 1.0), 1.0)
            return update * ratio.reshape((-1, *(1,) * update.ndim)[: update.ndim])  # one, or one a layer

        return jax.tree_util.tree_map_with_path(scale, updates, left_out, is_leaf=_is_masked)

    return optax.stateless(update)


def _scale_by_rate(schedule):
    """Multiplies updates by the negative learning rate of `step`, an argument of `update`.

    The number of steps drives the schedule, and not that of updates, which is smaller when steps were skipped. The
    state is that of `optax.scale_by_learning_rate`; its count is used without the argument.
    """

    def update(updates, state, params=None, *, step=None, **_):
        rate = -schedule(state.count if step is None else step)
        return jax.tree.map(lambda u: rate * u, updates), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(lambda _: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def make_optimizer(optim, steps, params):
    """Returns the gradient transformation of the section `config.optim`.

    Its parts, in order: clipping by the global gradient norm, the optimizer's direction, decoupled weight decay, LAMB's
    trust ratio, the factor of `lr_mult`, the learning rate. `update` takes the number of the step as `step`.

    Args:
      optim: the section; see `clip_jax.config.base`.
      steps: the number of training steps.
      params: parameters or their shapes.

    Raises UserError when a pattern of `freeze` or `lr_mult` matches no parameter, or when every parameter is frozen.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for field, patterns in (("freeze", optim.freeze), ("lr_mult", [pattern for pattern, _ in optim.lr_mult])):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise UserError(
                    f"optim.{field}: {pattern!r} matches no parameter; paths look like {paths[0]!r}, {paths[-1]!r}"
                )
    no_decay = _matches(optim.no_decay, params)
    decay = (
        optax.add_decayed_weights(optim.weight_decay, jax.tree.map(lambda x: not x, no_decay))
        if optim.weight_decay
        else optax.identity()
    )
    direction = {
        "adamw": lambda: [_adam(optim, steps), decay],
        "lamb": lambda: [_adam(optim, steps), decay, _scale_by_trust_ratio(optim, params)],
        "adafactor": lambda: [scale_by_adafactor(momentum=optim.b1), decay],
        "sgd": lambda: [optax.trace(optim.b1), decay],
    }[optim.name]()
    chain = [optax.clip_by_global_norm(optim.grad_clip_norm)] if optim.grad_clip_norm else []
    chain += direction
    if optim.lr_mult:
        chain.append(_scale_by_factors(_factors(optim, params)))
    chain.append(_scale_by_rate(make_schedule(optim, steps)))
    tx = optax.chain(*chain)
    is_frozen = frozen(optim, params)
    if all(jax.tree.leaves(is_frozen)):
        raise UserError(f"optim.freeze={optim.freeze} and optim.lr_mult={optim.lr_mult} leave no parameter to train")
    if any(jax.tree.leaves(is_frozen)):
        tx = optax.partition(
            {"train": tx, "freeze": optax.set_to_zero()}, jax.tree.map(lambda f: "freeze" if f else "train", is_frozen)
        )
    return tx


def scale_by_adafactor(min_dim_size_to_factor=32, decay_rate=0.8, beta2_cap=0.999, momentum=0.9, eps=1e-30):
    """Returns Adafactor's direction as in big_vision (Zhai et al. 2022, "Scaling Vision Transformers", appendix).

    Second moments are factored, updates are not clipped, and the first moment is bfloat16.

    Args:
      min_dim_size_to_factor: matrices with a smaller dimension keep a full second moment.
      decay_rate: the exponent of the decay of the second moment, `1 - step ** -decay_rate`.
      beta2_cap: the upper limit of that decay.
      momentum: the decay of the first moment; None or 0 turns it off.
      eps: added to squared gradients.
    """

    def decay(step, exponent):
        return jnp.minimum(beta2_cap, 1.0 - jnp.asarray(step + 1, jnp.float32) ** -exponent)

    second = optax.scale_by_factored_rms(
        decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps, decay_rate_fn=decay
    )
    return optax.chain(
        second, optax.ema(momentum, debias=False, accumulator_dtype=jnp.bfloat16) if momentum else optax.identity()
    )
