"""Evaluation tasks by name: a task is a module with a function `run`, and nothing else lists it.

A task string is a call with literals, `"zeroshot(source='/data/pets')"`. Its name is a module of this package or, with
a dot, the import path of any module: `"my_package.my_task(source='/data/pets')"`. The module has

  run(model, ...): returns the `EvalResult`. Its other parameters are the options of the string.
  summary(metrics): optional; yields the lines that the terminal shows. The default is every metric on a line.
  headline(metrics): optional; returns the HTML of the task's numbers at the top of the report. The default is the
    table "Other metrics".
  panel(name): optional; returns `(place, title)` of a result's name, such as "emoji/unseen_concept", or None where the
    task does not know it. Panels of the report are sorted by place; the default is `(0, name)`.

`metrics` are all metrics of the task under their full names; the task may have run several times. A task module imports
JAX inside functions only, so a wrong task string is reported before JAX loads. docs/adding_a_task.md has an example.
"""

import importlib
import inspect

from clip_jax import plugins
from clip_jax.errors import UserError, unknown

_PACKAGE = "clip_jax.evaluation"


def find(name):
    """Returns the module of a task; raises UserError when there is none."""
    if "." not in name and not hasattr(plugins.find(f"{_PACKAGE}.{name}"), "run"):
        raise unknown("unknown task", name, plugins.names(_PACKAGE, "run"))
    return plugins.load(name, _PACKAGE, "run")


def parse_task(text):
    """Returns the function model -> `EvalResult` of a task string; raises UserError for a wrong name or argument."""
    name, args, kwargs = plugins.parse_call(text, "task")
    module = find(name)
    signature = inspect.signature(module.run)
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        parameters = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
        raise UserError(f"task {text!r}: {error}; it is {name}({parameters})") from None
    return lambda model: module.run(model, *args, **kwargs).credit(module.__name__)


def by_task(result):
    """Returns `{module of a task: its metrics}` in the order of the metrics; None stands for an unknown task."""
    found = {}
    for name, value in result.metrics.items():
        found.setdefault(result.tasks.get(name), {})[name] = value
    return {task and importlib.import_module(task): metrics for task, metrics in found.items()}


def summary(result):
    """Yields the lines that show a result on the terminal."""
    for task, metrics in by_task(result).items():
        if hasattr(task, "summary"):
            yield from task.summary(metrics)
        else:
            yield from (f"  {name:40} {value:.4g}" for name, value in metrics.items())


def panel_finder(result):
    """Returns a function: name of a result -> `(place, title)` of its panel, from the first task that knows the name.

    The tasks of `result` are asked first, then those of this package: metrics of earlier evaluations carry no task.
    """
    names = dict.fromkeys([*result.tasks.values(), *(f"{_PACKAGE}.{name}" for name in plugins.names(_PACKAGE, "run"))])
    known = [module.panel for module in map(importlib.import_module, names) if hasattr(module, "panel")]

    def panel_of(name):
        return next(filter(None, (panel(name) for panel in known)), (0, name))

    return panel_of


def __getattr__(name):
    """Finds `tasks.zeroshot_task` and the like, the functions of tasks that take opened sources."""
    module = plugins.find(f"{_PACKAGE}.{name.removesuffix('_task')}") if name.endswith("_task") else None
    if module is None or not hasattr(module, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
