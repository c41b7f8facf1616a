"""The 2-D map of image and text embeddings."""

from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.embed import evenly, unit_vectors
from clip_jax.evaluation.report.page import COLOURS, SHEET_COLUMNS, percent, shortened
from clip_jax.evaluation.results import Images

_IMAGES = 2000  # images in a map
_TILE = 40  # side of a thumbnail in pixels


@dataclass
class EmbeddingMap:
    """Embeddings of n images and m texts in the common space.

    Attributes:
      z_image: float32 `[n, E]`, unit rows.
      z_text: float32 `[m, E]`, unit rows.
      texts: m strings.
      text_of_image: int32 `[n]`, index into `texts`.
      group: n strings by which points are coloured: a CLDR group such as "animals-nature", a class name, or "".
      images: the n images.
    """

    section = "Map"
    intro = """<p>Embeddings of images (dots) and of texts (squares), projected onto the two directions in which they
vary most (PCA). A contrastive model keeps images and texts in separate regions, the modality gap; “each modality
centred” subtracts the two means, which shows whether both are arranged alike. Point at an image to see it and the text
that belongs to it.</p>"""

    z_image: np.ndarray
    z_text: np.ndarray
    texts: list[str]
    text_of_image: np.ndarray
    group: list[str]
    images: Images

    def draw(self, page):
        """Returns the frame of the map as HTML; the script draws the points."""
        z_image, z_text = np.asarray(self.z_image, np.float64), np.asarray(self.z_text, np.float64)
        if z_image.ndim != 2 or z_text.ndim != 2:
            return "<p>An example has several embeddings here (one per token), so there is no map of points.</p>"
        if len(z_image) + len(z_text) < 3 or not len(z_image) or not len(z_text):
            return "<p>There are too few embeddings for a map.</p>"
        if not (np.isfinite(z_image).all() and np.isfinite(z_text).all()):
            return "<p>Some embeddings are not finite, so there is no map.</p>"
        gap = np.linalg.norm(z_image.mean(0) - z_text.mean(0))
        views = []
        for a, b in ((z_image, z_text), (z_image - z_image.mean(0), z_text - z_text.mean(0))):
            points, share = _pca(np.concatenate([a, b]))
            views.append({"points": _on_grid(points).ravel().tolist(), "share": percent(share)})
        sheet, _ = page.thumbnails(self.images, range(len(z_image)), _TILE)
        shown, groups = _most_frequent(self.group)
        text_of_image = np.asarray(self.text_of_image).tolist()
        group_of_text = dict(zip(text_of_image[::-1], groups[::-1], strict=True))  # the group of its first image
        data = {
            "views": views,
            "images": len(z_image),
            "sheet": sheet,
            "columns": SHEET_COLUMNS,
            "texts": [*map(shortened, self.texts)],
            "textOfImage": text_of_image,
            "groups": [shortened(name) for name in shown] if len(shown) > 1 else [],
            "group": groups + [group_of_text.get(i, 0) for i in range(len(z_text))],
        }
        return (
            f"<p>{len(z_image):,} images, {len(z_text):,} texts. The mean of the images and the mean of the texts are"
            f' {gap:.2f} apart; an embedding has length 1.</p><div class="map" data-map="{page.add("maps", data)}">'
            "<noscript>The map needs JavaScript.</noscript></div>"
        )


def make_map(embedded, text_of_image, texts, z_text, groups):
    """Returns the `EmbeddingMap` of at most 2,000 images, evenly spaced, and their texts.

    Args:
      embedded: the `Embedded` images.
      text_of_image: int `[n]`, index into `texts`.
      texts: m strings.
      z_text: float32 `[m, ...]`, their embeddings.
      groups: n strings by which points are coloured.
    """
    rows = evenly(len(embedded.records), _IMAGES)
    columns, text_of_row = np.unique(np.asarray(text_of_image)[rows], return_inverse=True)
    return EmbeddingMap(
        unit_vectors(embedded.z[rows]),
        unit_vectors(z_text[columns]),
        [texts[i] for i in columns],
        text_of_row.astype(np.int32),
        [groups[i] for i in rows],
        embedded.images.select(rows),
    )


def _most_frequent(group):
    """Returns the names that have a colour of their own, and the colour of each point; the last may be "other"."""
    names, counts = np.unique([str(name) for name in group], return_counts=True)
    frequent = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    shown = sorted(frequent) if len(frequent) <= COLOURS else [*sorted(frequent[: COLOURS - 1]), "other"]
    colour = {name: i for i, name in enumerate(shown)}
    return shown, [colour.get(str(name), COLOURS - 1) for name in group]


def _pca(points):
    """Returns the two main components of float `[n, E]` as float `[n, 2]`, and their share of the variance."""
    points = points - points.mean(0)
    variances, directions = np.linalg.eigh(points.T @ points)
    plane = np.zeros((len(points), 2))
    plane[:, : min(2, points.shape[1])] = points @ directions[:, ::-1][:, :2]
    return plane, float(variances[-2:].sum() / max(variances.sum(), 1e-12))


def _on_grid(points):
    """Returns points `[n, 2]` as int in [0, 1000], centred, with one scale for both axes."""
    low, high = points.min(0), points.max(0)
    return np.rint(500 + 1000 * (points - (low + high) / 2) / max((high - low).max(), 1e-12)).astype(int)
