"""Text transformer whose fields cover the differences between the published CLIP-like text towers."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.layers import Embed, add
from clip_jax.models.transformer import Block, MapHead, apply_blocks, at, block_init, only_at, project

POOLS = ("eot", "last", "first", "mean", "max", "max_masked", "map")


class TextTransformer(nn.Module):
    """Text tower: int32 ids `[b, n]`, n at most `context` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the pooled output after the last layer norm, projected unless `embed_dim` is 0. It does not have
    unit length. The tokens are the output before pooling.

    Attributes:
      eot_id: id of the end-of-text token.
      pool: `eot` (the first end-of-text token; CLIP), `last` (the last position, a "sticky" end of text; SigLIP),
        `first` ([CLS] of BERT; FLIP), `mean` (up to the end of the text), `max` (over all positions), `max_masked`
        (maximum up to the end of the text) or `map` (attention pooling).
      causal: each token attends to itself and earlier ones only.
      mask_padding: no token attends to the padding after the end-of-text token. Under a causal mask the pooled token
        does not anyway.
      weight_init: see `block_init`.
      remat, scan, attention: as `config.model`.
      tokens: False returns None instead of the tokens. With a pooled token this saves work in the last block.
    """

    vocab_size: int
    context: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    embed_dim: int
    eot_id: int
    proj_bias: bool = False
    pool: str = "eot"
    causal: bool = True
    mask_padding: bool = False
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    weight_init: str = "clip_text"
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"
    tokens: bool = True

    @nn.compact
    def __call__(self, ids, train=False, keys=None):
        del train, keys  # these towers have no dropout; every tower takes the same arguments
        b, n = ids.shape
        stds = {"xavier": (self.width**-0.5,) * 2} | dict.fromkeys(("flip", "unicl"), (0.02, 0.02))
        stds = stds.get(self.weight_init, (0.02, 0.01))
        embed_init, pos_init = map(nn.initializers.normal, stds)
        x = Embed(self.vocab_size, self.width, self.dtype, embed_init, name="embed")(ids)
        pos = self.param("pos", pos_init, (1, self.context, self.width))
        x = add(x, pos[:, :n])
        end = jnp.argmax(ids == self.eot_id, axis=1)  # 0 without such a token, as in the published code
        real = jnp.arange(n) <= end[:, None]
        mask = real[:, None, None, :] if self.mask_padding else None
        init = block_init(self.weight_init, self.width, self.mlp_dim, self.depth)
        block = functools.partial(
            Block, self.heads, self.mlp_dim, self.act, self.ln_eps, init, self.causal, self.dtype, self.attention
        )
        position = {"eot": end, "last": n - 1, "first": 0}.get(self.pool)
        only = only_at(self, position)
        x = apply_blocks(self, block, x, mask, only)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_final")(x)
        pooled = {
            "mean": lambda: (x * real[..., None]).sum(1) / real.sum(1, keepdims=True).astype(x.dtype),
            "max": lambda: x.max(1),
            "max_masked": lambda: jnp.max(x, axis=1, where=real[..., None], initial=-jnp.inf),
            "map": lambda: MapHead(self.heads, self.mlp_dim, self.act, self.ln_eps, self.dtype, name="map")(x, mask),
        }.get(self.pool, lambda: (x if only is not None else at(x, position))[:, 0])()
        pooled = project(pooled, self.embed_dim, self.proj_bias, self.dtype, self.weight_init)
        return pooled, x if self.tokens else None
