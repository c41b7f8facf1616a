"""BERT (Devlin et al. 2019) as a text tower: a post-LN transformer."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import drop, shard_batch
from clip_jax.models.layers import Embed, add
from clip_jax.models.transformer import Attention, Init, Mlp, apply_blocks, block_init, project

POOLS = ("first", "mean")


class PostNormBlock(nn.Module):
    """One post-LN block, `x = LN(x + MHA(x)); x = LN(x + MLP(x))`, with dropout of both branches and of the attention.

    Takes `(x[b, n, D], index of the block)` and `(attention mask, PRNG keys [b] or None)`. Returns `(x, index + 1)`.
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

    @nn.compact
    def __call__(self, carry, context):
        (x, index), (mask, keys) = carry, context
        x = shard_batch(x)

        def drop_weights(weights):
            return drop(weights, self.attention_dropout, keys, 3 * index + 1)

        weights_drop = drop_weights if self.attention_dropout and keys is not None else None
        attention = Attention(self.heads, self.inits, self.dtype, self.attention, name="attn")
        y = attention(x, x, mask, drop_weights=weights_drop)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(
            x + drop(y, self.dropout, keys, 3 * index + 2)
        )
        y = Mlp(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(x)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(
            x + drop(y, self.dropout, keys, 3 * index + 3)
        )
        return x, index + 1


class Bert(nn.Module, kw_only=True):
    """The encoder: int32 ids `[b, n]` and bool `real[b, n]`, False at padding -> states `[b, n, D]`.

    Every token has type 0 ("sentence A").

    Attributes:
      positions: length of the position embedding, the largest n.
      types: number of token types.
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
    types: int = 2
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
        kind = self.param("type", normal, (self.types, self.width))
        x = add(x, pos[:, : ids.shape[1]] + kind[0])
        x = drop(nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_embed")(x), self.dropout, keys, 0)
        init = block_init("bert", self.width, self.mlp_dim, self.depth)
        fields = self.heads, self.mlp_dim, self.act, self.ln_eps, init, self.dropout, self.dtype, self.attention
        block = functools.partial(PostNormBlock, *fields, self.attention_dropout)
        carry = x, jnp.zeros((), jnp.int32)
        return apply_blocks(self, lambda name: block(name=name), carry, (real[:, None, None, :], keys))[0]


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
