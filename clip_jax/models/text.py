"""Text transformer with the switches that tell the published CLIP-like text towers apart."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.transformer import Block, MapHead, apply_blocks, at, block_init, only_at, project

POOLS = ("eot", "last", "first", "mean", "max", "max_masked", "map")


class TextTransformer(nn.Module):
    """Text tower: int32 ids `[b, n]`, n at most `context` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the pooled output after the last layer norm, projected unless `embed_dim` is 0, not normalised. Without
    `tokens` None comes in their place, which saves work where one of them is pooled.

    `pool`: `eot` (the first token with the id `eot_id`; CLIP), `last` (sticky EOS; SigLIP), `first` (BERT's
    [CLS], FLIP), `mean` (over the tokens up to the end), `max` (over all positions), `max_masked` (up to the end), `map`.
    With `mask_padding` no token attends to what follows the end-of-text token; under a causal mask the pooled token never does anyhow.
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
        del train, keys  # no dropout in any of these towers; the arguments are what every tower takes
        b, n = ids.shape
        stds = (self.width**-0.5,) * 2 if self.weight_init == "xavier" else (0.02, 0.01)
        embed_init, pos_init = map(nn.initializers.normal, stds)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=embed_init, dtype=self.dtype, name="embed")(ids)
        pos = self.param("pos", pos_init, (1, self.context, self.width))
        x = x + pos[:, :n].astype(x.dtype)
        end = jnp.argmax(ids == self.eot_id, axis=1)  # 0 when there is none, as in the published code
        real = jnp.arange(n) <= end[:, None]
        mask = real[:, None, None, :] if self.mask_padding else None
        init = block_init(self.weight_init, self.width, self.mlp_dim, self.depth)
        block = functools.partial(
            Block, self.heads, self.mlp_dim, self.act, self.ln_eps, init, self.causal, self.dtype, self.attention
        )
        position = {"eot": end, "last": n - 1, "first": 0}.get(self.pool)
        only = only_at(self, position)
        x = apply_blocks(self, lambda name: block(name=name), x, mask, only)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_final")(x)
        pooled = {
            "mean": lambda: (x * real[..., None]).sum(1) / real.sum(1, keepdims=True).astype(x.dtype),
            "max": lambda: x.max(1),
            "max_masked": lambda: jnp.max(x, axis=1, where=real[..., None], initial=-jnp.inf),
            "map": lambda: MapHead(self.heads, self.mlp_dim, self.act, self.ln_eps, self.dtype, name="map")(x, mask),
        }.get(self.pool, lambda: (x if only is not None else at(x, position))[:, 0])()
        return project(pooled, self.embed_dim, self.proj_bias, self.dtype), x if self.tokens else None
