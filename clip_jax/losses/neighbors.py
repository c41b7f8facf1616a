"""A first-in-first-out queue of embeddings, and the nearest among many rows to each row of a batch."""

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
    """A queue of `size` random unit rows: `{"rows": float32 [Q, D], "next": position of the oldest, "filled": rows put in so far}`."""
    rows = l2_normalize(jax.random.normal(rng, (size, width)))
    return {"rows": rows, "next": jnp.zeros((), jnp.int32), "filled": jnp.zeros((), jnp.int32)}


def enqueue(queue, x):
    """The queue with the rows of `x [n, D]` in the place of the oldest ones; of more rows than it has places, the last stay."""
    size = len(queue["rows"])
    kept = min(len(x), size)
    places = (queue["next"] + len(x) - kept + jnp.arange(kept)) % size
    return {
        "rows": queue["rows"].at[places].set(lax.stop_gradient(x[len(x) - kept :]).astype(jnp.float32)),
        "next": (queue["next"] + len(x)) % size,
        "filled": jnp.minimum(queue["filled"] + len(x), size),
    }


def nearest(queries, rows):
    """The row with the largest dot product with each query, `(float32 [B, D], its number int32 [B])`; of equal ones the first."""
    number = top_k(queries, rows, 1)[1]
    return take(rows, number)[:, 0], number[:, 0]


def top_k(queries, rows, k, count=None, approximate=False):
    """The k rows with the largest dot products with each query, best first, without a gradient; of equal ones the first.

    Under a mesh in use every device looks in its share of the rows, in blocks, for all queries: what goes around is the queries and
    what was found, never the rows, and of the scores only those of one block exist.

    Args:
      queries: `[B, D]`.
      rows: `[Q, D]`.
      k: at most the number of rows.
      count: only the first `count` rows, at least k, take part; None: all.
      approximate: a little less than all of them are found, faster on a TPU (`jax.lax.approx_max_k`; elsewhere it is exact).

    Returns:
      `(dot products float32 [B, k], numbers of the rows int32 [B, k])`.
    """
    axes, _ = layout(len(queries), len(rows))
    fn = functools.partial(_top_k, axes, k, len(rows) if count is None else count, approximate)
    return _sharded(fn, axes)(*lax.stop_gradient((queries.astype(jnp.float32), rows)))


def take(rows, numbers):
    """`rows [Q, ...]` at the numbers int `[B, k]`, `[B, k, ...]`, without a gradient; every device gives those that it holds."""
    axes, _ = layout(len(numbers), len(rows))
    return _sharded(functools.partial(_take, axes), axes)(numbers, lax.stop_gradient(rows))


def _sharded(fn, axes):
    spread = PartitionSpec(axes)
    return jax.shard_map(fn, in_specs=(spread, spread), out_specs=spread, check_vma=False) if axes else fn


def _top_k(axes, k, count, approximate, queries, rows):
    """On every device with its own queries and rows."""
    if axes:
        queries = lax.all_gather(queries, axes, tiled=True)
    size = max(1, min(len(rows), TILE_ENTRIES // len(queries)))
    blocks = math.ceil(len(rows) / size)
    first = (lax.axis_index(axes) if axes else 0) * len(rows)

    def look(best, block):
        start = jnp.minimum(block * size, len(rows) - size)  # the last block ends with the last row
        numbers = start + jnp.arange(size, dtype=jnp.int32)
        fresh = (numbers >= block * size) & (first + numbers < count)
        scores = similarities(queries, lax.dynamic_slice_in_dim(rows, start, size).astype(jnp.float32))
        scores = jnp.where(fresh, scores, -jnp.inf)
        if approximate:
            scores, place = lax.approx_max_k(scores, min(k, size))
            numbers = numbers[place]
        return _best(k, *best, scores, jnp.broadcast_to(first + numbers, scores.shape)), None

    none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
    values, numbers = lax.scan(look, none, jnp.arange(blocks))[0]
    if not axes:
        return values, numbers
    # The devices' results lie in the order of their rows, so that of equal ones the first stays the first.
    values, numbers = (lax.all_to_all(x, axes, 0, 1, tiled=True) for x in (values, numbers))
    return _best(k, values, numbers)


def _best(k, *pairs):
    """The k largest of values `[B, n]` with their numbers, of `values, numbers, values, numbers, ...`."""
    values, numbers = jnp.concatenate(pairs[::2], 1), jnp.concatenate(pairs[1::2], 1)
    values, place = lax.top_k(values, k)
    return values, jnp.take_along_axis(numbers, place, axis=1)


def _take(axes, numbers, rows):
    if not axes:
        return rows[numbers]
    numbers = lax.all_gather(numbers, axes, tiled=True) - lax.axis_index(axes) * len(rows)
    mine = (numbers >= 0) & (numbers < len(rows))
    found = jnp.where(jnp.expand_dims(mine, range(2, rows.ndim + 1)), rows[jnp.where(mine, numbers, 0)], 0)
    return lax.psum_scatter(found, axes, tiled=True)
