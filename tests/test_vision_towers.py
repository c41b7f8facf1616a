"""Vision transformers of timm, DINO, DINOv2 and Hugging Face: their formula in float64, names, heads, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_helpers import (
    SMALL,
    google_tensors,
    hf_vit_tensors,
    random,
    read_params,
    timm_tensors,
    vit_by_hand,
    write_tower,
)

from clip_jax import init_from
from clip_jax.errors import UserError
from clip_jax.interop import recognize
from clip_jax.interop.towers import configs
from clip_jax.interop.towers.load import resize_positions, tower_variables
from clip_jax.models.towers import image_tower


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "kind", [{}, dict(scale=True), dict(scale=True, registers=3), dict(registers=2, cls_position=False)]
)
def test_a_vision_transformer_is_its_formula(tmp_path, kind):
    tensors, images = timm_tensors(**kind), random(2, 16, 16, 3)
    foreign = recognize.recognize(write_tower(tmp_path / "timm", tensors))
    image = foreign.config.model.image
    assert (image.heads, image.registers) == (4, kind.get("registers", 0))
    variables, tower = tower_variables(foreign), image_tower(foreign.config.model)
    embedding, tokens = jax.jit(tower.apply)(variables, jnp.asarray(images))
    wanted = vit_by_hand(tensors, images.astype(np.float64), 4)
    assert np.ptp(wanted) > 0.5 and tokens.shape == (2, 5, 64)
    np.testing.assert_allclose(embedding, wanted, rtol=1e-4, atol=1e-5)
    only, none = image_tower(foreign.config.model, tokens=False).apply(variables, jnp.asarray(images))
    assert none is None
    np.testing.assert_allclose(only, embedding, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_has_one_set_of_weights_under_three_names(tmp_path, registers):
    tensors = timm_tensors(scale=True, registers=registers)
    timm = tower_variables(recognize.recognize(write_tower(tmp_path / "timm", tensors)))
    released = {name.replace("reg_token", "register_tokens"): x for name, x in tensors.items() if "head" not in name}
    released["mask_token"] = random(1, 64)
    foreign = recognize.recognize(write_tower(tmp_path / "released", released))
    assert (foreign.kind, foreign.resize) == ("DINOv2", "antialias" if registers else "dinov2")
    same(tower_variables(foreign), timm)
    cfg = dict(model_type="dinov2", hidden_act="gelu", num_attention_heads=4, layer_norm_eps=1e-6, qkv_bias=True)
    hf = {f"dinov2.{name}": x for name, x in hf_vit_tensors(tensors, dino=True).items()}
    foreign = recognize.recognize(write_tower(tmp_path / "hf", hf, cfg))
    assert (foreign.kind, foreign.resize) == ("Hugging Face Dinov2Model", "antialias" if registers else "torch")
    same(tower_variables(foreign), timm)
    assert foreign.config.model.image.layer_scale == 1e-5


def test_vit_model_of_hugging_face_is_the_vit_of_timm(tmp_path):
    tensors = timm_tensors()
    timm = tower_variables(recognize.recognize(write_tower(tmp_path / "timm", tensors)))
    cfg = dict(model_type="vit", hidden_act="gelu", num_attention_heads=4, layer_norm_eps=1e-12)
    foreign = recognize.recognize(write_tower(tmp_path / "hf", hf_vit_tensors(tensors, dino=False), cfg))
    same(tower_variables(foreign), timm)
    assert foreign.config.model.image.ln_eps == 1e-12
    wrong = write_tower(tmp_path / "wrong", hf_vit_tensors(tensors, dino=False), cfg | {"qkv_bias": False})
    with pytest.raises(UserError, match="qkv_bias=False is not supported"):
        recognize.recognize(wrong)


def test_heads_come_from_the_configuration_or_the_published_sizes(tmp_path):
    def shapes(width, mlp):
        return {name: np.zeros(x.shape) for name, x in timm_tensors(width, mlp=mlp, depth=1, grid=1).items()}

    for width, mlp, heads in ((192, 768, 3), (384, 1536, 6), (1280, 5120, 16)):
        assert configs.timm_vit(shapes(width, mlp), {}).model.image.heads == heads
    assert configs.timm_vit(shapes(192, 768), {"model_args": {"num_heads": 2}}).model.image.heads == 2
    with pytest.raises(
        UserError, match="heads of a vision transformer of width 64 with an MLP of 96 is unknown: .*model_args"
    ):
        configs.timm_vit(shapes(64, 96), {})
    assert configs.timm_vit(shapes(64, 96), {}, heads=2).model.image.heads == 2
    with pytest.raises(UserError, match="--heads=2 contradicts config.json"):
        configs.timm_vit(shapes(64, 96), SMALL, heads=2)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tensors = timm_tensors()
    for name, x in (("blocks.1.attn.q_norm.weight", random(16)), ("dist_token", random(1, 1, 64))):
        path = write_tower(tmp_path / name, tensors | {name: x})
        with pytest.raises(UserError, match=f"1 unexpected: {name}"):
            init_from._foreign(str(path))
    gated = {name.replace("mlp.fc", "mlp.w"): x for name, x in tensors.items()}
    with pytest.raises(UserError, match="without blocks.0.mlp.fc1 is not supported"):
        recognize.recognize(write_tower(tmp_path / "gated", gated))


def test_the_hidden_layer_of_an_old_classification_head_is_left_out(tmp_path):
    arrays = google_tensors(head=10)
    np.savez(tmp_path / "plain.npz", **arrays)
    assert "proj" in read_params(init_from._foreign(str(tmp_path / "plain.npz")))["img"]
    hidden = {"pre_logits/kernel": random(32, 32), "pre_logits/bias": random(32)}
    np.savez(tmp_path / "hidden.npz", **arrays, **hidden)
    foreign = recognize.recognize(tmp_path / "hidden.npz")
    assert foreign.notes == ["the classification head with its hidden layer (pre_logits) is left out"]
    found = read_params(init_from._foreign(str(tmp_path / "hidden.npz")))["img"]
    assert "proj" not in found
    np.testing.assert_array_equal(found["cls"], arrays["cls"])


def test_positions_are_resized_as_by_pytorch():
    # Columns 0 and rows 1 of torch.nn.functional.interpolate(mode="bicubic") of PyTorch 2.13.0, to size=3 (torch) and
    # with scale_factor=(n + 0.1) / 5 (dinov2), for i^2 + 10 j^2 on a grid of 5 x 5.
    line = np.arange(5.0) ** 2
    pos = (line[:, None] + 10 * line).reshape(1, 25, 1).astype(np.float32)
    wanted = {
        ("torch", 3): [1.6296393871, 5.4814910889, 15.555562019, 5.4814910889, 44.0, 144.740707397],
        ("dinov2", 3): [1.5326710939, 4.9469132423, 14.5839366913, 4.9469132423, 39.0893363953, 135.459579468],
        ("dinov2", 7): [-0.8858894706, -0.5510303378, 0.8257299662, 2.9906861782, 6.0204424858, 11.2533588409],
    }
    for (how, n), values in wanted.items():
        found = resize_positions(np.concatenate([pos[:, :1] - 5, pos], 1), n, first=1, how=how)
        assert found[0, 0, 0] == -5.0
        grid = found[0, 1:, 0].reshape(n, n)
        np.testing.assert_allclose([*grid[:, 0], *grid[1]][: len(values)], values, rtol=1e-5, atol=1e-5)
