"""Layouts: the correspondence between third-party arrays and this package's parameters, in both directions.

Everywhere in `interop`, "ours" is this package's side and "theirs" is the third-party side. A layout is a function
`entries(ours, **options) -> [Entry, ...]`. It takes our paths, and returns one entry for each third-party array. The
same list serves to import (`load`), to export (`save`) and to report differences (`check`).

Our paths begin with `params/` or `extra/` (running statistics), such as `params/img/block_0/mlp/fc1/kernel`. Layers are
not stacked (`model.scan=False`); `clip_jax.models.transformer` converts.
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
    """The step from one of our arrays to a third-party array: a reshape, then a permutation of the axes.

    Attributes:
      reshape: function of our shape that returns the new shape.
      axes: the permutation, or None.
    """

    reshape: Callable = tuple
    axes: tuple[int, ...] | None = None

    def shape(self, ours):
        """Returns the third-party shape for our shape."""
        shape = tuple(self.reshape(ours))
        return tuple(shape[axis] for axis in self.axes) if self.axes else shape

    def save(self, x):
        """Returns the third-party array for our array."""
        x = x.reshape(self.reshape(x.shape))
        return x.transpose(self.axes) if self.axes else x

    def load(self, y, shape):
        """Returns our array, of shape `shape`, for the third-party array."""
        return (y.transpose(np.argsort(self.axes)) if self.axes else y).reshape(shape)


@dataclass(frozen=True)
class WithoutFirst(Op):
    """Position embeddings `[1, 1 + n, D]` of which the third-party array has the last n.

    The class token has no position embedding there.
    """

    def shape(self, ours):
        return (ours[0], ours[1] - 1, ours[2])

    def save(self, x):
        if np.any(x[:, 0]):
            raise UserError("the class token has a position embedding, which this layout cannot hold")
        return x[:, 1:]

    def load(self, y, shape):
        return np.concatenate([np.zeros((shape[0], 1, shape[2]), y.dtype), y], axis=1)


KEEP = Op()
VECTOR = Op(lambda s: (math.prod(s),))  # bias [heads, Dh], class token [1, 1, D], scalar as [1]
TABLE = Op(lambda s: s[1:])  # position embeddings [1, n, D]
LINEAR = Op(lambda s: (s[0], math.prod(s[1:])), (1, 0))  # kernel [in, out] or [in, heads, Dh]
LINEAR_OUT = Op(lambda s: (math.prod(s[:-1]), s[-1]), (1, 0))  # kernel [heads, Dh, out]
CONV = Op(axes=(3, 2, 0, 1))  # [height, width, in, out] -> [out, in, height, width]


@dataclass(frozen=True)
class Entry:
    """A third-party array and our arrays in it: one, or several of equal shape.

    Attributes:
      theirs: its name.
      ours: our paths.
      op: the step from each of our arrays.
      stack: True: our arrays lie along a new leading axis (stacked layers). False: they are concatenated along the
        first axis (fused projections).
    """

    theirs: str
    ours: tuple[str, ...]
    op: Op = KEEP
    stack: bool = False

    def shape(self, shapes):
        """Returns the third-party shape; `shapes` has our shapes by path."""
        part = self.op.shape(tuple(shapes[self.ours[0]]))
        if self.stack:
            return (len(self.ours), *part)
        return part if len(self.ours) == 1 else (len(self.ours) * part[0], *part[1:])

    def save(self, arrays):
        """Returns the third-party array; `arrays` has our NumPy arrays by path."""
        parts = [self.op.save(arrays[path]) for path in self.ours]
        return np.stack(parts) if self.stack else parts[0] if len(parts) == 1 else np.concatenate(parts)

    def load(self, y, shapes):
        """Yields our `(path, array)` for the third-party array `y`; `shapes` has our shapes by path."""
        parts = y if self.stack else np.split(y, len(self.ours)) if len(self.ours) > 1 else [y]
        for path, part in zip(self.ours, parts, strict=True):
            yield path, self.op.load(part, tuple(shapes[path]))


def entry(theirs, ours, op=KEEP, **kwargs):
    """Returns an `Entry`; `ours` is one path or several."""
    return Entry(theirs, (ours,) if isinstance(ours, str) else tuple(ours), op, **kwargs)


def norm(theirs, ours):
    """Returns the entries of a layer norm, or of a batch norm's scale and bias."""
    return [entry(f"{theirs}.weight", f"{ours}/scale"), entry(f"{theirs}.bias", f"{ours}/bias")]


def batch_norm(theirs, ours):
    """Returns the entries of a PyTorch batch norm; `ours` lacks the prefix `params/`."""
    statistics = [entry(f"{theirs}.running_{name}", f"extra/batch_stats/{ours}/{name}") for name in ("mean", "var")]
    return [*norm(theirs, f"params/{ours}"), *statistics]


def linear(theirs, ours, op=LINEAR):
    """Returns the entries of a PyTorch linear layer."""
    return [entry(f"{theirs}.weight", f"{ours}/kernel", op), entry(f"{theirs}.bias", f"{ours}/bias", VECTOR)]


def fused(weight, bias, ours, names=("query", "key", "value")):
    """Returns the entries of attention projections that share one matrix."""
    return [
        entry(weight, [f"{ours}/{name}/kernel" for name in names], LINEAR),
        entry(bias, [f"{ours}/{name}/bias" for name in names], VECTOR),
    ]


def depth(ours, tower):
    """Returns the number of blocks of a tower, such as `params/img`."""
    return len({m[1] for path in ours if (m := re.match(rf"{tower}/block_(\d+)/", path))})


def present(entries, ours):
    """Returns the entries whose paths are all in `ours`; a model may lack parts, such as a bias or a class token."""
    return [e for e in entries if all(path in ours for path in e.ours)]


def check(entries, theirs, ours, ignored=(), source="the file"):
    """Raises UserError, in one line, which lists all missing and unexpected arrays and all wrong shapes.

    A scalar, such as the logit scale, may have the shape [1].

    Args:
      entries: of a layout.
      theirs: `{name: object with a shape}`.
      ours: `{path: object with a shape}`.
      ignored: regular expressions of third-party names that are no parameters.
      source: the name of the third-party side in the message.
    """
    if rest := set(ours) - {path for e in entries for path in e.ours}:
        raise UserError(f"this layout cannot hold {list_names(rest)}")
    shapes = {path: x.shape for path, x in ours.items()}
    expected = {e.theirs: e.shape(shapes) for e in entries}
    missing = expected.keys() - theirs.keys()
    unexpected = [name for name in theirs.keys() - expected.keys() if not any(re.fullmatch(p, name) for p in ignored)]
    both = expected.keys() & theirs.keys()
    misshapen = {
        n: f"{shape_text(theirs[n].shape)} for {shape_text(expected[n])}"
        for n in both
        if not _fits(tuple(theirs[n].shape), expected[n])
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
            f"{source}: its tensors contradict the model of its configuration; nothing was loaded. {'; '.join(parts)}"
        )


def _fits(shape, expected):
    """Whether an array has the expected shape. A scalar may have the shape [1], and the other way round."""
    return shape == expected or {shape, expected} == {(), (1,)}


def shape_text(shape):
    """Returns a shape as text, "2x3"."""
    return "x".join(map(str, shape)) or "scalar"


def list_names(names):
    """Returns names, joined by commas; names that differ only in numbers are one item with their count.

    Args:
      names: names, or `{name: note}`; the note stands in parentheses.
    """
    notes = {name: f" ({names[name]})" if isinstance(names, dict) else "" for name in names}
    groups, example = Counter(), {}
    for name in sorted(names):
        key = re.sub(r"\d+", "N", name) + notes[name]
        groups[key] += 1
        example.setdefault(key, name + notes[name])
    return ", ".join(example[key] if n == 1 else f"{key} (x{n})" for key, n in groups.items())


def load(entries, theirs, ours):
    """Returns `{path: jax.Array}`; reads one array at a time and places it by its sharding.

    Args:
      entries: of a layout, after `check`.
      theirs: `{name: Tensor}` (weight_files.py).
      ours: `{path: jax.ShapeDtypeStruct with a sharding}`; float16 and bfloat16 are exact in float32.
    """
    import jax

    shapes, found = {path: x.shape for path, x in ours.items()}, {}
    for e in entries:
        for path, x in e.load(theirs[e.theirs].read(), shapes):
            x = np.array(x, ours[path].dtype, order="C")  # a copy, which releases the mapped file
            found[path] = jax.make_array_from_callback(x.shape, ours[path].sharding, x.__getitem__)
    return found


def save(entries, ours):
    """Returns `{name: NumPy array}` for `{path: array}`: the inverse of `load`, bit for bit."""
    arrays = {path: np.asarray(x) for path, x in ours.items()}
    return {e.theirs: np.asarray(e.save(arrays), order="C") for e in entries}
