"""Projection and prediction heads with batch norm over the global batch, as in SimSiam and MoCo v3."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.common import BatchNorm, torch_uniform
from clip_jax.models.layers import Dense


class MlpHead(nn.Module):
    """An MLP with batch norm and ReLU after every layer except the last, `[B, ..., D] -> float32 [B, ..., widths[-1]]`.

    The defaults are those of MoCo v3 (Chen et al. 2021): no biases, and after the last layer a batch norm without scale
    and shift. All axes except the last share the statistics: in `[B, 2, D]`, two modalities do.

    Attributes:
      widths: outputs of the linear layers `fc1`, `fc2`, ...
      bias: gives every linear layer a bias.
      last_norm: batch norm after the last layer. `plain` has no parameters, `affine` has scale and shift (SimSiam's
        projector), `none` omits it and gives the last layer a bias (SimSiam's predictor).
      dtype: dtype of the linear layers.
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
            x = Dense(width, bias, dtype=self.dtype, kernel_init=init, bias_init=init, name=f"fc{i}")(x)
            if not last:
                x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train))
            elif self.last_norm != "none":
                x = BatchNorm(affine=self.last_norm == "affine", name=f"bn{i}")(x, train)
        return x.astype(jnp.float32)
