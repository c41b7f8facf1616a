"""Reads third-party weight files as `{name: Tensor}`: safetensors, PyTorch's .pt and .bin, and NumPy's .npz.

At first only names, shapes and dtypes are read. `Tensor.read` maps its part of the file into memory; the mapping ends
with the array. So a model is never in memory twice. Code in a file is never run.
"""

import functools
import io
import json
import math
import mmap
import os
import pathlib
import pickle
import re
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from clip_jax.errors import UserError

# MAP_POPULATE, where the system has it, reads all pages at once: one page fault for each is slow.
_MAPPING = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
_BF16 = np.dtype(ml_dtypes.bfloat16)
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # the first bytes of files of PyTorch before version 1.6
_SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": _BF16, "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1",
    "BOOL": "?",
}  # fmt: skip
_TORCH = {
    "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": _BF16, "Long": "i8", "Int": "i4", "Short": "i2",
    "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip


# PyTorch's wrappers add these to the names of a state dict: DataParallel and DDP in front, torch.compile and the others
# in front of any module.
_WRAPPERS = re.compile(r"^module\.|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
      shape: its shape.
      dtype: its NumPy dtype.
      read: function without arguments that returns the array, read-only.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read(path):
    """Returns `{name: Tensor}` of a weight file, or of several files through their `*.index.json`.

    Names are without the prefixes of PyTorch's wrappers, `module.` and `_orig_mod.`.

    Raises UserError, in one line, for a file that is missing, cut off, damaged, of another format, or would run code.
    """
    path = pathlib.Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") < 2]
                tensors = _read_torch(path, archive, pickles[0]) if pickles else _read_npz(path, archive)
        elif start.startswith(_LEGACY):
            tensors = _read_legacy_torch(path)
        elif start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
            raise UserError(
                f"{path}: a pickle that PyTorch did not write; only tensors are read from pickles, code is never run"
            )
        else:
            tensors = _read_safetensors(path, start)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: the file is cut off or damaged ({error})") from None
    if not tensors:
        raise UserError(f"{path}: it has no tensor")
    return _unwrapped(path, tensors)


def _unwrapped(path, tensors):
    """Returns a dict whose names are without the prefixes of wrappers; raises UserError when two become equal."""
    names = {name: _unwrapped_name(name) for name in tensors}
    if double := [name for name, count in Counter(names.values()).items() if count > 1]:
        given = ", ".join(repr(name) for name in tensors if names[name] == double[0])
        raise UserError(f"{path}: {given} are one tensor without the prefixes of PyTorch's wrappers; keep one of them")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _unwrapped_name(name):
    while (short := _WRAPPERS.sub("", name)) != name:
        name = short
    return name


def _read_shards(index):
    try:
        where = json.loads(index.read_text())["weight_map"]
        where = _unwrapped(index, where)
        names = sorted(set(where.values()))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weight files ({type(error).__name__}: {error})") from None
    files = {name: index.parent / os.path.basename(name) for name in names}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise UserError(f"{index}: {len(missing)} of its {len(files)} weight files are missing: {', '.join(missing)}")
    shards = {name: read(file) for name, file in files.items()}
    if absent := [tensor for tensor, file in where.items() if tensor not in shards[file]]:
        raise UserError(
            f"{index}: {len(absent)} tensors are not in the files that the index names, {absent[0]!r} first"
        )
    return {tensor: shards[file][tensor] for tensor, file in where.items()}


def _mapped(path, dtype, offset, shape, strides=None):
    """Returns a view of the file, which is unmapped when the view is freed; `strides` are in bytes."""
    dtype = np.dtype(dtype)
    if 0 in shape:
        return np.zeros(shape, dtype)
    strides = strides or tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    length = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), offset - start + length, flags=_MAPPING, prot=mmap.PROT_READ, offset=start)
    return np.ndarray(shape, dtype, buffer, offset - start, strides)


def _tensor(path, dtype, offset, shape, strides=None):
    return Tensor(tuple(shape), np.dtype(dtype), functools.partial(_mapped, path, dtype, offset, tuple(shape), strides))


def _read_safetensors(path, start):
    """Reads the safetensors format: the length of the header (8 bytes), the header in JSON, the tensors."""
    size, length = os.path.getsize(path), int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > 100_000_000:
        raise UserError(f"{path}: neither a safetensors, PyTorch nor .npz file (it begins with {start[:8]!r})")
    if 8 + length > size:
        raise UserError(
            f"{path}: the file is cut off: its header alone takes {length:,} bytes, but the file has {size:,}"
        )
    try:
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        wrong = [
            name
            for name, (kind, shape, a, b) in entries.items()
            if min(a, *shape, 0) < 0 or b - a != np.dtype(_SAFETENSORS[kind]).itemsize * math.prod(shape)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its safetensors header is damaged ({type(error).__name__}: {error})") from None
    if wrong:
        raise UserError(f"{path}: its safetensors header is damaged (the size of {wrong[0]!r} does not fit its shape)")
    end = 8 + length + max((e[3] for e in entries.values()), default=0)
    if end > size:
        raise UserError(f"{path}: the file is cut off: it should have {end:,} bytes, but has {size:,}")
    return {
        name: _tensor(path, _SAFETENSORS[kind], 8 + length + a, shape) for name, (kind, shape, a, b) in entries.items()
    }


def _data_offset(path, info):
    """Returns the offset of the bytes of an uncompressed member of a zip file."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry {info.filename!r} at its offset")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_npz(path, archive):
    tensors = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            raise UserError(f"{path}: a zip file with {info.filename!r}, neither an .npz nor a PyTorch file")
        with archive.open(info) as member:
            shape, fortran, dtype, start = _npy_header(path, info.filename, member)
        name = info.filename.removesuffix(".npy")
        if dtype == np.dtype("V2"):  # NumPy stores bfloat16 so, as it has no name for it
            dtype = _BF16
        if info.compress_type == zipfile.ZIP_STORED:
            if start + dtype.itemsize * math.prod(shape) > info.file_size:
                raise UserError(f"{path}: the array {name!r} is cut off")
            strides = tuple(dtype.itemsize * math.prod(shape[:i]) for i in range(len(shape))) if fortran else None
            tensors[name] = _tensor(path, dtype, _data_offset(path, info) + start, shape, strides)
        else:
            tensors[name] = Tensor(shape, dtype, functools.partial(_inflate, path, info.filename, dtype))
    return tensors


def _npy_header(path, name, member):
    try:
        version = np.lib.format.read_magic(member)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran, dtype = read_header(member)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {name!r} is no NumPy array ({error})") from None
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds Python objects, which are not loaded because they could run code")
    return shape, fortran, dtype, member.tell()


def _inflate(path, name, dtype):
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False).view(dtype)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise UserError(f"{path}: {name!r} is damaged ({error})") from None


class _Storage:
    """A block of bytes in a PyTorch file: its offset, its dtype and its number of bytes."""

    def __init__(self, offset, dtype, size):
        self.offset, self.dtype = offset, dtype
        self.size = size


class _Object:
    """Replaces an object of a scripted module: keeps its attributes, has no behaviour."""

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Reads PyTorch's pickles. It accepts only the globals that make up tensors and refuses any other by name.

    `locate(key, dtype)` returns the `_Storage` of a key.
    """

    def __init__(self, file, path, locate):
        super().__init__(file, encoding="utf-8")
        self.path, self.locate = path, locate

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in _TORCH and name.endswith("Storage"):
            return np.dtype(_TORCH[name.removesuffix("Storage")])
        if module.split(".")[0] == "__torch__":
            return _Object
        if module == "torch.jit._pickle" and name in (
            "build_intlist",
            "build_boollist",
            "build_doublelist",
            "build_tensorlist",
        ):
            return lambda values: values
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        raise UserError(
            f"{self.path}: refused, because it asks for {module}.{name}: "
            "only tensors are read from pickles, code is never run"
        )

    def persistent_load(self, key):
        # In old files a sixth entry marks a part of another storage.
        if not (
            isinstance(key, tuple)
            and len(key) in (5, 6)
            and key[0] == "storage"
            and isinstance(key[1], np.dtype)
            and not any(key[5:])
        ):
            raise UserError(f"{self.path}: not a PyTorch file (its tensors have an unknown storage format)")
        return self.locate(key[2], key[1])

    def _rebuild_tensor(self, storage, offset, shape, strides, *_):
        item, shape = storage.dtype.itemsize, tuple(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and (min((offset, *strides), default=0) < 0 or (last + 1) * item > storage.size):
            raise UserError(f"{self.path}: the file is damaged: a tensor of shape {shape} exceeds its data")
        return _tensor(
            self.path, storage.dtype, storage.offset + offset * item, shape, tuple(stride * item for stride in strides)
        )


def _read_torch(path, archive, pickle_name):
    prefix = pickle_name.removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
        raise UserError(f"{path}: it was written on a machine with the opposite byte order")

    def locate(key, dtype):
        try:
            info = archive.getinfo(f"{prefix}data/{key}")
        except KeyError:
            raise UserError(f"{path}: the file is damaged: it has no data for the storage {key!r}") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: its tensors are compressed, but PyTorch never compresses them")
        return _Storage(_data_offset(path, info), dtype, info.file_size)

    return _state_dict(path, _unpickle(path, io.BytesIO(archive.read(pickle_name)), locate))


def _unpickle(path, file, locate=None):
    try:
        return _Unpickler(file, path, locate).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from None


def _read_legacy_torch(path):
    """Reads the format of PyTorch before version 1.6: five pickles, then the data of the storages.

    The fourth pickle is the state dict, the fifth lists the keys of the storages. The offsets of their data are known
    only then, so the state dict is read twice.
    """
    size = os.path.getsize(path)
    dtypes, storages = {}, {}

    def note(key, dtype):
        dtypes[key] = dtype
        return _Storage(0, dtype, math.inf)

    with open(path, "rb") as file:
        _, _, machine = (_unpickle(path, file) for _ in range(3))
        if not isinstance(machine, dict) or machine.get("little_endian") != (sys.byteorder == "little"):
            raise UserError(f"{path}: it was written on a machine with the opposite byte order")
        start = file.tell()
        _unpickle(path, file, note)
        keys, end = _unpickle(path, file), file.tell()
        if not isinstance(keys, list) or set(map(repr, keys)) != set(map(repr, dtypes)):
            raise UserError(f"{path}: the file is damaged: it lacks the data of some tensors")
        for key in keys:
            file.seek(end)
            storages[key] = _Storage(
                end + 8, dtypes[key], int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
            )
            end += 8 + storages[key].size
            if end > size:
                raise UserError(f"{path}: the file is cut off: it should have at least {end:,} bytes, but has {size:,}")
        file.seek(start)
        return _state_dict(path, _unpickle(path, file, lambda key, dtype: storages[key]))


def _state_dict(path, found):
    """Returns `{name: Tensor}` of the object in a PyTorch file."""
    if isinstance(found, _Object):
        return dict(_attributes(found))
    # Training checkpoints hold the optimizer's state next to the weights.
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{path}: it holds a {type(found).__name__} instead of a state dict")
    return {str(name): x for name, x in found.items() if isinstance(x, Tensor)}


def _attributes(module, prefix=""):
    """Yields the parameters and buffers of a scripted module by their names in its state dict."""
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Object):
            yield from _attributes(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value
