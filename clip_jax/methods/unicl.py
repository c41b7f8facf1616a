"""UniCL: Yang et al. 2022, "Unified Contrastive Learning in Image-Text-Label Space" (arXiv 2204.03610).

A batch mixes images that have captions with images that have class labels. The text of a class is its name in a
template. All images and texts of one class are positives of each other, in both directions (algorithm 1). A caption is
positive only with its own image, so on captions alone this is CLIP. The authors' training loop is not published; this
is the paper's algorithm.

    L = 1/2N sum_i -1/|P(i)| sum_{k in P(i)} log softmax_k(s u_i.v)  +  the same with u and v exchanged
    P(i) = {k: y_k = y_i}

Labels of a data source start at 0, and the loader gives -1 to records without one. The paper's y is one more: 0 for a
caption. The share of each kind in a batch is that of its sources in a mixture, `data.source="CLASSES*1 + CAPTIONS*1"`.

Examples of one class cannot be told apart, so the loss has a floor, the mean of log|P(i)|. The floor and the share of
examples with a class are metrics.
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
    """The section `config.unicl`. Raises UserError for invalid values.

    Attributes:
      class_templates: templates of the texts of records with a label, with fields of the record as in `data.templates`.
        `{class_name}` is the name of the class. Records without a label use `data.templates`.
      pairs_only: only the own text of an image is its positive. This is CLIP with the labels as captions, a baseline of
        the paper.
    """

    class_templates: tuple[str, ...] = ("{class_name}",)
    pairs_only: bool = False

    def __post_init__(self):
        if not self.class_templates:
            raise UserError('unicl.class_templates=(): at least one is needed, such as "a photo of a {class_name}."')


def make(config):
    """Returns the UniCL method of a configuration; raises UserError for invalid options or towers."""
    options, base = read_options(config, "unicl", Options), clip.make(config)

    def loss(params, extra, features, batch, rng):
        scale = base.scale(params)
        # The only place that converts the labels of the data into those of the paper.
        y = jnp.zeros(len(features["image"]), jnp.int32)
        if "label" in batch and not options.pairs_only:
            y = batch["label"] + 1
        value, metrics = unified_infonce(features["image"], features["text"], scale, y)
        return value, {**metrics, "logit_scale": scale}

    image_view, text_view = base.views
    return dataclasses.replace(
        base, loss=loss, views=(image_view, dataclasses.replace(text_view, class_templates=options.class_templates))
    )


def unified_infonce(z_image, z_text, scale, y):
    """Returns the bidirectional loss of algorithm 1.

    Args:
      z_image, z_text: unit vectors `[B, E]`.
      scale: `exp(logit_scale)`, scalar.
      y: int32 `[B]`; 0 for a caption, 1 and above for a class.

    Returns:
      `(loss, metrics)`, float32 scalars: `loss_floor`, `class_share` of the batch, and `image_to_text_acc` and
      `text_to_image_acc`, the shares of examples whose own pair scores above their pairs with all negatives.
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
    """True for examples of one class and for an example with itself, as if each caption had a label of its own."""
    return (i == j) | ((y_image[:, None] == y_text) & (y_image[:, None] > 0))


def _others(_, image, text, i, j):
    (z_image, y_image), (z_text, y_text) = image, text
    positive = _positive((), y_image, y_text, i, j)
    similarity = jnp.where(positive, EXCLUDED, similarities(z_image, z_text))
    return Tile(similarity, similarity, row_sum=positive)
