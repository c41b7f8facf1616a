"""Exact top-k by similarity, block by block."""

import jax
import jax.numpy as jnp
import numpy as np

_QUERIES, _CANDIDATES = 1024, 8192  # of a block: 32 MB of scores


@jax.jit
def dot_similarity(z_image, z_text):
    """Returns the dot products `[n, m]` of float `[n, E]` and `[m, E]`, in full float32 on every device."""
    return jnp.matmul(z_image, z_text.T, precision=jax.lax.Precision.HIGHEST)


def transposed(similarity, z_text, z_image):
    """Returns the scores `[m, n]` of a similarity whose queries are images."""
    return similarity(z_image, z_text).T


def top_k(queries, candidates, k, scores=dot_similarity):
    """Returns the k candidates with the highest score for every query, best first.

    Only blocks of the `[n, m]` scores exist at any time. The lower index comes first among equal scores, so the result
    is a function of the scores alone. NaN counts as the lowest score.

    Args:
      queries: `[n, ...]`.
      candidates: `[m, ...]`.
      k: at most m; a larger k is cut to m.
      scores: (queries `[a, ...]`, candidates `[b, ...]`) -> `[a, b]`.

    Returns: indices int32 `[n, k]`, scores float32 `[n, k]`.
    """
    n, m = len(queries), len(candidates)
    k = min(k, m)
    rows, columns = min(_QUERIES, n), min(_CANDIDATES, m)
    blocks = [(start, _padded(candidates[start : start + columns], columns)) for start in range(0, m, columns)]
    indices, values = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
    for row in range(0, n, rows):
        query = _padded(queries[row : row + rows], rows)
        best = jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1, jnp.int32)
        for start, block in blocks:
            best = merge_top_k(*best, jnp.asarray(scores(query, block)), start, m)
        count = min(rows, n - row)
        values[row : row + count], indices[row : row + count] = (np.asarray(part)[:count] for part in best)
    return indices, values


@jax.jit
def rankable(scores):
    """Returns scores as float32 with one order: NaN and -inf become the lowest finite number, -0.0 becomes 0.0."""
    lowest, highest = jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max
    scores = jnp.nan_to_num(scores.astype(jnp.float32), nan=lowest, neginf=lowest, posinf=highest)
    return jnp.where(scores == 0, 0.0, scores)


@jax.jit
def merge_top_k(best_scores, best_indices, scores, start, m):
    """Returns the top k of the best candidates so far and of a further block of scores.

    Args:
      best_scores: float32 `[n, k]`, -inf where there is no candidate yet.
      best_indices: int32 `[n, k]`, lower than those of the block.
      scores: `[n, b]` of the candidates `start`, `start + 1`, ...
      start: index of the block's first candidate.
      m: number of candidates; the block's columns beyond it are padding.

    Returns: scores float32 `[n, k]`, indices int32 `[n, k]`.
    """
    index = start + jnp.arange(scores.shape[1], dtype=jnp.int32)
    scores = jnp.where(index < m, rankable(scores), -jnp.inf)  # -inf: padding
    all_scores = jnp.concatenate([best_scores, scores], axis=1)
    all_indices = jnp.concatenate([best_indices, jnp.broadcast_to(index, scores.shape)], axis=1)
    # Among equal scores lax.top_k takes the first, which has the lower index.
    top, position = jax.lax.top_k(all_scores, best_scores.shape[1])
    return top, jnp.take_along_axis(all_indices, position, axis=1)


def _padded(block, length):
    """Pads a block with zero rows: blocks of one shape compile once."""
    block = np.asarray(block)
    if len(block) >= length:
        return block
    return np.concatenate([block, np.zeros((length - len(block), *block.shape[1:]), block.dtype)])
