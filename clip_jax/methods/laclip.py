"""LaCLIP: Fan et al. 2023, "Improving CLIP Training with Language Rewrites" (arXiv 2305.20088).

CLIP with text augmentation: a language model has written M rewrites of each caption in advance
(`clip_jax/tools/rewrite.py`). Each visit of an example draws one of the M + 1 texts, all equally likely. Model, loss
and cost are those of CLIP. The text view makes the draw, so every other method can use rewrites too (`data.rewrites`
and `data.rewrite_prob`).

LaCLIP-MT (`laclip.multi_text`) has all texts of an image in the batch. Let V_j be the embeddings of text j of all
images:

    image to text: the mean over j of CE(s u V_j^T): each text competes with text j of the other images
    text to image: CE(s v u^T) of one drawn text v of each image, or the mean over all j

The code of LaCLIP-MT is not released; this follows what secondary descriptions say of the paper. Unlike the plain form,
which draws from the texts that exist, LaCLIP-MT has M + 1 texts of every image. The caption replaces a missing rewrite.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clip_jax.data.views import RewritesView
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import contrast, views_infonce
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options, text_view
from clip_jax.models.common import fold_in_ids, shard_batch, stack_views, unstack_views
from clip_jax.models.two_tower import TwoTower

TEXT_TO_IMAGE = ("sampled", "all")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.laclip`. Raises UserError for invalid values.

    Attributes:
      multi_text: True selects LaCLIP-MT.
      mt_rewrites: M, the number of rewrites of each caption in LaCLIP-MT.
      mt_t2i: the texts in the loss of text to image: one that is drawn (`sampled`) or `all`.
    """

    multi_text: bool = False
    mt_rewrites: int = 4
    mt_t2i: str = "sampled"

    def __post_init__(self):
        if self.mt_rewrites < 0:
            raise UserError(f"laclip.mt_rewrites={self.mt_rewrites}: must be at least 0")
        if self.mt_t2i not in TEXT_TO_IMAGE:
            raise UserError(f"laclip.mt_t2i={self.mt_t2i!r}: allowed are {', '.join(TEXT_TO_IMAGE)}")


def make(config):
    """Returns the LaCLIP method of a configuration.

    Raises UserError for invalid options or towers and when `data.rewrites` is empty.
    """
    options, base = read_options(config, "laclip", Options), clip.make(config)
    if not config.data.rewrites:
        raise UserError(
            "data.rewrites=(): method='laclip' needs the field that holds the rewrites, such as data.rewrites=rewrites"
        )
    return multi_text(config, options, base) if options.multi_text else base


def multi_text(config, options, base):
    """Returns LaCLIP-MT on top of the method `base`.

    `batch["text"]` holds each caption and its rewrites, int32 `[b, 1 + M, n]`.
    """
    towers = TwoTower(config.model)

    def init(rng, batch):
        return base.init(rng, batch | {"text": batch["text"][:, 0]})

    def encode(params, extra, batch, rng, train):
        """Returns `image` float32 `[b, E]`, `text` float32 `[b, 1 + M, E]` and `drawn` int32 `[b]`, a text's index."""
        texts = shard_batch(batch["text"])
        b, count = texts.shape[:2]
        keys = jax.vmap(lambda key: jax.random.split(key, 2 + count))(fold_in_ids(rng, batch["example_id"]))
        image, _, extra = towers.encode_image(params, extra, batch["image"], train, keys[:, 0])
        ids, text_keys = stack_views([*jnp.moveaxis(texts, 1, 0)], keys[:, 2:])
        text, _, extra = towers.encode_text(params, extra, ids, train, text_keys)
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys[:, 1])
        return {"image": image, "text": unstack_views(text, b), "drawn": drawn}, extra

    def loss(params, extra, features, batch, rng):
        scale = base.scale(params)
        value, metrics = multi_text_infonce(
            features["image"], features["text"], features["drawn"], scale, options.mt_t2i
        )
        return value, {**metrics, "logit_scale": scale}

    view = text_view(config, kind=RewritesView, count=options.mt_rewrites)
    return dataclasses.replace(base, views=(base.views[0], view), init=init, encode=encode, loss=loss)


def multi_text_infonce(image, texts, drawn, scale, text_to_image="sampled"):
    """Returns LaCLIP-MT's loss.

    Args:
      image: unit vectors `[B, E]`.
      texts: unit vectors `[B, V, E]`, V texts of each image, in the same order for all images.
      drawn: int32 `[B]`, the index of the text that `sampled` uses from text to image.
      scale: scalar.
      text_to_image: `sampled` or `all`.

    Returns:
      `(loss, metrics)` like `infonce`. The accuracy of image to text is that of the first text.
    """
    numbers = [*jnp.moveaxis(texts, 1, 0)]
    losses, metrics = views_infonce([image], numbers, scale, both=text_to_image == "all")
    value = sum(losses) / len(losses)
    if text_to_image == "all":
        return value, metrics
    text = jnp.take_along_axis(texts, drawn[:, None, None], axis=1)[:, 0]
    found, accuracy = contrast(text, image, scale)
    return (value + found) / 2, {**metrics, "text_to_image_acc": accuracy}
