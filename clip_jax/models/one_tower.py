"""One transformer for images, texts and both at once. Attention masks on the concatenated sequence select the pass."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.models.common import ACTIVATIONS
from clip_jax.models.layers import Embed, add, replace
from clip_jax.models.transformer import WEIGHT_INITS, Block, apply_blocks, block_init
from clip_jax.models.vit import embed_patches, patches

#: Attention masks on the sequence [CLS, patches, CLS, words], in the notation of OneR, F(queries | keys and values):
#:   block_diagonal      F(I|I), F(T|T): each modality attends to itself, as if encoded alone
#:   off_diagonal        F(I|T), F(T|I): each modality attends to the other one alone; both change from layer to layer
#:   off_diagonal_self   as off_diagonal, but keys and values are the states of the other modality under block_diagonal
#:   full                F(I,T|I,T): every token attends to both modalities
#:   full_one_cls        as full, but no token attends to the CLS of the text: the CLS of the image stands for both
MODES = ("block_diagonal", "off_diagonal", "off_diagonal_self", "full", "full_one_cls")

_SHARED = ("dtype", "remat", "scan", "attention")  # fields that come from `config.model`, not from `model.image`


def real_tokens(ids, eot_id):
    """Returns bool `[b, n]`, True up to and including the first token of `ids[b, n]` with the id `eot_id`."""
    return jnp.arange(ids.shape[1]) <= jnp.argmax(ids == eot_id, axis=1)[:, None]


class ImageTokens(nn.Module):
    """Patch embeddings with positions, `[b, size, size, 3] -> [b, n, D]`.

    Where `hidden`, bool `[b, n]`, is True, a learned mask vector replaces the embedding of the patch.
    """

    width: int
    patch: int
    stem: tuple[int, ...]
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, images, hidden=None):
        if self.stem and hidden is not None:  # The convolutions overlap: neighbours of a hidden patch would reveal it.
            side = images.shape[1] // self.patch
            grid = hidden.reshape(-1, side, side).repeat(self.patch, 1).repeat(self.patch, 2)
            images = jnp.where(grid[..., None], 0, images)
        x = embed_patches(self, images, bias=True)
        x = x.reshape(len(x), -1, self.width)
        return _mask_and_add_positions(self, x, hidden, x.shape[1])


class TextTokens(nn.Module):
    """Word embeddings with positions, int32 `[b, n] -> [b, n, D]`.

    Where `hidden`, bool `[b, n]`, is True, a learned mask vector replaces the embedding of the word.
    """

    width: int
    vocab_size: int
    context: int
    dtype: Any

    @nn.compact
    def __call__(self, ids, hidden=None):
        x = Embed(self.vocab_size, self.width, self.dtype, name="embed")(ids)
        return _mask_and_add_positions(self, x, hidden, self.context)


def _mask_and_add_positions(tokens, x, hidden, positions):
    """Replaces hidden embeddings by the parameter `mask` and adds the parameter `pos` of the module `tokens`."""
    normal = nn.initializers.normal(0.02)
    if hidden is not None:
        x = replace(x, hidden[..., None], tokens.param("mask", normal, (tokens.width,)))
    return add(x, tokens.param("pos", normal, (1, positions, tokens.width))[:, : x.shape[1]])


class OneTower(nn.Module):
    """A pre-LN transformer whose weights images and texts share, including the CLS token (OneR).

    Each modality has its own token embedding and position embedding. The CLS token precedes the tokens of each modality
    and has no position.

    Attributes:
      size, patch: height and width of images and of patches in pixels.
      context: the largest number of tokens of a text.
      stem: channels of a `ConvStem`, which replaces the patch embedding; the patch size is then `2 ** len(stem)`.
      type_embedding: adds a learned vector of the modality to all its tokens.
      remat, scan, attention: as `config.model`.
    """

    size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    vocab_size: int
    context: int
    stem: tuple[int, ...] = ()
    act: str = "gelu"
    ln_eps: float = 1e-6
    weight_init: str = "xavier"
    type_embedding: bool = True
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"

    @property
    def patch_size(self):
        """Height and width of a patch in pixels."""
        return 2 ** len(self.stem) if self.stem else self.patch

    @nn.compact
    def __call__(self, images=None, ids=None, real=None, mode="block_diagonal", hidden_patches=None, hidden_words=None):
        """Encodes images, texts or both.

        Args:
          images: normalised `[b, size, size, 3]`, or None for texts alone.
          ids: int32 `[b, m]`, m at most `context`, or None for images alone.
          real: bool `[b, m]`, False at padding, to which no token attends.
          mode: one of `MODES`; `block_diagonal` for a single modality.
          hidden_patches: None, or bool `[b, n]`, True where the learned mask vector replaces a patch.
          hidden_words: None, or bool `[b, m]`, the same for words.

        Returns:
          `{"image": [b, 1 + n, D], "text": [b, 1 + m, D]}`, the states after the last layer norm, the CLS token first.
          The key of an absent modality is missing.
        """
        normal = nn.initializers.normal(0.02)
        cls = self.param("cls", normal, (1, 1, self.width))
        kind = self.param("type", normal, (2, self.width)) if self.type_embedding else jnp.zeros((2, self.width))
        streams = {}
        if images is not None:
            tokens = ImageTokens(self.width, self.patch_size, self.stem, self.act, self.dtype, name="img")(
                images, hidden_patches
            )
            streams["image"] = kind[0], tokens, jnp.ones(tokens.shape[:2], bool)
        if ids is not None:
            tokens = TextTokens(self.width, self.vocab_size, self.context, self.dtype, name="txt")(ids, hidden_words)
            streams["text"] = kind[1], tokens, real
        parts = [
            add(jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)).astype(x.dtype), x], axis=1), k)
            for k, x, _ in streams.values()
        ]
        x, mask = jnp.concatenate(parts, axis=1), None
        lengths = [part.shape[1] for part in parts]
        if ids is not None:
            keys = jnp.concatenate(
                [jnp.pad(r, ((0, 0), (1, 0)), constant_values=True) for _, _, r in streams.values()], axis=1
            )
            mask = attention_mask(mode, lengths, keys)
        if mode == "off_diagonal_self":  # the first copy attends to the second one, which attends to itself
            x = jnp.concatenate([x, x], axis=1)
        init = block_init(self.weight_init, self.width, self.mlp_dim, self.depth)
        block = functools.partial(
            Block, self.heads, self.mlp_dim, self.act, self.ln_eps, init, dtype=self.dtype, attention=self.attention
        )
        x = apply_blocks(self, block, x, mask)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_post")(x)
        starts = [0, *lengths]
        return {
            name: x[:, start : start + length] for name, start, length in zip(streams, starts, lengths, strict=False)
        }


def attention_mask(mode, lengths, keys):
    """Returns the attention mask of a pass, bool `[b, 1, q, k]`, True where attention is allowed.

    Args:
      mode: one of `MODES`.
      lengths: number of tokens of each modality in the sequence.
      keys: bool `[b, sum(lengths)]`, False at padding. `off_diagonal_self` repeats it for the second copy.
    """
    segment = np.repeat(np.arange(len(lengths)), lengths)
    same = segment[:, None] == segment
    if mode == "off_diagonal_self":
        none = np.zeros_like(same)
        allowed, keys = np.block([[none, ~same], [none, same]]), jnp.tile(keys, (1, 2))
    elif mode == "full_one_cls":
        allowed = np.broadcast_to(np.arange(len(segment)) != lengths[0], same.shape)
    else:
        allowed = {"block_diagonal": same, "off_diagonal": ~same, "full": np.ones_like(same)}[mode]
    return (allowed & keys[:, None, :])[:, None]


def patch_pixels(images, patch):
    """Returns the pixels of each patch of images `[b, h, w, 3]`, float32 `[b, n, patch * patch * 3]`."""
    x = patches(images.astype(jnp.float32), patch, patch)
    return x.reshape(len(x), -1, x.shape[-1])


def one_tower(model, **fields):
    """Returns the `OneTower` of a configuration.

    Args:
      model: the section `config.model`. `model.image` holds arguments of `OneTower`, `model.text` `context` and
        `vocab_size`.
      fields: further arguments of `OneTower`; `model.image` must not contain them.

    Raises UserError for an unknown field, for a value outside the choices of its field, for a width that `heads` does
    not divide, and for a size that the patch size does not divide.
    """
    image, text = {k: tuple(v) if isinstance(v, list) else v for k, v in model.image.items()}, model.text
    elsewhere = {"parent", "name", "vocab_size", "context", *fields, *_SHARED}
    known = {f.name for f in dataclasses.fields(OneTower)} - elsewhere
    for name in sorted(set(image) - known):
        raise UserError(
            f"model.image.{name} is no field of a tower for images and texts: allowed are {', '.join(sorted(known))}"
        )
    for name, choices in (("act", ACTIVATIONS), ("weight_init", WEIGHT_INITS)):
        if name in image and image[name] not in choices:
            raise UserError(f"model.image.{name}={image[name]!r}: allowed are {', '.join(choices)}")
    if image["width"] % image["heads"]:
        raise UserError(f"model.image.width={image['width']} is not divisible by model.image.heads={image['heads']}")
    shared = {name: model[name] for name in _SHARED} | {"dtype": jnp.dtype(model.dtype)}
    tower = OneTower(**image, vocab_size=text.vocab_size, context=text.context, **shared, **fields)
    if tower.size % tower.patch_size:
        raise UserError(f"model.image.size={tower.size} is not divisible by the patch size {tower.patch_size}")
    return tower
