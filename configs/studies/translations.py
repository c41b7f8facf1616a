"""A data source of pairs of texts: the name of a thing in two languages (`studies.translations`, docs/data.md).

The names are those of the training concepts of the embedded emoji. Record i is a pure function of i. Its fields are
those of `clip_jax.data.sources.sentences`.
"""

from clip_jax.data.sources import MemorySource
from clip_jax.data.sources.tfds import embedded

SPLITS = ("train",)
PAIRS = 8  # of each concept


def make(split):
    """Returns the source; `split` is "train" alone."""
    names = {}
    emoji = embedded("emoji", split)
    for index in range(len(emoji)):
        record = emoji[index]
        known = {value for field, value in sorted(record.items()) if field.startswith("name_") and value}
        names.setdefault(record["name"], sorted(known))
    pairs = []
    for number, (name, others) in enumerate(sorted(names.items())):
        others = [other for other in others if other != name]
        for i in range(min(PAIRS, len(others))):
            pairs.append([name, others[(number + i * max(1, len(others) // PAIRS)) % len(others)]])
    return MemorySource([{"sentences": pair, "texts": pair, "text_pair": 1} for pair in pairs], "studies.translations")
