"""UniCL: Yang et al. 2022, "Unified Contrastive Learning in Image-Text-Label Space" (arXiv 2204.03610).

Pictures with captions and pictures with classes in one batch: the text of a class is its name in a template, and all pictures and texts of
one class are positives of each other, in both directions (algorithm 1). A caption is positive with its own picture only: of captions alone
this is CLIP. The authors' training loop is not published; this is the paper's algorithm.

    L = 1/2N sum_i -1/|P(i)| sum_{k in P(i)} log softmax_k(s u_i.v)  +  the same with u and v exchanged        P(i) = {k: y_k = y_i}

Labels: in a data source they go from 0, and the loader gives -1 where there is none; y is one more, 0 for a caption, as in the paper. The
share of either kind in a batch is that of its sources in a mixture, `data.source="CLASSES*1 + CAPTIONS*1"`.

As examples of one class cannot be told apart, the loss has a floor, the mean of log|P(i)|: a metric, as is the share of classes.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from clip_jax.errors import UserError
from clip_jax.losses.contrastive import similarities, soft_infonce
from clip_jax.losses.pairwise import EXCLUDED, Tile, pairwise
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.unicl`. Raises UserError for wrong values.

    Attributes:
      class_templates: the texts of records with a label, fields of the record in braces as in `data.templates`; `{class_name}` is the
        name of the class. Other records have the captions of `data.templates`.
    """

    class_templates: tuple[str, ...] = ("{class_name}",)

    def __post_init__(self):
        if not self.class_templates:
            raise UserError('unicl.class_templates=(): at least one is needed, such as "a photo of a {class_name}."')


def make(config):
    """The UniCL method of a configuration; raises UserError for options or towers that cannot be."""
    options, base = read_options(config, "unicl", Options), clip.make(config)

    def loss(params, extra, features, batch, rng):
        scale = base.scale(params)
        # The one place in which the labels of the data become those of the paper.
        y = batch["label"] + 1 if "label" in batch else jnp.zeros(len(features["image"]), jnp.int32)
        value, metrics = unified_infonce(features["image"], features["text"], scale, y)
        return value, {**metrics, "logit_scale": scale}

    image_view, text_view = base.views
    return dataclasses.replace(
        base, loss=loss, views=(image_view, dataclasses.replace(text_view, class_templates=options.class_templates))
    )


def unified_infonce(z_image, z_text, scale, y):
    """The bidirectional loss of algorithm 1.

    Args:
      z_image, z_text: unit vectors `[B, E]`.
      scale: `exp(logit_scale)`, scalar.
      y: int32 `[B]`; 0 for a caption, from 1 on the class.

    Returns:
      `(loss, metrics)`: a float32 scalar, its floor `loss_floor`, `class_share` of the batch, and `image_to_text_acc` and
      `text_to_image_acc`, the shares of examples whose own pair beats the pairs with all examples that are not positives.
    """
    value, _ = soft_infonce(z_image, z_text, scale, _positive, (), y, y)
    z_image, z_text = (lax.stop_gradient(z.astype(jnp.float32)) for z in (z_image, z_text))
    own, others = jnp.sum(z_image * z_text, axis=1), pairwise(_others, (), (z_image, y), (z_text, y))
    return value, {
        "loss_floor": jnp.log(others.row_sum).mean(),
        "class_share": (y > 0).mean(),
        "image_to_text_acc": (own > others.row_max).mean(),
        "text_to_image_acc": (own > others.col_max).mean(),
    }


def _positive(_, y_image, y_text, i, j):
    """Of one class, or the same example: the same as a fresh label for each caption."""
    return (i == j) | ((y_image[:, None] == y_text) & (y_image[:, None] > 0))


def _others(_, image, text, i, j):
    (z_image, y_image), (z_text, y_text) = image, text
    positive = _positive((), y_image, y_text, i, j)
    similarity = jnp.where(positive, EXCLUDED, similarities(z_image, z_text))
    return Tile(similarity, similarity, row_sum=positive)
