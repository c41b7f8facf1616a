"""EfficientNet (Tan & Le 2019) and EfficientNet-lite0 as image towers.

ALIGN's image tower is an EfficientNet without the top convolution (Jia et al. 2021, section 4.2).
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import BatchNorm, drop, shard_batch
from clip_jax.models.conv import Conv
from clip_jax.models.layers import Dense, multiply
from clip_jax.models.transformer import project, rematerialized

#: Stages of B0 as (channels, blocks, kernel, stride, expansion). The coefficients scale channels and blocks.
STAGES = (
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)
STEM = 32
PADDINGS = ("same", "even")
INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
# The fan-in of a depthwise kernel [k, k, 1, c] equals the fan-out of one of its filters.
DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def scaled(channels, coefficient):
    """Returns `channels * coefficient` rounded to a multiple of 8, but to no less than 90 % of it."""
    channels = channels * coefficient
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def has_first_residual(stages, width_coefficient):
    """Whether the shapes of the first block of some stage allow a residual connection."""
    outputs = [scaled(channels, width_coefficient) for channels in (STEM, *(stage[0] for stage in stages))]
    return any(stage[3] == 1 and outputs[i] == outputs[i + 1] for i, stage in enumerate(stages))


def conv(x, features, size, stride, padding, dtype, name, depthwise=False):
    """Applies a convolution without bias and with the padding of TensorFlow's SAME.

    With the padding `even` a stride of 2 pads an image of odd size like one of even size.
    """
    pad = ((size // 2 - 1, size // 2),) * 2 if padding == "even" and stride == 2 else None
    return Conv(features, size, stride, pad, depthwise, dtype, DEPTHWISE_INIT if depthwise else INIT, name=name)(x)


class MBConv(nn.Module):
    """Inverted bottleneck: 1x1 expansion, depthwise convolution, squeeze and excitation, 1x1 projection.

    `[b, h, w, c] -> [b, h/stride, w/stride, features]`. Where input and output have the same shape there is a residual
    connection, unless `residual` is False.

    Attributes:
      features: channels of the output.
      size, stride: of the depthwise convolution.
      expansion: factor of the channels in the bottleneck; 1 omits the expansion.
      index: number of the block, for the PRNG keys.
      drop_rate: stochastic depth, the chance in training that an example skips the block.
      padding, bn_group: as in `EfficientNet`.
    """

    features: int
    size: int
    stride: int
    expansion: int
    index: int
    drop_rate: float
    padding: str = "same"
    bn_group: int = 0
    dtype: Any = jnp.float32
    residual: bool = True
    squeeze, act = True, staticmethod(nn.silu)  # without annotation, so that they are no fields of a configuration

    @nn.compact
    def __call__(self, x, train=False, keys=None, place=None):
        """Applies the block. `place`, `(index, drop_rate)` as arrays, replaces the fields in a scan over blocks."""
        index, drop_rate = place or (self.index, self.drop_rate)

        def norm(y, name):
            return BatchNorm(0.99, 1e-3, self.bn_group, self.dtype, name=name)(y, train)

        x = y = shard_batch(x)
        width = x.shape[-1]
        if self.expansion != 1:
            y = conv(y, width * self.expansion, 1, 1, self.padding, self.dtype, "expand_conv")
            y = self.act(norm(y, "expand_bn"))
        y = conv(y, y.shape[-1], self.size, self.stride, self.padding, self.dtype, "depthwise_conv", depthwise=True)
        y = self.act(norm(y, "depthwise_bn"))
        if self.squeeze:
            squeezed = Dense(max(1, width // 4), dtype=self.dtype, kernel_init=INIT, name="se_reduce")(y.mean((1, 2)))
            excited = Dense(y.shape[-1], dtype=self.dtype, kernel_init=INIT, name="se_expand")(self.act(squeezed))
            y = multiply(y, nn.sigmoid(excited)[:, None, None])
        y = norm(conv(y, self.features, 1, 1, self.padding, self.dtype, "project_conv"), "project_bn")
        if self.residual and self.stride == 1 and width == self.features:
            y = x + drop(y, drop_rate, keys if train and self.drop_rate else None, index, whole=True)
        return y


class EfficientNet(nn.Module):
    """Image tower: normalised images -> `(embedding float32 [b, embed_dim], feature map [b, n, width])`.

    The images are `[b, size, size, 3]`. The embedding is the mean of the feature map, projected unless `embed_dim` is
    0. It does not have unit length.

    Attributes:
      width_coefficient, depth_coefficient: factors of the channels and blocks of `stages`.
      stages: `(channels, blocks, kernel, stride, expansion)` of each stage.
      stochastic_depth: block i of N is dropped with the chance `stochastic_depth * i / N`, drawn per example.
      padding: `same` (TensorFlow, the published training code) or `even` (Hugging Face's AlignModel). They differ where
        a stride of 2 meets an odd size.
      first_residual: whether the first block of a stage has a residual connection where its shapes allow one. In
        Hugging Face's AlignModel it has none.
      bn_group: `group` of `BatchNorm`.
      proj_init: as in `clip_jax.models.bert.BertTower`.
      remat: as `config.model`.
      scan: runs the blocks of a stage after its first one in a loop, with stacked parameters.
    """

    size: int
    embed_dim: int
    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    stages: tuple[tuple[int, ...], ...] = STAGES
    stochastic_depth: float = 0.2
    padding: str = "same"
    first_residual: bool = True
    bn_group: int = 0
    proj_bias: bool = True
    proj_init: str = "clip"
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    # Without annotation, so that they are no fields. `top`: channels of a convolution after the last block, 0 for none.
    block = MBConv
    act = staticmethod(nn.silu)
    top = 0

    @property
    def width(self):
        """The channels of the feature map."""
        return self.top or scaled(self.stages[-1][0], self.width_coefficient)

    @nn.compact
    def __call__(self, images, train=False, keys=None):
        x = conv(
            images.astype(self.dtype), scaled(STEM, self.width_coefficient), 3, 2, self.padding, self.dtype, "stem_conv"
        )
        x = self.act(BatchNorm(0.99, 1e-3, self.bn_group, self.dtype, name="stem_bn")(x, train))
        block = rematerialized(self.block, self.remat, static_argnums=2, prevent_cse=not self.scan)
        repeats = [math.ceil(blocks * self.depth_coefficient) for _, blocks, *_ in self.stages]
        i = 0
        for (channels, _, size, stride, expansion), blocks in zip(self.stages, repeats, strict=True):
            features = scaled(channels, self.width_coefficient)
            rates = [self.stochastic_depth * k / sum(repeats) for k in range(i, i + blocks)]
            shared = dict(expansion=expansion, padding=self.padding, bn_group=self.bn_group, dtype=self.dtype)
            make = functools.partial(block, features, size, **shared)
            first = dict(stride=stride, residual=self.first_residual)
            x = make(**first, index=i, drop_rate=rates[0], name=f"mbconv_{i}")(x, train, keys)
            if self.scan and blocks > 1:
                layers = nn.scan(
                    lambda block, x, keys, place: (block(x, train, keys, place), None),
                    length=blocks - 1,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    in_axes=(nn.broadcast, 0),
                )
                first = make(stride=1, index=i + 1, drop_rate=rates[1], name=f"mbconv_{i + 1}_to_{i + blocks - 1}")
                x = layers(first, x, keys, (jnp.arange(i + 1, i + blocks), jnp.asarray(rates[1:])))[0]
            else:
                for k, rate in enumerate(rates[1:], i + 1):
                    x = make(stride=1, index=k, drop_rate=rate, name=f"mbconv_{k}")(x, train, keys)
            i += blocks
        if self.top:
            x = conv(x, self.top, 1, 1, self.padding, self.dtype, "top_conv")
            x = self.act(BatchNorm(0.99, 1e-3, self.bn_group, self.dtype, name="top_bn")(x, train))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return project(x.mean(1), self.embed_dim, self.proj_bias, self.dtype, self.proj_init), x


class LiteMBConv(MBConv):
    """The block of EfficientNet-lite."""

    squeeze, act = False, staticmethod(nn.relu6)


class EfficientNetLite(EfficientNet):
    """EfficientNet-lite: no squeeze and excitation, ReLU6, a top convolution. The default coefficients give lite0."""

    block = LiteMBConv
    act = staticmethod(nn.relu6)
    top = 1280
