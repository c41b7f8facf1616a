"""RA-CLIP's retrieval augmentation (Xie et al. 2023): retrieved image-text pairs augment the embedding of an image."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.layers import Dense
from clip_jax.models.transformer import attend

OUT_INITS = {"xavier": nn.initializers.xavier_uniform(), "zeros": nn.initializers.zeros}


class CrossAttention(nn.Module):
    """Multi-head attention from one query to keys and values of different modalities, `[b, D]`.

    Takes the query `[b, D]`, keys `[b, K, d]`, values `[b, K, e]` and the attention mask, bool `[b, K]`.
    """

    heads: int
    bias: bool
    out_init: str
    dtype: Any

    @nn.compact
    def __call__(self, query, keys, values, mask):
        width = query.shape[-1]

        def project(name, x):
            shape = (self.heads, width // self.heads)
            return Dense(
                shape, use_bias=self.bias, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name
            )(x)

        q = project("query", query[:, None])
        k = project("key", keys)
        v = project("value", values)
        x = attend(q, k, v, mask[:, None, None])
        init = OUT_INITS[self.out_init]
        return Dense(width, axes=2, use_bias=self.bias, dtype=self.dtype, kernel_init=init, name="out")(x)[:, 0]


class RetrievalAugmentation(nn.Module):
    """Retrieval augmentation of image embeddings, `z + a_T + a_I`, float32 `[b, D]`.

    Both terms are cross attentions from the image embedding to its K retrieved neighbours. For a_T the keys are the
    images of the neighbours and the values their texts. For a_I the keys are the texts and the values the images.

    A call takes the embeddings `z[b, D]` before normalisation, the features `images[b, K, d_i]` and `texts[b, K, d_t]`
    of the neighbours, and `mask`, bool `[b, K]`, True at valid neighbours. Without a valid neighbour the result is `z`.

    Attributes:
      heads: heads of the cross attentions; they divide D.
      layers: number of layers. ReLU follows each one except the last.
      bias: biases in the linear layers of the cross attentions.
      pre_ln: layer norm of the query.
      out_init: initialiser of the output layers, a key of `OUT_INITS`. With `zeros` training starts as CLIP.
      dtype: dtype of the cross attentions.
    """

    heads: int
    layers: int = 1
    bias: bool = False
    pre_ln: bool = False
    out_init: str = "xavier"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z, images, texts, mask):
        augmented = mask.any(1, keepdims=True)
        for i in range(self.layers):
            query = nn.LayerNorm(epsilon=1e-5, name=f"ln_{i}")(z) if self.pre_ln else z
            read = [
                CrossAttention(self.heads, self.bias, self.out_init, self.dtype, name=f"{name}_{i}")(
                    query, keys, values, mask
                )
                for name, keys, values in (("text", images, texts), ("image", texts, images))
            ]
            y = z + jnp.where(augmented, sum(read).astype(jnp.float32), 0)
            z = jnp.where(augmented, nn.relu(y), y) if i < self.layers - 1 else y
        return z
