"""Recall at k of image-text retrieval in both directions."""

import functools
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.topk import dot_similarity, top_k, transposed


@dataclass(frozen=True)
class Recall:
    """Recall at k, and the candidates that it counts.

    Attributes:
      metrics: "image_to_text_R@k" and "text_to_image_R@k", in [0, 1].
      image_to_text: int32 `[n, K]`, the best texts of every image, best first.
      text_to_image: int32 `[m, K]`, the best images of every text, best first.
      hits: metric -> bool `[queries]`, whether each query with a match has one among its k best candidates.
    """

    metrics: dict[str, float]
    image_to_text: np.ndarray
    text_to_image: np.ndarray
    hits: dict[str, np.ndarray]


def recall(z_image, z_text, image_ids, text_ids, ks=(1, 5, 10), similarity=None, text_similarity=None):
    """Returns the `Recall`: the share of queries with at least one match among their k best candidates.

    An image and a text match when their ids are equal: several captions of an image carry its id, and several images of
    one thing share an id. A query without any match is left out. Equal scores are ranked by index, so a match counts
    only if fewer than k candidates score strictly higher, or equal with a lower index.

    Args:
      z_image: float `[n, ...]`.
      z_text: float `[m, ...]`.
      image_ids: int `[n]`.
      text_ids: int `[m]`.
      ks: values of k.
      similarity: (images `[a, ...]`, texts `[b, ...]`) -> `[a, b]`; dot product by default. Ranks texts for images.
      text_similarity: (texts `[b, ...]`, images `[a, ...]`) -> `[b, a]`; by default the transpose of `similarity`.
        Ranks images for texts.
    """
    similarity = similarity or dot_similarity
    image_ids, text_ids = np.asarray(image_ids), np.asarray(text_ids)
    image_to_text, _ = top_k(z_image, z_text, max(ks), similarity)
    text_to_image, _ = top_k(z_text, z_image, max(ks), text_similarity or functools.partial(transposed, similarity))
    found = {}
    for name, top, query_ids, candidate_ids in (
        ("image_to_text", image_to_text, image_ids, text_ids),
        ("text_to_image", text_to_image, text_ids, image_ids),
    ):
        hits = (candidate_ids[top] == query_ids[:, None])[np.isin(query_ids, candidate_ids)]
        for k in ks:
            found[f"{name}_R@{k}"] = hits[:, :k].any(1)
    metrics = {name: float(hits.mean()) if len(hits) else 0.0 for name, hits in found.items()}
    return Recall(metrics, image_to_text, text_to_image, found)


def model_recall(model, z_image, z_text, image_ids, text_ids):
    """Returns the `Recall` at 1, 5 and 10 by the similarities of a model."""
    text_similarity = getattr(model, "text_similarity", None)
    return recall(z_image, z_text, image_ids, text_ids, similarity=model.similarity, text_similarity=text_similarity)
