"""SigLIP: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".

CLIP's two towers under another loss: every pair of the global batch is a binary decision of its own (equation 1), with a learned
bias beside the learned temperature (section 3.2). The logit scale holds the logarithm; as in big_vision it is not clamped. The
paper starts it at ln 10 and the bias at -10, as nearly all of the B * B pairs are negatives. Locked-image tuning (SigLiT) is this
method with ``optim.freeze=("^img/",)``.
"""

import jax.numpy as jnp

from clip_jax.data.views import ImageView, TextView
from clip_jax.losses.contrastive import sigmoid
from clip_jax.methods.interface import Method
from clip_jax.models.two_tower import TwoTower


def make(config):
    """The SigLIP method of a configuration; raises UserError for towers that cannot be built."""
    model, towers = config.model, TwoTower(config.model)

    def init(rng, batch):
        params, extra = towers.init(rng, batch)
        scalars = {name: jnp.asarray(model[f"{name}_init"], jnp.float32) for name in ("logit_scale", "logit_bias")}
        return params | scalars, extra

    def loss(params, extra, features, batch, rng):
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        value, metrics = sigmoid(features["image"], features["text"], scale, bias)
        return value, {**metrics, "logit_scale": scale, "logit_bias": bias}

    return Method(
        views=(
            ImageView("image", model.image.size, config.data.augment),
            TextView("text", model.text.context, config.data.templates, config.data.word_dropout),
        ),
        eval_view=ImageView("image", model.image.size, config.eval.transform),
        init=init,
        encode=towers.encode,
        loss=loss,
        embed_image=towers.embed_image,
        embed_text=towers.embed_text,
    )
