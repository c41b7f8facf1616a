"""ALIGN: Jia et al. 2021, "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision".

CLIP's loss on noisy alt-texts with an EfficientNet and BERT (section 4.2): the sum of both directions (equations 1 and 2), with
label smoothing 0.1 and a temperature that is learned as it is, a divisor of the cosines, not as a logarithm (coyo-align). It
starts at 1.

Assumption: after each step the temperature is kept at 0.001 at least; the published code has no floor, and a step through 0
would turn the loss around.
"""

import jax.numpy as jnp

from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import two_tower_method

SMOOTHING = 0.1
LOWEST_TEMPERATURE = 1e-3


def make(config):
    """The ALIGN method of a configuration; raises UserError for towers that cannot be built."""

    def loss(params, extra, features, batch, rng):
        scale = 1 / params["temperature"]
        value, metrics = infonce(features["image"], features["text"], scale, SMOOTHING)
        return 2 * value, {**metrics, "logit_scale": scale}

    def constrain(params):
        return {**params, "temperature": jnp.maximum(params["temperature"], LOWEST_TEMPERATURE)}

    return two_tower_method(config, ("temperature",), loss, constrain=constrain)
