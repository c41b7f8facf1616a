"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".

Two towers, linear projections into one space, InfoNCE over the global batch in both directions with a learned temperature
(figure 3 of the paper). The logit scale holds the logarithm, starts at ln(1/0.07) and is clamped to [0, ln 100] after each
step, as in open_clip; the paper clips so that logits are not scaled by more than 100.
"""

import jax.numpy as jnp

from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import two_tower_method


def make(config):
    """The CLIP method of a configuration; raises UserError for towers that cannot be built."""

    def loss(params, extra, features, batch, rng):
        scale = jnp.exp(params["logit_scale"])
        value, metrics = infonce(features["image"], features["text"], scale)
        return value, {**metrics, "logit_scale": scale}

    def constrain(params):
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, config.model.logit_scale_max)}

    return two_tower_method(config, ("logit_scale",), loss, constrain=constrain)
