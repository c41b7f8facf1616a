"""What an evaluation task returns: metrics, and the material from which the report draws its figures."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_jax.data.records import hash64


class Images(Sequence):
    """Records of images, read again on each access, so that no image is held in memory.

    Item i is the record (a dict with "image") of the i-th image.

    Args:
      sources: data sources.
      where: int `[n, 2]`, of each image the number of its source and its index there.
    """

    def __init__(self, sources, where):
        self.sources, self.where = list(sources), np.asarray(where, np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        number, index = self.where[i]
        return self.sources[number][int(index)]

    def select(self, rows):
        """Returns the images of `rows` (indices or a bool mask)."""
        return Images(self.sources, self.where[rows])


@dataclass(frozen=True)
class Outcomes:
    """A metric image by image; the metric is the mean of the values.

    Attributes:
      values: float32 `[n]`, in [0, 1]: 1 where the model was right.
      groups: int64 `[n]`. Images of one thing, whose outcomes depend on each other, have the same number, in all tasks.
    """

    values: np.ndarray
    groups: np.ndarray


@dataclass
class EvalResult:
    """The result of one task, or of several merged ones.

    An artefact is a value from which the report draws a figure. Its class has

      section: the heading of the report's section, such as "Predictions". Artefacts with one heading share a section.
      intro: HTML, the first paragraph of that section.
      draw(page): returns the figure as HTML; `page` is a `report.page.Page`.

    Attributes:
      metrics: name -> value, such as "pets/top1" -> 0.5.
      artefacts: kind, such as "map" -> name, such as "pets" -> artefact.
      tasks: metric name -> import path of the task's module that computed it.
      outcomes: metric name -> `Outcomes`, for the metrics that are a mean over images.
      model: what is known of the model: "step" of its checkpoint, number of "parameters", whether they are the "ema".
      evaluated: what the report shows of each task that ran (`report.head.describe_task`).
    """

    metrics: dict[str, float]
    artefacts: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    tasks: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    evaluated: list[dict[str, str]] = field(default_factory=list)

    def credit(self, task):
        """Records that the module `task` computed every metric; returns the result itself."""
        self.tasks = dict.fromkeys(self.metrics, task)
        return self

    def keep(self, name, values, groups=None):
        """Keeps the outcomes of a metric.

        Args:
          name: the metric.
          values: `[n]`, the outcome of each image in [0, 1].
          groups: `[n]`, the thing that each image shows: a list of its names, which other tasks may share, or ints that
            count within the task of this metric. None: each image is a thing of its own.
        """
        if isinstance(groups, list):
            numbers = np.asarray([hash64(group.encode()) for group in groups], np.uint64)
        else:
            numbers = np.asarray(np.arange(len(values)) if groups is None else groups).astype(np.uint64)
            numbers = numbers + np.uint64(hash64(name.rpartition("/")[0].encode()))
        self.outcomes[name] = Outcomes(np.asarray(values, np.float32), numbers.view(np.int64))


def merge_results(results):
    """Returns one result with the metrics and artefacts of all; the later one wins where names are equal."""
    merged = EvalResult({})
    for result in results:
        merged.metrics |= result.metrics
        merged.tasks |= result.tasks
        merged.outcomes |= result.outcomes
        merged.model |= result.model
        merged.evaluated += result.evaluated
        for kind, items in result.artefacts.items():
            merged.artefacts[kind].update(items)
    return merged


def named(name, metrics):
    """Returns `{"name/key": float}` of metrics `{"key": number}`."""
    return {f"{name}/{key}": float(value) for key, value in metrics.items()}


def by_name(metrics):
    """Returns `{"name": {"key": value}}` of metrics `{"name/key": value}`; the name ends at the last slash."""
    found = {}
    for metric, value in metrics.items():
        name, _, key = metric.rpartition("/")
        found.setdefault(name, {})[key] = value
    return found
