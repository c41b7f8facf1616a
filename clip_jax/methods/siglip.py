"""SigLIP: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".

CLIP's two towers under another loss: every pair of the global batch is a binary decision of its own (equation 1), with a learned
bias beside the learned temperature (section 3.2). The logit scale holds the logarithm; as in big_vision it is not clamped. The
paper starts it at ln 10 and the bias at -10, as nearly all of the B * B pairs are negatives. Locked-image tuning (SigLiT) is this
method with `optim.freeze=("^img/",)`.
"""

import jax.numpy as jnp

from clip_jax.losses.contrastive import sigmoid
from clip_jax.methods.interface import two_tower_method


def make(config):
    """The SigLIP method of a configuration; raises UserError for towers that cannot be built."""

    def loss(params, extra, features, batch, rng):
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        value, metrics = sigmoid(features["image"], features["text"], scale, bias)
        return value, {**metrics, "logit_scale": scale, "logit_bias": bias}

    return two_tower_method(config, ("logit_scale", "logit_bias"), loss)
