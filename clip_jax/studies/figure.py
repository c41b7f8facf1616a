"""The figure of a study as SVG: one metric by row, or against what the study varies.

The first metric of the first readout is drawn. A bar is the 95 % interval of the difference of a row to the row that it
is compared with, drawn from that row's mean. Small dots are seeds, a large mark is their mean. Without `Study.x` each
row has a line, and a dashed line marks the mean of the row that others are compared with. With `Study.x` the rows of
one `Row.line` are joined. Lines differ in colour, marker and dashes, and stand side by side where their places are
given. A screen in dark mode gets a dark figure, paper a white one.
"""

import math
import statistics
from typing import NamedTuple

from clip_jax.evaluation.report.charts import ticks
from clip_jax.evaluation.report.page import escaped
from clip_jax.studies.definition import MEASURED, Row

WIDTH = 720
_LETTER = 7.2  # pixels of a letter at 13 pixels, on average
_COLOURS = "#1f5fbf #c4561a #1e7d4f #b03060 #6d45b8 #7d5e14 #137a84 #a83c92".split()
_DARK = "#7db0ff #f0995c #5cc48e #ec7b9d #ad8df0 #cfa84f #54c6d0 #ea84d4".split()
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_DODGE = 5  # pixels between the bars of two lines at one place
_STYLE = """.study{font:13px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;LIGHT;
--bg:#fff;--ink:#1d2127;--soft:#565e69;--line:#dfe1e4}
@media (prefers-color-scheme:dark){.study{DARK;--bg:#1c1f25;--ink:#e5e7ea;--soft:#a4acb7;--line:#363c46}}
@media print{.study{LIGHT;--bg:#fff;--ink:#000;--soft:#333;--line:#ccc}}
.study .bg{fill:var(--bg)}.study text{fill:var(--ink)}.study .soft{fill:var(--soft)}.study .end{text-anchor:end}
.study .middle{text-anchor:middle}.study .grid{stroke:var(--line);fill:none}
.study .base{stroke:var(--soft);stroke-dasharray:4 4;fill:none}.study .on{stroke:var(--c);fill:none;stroke-width:1.8}
.study .bar{opacity:.55}
.study .dot{fill:var(--c);stroke:var(--bg);stroke-width:1}.study .seed{fill:var(--c);opacity:.45}"""


class _Measured(NamedTuple):
    """What a row shows of the metric, in percent: its seeds, their mean, and the ends of its bar, if it has one."""

    row: Row
    seeds: list
    mean: float
    bar: tuple
    is_starred: bool


def draw(found):
    """Returns the figure as the text of an SVG file; empty while no row has the first metric.

    Args:
      found: `clip_jax.studies.tables.Found`.
    """
    study, readout = found.study, next(iter(found.metrics))
    label, name = next(iter(study.keys().items()))
    rows = [row for row in study.rows if found.values(readout, row, name)]
    if not rows:
        return ""
    height, drawn = (_lines if study.x else _rows)(found, _measured(found, readout, rows, name), label)
    colours = [";".join(f"--c{i}:{colour}" for i, colour in enumerate(palette)) for palette in (_COLOURS, _DARK)]
    style = _STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1]).replace("\n", "")
    frame = f'class="study" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escaped(study.title)}"'
    background = '<rect class="bg" width="100%" height="100%"/>'
    drawn = f"<style>{style}</style>{background}{''.join(drawn)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>{drawn}</svg>\n'


def _measured(found, readout, rows, name):
    """Returns the list of a `_Measured` for each row."""
    seeds = {row.name: [100 * v for v in found.values(readout, row, name)] for row in rows}
    means = {row: statistics.mean(values) for row, values in seeds.items()}
    measured = []
    for row in rows:
        difference, base = found.difference(readout, row, name), found.study.base(row).name
        bar = ()
        if difference and not math.isnan(difference.low) and base in means:
            bar = tuple(means[base] + 100 * x for x in (difference.low, difference.high))
        is_starred = bool(difference and difference.excludes_zero)
        measured.append(_Measured(row, seeds[row.name], means[row.name], bar, is_starred))
    return measured


def _rows(found, measured, label):
    """Returns `(height, parts)` of a figure with a line for each row."""
    left = min(300, 24 + _LETTER * max(len(m.row.name) for m in measured))
    means = {m.row.name: m.mean for m in measured}
    scale = _Scale([v for m in measured for v in (*m.seeds, *m.bar)], left, WIDTH - 24)
    top, step = 34, 26
    height = top + step * len(measured) + 40
    bottom = height - 40
    parts = [f'<text class="soft" x="{left:g}" y="18">{escaped(label)}, %</text>']
    for tick in scale.ticks:
        parts.append(f'<path class="grid" d="M{scale(tick):.1f} {top - 8}V{bottom}"/>')
        parts.append(f'<text class="soft middle" x="{scale(tick):.1f}" y="{bottom + 18}">{tick:g}</text>')
    for base in {found.study.base(m.row).name for m in measured} & means.keys():
        parts.append(f'<path class="base" d="M{scale(means[base]):.1f} {top - 8}V{bottom}"/>')
    for number, (row, seeds, mean, bar, is_starred) in enumerate(measured):
        y = top + step * (number + 0.5)
        star = " *" if is_starred else ""
        parts.append(f'<text class="end" x="{left - 12:g}" y="{y + 4.5:g}">{escaped(row.name)}{star}</text>')
        parts.append('<g style="--c:var(--c0)">')
        if bar:
            low, high = (f"{scale(x):.1f}" for x in bar)
            parts.append(f'<path class="on" d="M{low} {y:g}H{high}M{low} {y - 4:g}v8M{high} {y - 4:g}v8"/>')
        parts += [f'<circle class="seed" cx="{scale(v):.1f}" cy="{y:g}" r="2.6"/>' for v in seeds]
        parts.append(f"{_marker(0, scale(mean), y, 5)}</g>")
    return height, parts


def _lines(found, measured, label):
    """Returns `(height, parts)` of a figure with a line for each `Row.line` against `Study.x`."""
    lines = {}
    for row, seeds, mean, bar, _ in measured:
        if (x := _place(found, row)) is not None:
            lines.setdefault(row.line or row.name, []).append((x, mean, seeds, bar))
    if not lines:
        return 40, ['<text x="16" y="24">nothing to place on the axis was measured</text>']
    top, height = 34, 380
    bottom, right = height - 48, WIDTH - 36 - _LETTER * max(map(len, lines))
    points = [point for line in lines.values() for point in line]
    is_given = found.study.x not in MEASURED
    xs = _Scale([x for x, *_ in points], 56 + _DODGE * len(lines), right - _DODGE * len(lines), is_given)
    ys = _Scale([v for _, _, seeds, bar in points for v in (*seeds, *bar)], bottom, top)
    parts = [
        f'<text class="soft" x="12" y="18">{escaped(label)}, %</text>',
        f'<text class="soft middle" x="{(56 + right) / 2:g}" y="{height - 10}">{escaped(found.study.x)}</text>',
    ]
    for tick in ys.ticks:
        parts.append(f'<path class="grid" d="M56 {ys(tick):.1f}H{right:g}"/>')
        parts.append(f'<text class="soft end" x="48" y="{ys(tick) + 4.5:.1f}">{tick:g}</text>')
    for tick in xs.ticks:
        parts.append(f'<text class="soft middle" x="{xs(tick):.1f}" y="{bottom + 18}">{tick:,g}</text>')
    ends = {line: max(found_points) for line, found_points in lines.items()}
    places = _apart({line: ys(end[1]) for line, end in ends.items()}, top, bottom)
    for number, (line, points) in enumerate(lines.items()):
        shift = _DODGE * (number - (len(lines) - 1) / 2) if is_given else 0.0
        places_of = {x: xs(x) + shift for x, *_ in points}
        parts.append(f'<g style="--c:var(--c{number % len(_COLOURS)})">')
        path = "L".join(f"{places_of[x]:.1f} {ys(y):.1f}" for x, y, *_ in sorted(points))
        dash = _DASHES[number // 2 % len(_DASHES)]
        parts.append(f'<path class="on" stroke-dasharray="{dash or "none"}" d="M{path}"/>')
        for x, y, seeds, bar in points:
            place = f"{places_of[x]:.1f}"
            if bar:
                parts.append(f'<path class="on bar" d="M{place} {ys(bar[0]):.1f}V{ys(bar[1]):.1f}"/>')
            parts += [f'<circle class="seed" cx="{place}" cy="{ys(v):.1f}" r="2.6"/>' for v in seeds]
            parts.append(_marker(number, places_of[x], ys(y), 5))
        x, y = places_of[ends[line][0]], ys(ends[line][1])
        parts.append(f'<path class="grid" d="M{x + 7:.1f} {y:.1f}L{right + 16:g} {places[line]:.1f}"/>')
        parts.append(_marker(number, right + 22, places[line], 4))
        parts.append(f'</g><text x="{right + 31:g}" y="{places[line] + 4.5:.1f}">{escaped(line)}</text>')
    return height, parts


def _place(found, row):
    """Returns the place of a row on the horizontal axis, or None."""
    if found.study.x == "minutes":
        return found.minutes(row)
    if found.study.x == "TFLOP":
        return next(found.cost(p).flops / 1e12 for p in found.planned if p.row is row)
    return row.x


class _Scale:
    """Maps values to pixels.

    Args:
      values: the values to show.
      start, end: the pixels of the lowest and of the highest place.
      is_given: the values themselves are the ticks, and the scale is logarithmic where they are positive and span more
        than a factor of 8.
    """

    def __init__(self, values, start, end, is_given=False):
        low, high = min(values), max(values)
        self._is_log = is_given and low > 0 and high > 8 * low
        if is_given:
            self.ticks = sorted(set(values))
            low, high = self._value(low), self._value(high)
        else:
            margin = 0.06 * (high - low) or max(abs(high), 1) / 10
            low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
            self.ticks = ticks(low, high, 6)
        high = high if high > low else low + 1
        self._low, self._start = low, start
        self._slope = (end - start) / (high - low)

    def _value(self, x):
        return math.log(x) if self._is_log else x

    def __call__(self, x):
        return self._start + (self._value(x) - self._low) * self._slope


def _marker(number, x, y, r):
    """Returns the marker of a line: a circle, a square, a triangle or a diamond."""
    kind = number % 4
    if kind == 0:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    if kind == 1:
        return f'<rect class="dot" x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"/>'
    if kind == 2:
        return f'<path class="dot" d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h-{2 * r + 2}z"/>'
    return f'<path class="dot" d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l-{r + 1} {r + 1}l-{r + 1} -{r + 1}z"/>'


def _apart(places, top, bottom, gap=17):
    """Returns heights near the given ones, `{name: y}`, at least a gap apart and above the bottom."""
    names = sorted(places, key=places.get)
    heights, least = [], top
    for name in names:
        heights.append(max(places[name], least))
        least = heights[-1] + gap
    most = bottom
    for number in reversed(range(len(names))):
        heights[number] = min(heights[number], most)
        most = heights[number] - gap
    return dict(zip(names, heights, strict=True))
