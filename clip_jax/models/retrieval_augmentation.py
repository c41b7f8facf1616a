"""The retrieval augmented module of RA-CLIP: what neighbours say is added to the embedding of a picture."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.transformer import attend

OUT_INITS = {"xavier": nn.initializers.xavier_uniform(), "zeros": nn.initializers.zeros}


class CrossAttention(nn.Module):
    """Multi-head attention of one query `[b, D]` to keys `[b, K, d]` whose values `[b, K, e]` are of another kind; `[b, D]`."""

    heads: int
    bias: bool
    out_init: str
    dtype: Any

    @nn.compact
    def __call__(self, query, keys, values, mask):
        width = query.shape[-1]

        def project(name, x):
            shape = (self.heads, width // self.heads)
            return nn.DenseGeneral(
                shape, use_bias=self.bias, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name
            )(x)

        q, k, v = project("query", query[:, None]), project("key", keys), project("value", values)
        x = attend(q, k, v, mask[:, None, None])
        init = OUT_INITS[self.out_init]
        return nn.DenseGeneral(
            width, axis=(-2, -1), use_bias=self.bias, dtype=self.dtype, kernel_init=init, name="out"
        )(x)[:, 0]


class RetrievalAugmentation(nn.Module):
    """`z + a_T + a_I`: a picture asks its neighbours' pictures and reads their texts, asks their texts and reads their pictures.

    A call takes `z[b, D]`, not normalised, `images[b, K, d_i]` and `texts[b, K, d_t]` of the neighbours, and bool `mask[b, K]`,
    which of them count. Where none does it gives `z`. Of several layers each but the last is followed by ReLU.
    """

    heads: int
    layers: int = 1
    bias: bool = False
    pre_ln: bool = False
    out_init: str = "xavier"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z, images, texts, mask):
        some = mask.any(1, keepdims=True)
        for i in range(self.layers):
            query = nn.LayerNorm(epsilon=1e-5, name=f"ln_{i}")(z) if self.pre_ln else z
            read = [
                CrossAttention(self.heads, self.bias, self.out_init, self.dtype, name=f"{name}_{i}")(
                    query, keys, values, mask
                )
                for name, keys, values in (("text", images, texts), ("image", texts, images))
            ]
            y = z + jnp.where(some, sum(read).astype(jnp.float32), 0)
            z = jnp.where(some, nn.relu(y), y) if i < self.layers - 1 else y
        return z
