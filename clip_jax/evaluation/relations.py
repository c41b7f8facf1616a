"""Relations and attributes: is the right caption more similar to an image than a wrong one of the same words?

Metrics, shares in [0, 1]; `<name>` is the option `name`:

  <name>/relations: the right caption scores higher than the one with two objects exchanged. Chance is 0.5.
  <name>/attributes: the same for the caption with the attributes of two objects exchanged, where records have one.
  <name>/images, images_attributes: numbers of images compared.
  <name>/relations_<part>, attributes_<part>, images_<part>, images_attributes_<part>: the same for each value of the
    record field "held_out" ("seen" where it is empty), where records have that field.
  <name>/image_to_text_R@1, R@5, R@10, text_to_image_R@1, R@5, R@10: retrieval among the right captions.
  <name>/skipped: records that are unusable or have nothing to compare.

Artefacts: "relations" named `<name>/relations` and `<name>/attributes`; "similarity" and "alignment" (methods that
compare patches with words) named `<name>`.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np

from clip_jax.data.sources.scenes import HELD_OUT
from clip_jax.data.sources.spec import parse
from clip_jax.data.templates import usable_texts
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import embed, open_source
from clip_jax.evaluation.report.figures import add_similarity
from clip_jax.evaluation.report.galleries import GALLERY, choose, gallery
from clip_jax.evaluation.report.headline import RECALL_MEANING, recall_table, sampling_error
from clip_jax.evaluation.report.page import escaped, number, percent, table
from clip_jax.evaluation.results import EvalResult, Images, by_name

_PAIRS = 16  # images compared with a caption each in one block
_TESTS = {"relations": "objects exchanged", "attributes": "attributes exchanged"}
_MEANING = """<p class="notes">The share of images to which the right caption is more similar than a wrong one of the
same words: two <b>objects</b> have changed places, or two objects have each other's <b>attributes</b>. Chance is 50 %,
which a model reaches that knows words, but not how they belong together. <b>Object</b>, <b>combination</b>: images with
an object, or a pair of objects, that training never showed; <b>seen</b>: the others. <b>±</b>: the 95 % sampling error
for this number of images.</p>"""


@dataclass
class CaptionPairs:
    """A right and a wrong caption for each of N images.

    Attributes:
      right: N strings.
      wrong: N strings.
      scores: float32 `[N, 2]`, similarity of the image and the right caption, the wrong caption.
      images: the N images.
      group: N strings by which images can be filtered (scenes: what was held out of training).
    """

    section = "Relations"
    intro = f"""<p>An image, <mark>its caption</mark>, and a wrong one of the same words, with their similarity. The
clearest right and wrong answers, up to {GALLERY} of each; a tie counts as wrong here.</p>"""

    right: list[str]
    wrong: list[str]
    scores: np.ndarray
    images: Images
    group: list[str]

    def draw(self, page):
        """Returns a gallery of right and wrong answers as HTML."""
        scores = np.asarray(self.scores, np.float32).reshape(-1, 2)
        with np.errstate(invalid="ignore"):  # of infinite scores
            margin = np.nan_to_num(scores[:, 0] - scores[:, 1], nan=0.0)
        is_right = margin > 0
        chosen = choose(is_right, abs(margin), np.arange(len(margin)))
        _, thumbnail = page.thumbnails(self.images, np.concatenate(list(chosen.values())))
        groups = sorted({str(group) for group in self.group})

        def card(row):
            captions = zip((" class=hit", ""), (self.right[row], self.wrong[row]), scores[row], strict=True)
            lines = "".join(
                f"<li{css}><span>{escaped(text)}</span><b>{score:.3f}</b></li>" for css, text, score in captions
            )
            note = f'<span class="small">{escaped(self.group[row])} {margin[row]:+.3f}</span>'
            index = groups.index(str(self.group[row]))
            return (
                f'<div class="card" data-group="{index}">{thumbnail(row, self.right[row])}'
                f"<div><ol>{lines}</ol>{note}</div></div>"
            )

        return gallery(groups, is_right, {kind: [card(row) for row in rows] for kind, rows in chosen.items()})


def run(model, source="scenes", split="", name="scenes", image="", text="", limit=1500):
    """Runs the task on a source string.

    Args:
      source: a source with captions and `wrong_objects` (docs/data.md).
      split: its split; by default "test", or the only one.
      name: prefix of the metrics.
      image: record field of the image.
      text: record field of the captions.
      limit: at most this many images, evenly spaced.
    """
    return relations_task(model, open_source(source, split, image=image, text=text), name=name, limit=limit)


def relations_task(model, source, *, name="scenes", limit=1500, batch_size=256):
    """Runs the task on an opened source; for the arguments see `run`.

    Records have `wrong_objects`, their first caption with two objects exchanged. They may have `wrong_attributes`, the
    caption with the attributes of two objects exchanged. Both may be empty. A tie counts as half.

    Raises UserError when no image is usable, or no record has a caption and `wrong_objects`.
    """
    from clip_jax.evaluation.recall import model_recall

    embedded, skipped = _comparable(embed(model, [source], batch_size, limit), source, name)
    right = [_first_text(record, "texts") for record in embedded.records]
    z_right, parts = np.asarray(model.embed_text(right)), [record.get("held_out") for record in embedded.records]
    scores = _paired_similarity(model, embedded.z, z_right)
    texts, first, ids = np.unique(right, return_index=True, return_inverse=True)
    result = EvalResult({})
    for test, wrong_field, count in (
        ("relations", "wrong_objects", "images"),
        ("attributes", "wrong_attributes", "images_attributes"),
    ):
        wrong = [_first_text(record, wrong_field) for record in embedded.records]
        if not len(rows := np.flatnonzero([bool(text) for text in wrong])):
            continue
        z_wrong = np.asarray(model.embed_text([wrong[i] for i in rows]))
        pairs = np.stack([scores[rows], _paired_similarity(model, embedded.z[rows], z_wrong)], 1)
        correct = (pairs[:, 0] > pairs[:, 1]) + (pairs[:, 0] == pairs[:, 1]) / 2
        part_of_row = np.asarray(["" if parts[i] is None else str(parts[i]) or "seen" for i in rows])
        for part in ["", *sorted(set(part_of_row) - {""}, key=lambda part: (part != "seen", part))]:
            is_in, end = (part_of_row == part) | (not part), part and f"_{part}"
            result.metrics[f"{name}/{test}{end}"] = float(correct[is_in].mean())
            result.metrics[f"{name}/{count}{end}"] = float(is_in.sum())
            result.keep(f"{name}/{test}{end}", correct[is_in], ids[rows][is_in])
        captions = [right[i] for i in rows], [wrong[i] for i in rows]
        result.artefacts["relations"][f"{name}/{test}"] = CaptionPairs(
            *captions, pairs, embedded.images.select(rows), part_of_row.tolist()
        )
    found = model_recall(model, embedded.z, z_right, ids, ids)
    result.metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
    for key, hits in found.hits.items():
        result.keep(f"{name}/{key}", hits, ids)
    result.metrics[f"{name}/skipped"] = float(skipped)
    add_similarity(result, name, model, embedded, ids, texts.tolist(), z_right[first], texts.tolist())
    return result.credit(__name__)


def summary(metrics):
    """Yields a table for each result: a row for each wrong caption, a column for each part of the images."""
    for name, m in by_name(metrics).items():
        parts = ["", *(key.removeprefix("relations") for key in m if key.startswith("relations_"))]
        heads = "".join(f"{part[1:] or 'all':>13}" for part in parts)
        yield f"{name}, right caption against wrong{heads}   chance  pictures"
        for test, count in (("relations", "images"), ("attributes", "images_attributes")):
            if test in m:
                cells = "".join(f"{m[test + part]:13.1%}" if test + part in m else f"{'-':>13}" for part in parts)
                yield f"  {_TESTS[test]:{len(name) + 27}}{cells}      50%  {m[count]:8.0f}"
        recalls = (f"R@{k} {m[f'image_to_text_R@{k}']:.1%} / {m[f'text_to_image_R@{k}']:.1%}" for k in (1, 10))
        yield f"  retrieval among the right captions, i2t/t2i: {', '.join(recalls)}"


def sources(options):
    """Returns the `(source, split)` that a run with these options opens."""
    return [(options["source"], options["split"])]


def metric_names(options):
    """Returns the names of the metrics; "*" stands for the parts of the source."""
    keys = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    is_scenes = all(part.base == "scenes" for part in parse(options["source"]))
    for test in ("relations", "attributes", "images", "images_attributes"):
        keys += [test, *(f"{test}_{part}" for part in (("seen", *filter(None, HELD_OUT)) if is_scenes else "*"))]
    return [f"{options['name']}/{key}" for key in (*keys, "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    results = by_name(metrics)
    recalls = f"{recall_table(results)}{RECALL_MEANING}"
    return f"<h3>Relations and attributes</h3>{_table(results)}{_MEANING}{recalls}"


def _table(results):
    parts = dict.fromkeys(
        key.removeprefix("relations") for m in results.values() for key in m if re.match("relations(_|$)", key)
    )

    def cell(m, test, part):
        count = m.get(f"images{'_attributes' if test == 'attributes' else ''}{part}")
        if not count:
            return "–"
        share = m.get(test + part)
        error = sampling_error({test: share, "images": count}, test)
        return f'{percent(share)}{error}<span class="small">{number(count)} images</span>'

    rows = [
        (f"{escaped(name)}: {words}", *(cell(m, test, part) for part in parts))
        for (name, m), (test, words) in itertools.product(results.items(), _TESTS.items())
        if test in m
    ]
    return table(["", *(escaped(part[1:]) or "all" for part in parts)], rows, "wide")


def _comparable(embedded, source, name):
    """Returns the images whose records have a caption and a wrong one, and the number of all other records."""
    usable = [
        row
        for row, record in enumerate(embedded.records)
        if _first_text(record, "texts") and _first_text(record, "wrong_objects")
    ]
    if not usable:
        raise UserError(
            f"{name}: {source.name} has no records with a caption and `wrong_objects`, "
            "that caption with two objects exchanged"
        )
    return embedded.select(np.asarray(usable)), embedded.skipped + len(embedded.records) - len(usable)


def _first_text(record, field):
    """Returns the first usable text of a field; empty where there is none."""
    return next(iter(usable_texts(record.get(field), strict=False)), "").strip()


def _paired_similarity(model, z_image, z_text):
    """Returns the similarity of each image with the text of the same row, float32 `[n]`.

    A model compares sets with sets, so this is the diagonal of small blocks. Only one block is held in memory.
    """
    n = len(z_image)
    # All blocks have one shape, which compiles once: the last block wraps around.
    blocks = np.resize(np.arange(n), (-(-n // _PAIRS), _PAIRS))
    return np.concatenate(
        [np.diagonal(np.asarray(model.similarity(z_image[b], z_text[b]), np.float32)) for b in blocks]
    )[:n]
