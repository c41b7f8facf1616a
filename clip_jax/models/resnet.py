"""CLIP's modified ResNet: three-convolution stem, anti-aliased strides, attention pooling (Radford et al. 2021, section 2.4)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import BatchNorm, shard_batch, torch_conv, torch_uniform
from clip_jax.models.transformer import attend, rematerialized

HEAD_WIDTH = 64


def conv(features, size, dtype, name, stride=1):
    """A convolution without bias, padded as in PyTorch by `size // 2` on each side."""
    pad = size // 2
    return nn.Conv(
        features, (size, size), stride, [(pad, pad)] * 2, use_bias=False, dtype=dtype, kernel_init=torch_conv, name=name
    )  # fmt: skip


def average(x, stride):
    """Mean over windows of `stride` by `stride` pixels; identity for 1."""
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and an average over 2x2: `[b, h, w, 3] -> [b, h/4, w/4, width]`."""

    width: int
    bn_group: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for i, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = conv(features, 3, self.dtype, f"conv{i}", stride)(x)
            x = nn.relu(BatchNorm(group=self.bn_group, dtype=self.dtype, name=f"bn{i}")(x, train))
        return average(x, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution to `4 * width` channels, all of stride 1; the stride is an average before the third."""

    width: int
    stride: int = 1
    bn_group: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name, scale_init=nn.initializers.ones):
            return BatchNorm(group=self.bn_group, dtype=self.dtype, scale_init=scale_init, name=name)

        x = shard_batch(x)
        y = nn.relu(norm("bn1")(conv(self.width, 1, self.dtype, "conv1")(x), train))
        y = nn.relu(norm("bn2")(conv(self.width, 3, self.dtype, "conv2")(y), train))
        y = norm("bn3", nn.initializers.zeros)(
            conv(4 * self.width, 1, self.dtype, "conv3")(average(y, self.stride)), train
        )
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            x = conv(4 * self.width, 1, self.dtype, "downsample_conv")(average(x, self.stride))
            x = norm("downsample_bn")(x, train)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Attention from the first token to all, `[b, n, D] -> [b, embed_dim]`, heads of width 64.

    The first token is the mean of the others, which is put before them. Without `positions` it is given, the tokens have no position
    embedding, and those where `mask` (bool `[b, n]`) is False are not attended to.
    """

    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, positions=True, mask=None):
        width = x.shape[-1]
        normal, bias = nn.initializers.normal(width**-0.5), torch_uniform(width)
        if positions:
            pos = self.param("pos", normal, (1, x.shape[1] + 1, width))
            x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + pos.astype(x.dtype)
        mask = None if mask is None else mask[:, None, None]

        def heads(name, x):
            shape = (width // HEAD_WIDTH, HEAD_WIDTH)
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=normal, bias_init=bias, name=name)(x)

        q, k, v = heads("query", x[:, :1]), heads("key", x), heads("value", x)
        y = attend(q, k, v, mask)[:, 0]
        out = nn.DenseGeneral(
            self.embed_dim, axis=(-2, -1), dtype=self.dtype, kernel_init=normal, bias_init=bias, name="out"
        )
        return out(y)


class ModifiedResNet(nn.Module):
    """Image tower: normalised `[b, size, size, 3]` -> `(embedding float32 [b, embed_dim], feature map [b, n, 32 * width])`.

    Four stages of `layers` bottlenecks; `size` a multiple of 32. The attention pooling is the projection. `bn_group` as
    `group` of `BatchNorm`.
    """

    size: int
    embed_dim: int
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bn_group: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        del keys  # nothing in it is random
        x = self.feature_map(images, train)
        embedding = AttentionPool(self.embed_dim, self.dtype, name="pool")(x)
        return embedding.astype(jnp.float32), x

    def feature_map(self, images, train):
        """What is pooled, `[b, n, 32 * width]`; called inside `__call__`."""
        x = Stem(self.width, self.bn_group, self.dtype, name="stem")(images.astype(self.dtype), train)
        block = rematerialized(Bottleneck, self.remat, static_argnums=2)
        for i, blocks in enumerate(self.layers):
            for j in range(blocks):
                stride = 2 if i and not j else 1
                x = block(self.width * 2**i, stride, self.bn_group, self.dtype, name=f"layer_{i + 1}_{j}")(x, train)
        return x.reshape(x.shape[0], -1, x.shape[-1])
