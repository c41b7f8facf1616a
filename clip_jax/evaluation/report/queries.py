"""A few queries of an evaluation with their answers, kept in `queries.json` so that runs can be compared.

The queries are evenly spaced and not chosen by success: runs that are evaluated on the same data have the same ones.
"""

import html
import json

import numpy as np

from clip_jax.evaluation.embed import evenly
from clip_jax.evaluation.report.figures import Retrieval
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.report.page import data_uri, escaped, panels, shortened, thumbnail
from clip_jax.runtime import storage

FILE = "queries.json"
_QUERIES, _ANSWERS = 8, 5  # of each result, and of each query
_SIDE = 48  # of a thumbnail in pixels


def write(workdir, result):
    """Writes the queries of an `EvalResult` into a work folder; without any, nothing is written.

    Raises OSError, or StorageError for a bucket.
    """
    found = collect(result)
    if found:
        storage.write(workdir / FILE, json.dumps(found, ensure_ascii=False))


def collect(result):
    """Returns `{title: [{"query": text, "image": thumbnail or None, "answers": [answer]}]}` of an `EvalResult`.

    An answer is `{"text": text or None, "image": thumbnail or None, "right": bool}`, best first; thumbnails are data
    URIs.
    """
    found = {}
    for items in result.artefacts.values():
        for name, item in items.items():
            if isinstance(item, Retrieval):
                found |= {f"{name}: from text to image": _texts(item), f"{name}: from image to text": _images(item)}
            elif isinstance(item, Classification):
                found[f"{name}: classes"] = _classes(item)
    return {title: queries for title, queries in found.items() if queries}


def _texts(item):
    image_ids, text_ids = np.asarray(item.image_ids), np.asarray(item.text_ids)
    chosen = _sample(np.flatnonzero(np.isin(text_ids, image_ids)))
    return [
        {
            "query": shortened(item.texts[text]),
            "image": None,
            "answers": [
                _answer(bool(image_ids[image] == text_ids[text]), image=_shown(item.images, image))
                for image in np.asarray(item.text_to_image)[text][:_ANSWERS]
            ],
        }
        for text in chosen
    ]


def _images(item):
    image_ids, text_ids = np.asarray(item.image_ids), np.asarray(item.text_ids)
    own = dict(zip(text_ids.tolist()[::-1], item.texts[::-1], strict=True))  # the first text of each id
    return [
        {
            "query": shortened(own[int(image_ids[image])]),
            "image": _shown(item.images, image),
            "answers": [
                _answer(bool(image_ids[image] == text_ids[text]), text=shortened(item.texts[text]))
                for text in np.asarray(item.image_to_text)[image][:_ANSWERS]
            ],
        }
        for image in _sample(np.flatnonzero(np.isin(image_ids, text_ids)))
    ]


def _classes(item):
    labels = np.asarray(item.labels)
    labels = labels.reshape(len(labels), -1)
    return [
        {
            "query": shortened(", ".join(str(item.class_names[label]) for label in labels[row] if label >= 0)),
            "image": _shown(item.images, row),
            "answers": [
                _answer(bool(label in labels[row]), text=shortened(item.class_names[label]))
                for label in np.asarray(item.top)[row][:_ANSWERS]
            ],
        }
        for row in _sample(np.arange(len(labels)))
    ]


def _sample(rows):
    return rows[evenly(len(rows), _QUERIES)]


def _answer(right, text=None, image=None):
    return {"text": text, "image": image, "right": right}


def _shown(images, row):
    return data_uri(thumbnail(images, row, _SIDE), "WEBP")


def side_by_side(runs):
    """Returns the queries that all runs share, with the answers of each, as HTML; empty when there are none.

    Args:
      runs: `{name of a run: what its queries.json holds}`, which is untrusted.
    """
    items = []
    for title in sorted(set.intersection(*(set(found) for found in runs.values()))):
        by_run = {name: _by_query(found[title]) for name, found in runs.items()}
        shared = [key for key in next(iter(by_run.values())) if all(key in found for found in by_run.values())]
        rows = "".join(_row(key, {name: found[key] for name, found in by_run.items()}) for key in shared)
        if rows:
            items.append((title, rows))
    intro = "<p>The queries that all runs have, each with the best answers of each run; right ones are marked.</p>"
    return panels(intro, items)


def _by_query(queries):
    """Returns `{(text, image): answers}` of the well-formed queries."""
    found = {}
    for query in queries if isinstance(queries, list) else ():
        if isinstance(query, dict) and isinstance(query.get("answers"), list):
            found[str(query.get("query")), query.get("image")] = query["answers"]
    return found


def _row(key, answers):
    text, image = key
    lines = "".join(
        f'<div class="small"><b>{escaped(name)}</b><div class="found">'
        f"{''.join(_drawn(number, answer) for number, answer in enumerate(found, 1))}</div></div>"
        for name, found in answers.items()
    )
    return f'<div class="query"><b>{_picture(image, text)} {escaped(text)}</b><div>{lines}</div></div>'


def _drawn(number, answer):
    if not isinstance(answer, dict):
        return ""
    right, text = answer.get("right") is True, escaped(f"{number}. {answer.get('text')}")
    if answer.get("image"):
        return f"<span{' class=hit' if right else ''}>{_picture(answer['image'], 'right' if right else 'wrong')}</span>"
    return f"<mark>{text}</mark>" if right else f"<small>{text}</small>"


def _picture(address, label):
    if not isinstance(address, str) or not address.startswith("data:image/"):
        return ""
    return f'<img src="{html.escape(address)}" width="{_SIDE}" height="{_SIDE}" alt="{escaped(label)}">'
