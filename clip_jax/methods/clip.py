"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".

Two towers, linear projections into one space, InfoNCE over the global batch in both directions with a learned temperature
(figure 3 of the paper). The logit scale holds the logarithm, starts at ln(1/0.07) and is clamped to [0, ln 100] after each
step, as in open_clip; the paper clips so that logits are not scaled by more than 100.
"""

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.data.views import ImageView, TextView
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import Method
from clip_jax.models.common import l2_normalize, shard_batch
from clip_jax.models.towers import image_tower, text_tower


def make(config):
    """The CLIP method of a configuration; raises UserError for towers that cannot be built."""
    model = config.model
    image_model, text_model = image_tower(model), text_tower(model)
    mean, std = (np.asarray(x, np.float32) * 255 for x in (model.image_mean, model.image_std))

    def encode_image(params, images, **kwargs):
        images = (shard_batch(images).astype(jnp.float32) - mean) / std
        return l2_normalize(image_model.apply({"params": params["img"]}, images, **kwargs)[0])

    def encode_text(params, ids, **kwargs):
        return l2_normalize(text_model.apply({"params": params["txt"]}, shard_batch(ids), **kwargs)[0])

    def init(rng, batch):
        rng_image, rng_text = jax.random.split(rng)
        params = {
            "img": image_model.init(rng_image, batch["image"].astype(jnp.float32))["params"],
            "txt": text_model.init(rng_text, batch["text"])["params"],
            "logit_scale": jnp.asarray(model.logit_scale_init, jnp.float32),
        }
        return params, {}

    def encode(params, extra, batch, rng, train):
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(batch["example_id"])
        features = {
            "image": encode_image(params, batch["image"], train=train, keys=keys),
            "text": encode_text(params, batch["text"], train=train),
        }
        return features, extra

    def loss(params, extra, features, batch, rng):
        scale = jnp.exp(params["logit_scale"])
        value, metrics = infonce(features["image"], features["text"], scale)
        return value, {**metrics, "logit_scale": scale}

    def constrain(params):
        return {**params, "logit_scale": jnp.clip(params["logit_scale"], 0.0, model.logit_scale_max)}

    return Method(
        views=(
            ImageView("image", model.image.size, tuple(config.data.augment)),
            TextView("text", model.text.context, tuple(config.data.templates), config.data.word_dropout),
        ),
        eval_view=ImageView("image", model.image.size, tuple(config.eval.transform)),
        init=init,
        encode=encode,
        loss=loss,
        embed_image=lambda params, extra, images: encode_image(params, images),
        embed_text=lambda params, extra, ids: encode_text(params, ids),
        constrain=constrain,
    )
