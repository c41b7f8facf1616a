"""Duplicates within a data set: which picture stays for each. A better picture is a larger one, then an earlier one.

Pictures are judged from the best to the worst: one goes when a near picture has stayed. Each picture that goes is thus
near one that stays, and no two pictures that stay are near each other.
"""

import functools
import os

import numpy as np

from clip_jax.tools.examples import hashed
from clip_jax.tools.filter_tables import Table

#: Values of `stays`, int64 `[n]`, beside the number of the picture that stays, which may be the picture itself.
OPEN, UNUSABLE = -1, -2

_CHUNK = 2**18  # rows that are read at a time
_LARGE = 256  # pictures of a bucket that is compared by itself
_ROWS, _COLUMNS = 512, 4096  # hashes of it that are compared at a time
_QUERIES = 1024  # embeddings that are compared at a time


def start(pixels):
    """Returns `stays` before a picture is judged: `OPEN`, or `UNUSABLE` where `pixels` `[n]` is 0."""
    return np.where(np.asarray(pixels) > 0, OPEN, UNUSABLE)


def best_first(pixels, rows):
    """Returns `rows`, int64 `[m]`, from the best picture to the worst; `pixels` is uint32 `[n]`."""
    return rows[np.lexsort((rows, -pixels[rows].astype(np.int64)))]


def settle(stays):
    """Lets all open pictures stay, and replaces pictures that stand for others but go themselves."""
    rows = np.flatnonzero(stays == OPEN)
    stays[rows] = rows
    gone = np.flatnonzero(stays >= 0)
    stays[gone] = stays[stays[gone]]


def join_equal(folder, keys, pixels, stays):
    """Sets `stays` of all but the best picture of each key to the best one.

    Args:
      folder: for a table on disk.
      keys: uint64 `[n]`.
      pixels: uint32 `[n]`.
      stays: int64 `[n]`, changed; only open pictures count.
    """
    table = Table(folder, "equal")
    for rows in _open(stays):
        table.add(keys[rows], rows.astype(np.uint64))
    for found, rows in table.parts():
        rows = rows.astype(np.int64)
        order = np.lexsort((rows, -pixels[rows].astype(np.int64), found))
        found, rows = found[order], rows[order]
        first = np.ones(len(rows), bool)
        first[1:] = found[1:] != found[:-1]
        best = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
        stays[rows[~first]] = best[~first]


def hash_keys(hashes):
    """Returns a 64-bit key, uint64 `[n]`, of 16-byte hashes uint8 `[n, 16]`; equal hashes have equal keys."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    return hashed(0, words[:, 0], words[:, 1])


def join_near(folder, hashes, pixels, stays, distance):
    """Judges the open pictures by their hashes.

    Two hashes that differ in d bits agree in one of d + 1 pieces; a table on disk for each piece finds the candidates.
    In each round a picture goes when a better one within the distance has stayed, and stays when no better one within
    the distance is open. This gives what judging one after the other gives.

    Args:
      folder: for the tables.
      hashes: uint8 `[n, 16]`.
      pixels: uint32 `[n]`.
      stays: int64 `[n]`, changed.
      distance: the number of bits, at most 15.
    """
    hashes = _shuffled(folder, hashes)
    tables = [_piece_table(folder, hashes, stays, piece) for piece in np.array_split(np.arange(16), distance + 1)]
    found, is_blocked = np.full(len(stays), OPEN), np.zeros(len(stays), bool)
    while (stays == OPEN).any():
        found[:], is_blocked[:] = OPEN, False
        for table in tables:
            _compare_table(table, hashes, pixels, stays, distance, found, is_blocked)
        for rows in _open(stays):
            stays[rows] = np.where(found[rows] != OPEN, found[rows], np.where(is_blocked[rows], OPEN, rows))


def _shuffled(folder, hashes):
    """Returns the hashes, in a file, with their bits in another order: neighbours are alike, as in a plain border."""
    order = np.random.default_rng(0).permutation(128)
    result = np.memmap(os.path.join(folder, "shuffled.map"), np.uint8, "w+", shape=hashes.shape)
    for start in range(0, len(hashes), _CHUNK):
        bits = np.unpackbits(hashes[start : start + _CHUNK], axis=1)
        result[start : start + _CHUNK] = np.packbits(bits[:, order], axis=1)
    return result


def _piece_table(folder, hashes, stays, piece):
    """Returns the `Table` of the open pictures by a piece of their hashes, some of the 16 bytes."""
    table = Table(folder, f"piece{piece[0]}")
    for rows in _open(stays):
        keys = np.zeros((len(rows), 8), np.uint8)
        keys[:, : len(piece)] = hashes[rows][:, piece[:8]]
        table.add(keys.view(">u8")[:, 0].astype(np.uint64), rows.astype(np.uint64))
    return table


def _open(stays):
    for start in range(0, len(stays), _CHUNK):
        yield start + np.flatnonzero(stays[start : start + _CHUNK] == OPEN)


def _compare_table(table, hashes, pixels, stays, distance, found, is_blocked):
    """Compares the open pictures of each bucket of a table with the better ones of their bucket.

    Sets `found` to the best picture that has stayed, and `is_blocked` where a better one is open.
    """
    for keys, rows in table.parts():
        rows = rows.astype(np.int64)
        left = (stays[rows] == OPEN) | (stays[rows] == rows)
        keys, rows = keys[left], rows[left]
        if not (stays[rows] == OPEN).any():
            continue
        order = np.lexsort((rows, -pixels[rows].astype(np.int64), keys))
        keys, rows = keys[order], rows[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        sizes = np.diff(np.append(starts, len(keys)))
        is_large = np.repeat(sizes > _LARGE, sizes)
        _compare_small(keys[~is_large], rows[~is_large], hashes, pixels, stays, distance, found, is_blocked)
        for start, size in zip(starts[sizes > _LARGE], sizes[sizes > _LARGE], strict=True):
            _compare_large(rows[start : start + size], hashes, pixels, stays, distance, found, is_blocked)


def _compare_small(keys, rows, hashes, pixels, stays, distance, found, is_blocked):
    """Compares the pictures of many buckets: those that are next to each other, then those two apart, and so on."""
    words, is_open = np.asarray(hashes[rows]).view(np.uint64), stays[rows] == OPEN
    asked = np.flatnonzero(is_open)
    for apart in range(1, _LARGE):
        asked = asked[asked >= apart]
        asked = asked[keys[asked] == keys[asked - apart]]
        if not len(asked):
            return
        near = asked[np.bitwise_count(words[asked] ^ words[asked - apart]).sum(1) <= distance]
        open_ones = is_open[near - apart]
        is_blocked[rows[near[open_ones]]] = True
        _improve(found, rows[near[~open_ones]], rows[near[~open_ones] - apart], pixels)


def _compare_large(rows, hashes, pixels, stays, distance, found, is_blocked):
    """Compares the pictures of one bucket, block by block; `rows` is sorted, the best picture first."""
    words, is_open = np.asarray(hashes[rows]).view(np.uint64), stays[rows] == OPEN
    queries = np.flatnonzero(is_open)
    for start in range(0, len(queries), _ROWS):
        asked = queries[start : start + _ROWS]
        nearest = np.full(len(asked), len(rows))
        for column in range(0, asked[-1], _COLUMNS):
            end = min(column + _COLUMNS, asked[-1])
            differing = sum(np.bitwise_count(words[asked, None, i] ^ words[None, column:end, i]) for i in range(2))
            near = (differing <= distance) & (np.arange(column, end) < asked[:, None])
            is_blocked[rows[asked]] |= (near & is_open[column:end]).any(1)
            near &= ~is_open[column:end]
            nearest = np.minimum(nearest, np.where(near.any(1), column + near.argmax(1), len(rows)))
        hit = nearest < len(rows)
        _improve(found, rows[asked[hit]], rows[nearest[hit]], pixels)


def _improve(found, rows, new, pixels):
    """Sets `found` of `rows` to the better one of what it is and `new`."""
    old = found[rows]
    is_better = (old == OPEN) | (pixels[new] > pixels[old]) | ((pixels[new] == pixels[old]) & (new < old))
    found[rows[is_better]] = new[is_better]


def join_similar(z, rows, stays, similarity, mesh):
    """Judges pictures by their embeddings, which lie on the devices.

    Args:
      z: float32 `[m, E]` of unit length, in the order of `rows`.
      rows: int64 `[m]`, from the best picture to the worst (`best_first`).
      stays: int64 `[n]`, changed.
      similarity: the least cosine of a near picture, more than 0.
      mesh: the mesh.
    """
    from clip_jax.evaluation.topk import dot_similarity
    from clip_jax.search_index import Bank, program

    bank, nearest = Bank(z, mesh), program(mesh, 1)
    for start in range(0, len(z), _QUERIES):
        queries = np.zeros((_QUERIES, z.shape[1]), np.float32)
        count = min(_QUERIES, len(z) - start)
        queries[:count] = z[start : start + count]
        # Those that went before are zeros, so that only those that stayed are found.
        values, places = (np.asarray(part)[:, 0] for part in nearest(bank.z, queries, start))
        own, gone = np.array(dot_similarity(queries, queries)), []
        for i in range(count):
            value, place = values[i], places[i]
            if i and own[i, :i].max() > value:
                value, place = own[i, :i].max(), start + own[i, :i].argmax()
            if value >= similarity:
                stays[rows[start + i]] = rows[place]
                own[:, i] = -1
                gone.append(start + i)
        dropped = np.full(_QUERIES, len(bank.z), np.int32)
        dropped[: len(gone)] = gone
        bank.z = _cleared()(bank.z, dropped)


@functools.cache
def _cleared():
    """Returns the jitted `(bank [n, E], rows [m]) -> bank` with zeros in these rows; larger ones are left out."""
    import jax

    return jax.jit(lambda z, rows: z.at[rows].set(0, mode="drop"), donate_argnums=0)
