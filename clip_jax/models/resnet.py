"""Residual networks: CLIP's modified one, and the plain one of ImageNet's classifiers.

CLIP's (Radford et al. 2021, section 2.4) has a deeper stem, anti-aliased strides and attention pooling.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import BatchNorm, shard_batch, torch_conv, torch_uniform
from clip_jax.models.conv import Conv
from clip_jax.models.layers import Dense, add
from clip_jax.models.transformer import attend, project, rematerialized


def conv(features, size, dtype, name, stride=1):
    """Returns a convolution module without bias, padded as in PyTorch by `size // 2` pixels on each side."""
    padding = ((size // 2, size // 2),) * 2
    return Conv(features, size, stride, padding, dtype=dtype, kernel_init=torch_conv, name=name)


def average(x, stride):
    """Returns the means over windows of `stride` x `stride` pixels; for 1, `x`."""
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Stem(nn.Module):
    """Three 3x3 convolutions, the first of stride 2, and a 2x2 mean, `[b, h, w, 3] -> [b, h/4, w/4, width]`."""

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
    """A bottleneck of three convolutions, `[b, h, w, c] -> [b, h/stride, w/stride, 4 * width]`.

    With `blur`, the 1x1, 3x3 and 1x1 convolutions all have stride 1, and average pooling before the third one replaces
    a stride. Without it the 3x3 convolution and that of the shortcut have the stride.
    """

    width: int
    stride: int = 1
    bn_group: int = 0
    dtype: Any = jnp.float32
    blur: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name, scale_init=nn.initializers.ones):
            return BatchNorm(group=self.bn_group, dtype=self.dtype, scale_init=scale_init, name=name)

        x = shard_batch(x)
        window, stride = (self.stride, 1) if self.blur else (1, self.stride)
        y = nn.relu(norm("bn1")(conv(self.width, 1, self.dtype, "conv1")(x), train))
        y = nn.relu(norm("bn2")(conv(self.width, 3, self.dtype, "conv2", stride)(y), train))
        y = norm("bn3", nn.initializers.zeros)(conv(4 * self.width, 1, self.dtype, "conv3")(average(y, window)), train)
        if self.stride > 1 or x.shape[-1] != 4 * self.width:
            x = conv(4 * self.width, 1, self.dtype, "downsample_conv", stride)(average(x, window))
            x = norm("downsample_bn")(x, train)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Attention pooling, `[b, n, D] -> [b, embed_dim]`: the first token attends to all.

    By default the tower puts the mean of the tokens first and adds a learned position embedding. Without `positions`
    the caller supplies the first token, and there is no position embedding. Where `mask`, bool `[b, n]`, is False, a
    token is not attended to.
    """

    embed_dim: int
    dtype: Any = jnp.float32
    head_width: int = 64

    @nn.compact
    def __call__(self, x, positions=True, mask=None):
        width = x.shape[-1]
        normal, bias = nn.initializers.normal(width**-0.5), torch_uniform(width)
        if positions:
            pos = self.param("pos", normal, (1, x.shape[1] + 1, width))
            x = add(jnp.concatenate([x.mean(1, keepdims=True), x], axis=1), pos)
        mask = None if mask is None else mask[:, None, None]

        def heads(name, x):
            shape = (width // self.head_width, self.head_width)
            return Dense(shape, dtype=self.dtype, kernel_init=normal, bias_init=bias, name=name)(x)

        q = heads("query", x[:, :1])
        k = heads("key", x)
        v = heads("value", x)
        y = attend(q, k, v, mask)[:, 0]
        out = Dense(self.embed_dim, axes=2, dtype=self.dtype, kernel_init=normal, bias_init=bias, name="out")
        return out(y)


class ModifiedResNet(nn.Module):
    """Image tower: normalised images -> `(embedding float32 [b, embed_dim], feature map [b, n, 32 * width])`.

    The images are `[b, size, size, 3]`. The output layer of the attention pooling is the projection. The embedding does
    not have unit length.

    Attributes:
      size: height and width of the images in pixels, a multiple of 32.
      layers: number of bottlenecks in each of the four stages.
      width: channels of the stem.
      head_width: width of a head of the attention pooling.
      bn_group: `group` of `BatchNorm`.
      remat: as `config.model`.
    """

    size: int
    embed_dim: int
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    head_width: int = 64
    bn_group: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        del keys  # this tower has no dropout
        x = self.feature_map(images, train)
        embedding = AttentionPool(self.embed_dim, self.dtype, self.head_width, name="pool")(x)
        return embedding.astype(jnp.float32), x

    def feature_map(self, images, train):
        """Returns the output of the last stage, `[b, n, 32 * width]`. Call it inside `__call__`."""
        x = Stem(self.width, self.bn_group, self.dtype, name="stem")(images.astype(self.dtype), train)
        return stages(self, x, train, blur=True)


class PlainResNet(nn.Module):
    """Image tower: normalised images `[b, size, size, 3] -> (embedding float32 [b, embed_dim], feature map [b, n, D])`.

    The residual network of He et al. 2016 with bottlenecks, whose 3x3 convolutions have the strides ("v1.5"), as in
    torchvision and timm. D is `32 * width`. The embedding is the mean of the feature map, projected unless `embed_dim`
    is 0. It does not have unit length.

    Attributes:
      size, layers, bn_group, remat: as in `ModifiedResNet`. The size may be any.
      width: channels of the stem.
      proj_bias: whether the projection has a bias; it starts as a linear layer of PyTorch.
    """

    size: int
    embed_dim: int
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    bn_group: int = 0
    proj_bias: bool = True
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        del keys  # this tower has no dropout
        x = images.astype(self.dtype)
        x = Conv(self.width, 7, 2, ((3, 3), (3, 3)), dtype=self.dtype, kernel_init=torch_conv, name="conv1")(x)
        x = nn.relu(BatchNorm(group=self.bn_group, dtype=self.dtype, name="bn1")(x, train))
        x = stages(self, nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), train, blur=False)
        return project(x.mean(1), self.embed_dim, self.proj_bias, self.dtype, "torch"), x


def stages(tower, x, train, blur):
    """Returns the output of all bottlenecks of a residual network, `[b, n, 32 * width]`.

    Call it inside the compact method of `tower`, a module with the fields `layers`, `width`, `bn_group`, `dtype` and
    `remat`.

    Args:
      x: output of the stem, `[b, h, w, width]`.
      train: whether batch norm uses the statistics of the batch.
      blur: of `Bottleneck`.
    """
    block = rematerialized(Bottleneck, tower.remat, static_argnums=2)
    for i, blocks in enumerate(tower.layers):
        for j in range(blocks):
            fields = tower.width * 2**i, 2 if i and not j else 1, tower.bn_group, tower.dtype, blur
            x = block(*fields, name=f"layer_{i + 1}_{j}")(x, train)
    return x.reshape(x.shape[0], -1, x.shape[-1])
