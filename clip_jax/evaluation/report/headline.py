"""Tables of headline numbers that several tasks share."""

import math

from clip_jax.evaluation.report.page import escaped, number, percent, table

COUNTS = {"images": "images", "texts": "texts", "classes": "classes", "skipped": "unusable, left out"}
RECALL_MEANING = """<p class="notes"><b>R@K</b>, image to text: the share of images for which a right text is among
the K most similar texts. Text to image: the share of texts for which a right image is among the K most similar
images. A random order with one right candidate gives K divided by the number of candidates.</p>"""
_RECALLS = [(direction, k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
_ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def sampling_error(m, metric="top1"):
    """Returns half the 95 % interval of an accuracy in percentage points, " (± 3.4)"; empty when it is unknown.

    Args:
      m: metrics of one name, with "images", their number.
      metric: key of the accuracy.
    """
    share, count = m.get(metric, math.nan), m.get("images", 0)
    if not count or not 0 <= share <= 1:
        return ""
    return f" (±\u202f{196 * math.sqrt(share * (1 - share) / count):.1f})"


def accuracy_table(results, columns, numbers=()):
    """Returns a table of accuracies; the first column also gets its sampling error.

    Args:
      results: name -> metrics, `{"pets": {"top1": 0.5, "images": 100.0, ...}}`.
      columns: metric -> column heading.
      numbers: metrics of `columns` that are plain numbers, not shares.
    """
    counts = [key for key in ("images", "classes", "skipped") if any(m.get(key) for m in results.values())]
    rows = []
    for name, m in results.items():
        cells = [number(m.get(key)) if key in numbers else percent(m.get(key)) for key in columns]
        cells[0] = f"<b>{cells[0]}</b>{sampling_error(m, next(iter(columns)))}"
        rows.append((escaped(name), *cells, *(number(m.get(key)) for key in counts)))
    return table(["", *columns.values(), *(COUNTS[key] for key in counts)], rows, "wide")


def recall_table(results):
    """Returns a table of R@1, 5 and 10 in both directions; results: name -> metrics."""
    counts = [key for key in ("images", "texts", "skipped") if any(m.get(key) for m in results.values())]
    loss = ["loss"] if any("loss" in m for m in results.values()) else []
    head = ["", *(f"{_ARROWS[d]} R@{k}" for d, k in _RECALLS), *loss, *(COUNTS[key] for key in counts)]
    rows = [
        (
            escaped(name),
            *(percent(m.get(f"{d}_R@{k}")) for d, k in _RECALLS),
            *(number(m.get("loss")) for _ in loss),
            *(number(m.get(key)) for key in counts),
        )
        for name, m in results.items()
    ]
    return table(head, rows, "wide")


def metric_table(metrics):
    """Returns a table with every metric in a row."""
    return table(["", ""], [(escaped(name), number(value)) for name, value in metrics.items()])
