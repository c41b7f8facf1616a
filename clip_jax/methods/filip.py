"""FILIP: Yao et al. 2022, "FILIP: Fine-grained Interactive Language-Image Pre-Training".

CLIP with token-wise late interaction. Each token of either tower is projected to a unit vector of `model.embed_dim`. An
image scores a text by the mean over its patches of the most similar word, a text scores an image by the mean over its
words of the most similar patch (equations 3 to 5). The two scores differ, and each is the logit of InfoNCE in its own
direction (`clip_jax/losses/contrastive.py`). Embeddings are token vectors, `[n, P, E]` and `[n, L, E]`, with rows of
zeros for padding.

`token_select` searches for the best words and patches only among a few tokens of each sample, which saves communication
and half of the matrix products. The mean still runs over all tokens:

    paper25  the quarter of the tokens with the largest maximum similarity to the tokens of `local_batch` neighbouring
             samples (section 3.1). The paper's neighbours are the samples of a device. Here their number is an option,
             so that the result does not depend on the machine. Assumptions: a quarter of the real tokens, rounded up;
             the mean over all tokens
    repo16   the 16 tokens with the largest sum of similarities to the tokens of the paired sample, as in
             Sense-GVT/DeCLIP, which reimplements FILIP

With `model.dtype=bfloat16` the loss compares bfloat16 tokens, where the paper's are float16.

The authors released no code. Assumptions: the tokens are those after the tower's last layer norm; the class token is
excluded, the start and end tokens of a text are included. Sense-GVT/DeCLIP takes patches before that norm
(`model.image.token_norm=False`), and its scale has no bound (`model.logit_scale_max=inf`). Deviation from it: padding
is excluded.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.errors import UserError
from clip_jax.losses import pairwise
from clip_jax.losses.contrastive import compared, filip, paired_keys, token_similarities, top_tokens
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options
from clip_jax.models.common import l2_normalize
from clip_jax.models.layers import Dense
from clip_jax.models.one_tower import real_tokens
from clip_jax.models.two_tower import TwoTower

#: Fields of the configuration that get the tokenizer's values (`clip_jax.methods.interface.resolve`).
TOKENIZER_FIELDS = {"filip": ("special_ids",)}
SELECTIONS = ("none", "paper25", "repo16")
PAPER_SHARE = 0.25


def reads_end(config):
    """Whether the method looks for the end of a text (`clip_jax.methods.interface.resolve`)."""
    return True


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.filip`. Raises UserError for invalid values.

    Attributes:
      use_cls: the image's class token takes part.
      use_bos_eos: the start and end tokens of a text take part. They always do in a text without other tokens.
      token_select: none, paper25 or repo16.
      local_batch: the number of neighbouring samples of paper25. It must divide the batch.
      text_augment: operations on texts (docs/data.md).
      special_ids: the tokenizer's, filled in automatically.
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
    """Returns the FILIP method of a configuration; raises UserError for invalid options or towers."""
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
        image, text = (compared(features[name], config.model.dtype) for name in ("image", "text"))
        scale = base.scale(params)
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
        image_features=towers.image_features,
        similarity=late_interaction,
        text_similarity=late_interaction,
    )


class TokenTowers(TwoTower):
    """Towers that embed an input as all its tokens: unit rows, float32 `[b, P, E]` and `[b, L, E]`, zeros for padding.

    `params["filip"]` holds the projections `img` and `txt`. They replace the projections of the towers.
    """

    def __init__(self, model, options):
        super().__init__(model, tokens=True)
        self.image, self.text = self.image.clone(embed_dim=0), self.text.clone(embed_dim=0)
        self.options, self.skip = options, int(model.image.cls_token and not options.use_cls)
        dense = functools.partial(Dense, model.embed_dim, dtype=jnp.dtype(model.dtype))
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

    def image_features(self, params, extra, images):
        """Returns the mean of the image tokens that take part, before their projection, float32 `[b, D]`."""
        tokens = super().encode_image(params, extra, images)[1]
        return tokens[:, self.skip :].astype(jnp.float32).mean(1)

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
    """Returns the mean over a query's real tokens of the most similar real token of a candidate, float32 `[n, m]`.

    Works tile by tile and never holds the similarities of all tokens.

    Args:
      queries: embeddings of images or texts, `[n, P, E]`; rows of zeros are padding.
      candidates: embeddings of images or texts, `[m, L, E]`; rows of zeros are padding.
    """
    side = pairwise.tile_side(queries.shape[1] * candidates.shape[1])

    def score(query, candidate):
        similarity = token_similarities("pd,ld->pl", query, candidate)
        best, real = jnp.where(candidate.any(-1), similarity, pairwise.EXCLUDED).max(1), query.any(-1)
        return jnp.sum(best, where=real) / jnp.maximum(real.sum(), 1)

    def scores(query):
        return lax.map(functools.partial(score, query), candidates, batch_size=side)

    return lax.map(scores, queries, batch_size=side)


def select_keys(options, image_tokens, text_tokens, real):
    """Returns the argument `keys` of `contrastive.filip`. The selection has no gradient and never contains padding."""
    if options.token_select == "repo16":
        return paired_keys(image_tokens, text_tokens, real)
    fixed = lax.stop_gradient((image_tokens, text_tokens))
    of_patches, of_words = best_in_group(*fixed, real, options.local_batch)
    patches, words = (math.ceil(PAPER_SHARE * x.shape[1]) for x in (image_tokens, text_tokens))
    image_keys, _ = top_tokens(image_tokens, True, of_patches, patches)
    text_keys, is_real = top_tokens(text_tokens, real, of_words, words)
    kept = jnp.arange(words) < jnp.ceil(PAPER_SHARE * real.sum(1, keepdims=True))
    return image_keys, (text_keys, is_real & kept)


def best_in_group(image_tokens, text_tokens, real, size):
    """Returns each token's largest similarity among `size` consecutive examples, float32 `[B, P]` and `[B, L]`."""
    images, texts, real = (x.reshape(-1, size, *x.shape[1:]) for x in (image_tokens, text_tokens, real))

    def add(of_words, one_of_each):
        similarity = token_similarities("gpd,gjld->gjpl", one_of_each, texts)
        of_patches = jnp.where(real[:, :, None], similarity, pairwise.EXCLUDED).max((1, 3))
        return jnp.maximum(of_words, similarity.max(2)), of_patches

    of_words, of_patches = lax.scan(add, jnp.full(real.shape, pairwise.EXCLUDED), images.swapaxes(0, 1))
    return of_patches.swapaxes(0, 1).reshape(-1, images.shape[2]), of_words.reshape(-1, texts.shape[2])
