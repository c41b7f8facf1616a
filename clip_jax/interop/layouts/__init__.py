"""How others lay out the parameters that we have: maps that work in both directions.

A layout is a function `entries(ours, **options) -> [Entry, ...]` of the paths of our parameters and their shapes, fully
expanded: one entry per array of theirs. The same list imports (`load`), exports (`save`) and tells what does not
fit (`check`).

Paths of ours begin with `params/` or `extra/` (running statistics): `params/img/block_0/mlp/fc1/kernel`. Layers are not
stacked (`model.scan=False`); `clip_jax.models.transformer` converts.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import UserError


@dataclass(frozen=True)
class Op:
    """Theirs is ours with dimensions put together or apart (`reshape`: shape of ours -> shape), then permuted by `axes`."""

    reshape: Callable = tuple
    axes: tuple[int, ...] | None = None

    def shape(self, ours):
        """The shape of theirs for a shape of ours."""
        shape = tuple(self.reshape(ours))
        return tuple(shape[axis] for axis in self.axes) if self.axes else shape

    def save(self, x):
        """Theirs of ours."""
        x = x.reshape(self.reshape(x.shape))
        return x.transpose(self.axes) if self.axes else x

    def load(self, y, shape):
        """Ours, of that shape, of theirs."""
        return (y.transpose(np.argsort(self.axes)) if self.axes else y).reshape(shape)


@dataclass(frozen=True)
class WithoutFirst(Op):
    """Positions `[1, 1 + n, D]` of which theirs has the last n: the class token, which has a vector of its own, has none."""

    def shape(self, ours):
        return (ours[0], ours[1] - 1, ours[2])

    def save(self, x):
        if np.any(x[:, 0]):
            raise UserError("the class token has a position embedding, which this layout has no place for")
        return x[:, 1:]

    def load(self, y, shape):
        return np.concatenate([np.zeros((shape[0], 1, shape[2]), y.dtype), y], axis=1)


KEEP = Op()
VECTOR = Op(lambda s: (math.prod(s),))  # a bias (heads, Dh), a class token (1, 1, D), a scalar as (1,)
TABLE = Op(lambda s: s[1:])  # positions (1, n, D)
LINEAR = Op(lambda s: (s[0], math.prod(s[1:])), (1, 0))  # kernel (in, out) or (in, heads, Dh)
LINEAR_OUT = Op(lambda s: (math.prod(s[:-1]), s[-1]), (1, 0))  # kernel (heads, Dh, out)
CONV = Op(axes=(3, 2, 0, 1))  # height, width, in, out -> out, in, height, width


@dataclass(frozen=True)
class Entry:
    """One array of theirs and the arrays of ours in it: one, or several of one shape after each other.

    Attributes:
      theirs: its name.
      ours: paths.
      op: what becomes of each of ours.
      stack: several of ours lie along a new leading axis (stacked layers) and not along the first one (fused projections).
    """

    theirs: str
    ours: tuple[str, ...]
    op: Op = KEEP
    stack: bool = False

    def shape(self, shapes):
        """The shape of theirs; `shapes`: those of ours by path."""
        part = self.op.shape(tuple(shapes[self.ours[0]]))
        if self.stack:
            return (len(self.ours), *part)
        return part if len(self.ours) == 1 else (len(self.ours) * part[0], *part[1:])

    def save(self, arrays):
        """The array of theirs; `arrays`: ours by path, NumPy."""
        parts = [self.op.save(arrays[path]) for path in self.ours]
        return np.stack(parts) if self.stack else parts[0] if len(parts) == 1 else np.concatenate(parts)

    def load(self, y, shapes):
        """Yields `(path, array)` of ours; `y`: the array of theirs."""
        parts = y if self.stack else np.split(y, len(self.ours)) if len(self.ours) > 1 else [y]
        for path, part in zip(self.ours, parts, strict=True):
            yield path, self.op.load(part, tuple(shapes[path]))


def entry(theirs, ours, op=KEEP, **kwargs):
    """An `Entry`; `ours`: one path, or several."""
    return Entry(theirs, (ours,) if isinstance(ours, str) else tuple(ours), op, **kwargs)


def norm(theirs, ours):
    """Layer norm, or scale and bias of a batch norm."""
    return [entry(f"{theirs}.weight", f"{ours}/scale"), entry(f"{theirs}.bias", f"{ours}/bias")]


def batch_norm(theirs, ours):
    """Batch norm in PyTorch; `ours` without `params/`."""
    statistics = [entry(f"{theirs}.running_{name}", f"extra/batch_stats/{ours}/{name}") for name in ("mean", "var")]
    return [*norm(theirs, f"params/{ours}"), *statistics]


def linear(theirs, ours, op=LINEAR):
    """A linear layer of PyTorch."""
    return [entry(f"{theirs}.weight", f"{ours}/kernel", op), entry(f"{theirs}.bias", f"{ours}/bias", VECTOR)]


def fused(weight, bias, ours, names=("query", "key", "value")):
    """Projections of an attention that share a matrix."""
    return [
        entry(weight, [f"{ours}/{name}/kernel" for name in names], LINEAR),
        entry(bias, [f"{ours}/{name}/bias" for name in names], VECTOR),
    ]


def depth(ours, tower):
    """The number of blocks of a tower, `"params/img"`."""
    return len({m[1] for path in ours if (m := re.match(rf"{tower}/block_(\d+)/", path))})


def present(entries, ours):
    """Those of the entries whose arrays we have; what a model is without (a bias, a class token) is left out."""
    return [e for e in entries if all(path in ours for path in e.ours)]


def check(entries, theirs, ours, ignored=(), source="the file"):
    """Raises UserError, in one line, with everything that is missing, unexpected or of another shape.

    Args:
      entries: of a layout.
      theirs: `{name: something with a shape}`.
      ours: `{path: something with a shape}`.
      ignored: regular expressions of names of theirs that are no parameters.
      source: what the message calls them.
    """
    if rest := set(ours) - {path for e in entries for path in e.ours}:
        raise UserError(f"this layout has no place for {list_names(rest)}")
    shapes = {path: x.shape for path, x in ours.items()}
    expected = {e.theirs: e.shape(shapes) for e in entries}
    missing = expected.keys() - theirs.keys()
    unexpected = [name for name in theirs.keys() - expected.keys() if not any(re.fullmatch(p, name) for p in ignored)]
    both = expected.keys() & theirs.keys()
    misshapen = {
        n: f"{shape_text(theirs[n].shape)} for {shape_text(expected[n])}"
        for n in both
        if tuple(theirs[n].shape) != expected[n]
    }
    parts = [
        f"{len(names)} {what}: {list_names(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape: {list_names(misshapen)}")
    if parts:
        raise UserError(
            f"{source}: its tensors do not fit the model that its configuration describes; nothing was loaded. {'; '.join(parts)}"
        )


def shape_text(shape):
    return "x".join(map(str, shape)) or "scalar"


def list_names(names):
    """Names, or names with what is to be said of them, those alike but for a number together."""
    notes = {name: f" ({names[name]})" if isinstance(names, dict) else "" for name in names}
    groups = Counter()
    example = {}
    for name in sorted(names):
        key = re.sub(r"\d+", "N", name) + notes[name]
        groups[key] += 1
        example.setdefault(key, name + notes[name])
    return ", ".join(example[key] if n == 1 else f"{key} (x{n})" for key, n in groups.items())


def load(entries, theirs, ours):
    """`{path: jax.Array}`, read one after the other and each put where it belongs.

    Args:
      entries: of a layout; `check` found nothing.
      theirs: `{name: Tensor}` (readers.py).
      ours: `{path: jax.ShapeDtypeStruct with a sharding}`; float32 of float16 and bfloat16 is exact.
    """
    import jax

    shapes, found = {path: x.shape for path, x in ours.items()}, {}
    for e in entries:
        for path, x in e.load(theirs[e.theirs].read(), shapes):
            x = np.array(x, ours[path].dtype, order="C")  # a copy, so that nothing keeps the file mapped
            found[path] = jax.make_array_from_callback(x.shape, ours[path].sharding, x.__getitem__)
    return found


def save(entries, ours):
    """`{name: NumPy array}` in their layout of `{path: array}`; the reverse of `load`, bit for bit."""
    arrays = {path: np.asarray(x) for path, x in ours.items()}
    return {e.theirs: np.asarray(e.save(arrays), order="C") for e in entries}
