"""The fields of a configuration that belong to the embedded data sets and are left out for other data."""

import ast
import re

#: Names of the embedded data sets, as bases of a source string.
EMBEDDED = ("emoji", "openclipart", "scenes")


def is_embedded(source):
    """Returns whether some part of a source string is an embedded data set."""
    bases = (re.split(r"[?*]", part.strip(), maxsplit=1)[0] for part in source.split(" + "))
    return any(base in EMBEDDED for base in bases)


def adapt(config, overrides):
    """Changes a configuration in place after its overrides, and returns it.

    Where the overrides name data, and none of it is embedded, the templates, the word dropout and the tasks of the
    embedded data sets are left out, unless the overrides set them. Fields that the overrides set are no longer chosen
    from the data (`small.fields`, see `clip_jax.small`).

    Args:
      config: a configuration.
      overrides: `["data.source=pairs.tsv", ...]`.
    """
    given = {name for text in overrides for name in _given(*text.partition("=")[::2])}
    if "small" in config:
        config.small.fields = tuple(field for field in config.small.fields if field not in given)
    if "data.source" not in given or is_embedded(config.data.source):
        return config
    for field, value in (("templates", ()), ("word_dropout", 0.0)):
        if f"data.{field}" not in given:
            config.data[field] = value
    for field in ("tasks", "train_tasks"):
        if f"eval.{field}" not in given:
            config.eval[field] = tuple(task for task in config.eval[field] if not _is_of_embedded(task))
    return config


def _given(key, value):
    """Yields the fields that an override sets: of a section it sets those of a dict, or the source of the data."""
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _given(f"{key}.{name}", repr(item))
    else:
        yield "data.source" if key == "data" else key


def _is_of_embedded(task):
    """Returns whether a task string evaluates on an embedded data set."""
    source = re.search(r"source=(['\"])(.*?)\1", task)
    return re.match(r"\s*emoji\b", task) is not None or source is not None and is_embedded(source[2])
