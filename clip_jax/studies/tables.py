"""The tables of a study as text cells: the metrics, the differences, the values that were tried; the order."""

import dataclasses
import itertools
import math
import statistics

from clip_jax.studies import intervals, runs


@dataclasses.dataclass
class Found:
    """What the complete runs of a study have measured.

    Attributes:
      study: the study.
      planned: its rows as `runs.Planned`.
      chosen: `{row: chosen value}`, "" where none was tried.
      tried: `{row: {value: metric or None}}`, of the rows that try values.
      metrics: `{readout: {row: [metrics, one dict for each seed]}}`.
      outcomes: the same of `{metric: Outcomes}`.
      bytes: `{row: bytes of a step, the compiler's estimate}`.
    """

    study: object
    planned: list
    chosen: dict
    tried: dict
    metrics: dict
    outcomes: dict
    bytes: dict

    def cost(self, planned):
        """Returns the `runs.Run` of a row's first seed, which has its steps and FLOPs."""
        return planned.seed(0, self.chosen.get(planned.row.name, ""))

    def values(self, readout, row, name):
        """Returns the values of a metric, one for each seed that has it."""
        return [m[name] for m in self.metrics[readout][row.name] if m.get(name) is not None]

    def minutes(self, row):
        """Returns the mean minutes of training of a row, or None."""
        measured = [runs.minutes(m) for m in next(iter(self.metrics.values()))[row.name]]
        return statistics.mean(measured) if measured and None not in measured else None

    def difference(self, readout, row, name):
        """Returns the `intervals.Difference` of a row to the one it is compared with, or None."""
        base = self.study.base(row)
        ours, theirs = (self.metrics[readout][r.name] for r in (row, base))
        seeds = min(len(ours), len(theirs))
        if row is base or not seeds or any(m[i].get(name) is None for m in (ours, theirs) for i in range(seeds)):
            return None
        a, b = ([o.get(name) for o in self.outcomes[readout][r.name][:seeds]] for r in (row, base))
        sizes = {None if o is None else len(o.values) for o in a + b}
        if None not in sizes and len(sizes) == 1 and sizes != {0}:
            return intervals.paired(a, b)
        return intervals.of_seeds(*([m[i][name] for i in range(seeds)] for m in (ours, theirs)))


def results(found):
    """Returns the heading and the rows of the main table: mean and standard deviation over the seeds, in percent.

    A star follows where the interval of the difference excludes 0.
    """
    study, readouts = found.study, list(found.metrics)
    labels = {
        label: name
        for label, name in study.keys().items()
        if any(found.values(readout, row, name) for readout in readouts for row in study.rows)
    }
    tuned = {p.row.name: p for p in found.planned if p.field}
    optional = {
        "tuned": [_chosen(tuned.get(row.name), found.chosen) for row in study.rows],
        "minutes": [_text(found.minutes(row), "{:,.1f}") for row in study.rows],
        "MiB": [_text(found.bytes.get(row.name), "{:,.0f}", 2**20) for row in study.rows],
    }
    optional = {head: cells for head, cells in optional.items() if any(cells)}
    by, published = (["read by"] if len(readouts) > 1 else []), ([study.published] if study.published else [])
    head = ["row", *by, "seeds", "steps", "TFLOP", *optional, *labels, *published]
    rows = []
    for (number, p), readout in itertools.product(enumerate(found.planned), readouts):
        run, row = found.cost(p), p.row
        cells = [row.name, *[readout][: len(by)], str(len(found.metrics[readout][row.name]))]
        cells += [f"{run.steps:,}", f"{run.flops / 1e12:,.1f}", *(column[number] for column in optional.values())]
        for name in labels.values():
            difference = found.difference(readout, row, name)
            star = " *" if difference and difference.excludes_zero else ""
            cells.append(_spread(found.values(readout, row, name)) + star)
        rows.append(cells + [" / ".join(f"{x:g}" for x in row.published)][: len(published)])
    return head, rows


def differences(found):
    """Returns the heading and the rows of the paired differences in percentage points, with their 95 % intervals."""
    study, rows = found.study, []
    labels = study.keys()
    for readout, row in itertools.product(found.metrics, study.rows):
        if row is study.base(row):
            continue
        of_labels = [found.difference(readout, row, name) for name in labels.values()]
        if known := [d for d in of_labels if d]:
            name = f"{row.name}, read by {readout}" if len(found.metrics) > 1 else row.name
            images = dict.fromkeys(f"{d.images:,} of {d.things:,}" for d in of_labels if d and d.images)
            cells = [_interval(d) for d in of_labels]
            rows.append([name, study.base(row).name, str(known[0].seeds), *cells, ", ".join(images)])
    return ["row", "minus", "seeds", *labels, "pictures of things"], rows


def tuning(found):
    """Returns the heading and the rows of the values that were tried: the metric in percent, the chosen one marked."""
    rows = []
    for p in found.planned:
        if p.row.tune:
            scores = found.tried.get(p.row.name, {})
            chosen = found.chosen.get(p.row.name)
            cells = [f"{v}: {_percent(scores.get(v))}{' (chosen)' if v == chosen else ''}" for v in p.costs]
            rows.append([p.row.name, p.field, f"{p.tuning()[0].steps:,}", "; ".join(cells)])
    return ["row", "field", "steps", "values and their metric, %"], rows


def order(study, metrics):
    """Yields a sentence for each pair of neighbouring rows: whether their order is the expected one.

    It compares the first metric by Welch's t-test at 5 %. `metrics` is that of `Found`.
    """
    from scipy.stats import ttest_ind

    label, name = next(iter(study.keys().items()))
    for (readout, by_row), (lower, higher) in itertools.product(metrics.items(), itertools.pairwise(study.rows)):
        if not (lower.published and higher.published):
            continue
        a, b = ([100 * m[name] for m in by_row[row.name] if m.get(name) is not None] for row in (lower, higher))
        if not a or not b:
            continue
        by = f"read by {readout}, " if len(metrics) > 1 else ""
        text = f"{by}{lower.name} < {higher.name}: {label} {statistics.mean(a):.2f} and {statistics.mean(b):.2f} %"
        if min(len(a), len(b)) < 2:
            yield f"{text}: one run each cannot decide"
            continue
        p = ttest_ind(a, b, equal_var=False).pvalue
        outcome = "confirmed" if statistics.mean(a) < statistics.mean(b) else "the opposite order"
        yield f"{text}: {outcome if p < 0.05 else 'no significant difference'} (p = {p:.2g})"


def markdown(head, rows):
    """Returns a table as aligned lines of Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _chosen(planned, chosen):
    value = planned and chosen.get(planned.row.name)
    return f"{planned.field.rpartition('.')[2]} {value}" if value else ""


def _text(value, form, unit=1):
    return "" if value is None else form.format(value / unit)


def _spread(values):
    values = [100 * value for value in values]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def _percent(value):
    return "not run" if value is None else f"{100 * value:.2f}"


def _interval(d):
    if d is None:
        return ""
    mean, low, high = (f"{100 * x:+.2f}".replace("-", "−") for x in (d.mean, d.low, d.high))
    return mean + ("" if math.isnan(d.low) else f" [{low}, {high}]") + (" *" if d.excludes_zero else "")
