"""Examples for the reports of commands that select records: uniform draws by a hash, and a page with pictures."""

import html
from pathlib import Path

import numpy as np

from clip_jax.data.records import BadRecord
from clip_jax.data.shuffle import splitmix64

EXAMPLES = 12  # of each kind


def hashed(seed, *columns):
    """Returns a hash of each row of integers, uint64 `[n]`, with uniform bits: that of SplitMix64 (Steele et al. 2014).

    Args:
      seed: int.
      columns: arrays `[n]` of integers; none gives the hash of the seed.
    """
    value = splitmix64(np.uint64(seed % 2**64))
    for column in columns:
        value = splitmix64(value ^ np.asarray(column).astype(np.uint64))
    return value


def uniform(seed, *columns):
    """Returns `hashed` as float64 `[n]` in [0, 1)."""
    return (hashed(seed, *columns) >> np.uint64(11)) * 2.0**-53


class Smallest:
    """The rows with the smallest keys among all that were added; their order in the data decides between equal ones.

    Args:
      count: the number of rows.
    """

    def __init__(self, count=EXAMPLES):
        self._count, self._keys = count, np.zeros(0)
        self._rows = None

    def add(self, keys, rows):
        """Adds rows `[n, ...]` with keys float `[n]`."""
        keys = np.asarray(keys, np.float64)
        best = np.argsort(keys, kind="stable")[: self._count]
        rows = rows[best] if self._rows is None else np.concatenate([self._rows, rows[best]])
        keys = np.concatenate([self._keys, keys[best]])
        best = np.argsort(keys, kind="stable")[: self._count]
        self._keys, self._rows = keys[best], rows[best]

    def rows(self):
        """Returns the rows, a list of lists, the smallest key first."""
        return [] if self._rows is None else self._rows.tolist()


def shown(source, record, note="", captions=None):
    """Returns an example, a dict with `record`, `note`, `texts` and `image`, read from the source.

    Args:
      source: the source.
      record: the number of the record.
      note: what the report says about it.
      captions: numbers of its captions to show; None: the first three.
    """
    try:
        found = source[record]
    except BadRecord as bad:
        found = {"texts": [], "image": None}
        note = f"{note} {bad.args[0]}".strip()
    texts = found["texts"][:3] if captions is None else [found["texts"][i] for i in captions if i < len(found["texts"])]
    return {"record": record, "note": note, "texts": texts, "image": found.get("image")}


def without_images(sections):
    """Returns `{heading: examples}` as JSON values."""
    return {
        heading: [{key: value for key, value in example.items() if key != "image"} for example in examples]
        for heading, examples in sections.items()
    }


def write_page(out, title, lines, sections):
    """Writes `report.html`, a page that loads nothing.

    Args:
      out: the folder.
      title: of the page.
      lines: of the report in plain text.
      sections: `{heading: [example]}`; see `shown`. Empty ones are left out.

    Raises UserError when it cannot be written.
    """
    from clip_jax.evaluation.report import page as pages

    page = pages.Page()
    found = {"Report": f"<pre>{html.escape(chr(10).join(lines))}</pre>"}
    for heading, examples in sections.items():
        rows = [row for row, example in enumerate(examples) if example["image"] is not None]
        _, thumbnail = page.thumbnails(examples, rows, 128)
        cards = []
        for row, example in enumerate(examples):
            text = pages.escaped(" | ".join(example["texts"]))
            picture = thumbnail(row, f"record {example['record']}") if row in rows else ""
            note = pages.escaped(f"#{example['record']} {example['note']}")
            cards.append(f'<div class="card">{picture}<div><b>{text}</b><span class="small">{note}</span></div></div>')
        found[heading] = f'<div class="cards">{"".join(cards)}</div>' if cards else ""
    pages.write_page(Path(out) / "report.html", page.html(title, found))
