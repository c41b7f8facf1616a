"""Sums and log-sum-exps over all pairs of a batch, tile by tile, in memory linear in the batch.

A contrastive loss needs, of the matrix of all pairs, only sums over its rows and columns. `pairwise` computes them from
a function that gives one tile of the matrix. Every device holds its share of the rows and of the columns; the columns, with
what was summed over them so far, go once around all devices; log-sum-exps are taken online (Milakov & Gimelshein 2018). The
backward rule computes the tiles again: automatic differentiation of such a loop would keep every one of them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

#: Stands for minus infinity in the entries of a tile: a pair that a log-sum-exp leaves out. Finite, so that no NaN can arise.
EXCLUDED = -1e30

#: Entries of a tile, at most: 4 MiB in float32.
TILE_ENTRIES = 2**20


class Tile(NamedTuple):
    """The entries of a tile `[t, u]` by what is done with them; each field a float32 array, a pytree of such, or empty."""

    row_lse: Any = ()
    col_lse: Any = ()
    row_sum: Any = ()
    col_sum: Any = ()


class Reduced(NamedTuple):
    """Over the whole matrix `[R, C]`: row fields hold float32 `[R]`, column fields `[C]`, in the structure of `Tile`.

    `row_max` and `col_max`, without a gradient, are the largest entries of what the log-sum-exps were taken of.
    """

    row_lse: Any
    col_lse: Any
    row_sum: Any
    col_sum: Any
    row_max: Any
    col_max: Any


def pairwise(tile_fn, params, rows, cols, entry_size=1):
    """Reduces the matrix that `tile_fn` gives tile by tile over its rows and columns. Differentiable once, in reverse.

    Under a mesh in use (`jax.set_mesh`) rows and columns are spread over all of its devices that divide them.

    Args:
      tile_fn: pure function `(params, rows [t, ...], cols [u, ...], i int32 [t, 1], j int32 [1, u]) -> Tile`; i and j are
        positions in the whole matrix. Traced arrays reach it by its arguments alone, not by a closure.
      params: pytree of float arrays that every tile needs whole, such as the scale.
      rows, cols: pytrees of arrays `[R, ...]` and `[C, ...]`; integer arrays have no gradient.
      entry_size: how many numbers `tile_fn` holds for an entry, where it is more than one; tiles shrink accordingly.

    Returns:
      `Reduced`.
    """
    plan, rows, cols = _make_plan(tile_fn, rows, cols, entry_size)
    return _pairwise(plan, params, rows, cols)


def pairwise_loss(tile_fn, params, rows, cols):
    """The sum of a loss of each pair, differentiable once, in reverse, whose gradient is found together with it.

    Nothing but a factor of such a gradient depends on what is done with the sum, so the tiles need not be computed again for it.

    Args:
      tile_fn: as that of `pairwise`, with the losses and else nothing in `row_sum["loss"]`; only they have a gradient.
      params, rows, cols: as there.

    Returns:
      `(sum of the losses, Reduced)`; of the latter only the sums are filled in.
    """
    plan, rows, cols = _make_plan(tile_fn, rows, cols)
    return _pairwise_loss(plan, params, rows, cols)


def tile_side(entry_size=1):
    """How many rows and columns a tile has, at most, if `entry_size` numbers are held for an entry."""
    return max(1, math.isqrt(TILE_ENTRIES // entry_size))


@dataclass(frozen=True)
class _Plan:
    """All that is known before the arrays."""

    tile_fn: Any
    row_def: Any
    col_def: Any
    axes: tuple[str, ...]  # mesh axes over which rows and columns are spread
    devices: int  # their number
    side: int  # of a tile, at most


def _make_plan(tile_fn, rows, cols, entry_size=1):
    """`(plan, arrays of the rows, arrays of the columns)`."""
    (row_leaves, row_def), (col_leaves, col_def) = jax.tree.flatten(rows), jax.tree.flatten(cols)
    plan = _Plan(tile_fn, row_def, col_def, *layout(len(row_leaves[0]), len(col_leaves[0])), tile_side(entry_size))
    return plan, row_leaves, col_leaves


def layout(*lengths):
    """The mesh axes, from the first on, whose devices divide all lengths, and the number of these devices."""
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
    spread = PartitionSpec(plan.axes)
    d_params, d_rows, d_cols = _sharded(plan, _backward, (PartitionSpec(), spread, spread))(params, by_row, by_col)
    return d_params, [*map(_like, d_rows, rows)], [*map(_like, d_cols, cols)]


_pairwise.defvjp(_pairwise_fwd, _pairwise_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairwise_loss(plan, params, rows, cols):
    out = _pairwise(plan, params, rows, cols)
    return out.row_sum["loss"].sum(), out


def _pairwise_loss_fwd(plan, params, rows, cols):
    spread = PartitionSpec(plan.axes)
    out, *grads = _sharded(plan, _forward_and_backward, (spread, PartitionSpec(), spread, spread))(params, rows, cols)
    return (out.row_sum["loss"].sum(), out), (grads, rows, cols)


def _pairwise_loss_bwd(plan, residuals, grads):
    (d_params, d_rows, d_cols), rows, cols = residuals
    d_params, d_rows, d_cols = jax.tree.map(lambda x: grads[0] * x, (d_params, d_rows, d_cols))
    return d_params, [*map(_like, d_rows, rows)], [*map(_like, d_cols, cols)]


_pairwise_loss.defvjp(_pairwise_loss_fwd, _pairwise_loss_bwd)


def _like(grad, x):
    """A gradient as reverse differentiation wants it: of the dtype of `x`, none for integers."""
    return grad.astype(x.dtype) if _has_gradient(x) else None


def _has_gradient(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _sharded(plan, fn, out_specs):
    """`fn(plan, params, by_row, by_col)` as a function of global arrays."""
    fn = functools.partial(fn, plan)
    if not plan.axes:
        return fn
    in_specs = PartitionSpec(), PartitionSpec(plan.axes), PartitionSpec(plan.axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# The functions below run on every device with its own rows and columns.


def _forward(plan, params, rows, cols):
    r, c = len(rows[0]), len(cols[0])
    rows, cols = _cut(plan, rows), _cut(plan, cols)
    shapes = jax.eval_shape(lambda: _entries(plan, params, r, c, rows, cols, 0, (0, 0)))

    def start(lse, total, parts):
        """The running maximum, sum of exponentials and sum of nothing."""
        filled = [jnp.full(parts[0].shape[:2], value) for value in (EXCLUDED, 0.0, 0.0)]
        return tuple(jax.tree.map(lambda _, x=x: x, tree) for tree, x in zip((lse, lse, total), filled, strict=True))

    def visit(owner, by_row, moving):
        cols, by_col = moving

        def add_tile(state, place):
            by_row, by_col = state
            tile = _entries(plan, params, r, c, rows, cols, owner, place)
            by_row = _add(by_row, place[0], tile.row_lse, tile.row_sum, 1)
            return (by_row, _add(by_col, place[1], tile.col_lse, tile.col_sum, 0)), None

        (by_row, by_col), _ = lax.scan(add_tile, (by_row, by_col), _places(rows, cols))
        return by_row, (cols, by_col)

    by_row, by_col = start(shapes.row_lse, shapes.row_sum, rows), start(shapes.col_lse, shapes.col_sum, cols)
    by_row, (_, by_col) = _around(plan, visit, by_row, (cols, by_col))
    (row_max, row_lse, row_sum), (col_max, col_lse, col_sum) = _finish(by_row, r), _finish(by_col, c)
    return Reduced(row_lse, col_lse, row_sum, col_sum, row_max, col_max)


def _add(state, index, lse, total, axis):
    """Adds a tile to the running (maximum, sum of exponentials, sum), each `[tiles, t]`, of the rows (axis 1) or columns (0)."""
    largest, exps, sums = state
    new = jax.tree.map(lambda m, x: jnp.maximum(m[index], x.max(axis)), largest, lse)
    exps = jax.tree.map(
        lambda s, old, m, x: s.at[index].set(s[index] * jnp.exp(old[index] - m) + jnp.exp(x - jnp.expand_dims(m, axis)).sum(axis)),
        exps, largest, new, lse,
    )  # fmt: skip
    largest = jax.tree.map(lambda old, m: old.at[index].set(m), largest, new)
    return largest, exps, jax.tree.map(lambda s, x: s.at[index].add(x.sum(axis)), sums, total)


def _finish(state, length):
    """`(maximum, log-sum-exp, sum)`, each `[length]`, of the running values."""
    largest, exps, sums = jax.tree.map(lambda x: x.reshape(-1)[:length], state)
    return largest, jax.tree.map(lambda m, s: m + jnp.log(s), largest, exps), sums


def _backward(plan, params, by_row, by_col):
    def of_tile(tile, transpose, row_values, col_values):
        return transpose(Tile(
            _d_lse(tile.row_lse, *row_values[:2], 1), _d_lse(tile.col_lse, *col_values[:2], 0),
            _d_sum(tile.row_sum, row_values[2], 1), _d_sum(tile.col_sum, col_values[2], 0),
        ))  # fmt: skip

    return _gradients(plan, params, by_row, by_col, of_tile)


def _forward_and_backward(plan, params, rows, cols):
    def of_tile(tile, transpose, *_):
        nothing = jax.tree.map(jnp.zeros_like, tile)
        d_params, d_rows, d_cols = transpose(
            nothing._replace(row_sum=nothing.row_sum | {"loss": jnp.ones_like(tile.row_sum["loss"])})
        )
        row_sums, col_sums = (
            [x.sum(axis) for x in jax.tree.leaves(tree)] for tree, axis in ((tile.row_sum, 1), (tile.col_sum, 0))
        )
        return d_params, d_rows + row_sums, d_cols + col_sums

    shapes = jax.eval_shape(
        lambda: _entries(plan, params, len(rows[0]), len(cols[0]), _cut(plan, rows), _cut(plan, cols), 0, (0, 0))
    )
    row_def, col_def = jax.tree.structure(shapes.row_sum), jax.tree.structure(shapes.col_sum)
    d_params, d_rows, d_cols = _gradients(
        plan, params, (rows,), (cols,), of_tile, (row_def.num_leaves, col_def.num_leaves)
    )
    sums = row_def.unflatten(d_rows[len(rows) :]), col_def.unflatten(d_cols[len(cols) :])
    return Reduced((), (), *sums, (), ()), d_params, d_rows[: len(rows)], d_cols[: len(cols)]


def _gradients(plan, params, by_row, by_col, of_tile, more=(0, 0)):
    """Gradients of the parameters, rows and columns, added up over the tiles.

    `of_tile(tile, its transpose, values of its rows, values of its columns)` gives those of a tile; the values follow rows and columns in
    `by_row` and `by_col`. So many more arrays follow the gradients of rows `[t, ...]`, and of columns, to be added up like them.
    """
    r, c = len(by_row[0][0]), len(by_col[0][0])
    by_row, by_col = _cut(plan, by_row), _cut(plan, by_col)
    rows = by_row[0]

    def visit(owner, grads, moving):
        by_col, d_cols = moving

        def add_tile(state, place):
            d_params, d_rows, d_cols = state
            (a, *row_values), (b, *col_values) = (
                jax.tree.map(lambda x: x[place[0]], by_row),
                jax.tree.map(lambda x: x[place[1]], by_col),
            )
            tile, transpose = jax.vjp(lambda *args: _tile(plan, *args, r, c, owner, place), params, a, b)
            dp, da, db = of_tile(tile, transpose, row_values, col_values)
            d_rows = [x.at[place[0]].add(d) if _has_gradient(d) else x for x, d in zip(d_rows, da, strict=True)]
            d_cols = [x.at[place[1]].add(d) if _has_gradient(d) else x for x, d in zip(d_cols, db, strict=True)]
            return (jax.tree.map(jnp.add, d_params, dp), d_rows, d_cols), None

        (*grads, d_cols), _ = lax.scan(add_tile, (*grads, d_cols), _places(rows, by_col[0]))
        return tuple(grads), (by_col, d_cols)

    def zeros(x):
        return jnp.zeros(x.shape if _has_gradient(x) else (), jnp.float32)

    start_rows, start_cols = (
        [*map(zeros, x), *[jnp.zeros(x[0].shape[:2])] * k] for x, k in zip((rows, by_col[0]), more, strict=True)
    )
    (d_params, d_rows), (_, d_cols) = _around(
        plan, visit, (jax.tree.map(zeros, params), start_rows), (by_col, start_cols)
    )
    if plan.axes:
        d_params = lax.psum(d_params, plan.axes)
    return d_params, [_join(x, r) for x in d_rows], [_join(x, c) for x in d_cols]


def _d_lse(entries, lse, grad, axis):
    return jax.tree.map(
        lambda x, z, g: jnp.expand_dims(g, axis) * jnp.exp(x - jnp.expand_dims(z, axis)), entries, lse, grad
    )


def _d_sum(entries, grad, axis):
    return jax.tree.map(lambda x, g: jnp.broadcast_to(jnp.expand_dims(g, axis), x.shape), entries, grad)


def _around(plan, visit, staying, moving):
    """Takes `moving` once around all devices: `visit(position of its owner, staying, moving) -> (staying, moving)` on each."""
    if plan.devices == 1:
        return visit(0, staying, moving)
    here = lax.axis_index(plan.axes)
    to_next = [(d, (d + 1) % plan.devices) for d in range(plan.devices)]

    def turn(state, k):
        staying, moving = visit((here - k) % plan.devices, *state)
        return (staying, jax.tree.map(lambda x: lax.ppermute(x, plan.axes, to_next), moving)), None

    return lax.scan(turn, (staying, moving), jnp.arange(plan.devices))[0]


def _cut(plan, tree):
    """Arrays `[n, ...]` as `[tiles, t, ...]`: as few as their side allows, the last one filled up with copies of the last row."""

    def cut(x):
        n = len(x)
        tiles = math.ceil(n / plan.side)
        t = math.ceil(n / tiles)
        return jnp.pad(x, [(0, tiles * t - n)] + [(0, 0)] * (x.ndim - 1), mode="edge").reshape(tiles, t, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _join(x, length):
    """The reverse of `_cut`; a scalar, which stands for no gradient, stays one per row."""
    return x.reshape(-1, *x.shape[2:])[:length] if x.ndim else jnp.zeros(length)


def _places(rows, cols):
    """Indices (row tile, column tile) of all tiles."""
    i, j = jnp.mgrid[: len(rows[0]), : len(cols[0])].astype(jnp.int32)
    return i.reshape(-1), j.reshape(-1)


def _entries(plan, params, r, c, rows, cols, owner, place):
    return _tile(plan, params, [x[place[0]] for x in rows], [x[place[1]] for x in cols], r, c, owner, place)


def _tile(plan, params, a, b, r, c, owner, place):
    """The tile of the rows `a` and columns `b`; what they are filled up with takes part in nothing."""
    here = lax.axis_index(plan.axes) if plan.axes else 0
    i, j = place[0] * len(a[0]) + jnp.arange(len(a[0]))[:, None], place[1] * len(b[0]) + jnp.arange(len(b[0]))
    tile = plan.tile_fn(params, plan.row_def.unflatten(a), plan.col_def.unflatten(b), here * r + i, owner * c + j[None])
    if r % len(i) == 0 and c % len(j) == 0:  # nothing is filled up
        return jax.tree.map(lambda x: x.astype(jnp.float32), tile)
    real = (i < r) & (j < c)

    def keep(entries, other):
        return jax.tree.map(lambda x: jnp.where(real, x.astype(jnp.float32), other), entries)

    return Tile(
        keep(tile.row_lse, EXCLUDED), keep(tile.col_lse, EXCLUDED), keep(tile.row_sum, 0.0), keep(tile.col_sum, 0.0)
    )
