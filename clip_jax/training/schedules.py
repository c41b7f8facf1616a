"""Learning-rate schedules: a warm-up, a decay and a cool-down."""

import jax.numpy as jnp


def make_schedule(optim, steps):
    """Returns `step -> learning rate`; the first step has the number 0.

    The fields of the section `config.optim` give the formulas of the released codes:

    - Warm-up: `lr * (step + 1) / warmup_steps` (open_clip); with `warmup_from` of at least 0,
      `warmup_from + (lr - warmup_from) * step / warmup_steps` (big_vision, timm, Sense-GVT/DeCLIP).
    - Decay, by the share p of the steps after the warm-up: cosine `end + (lr - end) * (1 + cos(pi * p)) / 2` and linear
      `end + (lr - end) * (1 - p)` with `end = lr_end * lr`; rsqrt `lr / sqrt(1 + (step - warmup_steps) / timescale)`
      (big_vision; with `timescale = warmup_steps` that of Vaswani et al. 2017, section 5.3).
    - onecycle (`OneCycleLR` of PyTorch): from `lr / 25` along half a cosine to the peak at the last step of the
      warm-up, and along another one to `lr / 250,000` at the last step.
    - `decay_from_start`: p is the share of all steps, so that the rate jumps at the end of the warm-up (timm's
      `CosineLRScheduler`, UniCL).
    - `lr_hold_steps`: the decay sees the last step that is divisible by it, such as the first step of an epoch.
    - Cool-down: a factor `(steps - step) / cooldown_steps` in the last `cooldown_steps` steps (big_vision).

    Args:
      optim: the section; see `clip_jax.config.base`.
      steps: the number of training steps.
    """
    lr, warmup = optim.lr, optim.warmup_steps
    end = optim.lr_end * lr
    timescale = optim.timescale or max(warmup, 1)

    def decayed(step):
        after = jnp.maximum(step // optim.lr_hold_steps * optim.lr_hold_steps if optim.lr_hold_steps else step, warmup)
        start = 0 if optim.decay_from_start else warmup
        share = jnp.minimum((after - start) / max(steps - start, 1), 1.0)
        return {
            "cosine": lambda: end + (lr - end) * 0.5 * (1 + jnp.cos(jnp.pi * share)),
            "linear": lambda: end + (lr - end) * (1 - share),
            "constant": lambda: lr,
            "rsqrt": lambda: lr / jnp.sqrt(1 + (after - warmup) / timescale),
        }[optim.schedule]()

    def rate(step):
        if optim.schedule == "onecycle":
            return jnp.asarray(_cycle(step, warmup, steps, lr / 25, lr, lr / 250_000), jnp.float32)
        found = decayed(step)
        if warmup and optim.warmup_from >= 0:
            found = jnp.where(step < warmup, optim.warmup_from + (lr - optim.warmup_from) * step / warmup, found)
        elif warmup:  # a first step with a rate of 0 would be wasted
            found = jnp.where(step < warmup, lr * (step + 1) / warmup, found)
        if optim.cooldown_steps:
            found = found * jnp.minimum(1.0, (steps - step) / optim.cooldown_steps)
        return jnp.asarray(found, jnp.float32)

    return rate


def make_momentum_schedule(optim, steps):
    """Returns `step -> b1`: constant, or with `b1_cycle` from its first value to its second one and back.

    `OneCycleLR` of PyTorch moves it so, against the learning rate.
    """
    if not optim.b1_cycle:
        return lambda step: optim.b1
    high, low = optim.b1_cycle
    return lambda step: _cycle(step, optim.warmup_steps, steps, high, low, high)


def _cycle(step, warmup, steps, first, peak, last):
    """Half a cosine from `first` to `peak` at the step `warmup - 1`, and another one to `last` at `steps - 1`."""

    def between(start, end, share):
        return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0)))

    top = max(warmup - 1, 0)
    rising, falling = step / max(top, 1), (step - top) / max(steps - 1 - top, 1)
    return jnp.where(step < top, between(first, peak, rising), between(peak, last, falling))
