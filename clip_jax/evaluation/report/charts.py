"""Line charts, and the curves of a training run."""

import itertools
import math
import re

import numpy as np

from clip_jax.evaluation.report.page import COLOURS, escaped, shortened
from clip_jax.runtime import goodput, storage

_POINTS = 400  # of a curve; longer ones are averaged
_CURVES = {
    "Loss": r"loss",
    "Accuracy in the batch": r".*_acc",
    "Logit scale": r"logit_scale",
    "Learning rate": r"lr",
    "Gradient norm": r"grad_norm",
    "Images per second": r"images_per_s",
    "Share of the time that was spent on training": r"goodput",
}
_EVALUATION_CURVES = [
    "loss",
    "top1",
    "top5",
    "mean_per_class",
    "accuracy",
    "image_to_text_R@1",
    "text_to_image_R@1",
    "image_to_text_R@10",
    "text_to_image_R@10",
]
#: Last parts of evaluation metrics that do not depend on the model.
CONSTANT = re.compile(r"chance_.*|majority_.*|images.*|classes|texts|skipped|pixel_1nn_.*")
# A change of the learning rate by this share of its maximum between two logged steps is a jump, unless the changes
# beside it are of the same size.
_JUMP, _USUAL = 0.15, 4
_CURVE_WORDS = {
    "image_to_text": "image → text",
    "text_to_image": "text → image",
    "image_to_text_acc": "image → text",
    "text_to_image_acc": "text → image",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "loss": "evaluation loss",
}
# The plotting area of a chart, in a view box of 360 x 190.
_LEFT, _TOP = 46, 10
_WIDTH, _HEIGHT = 300, 150


def read_metrics(path):
    """Reads a metrics.jsonl.

    A row with "loss" belongs to training, every other row to an evaluation. The last value counts where a resumed run
    repeats a step. Lines that are no such rows are ignored.

    Args:
      path: the file or its parts (`clip_jax.runtime.storage.Log`); a missing one gives no series.

    Returns: two dicts name -> `[(step, number or None), ...]` by step, of training and of evaluations.
    """
    training, evaluation = {}, {}
    for row in storage.read_rows(path):
        kind = training if "loss" in row else evaluation
        for name, value in row.items():
            if name in ("step", "time") or not (value is None or isinstance(value, int | float)):
                continue
            is_finite = value is not None and math.isfinite(value)
            kind.setdefault(name, {})[row["step"]] = float(value) if is_finite else None
    return tuple({name: sorted(values.items()) for name, values in kind.items()} for kind in (training, evaluation))


def training_curves(page, path, title_of=str, history=()):
    """Returns the charts of a training run as HTML.

    Args:
      page: the `Page`.
      path: the run's metrics.jsonl.
      title_of: name of an evaluation's result, such as "pets", -> its title.
      history: the changes of the run's configuration, as for `assembly.write_report`.
    """
    training, evaluation = read_metrics(path)
    if not training and not evaluation:
        return "<p>There are no metrics of a training run with this checkpoint, hence no curves.</p>"
    spent = {part: evaluation.pop(f"seconds/{part}", [(0, 0.0)])[-1][1] or 0.0 for part in goodput.PARTS}
    blocks = [f"<p>{goodput.describe(spent)}.</p>" if any(spent.values()) else ""]
    rest = {name: series for name, series in training.items() if _is_curve(series)}
    by_metric = {}
    for name, series in evaluation.items():
        task, _, metric = name.rpartition("/")
        if not CONSTANT.fullmatch(metric) and _is_curve(series):
            by_metric.setdefault(metric, {})[title_of(task)] = series
    if not rest and not by_metric:
        return "".join(blocks) + "<p>Nothing was logged at two steps or more, hence there are no curves.</p>"
    changes = _configuration_changes(history)
    changes = sorted(changes + learning_rate_changes(training.get("lr", ()), [step for step, _ in changes]))
    marks, main = [step for step, _ in changes], []
    for title, pattern in _CURVES.items():
        chosen = {name: rest.pop(name) for name in sorted(rest) if re.fullmatch(pattern, name)}
        if chosen:
            series = {_CURVE_WORDS.get(name, name) if len(chosen) > 1 else name: chosen[name] for name in chosen}
            main.append(chart(page, title, series, marks=marks))
    if main:
        blocks.append(_charts(main))
    if changes:
        blocks.append(
            f'<p class="notes">Dashed: {"; ".join(f"step {step:,}, {escaped(what)}" for step, what in changes)}.</p>'
        )
    chosen = [metric for metric in _EVALUATION_CURVES if metric in by_metric]
    charts = [_evaluation_chart(page, metric, by_metric.pop(metric), marks) for metric in chosen]
    if charts:
        blocks.append(f"<h3>Evaluations during training</h3>{_charts(charts)}")
    more = [chart(page, name, {name: series}, marks=marks) for name, series in sorted(rest.items())]
    more += [_evaluation_chart(page, metric, by_metric[metric], marks) for metric in sorted(by_metric)]
    if more:
        blocks.append(f"<details><summary>More curves ({len(more)})</summary>{_charts(more)}</details>")
    return "".join(blocks)


def _evaluation_chart(page, metric, curves, marks):
    return chart(page, _metric_title(metric), curves, named=True, marks=marks)


def _is_curve(series):
    """Returns whether there are two points to join, or several values of which none is finite."""
    return len(series) > 1 and sum(value is not None for _, value in series) != 1


def _configuration_changes(history):
    """Returns `[(step, what changed), ...]` of the lines of a run's history."""
    found = []
    for row in history:
        fields = [f"{name} from {old} to {new}" for name, (old, new) in row.get("changes", {}).items()]
        if fields and row["step"]:
            more = f" and {len(fields) - 3} more fields" if len(fields) > 3 else ""
            found.append((row["step"], ", ".join(fields[:3]) + more))
    return found


def learning_rate_changes(series, known=()):
    """Returns `[(step, what happens), ...]`: where the learning rate reaches its peak, and where it jumps.

    Args:
      series: `[(step, learning rate or None), ...]` by step.
      known: steps of changes that are told otherwise; a jump after one of them is left out.
    """
    points = [(step, value) for step, value in series if value is not None]
    if len(points) < 3 or max(value for _, value in points) <= 0:
        return []
    rates = [value for _, value in points]
    peak, found = rates.index(max(rates)), []
    differences = [abs(b - a) / max(rates) for a, b in itertools.pairwise(rates)]
    for i, difference in enumerate(differences):
        beside = max(differences[max(i - 1, 0) : i] + differences[i + 1 : i + 2])
        told = any(points[i][0] <= step <= points[i + 1][0] for step in known)
        if not told and i + 1 != peak and difference > max(_JUMP, _USUAL * beside):
            found.append((points[i + 1][0], f"the learning rate jumps from {rates[i]:.2g} to {rates[i + 1]:.2g}"))
    if peak and all(a <= b for a, b in itertools.pairwise(rates[: peak + 1])):
        found.append((points[peak][0], f"the learning rate reaches its peak, {rates[peak]:.2g}"))
    return sorted(found)


def _charts(charts):
    return f'<div class="charts">{"".join(charts)}</div>'


def _metric_title(metric):
    direction, _, k = metric.partition("_R@")
    title = f"{_CURVE_WORDS[direction]} R@{k}" if k and direction in _CURVE_WORDS else _CURVE_WORDS.get(metric)
    return metric if title is None else title[0].upper() + title[1:]


def chart(page, title, curves, named=False, marks=()):
    """Returns a line chart as SVG and adds its numbers to the page, for tooltips.

    Args:
      page: the `Page`.
      title: untrusted text.
      curves: name -> `[(step, number or None), ...]`, at least one.
      named: show a legend also for a single curve.
      marks: steps that a dashed line marks.
    """
    thin = {name: _thinned(series) for name, series in curves.items()}
    values = np.asarray([value for series in thin.values() for _, value in series if value is not None])
    heading = escaped(title)
    if not len(values):
        note = '<p class="small">No finite value was logged.</p>'
        return f'<figure class="chart"><figcaption>{heading}</figcaption>{note}</figure>'
    axes = _Axes([step for series in thin.values() for step, _ in series], values)
    drawn = [*axes.ticks(), *axes.marks(marks)]
    drawn += [mark for i, series in enumerate(thin.values()) for mark in _line(axes, series, i)]
    legend = ""
    if named or len(curves) > 1:
        items = (f'<li><i class="c{i % COLOURS}"></i>{escaped(name)}</li>' for i, name in enumerate(curves))
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    thinned = max(map(len, curves.values())) > _POINTS
    note = '<p class="small">Long run: each point is a mean of neighbouring ones.</p>' if thinned else ""
    finite = [value for _, value in next(iter(curves.values())) if value is not None]
    latest = f"<b>{finite[-1]:.4g}</b>" if len(curves) == 1 else ""
    rounded = [
        [shortened(name), [step for step, _ in series], [value and float(f"{value:.5g}") for _, value in series]]
        for name, series in thin.items()
    ]
    plot = {"plot": [_LEFT, _WIDTH], "first": axes.first, "last": axes.last, "curves": rounded}
    return (
        f'<figure class="chart" data-chart="{page.add("charts", plot)}"><figcaption>{heading}'
        f"{latest}{'<small>logarithmic</small>' if axes.is_log else ''}</figcaption>"
        f'<svg viewBox="0 0 360 190" role="img" aria-label="{heading} over steps">{"".join(drawn)}'
        f'<path class="cross" d="M0 {_TOP}v{_HEIGHT}"/></svg>{legend}{note}</figure>'
    )


class _Axes:
    """The scales of a chart; the vertical one is logarithmic where positive values span much."""

    def __init__(self, steps, values):
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        self.is_log = values.min() > 0 and values.max() > 100 * np.median(values)
        self._scale = np.log10 if self.is_log else np.asarray
        low, high = float(self._scale(values.min())), float(self._scale(values.max()))
        if high - low <= 1e-6 * abs(high):
            low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
        if not self.is_log and 0 <= low < 0.5 * high:
            low = 0.0
        self._low, self._high = low, high

    def x(self, step):
        return _LEFT + _WIDTH * (step - self.first) / (self.last - self.first)

    def y(self, value):
        return _TOP + _HEIGHT * (self._high - float(self._scale(value))) / (self._high - self._low)

    def ticks(self):
        """Yields grid lines and tick labels as SVG."""
        for tick in _log_ticks(self._low, self._high) if self.is_log else ticks(self._low, self._high, 5):
            yield f'<path class="grid" d="M{_LEFT} {self.y(tick):.1f}h{_WIDTH}"/>'
            yield f'<text x="{_LEFT - 5}" y="{self.y(tick) + 3.5:.1f}" class="y">{tick:.4g}</text>'
        for tick in (tick for tick in ticks(self.first, self.last, 5) if tick == round(tick)):
            yield f'<text x="{self.x(tick):.1f}" y="{_TOP + _HEIGHT + 16}" class="x">{_steps(tick)}</text>'

    def marks(self, steps):
        """Yields a vertical line at each of `steps` as SVG."""
        for step in steps:
            if self.first <= step <= self.last:
                yield f'<path class="mark" d="M{self.x(step):.1f} {_TOP}v{_HEIGHT}"/>'


def _line(axes, series, index):
    """Yields a curve as SVG, with dots where it is short or a point stands alone."""
    pieces, colour = _pieces(series), f"c{index % COLOURS}"
    path = "".join(
        "M" + "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in piece)
        for piece in pieces
        if len(piece) > 1
    )
    yield f'<path class="line {colour}" d="{path}"/>'
    for step, value in series if len(series) <= 12 else [piece[0] for piece in pieces if len(piece) == 1]:
        if value is not None:
            yield f'<circle class="{colour}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.5"/>'


def _thinned(series):
    """Returns at most `_POINTS` points, each the mean of neighbouring finite values at the last one's step."""
    if len(series) <= _POINTS:
        return series
    result = []
    for part in np.array_split(np.arange(len(series)), _POINTS):
        finite = [series[i][1] for i in part if series[i][1] is not None]
        result.append((series[part[-1]][0], sum(finite) / len(finite) if finite else None))
    return result


def _pieces(series):
    """Returns the runs of points between points without a value."""
    pieces = [[]]
    for step, value in series:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    return [piece for piece in pieces if piece]


def ticks(low, high, count):
    """Returns about `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low, high):
    """Returns the powers of ten between 10**low and 10**high."""
    return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]


def _steps(step):
    return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"
