"""Mixtures of sources."""

import bisect
import itertools
from collections import Counter

from clip_jax.data.class_names import join_classes
from clip_jax.data.records import BaseSource, check_labels, label_tuple, listed, read_any
from clip_jax.errors import UserError


class MixtureSource(BaseSource):
    """Several sources one after the other; the loader draws from them in proportion to their weights.

    Records gain `source_id`, the index of their source. The classes are the union of the sources' classes: classes with
    the same canonical name are one class and have the name of the first source (`clip_jax.data.class_names`). Nested
    mixtures are flattened; each weight is split in proportion.

    Args:
      sources: list of sources.
      weights: list of positive floats, one per source.
      name: str, for messages; made of the sources' names by default.

    Attributes:
      sources: list of sources, none of them a mixture.
      weights: list of floats, one per source.

    Raises UserError for a weight that is not positive.
    """

    def __init__(self, sources, weights, name=None):
        super().__init__(name or " + ".join(f"{s.name}*{w:g}" for s, w in zip(sources, weights, strict=True)))
        if not sources or min(weights) <= 0:
            raise UserError(f"mixture {self.name!r}: weights must be positive")
        self.sources, self.weights = [], []
        for source, weight in zip(sources, weights, strict=True):
            if isinstance(source, MixtureSource):
                self.sources += source.sources
                self.weights += [weight * w / sum(source.weights) for w in source.weights]
            else:
                self.sources.append(source)
                self.weights.append(weight)
        self.broken = sum((Counter(s.broken) for s in self.sources), Counter())
        self._ends = list(itertools.accumulate(len(s) for s in self.sources))
        self.multi_label = any(getattr(s, "multi_label", False) for s in self.sources)
        self._labels, self._ambiguous = [], []  # of each source its classes as classes of the mixture
        self._known = {}
        if any(s.class_names is not None for s in self.sources):
            classes, self._labels, self._ambiguous = join_classes([s.class_names or () for s in self.sources])
            self._set_classes(classes)

    def check_labels(self):
        """Raises UserError when equal labels may mean different classes, or one class has several labels.

        The first is so when the labels of several sources are numbers without class names. Selections of one source,
        and sources of the same files and label field, share their numbers. It reads some records of each source.
        """
        for source in self.sources:
            check_labels(source)
        records = [(s, read_any(s, wanted=label_tuple)) for s in self.sources if s.class_names is None]
        unnamed = [(s, record) for s, record in records if record is not None]
        if len({getattr(s, "numbering", id(s)) for s, _ in unnamed}) > 1 or (unnamed and self.class_names is not None):
            raise UserError(
                f"{self.name}: the labels of {listed(dict.fromkeys(s.name for s, _ in unnamed))} are numbers without "
                "class names, and equal numbers of different sources may mean different classes; "
                + "; ".join(dict.fromkeys(_naming(s, record) for s, record in unnamed))
            )
        for number, name, classes in self._ambiguous[:1]:
            raise UserError(
                f"{self.name}: the class {name!r} of {self.sources[number].name} may be each of the classes {classes} "
                "of another source, which differ in spelling alone; rename it"
            )

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        source_id = bisect.bisect_right(self._ends, index)
        start = self._ends[source_id - 1] if source_id else 0
        return self.of_part(source_id, self.sources[source_id][index - start])

    def of_part(self, source_id, record):
        """Returns a record of the source with an index as a record of the mixture."""
        source, record = self.sources[source_id], record | {"source_id": source_id}
        if self.class_names is None or not label_tuple(record):
            return record
        if source.class_names is None:
            raise UserError(
                f"{source.name}: its labels have no class names, and other sources of the mixture have class names; "
                + _naming(source, record)
            )
        labels = {label: self._joined(source_id, label) for label in label_tuple(record)}
        names = dict(names for _, names in labels.values())
        labels = tuple(dict.fromkeys(new for new, _ in labels.values()))
        record["label"] = labels if isinstance(record["label"], tuple) else labels[0]
        if isinstance(name := record.get("class_name"), str):
            record["class_name"] = names.get(name, name)
        elif name is not None:
            record["class_name"] = [names.get(item, item) for item in name]
        return record

    def _joined(self, source_id, label):
        """Returns `(label, (old name, new name))` of a source's class in the mixture."""
        key = source_id, label
        if key not in self._known:
            new, old = self._labels[source_id][label], self.sources[source_id].class_names[label]
            self._known[key] = new, (old.replace("_", " "), self._class_name(new))
        return self._known[key]


def _naming(source, record):
    return source.naming(record) if hasattr(source, "naming") else f"give {source.name} class_names"
