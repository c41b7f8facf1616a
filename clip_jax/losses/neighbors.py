"""A first-in-first-out queue of embeddings, and the nearest of them to each row of a batch."""

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
    """A queue of ``size`` random unit rows: ``{"rows": float32 [Q, D], "next": position of the oldest, "filled": rows put in so far}``."""
    rows = l2_normalize(jax.random.normal(rng, (size, width)))
    return {"rows": rows, "next": jnp.zeros((), jnp.int32), "filled": jnp.zeros((), jnp.int32)}


def enqueue(queue, x):
    """The queue with the rows of ``x [n, D]`` in the place of the oldest ones; of more rows than it has places, the last stay."""
    size = len(queue["rows"])
    kept = min(len(x), size)
    places = (queue["next"] + len(x) - kept + jnp.arange(kept)) % size
    return {
        "rows": queue["rows"].at[places].set(lax.stop_gradient(x[len(x) - kept :]).astype(jnp.float32)),
        "next": (queue["next"] + len(x)) % size,
        "filled": jnp.minimum(queue["filled"] + len(x), size),
    }


def nearest(queries, rows):
    """The row with the largest dot product with each query, ``(float32 [B, D], its number int32 [B])``, without a gradient.

    Under a mesh in use every device looks in its share of the rows, in blocks, for all queries: what goes around is the queries and
    what was found, never the rows. Of equal ones it is the first.

    Args:
      queries: ``[B, D]``.
      rows: ``[Q, D]``, of equal length.
    """
    axes, _ = layout(len(queries), len(rows))
    fn = functools.partial(_nearest, axes)
    if axes:
        spread = PartitionSpec(axes)
        fn = jax.shard_map(fn, in_specs=(spread, spread), out_specs=(spread, spread), check_vma=False)
    return fn(*lax.stop_gradient((queries.astype(jnp.float32), rows)))


def _nearest(axes, queries, rows):
    """On every device with its own queries and rows."""
    if axes:
        queries = lax.all_gather(queries, axes, tiled=True)
    size = max(1, min(len(rows), TILE_ENTRIES // len(queries)))
    blocks = math.ceil(len(rows) / size)

    def look(best, k):
        start = jnp.minimum(k * size, len(rows) - size)  # the last block ends with the last row
        found = similarities(queries, lax.dynamic_slice_in_dim(rows, start, size))
        new = found.max(1), start + found.argmax(1).astype(jnp.int32)
        return jax.tree.map(lambda a, b: jnp.where(new[0] > best[0], a, b), new, best), None

    start = jnp.full(len(queries), -jnp.inf), jnp.zeros(len(queries), jnp.int32)
    (value, index), _ = lax.scan(look, start, jnp.arange(blocks))
    neighbors = rows[index]
    if not axes:
        return neighbors, index
    here = lax.axis_index(axes)
    best = lax.pmax(value, axes)
    mine = lax.pmin(jnp.where(value == best, here, jnp.iinfo(jnp.int32).max), axes) == here
    found = jnp.where(mine[:, None], neighbors, 0), jnp.where(mine, here * len(rows) + index, 0)
    return jax.tree.map(lambda x: lax.psum_scatter(x, axes, tiled=True), found)
