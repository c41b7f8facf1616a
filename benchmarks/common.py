"""The parts that benchmarks share: the command line, the printed table, and a JSON file with all that repeats the run.

This module imports only the standard library: a benchmark also runs its other side in an interpreter without JAX.
"""

import argparse
import datetime
import html
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys

ROOT = str(pathlib.Path(__file__).parent.parent)
sys.path.insert(0, ROOT)  # clip_jax need not be installed
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "numpy", "torch", "open_clip_torch")
PALETTE = ("#1f5fa8", "#c8553d", "#3a8c5c", "#7a4fa0")


def make_parser(doc, name):
    """Returns a parser of a benchmark's command line with the option `--json`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json",
        default=f"runs/benchmarks/{name}.json",
        metavar="FILE",
        help="file of all figures (default: %(default)s)",
    )
    return parser


def parse(parser, argv=None):
    """Returns the arguments; `args.overrides` holds those of `--config.FIELD=VALUE` and `--config.FIELD VALUE`."""
    from clip_jax import config

    args, rest = parser.parse_known_args(argv)
    try:
        args.overrides = config.parse_overrides(rest)
    except config.UserError as error:
        parser.error(str(error))
    return args


def versions():
    """Returns `{package: version}` of the packages in this interpreter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine():
    """Returns the CPU, the cores, the system and the load average of this computer."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": platform.platform(), "load_average": os.getloadavg()}


class Report:
    """A table: rows are printed as they are added, and `write` stores them.

    Args:
      columns: `{name: format}` with a width, such as `{"batch": ">8,", "images/s": ">10.1f"}`. A row may hold more.
      about: values that all rows share.
    """

    def __init__(self, columns, **about):
        self.columns, self.rows = columns, []
        now = datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
        self.about = dict(
            command=" ".join(["python", *sys.argv]), date=now, machine=machine(), versions=versions(), **about
        )

    def header(self):
        print("  ".join(f"{name:{self._cell(spec)}}" for name, spec in self.columns.items()), flush=True)

    def add(self, **row):
        """Prints and keeps a row. A missing value, or None, appears as a dash."""
        self.rows.append(row)
        cells = ((row.get(name), spec) for name, spec in self.columns.items())
        print(
            "  ".join(f"{'-':{self._cell(spec)}}" if value is None else f"{value:{spec}}" for value, spec in cells),
            flush=True,
        )

    @staticmethod
    def _cell(spec):
        return re.match(r"[<>]\d+", spec)[0]

    def write(self, path):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(self.about, rows=self.rows), indent=1) + "\n")
        print(f"written: {path}")


def line_chart(path, title, x_label, y_label, series, log_y=False):
    """Writes an SVG chart of lines over a logarithmic x axis.

    Args:
      series: `{name: [(x, y), ...]}`; every second line is dashed.
      log_y: the y axis is logarithmic with a line per power of ten; otherwise it is linear and starts at 0.
    """
    width, height = 760, 400
    left, top = 70, 40
    right, bottom = 540, 345
    xs, ys = sorted({x for line in series.values() for x, _ in line}), [y for line in series.values() for _, y in line]
    if log_y:
        powers = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)
        ticks, scale = [10**p for p in powers], math.log10
    else:
        unit = 10 ** math.floor(math.log10(max(ys)))
        step = next(unit * f for f in (0.1, 0.2, 0.5, 1, 2) if max(ys) / (unit * f) <= 8)
        ticks, scale = [step * k for k in range(math.ceil(max(ys) / step) + 1)], float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def px(x):
        return left + (right - left) * math.log(x / xs[0]) / (math.log(xs[-1] / xs[0]) or 1)

    def py(y):
        return bottom - (bottom - top) * (scale(y) - low) / (high - low)

    def text(x, y, label, anchor="middle"):
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(label)}</text>'

    parts = [
        text(left, 22, title, "start"),
        text((left + right) / 2, bottom + 42, x_label),
        text(left, top - 4, y_label, "end"),
    ]
    for y in ticks:
        parts.append(
            f'<path d="M{left} {py(y):.1f}H{right}" stroke="#ddd"/>' + text(left - 6, py(y) + 4, f"{y:,g}", "end")
        )
    parts += [text(px(x), bottom + 20, f"{x:,}") for x in xs]
    for k, (name, line) in enumerate(series.items()):
        color, dash = PALETTE[k // 2 % len(PALETTE)], ' stroke-dasharray="6 4"' if k % 2 else ""
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        parts.append(f'<path d="M{right + 15} {top + 20 * k}h26" stroke="{color}" stroke-width="2"{dash}/>')
        parts.append(text(right + 48, top + 20 * k + 4, name, "start"))
    style = '<style>text{font:12px sans-serif;fill:#333}</style><rect width="100%" height="100%" fill="#fff"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{style}{"".join(parts)}</svg>\n'
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(svg)
    print(f"written: {path}")
