"""The page of a search: a head, and for each query its hits with large thumbnails and links."""

import html
import os
import pathlib

from clip_jax.data import decode
from clip_jax.data.records import BadRecord
from clip_jax.evaluation.report.page import Page, facts

_TILE = 256  # side of a thumbnail in pixels


def render(title, about, results, *, link=None, similar=None, form=""):
    """Returns the page as a string.

    Args:
      title: untrusted text.
      about: `[(name, text), ...]`, what was searched with what.
      results: `[(Query, hits), ...]` of `clip_jax.search`.
      link: hit -> the address of its picture, or None; by default that of the file, if it is one.
      similar: hit -> the address of a search for similar pictures, or None.
      form: HTML above the results.
    """
    page, link = Page(), link or file_address
    found = "".join(_result(page, query, hits, link, similar) for query, hits in results)
    return page.html(title, {"Search": form + facts(about), "Found": found})


def file_address(hit):
    """Returns the file: address of a hit's picture, or None where the picture is no file of its own."""
    path = hit.get("path")
    return pathlib.Path(os.path.abspath(path)).as_uri() if path and os.path.isfile(path) else None


def _result(page, query, hits, link, similar):
    images = [{"image": query.image}, *({"image": hit.get("image")} for hit in hits)]
    shown = [row for row, image in enumerate(images) if image["image"] is not None]
    _, thumbnail = page.thumbnails(images, shown, _TILE)
    head = thumbnail(0, query.label) if query.image is not None else ""
    cards = "".join(_card(rank, hit, thumbnail, link, similar) for rank, hit in enumerate(hits, 1))
    return f'<h3 class="asked">{head} {html.escape(query.label)}</h3><div class="pictures">{cards}</div>'


def _card(rank, hit, thumbnail, link, similar):
    address = link(hit)
    lines = [f'<span class="small">{rank}. similarity {hit["score"]:.3f}{_size(hit)}</span>']
    if text := html.escape(" ".join(hit["text"].split())):
        lines.append(f"<b>{text}</b>")
    if "record" in hit:
        folder, name = os.path.split(hit["path"])
        name = html.escape(name or f"record {hit['record']}").replace("_", "_<wbr>")
        lines.append(f'<span class="name">{_linked(name, address)}</span>')
        place = f"#{hit['record']} {folder}".strip()
        lines.append(f'<span class="small">{html.escape(place)}</span>')
        if similar:
            lines.append(f'<span class="small">{_linked("similar pictures", similar(hit))}</span>')
    picture = _linked(thumbnail(rank, hit["text"]), address) if hit.get("image") is not None else ""
    return f'<div class="picture">{picture}{"".join(lines)}</div>'


def _linked(content, address):
    return f'<a href="{html.escape(address)}">{content}</a>' if address else content


def _size(hit):
    """Returns the size of a hit's picture, ", 640 × 480"; empty where there is none."""
    try:
        width, height = decode.open_image(hit["image"]).size
    except (BadRecord, KeyError):
        return ""
    return f", {width:,} × {height:,}"
