"""Galleries of right and wrong answers, the most confident ones first."""

import math
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.report.page import escaped
from clip_jax.evaluation.results import Images

GALLERY = 24  # right answers, and wrong answers, in a gallery


@dataclass
class Classification:
    """Zero-shot classification of N images among C classes.

    Attributes:
      class_names: C strings.
      labels: int32 `[N]`, index into `class_names`; or `[N, L]`, all labels of an image, then -1.
      top: int32 `[N, min(5, C)]`, the predicted classes, best first.
      scores: float32 like `top`, similarity without the logit scale.
      images: the N images.
      group: N strings by which the gallery can be filtered: a vendor, or the class name.
    """

    section = "Predictions"
    intro = f"""<p>The most confident right and wrong predictions, up to {GALLERY} of each, with the five names that
are most similar to the image and their similarity; <mark>the true name</mark> is marked. Confidence is the lead of the
first name over the second. A name repeats only when there are no other names left.</p>"""

    class_names: list[str]
    labels: np.ndarray
    top: np.ndarray
    scores: np.ndarray
    images: Images
    group: list[str]

    def draw(self, page):
        """Returns the gallery as HTML."""
        labels, top, scores = (np.asarray(part) for part in (self.labels, self.top, self.scores))
        if not len(labels):
            return "<p>There are no images.</p>"
        scores = scores.astype(np.float32)
        with np.errstate(invalid="ignore"):  # of infinite scores
            lead = scores[:, 0] - scores[:, 1] if scores.shape[1] > 1 else scores[:, 0]
        labels = labels.reshape(len(labels), -1)
        is_right = (top[:, :1] == labels).any(1)
        chosen = choose(is_right, np.nan_to_num(lead, nan=-np.inf), labels[:, 0])
        rows = np.concatenate(list(chosen.values()))
        _, thumbnail = page.thumbnails(self.images, rows)
        best = float(np.abs(scores[rows][np.isfinite(scores[rows])]).max(initial=1e-9))
        digits = min(max(2 - math.floor(math.log10(best)), 0), 4)
        groups = sorted({str(self.group[row]) for row in rows})

        def guess(row, label, score):
            is_finite = math.isfinite(score)
            width = round(100 * max(float(score), 0) / best) if is_finite else 0
            start = f'<li{" class=hit" if label in labels[row] else ""} style="--w:{width}%">'
            value = f"{score:.{digits}f}" if is_finite else "–"
            return f"{start}<span>{escaped(self.class_names[label])}</span><b>{value}</b></li>"

        def card(row):
            name = ", ".join(str(self.class_names[label]) for label in labels[row] if label >= 0)
            group = str(self.group[row])
            guesses = "".join(guess(row, *pair) for pair in zip(top[row], scores[row], strict=True))
            note = f'<span class="small">{escaped(group)}</span>' if len(groups) > 1 and group != str(name) else ""
            return (
                f'<div class="card" data-group="{groups.index(group)}">{thumbnail(row, name)}'
                f"<div><b>{escaped(name)}</b>{note}<ol>{guesses}</ol></div></div>"
            )

        return gallery(groups, is_right, {kind: [card(row) for row in rows] for kind, rows in chosen.items()})


def choose(is_right, confidence, labels):
    """Returns the rows that a gallery shows, `{"right": int [a], "wrong": int [b]}`, most confident first.

    Args:
      is_right: bool `[n]`.
      confidence: float `[n]`.
      labels: int `[n]`; one row per label, and more only when there are no other labels left.
    """
    return {
        kind: _most_confident(np.flatnonzero(is_right == (kind == "right")), confidence, labels)
        for kind in ("right", "wrong")
    }


def gallery(groups, is_right, cards):
    """Returns a gallery with its filter as HTML.

    Args:
      groups: names by which cards can be filtered.
      is_right: bool `[n]`, of all answers, to count them.
      cards: {"right": cards, "wrong": cards}, HTML.
    """
    return _filter(groups) + "".join(_kind(kind, is_right, items) for kind, items in cards.items())


def _kind(kind, is_right, cards):
    count = int(is_right.sum() if kind == "right" else (~is_right).sum())
    head = f"<h4>{kind.capitalize()}: {count:,} of {len(is_right):,} images</h4>"
    content = f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>None.</p>"
    return f'<div class="kind" data-kind="{kind}">{head}{content}</div>'


def _filter(groups):
    kinds = '<option value="">right and wrong</option><option>right</option><option>wrong</option>'
    choice = f'<label>Show <select data-filter="kind">{kinds}</select></label>'
    if len(groups) > 1:
        options = "".join(f'<option value="{i}">{escaped(group)}</option>' for i, group in enumerate(groups))
        every = '<option value="">all groups</option>'
        choice += f'<label>of <select data-filter="group">{every}{options}</select></label>'
    return f'<div class="filter">{choice}</div>'


def _most_confident(rows, confidence, labels):
    """Returns up to `GALLERY` of `rows`, most confident first; further ones of a label only when labels run out."""
    order = rows[np.argsort(-confidence[rows], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    further = np.setdiff1d(np.arange(len(order)), first)
    return order[np.sort(np.concatenate([np.sort(first), further])[:GALLERY])]
