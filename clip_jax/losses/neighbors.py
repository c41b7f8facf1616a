"""A first-in-first-out queue of embeddings, and exact nearest-neighbour search among rows that the devices share."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clip_jax.losses.contrastive import similarities
from clip_jax.losses.pairwise import TILE_ENTRIES, layout
from clip_jax.models.common import l2_normalize


def new_queue(rng, size, width):
    """Returns a queue of random unit vectors.

    Args:
      rng: PRNG key.
      size: number of rows Q.
      width: length D of a row.

    Returns:
      `{"rows": float32 [Q, D], "next": int32, "filled": int32}`: the rows, the position of the oldest one, and the
        number
      of rows that `enqueue` has written so far, at most Q.
    """
    rows = l2_normalize(jax.random.normal(rng, (size, width)))
    return {"rows": rows, "next": jnp.zeros((), jnp.int32), "filled": jnp.zeros((), jnp.int32)}


def enqueue(queue, x):
    """Returns the queue with its oldest rows replaced by those of `x[n, D]`, or by the last of them if n is larger."""
    size = len(queue["rows"])
    kept = min(len(x), size)
    places = (queue["next"] + len(x) - kept + jnp.arange(kept)) % size
    return {
        "rows": queue["rows"].at[places].set(lax.stop_gradient(x[len(x) - kept :]).astype(jnp.float32)),
        "next": (queue["next"] + len(x)) % size,
        "filled": jnp.minimum(queue["filled"] + len(x), size),
    }


def nearest(queries, rows):
    """Returns the row with the largest dot product with each query; the first of several equal ones.

    Args:
      queries: `[B, D]`.
      rows: `[Q, D]`.

    Returns:
      `(rows [B, D], their indices int32 [B])`, without a gradient.
    """
    index = top_k(queries, rows, 1)[1]
    return take(rows, index)[:, 0], index[:, 0]


def top_k(queries, rows, k, count=None, approximate=False):
    """Returns the k rows with the largest dot products with each query, best first. Ties go to the lower index.

    Under a mesh in use every device searches its share of the rows, in blocks, for all queries. The devices exchange
    queries and results, never rows, and hold the scores of one block at a time.

    Args:
      queries: `[B, D]`.
      rows: `[Q, D]`.
      k: number of rows, at most Q.
      count: None, or the number of leading rows to search, at least k.
      approximate: misses a few of the rows, but is faster on a TPU (`jax.lax.approx_max_k`; exact elsewhere).

    Returns:
      `(dot products float32 [B, k], row indices int32 [B, k])`, without a gradient.
    """
    axes, _ = layout(len(queries), len(rows))
    fn = functools.partial(_top_k, axes, k, len(rows) if count is None else count, approximate)
    return _sharded(fn, axes)(*lax.stop_gradient((queries.astype(jnp.float32), rows)))


def take(rows, indices):
    """Returns `rows[indices]` for rows that the devices share. Every device contributes the rows that it holds.

    Args:
      rows: `[Q, ...]`.
      indices: int `[B, k]`.

    Returns:
      `[B, k, ...]`, without a gradient.
    """
    axes, _ = layout(len(indices), len(rows))
    return _sharded(functools.partial(_take, axes), axes)(indices, lax.stop_gradient(rows))


def _sharded(fn, axes):
    spec = PartitionSpec(axes)
    return jax.shard_map(fn, in_specs=(spec, spec), out_specs=spec, check_vma=False) if axes else fn


def _top_k(axes, k, count, approximate, queries, rows):
    """Runs on every device with its own queries and rows."""
    if axes:
        queries = lax.all_gather(queries, axes, tiled=True)
    size = max(1, min(len(rows), TILE_ENTRIES // len(queries)))
    blocks = math.ceil(len(rows) / size)
    first = (lax.axis_index(axes) if axes else 0) * len(rows)

    def search(best, block):
        start = jnp.minimum(block * size, len(rows) - size)  # the last block ends with the last row
        indices = start + jnp.arange(size, dtype=jnp.int32)
        valid = (indices >= block * size) & (first + indices < count)  # not in the block before, and within `count`
        scores = similarities(queries, lax.dynamic_slice_in_dim(rows, start, size).astype(jnp.float32))
        scores = jnp.where(valid, scores, -jnp.inf)
        if approximate:
            scores, place = lax.approx_max_k(scores, min(k, size))
            indices = indices[place]
        return _best(k, *best, scores, jnp.broadcast_to(first + indices, scores.shape)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    values, indices = lax.scan(search, none, jnp.arange(blocks))[0]
    if not axes:
        return values, indices
    # The results of the devices follow the order of their rows, so that ties still go to the lower index.
    values, indices = (lax.all_to_all(x, axes, 0, 1, tiled=True) for x in (values, indices))
    return _best(k, values, indices)


def _best(k, *pairs):
    """Returns the k largest values with their indices from the arguments `values, indices, values, indices, ...`."""
    values, indices = jnp.concatenate(pairs[::2], 1), jnp.concatenate(pairs[1::2], 1)
    values, place = lax.top_k(values, k)
    return values, jnp.take_along_axis(indices, place, axis=1)


def _take(axes, indices, rows):
    """Runs on every device with its own indices and rows."""
    if not axes:
        return rows[indices]
    indices = lax.all_gather(indices, axes, tiled=True) - lax.axis_index(axes) * len(rows)
    held = (indices >= 0) & (indices < len(rows))
    taken = jnp.where(jnp.expand_dims(held, range(2, rows.ndim + 1)), rows[jnp.where(held, indices, 0)], 0)
    return lax.psum_scatter(taken, axes, tiled=True)
