"""ImageNet's ResNet: its formula in float64, the names of torchvision and timm, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import initialise
from safetensors.numpy import save_file
from tower_helpers import random, read_params, resnet_tensors

from clip_jax import init_from
from clip_jax.errors import UserError
from clip_jax.interop import recognize
from clip_jax.models.towers import image_tower


def windows(x, size, stride, fill):
    """Returns the windows of `x[b, c, h, w]` after padding by `size // 2`, `[b, c, rows, cols, size, size]`."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))[:, :, ::stride, ::stride]


def resnet_by_hand(t, x):
    """The mean of the last feature map in NumPy, float64: He et al. 2016 with strides in the 3x3 convolutions."""
    t = {name: value.astype(np.float64) for name, value in t.items()}

    def conv(x, name, stride=1):
        kernel = t[f"{name}.weight"]
        return np.einsum("bchwij,ocij->bohw", windows(x, kernel.shape[2], stride, 0.0), kernel, optimize=True)

    def norm(x, name):
        scale, bias, mean, var = (
            t[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def relu(x):
        return np.maximum(x, 0)

    x = windows(relu(norm(conv(x, "conv1", 2), "bn1")), 3, 2, -np.inf).max((-1, -2))
    for name in sorted({key.rpartition(".conv1")[0] for key in t if ".conv1" in key}):
        stride = 2 if name.endswith(".0") and name != "layer1.0" else 1
        y = relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"))
        y = relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"))
        y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in t:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        x = relu(x + y)
    return x.mean((2, 3))


def test_a_resnet_is_its_formula(tmp_path):
    tensors = resnet_tensors(layers=(2, 1, 1, 1))
    save_file(tensors, tmp_path / "model.safetensors")
    colours = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50.a1_in1k", "pretrained_cfg": colours}))
    source = init_from._foreign(str(tmp_path))
    assert source.config.model.image_mean == (0.485, 0.456, 0.406)
    assert source.config.model.image.layers == (2, 1, 1, 1)
    found = read_params(source)
    variables = {"params": found["img"], "batch_stats": found["batch_stats"]["img"]}
    tower, images = image_tower(source.config.model), random(2, 64, 64, 3)
    embedding, tokens = jax.jit(tower.apply)(variables, jnp.asarray(images))
    wanted = resnet_by_hand(tensors, images.transpose(0, 3, 1, 2).astype(np.float64))
    assert 0.5 < np.ptp(wanted) < 100 and tokens.shape == (2, 4, 256)
    np.testing.assert_allclose(embedding, wanted, rtol=1e-4, atol=1e-5)


def test_the_projection_starts_as_a_linear_layer_of_pytorch():
    from clip_jax.models.resnet import PlainResNet

    tower = PlainResNet(size=32, embed_dim=64, layers=(1, 1, 1, 1), width=8)
    proj = initialise(tower.init, jnp.zeros((1, 32, 32, 3)))["params"]["proj"]
    for x in (proj["kernel"], proj["bias"]):
        assert 0.9 / 16 < np.abs(x).max() <= 1 / 16  # 1 / sqrt(8 * 32)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t | {"layer1.0.se.fc1.weight": random(4, 32, 1, 1)}, r"unexpected: layer1\.0\.se\.fc1\.weight"),
        (
            lambda t: t | {"layer1.0.conv2.weight": random(8, 1, 3, 3)},
            r"layer1\.0\.conv2\.weight \(8x1x3x3 for 8x8x3x3\)",
        ),
        (lambda t: {k: v for k, v in t.items() if "conv3" not in k}, "a ResNet of basic blocks is not supported"),
    ],
)
def test_another_resnet_is_refused_by_name(tmp_path, change, message):
    save_file(change(resnet_tensors()), tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=message):
        init_from._foreign(str(tmp_path / "resnet.safetensors"))


def test_an_architecture_with_the_same_names_is_refused(tmp_path):
    save_file(resnet_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnetblur50"}))
    with pytest.raises(UserError, match="architecture='resnetblur50' is not supported"):
        recognize.recognize(tmp_path)
