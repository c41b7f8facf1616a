"""Entropic optimal transport between the two sides of a batch (OTTER: Wu et al. 2022), in the log domain and float32.

The similarities of all pairs are `S = rows @ cols^T - diagonal * I`. Sinkhorn's iterations store this matrix, each
device its own rows. Their results are potentials, one number per row and column, from which `divergence` recomputes the
targets tile by tile in memory linear in the batch. `S` receives no gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clip_jax.losses.contrastive import similarities
from clip_jax.losses.pairwise import Tile, layout, pairwise


class Plan(NamedTuple):
    """The transport plan `exp(S / reg + row[:, None] + col)`, of total mass 1.

    Attributes:
      row, col: potentials of the rows and columns, float32 `[B]`.
      log_mass: logarithms of the row sums, float32 `[B]`. With `row - log_mass` instead of `row` every row sums to 1;
        this is the target.
    """

    row: jax.Array
    col: jax.Array
    log_mass: jax.Array


def sinkhorn(rows, cols, reg, iterations, diagonal=0.0):
    """Returns the entropic transport `Plan` with uniform marginals after a number of Sinkhorn iterations.

    Each iteration normalises the rows, then the columns. Under a mesh in use every device stores its rows of the
    matrix, `[B / devices, B]`. The devices exchange one number per column.

    Args:
      rows, cols: float32 `[B, K]`, B at least 2.
      reg: weight of the entropy, which divides the similarities.
      iterations: number of iterations. With 0 the plan is the softmax of `S / reg` over all pairs.
      diagonal: subtracted from the similarity of row i and column i.
    """
    axes, _ = layout(len(rows))
    fn = functools.partial(_sinkhorn, axes, reg, iterations, diagonal)
    if axes:
        spec = PartitionSpec(axes)
        fn = jax.shard_map(fn, in_specs=(spec, spec), out_specs=Plan(spec, spec, spec), check_vma=False)
    return fn(*lax.stop_gradient((rows, cols)))


def _sinkhorn(axes, reg, iterations, diagonal, rows, cols):
    """Runs on every device with its own rows and columns."""
    b = len(rows)
    here = lax.axis_index(axes) if axes else 0
    if axes:
        cols = lax.all_gather(cols, axes, tiled=True)
    n = len(cols)
    own = here * b + jnp.arange(b)
    logits = (similarities(rows, cols) - diagonal * (own[:, None] == jnp.arange(n))) / reg

    def over_columns(x):
        """Returns the log-sum-exp over the rows of all devices."""
        largest = x.max(0)
        if not axes:
            return largest + jnp.log(jnp.exp(x - largest).sum(0))
        largest = lax.pmax(largest, axes)
        return largest + jnp.log(lax.psum(jnp.exp(x - largest).sum(0), axes))

    def iterate(_, potentials):
        _, col = potentials
        row = -jax.nn.logsumexp(logits + col, axis=1) - jnp.log(n)
        return row, -over_columns(logits + row[:, None]) - jnp.log(n)

    total = jax.nn.logsumexp(over_columns(logits))
    row, col = lax.fori_loop(0, iterations, iterate, (jnp.full(b, -total), jnp.zeros(n)))
    log_mass = jax.nn.logsumexp(logits + row[:, None] + col, axis=1)
    return Plan(row, lax.dynamic_slice_in_dim(col, here * b, b), log_mass)


def divergence(queries, keys, scale, rows, cols, plan, reg, diagonal=0.0):
    """Returns the mean over the rows of `KL(target || softmax(scale * queries @ keys^T))`, without storing the matrix.

    The targets are the rows of the plan, each divided by its sum.

    Args:
      queries, keys: unit vectors `[B, E]`. They receive a gradient.
      scale: scalar factor of their similarities. It receives a gradient.
      rows, cols, reg, diagonal: the arguments of `sinkhorn`.
      plan: the result of `sinkhorn`.

    Returns:
      A float32 scalar.
    """
    queries, keys, scale = (jnp.asarray(x, jnp.float32) for x in (queries, keys, scale))
    tile_fn = functools.partial(_divergence_tile, reg, diagonal)
    out = pairwise(tile_fn, scale, (queries, rows, plan.row - plan.log_mass), (keys, cols, plan.col))
    return jnp.mean(out.row_lse + out.row_sum)


def _divergence_tile(reg, diagonal, scale, row_side, col_side, i, j):
    (queries, *row_side), (keys, *col_side) = row_side, col_side
    (rows, row), (cols, col) = lax.stop_gradient((row_side, col_side))
    logits = scale * similarities(queries, keys)
    log_target = (similarities(rows, cols) - diagonal * (i == j)) / reg + row[:, None] + col
    target = jnp.exp(log_target)
    return Tile(row_lse=logits, row_sum=target * (log_target - logits))
