"""Vision transformer with the switches that tell the published CLIP-like image towers apart."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.common import ACTIVATIONS, sincos_2d, torch_conv
from clip_jax.models.transformer import Block, MapHead, apply_blocks, block_init, only_at, project

POOLS = ("cls", "gap", "mean_all", "map")
POSEMBS = ("learn", "sincos2d")


def patches(x, size, stride):
    """Cuts `x[b, h, w, c]` into patches, `[b, rows, cols, size * size * c]`, rows of a patch first.

    With the product with a kernel that follows it is a convolution; written as one matrix product it is as fast on an
    accelerator and, with its gradient, several times faster on a CPU.
    """
    rows, cols = (x.shape[1] - size) // stride + 1, (x.shape[2] - size) // stride + 1
    if size == stride:
        b, c = x.shape[0], x.shape[3]
        x = x[:, : rows * size, : cols * size].reshape(b, rows, size, cols, size, c)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, cols, size * size * c)
    taps = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(taps, axis=-1)


class PatchEmbed(nn.Module):
    """Linear embedding of patches, `[b, h, w, c] -> [b, h/P, w/P, D]`; the kernel has a convolution's shape `[P, P, c, D]`."""

    width: int
    patch: int
    bias: bool
    dtype: Any = jnp.float32
    kernel_init: Any = torch_conv

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (self.patch, self.patch, x.shape[-1], self.width))
        y = patches(x.astype(self.dtype), self.patch, self.patch) @ kernel.reshape(-1, self.width).astype(self.dtype)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return y


class ConvStem(nn.Module):
    """Early convolutions in the place of the patch embedding (Xiao et al. 2021, "Early Convolutions Help Transformers See Better").

    One 3x3 convolution of stride 2, layer norm and activation per entry of `channels`, then a linear map to the width:
    the patch size is `2 ** len(channels)`.
    """

    channels: tuple[int, ...]
    width: int
    act: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        for i, channels in enumerate(self.channels):
            x = patches(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
            x = nn.Dense(
                channels, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=f"conv_{i}"
            )(x)
            x = ACTIVATIONS[self.act](nn.LayerNorm(dtype=self.dtype, name=f"ln_{i}")(x))
        return nn.Dense(self.width, dtype=self.dtype, name="out")(x)


def embed_patches(tower, images, bias, kernel_init=torch_conv):
    """`[b, h, w, 3] -> [b, rows, columns, D]` by the `stem` of `tower`, or else by patches; called inside its compact method."""
    if tower.stem:
        return ConvStem(tuple(tower.stem), tower.width, tower.act, tower.dtype, name="stem")(images)
    return PatchEmbed(tower.width, tower.patch, bias, tower.dtype, kernel_init, name="patch")(images)


class VisionTransformer(nn.Module):
    """Image tower: normalised `[b, size, size, 3]` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the pooled output after the last layer norm, projected unless `embed_dim` is 0, not normalised. Without
    `tokens` None comes in their place, which saves work where one of them is pooled.

    `pool`: `cls` (class token), `gap` (mean of patch tokens), `mean_all` (mean of all tokens, FLIP), `map`
    (attention pooling, SigLIP). `cls_token` may be on without being pooled. `patch_drop` keeps a random part of the
    patches in training (FLIP); which ones is drawn per example from `keys[b]`. `qk_norm`: layer norms on each head's
    queries and keys (LaCLIP).
    """

    size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    embed_dim: int
    proj_bias: bool = False
    pool: str = "cls"
    cls_token: bool = True
    ln_pre: bool = True
    patch_bias: bool = False
    posemb: str = "learn"
    act: str = "quick_gelu"
    ln_eps: float = 1e-5
    weight_init: str = "clip_image"
    stem: tuple[int, ...] = ()
    patch_drop: float = 0.0
    qk_norm: bool = False
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"
    tokens: bool = True

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        x = embed_patches(
            self,
            images,
            self.patch_bias,
            nn.initializers.lecun_normal() if self.weight_init == "xavier" else torch_conv,
        )
        b, rows, cols, width = x.shape
        x = x.reshape(b, rows * cols, width)
        scale = nn.initializers.normal(width**-0.5)
        extra = int(self.cls_token)
        if self.posemb == "learn":
            pos = self.param("pos", scale, (1, rows * cols + extra, width))
        else:
            pos = jnp.pad(sincos_2d(rows, cols, width), ((extra, 0), (0, 0)))[None]
        pos = pos.astype(x.dtype)
        x = x + pos[:, extra:]
        if train and self.patch_drop:
            x = drop_patches(x, self.patch_drop, keys)
        if self.cls_token:
            cls = self.param("cls", scale, (1, 1, width)).astype(x.dtype) + pos[:, :1]
            x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, width)), x], axis=1)
        if self.ln_pre:
            x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_pre")(x)
        init = block_init(self.weight_init, width, self.mlp_dim, self.depth)
        block = functools.partial(
            Block,
            self.heads,
            self.mlp_dim,
            self.act,
            self.ln_eps,
            init,
            dtype=self.dtype,
            attention=self.attention,
            qk_norm=self.qk_norm,
        )
        only = only_at(self, 0 if self.pool == "cls" else None)
        x = apply_blocks(self, lambda name: block(name=name), x, only=only)
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_post")(x)
        pooled = {
            "cls": lambda: x[:, 0],
            "gap": lambda: x[:, extra:].mean(1),
            "mean_all": lambda: x.mean(1),
            "map": lambda: MapHead(self.heads, self.mlp_dim, self.act, self.ln_eps, self.dtype, name="map")(x),
        }[self.pool]()
        return project(pooled, self.embed_dim, self.proj_bias, self.dtype), x if self.tokens else None


def drop_patches(x, drop, keys):
    """Keeps `round(n * (1 - drop))` of the tokens of `x[b, n, D]`, in order, drawn per example with `keys[b]` (FLIP)."""
    n = x.shape[1]
    keep = max(1, round(n * (1 - drop)))
    index = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, n)[:keep]))(keys)
    return jnp.take_along_axis(x, index[..., None], axis=1)
