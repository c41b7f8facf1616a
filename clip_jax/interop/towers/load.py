"""Loads single towers, and resizes position embeddings."""

import math
import re

import numpy as np

from clip_jax.interop import layouts


def tower_shapes(config):
    """Returns `{path: ShapeDtypeStruct}` of the parameters and running statistics of a configuration without a method.

    Fills in all fields of the configuration's towers.
    """
    import jax

    from clip_jax.models import towers
    from clip_jax.runtime.sharding import path_name

    towers.fill(config.model)
    found = {}
    if "image" in config.model:
        size = config.model.image.size
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        found["img"] = jax.eval_shape(towers.image_tower(config.model).init, jax.eval_shape(jax.random.key, 0), image)
    if "text" in config.model:
        ids = jax.ShapeDtypeStruct((1, config.model.text.context), np.int32)
        found["txt"] = jax.eval_shape(towers.text_tower(config.model).init, jax.eval_shape(jax.random.key, 0), ids)
    statistics = {name: x["batch_stats"] for name, x in found.items() if "batch_stats" in x}
    tree = {"params": {name: x["params"] for name, x in found.items()}, "extra": {"batch_stats": statistics}}
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def checked(foreign):
    """Returns `(tower_shapes, entries of the layout)` of a `Foreign` tower.

    Raises UserError when the tensors contradict the configuration.
    """
    ours = tower_shapes(foreign.config)
    entries = foreign.entries(ours)
    layouts.check(entries, foreign.tensors, ours, foreign.ignored, str(foreign.file))
    return ours, entries


def tower_variables(foreign, size=0):
    """Returns the variables of a single tower, `{"params": ...}` and `{"batch_stats": ...}` where it has any.

    Args:
      foreign: the `Foreign` tower.
      size: pixels of a side, for which the position embeddings of a vision transformer are resized; 0: its own. It is
        set in `foreign.config`.

    Raises UserError when the tensors contradict the configuration, and for a size that the patch does not divide.
    """
    from flax import traverse_util

    from clip_jax.models.towers import image_tower

    config = foreign.config
    ours, entries = checked(foreign)
    shapes = {path: x.shape for path, x in ours.items()}
    loaded = (pair for e in entries for pair in e.load(foreign.tensors[e.theirs].read(), shapes))
    found = {path: np.array(x, np.float32) for path, x in loaded}
    image = config.model.get("image")
    if size and image.size != size and "params/img/pos" in found:
        image.size = size
        image_tower(config.model)
        found["params/img/pos"] = resize_positions(
            found["params/img/pos"], size // image.patch, int(image.cls_token), foreign.resize
        )
    # Without `extra/`, and without the name of the tower.
    flat = {re.sub(r"/(img|txt)/", "/", path.removeprefix("extra/"), count=1): x for path, x in found.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def resize_positions(pos, grid, first=0, how="antialias"):
    """Returns position embeddings for another grid, float32 `[1, first + grid * grid, D]`.

    Args:
      pos: the embeddings, float32 `[1, first + old * old, D]`, the grid row by row.
      grid: patches on a side.
      first: rows before the grid (the class token), which are kept.
      how: `antialias`: bicubic with antialiasing, as in open_clip and timm. `corners`: linear with aligned corners, as
        in big_vision. `torch`: PyTorch's bicubic without antialiasing, as in ViTModel and Dinov2Model. `dinov2`: the
        same with an offset of 0.1 to the scale, as in the released code of DINOv2 without registers.
    """
    old, width = math.isqrt(pos.shape[1] - first), pos.shape[2]
    x = np.asarray(pos[0, first:], np.float32).reshape(old, old, width)
    if grid == old:
        return np.asarray(pos, np.float32)
    if how == "antialias":
        import jax

        x = np.asarray(jax.image.resize(x, (grid, grid, width), "cubic", antialias=True))
    else:
        weights = (_linear if how == "corners" else _cubic)(old, grid, 0.1 if how == "dinov2" else 0.0)
        x = np.einsum("ai,bj,ijd->abd", weights, weights, x)
    return np.concatenate([pos[:, :first], x.reshape(1, grid * grid, width)], axis=1)


def _linear(old, grid, _):
    """Returns the weights `[grid, old]` of linear interpolation that keeps both ends."""
    at = np.arange(grid)[:, None] * ((old - 1) / max(grid - 1, 1))
    return np.maximum(0, 1 - np.abs(at - np.arange(old))).astype(np.float32)


def _cubic(old, grid, offset):
    """Returns the weights `[grid, old]` of PyTorch's bicubic interpolation (Keys 1981 with a = -0.75)."""
    at = (np.arange(grid) + 0.5) * (old / (grid + offset)) - 0.5
    low, a = np.floor(at).astype(int), -0.75
    weights = np.zeros((grid, old))
    for tap in range(-1, 3):
        d = np.abs(at - (low + tap))
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(grid), np.clip(low + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def resize_text_positions(pos, length):
    """Returns the position embeddings of a text tower for another length, float32 `[1, length, D]`.

    They are interpolated linearly, and the first and the last keep their values.

    Args:
      pos: the embeddings, float32 `[1, n, D]`.
      length: the new number of positions.
    """
    at = np.linspace(0, pos.shape[1] - 1, length)
    low = np.minimum(at.astype(int), max(pos.shape[1] - 2, 0))
    share = (at - low)[None, :, None].astype(np.float32)
    return pos[:, low] * (1 - share) + pos[:, np.minimum(low + 1, pos.shape[1] - 1)] * share
