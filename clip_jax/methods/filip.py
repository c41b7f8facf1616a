"""FILIP: Yao et al. 2022, "FILIP: Fine-grained Interactive Language-Image Pre-Training".

CLIP, but images and texts are compared token by token. Each token of either tower is projected to a unit vector of
`model.embed_dim`. An image scores a text by the mean over its patches of the most similar word, a text an image by the mean over
its words of the most similar patch (equations 3 to 5): two different numbers, of which each is what InfoNCE in its direction
takes (`clip_jax/losses/contrastive.py`). Embeddings are token vectors, `[n, P, E]` and `[n, L, E]`, padding being rows of zeros.

`token_select` seeks the best words and patches among a few of a sample's tokens, which saves communication and half of the matrix
products; the mean is over all of them:

    paper25  the quarter whose most similar token among `local_batch` neighbouring samples is the most similar (section 3.1). The
             paper's neighbours are those of a device: here a number, so that the result does not depend on the machine. Assumptions:
             a quarter of the real tokens, rounded up; the mean over all tokens
    repo16   the 16 with the largest sum of similarities with the tokens of the own partner: Sense-GVT/DeCLIP, where FILIP is rebuilt

There is no code of the authors. Assumptions: the tokens are those after the tower's last layer norm; CLS takes no part, start and end
of a text do. Unlike Sense-GVT/DeCLIP: padding takes no part, patches are taken after the last norm, and the scale is clamped.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.errors import UserError
from clip_jax.losses import pairwise
from clip_jax.losses.contrastive import filip
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options
from clip_jax.models.common import l2_normalize
from clip_jax.models.one_tower import real_tokens
from clip_jax.models.two_tower import TwoTower

#: Fields of the configuration that get the tokenizer's values (`clip_jax.methods.interface.resolve`).
TOKENIZER_FIELDS = {"filip": ("special_ids",)}
SELECTIONS = ("none", "paper25", "repo16")
PAPER_SHARE, REPO_TOKENS = 0.25, 16


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.filip`. Raises UserError for wrong values.

    Attributes:
      use_cls: the image's class token takes part.
      use_bos_eos: the tokens of a text's start and end take part; they do in any case where a text has no other.
      token_select: none, paper25 or repo16.
      local_batch: of paper25; divides the batch.
      text_augment: operations on texts: docs/data.md.
      special_ids: of the tokenizer, filled in by itself.
    """

    use_cls: bool = False
    use_bos_eos: bool = True
    token_select: str = "none"
    local_batch: int = 64
    text_augment: tuple[str, ...] = ()
    special_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.token_select not in SELECTIONS:
            raise UserError(f"filip.token_select={self.token_select!r}: allowed are {', '.join(SELECTIONS)}")
        if not self.local_batch >= 1:
            raise UserError(f"filip.local_batch={self.local_batch}: must be at least 1")


def make(config):
    """The FILIP method of a configuration; raises UserError for options or towers that cannot be."""
    options, image = read_options(config, "filip", Options), config.model.image
    if image.kind != "vit":
        raise UserError(f"method='filip' compares patches: it needs model.image.kind='vit', not {image.kind!r}")
    if options.use_cls and not image.cls_token:
        raise UserError("filip.use_cls=True needs model.image.cls_token=True")
    if options.token_select == "paper25" and config.data.batch_size % options.local_batch:
        raise UserError(
            f"filip.local_batch={options.local_batch} does not divide data.batch_size={config.data.batch_size}"
        )
    towers, base = TokenTowers(config.model, options), clip.make(config)

    def loss(params, extra, features, batch, rng):
        image, text, scale = features["image"], features["text"], base.scale(params)
        real = text.any(-1)
        keys = select_keys(options, image, text, real) if options.token_select != "none" else None
        value, metrics = filip(image, text, real, scale, keys)
        return value, {**metrics, "logit_scale": scale}

    def init(rng, batch):
        params, extra = towers.init(rng, batch)
        return params | {"logit_scale": jnp.asarray(config.model.logit_scale_init, jnp.float32)}, extra

    return dataclasses.replace(
        base,
        views=(base.views[0], dataclasses.replace(base.views[1], augment=options.text_augment)),
        init=init,
        encode=towers.encode,
        loss=loss,
        embed_image=towers.embed_image,
        embed_text=towers.embed_text,
        similarity=late_interaction,
        text_similarity=late_interaction,
    )


class TokenTowers(TwoTower):
    """Towers whose embeddings are all their tokens: unit rows, float32 `[b, P, E]` and `[b, L, E]`, zeros for padding.

    `params["filip"]` holds the projections `img` and `txt`. The towers have none of their own.
    """

    def __init__(self, model, options):
        super().__init__(model, tokens=True)
        self.image, self.text = self.image.clone(embed_dim=0), self.text.clone(embed_dim=0)
        self.options, self.skip = options, int(model.image.cls_token and not options.use_cls)
        dense = functools.partial(nn.Dense, model.embed_dim, dtype=jnp.dtype(model.dtype))
        self.projections = {"img": dense(use_bias=model.image.proj_bias), "txt": dense(use_bias=model.text.proj_bias)}

    def init(self, rng, batch):
        rng, *rngs = jax.random.split(rng, 3)
        params, extra = super().init(rng, batch)
        widths = {"img": self.image.width, "txt": self.text.width}
        pairs = zip(rngs, widths.items(), strict=True)
        projections = {
            name: self.projections[name].init(key, jnp.zeros((1, width)))["params"] for key, (name, width) in pairs
        }
        return params | {"filip": projections}, extra

    def encode_image(self, params, extra, images, train=False, keys=None):
        _, tokens, extra = super().encode_image(params, extra, images, train, keys)
        return self._project(params, "img", tokens[:, self.skip :]), None, extra

    def encode_text(self, params, extra, ids, train=False, keys=None):
        _, tokens, extra = super().encode_text(params, extra, ids, train, keys)
        real = real_tokens(ids, self.text.eot_id)
        if not self.options.use_bos_eos:
            words = real & ~jnp.isin(ids, jnp.asarray(self.options.special_ids, ids.dtype))
            real = jnp.where(words.any(1, keepdims=True), words, real)
        return self._project(params, "txt", tokens) * real[..., None], None, extra

    def _project(self, params, name, tokens):
        return l2_normalize(self.projections[name].apply({"params": params["filip"][name]}, tokens))


def late_interaction(queries, candidates):
    """The mean over the real tokens of a query of the most similar real token of a candidate, float32 `[n, m]`.

    It takes embeddings of images and texts alike, `[n, P, E]` and `[m, L, E]`; rows of zeros are padding. Tile by tile: never
    are the similarities of all tokens held.
    """
    side = pairwise.tile_side(queries.shape[1] * candidates.shape[1])

    def score(query, candidate):
        similarity = jnp.einsum("pd,ld->pl", query, candidate, precision=lax.Precision.HIGHEST)
        best, real = jnp.where(candidate.any(-1), similarity, pairwise.EXCLUDED).max(1), query.any(-1)
        return jnp.sum(best, where=real) / jnp.maximum(real.sum(), 1)

    def scores(query):
        return lax.map(functools.partial(score, query), candidates, batch_size=side)

    return lax.map(scores, queries, batch_size=side)


def select_keys(options, image_tokens, text_tokens, real):
    """The argument `keys` of `clip_jax.losses.contrastive.filip`: chosen without a gradient, padding never."""
    fixed = lax.stop_gradient((image_tokens, text_tokens))
    p, n = image_tokens.shape[1], text_tokens.shape[1]
    if options.token_select == "repo16":
        similarity = jnp.where(
            real[:, None], jnp.einsum("bpd,bld->bpl", *fixed, preferred_element_type=jnp.float32), 0.0
        )
        of_patches, of_words, counts = (
            similarity.sum(2),
            similarity.sum(1),
            (min(REPO_TOKENS, p), min(REPO_TOKENS, n), REPO_TOKENS),
        )
    else:
        of_patches, of_words = best_in_group(*fixed, real, options.local_batch)
        counts = (
            math.ceil(PAPER_SHARE * p),
            math.ceil(PAPER_SHARE * n),
            jnp.ceil(PAPER_SHARE * real.sum(1, keepdims=True)),
        )
    image_keys, _ = _top(image_tokens, True, of_patches, counts[0])
    text_keys, is_real = _top(text_tokens, real, of_words, counts[1])
    return image_keys, (text_keys, is_real & (jnp.arange(counts[1]) < counts[2]))


def best_in_group(image_tokens, text_tokens, real, size):
    """The similarity of each token with its most similar one among `size` examples in a row, float32 `[B, P]` and `[B, L]`."""
    images, texts, real = (x.reshape(-1, size, *x.shape[1:]) for x in (image_tokens, text_tokens, real))

    def add(of_words, one_of_each):
        similarity = jnp.einsum("gpd,gjld->gjpl", one_of_each, texts, preferred_element_type=jnp.float32)
        of_patches = jnp.where(real[:, :, None], similarity, pairwise.EXCLUDED).max((1, 3))
        return jnp.maximum(of_words, similarity.max(2)), of_patches

    of_words, of_patches = lax.scan(add, jnp.full(real.shape, pairwise.EXCLUDED), images.swapaxes(0, 1))
    return of_patches.swapaxes(0, 1).reshape(-1, images.shape[2]), of_words.reshape(-1, texts.shape[2])


def _top(tokens, real, score, k):
    """The `k` real tokens with the largest scores, `[b, k, D]`, and which of them are real, bool `[b, k]`."""
    values, index = lax.top_k(jnp.where(real, score, pairwise.EXCLUDED), k)
    return jnp.take_along_axis(tokens, index[..., None], axis=1), values > pairwise.EXCLUDED
