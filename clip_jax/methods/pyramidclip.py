"""PyramidCLIP: Gao et al. 2022, "PyramidCLIP: Hierarchical Feature Alignment for Vision-language Model
Pretraining" (NeurIPS).

Three levels of an image are aligned with three levels of its text. The image has a global crop G, a local crop L and a
sequence of regions R (a detector's features and boxes, which pass only through the last part of the image tower). The
text has a summary S of the caption, the caption T and the tags A of the regions. Six pairs of levels have a term:
InfoNCE in both directions with softened targets, which leave a share a to the wrong pairs:

    soft(x, l) = (CE(s x l^T, Y) + CE(s l x^T, Y)) / 2,   Y = 1 - a on the diagonal, a / (B - 1) elsewhere
    loss = (1 - lam - mu) (soft(G, S) + soft(L, T)) / 2
           + lam (soft(G, A) + soft(R, S)) / 2 + mu (soft(L, A) + soft(R, T)) / 2

The towers are the released ones (`clip_jax/models/pyramid.py`; the text tower pools by the maximum over all positions,
`model.text.pool`). The loss was never released. It follows what secondary descriptions say of the paper, normalised so
that the targets sum to 1. Assumptions: softened targets in all six terms; boxes x1, y1, x2, y2 as shares of the image.
An image without regions or tags is left out of their terms, also as a negative. Evaluation embeds the global crop of an
image.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clip_jax.data.views import ImageView, OptionalTextView, RegionView
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import similarities
from clip_jax.losses.pairwise import EXCLUDED, Tile, pairwise
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options, text_view
from clip_jax.models.common import fold_in_ids, l2_normalize, shard_batch, stack_views, unstack_views
from clip_jax.models.two_tower import TwoTower

TEXTS = ("text", "summary", "tags")
#: Pairs of levels: peers, then the cross-level pairs of lam and of mu.
PEER = (("global", "summary"), ("local", "text"))
CROSS_GLOBAL = (("global", "tags"), ("regions", "summary"))
CROSS_LOCAL = (("local", "tags"), ("regions", "text"))
TERMS = (*PEER, *CROSS_GLOBAL, *CROSS_LOCAL)


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.pyramidclip`. The weights are the paper's. Raises UserError for invalid values.

    Attributes:
      softening: a, the share of the target that the wrong pairs have.
      cross_global, cross_local: lam and mu, the weights of the cross-level terms.
      local_augment: the augmentation of the local crop. `data.augment` is that of the global crop.
      summary, tags: templates with fields of the record, as in `data.templates`.
      regions: the largest number of regions of an image.
      features, boxes: fields of the record. The features `pixels` need no field (`RegionView`).
    """

    softening: float = 0.2
    cross_global: float = 1 / 3
    cross_local: float = 1 / 3
    local_augment: tuple[str, ...] = ("rrc(0.5, 1.0)",)
    summary: tuple[str, ...] = ("{summary}",)
    tags: tuple[str, ...] = ("{tags}",)
    regions: int = 10
    features: str = "regions"
    boxes: str = "boxes"

    def __post_init__(self):
        if not 0 <= self.softening < 1:
            raise UserError(f"pyramidclip.softening={self.softening}: must be at least 0 and below 1")
        if not (self.cross_global >= 0 and self.cross_local >= 0 and self.cross_global + self.cross_local <= 1 + 1e-6):
            raise UserError(
                f"pyramidclip.cross_global={self.cross_global} and cross_local={self.cross_local}: must be at least 0,"
                " together at most 1"
            )
        if not self.regions >= 1:
            raise UserError(f"pyramidclip.regions={self.regions}: must be at least 1")
        for name in ("summary", "tags"):
            if not getattr(self, name):
                raise UserError(f'pyramidclip.{name}=(): at least one template is needed, such as "{{{name}}}"')

    @property
    def weights(self):
        """The weights of `TERMS`."""
        peer = 1 - self.cross_global - self.cross_local
        return tuple(weight / 2 for weight in (peer, peer, *(self.cross_global,) * 2, *(self.cross_local,) * 2))


def make(config):
    """Returns the PyramidCLIP method of a configuration; raises UserError for invalid options or towers."""
    options, image = read_options(config, "pyramidclip", Options), config.model.image
    if not image.kind.startswith("pyramid_"):
        raise UserError(
            f"method='pyramidclip' needs model.image.kind='pyramid_vit' or 'pyramid_resnet', not {image.kind!r}"
        )
    if image.kind == "pyramid_vit" and not 0 <= image.front < image.depth:
        raise UserError(
            f"model.image.front={image.front}: must be at least 0 and below model.image.depth={image.depth}"
        )
    base, towers = clip.make(config), TwoTower(config.model)

    def embed_regions(params, rows):
        """Returns `(z, has_regions)`, unit rows `[b, E]` and bool `[b]`, of `rows` float32 `[b, m, region_dim]`."""
        mask = rows.any(-1)
        z = towers.image.apply({"params": params["img"]}, None, regions=rows, mask=mask)[0]
        return l2_normalize(z), mask.any(-1)

    def encode(params, extra, batch, rng, train):
        """Returns the unit rows of all six levels, float32 `[b, E]`, and `has_regions` and `has_tags`, bool `[b]`."""
        keys = jax.vmap(lambda key: jax.random.split(key, 5))(fold_in_ids(rng, batch["example_id"]))
        # Two passes, the local crop first, so that each crop has its own BatchNorm statistics, as in the released code.
        local, _, extra = towers.encode_image(params, extra, batch["local"], train, keys[:, 0])
        whole, _, extra = towers.encode_image(params, extra, batch["image"], train, keys[:, 1])
        regions, has_regions = embed_regions(params, shard_batch(batch["regions"]))
        ids, text_keys = stack_views([shard_batch(batch[name]) for name in TEXTS], keys[:, 2:])
        texts, _, extra = towers.encode_text(params, extra, jnp.maximum(ids, 0), train, text_keys)
        features = {
            "global": whole,
            "local": local,
            "regions": regions,
            "has_regions": has_regions,
            "has_tags": batch["tags"][:, 0] >= 0,
        }
        return features | dict(zip(TEXTS, jnp.moveaxis(unstack_views(texts, len(whole)), 1, 0), strict=True)), extra

    def loss(params, extra, features, batch, rng):
        scale = base.scale(params)
        value, metrics = pyramid_infonce(features, scale, options.softening, options.weights)
        return value, {**metrics, "logit_scale": scale}

    views = (
        base.views[0],
        ImageView("local", image.size, options.local_augment),
        base.views[1],
        text_view(config, "summary", templates=options.summary, rewrites=()),
        text_view(config, "tags", kind=OptionalTextView, templates=options.tags, rewrites=()),
        RegionView("regions", options.regions, image.region_dim, options.features, options.boxes),
    )
    return dataclasses.replace(base, views=views, encode=encode, loss=loss)


def pyramid_infonce(features, scale, softening=0.2, weights=(1 / 6,) * 6):
    """Returns PyramidCLIP's loss.

    Args:
      features: unit vectors `[B, E]` by the names in `TERMS`, and optionally `has_regions` and `has_tags`, bool `[B]`.
      scale: scalar.
      softening: the share of the target that the wrong pairs have.
      weights: of `TERMS`.

    Returns:
      `(loss, metrics)`: the metrics are the terms and the accuracies of the local crop with the caption in the batch.
    """
    names = ("global", "local", "regions"), TEXTS
    images, texts = ({name: features[name].astype(jnp.float32) for name in side} for side in names)
    everywhere = jnp.ones(len(images["global"]), bool)
    parts = {name: features.get(f"has_{name}", everywhere) for name in ("regions", "tags")}
    takes_part = [parts.get(image, everywhere) & parts.get(text, everywhere) for image, text in TERMS]
    out = pairwise(_tile, scale, (images, takes_part), (texts, takes_part), entry_size=len(TERMS))
    value, metrics = 0.0, {}
    for k, (image, text) in enumerate(TERMS):
        x, z = images[image], texts[text]
        keep = takes_part[k]
        positive, count = scale * jnp.sum(x * z, axis=1), jnp.maximum(keep.sum(), 1)
        share = jnp.where(count > 1, softening, 0)  # a single pair has all of the target
        sums = jnp.sum(z, 0, where=keep[:, None]), jnp.sum(x, 0, where=keep[:, None])
        term = 0.0
        for queries, of_others, lse in zip((x, z), sums, (out.row_lse[k], out.col_lse[k]), strict=True):
            wrong = scale * similarities(queries, of_others) - positive
            losses = jnp.logaddexp(lse, positive) - (1 - share) * positive - share / jnp.maximum(count - 1, 1) * wrong
            term += jnp.sum(losses, where=keep) / count / 2
        value += weights[k] * term
        metrics[f"loss_{image}_{text}"] = term
        if (image, text) == ("local", "text"):
            metrics |= {
                "image_to_text_acc": (positive > out.row_max[k]).mean(),
                "text_to_image_acc": (positive > out.col_max[k]).mean(),
            }
    return value, metrics


def _tile(scale, rows, cols, i, j):
    (images, from_rows), (texts, from_cols) = rows, cols
    logits = [
        jnp.where((i != j) & a[:, None] & b, scale * similarities(images[image], texts[text]), EXCLUDED)
        for (image, text), a, b in zip(TERMS, from_rows, from_cols, strict=True)
    ]
    return Tile(row_lse=logits, col_lse=logits)
