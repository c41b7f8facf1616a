"""Third-party weight files: the values of every format, and one-line errors for invalid and malicious files.

PyTorch 2.13 wrote the fixtures:

    torch_script.pt      a scripted module (torch.jit.save), float16
    torch_training.pt    a training checkpoint (torch.save): a state dict whose names begin with "module.", with
    views, and
                         an optimizer's state
    torch_legacy.pt      views in the format of PyTorch before version 1.6
"""

import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import FIXTURES
from safetensors.numpy import save_file

from clip_jax.errors import UserError
from clip_jax.weight_files import read

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(5, dtype=np.float16) / 3,
    "brain": (np.arange(5) / 3).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "count": np.arange(3),
    "empty": np.zeros((0, 4), np.float32),
}


def assert_same(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    for name, expected in arrays.items():
        found = tensors[name].read()
        assert (
            tensors[name].shape == found.shape == expected.shape
            and tensors[name].dtype == found.dtype == expected.dtype
        )
        np.testing.assert_array_equal(found, expected)


def safetensors_file(folder, arrays=ARRAYS, name="model.safetensors"):
    save_file(arrays, folder / name, metadata={"format": "pt"})
    return folder / name


def test_safetensors(tmp_path):
    assert_same(read(safetensors_file(tmp_path)), ARRAYS)


def test_a_tensor_is_a_view_of_the_file_until_it_is_freed(tmp_path):
    big = {f"w{i}": np.full(2**20, i, np.float32) for i in range(3)}
    tensors = read(safetensors_file(tmp_path, big))
    x = tensors["w1"].read()
    assert not x.flags.owndata and not x.flags.writeable and mapped(tmp_path) == 1
    del x
    assert mapped(tmp_path) == 0, "only names are read at first, and a freed tensor is unmapped"


def mapped(folder):
    return sum(str(folder) in line for line in open("/proc/self/maps"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_npz_with_bfloat16_as_numpy_stores_it(tmp_path, save):
    arrays = ARRAYS | {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "params/x/kernel": np.ones((2, 2), np.float32),
    }
    save(tmp_path / "x.npz", **arrays)
    assert np.load(tmp_path / "x.npz")["brain"].dtype == np.dtype("V2"), "NumPy has no name for bfloat16"
    assert_same(read(tmp_path / "x.npz"), arrays)


def test_a_training_checkpoint_of_pytorch():
    tensors = read(FIXTURES / "torch_training.pt")
    assert {"logit_scale", "visual.lin.weight", "resblocks.1.lin.bias"} < tensors.keys() and len(tensors) == 15, (
        "no optimizer state"
    )
    np.testing.assert_array_equal(tensors["logit_scale"].read(), np.float32(2.5))
    np.testing.assert_array_equal(tensors["resblocks.0.lin.weight"].read(), np.arange(10.0, 16.0).reshape(2, 3))
    np.testing.assert_array_equal(tensors["transposed"].read(), np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(tensors["part"].read(), np.arange(12.0).reshape(3, 4)[1:, 1:3])
    np.testing.assert_array_equal(tensors["shared"].read(), np.ones(2))
    assert tensors["brain"].dtype == ml_dtypes.bfloat16 and tensors["brain"].read().tolist() == [0, 1, 2]
    assert tensors["input_resolution"].read() == 224


def test_a_scripted_module_of_pytorch():
    tensors = read(FIXTURES / "torch_script.pt")
    assert tensors["visual.lin.weight"].dtype == np.float16
    np.testing.assert_array_equal(tensors["resblocks.1.lin.weight"].read(), np.arange(20.0, 26.0).reshape(2, 3))
    np.testing.assert_array_equal(tensors["logit_scale"].read(), np.float16(2.5))


def test_a_file_of_pytorch_before_version_1_6():
    x, tensors = np.arange(24, dtype=np.float32).reshape(2, 3, 4), read(FIXTURES / "torch_legacy.pt")
    few = {
        "half": np.arange(3, dtype=np.float16),
        "count": np.array(7),
        "brain": np.arange(3).astype(ml_dtypes.bfloat16),
    }
    assert_same(tensors, {"whole": x, "transposed": x.T, "part": x[1:, 1:, ::2], **few})


def shards(folder):
    safetensors_file(folder, {"a": ARRAYS["a"]}, "model-00001-of-00002.safetensors")
    safetensors_file(folder, {"half": ARRAYS["half"]}, "model-00002-of-00002.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "half": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / "model.safetensors.index.json"


def test_shards(tmp_path):
    assert_same(read(shards(tmp_path)), {name: ARRAYS[name] for name in ("a", "half")})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_are_without_the_prefixes_of_wrappers(tmp_path, prefix):
    arrays = {"visual.proj": ARRAYS["a"], "text.module.weight": ARRAYS["half"]}
    assert_same(read(safetensors_file(tmp_path, {prefix + name: x for name, x in arrays.items()})), arrays)
    np.savez(tmp_path / "x.npz", **{f"visual.{prefix}proj".replace("module.", ""): ARRAYS["a"]})
    assert_same(read(tmp_path / "x.npz"), {"visual.proj": ARRAYS["a"]})


def test_names_of_shards_are_without_prefixes(tmp_path):
    safetensors_file(tmp_path, {"_orig_mod.a": ARRAYS["a"]}, "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"_orig_mod.a": "one.safetensors"}}))
    assert_same(read(index), {"a": ARRAYS["a"]})


def test_a_tensor_with_and_without_a_prefix_is_ambiguous(tmp_path):
    path = safetensors_file(tmp_path, {"module.w": ARRAYS["a"], "w": ARRAYS["half"]})
    with pytest.raises(UserError, match="'module.w', 'w' are one tensor|'w', 'module.w' are one tensor"):
        read(path)


def test_shards_that_are_missing_or_contradict_the_index(tmp_path):
    index = shards(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 tensors are not in the files that the index names, 'b' first"):
        read(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of its 2 weight files are missing: model-00002-of-00002.safetensors"):
        read(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        read(index)


def torch_file(path, content, storages=(), compression=zipfile.ZIP_STORED):
    """Writes a file in the form of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in storages:
            archive.writestr(f"archive/data/{name}", data)
    return path


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["state_dict.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("where", ["as the file", "inside a state dict", "in a build"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, name, where):
    mark = tmp_path / "it ran"
    evil = Evil(os.system, f"touch '{mark}'")
    content = {
        "as the file": evil,
        "inside a state dict": {"visual.proj": evil},
        "in a build": {"x": Evil(eval, f"open({str(mark)!r}, 'w')")},
    }
    path = torch_file(tmp_path / name, pickle.dumps(content[where], protocol=2))
    with pytest.raises(
        UserError,
        match=r"refused, because it asks for (posix\.system|__builtin__\.eval|builtins\.eval): .* code is never run",
    ):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("attack", ["getattr", "names that look like torch's", "a call of an allowed name"])
def test_allowed_names_lead_nowhere_else(tmp_path, attack):
    # Hand-written opcodes of pickle: c = global, ( = mark, t = tuple, R = call, . = end.
    content = {
        "getattr": b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nV__class__\ntR.",
        "names that look like torch's": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        "a call of an allowed name": b"c__torch__.os\nsystem\n(Vtouch x\ntR.",
    }[attack]
    with pytest.raises(UserError, match="refused|damaged"):
        read(torch_file(tmp_path / "x.pt", content))


def rebuild(storage_bytes, offset, shape, strides):
    """Returns the pickle of `{"w": tensor}` as PyTorch writes it."""
    out = io.BytesIO()
    out.write(
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    )
    out.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ")
    out.write(pickle.dumps(offset, 2)[2:-1] + pickle.dumps(shape, 2)[2:-1] + pickle.dumps(strides, 2)[2:-1])
    out.write(b"\x89ccollections\nOrderedDict\n)RtRs.")
    return out.getvalue()


def test_a_tensor_that_exceeds_its_data_is_refused(tmp_path):
    data = [("0", np.arange(4, dtype=np.float32).tobytes())]
    good = read(torch_file(tmp_path / "a.pt", rebuild(16, 1, (3,), (1,)), data))["w"].read()
    np.testing.assert_array_equal(good, [1, 2, 3])
    for offset, shape, strides in ((2, (3,), (1,)), (0, (3,), (2,)), (0, (2, 2), (-1, 1)), (0, (10**6, 10**6), (1, 1))):
        with pytest.raises(UserError, match="exceeds its data"):
            read(torch_file(tmp_path / "a.pt", rebuild(16, offset, shape, strides), data))
    with pytest.raises(UserError, match="no data for the storage '0'"):
        read(torch_file(tmp_path / "a.pt", rebuild(16, 0, (3,), (1,))))
    with pytest.raises(UserError, match="compressed"):
        read(torch_file(tmp_path / "a.pt", rebuild(16, 0, (3,), (1,)), data, zipfile.ZIP_DEFLATED))


def legacy_file(path, content, keys=("0",), counts=(4,), data=b"\0\0\x80\x3f" * 4, little=True):
    """Writes a file of PyTorch before version 1.6 around any pickle of a state dict."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": little}]
    with open(path, "wb") as file:
        file.write(b"".join(pickle.dumps(part, 2) for part in parts) + content + pickle.dumps(list(keys), 2))
        file.write(b"".join(count.to_bytes(8, "little") for count in counts) + data)
    return path


def test_old_pytorch_files_that_are_damaged_or_would_run_code(tmp_path):
    path, good = tmp_path / "a.pt", rebuild(16, 1, (3,), (1,))
    np.testing.assert_array_equal(read(legacy_file(path, good))["w"].read(), [1, 1, 1])
    for content, fields, message in [
        (rebuild(16, 2, (3,), (1,)), {}, "exceeds its data"),
        (good, {"keys": ("1",)}, "it lacks the data of some tensors"),
        (good, {"keys": ("0", ["x"])}, "it lacks the data of some tensors"),
        (good, {"counts": (2**62,)}, "the file is cut off: it should have"),
        (good, {"data": b"1234"}, "the file is cut off: it should have"),
        (good, {"little": False}, "the opposite byte order"),
        (good[:-9], {"keys": ()}, "damaged"),
        (
            pickle.dumps({"w": Evil(os.system, f"touch '{tmp_path}/it ran'")}, 2),
            {},
            "refused, because it asks for posix.system",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            read(legacy_file(path, content, **fields))
    assert not (tmp_path / "it ran").exists()


def npz_with_objects(path):
    np.savez(path, x=np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "neither a safetensors"),
        (b"GIF89a.....................", "neither a safetensors.*it begins with b'GIF89a"),
        (b"<!DOCTYPE html><html>Not Found", "neither a safetensors"),
        (
            (10**6).to_bytes(8, "little") + b'{"a": ',
            "the file is cut off: its header alone takes 1,000,000 bytes, but the file has 14",
        ),
        ((6).to_bytes(8, "little") + b'{"a": ', "header is damaged"),
        ((2).to_bytes(8, "little") + b"{}", "it has no tensor"),
        (pickle.dumps({"a": 1}), "a pickle that PyTorch did not write"),
        (b"PK\x03\x04 and nothing more", "cut off or damaged"),
    ],
)
def test_files_of_another_format(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_truncated_files(tmp_path):
    path = safetensors_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="the file is cut off: it should have"):
        read(path)
    for name in ("torch_training.pt", "torch_script.pt"):
        (tmp_path / name).write_bytes((FIXTURES / name).read_bytes()[:-500])
        with pytest.raises(UserError, match="cut off or damaged"):
            read(tmp_path / name)
    np.savez(tmp_path / "x.npz", **ARRAYS)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:900])
    with pytest.raises(UserError, match="cut off or damaged"):
        read(tmp_path / "x.npz")


def test_headers_that_contradict_the_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="the size of 'a' does not fit its shape"):
        read(tmp_path / "a.safetensors")
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="F8_E4M3"):
        read(tmp_path / "a.safetensors")


def test_python_objects_in_npz_are_refused(tmp_path):
    npz_with_objects(tmp_path / "x.npz")
    with pytest.raises(UserError, match="'x.npy' holds Python objects"):
        read(tmp_path / "x.npz")


def test_missing_files_and_other_archives(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.safetensors")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="neither an .npz nor a PyTorch file"):
        read(tmp_path / "x.zip")
