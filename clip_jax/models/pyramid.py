"""PyramidCLIP's image towers (Gao et al. 2022): CLIP's ViT and ResNet with a second input, features of image regions.

The input of a region is its features and its box (`clip_jax.data.views.RegionView`). A linear layer maps it to the
width of the tower. It passes through the last part of the tower only: the rear blocks of the ViT, the attention pooling
of the ResNet.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.models.common import ACTIVATIONS, BatchNorm, row_major, shard_batch, torch_uniform
from clip_jax.models.conv import Conv
from clip_jax.models.layers import Dense, add
from clip_jax.models.resnet import AttentionPool, ModifiedResNet
from clip_jax.models.transformer import Attention, Block, Init, block_init, project, rematerialized
from clip_jax.models.vit import embed_patches


class LeFF(nn.Module):
    """Locally-enhanced feed-forward, `[b, 1 + n, D] -> [b, 1 + n, D]`.

    Yuan et al. 2021, "Incorporating Convolution Designs into Visual Transformers", section 3.2. The class token comes
    first and passes through unchanged. The n patches pass through a linear layer to `mlp_dim`, a depthwise 3x3
    convolution on their square grid and a linear layer back to D, each followed by batch norm and activation.

    Raises UserError when n is not a square number.
    """

    mlp_dim: int
    act: str
    inits: Init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        cls, x = x[:, :1], x[:, 1:]
        b, n, width = x.shape
        side = math.isqrt(n)
        if side * side != n:
            raise UserError(f"LeFF needs a square grid of patches, not {n} patches")

        def norm(name, x):
            return ACTIVATIONS[self.act](BatchNorm(dtype=self.dtype, name=name)(x, train))

        x = Dense(
            self.mlp_dim, dtype=self.dtype, kernel_init=self.inits.fc1, bias_init=self.inits.mlp_bias_1, name="fc1"
        )(x)
        x = norm("bn1", x).reshape(b, side, side, self.mlp_dim)
        x = Conv(
            self.mlp_dim,
            3,
            padding=((1, 1), (1, 1)),
            depthwise=True,
            dtype=self.dtype,
            kernel_init=torch_uniform(9),
            name="conv",
        )(x)
        x = norm("bn2", x).reshape(b, n, self.mlp_dim)
        x = Dense(width, dtype=self.dtype, kernel_init=self.inits.fc2, bias_init=self.inits.mlp_bias_2, name="fc2")(x)
        return jnp.concatenate([cls, norm("bn3", x)], axis=1)


class LeFFBlock(nn.Module):
    """A pre-LN block with `LeFF` instead of the MLP, `[b, 1 + n, D] -> [b, 1 + n, D]`."""

    heads: int
    mlp_dim: int
    act: str
    ln_eps: float
    inits: Init
    dtype: Any = jnp.float32
    attention: str = "plain"

    @nn.compact
    def __call__(self, x, train=False):
        x = row_major(shard_batch(x))
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln1")(x)
        x = x + Attention(self.heads, self.inits, self.dtype, self.attention, name="attn")(y, y)
        y = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln2")(x)
        return x + LeFF(self.mlp_dim, self.act, self.inits, self.dtype, name="mlp")(y, train)


class PyramidViT(nn.Module):
    """Image tower: normalised images `[b, size, size, 3]` -> `(embedding float32 [b, embed_dim], None)`.

    It is CLIP's ViT with `LeFF` in the first `front` of the `depth` blocks. A call with `regions` `[b, m, region_dim]`
    ignores the images: the regions pass, together with the class token and without positions, through the other blocks.
    `mask`, bool `[b, m]`, is False at padding rows. The embedding is the projected class token. It does not have unit
    length.

    Attributes:
      region_dim: features of a region and its box.
      front: number of blocks with `LeFF`.
      stem: channels of a `ConvStem`, which replaces the patch embedding. The paper has none.
      remat, attention: as `config.model`.
    """

    size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    embed_dim: int
    region_dim: int = 2052
    front: int = 9
    stem: tuple[int, ...] = ()
    proj_bias: bool = False
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "plain"

    @nn.compact
    def __call__(self, images, train=False, keys=None, regions=None, mask=None):
        del keys  # this tower has no dropout
        scale = nn.initializers.normal(self.width**-0.5)
        cls = self.param("cls", scale, (1, 1, self.width))
        to_token = Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=scale, name="regions")
        init = block_init("clip_image", self.width, self.mlp_dim, self.depth)
        arguments = self.heads, self.mlp_dim, self.act, self.ln_eps, init
        if self.is_initializing():
            to_token(jnp.zeros((1, 1, self.region_dim)))
        if regions is None:
            x = embed_patches(self, images, bias=False)
            x = x.reshape(x.shape[0], -1, self.width)
            pos = self.param("pos", scale, (1, 1 + x.shape[1], self.width))
        else:
            x, pos = to_token(shard_batch(regions)), 0.0
        x = add(jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)).astype(x.dtype), x], axis=1), pos)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_pre")(x)
        if regions is None:
            block = rematerialized(LeFFBlock, self.remat, static_argnums=2)
            for i in range(self.front):
                x = block(*arguments, dtype=self.dtype, attention=self.attention, name=f"block_{i}")(x, train)
        elif mask is not None:
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)[:, None, None]
        block = rematerialized(Block, self.remat, static_argnums=3)
        for i in range(self.front, self.depth):
            only = 0 if i == self.depth - 1 else None  # the last block computes the class token alone
            x = block(*arguments, dtype=self.dtype, attention=self.attention, name=f"block_{i}")(x, mask, only)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_post")(x[:, 0])
        return project(x, self.embed_dim, self.proj_bias, self.dtype), None


class PyramidResNet(ModifiedResNet):
    """Image tower: CLIP's ResNet, which also takes `regions` `[b, m, region_dim]` and their `mask` like `PyramidViT`.

    The regions, preceded by their mean and without positions, pass through a layer norm of their own and the attention
    pooling. The tower returns no tokens.
    """

    region_dim: int = 2052
    ln_eps: float = 1e-5

    @nn.compact
    def __call__(self, images, train=False, keys=None, regions=None, mask=None):
        del keys  # this tower has no dropout
        width = 32 * self.width
        to_token = Dense(
            width, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.normal(width**-0.5), name="regions"
        )
        ln = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_pre")
        pool = AttentionPool(self.embed_dim, self.dtype, self.head_width, name="pool")
        if self.is_initializing():
            ln(to_token(jnp.zeros((1, 1, self.region_dim))))
        if regions is None:
            return pool(self.feature_map(images, train)).astype(jnp.float32), None
        x = to_token(shard_batch(regions))
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        count = jnp.maximum(mask.sum(1), 1)[:, None, None]
        mean = jnp.sum(x, axis=1, keepdims=True, where=mask[..., None]) / count.astype(x.dtype)
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        return pool(ln(jnp.concatenate([mean, x], axis=1)), positions=False, mask=mask).astype(jnp.float32), None
