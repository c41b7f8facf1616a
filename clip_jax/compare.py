"""Compares runs: `python -m clip_jax.compare runs/A runs/B ...` prints their differences and writes one page.

The page, compare.html (`--html=PATH`), holds the fields in which the configurations differ, curves of training and of
evaluations, examples, time and FLOPs, the last evaluation of each run side by side, and the same queries side by side
where the runs hold them. Runs may be in buckets, and may still be training: files are only read.
"""

import dataclasses
import math
import os
import statistics

from clip_jax import run_folder
from clip_jax.errors import UserError
from clip_jax.evaluation.report import page as html_page
from clip_jax.evaluation.report import queries
from clip_jax.evaluation.report.charts import CONSTANT, chart, read_metrics
from clip_jax.evaluation.report.head import examples_read
from clip_jax.evaluation.report.headline import sampling_error
from clip_jax.runtime import command, goodput, storage

#: Training metrics in the order of their charts; others follow in a folded part.
CURVES = ("loss", "_acc", "lr", "logit_scale", "grad_norm", "images_per_s", "goodput")
#: Last parts of metrics that are shares.
SHARES = ("top1", "top5", "accuracy", "mean_per_class", "R@", "F@", "relations", "attributes", "goodput")
#: Metrics that the first table of results has.
MAIN = ("top1", "top5", "accuracy", "mean_per_class", "R@1", "R@10", "relations", "attributes")
_ABSENT = "–"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a work folder tells of its run.

    Attributes:
      name: how it is called here.
      folder: its path.
      fields: `{"optim.lr": 0.001}`, its configuration.
      training: `{metric: [(step, value or None)]}`.
      evaluation: the same of its evaluations, also those that `evaluate --follow` wrote.
      history: the lines of its config_history.jsonl.
      cost: its run.json, {} without one.
      queries: its queries.json, {} without one.
      elapsed: seconds between its first and its last metrics, pauses included.
    """

    name: str
    folder: object
    fields: dict
    training: dict
    evaluation: dict
    history: list
    cost: dict
    queries: dict
    elapsed: float = 0.0

    def step(self):
        """The last step of which something is known."""
        return max((series[-1][0] for kind in (self.training, self.evaluation) for series in kind.values()), default=0)

    def first(self):
        """The step that the run itself started from: that of the checkpoint of a fork."""
        return self.history[0]["step"] if self.history and "forked_from" in self.history[0] else 0

    def examples(self):
        """The number of examples that the run itself read, None when its batch sizes are unknown."""
        size = self.fields.get("data.batch_size")
        if size is None:
            return None
        return examples_read(self.history, self.step(), size)

    def seconds(self):
        """The seconds of the run by what they were spent on, {} before its end, also that of a longer one."""
        last = {part: self.evaluation.get(f"seconds/{part}", [(0, None)])[-1] for part in goodput.PARTS}
        is_known = all(step == self.step() and value is not None for step, value in last.values())
        return {part: value for part, (_, value) in last.items()} if is_known else {}

    def evaluated(self):
        """The step of the last evaluation, 0 without any."""
        return max((step for step, _ in self.last().values()), default=0)

    def last(self):
        """Returns `{metric: (step, value)}` of the last evaluation of each metric that depends on the model."""
        return {name: series[-1] for name, series in sorted(self.evaluation.items()) if not _is_fixed(name)}


def _is_fixed(name):
    return name.startswith("seconds/") or bool(CONSTANT.fullmatch(name.rpartition("/")[2]))


def read_run(path, name):
    """Returns the `Run` of a work folder. Raises UserError when it is none, and StorageError when a bucket fails."""
    folder = storage.path(path)
    text = storage.read(folder / run_folder.CONFIG)
    training, evaluation = read_metrics(folder / "metrics.jsonl")
    if text is None and not training and not evaluation:
        raise UserError(f"{path} is no work folder: it has neither {run_folder.CONFIG} nor metrics.jsonl")
    fields = _flat(run_folder.parsed(text, folder / run_folder.CONFIG).to_dict()) if text is not None else {}
    for step, values in _followed(folder):
        for metric, value in values.items():
            series = dict(evaluation.get(metric, ())) | {step: float(value)}
            evaluation[metric] = sorted(series.items())
    cost, found = (run_folder.read_json(folder / file) for file in (run_folder.MACHINE, queries.FILE))
    elapsed = _elapsed(storage.read_rows(folder / "metrics.jsonl"))
    return Run(name, folder, fields, training, evaluation, run_folder.history(folder), cost, found, elapsed)


def _elapsed(rows):
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    return max(times, default=0.0) - min(times, default=0.0)


def _followed(folder):
    """Yields `(step, metrics)` of the files that `evaluate --follow` wrote."""
    with storage.guard(folder):
        try:
            files = [path for path in (folder / "evaluations").iterdir() if path.name.removesuffix(".json").isdigit()]
        except (FileNotFoundError, NotADirectoryError):
            return
    for path in files:
        values = run_folder.read_json(path)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        yield int(path.name.removesuffix(".json")), numbers


def _flat(config, prefix=""):
    found = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def names(paths):
    """Returns short names of paths: their last part, with as many parts before it as tell them apart."""
    parts = [str(path).rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise UserError(f"a run is named twice: {', '.join(map(str, paths))}")


# --- tables: a heading and rows of text ---


def differing(runs):
    """Returns the fields in which the configurations differ."""
    keys = sorted(set().union(*(run.fields for run in runs)))
    rows = [[key, *(_text(run.fields.get(key)) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _text(value):
    return _ABSENT if value is None else str(value) or "''"


def costs(runs):
    """Returns what the runs are and cost, one property a row, without what no run tells."""
    rows = [
        ["steps", *(_steps(run) for run in runs)],
        ["examples", *(_count(run.examples()) for run in runs)],
        ["parameters", *(_count(run.cost.get("parameters")) for run in runs)],
        ["FLOPs of the training", *(_flops(run) for run in runs)],
        ["time", *(_time(run) for run in runs)],
        ["share of training", *(_goodput(run) for run in runs)],
        ["machine", *(_machine(run) for run in runs)],
        ["training loss", *(_loss(run) for run in runs)],
    ]
    return [row for row in rows if set(row[1:]) != {_ABSENT}]


def _steps(run):
    start = f", after {run.first():,} of {run.history[0]['forked_from']}" if run.first() else ""
    asked = run.fields.get("train.steps")
    done = f"{run.step():,}" + (f" of {asked:,}" if asked and asked != run.step() else "")
    return done + start


def _count(value):
    return _ABSENT if value is None else f"{value:,.0f}"


def _flops(run):
    each, examples = run.cost.get("flops_per_example"), run.examples()
    return _ABSENT if each is None or examples is None else f"{each * examples:.3g}"


def _time(run):
    seconds = run.seconds()
    if seconds:
        return goodput.duration(sum(seconds.values()))
    return f"{goodput.duration(run.elapsed)} so far" if run.elapsed else _ABSENT


def _goodput(run):
    series = run.training.get("goodput")
    return _ABSENT if not series or series[-1][1] is None else f"{series[-1][1]:.0%}"


def _machine(run):
    cost = run.cost
    return f"{cost['devices']} x {cost['device']}" if {"devices", "device"} <= cost.keys() else _ABSENT


def _loss(run):
    values = [value for _, value in run.training.get("loss", ())[-5:] if value is not None]
    return f"{statistics.mean(values):.4f}" if values else _ABSENT


def results(runs):
    """Returns the last evaluations, one metric a row, the shares in percent.

    Returns: `[(cells, columns of the best cells)]`. Top-1 and accuracy have half the 95 % interval that follows
    from the number of pictures.
    """
    last, ends = [run.last() for run in runs], [run.evaluated() for run in runs]
    rows = []
    for name in sorted(set().union(*last)):
        steps, values = zip(*(found.get(name, (0, None)) for found in last), strict=True)
        is_share = any(part in name.rpartition("/")[2] for part in SHARES)
        cells = [
            _value(value, is_share) + _interval(run, name, value) + _at(step, end)
            for run, step, end, value in zip(runs, steps, ends, values, strict=True)
        ]
        known = [value for value in values if value is not None]
        is_ordered = is_share and len(known) > 1 and max(known) > min(known)
        best = {i for i, value in enumerate(values, 1) if is_ordered and value == max(known)}
        rows.append(([name, *cells], best))
    return rows


def main_results(rows):
    """Returns the rows of `results` that are shown first: all when none of them is a main metric."""
    return [row for row in rows if row[0][0].endswith(MAIN)] or rows


def _at(step, end):
    """Returns the step of a metric as text where `end`, that of the run's last evaluation, is another one."""
    return f" (step {step:,})" if 0 < step < end else ""


def _value(value, is_share):
    if value is None:
        return _ABSENT
    return f"{100 * value:.2f}\u202f%" if is_share else f"{value:.4g}"


def _interval(run, name, value):
    task, _, metric = name.rpartition("/")
    if metric not in ("top1", "accuracy") or value is None:
        return ""
    count = run.evaluation.get(f"{task}/images", [(0, None)])[-1][1]
    return sampling_error({metric: value, "images": count or 0}, metric)


def changes(runs):
    """Returns the changes of configurations within the runs: run, step, field, before, after."""
    return [
        [run.name, f"{row['step']:,}", key, _text(old), _text(new)]
        for run in runs
        for row in run.history
        for key, (old, new) in sorted(row.get("changes", {}).items())
    ]


# --- the page ---


def write(runs, path):
    """Writes the page; returns its path. Raises UserError when it cannot be written."""
    page = html_page.Page()
    heads = [run.name for run in runs]
    fields, history = differing(runs), changes(runs)
    note = ", ".join(f"{run.name}: step {run.evaluated():,}" for run in runs if run.evaluated())
    sections = {
        "Runs": _table(["", *heads], costs(runs)),
        "Differences": _table(["field", *heads], fields) if fields else "<p>The configurations are equal.</p>",
        "Results": _results(heads, results(runs), f"The last evaluations ({note}); the best of a row is marked."),
        "Training": _curves(page, runs),
        "Evaluations during training": _evaluations(page, runs),
        "Queries": queries.side_by_side({run.name: run.queries for run in runs}),
        "Changes within the runs": history and _table(["run", "step", "field", "before", "after"], history),
    }
    return html_page.write_page(path, page.html(f"Runs: {', '.join(heads)}", sections))


def _results(heads, rows, note):
    if not rows:
        return ""
    caution = "Two runs of one configuration with other seeds differ as well: <code>clip_jax.study</code> runs several."
    first, name = main_results(rows), ["metric", *heads]
    more = f"<details><summary>All {len(rows)} metrics</summary>{_table(name, *zip(*rows, strict=True))}</details>"
    intro = f"<p>{html_page.escaped(note)} {caution}</p>"
    return intro + _table(name, *zip(*first, strict=True)) + (more if len(first) < len(rows) else "")


def _table(head, rows, best=()):
    best = best or [set()] * len(rows)
    cells = [[_cell(cell, i in chosen) for i, cell in enumerate(row)] for row, chosen in zip(rows, best, strict=True)]
    return html_page.table([html_page.escaped(cell) for cell in head], cells, "wide")


def _cell(text, is_best):
    text = html_page.escaped(text)
    return f"<mark>{text}</mark>" if is_best else text


def _chart(page, title, runs, kind, name):
    """Returns the chart of one metric. Each run keeps its colour, also where another lacks the metric."""
    found = chart(page, title, {run.name: getattr(run, kind).get(name, []) for run in runs}, named=True)
    if page.data["charts"]:  # the pointer has nothing to show of an empty curve
        page.data["charts"][-1]["curves"] = [curve for curve in page.data["charts"][-1]["curves"] if curve[1]]
    return found


def _curves(page, runs):
    left = sorted(set().union(*(run.training for run in runs)))
    main = []
    for wanted in CURVES:
        chosen = [name for name in left if name == wanted or (wanted[0] == "_" and name.endswith(wanted))]
        left = [name for name in left if name not in chosen]
        main += [_chart(page, name, runs, "training", name) for name in chosen]
    more = [_chart(page, name, runs, "training", name) for name in left]
    return _charts(main) + _folded(more)


def _evaluations(page, runs):
    """Returns charts of the metrics that some run has at two steps or more."""
    several = {name for run in runs for name, series in run.evaluation.items() if len(series) > 1}
    names = sorted(name for name in several if not _is_fixed(name))
    first = [name for name in names if name.endswith(("/top1", "/accuracy", "R@1"))] or names
    main = [_chart(page, name, runs, "evaluation", name) for name in first]
    return _charts(main) + _folded([_chart(page, n, runs, "evaluation", n) for n in names if n not in first])


def _charts(charts):
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _folded(charts):
    return f"<details><summary>More curves ({len(charts)})</summary>{_charts(charts)}</details>" if charts else ""


# --- the command ---


def _print(title, head, rows, width=40):
    """Prints a table. Long cells are cut, but for those of the first column."""
    if not rows:
        return
    print(f"\n{title}")
    rows = [[first, *(c if len(c) <= width else f"{c[: width - 1]}…" for c in rest)] for first, *rest in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def compare(paths, html):
    """Prints the comparison of work folders and writes its page; returns the path of the page. Raises UserError."""
    if len(paths) < 2:
        raise UserError("name two work folders or more: python -m clip_jax.compare runs/A runs/B")
    runs = [read_run(path, name) for path, name in zip(paths, names(paths), strict=True)]
    heads = [run.name for run in runs]
    _print("runs", ["", *heads], costs(runs))
    _print("fields that differ", ["", *heads], differing(runs))
    rows = results(runs)
    first = main_results(rows)
    more = f" ({len(rows) - len(first)} more metrics are on the page)" if len(first) < len(rows) else ""
    _print(f"last evaluations{more}", ["", *heads], [row for row, _ in first])
    path = write(runs, html)
    print(f"\npage: {path}")
    return path


def main(argv=None):
    """Runs the command; returns the exit status: 0, or after a one-line error 2, or 44 when storage fails."""
    parser = command.make_parser("clip_jax.compare", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="work folders, also gs:// and s3:// addresses")
    parser.add_argument("--html", default="compare.html", metavar="PATH", help="the page (default compare.html)")
    args, rest = parser.parse_known_args(argv)

    def work():
        if rest:
            raise UserError(f"unknown argument {rest[0]!r}; give work folders and --html=PATH")
        compare([os.path.expanduser(run) for run in args.runs], args.html)

    return command.run(work)


if __name__ == "__main__":
    command.script(main)
