"""The page of an evaluation: headline numbers, training curves, figures, all metrics, the configuration.

    write_report("runs/clip/report.html", result, title="clip on emoji", metrics_jsonl="runs/clip/metrics.jsonl")

It shows whatever artefacts a result holds, and asks the module of each task for its headline (`tasks.py`).
"""

import html
from collections.abc import Mapping

from clip_jax.evaluation import tasks
from clip_jax.evaluation.report.charts import training_curves
from clip_jax.evaluation.report.head import head
from clip_jax.evaluation.report.headline import metric_table
from clip_jax.evaluation.report.page import Page, panels, write_page

# These sections come first, others after them.
_ORDER = ("Predictions", "Classes", "Relations", "Retrieval", "Similarity", "Words and patches", "Map")


def write_report(path, result, *, title, config=None, metrics_jsonl=None, history=()):
    """Writes the page of an evaluation; an existing page is replaced only by a complete one.

    Args:
      path: the HTML file; its folder is created.
      result: the `EvalResult` of one task, or of several (`results.merge_results`).
      title: of the page.
      config: nested configuration to show.
      metrics_jsonl: the training run's metrics, rows `{"step": int, "time": float, name: number or null, ...}`. The
        last row counts where a resumed run repeats a step. Other lines are ignored, and so is a missing file.
      history: the changes of the run's configuration, `[{"step": int, "changes": {"optim.lr": [old, new]}}, ...]`; the
        first one is its start.

    Returns: `path`.

    Raises UserError when it cannot be written.
    """
    return write_page(path, render(result, title=title, config=config, metrics_jsonl=metrics_jsonl, history=history))


def render(result, *, title, config=None, metrics_jsonl=None, history=()):
    """Returns the page as a string; for the arguments see `write_report`."""
    page, panel_of = Page(), tasks.panel_finder(result)
    sections = {"Run": head(result, config or {}, metrics_jsonl, history), "Results": _results(result), "Training": ""}
    if metrics_jsonl is not None:
        sections["Training"] = training_curves(page, metrics_jsonl, lambda name: panel_of(name)[1], history)
    sections |= _figures(page, result, panel_of)
    sections |= {"All metrics": _all_metrics(result.metrics), "Configuration": _configuration(config or {})}
    return page.html(title, sections)


def _results(result):
    """Returns the headline of each task, in the order in which they ran, and a table of all other metrics."""
    blocks, rest = [], {}
    for task, metrics in tasks.by_task(result).items():
        if hasattr(task, "headline"):
            blocks.append(task.headline(metrics))
        else:
            rest |= metrics
    if rest:
        blocks.append(("<h3>Other metrics</h3>" if blocks else "") + metric_table(rest))
    return "".join(blocks) or "<p>No task was run, so there are no metrics.</p>"


def _figures(page, result, panel_of):
    """Returns `{section: HTML}` of all artefacts."""
    found = {}
    for items in result.artefacts.values():
        for name, item in items.items():
            found.setdefault(item.section, []).append((*panel_of(name), item))
    sections = {}
    for section in sorted(found, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER)):
        items = sorted(found[section], key=lambda item: item[0])
        drawn = [(title, item.draw(page)) for _, title, item in items]
        sections[section] = panels(items[0][-1].intro, drawn)
    return sections


def _all_metrics(metrics):
    if not metrics:
        return ""
    rows = "".join(
        f'<tr><td>{html.escape(str(name))}</td><td data-value="{float(value)!r}">{float(value):.6g}</td></tr>'
        for name, value in sorted(metrics.items())
    )
    head = '<th scope="col"><button>metric</button></th><th scope="col"><button>value</button></th>'
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    search = '<input type="search" data-rows placeholder="part of a name">'
    choice = f'<div class="filter"><label>Filter {search}</label></div>'
    return f"<details><summary>{len(metrics):,} metrics</summary>{choice}{table}</details>"


def _configuration(config):
    fields = _flat(config)
    rows = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in fields)
    table = f'<table class="config"><tbody>{rows}</tbody></table>'
    return f"<details><summary>{len(fields)} fields</summary>{table}</details>" if fields else ""


def _flat(config, prefix=""):
    """Returns fields as ("optim.lr", "0.0005"), the names that the command line takes."""
    fields = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            fields += _flat(value, f"{prefix}{key}.")
        else:
            fields.append((f"{prefix}{key}", repr(value)))
    return fields
