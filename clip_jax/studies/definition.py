"""What a study is: its rows, its metrics, what is tuned, and how its page shows it."""

import dataclasses
import itertools
import re

from clip_jax import config as config_lib
from clip_jax.errors import UserError, unknown

#: `Study.x` of measured figures: the training's minutes and FLOPs.
MEASURED = ("minutes", "TFLOP")
INDEX, AFTER = "{index}", "{after}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration of a study.

    Attributes:
      name: the row's name in the table, and of its folder.
      config: `FILE[:VARIANT]`.
      overrides: fields that the row changes, such as `optim.lr=1e-3`.
      published: the published figures, in percent.
      tune: `(field, (value, ...))`: the values that are tried before the seeds; empty: none.
      tuned_as: the name of a row whose chosen value this row takes instead of trying values of its own.
      after: the name of a row whose first seed this row needs. `{after}` in `overrides` and `index` stands for the work
        folder of that run.
      index: a command that writes an index of records, and its arguments but for `--out`, such as
        `("clip_jax.tools.filter", "--source=emoji")`. It runs once, before the row's first run. `{index}` in
        `overrides` stands for the step `?index=FOLDER` of a source.
      line: the line of the figure that the row belongs to; empty: none.
      x: the row's place on the horizontal axis of the figure.
      minus: the name of the row that this row is compared with; empty: the first row that has the same `x`.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    published: tuple[float, ...] = ()
    tune: tuple = ()
    tuned_as: str = ""
    after: str = ""
    index: tuple[str, ...] = ()
    line: str = ""
    x: float | None = None
    minus: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of configurations.

    Attributes:
      title: the title of the page.
      rows: the rows of the table. Rows with published figures go from the lowest to the highest figure, the expected
        order. `Row.minus` says with which row a row is compared.
      metrics: `{column heading: metric of the last evaluation}`. Each metric is a fraction. The first decides the
        order and is drawn. A tuple of metrics is one metric over the images of all of them.
      published: the heading of the published figures.
      curves: the training metrics that the page plots. It also plots the `metrics` and the usual others that were
        evaluated at several steps.
      map_task: the evaluation task whose 2-D maps the page shows, one for each row; empty: none.
      equal_compute: gives every row the number of steps that costs as many FLOPs as the first row's steps. Otherwise
        each row takes the steps of its configuration.
      readouts: `{name: overrides}`. Each readout evaluates the trained models once more, on the tasks of their
        configurations, with overrides such as `oner.embed=projector`, which must not change the shapes of the weights.
        The table has a row for each configuration and readout. The default is the model as trained.
      overrides: fields that all rows change, before the row's own.
      tasks: the tasks of the last evaluation; empty: those of the row's configuration.
      tune_tasks: the tasks that the values of `Row.tune` are evaluated on.
      tune_metric: the metric that chooses the value, the highest; a tuple as in `metrics`.
      question: what the study asks.
      claim: what the papers claim.
      x: the heading of the horizontal axis, one of `MEASURED` or what `Row.x` means; empty: the figure has a line of
        text for each row instead.
    """

    title: str
    rows: tuple[Row, ...]
    metrics: dict
    published: str = ""
    curves: tuple[str, ...] = ("loss",)
    map_task: str = ""
    equal_compute: bool = False
    readouts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"as trained": ()})
    overrides: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tune_tasks: tuple[str, ...] = ()
    tune_metric: str | tuple[str, ...] = ()
    question: str = ""
    claim: str = ""
    x: str = ""

    def row(self, name):
        """Returns the row of a name."""
        return next(row for row in self.rows if row.name == name)

    def base(self, row):
        """Returns the row that a row is compared with."""
        return self.row(row.minus) if row.minus else next(other for other in self.rows if other.x == row.x)

    def keys(self):
        """Returns `{column heading: key of the metric}`; see `key`."""
        return {label: key(metric) for label, metric in self.metrics.items()}


def key(metric):
    """Returns the name under which a metric is kept: that of a tuple joins its parts by " + "."""
    return metric if isinstance(metric, str) else " + ".join(metric)


def load(spec):
    """Returns the study of `"path/to/file.py[:variant]"`. Raises UserError."""
    module, variant = config_lib.load_module(spec)
    if not hasattr(module, "get_study"):
        raise UserError(f"--config={spec}: {module.__file__!r} has no function get_study(variant)")
    if variant not in module.STUDIES:
        raise unknown(f"--config={spec}: no study", variant, module.STUDIES)
    return module.get_study(variant)


def check(study):
    """Raises UserError for rows that contradict each other."""
    names = [row.name for row in study.rows]
    for a, b in itertools.combinations(names, 2):
        if a == b:
            raise UserError(f"two rows are called {a!r}")
    for row in study.rows:
        if not row.name or re.search(r"[/\\]|^\.", row.name):
            raise UserError(
                f"a row is called {row.name!r}: its folder needs a name without / and without a dot in front"
            )
        for field in ("after", "tuned_as", "minus"):
            if getattr(row, field) and getattr(row, field) not in names:
                raise unknown(f"{row.name}: {field}: no row", getattr(row, field), names)
        if row.after and study.row(row.after).after:
            raise UserError(f"{row.name} is after {row.after}, which is after another row itself")
        if row.tuned_as and (row.tune or not study.row(row.tuned_as).tune):
            raise UserError(f"{row.name}: tuned_as names a row with values to try, and this row has none of its own")
        if row.tune and not study.tune_metric:
            raise UserError(f"{row.name} tries values of {row.tune[0]}, and the study has no tune_metric")
