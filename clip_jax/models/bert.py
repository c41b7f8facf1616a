"""BERT as a text tower (Devlin et al. 2019): post-LN transformer, the state of [CLS] projected into the shared space."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import drop, shard_batch
from clip_jax.models.transformer import Attention, Init, Mlp, apply_blocks, block_init, project


class PostNormBlock(nn.Module):
    """One post-LN block: `x = LN(x + MHA(x)); x = LN(x + MLP(x))`, with dropout of both branches.

    Takes `(x[b, n, D], its index)` and `(mask, keys)` and gives `(x, index of the next block)`.
    """

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    inits: Init
    dropout: float = 0.0
    dtype: Any = jnp.float32
    attention: str = "plain"

    @nn.compact
    def __call__(self, carry, context):
        (x, index), (mask, keys) = carry, context
        x = shard_batch(x)
        y = Attention(self.heads, self.inits, self.dtype, self.attention, name="attn")(x, x, mask)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(
            x + drop(y, self.dropout, keys, 2 * index + 1)
        )
        y = Mlp(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(x)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(
            x + drop(y, self.dropout, keys, 2 * index + 2)
        )
        return x, index + 1


class Bert(nn.Module, kw_only=True):
    """The encoder: int32 ids `[b, n]`, n at most `positions`, and bool `real[b, n]`, False at padding -> states `[b, n, D]`.

    Every token is of type 0 ("sentence A"). `dropout` is that of hidden states; attention weights are not dropped.
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
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"

    @nn.compact
    def __call__(self, ids, real, keys=None):
        normal = nn.initializers.truncated_normal(0.02)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=normal, dtype=self.dtype, name="embed")(ids)
        pos = self.param("pos", normal, (1, self.positions, self.width))
        kind = self.param("type", normal, (self.types, self.width))
        x = x + (pos[:, : ids.shape[1]] + kind[0]).astype(x.dtype)
        x = drop(nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_embed")(x), self.dropout, keys, 0)
        init = block_init("bert", self.width, self.mlp_dim, self.depth)
        block = functools.partial(
            PostNormBlock,
            self.heads,
            self.mlp_dim,
            self.act,
            self.ln_eps,
            init,
            self.dropout,
            self.dtype,
            self.attention,
        )
        carry = x, jnp.zeros((), jnp.int32)
        return apply_blocks(self, lambda name: block(name=name), carry, (real[:, None, None, :], keys))[0]


class BertTower(Bert, kw_only=True):
    """Text tower: int32 ids `[b, n]` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the last state of the first token, [CLS], projected unless `embed_dim` is 0, not normalised. No token
    attends to padding: to what follows the first token with the id `eot_id` ([SEP]), or to the id `pad_id` where that is given.
    """

    context: int
    embed_dim: int
    eot_id: int
    pad_id: int = -1
    proj_bias: bool = True

    @nn.compact
    def __call__(self, ids, train=False, keys=None):
        if self.pad_id >= 0:
            real = ids != self.pad_id
        else:
            real = jnp.arange(ids.shape[1]) <= jnp.argmax(ids == self.eot_id, axis=1)[:, None]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Bert) if f.name not in ("parent", "name")}
        x = Bert(**fields, name="bert")(ids, real, keys if train else None)
        return project(x[:, 0], self.embed_dim, self.proj_bias, self.dtype), x
