"""Zero-shot classification: class names become prompts, prompts become a classifier.

This is the classifier of CLIP and big_vision. Every prompt's embedding is normalised, a class is the normalised mean
over its prompts, and the prediction is the class with the highest similarity. An example of FILIP has one vector per
token, which have no such mean, so the scores are averaged over the prompts instead.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation.embed import normalize
from clip_jax.evaluation.prompts import class_prompts, load_templates
from clip_jax.evaluation.topk import rankable

_PROMPTS_AT_ONCE = 8192
_SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Classifier:
    """A zero-shot classifier; made by `make_classifier`.

    Attributes:
      model: has `similarity(z_image, z_text)`.
      embeddings: float32 `[classes, E]`, or `[classes * prompts, ...]` when scores are averaged over prompts.
      prompts: text embeddings per class.
    """

    model: Any
    embeddings: np.ndarray
    prompts: int = 1

    @property
    def classes(self):
        return len(self.embeddings) // self.prompts

    def scores(self, z_image):
        """Returns the similarity of image embeddings `[n, ...]` and classes, float32 `[n, classes]`, unscaled."""
        return np.concatenate(list(self._blocks(z_image)))

    def top(self, z_image, k=5):
        """Returns the k best classes, best first; the lower label comes first among equal scores.

        Args:
          z_image: `[n, ...]`.
          k: at most the number of classes; a larger k is cut to it.

        Returns: labels int32 `[n, k]`, scores float32 `[n, k]`.
        """
        top = [jax.lax.top_k(rankable(jnp.asarray(scores)), min(k, self.classes)) for scores in self._blocks(z_image)]
        scores, labels = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*top, strict=True))
        return labels, scores

    def _blocks(self, z_image):
        rows = max(_SCORES_AT_ONCE // len(self.embeddings), 1)
        for start in range(0, max(len(z_image), 1), rows):
            scores = np.asarray(self.model.similarity(z_image[start : start + rows], self.embeddings), np.float32)
            yield scores if self.prompts == 1 else scores.reshape(len(scores), self.classes, self.prompts).mean(-1)


def make_classifier(model, class_names, templates=("{}",), *, canonical=False, average=None):
    """Returns the `Classifier` of class names; embeds the prompts of all classes.

    Args:
      model: has `embed_text(texts)` and `similarity(z_image, z_text)`.
      class_names: by label; a single string counts as a list of one. Duplicates are left as they are;
        `prompts.resolve_duplicates` handles them.
      templates: as `prompts.load_templates` takes them.
      canonical: bring prompts to SigLIP's canonical form.
      average: "embeddings" or "scores", averaged over the prompts of a class. The default is "embeddings" where an
        example has one vector, else "scores".

    Raises UserError for another `average`, for invalid templates and without a class name.
    """
    class_names = [class_names] if isinstance(class_names, str) else class_names
    templates = load_templates(templates)
    if not len(class_names):
        raise UserError("class_names: at least one is needed")
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
    """Returns the similarity of image embeddings `[n, ...]` and classes, float32 `[n, classes]`, unscaled."""
    return make_classifier(model, class_names, templates, canonical=canonical).scores(np.asarray(z_image))


def hits(top, labels, k=1):
    """Returns whether the label of each row is among the first k of `top` int `[n, K]`, bool `[n]`."""
    return (top[:, :k] == np.asarray(labels)[:, None]).any(1)


def accuracy(top, labels, k=1):
    """Returns the share of rows whose label is among the first k of `top` int `[n, K]`; 0 without rows."""
    return float(hits(top, labels, k).mean()) if len(top) else 0.0


def flat_hit_at(top, labels, k):
    """Returns the share of rows of which at least one label is among the first k of `top`; 0 without rows.

    The flat hit at K of OTTER (Wu et al. 2022). With one label a row it is the top-k accuracy.

    Args:
      top: int `[n, K]`, classes, best first; no class twice.
      labels: int `[n, L]`, -1 for padding.
      k: at most K counts.
    """
    hits = [(top[:, [rank]] == labels).any(1) for rank in range(min(k, top.shape[1]))]
    return float(np.any(hits, axis=0).mean()) if len(top) else 0.0


def per_class_accuracy(top, labels, classes):
    """Returns the top-1 accuracy of every class, float64 `[classes]`; NaN for a class without images."""
    labels = np.asarray(labels)
    hits = np.bincount(labels, top[:, 0] == labels, minlength=classes)
    counts = np.bincount(labels, minlength=classes)
    return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)
