"""CLIPPO: Tschannen et al. 2023, "CLIPPO: Image-and-Language Understanding from Pixels Only".

One vision transformer encodes both inputs. The font renderer (`clip_jax/data/tokenizers/font.py`), used instead of a
tokenizer, draws captions as images, which share the encoder of the images with its patch embedding, position
embeddings, pooling and projection. The loss is InfoNCE over the global batch, the mean of both directions. In a mixture
of data such as `"pairs.jsonl*3 + text:c4.jsonl*1"`, a quarter of each batch are pairs of consecutive sentences. Both
sentences are drawn, the loss is the same, and all pairs of the batch are each other's negatives (section 3.2 of the
paper).

The parameter `logit_scale` is the logarithm of the scale. As in big_vision it has no bound unless
`model.logit_scale_max` sets one. big_vision divides embeddings by their norm plus 1e-8, this module by the norm: in
float32 the results are equal for any norm above 0.1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.data.views import ImageOrTextView, ImageView, RenderView
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import Method, exp_logit_scale, text_view
from clip_jax.models.common import FROZEN, fold_in_ids, l2_normalize, shard_batch
from clip_jax.models.towers import image_tower, unprojected


def make(config):
    """Returns the CLIPPO method of a configuration.

    Raises UserError for an invalid tower or image size and for a section `model.text`.
    """
    model, size = config.model, config.model.image.size
    if "text" in model:
        raise UserError(
            "method='clippo' has one tower for images and texts, but the configuration has a section model.text"
        )
    if size < 32 or size % 16:
        raise UserError(
            f"model.image.size={size}: method='clippo' draws texts in rows of 16 pixels: allowed are 32, 48, 64, ..."
        )
    tower = image_tower(model)
    mean, std = (np.asarray(x, np.float32) * 255 for x in (model.image_mean, model.image_std))

    def pooled(tower, params, images, **kwargs):
        images = (shard_batch(images).astype(jnp.float32) - mean) / std  # broadcasts the single channel of a drawn text
        return tower.apply({"params": params["img"]}, images, **kwargs)[0]

    def apply(params, images, **kwargs):
        return l2_normalize(pooled(tower, params, images, **kwargs))

    def init(rng, batch):
        params = {
            "img": tower.init(rng, batch["image"].astype(jnp.float32))["params"],
            "logit_scale": jnp.asarray(model.logit_scale_init, jnp.float32),
        }
        return params, {}

    def encode(params, extra, batch, rng, train):
        train = train and "img" not in extra.get(FROZEN, {})
        # One pass encodes both. The two images of an example are adjacent, so that every device keeps its own rows.
        images = jnp.stack([batch["image"], jnp.broadcast_to(batch["text"], batch["image"].shape)], axis=1)
        keys = jax.vmap(lambda key: jax.random.split(key))(fold_in_ids(rng, batch["example_id"])).reshape(-1)
        z = apply(params, images.reshape(-1, *images.shape[2:]), train=train, keys=keys).reshape(len(images), 2, -1)
        return {"image": z[:, 0], "text": z[:, 1]}, extra

    def loss(params, extra, features, batch, rng):
        is_pair = batch["text_pair"] == 1 if "text_pair" in batch else None
        kinds = None if is_pair is None else {"image_text": ~is_pair, "text_text": is_pair}
        value, metrics = infonce(features["image"], features["text"], exp_logit_scale(params), kinds=kinds)
        return value, {**metrics, "logit_scale": exp_logit_scale(params)}

    return Method(
        views=(
            ImageOrTextView("image", size, tuple(config.data.augment)),
            text_view(config, kind=RenderView, context=size),
        ),
        eval_view=ImageView("image", size, tuple(config.eval.transform)),
        init=init,
        encode=encode,
        loss=loss,
        embed_image=lambda params, extra, images: apply(params, images),
        embed_text=lambda params, extra, texts: apply(params, texts),
        image_features=lambda params, extra, images: pooled(unprojected(tower), params, images),
        scale=exp_logit_scale,
        constrain=lambda params: {**params, "logit_scale": jnp.minimum(params["logit_scale"], model.logit_scale_max)},
    )
