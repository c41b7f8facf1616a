"""The files of a study, study.json, study.svg and study.html, and the page of several studies."""

import base64
import html
import json
import statistics

from clip_jax.errors import UserError
from clip_jax.evaluation.report import page as html_page
from clip_jax.evaluation.report.charts import chart, read_metrics
from clip_jax.runtime import storage
from clip_jax.studies import figure, tables
from clip_jax.studies.definition import key

FILE = "study.json"
FIGURE, PAGE = "study.svg", "study.html"
_DRAWN = ("loss", "top1", "accuracy", "image_to_text_R@1", "text_to_image_R@1")
_NOTES = {
    "table": "Mean and standard deviation over the seeds, in percent. TFLOP, minutes and MiB are of one training. MiB "
    "is the compiler's estimate for a step. * marks a difference whose 95 % interval excludes 0.",
    "differences": "Percentage points, with the 95 % interval over seeds and pictures, clustered by seed and by the "
    "thing that a picture shows. Where nothing differs, about one of twenty intervals excludes 0 all the same.",
    "tuning": "Each value was trained once, seed 0, for half of the steps. The highest value decided of: {}.",
    "order": "Against the published order, neighbours compared by Welch's t-test.",
}


def write(found, runs, workdir, command, done):
    """Writes the files of a study; returns the path of its page.

    Args:
      found: the `tables.Found`.
      runs: its complete runs of seeds.
      workdir: the work folder.
      command: the command that makes the study, a line.
      done: `(trained runs, all runs)`, those that try values included.
    """
    study = found.study
    drawn = figure.draw(found)
    about = {
        "title": study.title,
        "question": study.question,
        "claim": study.claim,
        "command": command,
        "done": list(done),
        "runs": found.metrics,
        "table": _table(tables.results(found)),
        "differences": _table(tables.differences(found)),
        "tuning": _table(tables.tuning(found)),
        "tried": found.tried,
        "tune_metric": key(study.tune_metric),
        "chosen": {row: value for row, value in found.chosen.items() if value},
        "order": list(tables.order(study, found.metrics)),
        "figure": drawn,
    }
    storage.write(workdir / FILE, json.dumps(about, indent=1))
    if drawn:
        storage.write(workdir / FIGURE, drawn)
    page = html_page.Page()
    by_row = {row.name: [run for run in runs if run.row is row] for row in study.rows}
    read = {name: [read_metrics(run.folder / "metrics.jsonl") for run in some] for name, some in by_row.items()}
    curves = "".join(_chart(page, curve, _mean_curves(read, 0, curve)) for curve in study.curves)
    evaluated = {name: label for label, name in study.keys().items()}
    evaluated |= {name: name for name in _repeated(read) if name not in evaluated}
    evaluations = "".join(_chart(page, label, _mean_curves(read, 1, name)) for name, label in evaluated.items())
    sections = _sections(about) | {
        "Training": f'<p>Means over the seeds.</p><div class="charts">{curves}</div>' if curves else "",
        "Evaluations during training": f'<p>Means over the seeds.</p><div class="charts">{evaluations}</div>'
        if evaluations
        else "",
        "Maps": _maps(study, runs, page) if study.map_task and done[0] == done[1] else "",
    }
    return html_page.write_page(workdir / PAGE, page.html(study.title, sections))


def report(folders, path):
    """Writes the page of several studies; returns its path.

    Raises UserError when a folder has no readable study.json.

    Args:
      folders: work folders of studies.
      path: the page.
    """
    page, sections = html_page.Page(), {}
    for folder in folders:
        try:
            about = json.loads(storage.read(storage.path(folder) / FILE) or "")
            title, parts = about["title"], _sections(about)
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"--report: {folder} has no readable {FILE}: python -m clip_jax.study --config=... --workdir={folder}"
            ) from None
        if title in sections:
            raise UserError(f"--report: two studies are called {title!r}")
        sections[title] = "".join(
            f"<h3>{html_page.escaped(name)}</h3>{content}" if name != "Study" else content
            for name, content in parts.items()
            if content
        )
    return html_page.write_page(path, page.html("Studies", sections))


def _table(cells):
    head, rows = cells
    return [head, *rows] if rows else []


def _sections(about):
    """Returns `{heading: HTML}` of what study.json holds; its texts are untrusted."""
    trained, count = map(int, about["done"])
    facts = {"Question": about["question"], "Claim": about["claim"]}
    lines = "".join(f"<p><b>{name}.</b> {html.escape(str(text))}</p>" for name, text in facts.items() if text)
    if trained < count:
        lines += f"<p><b>Not complete:</b> {trained} of {count} runs.</p>"
    lines += f'<p class="small"><code>{html.escape(str(about["command"]))}</code></p>'
    items = "".join(f"<li>{html.escape(str(line))}</li>" for line in about["order"])
    return {
        "Study": f"{lines}{_figure(about['figure'])}",
        "Results": _section(about["table"], _NOTES["table"]),
        "Differences": _section(about["differences"], _NOTES["differences"]),
        "Tuning": _section(about["tuning"], _NOTES["tuning"].format(about["tune_metric"]), "texts"),
        "Order": f"<p>{html.escape(_NOTES['order'])}</p><ul>{items}</ul>" if items else "",
    }


def _figure(svg):
    """Returns the figure as an element that can run no script."""
    if not svg:
        return ""
    address = base64.b64encode(str(svg).encode()).decode()
    alt, style = (
        "The first metric of each row; the table below has the numbers",
        "width:100%;min-width:560px;max-width:760px",
    )
    image = f'<img src="data:image/svg+xml;base64,{address}" alt="{alt}" style="{style}">'
    return f'<div class="scroll">{image}</div>'


def _section(cells, note, css="wide"):
    if not cells:
        return ""
    head, *rows = [[html.escape(str(cell)) for cell in row] for row in cells]
    if css == "wide":  # figures stay on one line
        rows = [[first, *(cell.replace(" ", "&nbsp;") for cell in rest)] for first, *rest in rows]
    return f'<p class="small">{html.escape(note)}</p>{html_page.table(head, rows, css)}'


def _maps(study, runs, page):
    from clip_jax import evaluate, inference
    from clip_jax.evaluation.report.embedding_map import EmbeddingMap

    maps = {}
    for run in runs:
        if run.seed == 0:
            found = evaluate.parse_task(study.map_task)(inference.load(run.folder)).artefacts["map"]
            maps |= {f"{run.row.name}: {name}": item for name, item in found.items()}
    return html_page.panels(EmbeddingMap.intro, [(name, item.draw(page)) for name, item in maps.items()])


def _chart(page, title, curves):
    """Returns the chart of curves by row; empty where none has two points."""
    return chart(page, title, curves, named=True) if any(len(points) > 1 for points in curves.values()) else ""


def _mean_curves(read, kind, name):
    """Returns `{row name: [(step, mean over the seeds), ...]}` at the steps that all runs of a row have.

    Args:
      read: `{row name: [read_metrics of a run, ...]}`.
      kind: 0 for a training metric, 1 for one of evaluations.
      name: the metric.
    """
    found = {}
    for row, runs in read.items():
        curves = [dict(series[kind].get(name, ())) for series in runs]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        points = [(s, statistics.mean(c[s] for c in curves)) for s in steps if all(c[s] is not None for c in curves)]
        found |= {row: points} if points else {}
    return found


def _repeated(read):
    """Returns the names of evaluation metrics to draw: those of `_DRAWN` that any run has at two steps or more."""
    found = [evaluation for runs in read.values() for _, evaluation in runs]
    names = {name for evaluation in found for name, series in evaluation.items() if len(series) > 1}
    return sorted(name for name in names if name.rpartition("/")[2] in _DRAWN)
