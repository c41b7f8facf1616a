"""SigLIP: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".

CLIP's two towers with a pairwise sigmoid loss: every pair of the global batch is an independent binary decision
(equation 1), with a learned bias in addition to the learned temperature (section 3.2). The parameter `logit_scale` is
the logarithm of the scale and is not clamped, as in big_vision. It starts at ln 10 and the bias at -10, as in the
paper, because nearly all of the B * B pairs are negatives. Locked-image tuning (SigLiT) is this method with
`optim.freeze=("^img/",)`.
"""

from clip_jax.losses.contrastive import sigmoid
from clip_jax.methods.interface import exp_logit_scale, two_tower_method


def make(config):
    """Returns the SigLIP method of a configuration; raises UserError for invalid towers."""

    def loss(params, extra, features, batch, rng):
        bias = params["logit_bias"]
        value, metrics = sigmoid(features["image"], features["text"], exp_logit_scale(params), bias)
        return value, {**metrics, "logit_scale": exp_logit_scale(params), "logit_bias": bias}

    return two_tower_method(config, ("logit_scale", "logit_bias"), loss, scale=exp_logit_scale)
