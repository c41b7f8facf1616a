"""Zero-shot classification: class names become prompts, prompts become a classifier.

The classifier of CLIP and big_vision: every prompt's embedding is normalised, a class is the normalised mean over its prompts, the
prediction the class with the highest similarity. Where embeddings are not single vectors (FILIP: one vector per token) there is no mean
of them, and the scores are averaged over the prompts instead.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation.prompts import class_prompts, load_templates
from clip_jax.evaluation.retrieval import rankable

_PROMPTS_AT_ONCE = 8192
_SCORES_AT_ONCE = 2**24


def normalize(z):
    """Rows of unit length, float32 like z [..., E]; zero rows stay zero."""
    z = np.asarray(z, np.float32)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Classifier:
    """A zero-shot classifier; made by `make_classifier`.

    Attributes:
        embeddings: float32 [classes, E]; or [classes * prompts, ...] when `prompts` > 1, the scores of a class's prompts being averaged.
        prompts: text embeddings per class.
    """

    model: Any
    embeddings: np.ndarray
    prompts: int = 1

    @property
    def classes(self):
        return len(self.embeddings) // self.prompts

    def scores(self, z_image):
        """Similarity of image embeddings [n, ...] with every class, float32 [n, classes], without the logit scale."""
        return np.concatenate(list(self._blocks(z_image)))

    def top(self, z_image, k=5):
        """The k best classes, best first, of equal ones the lower label first: int32 [n, min(k, classes)], and their scores, float32."""
        top = [jax.lax.top_k(rankable(jnp.asarray(scores)), min(k, self.classes)) for scores in self._blocks(z_image)]
        scores, labels = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*top, strict=True))
        return labels, scores

    def _blocks(self, z_image):
        rows = max(_SCORES_AT_ONCE // len(self.embeddings), 1)
        for start in range(0, max(len(z_image), 1), rows):
            scores = np.asarray(self.model.similarity(z_image[start : start + rows], self.embeddings), np.float32)
            yield scores if self.prompts == 1 else scores.reshape(len(scores), self.classes, self.prompts).mean(-1)


def make_classifier(model, class_names, templates=("{}",), *, canonical=False, average=None):
    """Embeds the prompts of all classes.

    Args:
        model: has `embed_text(list[str]) -> [n, ...]` and `similarity(images, texts) -> [n, m]`.
        class_names: by label. Duplicates are the caller's affair (`prompts.resolve_duplicates`).
        templates: as `prompts.load_templates` takes them.
        canonical: bring prompts to SigLIP's canonical form.
        average: "embeddings" or "scores", over the prompts of a class; by default scores where an embedding is not one vector.
    """
    templates = load_templates(templates)
    if average not in (None, "embeddings", "scores"):
        raise UserError(f"average={average!r}; allowed: embeddings, scores")
    step = max(_PROMPTS_AT_ONCE // len(templates), 1)
    parts = []
    for start in range(0, len(class_names), step):
        z = np.asarray(
            model.embed_text(class_prompts(class_names[start : start + step], templates, canonical)), np.float32
        )
        if average == "embeddings" or (average is None and z.ndim == 2):
            z = normalize(normalize(z).reshape(-1, len(templates), *z.shape[1:]).mean(1))
        parts.append(z)
    embeddings = np.concatenate(parts)
    return Classifier(model, embeddings, len(embeddings) // len(class_names))


def class_scores(model, z_image, class_names, templates=("{}",), *, canonical=False):
    """Similarity of image embeddings [n, ...] with every class, float32 [n, classes], without the logit scale."""
    return make_classifier(model, class_names, templates, canonical=canonical).scores(np.asarray(z_image))


def accuracy(top, labels, k=1):
    """Share of rows whose label is among the first k of `top` int [n, K]; 0 without rows."""
    return float((top[:, :k] == np.asarray(labels)[:, None]).any(1).mean()) if len(top) else 0.0


def per_class_accuracy(top, labels, classes):
    """Top-1 accuracy of every class, float64 [classes]; NaN for a class without pictures."""
    labels = np.asarray(labels)
    hits = np.bincount(labels, top[:, 0] == labels, minlength=classes)
    counts = np.bincount(labels, minlength=classes)
    return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)
