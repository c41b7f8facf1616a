"""Checks of the section `config.optim`: ranges, options that contradict each other, options without effect."""

import math

from clip_jax.errors import UserError, unknown

OPTIMIZERS = ("adamw", "lamb", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "rsqrt", "constant", "onecycle")
_DECAYS = ("cosine", "linear")
_ADAMS = ("adamw", "lamb")
#: Options of some optimizers or schedules: the field that decides, its values under which the option has an effect, and
#: the value that leaves the option out.
OPTIONS = {
    "lr_end": ("schedule", _DECAYS, 0.0),
    "decay_from_start": ("schedule", _DECAYS, False),
    "lr_hold_steps": ("schedule", (*_DECAYS, "rsqrt"), 0),
    "timescale": ("schedule", ("rsqrt",), 0),
    "cooldown_steps": ("schedule", (*_DECAYS, "rsqrt", "constant"), 0),
    "warmup_from": ("schedule", (*_DECAYS, "rsqrt", "constant"), -1.0),
    "b1_cycle": ("name", _ADAMS, ()),
    "lamb_adapt_all": ("name", ("lamb",), False),
    "lamb_max_norm": ("name", ("lamb",), 0.0),
    "lamb_bias_correction": ("name", ("lamb",), True),
    "lamb_fuse_qkv": ("name", ("lamb",), False),
}


def check(optim, steps):
    """Checks the values that `clip_jax.training.optimizers` takes as they are.

    Args:
      optim: the section `config.optim`.
      steps: the number of training steps.

    Raises UserError for the first wrong value.
    """
    for field, allowed in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if optim[field] not in allowed:
            raise unknown(f"optim.{field}", optim[field], allowed)
    numbers = "lr weight_decay grad_clip_norm eps lamb_max_norm warmup_steps lr_hold_steps timescale cooldown_steps"
    for field in numbers.split():
        if not 0 <= optim[field] < math.inf:  # also for NaN
            raise UserError(f"optim.{field}={optim[field]}: must be a finite number, at least 0")
    for field in ("b1", "b2", "ema_decay"):
        if not 0 <= optim[field] < 1:
            raise UserError(f"optim.{field}={optim[field]}: must be at least 0 and below 1")
    if not 0 <= optim.lr_end <= 1:
        raise UserError(f"optim.lr_end={optim.lr_end}: must be between 0 and 1, a share of optim.lr")
    if not (0 <= optim.warmup_from < math.inf or optim.warmup_from == -1):
        raise UserError(f"optim.warmup_from={optim.warmup_from}: must be a finite rate, at least 0, or -1")
    for field in ("warmup_steps", "cooldown_steps"):
        if optim[field] > steps:
            raise UserError(f"optim.{field}={optim[field]} is more than train.steps={steps}")
    cycle = optim.b1_cycle
    if cycle and not (len(cycle) == 2 and all(isinstance(x, float) and 0 <= x < 1 for x in cycle)):
        raise UserError(f"optim.b1_cycle={cycle}: give two numbers, at least 0 and below 1, or ()")
    for entry in optim.lr_mult:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], int | float)):
            raise UserError(f"optim.lr_mult: {entry!r} is invalid; the field holds pairs (regular expression, factor)")
        if not 0 <= entry[1] < math.inf:
            raise UserError(f"optim.lr_mult: {entry!r}: a factor must be a finite number, at least 0")
    for field, (chooser, values, neutral) in OPTIONS.items():
        if optim[field] != neutral and optim[chooser] not in values:
            raise UserError(
                f"optim.{field}={optim[field]} has no effect with optim.{chooser}={optim[chooser]!r}, only with"
                f" {', '.join(values)}: set it to {neutral}"
            )
