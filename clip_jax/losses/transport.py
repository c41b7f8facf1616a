"""Entropic optimal transport between the two sides of a batch (OTTER: Wu et al. 2022), in the log domain and float32.

The similarity of all pairs is that of two sets of vectors, `S = rows @ cols^T - diagonal * I`. Sinkhorn's iterations keep it, a
device its rows. What they give are potentials, numbers per row and column, from which `divergence` makes the targets again tile
by tile, in memory linear in the batch. The module's functions carry no gradient to `S`.
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
    """`exp(S / reg + row[:, None] + col)` is the transport plan, of total mass 1; each field float32 `[B]`.

    `log_mass` is the logarithm of the plan's row sums: less it, `row` gives the plan whose rows sum to 1, the target.
    """

    row: jax.Array
    col: jax.Array
    log_mass: jax.Array


def sinkhorn(rows, cols, reg, iterations, diagonal=0.0):
    """The entropic plan with uniform marginals after some of Sinkhorn's iterations, each of which fits the rows, then the columns.

    Under a mesh in use every device keeps its rows of the matrix, `[B / devices, B]`, and exchanges numbers per column alone.

    Args:
      rows, cols: float32 `[B, K]`, B at least 2.
      reg: the weight of the entropy; similarities are divided by it.
      iterations: 0: the plan is the softmax of `S / reg` over all pairs.
      diagonal: taken from the similarity of row i and column i.

    Returns:
      `Plan`.
    """
    axes, _ = layout(len(rows))
    fn = functools.partial(_sinkhorn, axes, reg, iterations, diagonal)
    if axes:
        spread = PartitionSpec(axes)
        fn = jax.shard_map(fn, in_specs=(spread, spread), out_specs=Plan(spread, spread, spread), check_vma=False)
    return fn(*lax.stop_gradient((rows, cols)))


def _sinkhorn(axes, reg, iterations, diagonal, rows, cols):
    """On every device with its own rows and columns."""
    b = len(rows)
    here = lax.axis_index(axes) if axes else 0
    if axes:
        cols = lax.all_gather(cols, axes, tiled=True)
    n = len(cols)
    own = here * b + jnp.arange(b)
    logits = (similarities(rows, cols) - diagonal * (own[:, None] == jnp.arange(n))) / reg

    def over_columns(x):
        """Log-sum-exp over all rows, those of other devices as well."""
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
    """The Kullback-Leibler divergence of softmax(scale * queries @ keys^T) from a plan's rows, the mean over the rows; no matrix is held.

    Args:
      queries, keys: unit vectors `[B, E]`; both get a gradient, as does the scalar `scale`.
      rows, cols, reg, diagonal: what `sinkhorn` was given.
      plan: what it gave.

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
