"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".

Two towers, a linear projection of each into one space, and InfoNCE over the global batch in both directions with a
learned temperature (figure 3). `logit_scale` is the logarithm of the scale. It starts at ln(1/0.07) and is clamped to
[0, ln 100] after each step, as in open_clip. The paper clips it so that no logit is scaled by more than 100.
"""

import jax.numpy as jnp

from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import exp_logit_scale, two_tower_method


def make(config):
    """Returns the CLIP method of a configuration; raises UserError for invalid towers."""

    def loss(params, extra, features, batch, rng):
        scale = exp_logit_scale(params)
        value, metrics = infonce(features["image"], features["text"], scale)
        return value, {**metrics, "logit_scale": scale}

    def constrain(params):
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, config.model.logit_scale_max)}

    return two_tower_method(config, ("logit_scale",), loss, scale=exp_logit_scale, constrain=constrain)
