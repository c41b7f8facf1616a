"""Which classes are taken for which: the confusion matrix, the most confused pairs, and a table of all classes."""

import html
from dataclasses import dataclass

import numpy as np

from clip_jax.evaluation.report.page import escaped, number, percent, table

_MATRIX = 24  # classes in a matrix, at most
_PAIRS = 12  # pairs in the list
_ROWS = 2000  # classes in the table


@dataclass
class Confusion:
    """The first predictions for N images of C classes, each image with one label.

    Attributes:
      class_names: C strings.
      labels: int32 `[N]`, index into `class_names`.
      predicted: int32 `[N]`, the predicted class.
    """

    section = "Classes"
    intro = """<p>Which classes are recognised, and which are taken for which.</p>"""

    class_names: list[str]
    labels: np.ndarray
    predicted: np.ndarray

    def draw(self, page):
        """Returns the matrix of few classes or the most confused pairs of many, and the table of classes, as HTML."""
        labels, predicted = np.asarray(self.labels), np.asarray(self.predicted)
        if not len(labels):
            return "<p>There are no images.</p>"
        classes, places = np.unique(np.concatenate([labels, predicted]), return_inverse=True)
        names = [str(self.class_names[i]) for i in classes]
        labels, predicted = places[: len(labels)], places[len(labels) :]
        blocks = [_matrix(names, labels, predicted) if len(names) <= _MATRIX else ""]
        pairs = confused_pairs(labels, predicted)
        counts = np.bincount(labels, minlength=len(names))
        rows = [
            (escaped(names[true]), escaped(names[taken]), number(count), percent(count / counts[true]))
            for true, taken, count in pairs[:_PAIRS]
        ]
        if rows:
            blocks += ["<h4>The most confused pairs</h4>"]
            blocks += [table(["class", "taken for", "images", "share of the class"], rows, "pairs")]
        return "".join([*blocks, _class_table(names, labels, predicted, pairs)])


def confused_pairs(labels, predicted):
    """Returns `[(class, other class it was taken for, images), ...]`, the most frequent first, then by class.

    Args:
      labels, predicted: int `[n]`.
    """
    wrong = np.stack([labels, predicted], 1)[np.asarray(labels) != predicted]
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(*map(int, pairs[i]), int(counts[i])) for i in order]


def _matrix(names, labels, predicted):
    """Returns the confusion matrix as a table; a cell is the darker, the larger its share of the row."""
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predicted), 1)
    head = "".join(f'<th scope="col"><span>{escaped(name)}</span></th>' for name in names)
    lines = []
    for i, name in enumerate(names):
        cells = []
        for j, count in enumerate(counts[i].tolist()):
            share = count / max(counts[i].sum(), 1)
            kind = "hit" if i == j else "miss"
            title = html.escape(f"{name} taken for {names[j]}: {count:,} ({percent(share)})") if i != j else ""
            style = f' style="--v:{100 * share:.0f}%"' if count else ""
            cells.append(f'<td class="{kind}"{style} title="{title}">{count or ""}</td>')
        lines.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(cells)}</tr>')
    note = '<p class="small">Rows: the true class. Columns: the prediction. A colour is the share of the row.</p>'
    return (
        f'{note}<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _class_table(names, labels, predicted, pairs):
    """Returns a table with a row a class, the worst ones first, that can be sorted and filtered."""
    images = np.bincount(labels, minlength=len(names))
    taken = np.bincount(predicted, minlength=len(names))
    right = np.bincount(labels[labels == predicted], minlength=len(names))
    most = {}
    for true, other, count in pairs:
        most.setdefault(true, f"{names[other]} ({count:,})")
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = right / images, right / taken
    order = np.lexsort((np.arange(len(names)), -images, np.nan_to_num(recall, nan=2)))[:_ROWS]
    rows = "".join(
        f"<tr><td>{escaped(names[i])}</td>{_cell(images[i], number)}{_cell(recall[i], percent)}"
        f"{_cell(precision[i], percent)}<td>{escaped(most.get(int(i), '–'))}</td></tr>"
        for i in order
    )
    heads = ("class", "images", "right, of its images", "right, of its predictions", "most often taken for")
    head = "".join(f'<th scope="col"><button>{name}</button></th>' for name in heads)
    search = '<input type="search" data-rows placeholder="part of a name">'
    cut = f", the {_ROWS:,} worst" if len(names) > _ROWS else ""
    return (
        f"<details><summary>{len(names):,} classes{cut}</summary>"
        f'<div class="filter"><label>Filter {search}</label></div>'
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _cell(value, shown):
    return f'<td data-value="{float(value)!r}">{shown(float(value))}</td>'
