"""The device mesh and the sharding of state and batches.

There is one mesh with the axes `data`, `fsdp` and `tensor`. A batch is split over `data` and `fsdp` together. One list
of rules names the mesh axis of each dimension of a parameter. The paths of optimizer state and moving averages end with
the parameter's path, so the same rules hold for them.
"""

import collections
import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.errors import UserError
from clip_jax.models.common import BATCH_AXES
from clip_jax.models.transformer import STACKED
from clip_jax.runtime import hosts

AXES = ("data", "fsdp", "tensor")

#: (regular expression, mesh axis of each dimension). The first rule that matches the path and the rank counts.
RULES = (
    (r"/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"/(query|key|value)/bias$", ("tensor", None)),
    (r"/(attn|pool)/out/kernel$", ("tensor", None, "fsdp")),
    (r"/fc1/kernel$", ("fsdp", "tensor")),
    (r"/fc1/bias$", ("tensor",)),
    (r"/fc2/kernel$", ("tensor", "fsdp")),
    (r"/embed/embedding$", ("tensor", "fsdp")),
    (r"/kernel$", ("fsdp", None)),
    (r"/kernel$", (None, None, None, "fsdp")),  # patch embeddings and convolutions
)


def mesh_shape(sizes, count):
    """Returns the sizes of the mesh axes on `count` devices, in the order of `AXES`.

    Args:
      sizes: such as `{"data": -1, "fsdp": 1, "tensor": 1}`. One size may be -1: that axis takes all remaining devices.
      count: the number of devices.

    Raises UserError when the product of the sizes is not the number of devices.
    """
    shape = [sizes[axis] for axis in AXES]
    given = _given(shape)
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"mesh {given}: each size must be at least 1, and at most one may be -1")
    known = int(np.prod([n for n in shape if n != -1]))
    if count % known or (-1 not in shape and known != count):
        raise UserError(f"mesh {given} does not fit {count} device(s)")
    return tuple(count // known if n == -1 else n for n in shape)


def make_mesh(sizes, devices=None):
    """Returns the mesh of `mesh_shape` over all devices, or over `devices`, which may describe absent devices.

    Raises UserError when the mesh does not fit the devices, the hosts or the slices.
    """
    devices = devices or hosts.devices()
    shape, axis_types = mesh_shape(sizes, len(devices)), (AxisType.Auto,) * len(AXES)
    mesh = Mesh(arrange(shape, devices), AXES, axis_types=axis_types)
    processes = len({device.process_index for device in devices})
    if processes > 1 and not _in_order(mesh):
        # In the order that suits the network best, a host's rows would not be contiguous in the batch.
        devices = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
        mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=axis_types)
        if not _in_order(mesh):
            raise UserError(
                f"mesh {_given(shape)} does not fit {len(devices) // processes} device(s) on each of {processes} hosts"
            )
    return mesh


def arrange(shape, devices):
    """Returns the devices as an array of a mesh's `shape`, in which neighbours are neighbours in the network.

    The network is slow between slices: TPU slices, or groups of GPUs that NVLink joins. They lie side by side along
    `data`, and along `fsdp` where `data` is too small. Raises UserError when that is impossible or the slices differ in
    size.
    """
    slices = collections.Counter(map(_slice, devices))
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between, left = [], len(slices)
    for size in shape[:2]:
        between.append(math.gcd(size, left))
        left //= between[-1]
    if left > 1 or len(set(slices.values())) > 1:
        sizes = ", ".join(map(str, sorted(set(slices.values()))))
        problem = f"mesh {_given(shape)} does not fit {len(slices)} slices of {sizes} devices"
        raise UserError(f"{problem}: each slice must be a part of data or fsdp")
    within = [size // count for size, count in zip(shape, (*between, 1), strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, (*between, 1), devices, allow_split_physical_axes=True)


def _slice(device):
    return getattr(device, "slice_index", 0)  # CPUs have none


def _given(shape):
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def _parts_by_host(mesh):
    """The parts of a batch on each process, `{process: [part, ...]}`."""
    parts = collections.defaultdict(set)
    for part, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            parts[device.process_index].add(part)
    return {process: sorted(part) for process, part in sorted(parts.items())}


def _in_order(mesh):
    """Whether the processes, in order, have equal contiguous shares of a batch.

    A tensor-parallel group has one share.
    """
    shares = sorted(set(map(tuple, _parts_by_host(mesh).values())))
    together = [part for share in shares for part in share]
    return together == list(range(len(together))) and len(set(map(len, shares))) == 1


@functools.cache
def process_shard(mesh):
    """Returns `(index, count)`: the hosts read a batch in `count` equal shares; this one reads share `index`."""
    parts = _parts_by_host(mesh)
    shares = sorted(set(map(tuple, parts.values())))
    return shares.index(tuple(parts[jax.process_index()])), len(shares)


def path_name(path):
    """Returns the name of a path in a pytree, such as `"img/block_0/attn/query/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _size(mesh, axes):
    """The number of parts into which one axis, or several together, split a dimension."""
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def _spec(path, shape, mesh, rules):
    for pattern, axes in rules:
        if re.search(STACKED, path):
            axes = (None, *axes)
        if re.search(pattern, path) and len(axes) == len(shape):
            # A dimension that an axis does not divide is not split, so that no sharding rule forbids a model.
            return PartitionSpec(
                *(axis if axis and n % _size(mesh, axis) == 0 else None for axis, n in zip(axes, shape, strict=True))
            )
    return PartitionSpec()


def state_shardings(tree, mesh, rules=()):
    """Returns the `NamedSharding` of every leaf of a pytree of arrays or shapes.

    Args:
      tree: the pytree. Each leaf has a `shape`.
      mesh: the mesh.
      rules: rules that come before `RULES`, in the same form (`Method.sharding_rules`).

    A leaf that no rule matches is replicated on every device.
    """

    def layout(path, x):
        return NamedSharding(mesh, _spec("/" + path_name(path), x.shape, mesh, (*rules, *RULES)))

    return jax.tree_util.tree_map_with_path(layout, tree)


def with_shardings(tree, shardings):
    """Returns a pytree of `jax.ShapeDtypeStruct` with the shapes and dtypes of `tree` and these shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def place(tree, shardings):
    """Returns a pytree of arrays with these shardings. NumPy arrays must be equal on every host."""

    def put(x, layout):
        if isinstance(x, jax.Array):
            return x if x.sharding == layout else jax.device_put(x, layout)
        return jax.make_array_from_callback(np.shape(x), layout, np.asarray(x).__getitem__)

    return jax.tree.map(put, tree, shardings)


def batch_sharding(mesh):
    """Returns the sharding of arrays `[B, ...]`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size, mesh, field="data.batch_size", micro_batches=1):
    """Raises UserError unless the devices that share a batch divide each of its micro-batches."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * micro_batches):
        times = f" times micro_batches={micro_batches}" if micro_batches > 1 else ""
        raise UserError(
            f"{field}={batch_size} is not divisible by the {parts} devices that share a batch (mesh data x fsdp){times}"
        )


def id_words(ids):
    """Returns int64 ids `[b]` as uint32 `[b, 2]`, the low and the high half; JAX has no integers of 64 bits."""
    return np.ascontiguousarray(ids, "<i8").view("<u4").reshape(-1, 2)


def to_global(batch, mesh):
    """Returns the global arrays `[B, ...]` on the mesh; int64 `example_id` `[b]` becomes uint32 `[B, 2]` (`id_words`).

    Args:
      batch: this host's share of the rows, `{name: ndarray [b, ...]}`.
      mesh: the mesh.
    """
    if "example_id" in batch and batch["example_id"].dtype == np.int64:
        batch = batch | {"example_id": id_words(batch["example_id"])}
    sharding, (_, count) = batch_sharding(mesh), process_shard(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (len(x) * count, *x.shape[1:]))
        for name, x in batch.items()
    }
