"""The grammar of source strings, parsed once into `Spec` values.

    SOURCE = PART {" + " PART}                                    two or more parts are a mixture
    PART   = BASE {"?" OPTION {"&" OPTION}} ["*" WEIGHT]
    OPTION = KEY "=" VALUE
    WEIGHT = NUMBER | "size"

BASE is a name, a path or pattern, or an import path. A KEY consists of letters, digits and underscores.

- A "?" or "&" separates only when a KEY and "=" follow. Otherwise it belongs to the base or value, where a "?" is a
  wildcard.
- A weight is read in a mixture only. In a single part "*" belongs to the base, where it is a wildcard.
"""

import dataclasses
import re

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Spec:
    """One part of a source string.

    Attributes:
      base: str, a name, a path or pattern, or an import path.
      steps: for each "?" its options in order, each `(key, value)`. Steps apply one after the other.
      weight: str, a number or "size"; "" when none is given.
    """

    base: str
    steps: tuple[tuple[tuple[str, str], ...], ...] = ()
    weight: str = ""

    def prefix(self, steps):
        """Returns the text of the base and of its first `steps` steps, without the weight."""
        options = ("&".join(f"{key}={value}" for key, value in step) for step in self.steps[:steps])
        return "?".join([self.base, *options])


def parse(text):
    """Returns the parts of a source string, a tuple of `Spec`; raises UserError when the string or a part is empty."""
    parts = [part.strip() for part in text.split(" + ")]
    specs = tuple(_parse_part(part, weighted=len(parts) > 1) for part in parts)
    if not all(spec.base for spec in specs):
        raise UserError(f"data: no data set is named in {text!r}; write a name such as emoji, or a path")
    return specs


def with_step(text, key, value):
    """Returns a source string with the step `?key=value` at the end of each of its parts; raises UserError."""
    parts = parse(text)
    steps = (f"{part.prefix(len(part.steps))}?{key}={value}" for part in parts)
    return " + ".join(step + f"*{part.weight}" * bool(part.weight) for step, part in zip(steps, parts, strict=True))


def _parse_part(text, weighted):
    match = re.fullmatch(r"(.+)\*(size|\d+(?:\.\d+)?)", text) if weighted else None
    text, weight = (match[1].strip(), match[2]) if match else (text, "")
    base, *steps = re.split(r"\?(?=\w+=)", text)
    options = (re.split(r"&(?=\w+=)", step) for step in steps)
    return Spec(base, tuple(tuple(tuple(option.split("=", 1)) for option in step) for step in options), weight)
