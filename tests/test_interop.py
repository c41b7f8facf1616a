"""Third-party weights through the public import: golden embeddings and logits, exact round trips, one-line errors."""

import gzip
import json
import math
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import golden_files
from model_helpers import initialise
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax import config as config_lib
from clip_jax.data.augment import CLIP_MEAN, CLIP_STD
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.base import VOCAB_FOLDER
from clip_jax.errors import UserError
from clip_jax.interop import configs, layouts, load
from clip_jax.interop import tokenizer as tokenizer_files
from clip_jax.interop.layouts import big_vision, hf, open_clip
from clip_jax.interop.towers import sentence
from clip_jax.interop.towers.files import is_foreign
from clip_jax.methods.interface import make_method
from clip_jax.models.towers import image_tower
from clip_jax.runtime import sharding

MODELS = [
    *(
        "openclip_vit_gelu",
        "openclip_vit_quick_gelu",
        "openclip_rn",
        "openclip_siglip_timm",
        "hf_clip",
        "hf_siglip",
        "hf_align",
    ),
    *("bv_siglip", "bv_siglip_scan", "bv_clippo"),
]


def pixels(config, normalised):
    """Returns the pixels, 0 to 255, of the fixtures' normalised images `[n, h, w, 3]`."""
    mean, std = np.asarray(config.model.image_mean), np.asarray(config.model.image_std)
    return ((np.asarray(normalised, np.float64) * std + mean) * 255).astype(np.float32)


def logits(params, z_image, z_text):
    if "temperature" in params:
        return z_image @ z_text.T / params["temperature"]
    return jnp.exp(params["logit_scale"]) * z_image @ z_text.T + params.get("logit_bias", 0.0)


@pytest.mark.parametrize("folder", [p for name in MODELS for p in golden_files(name)])
def test_golden_models(folder):
    model = clip_jax.load(folder)
    io = np.load(folder / "io.npz")
    images = io["image_nhwc"] if "image_nhwc" in io else io["pixel_values_nchw"].transpose(0, 2, 3, 1)
    texts = (
        io["input_ids"]
        if "input_ids" in io
        else io["text"]
        if "text" in io
        else pixels(model.config, io["text_image_nhwc"])
    )
    z_image = jax.jit(model.method.embed_image)(model.params, model.extra, pixels(model.config, images))
    z_text = jax.jit(model.method.embed_text)(model.params, model.extra, texts)
    image_name, text_name = ("image_embed", "text_embed") if "image_embed" in io else ("zimg", "ztxt")
    np.testing.assert_allclose(z_image, io[image_name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(z_text, io[text_name], rtol=1e-4, atol=1e-5)
    expected = io["logits_per_image"] if "logits_per_image" in io else io["logits"]
    np.testing.assert_allclose(logits(model.params, z_image, z_text), expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("folder", [p for name in ("bv_vit_tok", "bv_vit_gap_sincos") for p in golden_files(name)])
def test_golden_image_towers_alone(folder):
    imported, io = load.load(folder), np.load(folder / "io.npz")
    z = image_tower(imported.config.model).apply({"params": imported.params["img"]}, io["image_nhwc"])[0]
    np.testing.assert_allclose(z, io["output"], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="image tower alone"):
        clip_jax.load(folder)


@pytest.mark.parametrize("path", golden_files("openclip_posemb_resize.npz"))
def test_golden_positions_of_open_clip(path):
    a = np.load(path)
    for name in ("up", "down"):
        grid = math.isqrt(len(a[name]) - 1)
        np.testing.assert_allclose(
            load.resize_positions(a["old"][None], grid, first=1)[0], a[name], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("path", golden_files("bv_posemb_resample.npz"))
def test_golden_positions_of_big_vision(path):
    a = np.load(path)
    for name in ("upsampled", "downsampled"):
        grid = math.isqrt(a[name].shape[1])
        np.testing.assert_allclose(load.resize_positions(a["old"], grid, how="corners"), a[name], rtol=1e-4, atol=1e-5)


OPEN_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
}


def random_arrays(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: np.asarray(0.2 * rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def open_clip_arrays(cfg=OPEN_CLIP, dtype=np.float32):
    """Returns a state dict of open_clip for the arguments `cfg` by our layout, which the golden files check."""
    ours = load.shapes(configs.open_clip.from_config(cfg, None, {}))
    shapes = {path: x.shape for path, x in ours.items()}
    return random_arrays({e.theirs: e.shape(shapes) for e in open_clip.entries(ours)}, dtype)


def open_clip_folder(folder, cfg=OPEN_CLIP, arrays=None, preprocess=None):
    folder.mkdir(exist_ok=True)
    save_file(arrays or open_clip_arrays(cfg), folder / "open_clip_model.safetensors")
    if cfg:
        content = {"model_cfg": cfg, "preprocess_cfg": preprocess} if preprocess else cfg
        (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def test_round_trips_are_exact():
    """Every layout with all its options: from our arrays to third-party arrays and back."""
    c = config_lib.base().unlock()
    c.model.embed_dim = 32
    text = dict(kind="transformer", context=6, width=32, depth=2, heads=2, mlp_dim=64, vocab_size=20, eot_id=19)
    vit = dict(kind="vit", size=16, patch=8, width=32, depth=2, heads=2, mlp_dim=64)
    siglip = dict(vit, pool="map", cls_token=False, ln_pre=False, patch_bias=True, proj=False)
    stages = ((8, 1, 3, 1, 1), (16, 2, 5, 2, 4))
    bert = dict(
        kind="bert", context=6, positions=8, width=32, depth=2, heads=2, mlp_dim=64, vocab_size=20, eot_id=-1, pad_id=0
    )
    cases = [
        ("clip", vit, text, open_clip.entries),
        ("clip", dict(kind="resnet", size=32, layers=(1, 2, 1, 1), width=8), text, open_clip.entries),
        (
            "siglip",
            siglip,
            dict(text, proj_bias=True),
            lambda ours: open_clip.entries(ours, custom_text=True, timm=True),
        ),
        ("clip", vit, text, hf.clip_entries),
        ("siglip", siglip, dict(text, proj_bias=True), hf.siglip_entries),
        ("align", dict(kind="efficientnet", size=32, stages=stages, proj=False), bert, hf.align_entries),
        ("siglip", siglip, dict(text, proj_bias=True), big_vision.entries),
        ("siglip", siglip, dict(text, proj_bias=True), lambda ours: big_vision.entries(ours, stacked=True)),
        (
            "clip",
            dict(vit, patch_bias=True, ln_pre=False),
            text,
            lambda ours: big_vision.entries(ours, cls_position=True),
        ),
    ]
    for method, image, text, entries_of in cases:
        c.method = method
        c.model.image, c.model.text = image, text
        c.model.embed_dim = 16 if image["kind"] == "efficientnet" else 32
        ours = load.shapes(c)
        arrays = random_arrays({path: x.shape for path, x in ours.items()})
        entries = entries_of(ours)
        theirs = layouts.save(entries, arrays)
        layouts.check(entries, theirs, ours)
        shapes = {path: x.shape for path, x in ours.items()}
        again = {path: x for e in entries for path, x in e.load(theirs[e.theirs], shapes)}
        assert again.keys() == arrays.keys()
        for path, x in arrays.items():
            np.testing.assert_array_equal(again[path], x, err_msg=f"{method} {path}")


def test_big_vision_cannot_hold_a_position_of_the_class_token():
    ours = {"params/img/pos": np.ones((1, 5, 4), np.float32), "params/img/cls": np.ones((1, 1, 4), np.float32)}
    with pytest.raises(UserError, match="this layout cannot hold"):
        layouts.save(big_vision.entries(ours), ours)


def test_half_precision_and_shards(tmp_path):
    half = open_clip_arrays(dtype=np.float16)
    whole = load.load(open_clip_folder(tmp_path / "half", arrays=half))
    exact = load.load(
        open_clip_folder(tmp_path / "float", arrays={name: x.astype(np.float32) for name, x in half.items()})
    )
    jax.tree.map(np.testing.assert_array_equal, whole.params, exact.params)
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {jnp.dtype("float32")}
    brain = load.load(
        open_clip_folder(tmp_path / "brain", arrays={n: x.astype(ml_dtypes.bfloat16) for n, x in half.items()})
    )
    np.testing.assert_allclose(
        brain.params["txt"]["embed"]["embedding"], half["token_embedding.weight"], rtol=2**-8, atol=1e-6
    )


def test_compiled_models_and_scales_of_one_element(tmp_path):
    arrays = open_clip_arrays()
    plain = load.load(open_clip_folder(tmp_path / "plain", arrays=arrays))
    wrapped = {f"module._orig_mod.{name}": x.reshape(1) if x.ndim == 0 else x for name, x in arrays.items()}
    assert wrapped["module._orig_mod.logit_scale"].shape == (1,)
    again = load.load(open_clip_folder(tmp_path / "wrapped", arrays=wrapped))
    jax.tree.map(np.testing.assert_array_equal, again.params, plain.params)
    assert again.params["logit_scale"].shape == ()


def test_parameters_are_sharded(tmp_path, mesh8):
    params = load.load(open_clip_folder(tmp_path / "m"), mesh=mesh8).params
    expected = sharding.state_shardings(params, mesh8)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)), params, expected)
    kernel = params["img"]["block_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (32, 128) and {s.data.shape for s in kernel.addressable_shards} == {(16, 64)}


def test_preprocessing_is_stored_with_the_model(tmp_path):
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "resize_mode": "squash"}
    config = load.load(open_clip_folder(tmp_path / "m", preprocess=preprocess)).config
    assert config.eval.transform == ("squash(interpolation='bilinear')", "drop_alpha")
    white = load.load(tmp_path / "m", alpha="white").config
    assert white.eval.transform == ("squash(interpolation='bilinear')",)
    with pytest.raises(UserError, match="--alpha=black: allowed are white, drop"):
        load.load(tmp_path / "m", alpha="black")
    assert config.model.image_mean == (0.5, 0.4, 0.3) and config.model.image_std == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("folder", golden_files("hf_clip"))
@pytest.mark.parametrize(
    "processor, transform",
    [
        (
            lambda n: {"size": n + 8, "crop_size": n, "do_center_crop": True, "resample": 2},
            lambda n: (f"resize({n + 8}, interpolation='bilinear')", "center_crop(rounding='down')"),
        ),
        (
            lambda n: {"size": {"shortest_edge": n}, "do_center_crop": True, "resample": 3},
            lambda n: ("resize(interpolation='bicubic')", "center_crop(rounding='down')"),
        ),
        (
            lambda n: {"size": {"height": n, "width": n}, "resample": 3},
            lambda n: ("squash(interpolation='bicubic')",),
        ),
    ],
)
def test_preprocessing_of_hugging_face(tmp_path, folder, processor, transform):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    size = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
    written = {"do_center_crop": False, **processor(size), "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    config = load.load(tmp_path).config
    assert load.load(tmp_path, alpha="drop").config.eval.transform == ("drop_alpha", *transform(size))
    assert config.eval.transform == transform(size) and config.model.image_mean == (0.1, 0.2, 0.3)


def test_a_bare_state_dict_needs_what_weights_do_not_show(tmp_path):
    folder = open_clip_folder(tmp_path / "m")
    configured = load.load(folder)
    (folder / "open_clip_config.json").unlink()
    file = folder / "open_clip_model.safetensors"
    with pytest.raises(UserError, match="weights do not show the activation: give --act=quick_gelu .* or --act=gelu"):
        load.load(file)
    with pytest.raises(UserError, match="the number of heads of the image tower of width 32 is unknown: give --heads"):
        load.load(file, act="quick_gelu")
    bare = load.load(file, act="quick_gelu", heads=(2, 2))
    assert bare.config.model.to_dict() == configured.config.model.to_dict()
    jax.tree.map(np.testing.assert_array_equal, bare.params, configured.params)
    assert load.load(file, act="gelu", heads=(2, 2)).config.model.text.act == "gelu"
    with pytest.raises(UserError, match="--act=relu: allowed are quick_gelu, gelu, gelu_tanh"):
        load.load(file, act="relu")
    with pytest.raises(UserError, match="3 heads do not divide the width"):
        load.load(file, act="gelu", heads=(3, 2))


@pytest.mark.parametrize("with_configuration", [True, False])
def test_clips_towers_with_the_loss_of_siglip_keep_clips_preprocessing_and_tokenizer(tmp_path, with_configuration):
    cfg = json.loads(json.dumps(OPEN_CLIP))
    cfg["text_cfg"].update(vocab_size=49408, width=16, layers=1)
    arrays = open_clip_arrays(cfg) | {"logit_bias": np.array(-10.0, np.float32)}
    folder = open_clip_folder(tmp_path / "m", cfg if with_configuration else None, arrays)
    imported = load.load(folder, act="quick_gelu", heads=(2, 2))
    config = imported.config
    assert config.method == "siglip" and config.model.image_mean == CLIP_MEAN and config.model.image_std == CLIP_STD
    assert config.eval.transform == ("resize(interpolation='bicubic')", "center_crop", "drop_alpha")
    assert imported.tokenizer == make_tokenizer("clip_bpe")


def test_openai_archives_mean_quick_gelu(tmp_path):
    arrays = open_clip_arrays(dtype=np.float16) | {
        "input_resolution": np.array(32),
        "context_length": np.array(10),
        "vocab_size": np.array(50),
    }
    file = open_clip_folder(tmp_path / "m", cfg=None, arrays=arrays) / "open_clip_model.safetensors"
    imported = load.load(file, heads=(2, 2))
    assert imported.config.model.image.act == imported.config.model.text.act == "quick_gelu"
    assert any("OpenAI's model, so quick_gelu" in line for line in imported.summary)
    with pytest.raises(UserError, match="--act=gelu contradicts .* which has quick_gelu"):
        load.load(file, act="gelu", heads=(2, 2))


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("vision_cfg", {"width": 48}, r"another shape: .*visual.conv1.weight \(32x3x8x8 for 48x3x8x8\)"),
        ("vision_cfg", {"layers": 3}, r"12 missing: visual.transformer.resblocks.2.attn.in_proj_bias, "),
        ("text_cfg", {"layers": 1}, r"12 unexpected: transformer.resblocks.1.attn.in_proj_bias, "),
        ("vision_cfg", {"image_size": 40}, r"1 of another shape: visual.positional_embedding \(17x32 for 26x32\)"),
        ("text_cfg", {"vocab_size": 60}, r"1 of another shape: token_embedding.weight \(50x24 for 60x24\)"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool=True of open_clip is not supported"),
        ("text_cfg", {"pool_type": "mean"}, "text_cfg.pool_type='mean' is not supported"),
        ("vision_cfg", {"timm_model_name": "convnext_base"}, "timm_pool=None of open_clip is not supported"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(tmp_path, section, change, message):
    folder = open_clip_folder(tmp_path / "m")
    cfg = json.loads(json.dumps(OPEN_CLIP))
    cfg[section].update(change)
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=message) as error:
        load.load(folder)
    assert "\n" not in str(error.value)


def test_options_that_contradict_the_configuration(tmp_path):
    folder = open_clip_folder(tmp_path / "m")
    with pytest.raises(UserError, match="--act=gelu contradicts .* which has quick_gelu"):
        load.load(folder, act="gelu")
    with pytest.raises(UserError, match=r"--heads=4,2 contradicts .* which has \[2, 2\]"):
        load.load(folder, heads=(4, 2))


def test_missing_unexpected_and_misshapen_are_all_listed(tmp_path):
    arrays = open_clip_arrays()
    for i in (0, 1):
        del arrays[f"transformer.resblocks.{i}.mlp.c_fc.bias"]
    arrays |= {"visual.extra": np.ones(2, np.float32), "visual.proj": np.ones((16, 32), np.float32)}
    with pytest.raises(UserError) as error:
        load.load(open_clip_folder(tmp_path / "m", arrays=arrays))
    for part in (
        "nothing was loaded",
        "2 missing: transformer.resblocks.N.mlp.c_fc.bias (x2)",
        "1 unexpected: visual.extra",
        "1 of another shape: visual.proj (16x32 for 32x16)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("size, grid", [(48, 6), (16, 2)])
def test_positions_are_resized_on_request(tmp_path, size, grid):
    folder = open_clip_folder(tmp_path / "m")
    as_it_is, resized = load.load(folder), load.load(folder, size=size)
    assert resized.config.model.image.size == size
    pos = resized.params["img"]["pos"]
    assert pos.shape == (1, 1 + grid**2, 32)
    np.testing.assert_allclose(
        pos, load.resize_positions(np.asarray(as_it_is.params["img"]["pos"]), grid, first=1), atol=1e-6
    )
    assert any(f"resized from 32 to {size} pixels" in line for line in resized.summary)
    with pytest.raises(UserError, match="model.image.size=30 is not divisible by the patch size 8"):
        load.load(folder, size=30)


def big_vision_arrays():
    c = config_lib.base().unlock()
    c.method, c.model.embed_dim = "siglip", 32
    c.model.image = dict(
        kind="vit", size=16, patch=8, width=32, depth=2, heads=2, mlp_dim=64, pool="map", cls_token=False, ln_pre=False
    )
    c.model.image.update(dict(patch_bias=True, proj=False))
    c.model.text = dict(
        kind="transformer", context=6, width=32, depth=2, heads=2, mlp_dim=48, vocab_size=20, eot_id=1, proj_bias=True
    )
    ours = load.shapes(c)
    shapes = {path: x.shape for path, x in ours.items()}
    return random_arrays({e.theirs: e.shape(shapes) for e in big_vision.entries(ours)})


def test_big_vision_with_prefix_optimizer_and_bfloat16(tmp_path):
    arrays = big_vision_arrays()
    np.savez(tmp_path / "plain.npz", **arrays)
    plain = load.load(tmp_path / "plain.npz")
    assert (
        plain.config.method == "siglip"
        and plain.config.model.text.pool == "last"
        and plain.config.model.image.act == "gelu_tanh"
    )
    prefixed = {f"params/{name}": x for name, x in arrays.items()} | {"opt/0/mu/img/cls": np.ones(3)}
    np.savez(tmp_path / "prefixed.npz", **prefixed)
    jax.tree.map(np.testing.assert_array_equal, load.load(tmp_path / "prefixed.npz").params, plain.params)
    brain = {name: x.astype(ml_dtypes.bfloat16) for name, x in arrays.items()}
    np.savez(tmp_path / "brain.npz", **brain)
    np.testing.assert_array_equal(
        load.load(tmp_path / "brain.npz").params["img"]["map"]["mlp"]["fc1"]["bias"],
        brain["img/MAPHead_0/MlpBlock_0/Dense_0/bias"].astype(np.float32),
    )


def test_names_of_old_big_vision(tmp_path):
    arrays = big_vision_arrays()
    np.savez(tmp_path / "new.npz", **arrays)
    old = {name.replace("img/MAPHead_0/", "img/"): x for name, x in arrays.items()}
    old["img/Transformer/posembed_input/pos_embedding"] = old.pop("img/pos_embedding")
    old["txt/Encoder_0/pos_embedding"] = np.ones_like(old["txt/pos_embedding"])
    np.savez(tmp_path / "old.npz", **old)
    new, old = load.load(tmp_path / "new.npz").params, load.load(tmp_path / "old.npz").params
    np.testing.assert_array_equal(
        old["txt"]["pos"], new["txt"]["pos"] + 1, err_msg="the two text position embeddings add up"
    )
    jax.tree.map(np.testing.assert_array_equal, old["img"], new["img"])


def test_the_image_tower_of_lit_is_loaded_alone(tmp_path):
    arrays = {name: x for name, x in big_vision_arrays().items() if name.startswith("img/") or name == "t"}
    np.savez(tmp_path / "lit.npz", **arrays, **{"txt/BertEncoder_0/embedder/x": np.ones(3)})
    imported = load.load(tmp_path / "lit.npz")
    assert imported.params.keys() == {"img"} and any(
        "the image tower alone is loaded" in line for line in imported.summary
    )


def test_a_configuration_of_big_vision_that_contradicts_the_weights(tmp_path):
    np.savez(tmp_path / "checkpoint.npz", **big_vision_arrays())
    (tmp_path / "config.json").write_text(json.dumps({"image": {"num_heads": 4}}))
    with pytest.raises(UserError, match="contradicts the weights: num_heads=4, but the weights have 2"):
        load.load(tmp_path)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="no weights in this folder"):
        load.load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load.load(tmp_path / "none.npz")
    assert not is_foreign(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    np.savez(tmp_path / "run" / "outcomes.npz", a=np.zeros(1))  # an .npz of a work folder is not its model
    assert not is_foreign(tmp_path / "run")
    save_file({"conv1.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match="not a model of open_clip, OpenAI or PyramidCLIP .* the names of its tensors are conv1.weight"
    ):
        clip_jax.load(tmp_path)
    save_file({"vision_model.x": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="its folder must hold the model's config.json"):
        clip_jax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match="model_type='blip': allowed are clip, siglip, align"):
        clip_jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        clip_jax.load(tmp_path)


def test_hugging_face_defaults_are_those_of_its_classes():
    c = configs.hf.clip({"model_type": "clip", "text_config": {"eos_token_id": 2}, "vision_config": {}}, None)
    assert c.model.text.eot_id == 49407, "2 means the largest id"

    def count(c):
        load.shapes(c)
        method = make_method(c)
        batch = method.batch_spec(2)
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(method.init, jax.random.key(0), batch)[0]))

    assert count(c) == 151_277_313
    assert count(configs.hf.siglip({"model_type": "siglip"}, None)) == 203_155_970


def test_clip_jax_load_says_when_there_is_no_tokenizer(tmp_path):
    model = clip_jax.load(open_clip_folder(tmp_path / "m"))
    assert model.embed_image(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 16)
    with pytest.raises(UserError, match="came without a tokenizer"):
        model.embed_text(["a cat"])
    with pytest.raises(UserError, match="has 49408 ids, but the text tower .* has only 50"):
        clip_jax.load(tmp_path / "m", tokenizer="clip_bpe")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A tiny model with CLIP's vocabulary."""
    cfg = json.loads(json.dumps(OPEN_CLIP))
    cfg["text_cfg"].update(vocab_size=49408, width=16, layers=1)
    return open_clip_folder(tmp_path_factory.mktemp("clip") / "m", cfg)


def test_the_command_writes_a_checkpoint_that_evaluate_reads(with_tokenizer, tmp_path, capsys):
    workdir = tmp_path / "out"
    assert load.main([f"--from={with_tokenizer}", f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    for part in (
        "parameters; method clip",
        "vit size=32 patch=8",
        "image quick_gelu",
        "center_crop",
        "clip_bpe, 49,408 ids",
        "written: ",
    ):
        assert part in out
    ours, theirs = clip_jax.load(workdir), clip_jax.load(with_tokenizer)
    texts = ["a photo of a cat", "of a dog " * 30]
    np.testing.assert_array_equal(ours.embed_text(texts), theirs.embed_text(texts))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(ours.embed_image(images), theirs.embed_image(images))
    assert load.main([f"--from={with_tokenizer}", f"--workdir={workdir}"]) == 2
    assert "this folder already has checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from={tmp}/none.pt"], "no such file or folder"),
        (["--from={model}", "--act=gelu"], "or its configuration, which has quick_gelu"),
    ],
)
def test_the_command_fails_in_one_line(with_tokenizer, tmp_path, capsys, arguments, message):
    arguments = [a.format(tmp=tmp_path, model=with_tokenizer) for a in arguments]
    assert load.main([*arguments, f"--workdir={tmp_path}/out"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_weights_are_the_ones_of_the_file(with_tokenizer):
    params, arrays = load.load(with_tokenizer).params, load_file(with_tokenizer / "open_clip_model.safetensors")
    fused = arrays["transformer.resblocks.0.attn.in_proj_weight"]
    key = params["txt"]["block_0"]["attn"]["key"]["kernel"]
    np.testing.assert_array_equal(
        key[:, 1, 3], fused[16 + 8 + 3], err_msg="head 1, column 3: the second third of the fused matrix"
    )


def ids_of(folder, method, vocab_size, texts, context=12):
    return make_tokenizer(tokenizer_files.find(folder, method, vocab_size))(texts, context).tolist()


TEXTS = ["A Photo, of: a_cat!", "pizza", ""]


def test_clip_tokenizer_in_the_folder_of_the_weights(tmp_path):
    expected = make_tokenizer("clip_bpe")(TEXTS, 12).tolist()
    lines = gzip.decompress((VOCAB_FOLDER / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": merges}}))
    assert ids_of(tmp_path, "clip", 49408, TEXTS) == expected
    # open_clip trains CLIP's towers with the loss of SigLIP, too.
    assert tokenizer_files.find(tmp_path, "siglip", 49408, "open_clip") == "clip_bpe"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": [m.split(" ") for m in merges]}}))
    assert ids_of(tmp_path, "clip", 49408, TEXTS) == expected
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert ids_of(tmp_path, "clip", 49408, TEXTS) == expected
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="not a Hugging Face tokenizer"):
        tokenizer_files.find(tmp_path, "clip", 49408)
    (tmp_path / "tokenizer.json").unlink()
    assert ids_of(tmp_path, "clip", 49408, TEXTS) == expected and tokenizer_files.find(tmp_path, "clip", 100) is None


def test_bert_tokenizer_in_the_folder_of_the_weights(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", ",", "of", ":", "cat", "!", "pizza", "_"]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordPiece", "vocab": {p: i for i, p in enumerate(pieces)}}})
    )
    from_json = ids_of(tmp_path, "align", 13, TEXTS)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    assert from_json == ids_of(tmp_path, "align", 13, TEXTS)
    assert from_json[0] == [2, 4, 5, 6, 7, 8, 4, 12, 9, 10, 3, 0]


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_a_cased_bert_tokenizer_stays_cased(tmp_path, file, where):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "A", "a"]
    whole = {"model": {"type": "WordPiece", "vocab": {p: i for i, p in enumerate(pieces)}}, "normalizer": None}
    if where == "tokenizer.json":
        whole["normalizer"] = {"type": "BertNormalizer", "lowercase": False}
    else:
        (tmp_path / where).write_text(json.dumps({"do_lower_case": False}))
    if "tokenizer.json" in (file, where):
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(pieces))
    for tokenizer in (make_tokenizer(tokenizer_files.find(tmp_path, "align", 6)), sentence.tokenizer(tmp_path)):
        assert tokenizer.encode("A a") == [4, 5] and tokenizer.options["lower"] is False


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_another_tokenizer_in_the_folder_of_the_weights_is_not_found(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": []}}))
    for method in ("clip", "align"):
        assert tokenizer_files.find(tmp_path, method, 49408) is None


def test_siglip_tokenizer_in_the_folder_of_the_weights(tmp_path):
    (tmp_path / "spiece.model").write_bytes((VOCAB_FOLDER / "emoji_4k.model").read_bytes())
    plain = make_tokenizer("sentencepiece")
    ids = ids_of(tmp_path, "siglip", 4096, TEXTS)
    clean = plain.encode("a photo of a cat")
    assert ids[0] == clean + [plain.eot_id] * (12 - len(clean)), (
        "lower case, no punctuation, padded with the end of text"
    )
    assert ids[2] == [plain.eot_id] * 12
    assert ids_of(tmp_path, "siglip", 4096, ["a photo of a cat " * 9])[0][-1] == plain.eot_id, (
        "the pooled token is always the end of text"
    )
    lower = ids_of(tmp_path, "siglip", 256_000, TEXTS)
    assert lower[0][: len(plain.encode(TEXTS[0].lower()))] == plain.encode(TEXTS[0].lower()), (
        "SigLIP 2 keeps punctuation"
    )


def test_siglip_tokenizer_as_json(tmp_path):
    import tokenizers as library

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁photo", "▁cat", ",", "!"]
    model = library.Tokenizer(library.models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    model.pre_tokenizer, model.decoder = library.pre_tokenizers.Metaspace(), library.decoders.Metaspace()
    model.post_processor = library.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    assert ids_of(tmp_path, "siglip", 9, ["A photo, a cat!", ""], 6) == [[4, 5, 4, 6, 1, 1], [1] * 6]
    tokenizer = make_tokenizer(tokenizer_files.find(tmp_path, "siglip", 9))
    assert tokenizer.decode([4, 5, 4, 6, 1, 1]) == "a photo a cat" and tokenizer.vocab_size == 9
    tokenizer.save(tmp_path / "saved")
    assert make_tokenizer(tmp_path / "saved") == tokenizer and pickle.loads(pickle.dumps(tokenizer))(
        ["a"], 3
    ).tolist() == [[4, 1, 1]]
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="not a tokenizer.json"):
        make_tokenizer(tokenizer_files.find(tmp_path, "siglip", 9))


def test_the_first_block_of_a_stage_has_no_residual_in_hugging_face():
    """Where its stride is 1 and its channels are equal; without the residual the input has no way around the block."""
    from clip_jax.models.efficientnet import EfficientNet, has_first_residual

    stages = ((16, 1, 3, 1, 1), (16, 2, 3, 2, 1))
    assert has_first_residual(stages, 0.25) and not has_first_residual(stages, 1.0)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    for first_residual in (True, False):
        tower = EfficientNet(16, 8, 0.5, 1.0, ((32, 1, 3, 1, 1),), first_residual=first_residual)
        variables = initialise(tower.init, images)
        bn = variables["params"]["mbconv_0"]["project_bn"]
        bn["scale"], bn["bias"] = jnp.zeros_like(bn["scale"]), jnp.zeros_like(bn["bias"])
        _, tokens = tower.apply(variables, images)
        assert bool(jnp.any(tokens != 0)) == first_residual
    small = {"vision_config": {"out_channels": [24, 24, 40, 80, 112, 192, 320], "width_coefficient": 0.5}}
    for cfg, has_effect in (({}, False), (small, True)):  # only where it has an effect, a run must have the same value
        assert configs.hf.align(cfg, None).model.image.first_residual is not has_effect
