"""Projection and prediction heads with batch normalisation, as in the SimSiam and MoCo family. They see the whole batch at once."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import BatchNorm, torch_uniform


class MlpHead(nn.Module):
    """An MLP with batch norm and ReLU after every layer but the last, `[B, ..., D] -> float32 [B, ..., widths[-1]]`.

    The defaults are those of MoCo v3 (Chen et al. 2021): linear layers `fc1`, `fc2`, ... without bias, and after the last one a
    batch norm without scale and shift. `last_norm` may also be `affine` (SimSiam's projector) or `none` (its predictor, whose
    last layer has a bias). What lies between the first and the last axis shares the statistics: `[B, 2, D]` of two modalities.
    """

    widths: tuple[int, ...]
    bias: bool = False
    last_norm: str = "plain"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate(self.widths, 1):
            last, init = i == len(self.widths), torch_uniform(x.shape[-1])
            bias = self.bias or (last and self.last_norm == "none")
            x = nn.Dense(width, bias, dtype=self.dtype, kernel_init=init, bias_init=init, name=f"fc{i}")(x)
            if not last:
                x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train))
            elif self.last_norm != "none":
                x = BatchNorm(affine=self.last_norm == "affine", name=f"bn{i}")(x, train)
        return x.astype(jnp.float32)
