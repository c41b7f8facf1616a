"""Duplicates within a data set: which picture stays for each. A better picture is a larger one, then an earlier one.

Pictures are judged from the best to the worst: one goes when a near picture has stayed. Each picture that goes is thus
near one that stays, and no two pictures that stay are near each other.
"""

import functools
import itertools

import numpy as np

from clip_jax.tools.examples import hashed
from clip_jax.tools.filter_tables import Table

#: Values of `stays`, int64 `[n]`, beside the number of the picture that stays, which may be the picture itself.
OPEN, UNUSABLE = -1, -2

_CHUNK = 2**18  # rows that are read at a time
_ROWS, _COLUMNS = 512, 4096  # hashes that are compared at a time
_QUERIES = 1024  # embeddings that are compared at a time


def start(pixels):
    """Returns `stays` of pictures of whom none is judged: `OPEN`, or `UNUSABLE` where `pixels` `[n]` is 0."""
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
    tables = [_piece_table(folder, hashes, stays, piece) for piece in np.array_split(np.arange(16), distance + 1)]
    found, is_blocked = np.full(len(stays), OPEN), np.zeros(len(stays), bool)
    while (stays == OPEN).any():
        found[:], is_blocked[:] = OPEN, False
        for bucket in itertools.chain.from_iterable(_buckets(table, stays) for table in tables):
            _compare(best_first(pixels, bucket), hashes, pixels, stays, distance, found, is_blocked)
        for rows in _open(stays):
            stays[rows] = np.where(found[rows] != OPEN, found[rows], np.where(is_blocked[rows], OPEN, rows))


def _piece_table(folder, hashes, stays, piece):
    """Returns the `Table` of the open pictures by a piece of their hashes, some of the 16 bytes.

    Bits are shuffled first: neighbouring ones are alike, such as those of a picture's plain border.
    """
    shuffled, table = np.random.default_rng(0).permutation(128), Table(folder, f"piece{piece[0]}")
    for rows in _open(stays):
        bits = np.packbits(np.unpackbits(hashes[rows], axis=1)[:, shuffled], axis=1)[:, piece[:8]]
        keys = np.zeros((len(rows), 8), np.uint8)
        keys[:, : bits.shape[1]] = bits
        table.add(keys.view(">u8")[:, 0].astype(np.uint64), rows.astype(np.uint64))
    return table


def _open(stays):
    for start in range(0, len(stays), _CHUNK):
        yield start + np.flatnonzero(stays[start : start + _CHUNK] == OPEN)


def _buckets(table, stays):
    """Yields the rows of each bucket of a table, without those that go, where some are open."""
    for keys, rows in table.parts():
        rows = rows.astype(np.int64)
        left = (stays[rows] == OPEN) | (stays[rows] == rows)
        keys, rows = keys[left], rows[left]
        ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)) + 1 if len(keys) else []
        opened = np.concatenate([[0], np.cumsum(stays[rows] == OPEN)])
        for start, end in itertools.pairwise([0, *ends]):
            if end > start + 1 and opened[end] > opened[start]:
                yield rows[start:end]


def _compare(rows, hashes, pixels, stays, distance, found, is_blocked):
    """Compares the open pictures of a bucket with the better ones; `rows` is sorted, the best picture first.

    Sets `found` to the best picture that has stayed, and `is_blocked` where a better one is open.
    """
    words, is_open = hashes[rows].view(np.uint64), stays[rows] == OPEN
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
