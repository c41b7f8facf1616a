"""Sums and log-sum-exps over all pairs of a batch, tile by tile, in memory linear in the batch.

A contrastive loss needs only sums over the rows and columns of the matrix of all pairs. `pairwise` computes them from a
function that returns one tile of the matrix. Every device holds its share of the rows and of the columns. The columns
and their running sums move once around a ring of all devices. Log-sum-exps are computed online (Milakov & Gimelshein
2018). The backward rule recomputes the tiles, because automatic differentiation of such a loop would store every one of
them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clip_jax.models.common import platform

#: The entry of a pair that a log-sum-exp leaves out. It replaces minus infinity, which could produce NaN.
EXCLUDED = -1e30

#: The largest number of entries of a tile on a CPU, 4 MiB in float32.
TILE_ENTRIES = 2**20

#: How many times larger tiles are on an accelerator, whose time for a small tile is mostly that to start kernels.
ACCELERATOR_TILES = 16


class Tile(NamedTuple):
    """The entries of a tile, by their reduction. Each field is a float32 array `[t, u]`, a pytree of such, or empty.

    Attributes:
      row_lse, col_lse: entries whose log-sum-exp over each row or column is computed.
      row_sum, col_sum: entries whose sum over each row or column is computed.
    """

    row_lse: Any = ()
    col_lse: Any = ()
    row_sum: Any = ()
    col_sum: Any = ()


class Reduced(NamedTuple):
    """The reductions over the whole matrix `[R, C]`, in the structure of the fields of `Tile`.

    Attributes:
      row_lse, row_sum: float32 `[R]`.
      col_lse, col_sum: float32 `[C]`.
      row_max, col_max: the largest entries of `Tile.row_lse` and `Tile.col_lse`, float32 `[R]` and `[C]`, without a
        gradient.
    """

    row_lse: Any
    col_lse: Any
    row_sum: Any
    col_sum: Any
    row_max: Any
    col_max: Any


def pairwise(tile_fn, params, rows, cols, entry_size=1):
    """Returns the reductions over rows and columns, `Reduced`, of the matrix whose tiles `tile_fn` computes.

    The result is differentiable once, in reverse mode. Under a mesh in use (`jax.set_mesh`) rows and columns are split
    over the mesh axes of `layout`.

    Args:
      tile_fn: pure function `(params, rows [t, ...], cols [u, ...], i int32 [t, 1], j int32 [1, u]) -> Tile`; i and j
        are positions in the whole matrix. It must not close over traced arrays.
      params: pytree of numbers and arrays that every tile needs whole, such as the scale, read as float32.
      rows, cols: pytrees of arrays `[R, ...]` and `[C, ...]`. Integer arrays have no gradient.
      entry_size: numbers that `tile_fn` stores for each entry. Tiles shrink accordingly.
    """
    plan, rows, cols = _make_plan(tile_fn, rows, cols, entry_size)
    return _pairwise(plan, _arrays(params), rows, cols)


def pairwise_loss(tile_fn, params, rows, cols):
    """Returns the sum of a loss over all pairs, differentiable once, in reverse mode.

    Downstream code only scales the gradient of this sum, so one pass computes value and gradient.

    Args:
      tile_fn: as in `pairwise`, with the losses of the pairs as the array `row_sum["loss"]`. Only they have a gradient.
      params, rows, cols: as in `pairwise`.

    Returns:
      `(sum of the losses, Reduced)`. Only the sums of the latter are valid: under differentiation its other fields are
        empty.
    """
    plan, rows, cols = _make_plan(tile_fn, rows, cols)
    return _pairwise_loss(plan, _arrays(params), rows, cols)


def _arrays(params):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def tile_side(entry_size=1):
    """Returns the largest number of rows and columns of a tile that stores `entry_size` numbers for each entry."""
    entries = TILE_ENTRIES * (1 if platform() == "cpu" else ACCELERATOR_TILES)
    return max(1, math.isqrt(entries // entry_size))


@dataclass(frozen=True)
class _Plan:
    """The static arguments.

    Attributes:
      tile_fn: the argument of `pairwise`.
      row_def, col_def: tree structures of rows and columns.
      axes: mesh axes over which rows and columns are split.
      devices: number of devices along these axes.
      side: the largest number of rows and columns of a tile.
    """

    tile_fn: Any
    row_def: Any
    col_def: Any
    axes: tuple[str, ...]
    devices: int
    side: int


def _make_plan(tile_fn, rows, cols, entry_size=1):
    """Returns `(plan, list of row arrays, list of column arrays)`."""
    (row_leaves, row_def), (col_leaves, col_def) = jax.tree.flatten(rows), jax.tree.flatten(cols)
    plan = _Plan(tile_fn, row_def, col_def, *layout(len(row_leaves[0]), len(col_leaves[0])), tile_side(entry_size))
    return plan, row_leaves, col_leaves


def layout(*lengths):
    """Returns `(axes, devices)`: the leading mesh axes whose device count divides all `lengths`, and this count."""
    mesh = jax.sharding.get_abstract_mesh()
    axes, devices = (), 1
    for axis in mesh.axis_names:
        if any(n % (devices * mesh.shape[axis]) for n in lengths):
            break
        axes, devices = (*axes, axis), devices * mesh.shape[axis]
    return axes, devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairwise(plan, params, rows, cols):
    return _sharded(plan, _forward, PartitionSpec(plan.axes))(params, rows, cols)


def _pairwise_fwd(plan, params, rows, cols):
    out = _pairwise(plan, params, rows, cols)
    return out, (params, rows, cols, out)


def _pairwise_bwd(plan, residuals, grads):
    params, rows, cols, out = residuals
    by_row = rows, out.row_lse, grads.row_lse, grads.row_sum
    by_col = cols, out.col_lse, grads.col_lse, grads.col_sum
    split = PartitionSpec(plan.axes)
    d_params, d_rows, d_cols = _sharded(plan, _backward, (PartitionSpec(), split, split))(params, by_row, by_col)
    return d_params, [*map(_match_dtype, d_rows, rows)], [*map(_match_dtype, d_cols, cols)]


_pairwise.defvjp(_pairwise_fwd, _pairwise_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairwise_loss(plan, params, rows, cols):
    out = _pairwise(plan, params, rows, cols)
    return out.row_sum["loss"].sum(), out


def _pairwise_loss_fwd(plan, params, rows, cols):
    split = PartitionSpec(plan.axes)
    out, *grads = _sharded(plan, _forward_and_backward, (split, PartitionSpec(), split, split))(params, rows, cols)
    return (out.row_sum["loss"].sum(), out), (grads, rows, cols)


def _pairwise_loss_bwd(plan, residuals, grads):
    (d_params, d_rows, d_cols), rows, cols = residuals
    d_params, d_rows, d_cols = jax.tree.map(lambda x: grads[0] * x, (d_params, d_rows, d_cols))
    return d_params, [*map(_match_dtype, d_rows, rows)], [*map(_match_dtype, d_cols, cols)]


_pairwise_loss.defvjp(_pairwise_loss_fwd, _pairwise_loss_bwd)


def _match_dtype(grad, x):
    """Returns a gradient as JAX requires it for `x`: in the dtype of `x`, None for integers."""
    return grad.astype(x.dtype) if _has_gradient(x) else None


def _has_gradient(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _sharded(plan, fn, out_specs):
    """Returns the per-device function `fn(plan, params, by_row, by_col)` as a function of global arrays."""
    fn = functools.partial(fn, plan)
    if not plan.axes:
        return fn
    in_specs = PartitionSpec(), PartitionSpec(plan.axes), PartitionSpec(plan.axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# The functions below run on every device with its own rows and columns.


def _forward(plan, params, rows, cols):
    r, c = len(rows[0]), len(cols[0])
    rows, cols = _split_tiles(plan, rows), _split_tiles(plan, cols)
    shapes = jax.eval_shape(lambda: _entries(plan, params, r, c, rows, cols, 0, (0, 0)))

    def start(lse, total, parts):
        """Returns the running (maximum, sum of exponentials, sum) before the first tile."""
        filled = [jnp.full(parts[0].shape[:2], value) for value in (EXCLUDED, 0.0, 0.0)]
        return tuple(jax.tree.map(lambda _, x=x: x, tree) for tree, x in zip((lse, lse, total), filled, strict=True))

    def visit(owner, by_row, moving):
        cols, by_col = moving

        def add_tile(state, place):
            by_row, by_col = state
            tile = _entries(plan, params, r, c, rows, cols, owner, place)
            by_row = _add(by_row, place[0], tile.row_lse, tile.row_sum, 1)
            return (by_row, _add(by_col, place[1], tile.col_lse, tile.col_sum, 0)), None

        (by_row, by_col), _ = lax.scan(add_tile, (by_row, by_col), _tile_indices(rows, cols))
        return by_row, (cols, by_col)

    by_row, by_col = start(shapes.row_lse, shapes.row_sum, rows), start(shapes.col_lse, shapes.col_sum, cols)
    by_row, (_, by_col) = _ring(plan, visit, by_row, (cols, by_col))
    (row_max, row_lse, row_sum), (col_max, col_lse, col_sum) = _finish(by_row, r), _finish(by_col, c)
    return Reduced(row_lse, col_lse, row_sum, col_sum, row_max, col_max)


def _add(state, index, lse, total, axis):
    """Adds a tile to the running (maximum, sum of exponentials, sum), each `[tiles, t]`.

    `axis` is the axis of the tile to reduce: 1 for the values of rows, 0 for those of columns.
    """
    largest, exps, sums = state
    new = jax.tree.map(lambda m, x: jnp.maximum(m[index], x.max(axis)), largest, lse)

    def add_exps(s, old, m, x):
        return s.at[index].set(s[index] * jnp.exp(old[index] - m) + jnp.exp(x - jnp.expand_dims(m, axis)).sum(axis))

    exps = jax.tree.map(add_exps, exps, largest, new, lse)
    largest = jax.tree.map(lambda old, m: old.at[index].set(m), largest, new)
    return largest, exps, jax.tree.map(lambda s, x: s.at[index].add(x.sum(axis)), sums, total)


def _finish(state, length):
    """Returns `(maximum, log-sum-exp, sum)`, each `[length]`, from the running values."""
    largest, exps, sums = jax.tree.map(lambda x: x.reshape(-1)[:length], state)
    return largest, jax.tree.map(lambda m, s: m + jnp.log(s), largest, exps), sums


def _backward(plan, params, by_row, by_col):
    def tile_grads(tile, transpose, row_values, col_values):
        cotangent = Tile(
            _d_lse(tile.row_lse, *row_values[:2], 1),
            _d_lse(tile.col_lse, *col_values[:2], 0),
            _d_sum(tile.row_sum, row_values[2], 1),
            _d_sum(tile.col_sum, col_values[2], 0),
        )
        return transpose(cotangent)

    return _gradients(plan, params, by_row, by_col, tile_grads)


def _forward_and_backward(plan, params, rows, cols):
    """Returns `(Reduced with the sums, gradients of params, rows, cols)` of `row_sum["loss"].sum()`."""

    def tile_grads(tile, transpose, *_):
        zeros = jax.tree.map(jnp.zeros_like, tile)
        cotangent = zeros._replace(row_sum=zeros.row_sum | {"loss": jnp.ones_like(tile.row_sum["loss"])})
        d_params, d_rows, d_cols = transpose(cotangent)
        row_sums, col_sums = (
            [x.sum(axis) for x in jax.tree.leaves(tree)] for tree, axis in ((tile.row_sum, 1), (tile.col_sum, 0))
        )
        return d_params, d_rows + row_sums, d_cols + col_sums

    def first_tile():
        tiles = _split_tiles(plan, rows), _split_tiles(plan, cols)
        return _entries(plan, params, len(rows[0]), len(cols[0]), *tiles, 0, (0, 0))

    shapes = jax.eval_shape(first_tile)
    row_def, col_def = jax.tree.structure(shapes.row_sum), jax.tree.structure(shapes.col_sum)
    d_params, d_rows, d_cols = _gradients(
        plan, params, (rows,), (cols,), tile_grads, (row_def.num_leaves, col_def.num_leaves)
    )
    sums = row_def.unflatten(d_rows[len(rows) :]), col_def.unflatten(d_cols[len(cols) :])
    return Reduced((), (), *sums, (), ()), d_params, d_rows[: len(rows)], d_cols[: len(cols)]


def _gradients(plan, params, by_row, by_col, tile_grads, extra=(0, 0)):
    """Sums the gradients of the parameters, rows and columns over the tiles.

    Args:
      plan: the static arguments.
      params: as in `pairwise`.
      by_row, by_col: tuples of the row or column arrays and further values per row or column.
      tile_grads: function `(tile, its transpose, further values of its rows, of its columns)` that returns the
        gradients of a tile, `(of the parameters, list of the rows, list of the columns)`.
      extra: numbers of arrays `[t]` that `tile_grads` appends to the lists of the rows and of the columns. They are
        summed over the tiles like the gradients.

    Returns:
      `(d_params, list of d_rows, list of d_cols)`. `d_params` is summed over all devices.
    """
    r, c = len(by_row[0][0]), len(by_col[0][0])
    by_row, by_col = _split_tiles(plan, by_row), _split_tiles(plan, by_col)
    rows = by_row[0]

    def visit(owner, grads, moving):
        by_col, d_cols = moving

        def add_tile(state, place):
            d_params, d_rows, d_cols = state
            a, *row_values = jax.tree.map(lambda x: x[place[0]], by_row)
            b, *col_values = jax.tree.map(lambda x: x[place[1]], by_col)
            tile, transpose = jax.vjp(lambda *args: _tile(plan, *args, r, c, owner, place), params, a, b)
            dp, da, db = tile_grads(tile, transpose, row_values, col_values)
            d_rows = [x.at[place[0]].add(d) if _has_gradient(d) else x for x, d in zip(d_rows, da, strict=True)]
            d_cols = [x.at[place[1]].add(d) if _has_gradient(d) else x for x, d in zip(d_cols, db, strict=True)]
            return (jax.tree.map(jnp.add, d_params, dp), d_rows, d_cols), None

        (*grads, d_cols), _ = lax.scan(add_tile, (*grads, d_cols), _tile_indices(rows, by_col[0]))
        return tuple(grads), (by_col, d_cols)

    def zeros(x):
        return jnp.zeros(x.shape if _has_gradient(x) else (), jnp.float32)

    start_rows, start_cols = (
        [*map(zeros, x), *[jnp.zeros(x[0].shape[:2])] * k] for x, k in zip((rows, by_col[0]), extra, strict=True)
    )
    (d_params, d_rows), (_, d_cols) = _ring(
        plan, visit, (jax.tree.map(zeros, params), start_rows), (by_col, start_cols)
    )
    if plan.axes:
        d_params = lax.psum(d_params, plan.axes)
    return d_params, [_join_tiles(x, r) for x in d_rows], [_join_tiles(x, c) for x in d_cols]


def _d_lse(entries, lse, grad, axis):
    """Returns the gradient of the log-sum-exp over `axis` of a tile's entries: softmax times the incoming gradient."""
    return jax.tree.map(
        lambda x, z, g: jnp.expand_dims(g, axis) * jnp.exp(x - jnp.expand_dims(z, axis)), entries, lse, grad
    )


def _d_sum(entries, grad, axis):
    """Returns the gradient of the sum over `axis` of a tile's entries."""
    return jax.tree.map(lambda x, g: jnp.broadcast_to(jnp.expand_dims(g, axis), x.shape), entries, grad)


def _ring(plan, visit, staying, moving):
    """Moves `moving` once around the ring of devices.

    Each device calls `visit(owner, staying, moving)`, which returns `(staying, moving)`; `owner` is the position of the
    device whose columns `moving` holds.
    """
    if plan.devices == 1:
        return visit(0, staying, moving)
    device = lax.axis_index(plan.axes)
    neighbors = [(d, (d + 1) % plan.devices) for d in range(plan.devices)]

    def hop(state, k):
        staying, moving = visit((device - k) % plan.devices, *state)
        return (staying, jax.tree.map(lambda x: lax.ppermute(x, plan.axes, neighbors), moving)), None

    return lax.scan(hop, (staying, moving), jnp.arange(plan.devices))[0]


def _split_tiles(plan, tree):
    """Splits arrays `[n, ...]` into the fewest tiles, `[tiles, t, ...]` with t at most `plan.side`.

    Copies of the last row pad the last tile.
    """

    def cut(x):
        n = len(x)
        tiles = math.ceil(n / plan.side)
        t = math.ceil(n / tiles)
        return jnp.pad(x, [(0, tiles * t - n)] + [(0, 0)] * (x.ndim - 1), mode="edge").reshape(tiles, t, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _join_tiles(x, length):
    """Returns the first `length` rows of tiles `[tiles, t, ...]`. A scalar (no gradient) becomes zeros `[length]`."""
    return x.reshape(-1, *x.shape[2:])[:length] if x.ndim else jnp.zeros(length)


def _tile_indices(rows, cols):
    """Returns the indices `(row tile, column tile)` of all tiles, each int32 `[tiles]`."""
    i, j = jnp.mgrid[: len(rows[0]), : len(cols[0])].astype(jnp.int32)
    return i.reshape(-1), j.reshape(-1)


def _entries(plan, params, r, c, rows, cols, owner, place):
    return _tile(plan, params, [x[place[0]] for x in rows], [x[place[1]] for x in cols], r, c, owner, place)


def _tile(plan, params, a, b, r, c, owner, place):
    """Returns the float32 `Tile` of the rows `a` and columns `b`, whose padding is excluded from all reductions.

    Args:
      plan, params: as in `_gradients`.
      a, b: arrays of the rows `[t, ...]` and of the columns `[u, ...]`.
      r, c: rows and columns per device.
      owner: position of the device whose columns are `b`.
      place: index of the row tile and of the column tile.
    """
    device = lax.axis_index(plan.axes) if plan.axes else 0
    i, j = place[0] * len(a[0]) + jnp.arange(len(a[0]))[:, None], place[1] * len(b[0]) + jnp.arange(len(b[0]))
    tile = plan.tile_fn(
        params, plan.row_def.unflatten(a), plan.col_def.unflatten(b), device * r + i, owner * c + j[None]
    )
    if r % len(i) == 0 and c % len(j) == 0:  # no padding
        return jax.tree.map(lambda x: x.astype(jnp.float32), tile)
    real = (i < r) & (j < c)

    def keep(entries, other):
        return jax.tree.map(lambda x: jnp.where(real, x.astype(jnp.float32), other), entries)

    return Tile(
        keep(tile.row_lse, EXCLUDED), keep(tile.col_lse, EXCLUDED), keep(tile.row_sum, 0.0), keep(tile.col_sum, 0.0)
    )
