"""One self-contained HTML page of an evaluation: headline numbers, training curves, similarity, predictions, retrievals, a 2-D map.

    write_report("runs/clip/report.html", result, title="clip on emoji", config=config.to_dict(), metrics_jsonl="runs/clip/metrics.jsonl")

`report.html` beside this module is the page's skeleton with its style and script. The page loads nothing: pictures are thumbnails in
data URIs, those of one figure side by side in one WebP sheet. Names and captions are untrusted and escaped wherever they appear.
"""

import base64
import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_jax.data.records import BadRecord
from clip_jax.errors import UserError
from clip_jax.evaluation import alignment

if TYPE_CHECKING:
    pass

_SKELETON = Path(__file__).with_name("report.html")
_GALLERY, _QUERIES = 24, 12  # predictions of each kind in a gallery; queries shown in each direction of a retrieval
_TILE, _MAP_TILE, _SHEET_COLUMNS = 64, 40, 32  # side of a thumbnail in pixels; tiles in a row of a sheet
_POINTS = 400  # of a curve
_COLOURS = 10  # of curves and groups, as in the style
_TEXT_LENGTH = 120  # longer captions are cut


def write_report(
    path,
    result,
    *,
    title,
    config=None,
    metrics_jsonl=None,
):
    """Writes the page of an evaluation; a page that is there already is replaced only by a whole one.

    Args:
        path: the HTML file; its folder is made.
        result: of one task, or of several (`tasks.merge_results`). Figures without material are left out.
        title: of the page.
        config: nested configuration to be shown.
        metrics_jsonl: the training run's metrics, rows `{"step": int, "time": float, name: number or null, ...}`. Of rows that repeat a
            step (a resumed run) the last counts; lines that are not such rows are passed over, and so is a missing file.

    Returns: `path`.
    Raises UserError when it cannot be written.
    """
    return write_page(path, render(result, title=title, config=config, metrics_jsonl=metrics_jsonl))


def write_page(path, page):
    """Writes a page as one piece; makes its folder. Raises UserError when it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(page.encode("utf-8", "replace"))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the report {str(path)!r} cannot be written: {error.strerror}") from None
    return path


def render(result, *, title, config=None, metrics_jsonl=None):
    """The page as a string; arguments as of `write_report`."""
    page = Page()
    artefacts = result.artefacts
    sections = {
        "Results": _results(result.metrics),
        "Training": "" if metrics_jsonl is None else _training(page, Path(metrics_jsonl)),
        "Predictions": panels(artefacts.get("classification"), lambda item: _gallery(page, item), _GALLERY_INTRO),
        "Relations": panels(artefacts.get("relations"), lambda item: _caption_pairs(page, item), _PAIRS_INTRO),
        "Retrieval": panels(artefacts.get("retrieval"), lambda item: _retrieval(page, item), _RETRIEVAL_INTRO),
        "Similarity": panels(artefacts.get("similarity"), lambda item: _similarity(page, item), _SIMILARITY_INTRO),
        "Words and patches": panels(
            artefacts.get("alignment"), lambda item: alignment.draw(page, item), alignment.INTRO
        ),
        "Map": panels(artefacts.get("map"), lambda item: embedding_map(page, item), MAP_INTRO),
        "All metrics": _all_metrics(result.metrics),
        "Configuration": _configuration(config or {}),
    }
    return page.html(title, {name: content for name, content in sections.items() if content})


@dataclass
class Page:
    """What sections add to the page besides their own HTML: sheets of thumbnails as CSS rules, and data for the script."""

    sheets: list[str] = field(default_factory=list)
    data: dict[str, list] = field(
        default_factory=lambda: {"plot": [_LEFT, _WIDTH], "charts": [], "matrices": [], "maps": []}
    )

    def thumbnails(self, pictures, rows, tile=_TILE):
        """Makes a sheet of the pictures `rows`; returns its CSS class, and a function (row, label) -> HTML of that thumbnail."""
        place = {row: i for i, row in enumerate(sorted(set(map(int, rows))))}
        name = f"t{len(self.sheets)}"
        if not place:
            return name, lambda row, label: ""

        def read(row):
            return _thumbnail(pictures, row, tile)

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            sheet = _tiled(list(pool.map(read, place)), _SHEET_COLUMNS)
        columns, lines = sheet.shape[1] // tile, sheet.shape[0] // tile
        size = f"calc({columns}*var(--s)) calc({lines}*var(--s))"
        self.sheets.append(f".{name}{{background-image:url({_data_uri(sheet, 'WEBP')});background-size:{size}}}")

        def tag(row, label):
            y, x = divmod(place[int(row)], _SHEET_COLUMNS)
            return f'<i class="t {name}" style="--x:{x};--y:{y}" role="img" aria-label="{_text(label)}" title="{_text(label)}"></i>'

        return name, tag

    def html(self, title, sections):
        """The whole page. title: untrusted; sections: name -> HTML."""
        parts = {
            "title": _text(title),
            "sheets": "\n".join(self.sheets),
            "nav": " ".join(f'<a href="#{_slug(name)}">{name}</a>' for name in sections),
            "sections": "\n".join(
                f'<section id="{_slug(name)}"><h2>{name}</h2>{content}</section>' for name, content in sections.items()
            ),
            # In a script element only "</" and "<!--" mean anything.
            "data": json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        }
        return re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], _SKELETON.read_text("utf-8"))


# --- pictures ---


def _thumbnail(pictures, row, tile):
    """uint8 [tile, tile, 3]: the whole picture on white; white alone when it cannot be read any more."""
    from PIL import Image

    from clip_jax.data import decode

    canvas = Image.new("RGB", (tile, tile), "white")
    try:
        image = decode.open_image(pictures[row].get("image"))
        image, _ = decode.shrink_on_load(image, (0, 0, *image.size), tile)
        scale = (tile - 2) / max(image.size)  # a margin of one pixel keeps neighbours in the sheet apart
        size = [max(1, round(side * scale)) for side in image.size]
        image = decode.flatten(image).resize(size, Image.Resampling.LANCZOS)
    except BadRecord:
        return np.asarray(canvas)
    canvas.paste(image, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return np.asarray(canvas)


def _tiled(tiles, columns):
    """Tiles [tile, tile, 3] side by side, `columns` in a row: uint8 [H, W, 3]."""
    columns = min(columns, len(tiles))
    lines = -(-len(tiles) // columns)
    tile = tiles[0].shape[0]
    sheet = np.full((lines * columns, tile, tile, 3), 255, np.uint8)
    sheet[: len(tiles)] = tiles
    return sheet.reshape(lines, columns, tile, tile, 3).swapaxes(1, 2).reshape(lines * tile, columns * tile, 3)


def _data_uri(image, kind):
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": 70, "method": 4} if kind == "WEBP" else {"optimize": True}
    Image.fromarray(image).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- text and numbers ---


def _text(value):
    """Untrusted text for HTML, content or attribute; cut when long."""
    return html.escape(_short(value))


def _short(value):
    text = " ".join(str(value).replace("\0", "").split())
    return text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…"


def _slug(name):
    return name.lower().replace(" ", "-")


def _percent(value):
    if value is None or not math.isfinite(value):
        return "–"
    percent = 100 * value
    return f"{percent:.2f}\u202f%" if 0 < abs(percent) < 1 else f"{percent:.1f}\u202f%"


def _number(value):
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def table(head, rows, css=""):
    """Cells are HTML; the first of a row is its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    lines += [f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) for first, *rest in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return f'<div class="scroll"><table class="{css}"><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>'


def panels(items, draw, intro):
    """An introduction and a panel per artefact, the most telling cell of the emoji protocol first; the script makes tabs of them."""
    if not items:
        return ""
    order = {f"{concept}_concept_{vendor}_vendor": i for i, (concept, vendor) in enumerate(reversed(_CELLS))}
    names = sorted(items, key=lambda name: order.get(name.rpartition("/")[2], -1))
    panels = (f'<div class="panel"><h3>{_text(_title(name))}</h3>{draw(items[name])}</div>' for name in names)
    return f'{intro}<div class="panels">{"".join(panels)}</div>'


def _title(name):
    """A readable name of an artefact or of a metric's first part."""
    match = re.fullmatch(r"emoji(?:_(val|test))?/(seen|unseen)_concept(?:_(seen|unseen)_vendor)?", name)
    if not match:
        return name
    subset, concept, vendor = match.groups()
    return _cell_title(concept, vendor) + {"val": " (validation)", "test": " (test)", None: ""}[subset]


def _cell_title(concept, vendor):
    return (
        f"{concept.capitalize()} concepts" + {"seen": ", seen vendors", "unseen": ", unseen vendor", None: ""}[vendor]
    )


# --- headline numbers ---

_CELLS = [("seen", "seen"), ("seen", "unseen"), ("unseen", "seen"), ("unseen", "unseen")]
_CELL_MEANING = {
    (
        "seen",
        "seen",
    ): "These very pictures were trained on: the number shows what was memorised, not what was learnt in general.",
    (
        "seen",
        "unseen",
    ): "Known things in a drawing style that is new. Vendors draw much alike, so nearest pixels do well here, too.",
    ("unseen", "seen"): "Things that never occurred in training, drawn in known styles.",
    ("unseen", "unseen"): "Neither the thing nor the drawing style occurred in training: the number that says most.",
}
_EMOJI_MEANING = """<ul class="notes">
<li><b>Top-1</b>: the share of pictures whose right name is the most similar of all the names. <b>Top-5</b>: it is among the five most
similar.</li>
<li><b>Chance</b>: what a random choice of names would reach.</li>
<li><b>Nearest in pixels</b>: the name of the training picture that looks most alike at 16 × 16 pixels (never the picture itself). It needs
no learning, and cannot know an unseen concept.</li>
<li><b>±</b>: the 95 % sampling error of top-1 for so many pictures, taken as independent (several vendors' pictures of one thing are
less than that).</li></ul>"""
_SUBSETS = {
    "": "all pictures",
    "_without_flags_clocks_keycaps": "without flags, clock faces, keycaps",
    "_without_compositions": "also without man or woman + role, families",
}
_SUBSETS_MEANING = """<p>Some unseen names are put together of parts that training has seen (“flag: …”, clock faces, “woman” +
occupation). These are the same numbers without such pictures; all names stay to choose from.</p>"""
_RECALLS = [(direction, k) for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
_RECALL_MEANING = """<p class="notes"><b>R@K</b>, picture to text: the share of pictures for which a right text is among the K most
similar texts. Text to picture: the share of texts for which a right picture is among the K most similar pictures.</p>"""
_ZEROSHOT = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "chance_top1": "chance top-1",
             "chance_top5": "chance top-5"}  # fmt: skip
_ZEROSHOT_MEANING = """<p class="notes"><b>Top-1</b>: the share of pictures whose right class name is the most similar of all. <b>Top-5</b>:
it is among the five most similar. <b>Mean per class</b>: top-1 of each class, averaged, so that every class counts alike. <b>Chance</b>: a
random choice. <b>±</b>: the 95 % sampling error for so many pictures.</p>"""
_PROBE = {"accuracy": "accuracy", "val_accuracy": "validation accuracy", "l2": "L2 strength"}
_PROBE_MEANING = """<p class="notes"><b>Accuracy</b>: the share of test pictures that a linear classifier, trained on the frozen picture
embeddings, gets right. The strength of its regularisation was chosen by <b>validation accuracy</b>. <b>±</b>: the 95 % sampling error for
so many pictures.</p>"""
_RELATIONS = {"relations": "objects exchanged", "attributes": "attributes exchanged"}
_RELATIONS_MEANING = """<p class="notes">The share of pictures to which the right caption is more similar than one of the same words that
is wrong: two <b>objects</b> in each other's place, or with each other's <b>attributes</b>. Chance is 50 %, and that is what a model
reaches that knows words, but not how they belong together. <b>Object</b>, <b>combination</b>: pictures with an object, or a pair of
objects, that training never showed; <b>seen</b>: the others. <b>±</b>: the 95 % sampling error for so many pictures.</p>"""
_COUNTS = {"images": "pictures", "texts": "texts", "classes": "classes", "skipped": "unusable, left out"}


def _results(metrics):
    tasks = {}
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        tasks.setdefault(task, {})[metric] = value
    blocks = []
    for prefix, subset in (("emoji", ""), ("emoji_val", " (validation concepts)"), ("emoji_test", " (test concepts)")):
        names = {cell: f"{prefix}/{cell[0]}_concept_{cell[1]}_vendor" for cell in _CELLS}
        cells = {cell: tasks.pop(name) for cell, name in names.items() if "top1" in tasks.get(name, {})}
        if cells:
            skipped = tasks.pop(prefix, {}).get("skipped", 0)
            blocks.append(f"<h3>Naming emoji{subset}</h3>" + _emoji_results(cells, skipped))
    if found := {name: tasks.pop(name) for name in list(tasks) if "relations" in tasks[name]}:
        recalls = f"{_recall_table(found)}{_RECALL_MEANING}"
        blocks.append(f"<h3>Relations and attributes</h3>{_relation_table(found)}{_RELATIONS_MEANING}{recalls}")
    for title, key, columns, meaning in (
        ("Zero-shot classification", "top1", _ZEROSHOT, _ZEROSHOT_MEANING),
        ("Retrieval", "image_to_text_R@1", None, _RECALL_MEANING),
        ("Linear probe", "accuracy", _PROBE, _PROBE_MEANING),
    ):
        found = {name: tasks.pop(name) for name in list(tasks) if key in tasks[name]}
        if found and columns is None:
            blocks.append(f"<h3>{title}</h3>{_recall_table(found)}{meaning}")
        elif found:
            blocks.append(f"<h3>{title}</h3>{_task_table(found, columns)}{meaning}")
    rest = [
        (f"{task}/{metric}".lstrip("/"), value) for task, values in tasks.items() for metric, value in values.items()
    ]
    if rest:
        blocks.append(
            ("<h3>Other metrics</h3>" if blocks else "") + table(["", ""], [(_text(n), _number(v)) for n, v in rest])
        )
    return "".join(blocks) or "<p>No task was run, so there are no metrics.</p>"


def _emoji_results(cells, skipped):
    cards, subsets = [], []
    for cell, m in cells.items():
        rows = [("model", _percent(m["top1"]), _percent(m.get("top5")))]
        rows.append(("chance", _percent(m.get("chance_top1")), _percent(m.get("chance_top5"))))
        rows.append(("nearest in pixels", _percent(m.get("pixel_1nn_top1")), _percent(m.get("pixel_1nn_top5"))))
        size = (
            f"{_number(m.get('images'))} pictures, {_number(m.get('classes'))} names to choose from{_sampling_error(m)}"
        )
        cards.append(
            f'<div class="cell"><h4>{_cell_title(*cell)}</h4><p>{_CELL_MEANING[cell]}</p>{table(["", "top-1", "top-5"], rows)}'
            f'<p class="small">{size}</p></div>'
        )
        row = [_cell_title(*cell)]
        for suffix in _SUBSETS:
            count, pixel = m.get(f"images{suffix}"), m.get(f"pixel_1nn_top1{suffix}")
            if not count or f"top1{suffix}" not in m:
                row.append("–")
                continue
            against = "" if pixel is None else f", pixels {_percent(pixel)}"
            row.append(
                f"<b>{_percent(m[f'top1{suffix}'])}</b> / {_percent(m.get(f'top5{suffix}'))}"
                f'<span class="small">{_number(count)} pictures{against}</span>'
            )
        subsets.append(row)
    recalls = {_cell_title(*cell): m for cell, m in cells.items() if "image_to_text_R@1" in m}
    left_out = f"<p>{_number(skipped)} unusable records were left out.</p>" if skipped else ""
    subset_table = table(["top-1 / top-5", *_SUBSETS.values()], subsets, "wide")
    blocks = [f'<div class="cells">{"".join(cards)}</div>', _EMOJI_MEANING, left_out]
    blocks += ["<h3>Without compositions</h3>", _SUBSETS_MEANING, subset_table]
    if recalls:
        blocks += ["<h3>Retrieval among unseen concepts</h3>", _recall_table(recalls), _RECALL_MEANING]
    return "".join(blocks)


def _sampling_error(m, metric="top1"):
    """Half the 95 % interval of an accuracy, " (± 3.4)" in percentage points; empty when unknown."""
    share, count = m.get(metric, math.nan), m.get("images", 0)
    if not count or not 0 <= share <= 1:
        return ""
    return f" (±\u202f{196 * math.sqrt(share * (1 - share) / count):.1f})"


def _recall_table(tasks):
    counts = [key for key in ("images", "texts", "skipped") if any(m.get(key) for m in tasks.values())]
    arrow = {"image_to_text": "picture → text", "text_to_image": "text → picture"}
    head = ["", *(f"{arrow[d]} R@{k}" for d, k in _RECALLS), *(_COUNTS[key] for key in counts)]
    rows = []
    for name, m in tasks.items():
        rows.append(
            (
                _text(name),
                *(_percent(m.get(f"{d}_R@{k}")) for d, k in _RECALLS),
                *(_number(m.get(key)) for key in counts),
            )
        )
    return table(head, rows, "wide")


def _relation_table(tasks):
    found = dict.fromkeys(
        key.removeprefix("relations") for m in tasks.values() for key in m if re.match("relations(_|$)", key)
    )
    rows = []
    for (name, m), (test, words) in itertools.product(tasks.items(), _RELATIONS.items()):
        counts = {part: m.get(f"images{'_attributes' if test == 'attributes' else ''}{part}") for part in found}
        if test in m:
            cells = (f"{_percent(m.get(test + part))}{_sampling_error({test: m.get(test + part), 'images': n}, test)}"
                     f'<span class="small">{_number(n)} pictures</span>' if n else "–" for part, n in counts.items())  # fmt: skip
            rows.append((f"{_text(name)}: {words}", *cells))
    return table(["", *(_text(part[1:]) or "all" for part in found)], rows, "wide")


def _task_table(tasks, columns):
    counts = [key for key in ("images", "classes", "skipped") if any(m.get(key) for m in tasks.values())]
    rows = []
    for name, m in tasks.items():
        cells = [_number(m.get(key)) if key == "l2" else _percent(m.get(key)) for key in columns]
        cells[0] = f"<b>{cells[0]}</b>{_sampling_error(m, next(iter(columns)))}"
        rows.append((_text(name), *cells, *(_number(m.get(key)) for key in counts)))
    return table(["", *columns.values(), *(_COUNTS[key] for key in counts)], rows, "wide")


# --- training curves ---

_CURVES = {
    "Loss": r"loss",
    "Accuracy in the batch": r".*_acc",
    "Logit scale": r"logit_scale",
    "Learning rate": r"lr",
    "Gradient norm": r"grad_norm",
    "Images per second": r"images_per_s",
}
_EVALUATION_CURVES = ["top1", "top5", "mean_per_class", "accuracy", "image_to_text_R@1", "text_to_image_R@1", "image_to_text_R@10",
                      "text_to_image_R@10"]  # fmt: skip
_CONSTANT = re.compile(
    r"chance_.*|images.*|classes|texts|skipped|pixel_1nn_.*"
)  # evaluation metrics that do not depend on the model
_CURVE_WORDS = {"image_to_text": "picture → text", "text_to_image": "text → picture", "image_to_text_acc": "picture → text",
                "text_to_image_acc": "text → picture", "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}  # fmt: skip
_LEFT, _TOP, _WIDTH, _HEIGHT = 46, 10, 300, 150  # the plotting area of a chart, in a view box of 360 x 190

Series = list[tuple[int, float | None]]


def read_metrics(path):
    """The series `{name: [(step, number or None), ...]}` of a metrics.jsonl: those of training and those of evaluations, by step.

    Of a number that is there for one step twice the last counts. Rows without "loss" are those of evaluations. A missing file gives none.
    """
    training, evaluation = {}, {}
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}, {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a line that a killed run left unfinished
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        kind = training if "loss" in row else evaluation
        for name, value in row.items():
            if name in ("step", "time") or not (value is None or isinstance(value, int | float)):
                continue
            is_finite = value is not None and math.isfinite(value)
            kind.setdefault(name, {})[row["step"]] = float(value) if is_finite else None
    return tuple({name: sorted(values.items()) for name, values in kind.items()} for kind in (training, evaluation))


def _training(page, path):
    training, evaluation = read_metrics(path)
    if not training and not evaluation:
        return "<p>There are no metrics of a training run beside the checkpoint, hence no curves.</p>"
    blocks, main, rest = [], [], dict(training)
    for title, pattern in _CURVES.items():
        chosen = {name: rest.pop(name) for name in sorted(rest) if re.fullmatch(pattern, name)}
        main += (
            [chart(page, title, {_CURVE_WORDS.get(name, name): series for name, series in chosen.items()})]
            if chosen
            else []
        )
    if main:
        blocks.append(f'<div class="charts">{"".join(main)}</div>')
    by_metric = {}
    for name, series in evaluation.items():
        task, _, metric = name.rpartition("/")
        if not _CONSTANT.fullmatch(metric):
            by_metric.setdefault(metric, {})[_title(task)] = series
    chosen = [metric for metric in _EVALUATION_CURVES if metric in by_metric]
    charts = [chart(page, _metric_title(metric), by_metric.pop(metric), named=True) for metric in chosen]
    if charts:
        blocks.append(f'<h3>Evaluations during training</h3><div class="charts">{"".join(charts)}</div>')
    more = [chart(page, name, {name: series}) for name, series in sorted(rest.items())]
    more += [chart(page, _metric_title(metric), by_metric[metric], named=True) for metric in sorted(by_metric)]
    if more:
        blocks.append(
            f'<details><summary>More curves ({len(more)})</summary><div class="charts">{"".join(more)}</div></details>'
        )
    return "".join(blocks)


def _metric_title(metric):
    direction, _, k = metric.partition("_R@")
    title = f"{_CURVE_WORDS[direction]} R@{k}" if k and direction in _CURVE_WORDS else _CURVE_WORDS.get(metric)
    return metric if title is None else title[0].upper() + title[1:]


def chart(page, title, curves, named=False):
    """A line chart as SVG, with a legend where there are several curves or they are `named`; adds its numbers for tooltips to the page."""
    thin = {name: _thinned(series) for name, series in curves.items()}
    steps = [step for series in thin.values() for step, _ in series]
    values = np.asarray([value for series in thin.values() for _, value in series if value is not None])
    heading = _text(title)
    if not len(values):
        return f'<figure class="chart"><figcaption>{heading}</figcaption><p class="small">No finite value was logged.</p></figure>'
    first, last = min(steps), max(max(steps), min(steps) + 1)
    is_log = values.min() > 0 and values.max() > 100 * np.median(values)
    scale = np.log10 if is_log else np.asarray
    low, high = float(scale(values.min())), float(scale(values.max()))
    if high - low <= 1e-6 * abs(high):
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    if not is_log and 0 <= low < 0.5 * high:
        low = 0.0

    def x(step):
        return _LEFT + _WIDTH * (step - first) / (last - first)

    def y(value):
        return _TOP + _HEIGHT * (high - float(scale(value))) / (high - low)

    marks = []
    for tick in _log_ticks(low, high) if is_log else _ticks(low, high, 5):
        at = y(tick)
        marks.append(f'<path class="grid" d="M{_LEFT} {at:.1f}h{_WIDTH}"/>')
        marks.append(f'<text x="{_LEFT - 5}" y="{at + 3.5:.1f}" class="y">{tick:.4g}</text>')
    for tick in (tick for tick in _ticks(first, last, 5) if tick == round(tick)):
        marks.append(f'<text x="{x(tick):.1f}" y="{_TOP + _HEIGHT + 16}" class="x">{_steps(tick)}</text>')
    for number, series in enumerate(thin.values()):
        pieces = _pieces(series)
        path = "".join(
            "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in piece)
            for piece in pieces
            if len(piece) > 1
        )
        marks.append(f'<path class="line c{number % _COLOURS}" d="{path}"/>')
        dots = series if len(series) <= 12 else [piece[0] for piece in pieces if len(piece) == 1]
        marks += [
            f'<circle class="c{number % _COLOURS}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5"/>'
            for s, v in dots
            if v is not None
        ]
    legend = ""
    if named or len(curves) > 1:
        items = (f'<li><i class="c{number % _COLOURS}"></i>{_text(name)}</li>' for number, name in enumerate(curves))
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    thinned = max(map(len, curves.values())) > _POINTS
    note = '<p class="small">Long run: each point is a mean of neighbouring ones.</p>' if thinned else ""
    finite = [value for _, value in next(iter(curves.values())) if value is not None]
    latest = f"<b>{finite[-1]:.4g}</b>" if len(curves) == 1 else ""
    page.data["charts"].append(
        {"first": first, "last": last, "curves": [[_short(name), [s for s, _ in series], [v and float(f"{v:.5g}") for _, v in series]]
                                                  for name, series in thin.items()]}
    )  # fmt: skip
    return (
        f'<figure class="chart" data-chart="{len(page.data["charts"]) - 1}"><figcaption>{heading}'
        f"{latest}{'<small>logarithmic</small>' if is_log else ''}</figcaption>"
        f'<svg viewBox="0 0 360 190" role="img" aria-label="{heading} over steps">{"".join(marks)}'
        f'<path class="cross" d="M0 {_TOP}v{_HEIGHT}"/></svg>{legend}{note}</figure>'
    )


def _thinned(series):
    """At most `_POINTS` points: each the mean of the finite values of neighbouring ones, at the last one's step."""
    if len(series) <= _POINTS:
        return series
    result = []
    for part in np.array_split(np.arange(len(series)), _POINTS):
        finite = [series[i][1] for i in part if series[i][1] is not None]
        result.append((series[part[-1]][0], sum(finite) / len(finite) if finite else None))
    return result


def _pieces(series):
    """The runs of points between those that have no value."""
    pieces = [[]]
    for step, value in series:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    return [piece for piece in pieces if piece]


def _ticks(low, high, count):
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low, high):
    """Powers of ten between 10**low and 10**high."""
    return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]


def _steps(step):
    return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"


# --- predictions ---

_GALLERY_INTRO = f"""<p>The most confident right and wrong predictions, {_GALLERY} of each where there are as many, with the five names that
are most similar to the picture and their similarity; <mark>the true name</mark> is marked. Confidence is how far the first name is ahead of
the second. No two pictures of one name are shown while there are other names.</p>"""


def _gallery(page, item):
    labels, top, scores = np.asarray(item.labels), np.asarray(item.top), np.asarray(item.scores, np.float32)
    if not len(labels):
        return "<p>There are no pictures.</p>"
    with np.errstate(invalid="ignore"):  # of infinite scores
        confidence = np.nan_to_num(scores[:, 0] - scores[:, 1] if scores.shape[1] > 1 else scores[:, 0], nan=-np.inf)
    is_right = top[:, 0] == labels
    chosen = {
        kind: _most_confident(np.flatnonzero(is_right == (kind == "right")), confidence, labels)
        for kind in ("right", "wrong")
    }
    rows = np.concatenate(list(chosen.values()))
    _, thumbnail = page.thumbnails(item.pictures, rows)
    best = float(np.abs(scores[rows][np.isfinite(scores[rows])]).max(initial=1e-9))
    digits = min(max(2 - math.floor(math.log10(best)), 0), 4)
    groups = sorted({str(item.group[row]) for row in rows})
    blocks = [_gallery_filter(groups)]
    for kind, of_kind in chosen.items():
        cards = []
        for row in of_kind:
            name, group = item.class_names[labels[row]], str(item.group[row])
            guesses = []
            for label, score in zip(top[row], scores[row], strict=True):
                number, width = (
                    (f"{score:.{digits}f}", round(100 * max(float(score), 0) / best))
                    if math.isfinite(score)
                    else ("–", 0)
                )
                start = f'<li{" class=hit" if label == labels[row] else ""} style="--w:{width}%">'
                guesses.append(f"{start}<span>{_text(item.class_names[label])}</span><b>{number}</b></li>")
            note = f'<span class="small">{_text(group)}</span>' if len(groups) > 1 and group != str(name) else ""
            cards.append(
                f'<div class="card" data-group="{groups.index(group)}">{thumbnail(row, name)}'
                f"<div><b>{_text(name)}</b>{note}<ol>{''.join(guesses)}</ol></div></div>"
            )
        blocks.append(_gallery_kind(kind, is_right, cards))
    return "".join(blocks)


def _gallery_kind(kind, is_right, cards):
    count = int(is_right.sum() if kind == "right" else (~is_right).sum())
    content = f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>None.</p>"
    return f'<div class="kind" data-kind="{kind}"><h4>{kind.capitalize()}: {count:,} of {len(is_right):,} pictures</h4>{content}</div>'


def _gallery_filter(groups):
    kinds = '<option value="">right and wrong</option><option>right</option><option>wrong</option>'
    choice = f'<label>Show <select data-filter="kind">{kinds}</select></label>'
    if len(groups) > 1:
        options = "".join(f'<option value="{i}">{_text(group)}</option>' for i, group in enumerate(groups))
        choice += (
            f'<label>of <select data-filter="group"><option value="">all groups</option>{options}</select></label>'
        )
    return f'<div class="filter">{choice}</div>'


def _most_confident(rows, confidence, labels):
    """Up to `_GALLERY` of `rows`, most confident first; one of each label, and further ones only when labels run out."""
    order = rows[np.argsort(-confidence[rows], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    further = np.setdiff1d(np.arange(len(order)), first)
    return order[np.sort(np.concatenate([np.sort(first), further])[:_GALLERY])]


# --- relations ---

_PAIRS_INTRO = f"""<p>A picture, <mark>its caption</mark>, and one of the same words that is wrong, with their similarity. The most decided
right and wrong answers, {_GALLERY} of each where there are as many; a tie is shown as wrong.</p>"""


def _caption_pairs(page, item):
    scores = np.asarray(item.scores, np.float32).reshape(-1, 2)
    with np.errstate(invalid="ignore"):  # of infinite scores
        margin = np.nan_to_num(scores[:, 0] - scores[:, 1], nan=0.0)
    is_right, every = margin > 0, np.arange(len(margin))
    chosen = {
        kind: _most_confident(every[is_right == (kind == "right")], abs(margin), every) for kind in ("right", "wrong")
    }
    _, thumbnail = page.thumbnails(item.pictures, np.concatenate(list(chosen.values())))
    groups = sorted({str(group) for group in item.group})
    blocks = [_gallery_filter(groups)]
    for kind, rows in chosen.items():
        cards = []
        for row in rows:
            captions = zip((" class=hit", ""), (item.right[row], item.wrong[row]), scores[row], strict=True)
            lines = "".join(
                f"<li{css}><span>{_text(text)}</span><b>{score:.3f}</b></li>" for css, text, score in captions
            )
            note = f'<span class="small">{_text(item.group[row])} {margin[row]:+.3f}</span>'
            cards.append(
                f'<div class="card" data-group="{groups.index(str(item.group[row]))}">{thumbnail(row, item.right[row])}'
                f"<div><ol>{lines}</ol>{note}</div></div>"
            )
        blocks.append(_gallery_kind(kind, is_right, cards))
    return "".join(blocks)


# --- retrieval ---

_RETRIEVAL_INTRO = """<p>A sample of the queries, evenly spaced and not chosen by success, each with its best matches, best first;
<mark>right ones</mark> are marked.</p>"""


def _retrieval(page, item):
    image_ids, text_ids = np.asarray(item.image_ids), np.asarray(item.text_ids)
    texts = _evenly(np.flatnonzero(np.isin(text_ids, image_ids)), _QUERIES)
    images = _evenly(np.flatnonzero(np.isin(image_ids, text_ids)), _QUERIES)
    if not len(texts):
        return "<p>There is no picture with a text.</p>"
    found = np.asarray(item.text_to_image)[texts]
    _, thumbnail = page.thumbnails(item.pictures, [*found.ravel(), *images])
    first_text = dict(zip(text_ids.tolist()[::-1], item.texts[::-1], strict=True))

    def label_of(image):
        return first_text.get(int(image_ids[image]), "a picture without a text")

    rows = []
    for text, pictures in zip(texts, found, strict=True):
        matches = []
        for image in pictures:
            hit = " class=hit" if image_ids[image] == text_ids[text] else ""
            matches.append(f"<span{hit}>{thumbnail(image, label_of(image))}</span>")
        rows.append(
            f'<div class="query"><b>{_text(item.texts[text])}</b><div class="found">{"".join(matches)}</div></div>'
        )
    cards = []
    for image in images:
        lines = "".join(
            f"<li{' class=hit' if text_ids[text] == image_ids[image] else ''}><span>{_text(item.texts[text])}</span></li>"
            for text in np.asarray(item.image_to_text)[image][:5]
        )
        label = label_of(image)
        cards.append(
            f'<div class="card">{thumbnail(image, label)}<div><b>{_text(label)}</b><ol>{lines}</ol></div></div>'
        )
    return f'<h4>From text to picture</h4>{"".join(rows)}<h4>From picture to text</h4><div class="cards">{"".join(cards)}</div>'


def _evenly(items, limit):
    return items if len(items) <= limit else items[np.arange(limit) * len(items) // limit]


# --- similarity matrix ---

_SIMILARITY_INTRO = """<p>Each row is a picture, each column a text; a picture meets its own text on the diagonal. The better the model, the
more the diagonal stands out.</p>"""
_LIGHT_MAP = ((250, 250, 248), (190, 219, 222), (94, 165, 184), (36, 100, 145), (20, 38, 84))
_DARK_MAP = ((24, 27, 34), (28, 62, 96), (32, 118, 140), (112, 184, 150), (246, 233, 160))


def _similarity(page, item):
    values = np.asarray(item.values, np.float32)
    finite = values[np.isfinite(values)]
    if values.ndim != 2 or not finite.size:
        return "<p>There is no finite similarity to show.</p>"
    rows, columns = values.shape
    low, high = float(finite.min()), float(finite.max())
    position = (values - low) / max(high - low, 1e-12)
    ramp = np.linspace(0, 1, 128)[None]
    _, thumbnail = page.thumbnails(item.pictures, range(rows))
    rounded = [[float(f"{v:.3g}") if math.isfinite(v) else None for v in row] for row in values.tolist()]
    page.data["matrices"].append({"values": rounded, "texts": [*map(_short, item.texts)]})
    diagonal = np.eye(rows, columns, dtype=bool)
    sentence = ""
    if rows == columns > 1:
        first = np.mean(np.argmax(np.nan_to_num(values, nan=-np.inf), axis=1) == np.arange(rows))
        sentence = (
            f"<p>Mean similarity on the diagonal {_mean(values[diagonal])}, elsewhere {_mean(values[~diagonal])}; in {_percent(first)} of"
            " the rows the value on the diagonal is the largest.</p>"
        )
    return (
        f'{sentence}<p class="scale">{low:.3g} {_heat(ramp, "scale of the similarity")} {high:.3g}</p>'
        f'<div class="scroll"><div class="matrix" data-matrix="{len(page.data["matrices"]) - 1}" style="--n:{columns}">'
        f'<div class="columns">{"".join(f"<span>{_text(text)}</span>" for text in item.texts)}</div>'
        f'<div class="rows">{"".join(thumbnail(i, item.texts[i] if i < len(item.texts) else "") for i in range(rows))}</div>'
        f'<div class="heat">{_heat(position, "similarity of every picture with every text")}</div></div></div>'
    )


def _mean(values):
    values = values[np.isfinite(values)]
    return f"{values.mean():.3g}" if len(values) else "–"


def _heat(position, label):
    """Numbers [h, w] from 0 to 1 (NaN: transparent) as a picture of one pixel each, in the colours of a light or dark page."""
    sources = []
    for colours in (_DARK_MAP, _LIGHT_MAP):
        at = np.linspace(0, 1, len(colours))
        rgb = np.stack([np.interp(np.nan_to_num(position), at, channel) for channel in np.transpose(colours)], -1)
        rgba = np.concatenate([rgb, 255.0 * np.isfinite(position)[..., None]], -1)
        sources.append(_data_uri(np.rint(rgba).astype(np.uint8), "PNG"))
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{sources[0]}">'
    return f'<picture>{dark}<img alt="{label}" src="{sources[1]}"></picture>'


# --- map ---

MAP_INTRO = """<p>Embeddings of pictures (dots) and of texts (squares), projected onto the two directions in which they vary most (PCA). A
contrastive model keeps pictures and texts in separate regions, the modality gap; “each modality centred” takes the two means away, so that
it is seen whether both are arranged alike. Point at a picture to see it and the text that belongs to it.</p>"""


def embedding_map(page, item):
    images, texts = np.asarray(item.images, np.float64), np.asarray(item.texts_embedded, np.float64)
    if images.ndim != 2 or texts.ndim != 2:
        return "<p>An example has several embeddings here (one per token), so there is no map of points.</p>"
    if len(images) + len(texts) < 3 or not len(images) or not len(texts):
        return "<p>There are too few embeddings for a map.</p>"
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        return "<p>Some embeddings are not finite, so there is no map.</p>"
    gap = np.linalg.norm(images.mean(0) - texts.mean(0))
    views = []
    for a, b in ((images, texts), (images - images.mean(0), texts - texts.mean(0))):
        points, share = _pca(np.concatenate([a, b]))
        views.append({"points": _on_grid(points).ravel().tolist(), "share": _percent(share)})
    sheet, _ = page.thumbnails(item.pictures, range(len(images)), _MAP_TILE)
    names, counts = np.unique([str(group) for group in item.group], return_counts=True)
    frequent = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    shown = sorted(frequent) if len(frequent) <= _COLOURS else [*sorted(frequent[: _COLOURS - 1]), "other"]
    number = {name: i for i, name in enumerate(shown)}
    groups = [number.get(str(group), _COLOURS - 1) for group in item.group]
    of_text = dict(
        zip(np.asarray(item.text_of_image).tolist()[::-1], groups[::-1], strict=True)
    )  # of its first picture
    page.data["maps"].append(
        {
            "views": views,
            "images": len(images),
            "sheet": sheet,
            "columns": _SHEET_COLUMNS,
            "texts": [*map(_short, item.texts)],
            "textOfImage": np.asarray(item.text_of_image).tolist(),
            "groups": [_short(name) for name in shown] if len(shown) > 1 else [],
            "group": groups + [of_text.get(i, 0) for i in range(len(texts))],
        }
    )
    return (
        f"<p>{len(images):,} pictures, {len(texts):,} texts. The mean of the pictures and the mean of the texts are {gap:.2f} apart; an"
        f' embedding has length 1.</p><div class="map" data-map="{len(page.data["maps"]) - 1}">'
        "<noscript>The map needs JavaScript.</noscript></div>"
    )


def _pca(points):
    """The two main components of float [n, E] as float [n, 2], and the share of the variance that they hold."""
    points = points - points.mean(0)
    variances, directions = np.linalg.eigh(points.T @ points)
    plane = np.zeros((len(points), 2))
    plane[:, : min(2, points.shape[1])] = points @ directions[:, ::-1][:, :2]
    return plane, float(variances[-2:].sum() / max(variances.sum(), 1e-12))


def _on_grid(points):
    """Points [n, 2] as int [n, 2] in [0, 1000], both axes with one scale, the middle in the middle."""
    low, high = points.min(0), points.max(0)
    return np.rint(500 + 1000 * (points - (low + high) / 2) / max((high - low).max(), 1e-12)).astype(int)


# --- tables at the end ---


def _all_metrics(metrics):
    if not metrics:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(str(name))}</td><td data-value="{float(value)!r}">{float(value):.6g}</td></tr>'
        for name, value in sorted(metrics.items())
    )
    head = '<th scope="col"><button>metric</button></th><th scope="col"><button>value</button></th>'
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    choice = (
        '<div class="filter"><label>Filter <input type="search" data-rows placeholder="part of a name"></label></div>'
    )
    return f"<details><summary>{len(metrics):,} metrics</summary>{choice}{table}</details>"


def _configuration(config):
    fields = _flat(config)
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in fields)
    table = f'<table class="config"><tbody>{rows}</tbody></table>'
    return f"<details><summary>{len(fields)} fields</summary>{table}</details>" if fields else ""


def _flat(config, prefix=""):
    """Fields as ("optim.lr", "0.0005"), the names that the command line takes."""
    fields = []
    for key, value in config.items():
        fields += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else [(f"{prefix}{key}", repr(value))]
        )
    return fields
