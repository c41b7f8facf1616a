"""Evaluation tasks by name: a task is a module with a function `run`, and nothing else lists it.

A task string is a call with literals, `"zeroshot(source='/data/pets')"`. Its name is a module of this package or, with
a dot, the import path of any module: `"my_package.my_task(source='/data/pets')"`. The module has

  run(model, ...): returns the `EvalResult`. Its other parameters are the options of the string.
  summary(metrics): optional; yields the lines that the terminal shows. The default is every metric on a line.
  headline(metrics): optional; returns the HTML of the task's numbers at the top of the report. The default is the
    table "Other metrics".
  panel(name): optional; returns `(place, title)` of a result's name, such as "emoji/unseen_concept", or None where the
    task does not know it. Panels of the report are sorted by place; the default is `(0, name)`.

  sources(options): optional; returns each `(source string, split)` that `run` opens, with an empty split for the
    default. Training checks before its first step that they exist. `options` holds the values of all parameters.
  check_source(source, options): optional; raises UserError when an opened source does not suit the options, such as
    other class names. Training calls it before its first step.
  metric_names(options): optional; returns the names of the metrics that `run` computes, where "*" stands for any text.
    Training checks `checkpoint.best` with them, and that no two tasks compute metrics of one name.

`metrics` are all metrics of the task under their full names; the task may have run several times. A task module imports
JAX inside functions only, so a wrong task string is reported before JAX loads. docs/adding_a_task.md has an example.
"""

import dataclasses
import importlib
import inspect
import itertools
import re
import types

from clip_jax import plugins
from clip_jax.errors import Problems, UserError, did_you_mean, unknown
from clip_jax.evaluation.class_names import label_hint

_PACKAGE = "clip_jax.evaluation"
_STRINGS = ("source", "train", "test", "train_split", "name", "language")
_FIELDS = ("split", "test_split", "val_split", "image", "label")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its options; called with a model it returns the `EvalResult`.

    Attributes:
      text: the task string.
      module: the task's module.
      args, kwargs: the options that the string gives.
      options: the values of all options, by name.
    """

    text: str
    module: types.ModuleType
    args: tuple
    kwargs: dict
    options: dict

    def __call__(self, model):
        return self.module.run(model, *self.args, **self.kwargs).credit(self.module.__name__)

    def metric_names(self):
        """Returns the names of its metrics, "*" for any text; None where the module does not give them."""
        return self.module.metric_names(self.options) if hasattr(self.module, "metric_names") else None

    def check_sources(self):
        """Raises UserError when data that it reads, or a split of it, does not exist; reads no records."""
        from clip_jax.data.sources.splits import check_split, evaluation_split

        for source, split in self.module.sources(self.options) if hasattr(self.module, "sources") else ():
            check_split(source, split or evaluation_split(source))

    def open_sources(self):
        """Opens the data that it reads and reads a record of each part.

        Raises UserError for data that it cannot open, for a field that it lacks, and for what `check_source` of the
        module refuses.
        """
        from clip_jax.data.records import read_any
        from clip_jax.data.sources import make_source
        from clip_jax.data.sources.splits import evaluation_split

        fields = {name: self.options[name] or None for name in ("image", "text", "label") if name in self.options}
        for spec, split in self.module.sources(self.options) if hasattr(self.module, "sources") else ():
            source = make_source(spec, split or evaluation_split(spec), **fields)
            record = read_any(source)
            if "label" in fields and record is not None and "label" not in record:
                raise UserError(f"{self.text}: {source.name} has no labels{label_hint(record)}")
            if hasattr(self.module, "check_source"):
                self.module.check_source(source, self.options)


def parse_tasks(texts, key):
    """Returns the `Task`s of task strings.

    Args:
      texts: the strings.
      key: the field or flag that holds them, for messages.

    Raises one UserError for all wrong strings, and one when two tasks compute metrics of one name.
    """
    problems, owners = Problems(), {}
    tasks = [problems.check(parse_task, text) for text in texts]
    problems.end()
    for number, task in enumerate(tasks):
        names = task.metric_names() or [str(task.options[name]) for name in ("name",) if name in task.options]
        for metric in names:
            if owners.setdefault(metric, number) != number:
                other = tasks[owners[metric]].text
                raise UserError(
                    f"{key}: the metrics of {other!r} and {task.text!r} have the same names, such as {metric!r}; "
                    "set another name=... in one of them"
                )
    return tasks


def check(config):
    """Checks the tasks of a configuration and its `checkpoint.best` without a model, before a run starts.

    Raises UserError for a wrong task string, two tasks with metrics of one name, data that does not exist or does not
    suit its task, and a metric that no task computes.
    """
    problems = Problems()
    lists = {key: problems.check(parse_tasks, config.eval[key], f"eval.{key}") for key in ("tasks", "train_tasks")}
    for task in itertools.chain.from_iterable(filter(None, lists.values())):
        problems.check(_check_data, task)
    if config.checkpoint.best and None not in lists.values():
        problems.check(_check_best, config, lists["tasks"] + (lists["train_tasks"] if config.eval.steps else []))
    problems.end()


def _check_data(task):
    """Raises UserError, which names the task, when its data does not exist or does not suit it."""
    try:
        task.check_sources()
        task.open_sources()
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith(task.text) else f"{task.text}: {line}") from None


def _check_best(config, running):
    """Raises UserError when no running task computes the metric `checkpoint.best`."""
    line = (
        f"checkpoint.best={config.checkpoint.best!r}: no task of eval.tasks, or of eval.train_tasks with "
        f"eval.steps={config.eval.steps}, computes this metric"
    )
    check_metric(config.checkpoint.best.removeprefix("-"), running, line)


def check_metric(metric, tasks, line):
    """Raises UserError, with a line and a hint, when none of the `Task`s computes a metric."""
    names = [task.metric_names() for task in tasks]
    if None not in names and not any(_matches(metric, name) for name in itertools.chain.from_iterable(names)):
        known = sorted(set(itertools.chain.from_iterable(names)))
        hint = did_you_mean(metric, known) or (f"; they compute: {', '.join(known[:10])}, ..." if known else "")
        raise UserError(line + hint)


def _matches(metric, pattern):
    return re.fullmatch(".+".join(map(re.escape, pattern.split("*"))), metric) is not None


def find(name):
    """Returns the module of a task; raises UserError when there is none."""
    if "." not in name and not hasattr(plugins.find(f"{_PACKAGE}.{name}"), "run"):
        raise unknown("unknown task", name, plugins.names(_PACKAGE, "run"))
    return plugins.load(name, _PACKAGE, "run")


def parse_task(text):
    """Returns the `Task` of a task string; raises UserError for a wrong name or argument, and one of a wrong type."""
    name, args, kwargs = plugins.parse_call(text, "task")
    module = find(name)
    signature = inspect.signature(module.run)
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError as error:
        parameters = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
        raise UserError(f"task {text!r}: {error}; it is {name}({parameters})") from None
    bound.apply_defaults()
    options = dict(list(bound.arguments.items())[1:])
    if module.__name__.startswith(f"{_PACKAGE}."):
        _check_types(text, options)
    return Task(text, module, tuple(args), kwargs, options)


def _check_types(text, options):
    """Raises UserError when an option of a task of this package has the wrong type."""
    for name, value in options.items():
        needed = ""
        if name in _STRINGS and not (isinstance(value, str) and value):
            needed = "a string that is not empty"
        elif name in _FIELDS and not isinstance(value, str | None):
            needed = "a string"
        elif name == "text" and not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            needed = "a string or a list of strings"
        elif name == "canonical" and not isinstance(value, bool):
            needed = "True or False"
        elif name == "limit" and value is not None and (type(value) is not int or value < 1):
            needed = "a whole number from 1 on, or None"
        if needed:
            raise UserError(f"task {text!r}: {name}={value!r}: {needed} is needed")


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
