"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".

Two towers, linear projections into one space, InfoNCE over the global batch in both directions with a learned temperature
(figure 3 of the paper). The logit scale holds the logarithm, starts at ln(1/0.07) and is clamped to [0, ln 100] after each
step, as in open_clip; the paper clips so that logits are not scaled by more than 100.
"""

import jax.numpy as jnp

from clip_jax.data.views import ImageView, TextView
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import Method
from clip_jax.models.two_tower import TwoTower


def make(config):
    """The CLIP method of a configuration; raises UserError for towers that cannot be built."""
    model, towers = config.model, TwoTower(config.model)

    def init(rng, batch):
        params, extra = towers.init(rng, batch)
        return {**params, "logit_scale": jnp.asarray(model.logit_scale_init, jnp.float32)}, extra

    def loss(params, extra, features, batch, rng):
        scale = jnp.exp(params["logit_scale"])
        value, metrics = infonce(features["image"], features["text"], scale)
        return value, {**metrics, "logit_scale": scale}

    def constrain(params):
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, model.logit_scale_max)}

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
        constrain=constrain,
    )
