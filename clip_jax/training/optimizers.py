"""Optimizers and learning-rate schedules.

Regular expressions on parameter paths choose what is decayed, frozen, or trained at another rate.
"""

import re

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import UserError
from clip_jax.models.transformer import STACKED
from clip_jax.runtime.sharding import path_name


def make_schedule(optim, steps):
    """Returns `step -> learning rate`: linear warm-up to `optim.lr`, then `optim.schedule` until `steps`."""
    lr, warmup = optim.lr, optim.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(lr, rest),
        "linear": optax.linear_schedule(lr, 0.0, rest),
        "constant": optax.constant_schedule(lr),
        # lr * sqrt(warmup / step) after the warm-up, continuous with it (Vaswani et al. 2017, section 5.3).
        "rsqrt": lambda step: lr * jnp.sqrt(max(warmup, 1) / (step + max(warmup, 1))),
    }[optim.schedule]
    # The warm-up starts at lr / warmup, because a first step with a rate of 0 would be wasted.
    return optax.join_schedules([lambda step: lr * (step + 1) / warmup, after], [warmup]) if warmup else after


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


def _map_updates(function, updates, *trees):
    """Maps `function` over the updates. A frozen parameter has a MaskedNode instead of an update and keeps it."""

    def is_masked(update):
        return isinstance(update, optax.MaskedNode)

    return jax.tree.map(lambda u, *x: u if is_masked(u) else function(u, *x), updates, *trees, is_leaf=is_masked)


def _scale_by_factors(factors):
    """Multiplies each update by its factor."""
    return optax.stateless(lambda updates, _: _map_updates(lambda update, factor: update * factor, updates, factors))


def _scale_by_trust_ratio(params):
    """LAMB's trust ratio (You et al. 2020, algorithm 2). Each layer of a stack has its own."""
    ratio, stacked = optax.scale_by_trust_ratio(), _matches((STACKED,), params)

    def scale(update, param, is_stacked):
        def one(update, param):
            return ratio.update(update, optax.EmptyState(), param)[0]

        return (jax.vmap(one) if is_stacked else one)(update, param)

    return optax.stateless(lambda updates, params: _map_updates(scale, updates, params, stacked))


def make_optimizer(optim, steps, params):
    """Returns the gradient transformation of the section `config.optim`.

    Its parts, in order: clipping by the global gradient norm, the optimizer's direction, decoupled weight decay, LAMB's
    trust ratio, the factor of `lr_mult`, the learning rate.

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
        "adamw": lambda: [optax.scale_by_adam(optim.b1, optim.b2, optim.eps), decay],
        "lamb": lambda: [optax.scale_by_adam(optim.b1, optim.b2, optim.eps), decay, _scale_by_trust_ratio(params)],
        "adafactor": lambda: [scale_by_adafactor(momentum=optim.b1), decay],
        "sgd": lambda: [optax.trace(optim.b1), decay],
    }[optim.name]()
    chain = [optax.clip_by_global_norm(optim.grad_clip_norm)] if optim.grad_clip_norm else []
    chain += direction
    if optim.lr_mult:
        chain.append(_scale_by_factors(_factors(optim, params)))
    chain.append(optax.scale_by_learning_rate(make_schedule(optim, steps)))
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
