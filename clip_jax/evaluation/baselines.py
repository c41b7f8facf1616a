"""Baselines of accuracy: chance, the most frequent class, and the nearest neighbour in pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_QUERIES = 512


def chance(classes, k=1, labels=1):
    """Returns the probability that a random ranking of the classes has one of an image's labels among the first k."""
    ranks = np.arange(min(k, classes))
    return float(1 - np.prod(np.maximum(classes - labels - ranks, 0) / (classes - ranks)))


def majority(labels, reference):
    """Returns the share of `labels` that are the most frequent class of `reference`, the lowest among equal ones.

    Args:
      labels: int `[n]`, of the tested images.
      reference: int `[m]`: the training images' labels, or `labels` itself where there is no training set.
    """
    return float(np.mean(np.asarray(labels) == np.bincount(reference).argmax())) if len(labels) else 0.0


def pixel_features(images, size=16):
    """Averages images down to size x size pixels.

    Args:
      images: n of uint8 `[H, W, 3]`, sizes may differ.
      size: in pixels.

    Returns: float32 `[n, size * size * 3]` in [-0.5, 0.5].
    """
    from PIL import Image

    small = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX)) for image in images]
    return np.asarray(small, np.float32).reshape(len(small), size * size * 3) / 255 - 0.5


def nearest_classes(references, labels, queries, classes, k=5, leave_out=None):
    """Returns the k classes whose nearest reference image is nearest to each query in Euclidean distance.

    Args:
      references: float `[r, F]`.
      labels: int `[r]`, the class of each reference.
      queries: float `[n, F]`.
      classes: number of classes.
      k: at most the number of classes; a larger k is cut to it.
      leave_out: int `[n]`, the reference that is ignored for each query, -1 for none.

    Returns: int32 `[n, k]`, nearest first.
    """
    leave_out = np.full(len(queries), -1) if leave_out is None else np.asarray(leave_out)
    references, labels = jnp.asarray(references, jnp.float32), jnp.asarray(labels, jnp.int32)
    k = min(k, classes)
    top = np.zeros((len(queries), k), np.int32)
    rows = min(_QUERIES, max(len(queries), 1))
    for start in range(0, len(queries), rows):
        count = min(rows, len(queries) - start)
        block = np.zeros((rows, queries.shape[1]), np.float32)
        block[:count] = queries[start : start + count]
        left = np.full(rows, -1, np.int32)
        left[:count] = leave_out[start : start + count]
        top[start : start + count] = np.asarray(_nearest(references, labels, block, left, classes, k))[:count]
    return top


@functools.partial(jax.jit, static_argnames=("classes", "k"))
def _nearest(references, labels, queries, leave_out, classes, k):
    # |q - r|^2 without |q|^2, which is the same for every reference.
    dots = jnp.matmul(queries, references.T, precision=jax.lax.Precision.HIGHEST)
    closeness = 2 * dots - jnp.sum(references**2, axis=1)
    closeness = jnp.where(jnp.arange(len(references)) == leave_out[:, None], -jnp.inf, closeness)
    by_class = jax.ops.segment_max(closeness.T, labels, num_segments=classes).T
    return jax.lax.top_k(by_class, k)[1]
