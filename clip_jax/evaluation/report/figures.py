"""Artefacts that several tasks share, each with its drawing: retrieval results and similarity matrices."""

import math
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.embed import evenly
from clip_jax.evaluation.report.alignment import align
from clip_jax.evaluation.report.page import data_uri, escaped, percent, shortened
from clip_jax.evaluation.results import Images

_QUERIES = 12  # queries shown in each direction of a retrieval
_TEXTS = 5  # texts shown for each image
_MATRIX = 48  # images in a similarity matrix
_LIGHT_MAP = ((250, 250, 248), (190, 219, 222), (94, 165, 184), (36, 100, 145), (20, 38, 84))
_DARK_MAP = ((24, 27, 34), (28, 62, 96), (32, 118, 140), (112, 184, 150), (246, 233, 160))


@dataclass
class Retrieval:
    """Retrieval among N images and M texts; an image and a text match when their ids are equal.

    Attributes:
      texts: M strings.
      image_ids: int32 `[N]`.
      text_ids: int32 `[M]`.
      image_to_text: int32 `[N, min(10, M)]`, the best texts of every image, best first.
      text_to_image: int32 `[M, min(10, N)]`, the best images of every text, best first.
      images: the N images.
    """

    section = "Retrieval"
    intro = """<p>A sample of the queries, evenly spaced and not chosen by success, each with its best matches, best
first; <mark>right ones</mark> are marked.</p>"""

    texts: list[str]
    image_ids: np.ndarray
    text_ids: np.ndarray
    image_to_text: np.ndarray
    text_to_image: np.ndarray
    images: Images

    def draw(self, page):
        """Returns a sample of the queries in both directions as HTML."""
        image_ids, text_ids = np.asarray(self.image_ids), np.asarray(self.text_ids)
        texts = _sample(np.flatnonzero(np.isin(text_ids, image_ids)))
        images = _sample(np.flatnonzero(np.isin(image_ids, text_ids)))
        if not len(texts):
            return "<p>There is no image with a text.</p>"
        found = np.asarray(self.text_to_image)[texts]
        _, thumbnail = page.thumbnails(self.images, [*found.ravel(), *images])
        first_text = dict(zip(text_ids.tolist()[::-1], self.texts[::-1], strict=True))
        labels = [first_text.get(int(image_id), "an image without a text") for image_id in image_ids]
        rows = []
        for text, best in zip(texts, found, strict=True):
            hits = (image_ids[best] == text_ids[text]).tolist()
            matches = "".join(
                f"<span{' class=hit' if hit else ''}>{thumbnail(image, labels[image])}</span>"
                for image, hit in zip(best, hits, strict=True)
            )
            rows.append(
                f'<div class="query"><b>{escaped(self.texts[text])}</b><div class="found">{matches}</div></div>'
            )
        cards = []
        for image in images:
            found = {}  # equal texts of several images stand once
            for text in np.asarray(self.image_to_text)[image]:
                found[self.texts[text]] = found.get(self.texts[text]) or text_ids[text] == image_ids[image]
            lines = "".join(
                f"<li{' class=hit' if hit else ''}><span>{escaped(text)}</span></li>"
                for text, hit in list(found.items())[:_TEXTS]
            )
            head = f"{thumbnail(image, labels[image])}<div><b>{escaped(labels[image])}</b>"
            cards.append(f'<div class="card">{head}<ol>{lines}</ol></div></div>')
        return (
            f"<h4>From text to image</h4>{''.join(rows)}"
            f'<h4>From image to text</h4><div class="cards packed">{"".join(cards)}</div>'
        )


def _sample(items):
    return items[evenly(len(items), _QUERIES)]


@dataclass
class SimilarityMatrix:
    """Similarity of n images (rows) and n texts (columns).

    Attributes:
      values: float32 `[n, n]`.
      texts: n strings; text i belongs to image i.
      images: the n images.
    """

    section = "Similarity"
    intro = """<p>Each row is an image, each column a text; an image meets its own text on the diagonal. The better the
model, the more the diagonal stands out.</p>"""

    values: np.ndarray
    texts: list[str]
    images: Images

    def draw(self, page):
        """Returns the matrix as a heat map, HTML."""
        values = np.asarray(self.values, np.float32)
        finite = values[np.isfinite(values)]
        if values.ndim != 2 or not finite.size:
            return "<p>There is no finite similarity to show.</p>"
        rows, columns = values.shape
        low, high = float(finite.min()), float(finite.max())
        _, thumbnail = page.thumbnails(self.images, range(rows))
        rounded = [[float(f"{v:.3g}") if math.isfinite(v) else None for v in row] for row in values.tolist()]
        index = page.add("matrices", {"values": rounded, "texts": [*map(shortened, self.texts)]})
        heads = "".join(f"<span>{escaped(text)}</span>" for text in self.texts)
        labels = [self.texts[i] if i < len(self.texts) else "" for i in range(rows)]
        heat = _heat((values - low) / max(high - low, 1e-12), "similarity of every image with every text")
        scale = _heat(np.linspace(0, 1, 128)[None], "scale of the similarity")
        return (
            f'{_diagonal(values)}<p class="scale">{low:.3g} {scale} {high:.3g}</p>'
            f'<div class="scroll"><div class="matrix" data-matrix="{index}" style="--n:{columns}">'
            f'<div class="columns">{heads}</div>'
            f'<div class="rows">{"".join(thumbnail(i, label) for i, label in enumerate(labels))}</div>'
            f'<div class="heat">{heat}</div></div></div>'
        )


def add_similarity(result, name, model, embedded, text_of_image, texts, z_text, prompts):
    """Adds the "similarity" of at most 48 images and, where `align` makes one of them, the "alignment".

    Args:
      result: the `EvalResult`.
      name: of the artefacts.
      model: the model.
      embedded: the `Embedded` images.
      text_of_image: int `[n]`, index into `texts`. One image is taken for each text.
      texts: m strings to show.
      z_text: float32 `[m, ...]`, their embeddings.
      prompts: m strings, what was embedded for the texts.
    """
    text_of_image = np.asarray(text_of_image)
    _, rows = np.unique(text_of_image, return_index=True)
    rows = rows[evenly(len(rows), _MATRIX)]
    columns = text_of_image[rows]
    z, images = embedded.z[rows], embedded.images.select(rows)
    values = np.asarray(model.similarity(z, z_text[columns]), np.float32)
    result.artefacts["similarity"][name] = SimilarityMatrix(values, [texts[i] for i in columns], images)
    if (found := align(model, z, z_text[columns], [prompts[i] for i in columns], images)) is not None:
        result.artefacts["alignment"][name] = found


def _diagonal(values):
    """Returns a sentence that compares the diagonal of a square matrix with the rest."""
    rows, columns = values.shape
    if not rows == columns > 1:
        return ""
    diagonal = np.eye(rows, dtype=bool)
    first = np.mean(np.argmax(np.nan_to_num(values, nan=-np.inf), axis=1) == np.arange(rows))
    return (
        f"<p>Mean similarity on the diagonal {_mean(values[diagonal])}, elsewhere {_mean(values[~diagonal])}; in"
        f" {percent(first)} of the rows the value on the diagonal is the largest.</p>"
    )


def _mean(values):
    values = values[np.isfinite(values)]
    return f"{values.mean():.3g}" if len(values) else "–"


def _heat(position, label):
    """Returns values `[h, w]` in [0, 1] (NaN: transparent) as an image with a pixel each, for light and dark pages."""
    sources = []
    for colours in (_DARK_MAP, _LIGHT_MAP):
        at = np.linspace(0, 1, len(colours))
        rgb = np.stack([np.interp(np.nan_to_num(position), at, channel) for channel in np.transpose(colours)], -1)
        rgba = np.concatenate([rgb, 255.0 * np.isfinite(position)[..., None]], -1)
        sources.append(data_uri(np.rint(rgba).astype(np.uint8), "PNG"))
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{sources[0]}">'
    return f'<picture>{dark}<img alt="{label}" src="{sources[1]}"></picture>'
