"""Mixtures of sources."""

import bisect
import itertools
from collections import Counter

from clip_jax.data.records import BaseSource, listed, read_any
from clip_jax.errors import UserError


class MixtureSource(BaseSource):
    """Several sources one after the other; the loader draws from them in proportion to their weights.

    Records gain `source_id`, the index of their source. The classes are the union of the sources' classes: classes of
    the same name are one class. Nested mixtures are flattened; each weight is split in proportion.

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
        if any(s.class_names is not None for s in self.sources):
            names = itertools.chain.from_iterable(s.class_names or () for s in self.sources)
            self._set_classes(list(dict.fromkeys(names)))

    def check_labels(self):
        """Raises UserError when the labels of several sources are numbers without class names.

        It reads the first usable record of each source. Selections of one source share its numbers.
        """
        parts = [s for s in self.sources if s.class_names is None and (read_any(s) or {}).get("label", -1) >= 0]
        unnamed = {id(getattr(s, "root", s)): s.name for s in parts}
        if len(unnamed) > 1 or (unnamed and self.class_names is not None):
            raise UserError(
                f"{self.name}: the labels of {listed(unnamed.values())} are numbers without class names, and equal"
                " numbers of different sources may mean different classes; add a column class_name"
            )

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        source_id = bisect.bisect_right(self._ends, index)
        start = self._ends[source_id - 1] if source_id else 0
        source = self.sources[source_id]
        record = source[index - start] | {"source_id": source_id}
        if self.class_names is None or record.get("label", -1) < 0:
            return record
        if source.class_names is None:
            raise UserError(
                f"{source.name}: its labels have no class names, and other sources of the mixture have class names"
            )
        return record | {"label": self._class_index[source.class_names[record["label"]]]}
