"""Vision transformer whose fields cover the differences between the published CLIP-like image towers."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.common import ACTIVATIONS, sincos_2d, torch_conv
from clip_jax.models.layers import Dense, add, matmul
from clip_jax.models.transformer import Block, MapHead, apply_blocks, block_init, only_at, project

POOLS = ("cls", "gap", "mean_all", "map")
POSEMBS = ("learn", "sincos2d", "sincos2d_moco")


def patches(x, size, stride):
    """Cuts images into patches.

    Followed by the product with a kernel this is a convolution. As a matrix product it is as fast on an accelerator,
    and on a CPU, including its gradient, several times faster.

    Args:
      x: `[b, h, w, c]`.
      size: height and width of a patch in pixels.
      stride: distance of neighbouring patches in pixels.

    Returns:
      `[b, rows, cols, size * size * c]`, the pixels of a patch in row-major order. Incomplete patches are left out.
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
    """Linear embedding of patches, `[b, h, w, c] -> [b, h/P, w/P, D]`, with a convolution's kernel `[P, P, c, D]`."""

    width: int
    patch: int
    bias: bool
    dtype: Any = jnp.float32
    kernel_init: Any = torch_conv

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (self.patch, self.patch, x.shape[-1], self.width))
        y = matmul(patches(x.astype(self.dtype), self.patch, self.patch), kernel.reshape(-1, self.width))
        return add(y, self.param("bias", nn.initializers.zeros, (self.width,))) if self.bias else y


class ConvStem(nn.Module):
    """Convolutions instead of the patch embedding.

    Xiao et al. 2021, "Early Convolutions Help Transformers See Better". `[b, h, w, c] -> [b, h/P, w/P, width]` with the
    patch size P `2 ** len(channels)`: for each entry of `channels` a 3x3 convolution of stride 2, layer norm and
    activation, then a linear map to `width`.
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
            x = Dense(channels, False, dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=f"conv_{i}")(x)
            x = ACTIVATIONS[self.act](nn.LayerNorm(dtype=self.dtype, name=f"ln_{i}")(x))
        return Dense(self.width, dtype=self.dtype, name="out")(x)


def embed_patches(tower, images, bias, kernel_init=torch_conv):
    """Embeds images by `tower.stem`, or without a stem by patches, `[b, h, w, 3] -> [b, rows, cols, D]`.

    Call it inside the compact method of `tower`.

    Args:
      tower: module with the fields `stem`, `width`, `patch`, `act` and `dtype`.
      images: `[b, h, w, 3]`.
      bias, kernel_init: of the patch embedding.
    """
    if tower.stem:
        return ConvStem(tuple(tower.stem), tower.width, tower.act, tower.dtype, name="stem")(images)
    return PatchEmbed(tower.width, tower.patch, bias, tower.dtype, kernel_init, name="patch")(images)


class VisionTransformer(nn.Module):
    """Image tower: normalised images `[b, size, size, 3]` -> `(embedding float32 [b, embed_dim], tokens [b, n, D])`.

    The embedding is the pooled output after the last layer norm, projected unless `embed_dim` is 0. It does not have
    unit length. The tokens are the output before pooling.

    Attributes:
      pool: `cls` (class token), `gap` (mean of the patch tokens), `mean_all` (mean of all tokens; FLIP) or `map`
        (attention pooling; SigLIP).
      cls_token: puts a class token before the patches. `pool="cls"` requires it.
      ln_pre: layer norm before the first block.
      patch_bias: bias of the patch embedding.
      posemb: position embedding, `learn` (learned), or fixed: `sincos2d` (big_vision) or `sincos2d_moco` (MoCo v3, MAE,
        FLIP), see `sincos_2d`.
      weight_init: see `block_init` and `token_inits`.
      stem: channels of a `ConvStem`, which replaces the patch embedding.
      patch_drop: share of the patches that training drops (FLIP, patch dropout), drawn per example from `keys[b]`.
      qk_norm: layer norms on the queries and keys of each head (LaCLIP).
      registers: number of learned tokens between the class token and the patches, which have no position and are no
        part of the result (Darcet et al. 2024, "Vision Transformers Need Registers").
      layer_scale: above 0, the first value of the factors of each block's branches, see `Block` (DINOv2: 1e-5).
      token_norm: whether the tokens are those after the last layer norm (FILIP) or before it (Sense-GVT/DeCLIP).
      remat, scan, attention: as `config.model`.
      tokens: False returns None instead of the tokens. With `pool="cls"` this saves work in the last block.
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
    registers: int = 0
    layer_scale: float = 0.0
    token_norm: bool = True
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    attention: str = "plain"
    tokens: bool = True

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        patch_init, cls_init, pos_init = token_inits(self.weight_init, self.width)
        x = embed_patches(self, images, self.patch_bias, patch_init)
        b, rows, cols, width = x.shape
        x = x.reshape(b, rows * cols, width)
        extra = int(self.cls_token)
        if self.posemb == "learn":
            pos = self.param("pos", pos_init, (1, rows * cols + extra, width))
        else:
            table = sincos_2d(rows, cols, width, includes_last=self.posemb == "sincos2d")
            pos = jnp.pad(table, ((extra, 0), (0, 0)))[None]
        x = add(x, pos[:, extra:])
        if train and self.patch_drop:
            x = drop_patches(x, self.patch_drop, keys)
        first = [self.param("cls", cls_init, (1, 1, width)) + pos[:, :1]] if self.cls_token else []
        first += [self.param("registers", cls_init, (1, self.registers, width))] if self.registers else []
        x = jnp.concatenate([*(jnp.broadcast_to(t, (b, *t.shape[1:])) for t in first), x], axis=1)
        if self.ln_pre:
            x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_pre")(x)
        init = block_init(self.weight_init, width, self.mlp_dim, self.depth)
        fields = self.heads, self.mlp_dim, self.act, self.ln_eps, init
        options = dict(attention=self.attention, qk_norm=self.qk_norm, layer_scale=self.layer_scale)
        block = functools.partial(Block, *fields, dtype=self.dtype, **options)
        only = only_at(self, 0 if self.pool == "cls" else None)
        x = apply_blocks(self, block, x, only=only)
        if self.registers and only is None:
            x = jnp.concatenate([x[:, :extra], x[:, extra + self.registers :]], axis=1)
        tokens = x
        x = nn.LayerNorm(epsilon=self.ln_eps, dtype=self.dtype, name="ln_post")(x)
        tokens = x if self.token_norm else tokens
        pooled = {
            "cls": lambda: x[:, 0],
            "gap": lambda: x[:, extra:].mean(1),
            "mean_all": lambda: x.mean(1),
            "map": lambda: MapHead(self.heads, self.mlp_dim, self.act, self.ln_eps, self.dtype, name="map")(x),
        }[self.pool]()
        pooled = project(pooled, self.embed_dim, self.proj_bias, self.dtype, self.weight_init)
        return pooled, tokens if self.tokens else None


def token_inits(scheme, width):
    """Returns the initialisers of the patch embedding, the class token and the learned positions, see `block_init`.

    They are PyTorch's default of a convolution and normal with standard deviation `width ** -0.5`, unless the code of
    `scheme` has others: `xavier` LeCun-normal patches (big_vision); `declip` positions of 0.01; `flip` patches that are
    Xavier-uniform as a matrix `[P * P * 3, width]`; `flip` and `timm_qk_norm` tokens and positions of 0.02.
    """
    std = 0.02 if scheme in ("flip", "timm_qk_norm") else width**-0.5
    patch = {"xavier": nn.initializers.lecun_normal(), "flip": _patch_xavier}.get(scheme, torch_conv)
    return patch, nn.initializers.normal(std), nn.initializers.normal(0.01 if scheme == "declip" else std)


def _patch_xavier(key, shape, dtype=jnp.float32):
    return nn.initializers.xavier_uniform()(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def drop_patches(x, drop, keys):
    """Patch dropout (FLIP: Li et al. 2023): keeps `round(n * (1 - drop))`, at least 1, of n tokens, in order.

    Args:
      x: `[b, n, D]`.
      drop: share of the tokens to drop.
      keys: PRNG keys `[b]`; the tokens are drawn per example.
    """
    n = x.shape[1]
    keep = max(1, round(n * (1 - drop)))
    index = jax.vmap(lambda key: jnp.sort(jax.random.permutation(key, n)[:keep]))(keys)
    return jnp.take_along_axis(x, index[..., None], axis=1)
