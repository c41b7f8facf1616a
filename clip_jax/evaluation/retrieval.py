"""Retrieval by similarity: exact top-k block by block, and recall at k in both directions."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_QUERIES, _CANDIDATES = 1024, 8192  # of a block: 32 MB of scores


@jax.jit
def dot_similarity(z_image, z_text):
    """Dot products [n, m] of float [n, E] and [m, E], in full float32 on every device."""
    return jnp.matmul(z_image, z_text.T, precision=jax.lax.Precision.HIGHEST)


def top_k(queries, candidates, k, scores=dot_similarity):
    """The k candidates with the highest score for every query, best first.

    Only blocks of the [n, m] scores exist at any time. Ties are broken by index: of equal scores the lower index comes first, so the
    result is a function of the scores alone; NaN counts as the lowest score.

    Args:
        queries: [n, ...]. candidates: [m, ...].
        k: at most m; more is cut to m.
        scores: (queries [a, ...], candidates [b, ...]) -> [a, b].

    Returns: indices int32 [n, k], scores float32 [n, k].
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
            best = _merge(*best, jnp.asarray(scores(query, block)), start, m)
        count = min(rows, n - row)
        values[row : row + count], indices[row : row + count] = (np.asarray(part)[:count] for part in best)
    return indices, values


def _padded(block, length):
    block = np.asarray(block)  # blocks of one shape compile once
    return (
        np.concatenate([block, np.zeros((length - len(block), *block.shape[1:]), block.dtype)])
        if len(block) < length
        else block
    )


@jax.jit
def rankable(scores):
    """Scores as float32 that sort in one way only: NaN and -inf are the lowest finite number, -0.0 is 0.0."""
    lowest, highest = jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max
    scores = jnp.nan_to_num(scores.astype(jnp.float32), nan=lowest, neginf=lowest, posinf=highest)
    return jnp.where(scores == 0, 0.0, scores)


@jax.jit
def _merge(best_scores, best_indices, scores, start, m):
    """Top k of the best so far, whose indices are lower, and a further block of scores."""
    index = start + jnp.arange(scores.shape[1], dtype=jnp.int32)
    scores = jnp.where(index < m, rankable(scores), -jnp.inf)  # -inf: padding
    all_scores = jnp.concatenate([best_scores, scores], axis=1)
    all_indices = jnp.concatenate([best_indices, jnp.broadcast_to(index, scores.shape)], axis=1)
    top, position = jax.lax.top_k(
        all_scores, best_scores.shape[1]
    )  # of equal scores the first, which has the lower index
    return top, jnp.take_along_axis(all_indices, position, axis=1)


@dataclass(frozen=True)
class Recall:
    """`metrics`: "image_to_text_R@k" and "text_to_image_R@k" in [0, 1]; the best candidates of every query, int32 [n, K] and [m, K]."""

    metrics: dict[str, float]
    image_to_text: np.ndarray
    text_to_image: np.ndarray


def recall(
    z_image,
    z_text,
    image_ids,
    text_ids,
    ks=(1, 5, 10),
    similarity=None,
    text_similarity=None,
):
    """Recall at k: the share of queries with at least one match among their k best candidates.

    An image and a text match when their ids are equal: several captions of an image carry its id, several pictures of one thing share it.
    A query without any match is left out. Equal scores are ranked by index, so that a match counts only if fewer than k candidates score
    strictly higher, or equal with a lower index.

    Args:
        z_image: float [n, ...]. z_text: float [m, ...].
        image_ids: int [n]. text_ids: int [m].
        similarity: (images [a, ...], texts [b, ...]) -> [a, b]; dot product by default. Ranks texts for images.
        text_similarity: (texts [b, ...], images [a, ...]) -> [b, a]; the transpose by default. Ranks images for texts.
    """
    similarity = similarity or dot_similarity
    image_ids, text_ids = np.asarray(image_ids), np.asarray(text_ids)
    image_to_text, _ = top_k(z_image, z_text, max(ks), similarity)
    text_to_image, _ = top_k(z_text, z_image, max(ks), text_similarity or functools.partial(transposed, similarity))
    metrics = {}
    for name, top, query_ids, candidate_ids in (
        ("image_to_text", image_to_text, image_ids, text_ids),
        ("text_to_image", text_to_image, text_ids, image_ids),
    ):
        hits = (candidate_ids[top] == query_ids[:, None])[np.isin(query_ids, candidate_ids)]
        for k in ks:
            metrics[f"{name}_R@{k}"] = float(hits[:, :k].any(1).mean()) if len(hits) else 0.0
    return Recall(metrics, image_to_text, text_to_image)


def transposed(similarity, z_text, z_image):
    """Scores [m, n] of a similarity whose queries are images."""
    return similarity(z_image, z_text).T
