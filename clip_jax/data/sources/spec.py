"""The grammar of source strings, parsed once into small values.

    SOURCE  = PART {" + " PART}                     several parts are a mixture
    PART    = BASE {"?" OPTION {"&" OPTION}} ["*" WEIGHT]
    OPTION  = KEY "=" VALUE                         WEIGHT = number | "size"

A weight is read in a mixture only. A "?" that no KEY and "=" follow belongs to the base, where it is a wildcard; so does an "&" to a value.
"""

import dataclasses
import re

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Spec:
    """One part of a source string.

    Attributes:
      base: a name, a path or pattern, or an import path.
      steps: what follows the base: for each "?" its options `((key, value), ...)`, in order.
      weight: "" where none is given, "size", or a number as text.
    """

    base: str
    steps: tuple[tuple[tuple[str, str], ...], ...] = ()
    weight: str = ""

    def prefix(self, steps):
        """The text of the base and of its first `steps` steps."""
        options = ("&".join(f"{key}={value}" for key, value in step) for step in self.steps[:steps])
        return "?".join([self.base, *options])


def parse(text):
    """The parts of a source string, a tuple of `Spec`; raises UserError for an empty one."""
    if not text.strip():
        raise UserError("data: no data set is named; give a name such as emoji, or a path")
    parts = [part.strip() for part in text.split(" + ")]
    weighted = [re.fullmatch(r"(.+)\*(size|\d+(?:\.\d+)?)", part) if len(parts) > 1 else None for part in parts]
    return tuple(
        _parse_part(match[1].strip(), match[2]) if match else _parse_part(part, "")
        for part, match in zip(parts, weighted, strict=True)
    )


def _parse_part(text, weight):
    base, *steps = re.split(r"\?(?=\w+=)", text)
    options = (re.split(r"&(?=\w+=)", step) for step in steps)
    return Spec(base, tuple(tuple(tuple(option.split("=", 1)) for option in step) for step in options), weight)
