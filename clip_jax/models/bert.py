"""BERT (Devlin et al. 2019) as a text tower: a post-LN transformer, with options for MPNet's (Song et al. 2020)."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from clip_jax.models.common import drop, row_major, shard_batch
from clip_jax.models.layers import Embed, add
from clip_jax.models.transformer import Attention, Init, Mlp, apply_blocks, block_init, project

POOLS = ("first", "mean")


class PostNormBlock(nn.Module):
    """One post-LN block, `x = LN(x + MHA(x)); x = LN(x + MLP(x))`, with dropout of both branches and of the attention.

    Takes `(x[b, n, D], index of the block)` and `(attention mask, PRNG keys [b] or None, bias of the attention or
    None)`. Returns `(x, index + 1)`.
    """

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    inits: Init
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "plain"
    attention_dropout: float = 0.0
    looped: bool = False

    @nn.compact
    def __call__(self, carry, context):
        (x, index), (mask, keys, bias) = carry, context
        x = row_major(shard_batch(x))

        def drop_weights(weights):
            return drop(weights, self.attention_dropout, keys, 3 * index + 1)

        weights_drop = drop_weights if self.attention_dropout and keys is not None else None
        fields = dict(attention=self.attention, looped=self.looped, name="attn")
        attention = Attention(self.heads, self.inits, self.dtype, **fields)
        y = attention(x, x, mask, bias=bias, drop_weights=weights_drop)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(
            x + drop(y, self.dropout, keys, 3 * index + 2)
        )
        y = Mlp(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(x)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(
            x + drop(y, self.dropout, keys, 3 * index + 3)
        )
        return x, index + 1


def position_buckets(n, buckets, farthest=128):
    """Returns the bucket of each pair of a query and a key by their distance, int `[n, n]`, as in T5 and MPNet.

    The first half of the buckets is for keys at or before the query, the second half for keys behind it. Half of each
    half has one distance a bucket, the others grow logarithmically up to the distance `farthest`.
    """
    distance = np.arange(n)[:, None] - np.arange(n)  # of the query from the key
    half = buckets // 2
    exact, far = half // 2, np.maximum(np.abs(distance), 1).astype(np.float32)
    steps = np.log(far / np.float32(exact)) / np.float32(math.log(farthest / exact)) * np.float32(half - exact)
    grown = np.minimum(exact + steps.astype(int), half - 1)
    return half * (distance < 0) + np.where(np.abs(distance) < exact, np.abs(distance), grown)


class Bert(nn.Module, kw_only=True):
    """The encoder: int32 ids `[b, n]` and bool `real[b, n]`, False at padding -> states `[b, n, D]`.

    Every token has type 0 ("sentence A").

    Attributes:
      positions: length of the position embedding, the largest n.
      first_position: row of the position embedding that the first token has. MPNet: 2, one more than the id of padding.
      types: number of token types. 0: none (MPNet).
      buckets: above 0, the number of buckets of distances, see `position_buckets`. Each has a learned bias for every
        head, which all blocks add to the scaled products of the attention (MPNet: 32).
      dropout: chance of dropping hidden states in training.
      attention_dropout: chance of dropping attention weights in training. Above 0 it excludes fused attention there.
      remat, scan, attention: as `config.model`.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    positions: int = 512
    first_position: int = 0
    types: int = 2
    buckets: int = 0
    act: str = "gelu"
    ln_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"

    @nn.compact
    def __call__(self, ids, real, keys=None):
        normal = nn.initializers.truncated_normal(0.02)
        x = Embed(self.vocab_size, self.width, self.dtype, normal, name="embed")(ids)
        pos = self.param("pos", normal, (1, self.positions, self.width))
        pos = pos[:, self.first_position : self.first_position + ids.shape[1]]
        if self.types:
            pos = pos + self.param("type", normal, (self.types, self.width))[0]
        x = add(x, pos)
        x = drop(nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_embed")(x), self.dropout, keys, 0)
        init = block_init("bert", self.width, self.mlp_dim, self.depth)
        fields = self.heads, self.mlp_dim, self.act, self.ln_eps, init, self.dropout, self.dtype, self.attention
        block = functools.partial(PostNormBlock, *fields, self.attention_dropout)
        carry, bias = (x, jnp.zeros((), jnp.int32)), None
        if self.buckets:
            table = self.param("relative", normal, (self.buckets, self.heads))
            bias = table[position_buckets(ids.shape[1], self.buckets)].transpose(2, 0, 1)[None]
        return apply_blocks(self, block, carry, (real[:, None, None, :], keys, bias))[0]


class BertTower(Bert, kw_only=True):
    """Text tower: int32 ids `[b, n]` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the pooled final state, projected unless `embed_dim` is 0. It does not have unit length. No token
    attends to padding.

    Attributes:
      pool: `first` (the first token, [CLS]) or `mean` (over all tokens that are no padding; OTTER).
      context: number of tokens of a text.
      eot_id: id of [SEP]; without `pad_id`, padding is what follows the first [SEP].
      pad_id: id of padding, or -1.
      proj_init: the projection's kernel, see `clip_jax.models.transformer.project`: `clip` or `glorot` (TensorFlow's
        default).
    """

    context: int
    embed_dim: int
    eot_id: int
    pad_id: int = -1
    pool: str = "first"
    proj_bias: bool = True
    proj_init: str = "clip"

    @nn.compact
    def __call__(self, ids, train=False, keys=None):
        if self.pad_id >= 0:
            real = ids != self.pad_id
        else:
            real = jnp.arange(ids.shape[1]) <= jnp.argmax(ids == self.eot_id, axis=1)[:, None]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Bert) if f.name not in ("parent", "name")}
        x = Bert(**fields, name="bert")(ids, real, keys if train else None)
        weights = real.astype(x.dtype)[..., None]
        pooled = x[:, 0] if self.pool == "first" else (x * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        return project(pooled, self.embed_dim, self.proj_bias, self.dtype, self.proj_init), x
