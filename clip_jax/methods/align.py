"""ALIGN: Jia et al. 2021, "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision".

CLIP's loss on noisy alt-texts with an EfficientNet and BERT (section 4.2). The loss is the sum of both directions
(equations 1 and 2) with label smoothing 0.1. The temperature divides the cosines. It starts at 1 and is itself the
parameter, not its logarithm (coyo-align).

Assumption: after each step the temperature is raised to at least 0.001. The published code has no floor, and a step
through 0 would reverse the loss.
"""

import jax.numpy as jnp

from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import two_tower_method

SMOOTHING = 0.1
LOWEST_TEMPERATURE = 1e-3


def make(config):
    """Returns the ALIGN method of a configuration; raises UserError for invalid towers."""

    def loss(params, extra, features, batch, rng):
        value, metrics = infonce(features["image"], features["text"], scale(params), SMOOTHING)
        return 2 * value, {**metrics, "logit_scale": scale(params)}

    def constrain(params):
        return {**params, "temperature": jnp.maximum(params["temperature"], LOWEST_TEMPERATURE)}

    return two_tower_method(config, ("temperature",), loss, scale=scale, constrain=constrain)


def scale(params):
    """Returns the factor of the similarities, one over the temperature."""
    return 1 / params["temperature"]
