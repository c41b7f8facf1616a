"""One self-contained HTML page: its frame, thumbnails, text, numbers, tables and panels.

`report.html` in this folder is the skeleton with its style and script. The page loads nothing: images are
thumbnails in data URIs, those of one figure side by side in one WebP sheet. Names and captions are untrusted and
escaped wherever they appear.
"""

import base64
import html
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clip_jax.data.records import BadRecord
from clip_jax.errors import UserError
from clip_jax.runtime import storage

COLOURS = 10  # colours of curves and groups in the style
SHEET_COLUMNS = 32  # thumbnails in a row of a sheet
_TILE = 64  # side of a thumbnail in pixels
_TEXT_LENGTH = 120  # longer captions are cut
_SKELETON = Path(__file__).with_name("report.html")


@dataclass
class Page:
    """Collects the thumbnails and the script data that sections add to a page.

    Attributes:
      sheets: CSS rules of sheets of thumbnails.
      data: lists of values for the script, by kind of figure.
    """

    sheets: list[str] = field(default_factory=list)
    data: dict[str, list] = field(default_factory=lambda: {"charts": [], "matrices": [], "maps": []})

    def thumbnails(self, images, rows, tile=_TILE):
        """Adds a sheet of thumbnails.

        Args:
          images: a sequence of records with "image".
          rows: indices of the images to show.
          tile: side of a thumbnail in pixels.

        Returns: the CSS class of the sheet, and a function (row, label) -> HTML of that thumbnail.
        """
        place = {row: i for i, row in enumerate(sorted(set(map(int, rows))))}
        name = f"t{len(self.sheets)}"
        if not place:
            return name, lambda row, label: ""

        def read(row):
            return thumbnail(images, row, tile)

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            sheet = _tiled(list(pool.map(read, place)), SHEET_COLUMNS)
        columns, lines = sheet.shape[1] // tile, sheet.shape[0] // tile
        size = f"calc({columns}*var(--s)) calc({lines}*var(--s))"
        self.sheets.append(f".{name}{{background-image:url({data_uri(sheet, 'WEBP')});background-size:{size}}}")

        def tag(row, label):
            y, x = divmod(place[int(row)], SHEET_COLUMNS)
            label = escaped(label)
            return f'<i class="t {name}" style="--x:{x};--y:{y}" role="img" aria-label="{label}" title="{label}"></i>'

        return name, tag

    def add(self, kind, value):
        """Adds data of a figure for the script, "charts", "matrices" or "maps"; returns its number."""
        self.data[kind].append(value)
        return len(self.data[kind]) - 1

    def html(self, title, sections):
        """Returns the whole page; `title` is untrusted, `sections` is a dict heading -> HTML, empty ones left out."""
        sections = {name: content for name, content in sections.items() if content}
        parts = {
            "title": escaped(title),
            "sheets": "\n".join(self.sheets),
            "nav": " ".join(f'<a href="#{_slug(name)}">{escaped(name)}</a>' for name in sections),
            "sections": "\n".join(
                f'<section id="{_slug(name)}"><h2>{escaped(name)}</h2>{content}</section>'
                for name, content in sections.items()
            ),
            # Only "</" and "<!--" have a meaning inside a script element.
            "data": json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        }
        return re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], _SKELETON.read_text("utf-8"))


def write_page(path, page):
    """Writes a page atomically and creates its folder; returns the path.

    Raises UserError when it cannot be written, and StorageError when a bucket does not take it.
    """
    path = storage.path(path)
    try:
        storage.write(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"the report {str(path)!r} cannot be written: {error.strerror}") from None
    return path


# --- text and numbers ---


def escaped(value):
    """Returns untrusted text as HTML, for content or an attribute; long text is cut."""
    return html.escape(shortened(value))


def shortened(value):
    """Returns text on one line, cut to 120 characters."""
    text = " ".join(str(value).replace("\0", "").split())
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…"


def percent(value):
    """Returns a share as a percentage, a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    value = 100 * value
    return f"{value:.2f}\u202f%" if 0 < abs(value) < 1 else f"{value:.1f}\u202f%"


def number(value):
    """Returns a number with thousands separators or four digits, a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def _slug(name):
    return re.sub(r"[^\w]+", "-", name.lower())


# --- blocks ---


def table(head, rows, css=""):
    """Returns a table; all cells are HTML, the first cell of a row is its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    lines += [f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) for first, *rest in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    head = f"<thead><tr>{lines[0]}</tr></thead>"
    return f'<div class="scroll"><table class="{css}">{head}<tbody>{body}</tbody></table></div>'


def facts(items):
    """Returns pairs `(name, text)` as a list with the names above; both are untrusted, empty texts are left out."""
    cells = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(text)}</dd></div>" for name, text in items if text)
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def panels(intro, items):
    """Returns an introduction (HTML) and one panel per item `(title, HTML)`; the script turns panels into tabs."""
    items = "".join(f'<div class="panel"><h3>{escaped(title)}</h3>{content}</div>' for title, content in items)
    return f'{intro}<div class="panels">{items}</div>' if items else ""


# --- images ---


def data_uri(image, kind):
    """Returns an image, uint8 `[H, W, C]`, as a data URI; kind: "WEBP" or "PNG"."""
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": 70, "method": 4} if kind == "WEBP" else {"optimize": True}
    Image.fromarray(image).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(images, row, tile):
    """Returns the whole image on white, uint8 `[tile, tile, 3]`; white alone when it cannot be read any more."""
    from PIL import Image

    from clip_jax.data import decode

    canvas = Image.new("RGB", (tile, tile), "white")
    try:
        image = decode.open_image(images[row].get("image"))
        image, _ = decode.shrink_on_load(image, (0, 0, *image.size), tile)
        scale = (tile - 2) / max(image.size)  # a margin of one pixel keeps neighbours in the sheet apart
        size = [max(1, round(side * scale)) for side in image.size]
        image = decode.resize(decode.flatten(image), tuple(size), Image.Resampling.LANCZOS)
    except BadRecord:
        return np.asarray(canvas)
    canvas.paste(image, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return np.asarray(canvas)


def _tiled(tiles, columns):
    """Returns tiles `[tile, tile, 3]` side by side, `columns` in a row, uint8 `[H, W, 3]`."""
    columns = min(columns, len(tiles))
    lines = -(-len(tiles) // columns)
    tile = tiles[0].shape[0]
    sheet = np.full((lines * columns, tile, tile, 3), 255, np.uint8)
    sheet[: len(tiles)] = tiles
    return sheet.reshape(lines, columns, tile, tile, 3).swapaxes(1, 2).reshape(lines * tile, columns * tile, 3)
