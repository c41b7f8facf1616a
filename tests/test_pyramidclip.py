"""PyramidCLIP: golden loss and towers, the oracles of its specification, absent regions and tags, meshes, runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from helpers import TINY, interrupted, losses
from model_helpers import BATCH, initialise, run_steps

from clip_jax import config, train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.inference import load
from clip_jax.interop import layouts
from clip_jax.interop.load import load as load_foreign
from clip_jax.interop.load import shapes
from clip_jax.interop.recognize import recognize
from clip_jax.losses.contrastive import cross_entropy, infonce
from clip_jax.methods.interface import make_method
from clip_jax.methods.pyramidclip import TERMS, TEXTS, Options, pyramid_infonce
from clip_jax.models.common import l2_normalize
from clip_jax.models.pyramid import LeFF
from clip_jax.models.transformer import block_init
from clip_jax.models.two_tower import TwoTower

CONFIG = str(REPO / "configs" / "pyramidclip.py")
SMALL = [*TINY, "model.image.depth=2", "data.source=emoji*1 + scenes?size=32&objects=2*1"]
N, SCALE = 8, np.float32(7.0)
IMAGES = ("global", "local", "regions")
DRAWN = np.random.default_rng(0).standard_normal((6, N, N), np.float32)
FEATURES = dict(zip(IMAGES + TEXTS, DRAWN / np.linalg.norm(DRAWN, axis=-1, keepdims=True), strict=True))
EYE = np.eye(N, dtype=np.float32)

SOFTENING, WEIGHTS = pyramid_infonce.__defaults__
jitted_loss, jitted_infonce = jax.jit(pyramid_infonce), jax.jit(infonce)


def loss(features, scale, softening=SOFTENING, weights=WEIGHTS):
    """Returns the loss by one program: softening and weights are arguments of it."""
    return jitted_loss(features, np.float32(scale), softening, weights)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def loss_and_gradients(features, scale, weights, masks):
    return pyramid_infonce(features | masks, scale, SOFTENING, weights)


def setup(*overrides):
    c = config.load(CONFIG, [*SMALL, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


def soft(x, z, softening, keep=None):
    """Returns the term of two levels by the formula, over the examples of `keep`."""
    x, z = (x, z) if keep is None else (x[keep], z[keep])
    n = len(x)
    softening = softening if n > 1 else 0  # a single pair is its whole target
    targets = (1 - softening) * np.eye(n) + softening / max(n - 1, 1) * (1 - np.eye(n))
    losses = jax.jit(cross_entropy)
    return sum(np.asarray(losses(logits, targets)).mean() for logits in (SCALE * x @ z.T, SCALE * z @ x.T)) / 2


# The loss


@pytest.mark.parametrize("file", golden_files("loss_pyramidclip_soft*.npz"))
def test_golden_loss_terms_and_gradients(file):
    g, letters = np.load(file), dict(zip(IMAGES + TEXTS, "GLRTSA", strict=True))
    o = Options(softening=float(g["alpha"]), cross_global=float(g["lam"]), cross_local=float(g["mu"]))
    features = {name: jnp.asarray(g[f"feat_{letter}"]) for name, letter in letters.items()}
    value = jax.value_and_grad(
        lambda f, scale: pyramid_infonce(f, scale, o.softening, o.weights), argnums=(0, 1), has_aux=True
    )
    (found, metrics), (grads, of_scale) = jax.jit(value)(features, g["scale"])
    np.testing.assert_allclose([found, of_scale], [g["loss"], g["grad_scale"]], rtol=1e-4, atol=1e-5)
    for image, text in TERMS:
        np.testing.assert_allclose(
            metrics[f"loss_{image}_{text}"], g[f"term_{letters[image]}{letters[text]}"], rtol=1e-4, atol=1e-5
        )
    for name, letter in letters.items():
        np.testing.assert_allclose(grads[name], g[f"grad_{letter}"], rtol=1e-4, atol=1e-5, err_msg=name)


def test_oracle_1_without_softening_and_with_tied_levels_it_is_clip():
    _, metrics = loss(FEATURES, SCALE, softening=0.0)
    for image, text in TERMS:
        np.testing.assert_allclose(
            metrics[f"loss_{image}_{text}"], jitted_infonce(FEATURES[image], FEATURES[text], SCALE)[0], rtol=1e-5
        )
    tied = dict.fromkeys(IMAGES, FEATURES["global"]) | dict.fromkeys(TEXTS, FEATURES["text"])
    for lam, mu in ((1 / 3, 1 / 3), (0.1, 0.7)):
        value, metrics = loss(tied, SCALE, softening=0.0, weights=Options(cross_global=lam, cross_local=mu).weights)
        clip, accuracies = jitted_infonce(tied["global"], tied["text"], SCALE)
        np.testing.assert_allclose(value, clip, rtol=1e-5)
        assert all(metrics[name] == accuracy for name, accuracy in accuracies.items())


def test_oracle_2_equal_embeddings_cost_log_n_and_the_minimum_is_the_entropy_of_the_target():
    equal = dict.fromkeys(FEATURES, np.broadcast_to(FEATURES["text"][:1], (N, N)))
    for softening in (0.0, 0.2, 0.9):
        np.testing.assert_allclose(loss(equal, SCALE, softening=softening)[0], np.log(N), rtol=1e-5)
    apart, gap = dict.fromkeys(FEATURES, EYE), np.log(0.8 * (N - 1) / 0.2)
    np.testing.assert_allclose([gap, loss(apart, gap)[0]], [3.3322, 0.8896], atol=1e-4)
    assert min(loss(apart, gap + d)[0] for d in (-0.1, 0.1)) > loss(apart, gap)[0]


def test_oracle_3_gradient_of_the_logits_is_softmax_minus_target():
    logits = 2 * np.random.default_rng(1).standard_normal((N, N), np.float32)
    features = dict.fromkeys(IMAGES, logits) | dict.fromkeys(TEXTS, EYE)  # so a similarity is a logit
    weights = Options(cross_global=0.0, cross_local=0.0).weights
    found = loss_and_gradients(features, np.float32(1), weights, {})[1]["global"]
    targets = 0.8 * np.eye(N) + 0.2 / (N - 1) * (1 - np.eye(N))
    of_rows, of_columns = (np.asarray(jax.nn.softmax(logits, axis)) for axis in (1, 0))
    both = (of_rows - targets) / N + (of_columns - targets) / N
    np.testing.assert_allclose(found, both / 2 / 2, atol=1e-6)  # the mean of two directions, and half of the weight


def test_oracle_4_weights_of_the_terms():
    np.testing.assert_allclose(Options().weights, [1 / 6] * 6)
    weights = Options(cross_global=0.0, cross_local=0.0).weights
    grads = jax.device_get(loss_and_gradients(FEATURES, SCALE, weights, {})[1])
    assert {name for name, g in grads.items() if np.any(g)} == {"global", "local", "summary", "text"}
    np.testing.assert_allclose(
        loss(FEATURES, SCALE)[0],
        sum(soft(FEATURES[image], FEATURES[text], 0.2) for image, text in TERMS) / 6,
        rtol=1e-5,
    )


def test_oracle_8_vision_and_language_exchanged_change_nothing():
    peers = dict(zip(IMAGES, ("summary", "text", "tags"), strict=True))
    exchanged = {name: FEATURES[other] for a, b in peers.items() for name, other in ((a, b), (b, a))}
    (value, found), (expected, metrics) = loss(exchanged, SCALE), loss(FEATURES, SCALE)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # the crossing terms also come in pairs
    np.testing.assert_allclose(found["loss_global_summary"], metrics["loss_global_summary"], rtol=1e-6)
    np.testing.assert_allclose(found["loss_regions_summary"], metrics["loss_global_tags"], rtol=1e-6)


@pytest.mark.parametrize("absent", ["regions", "tags", "both", "all", "all but one"])
def test_what_a_picture_lacks_takes_no_part_as_a_negative_either(absent):
    keep = {name: np.ones(N, bool) for name in ("regions", "tags")}
    keep["regions"][[0, 5]] = absent == "tags"
    keep["tags"][[2, 7]] = absent == "regions"
    if absent.startswith("all"):
        keep = dict.fromkeys(keep, np.arange(N) < (absent == "all but one"))
    masks = {f"has_{name}": x for name, x in keep.items()}
    (found, _), grads = jax.device_get(loss_and_gradients(FEATURES, SCALE, WEIGHTS, masks))
    expected = [
        soft(FEATURES[a], FEATURES[b], 0.2, k) if (k := keep.get(a, keep.get(b, np.ones(N, bool)))).any() else 0
        for a, b in TERMS
    ]
    np.testing.assert_allclose(found, sum(expected) / 6, rtol=1e-5)
    for name, k in keep.items():
        assert not np.any(grads[name][~k]) and np.isfinite(grads[name]).all()


# The towers


def golden(folder):
    model, io = load_foreign(folder), np.load(folder / "io.npz")
    images = {k: io[f"images_{k}_nchw"].transpose(0, 2, 3, 1) for k in "GL"}
    return model, io, images, TwoTower(model.config.model)


@pytest.mark.parametrize("folder", golden_files("pyramidclip_*"))
def test_golden_towers(folder):
    model, io, images, towers = golden(folder)
    variables = {"params": model.params["img"], "batch_stats": model.extra["batch_stats"]["img"]}
    np.testing.assert_allclose(model.params["logit_scale"], io["logit_scale"], rtol=1e-6)
    scale, image = np.exp(io["logit_scale"]), jax.jit(towers.image.apply)
    text = jax.jit(towers.text.apply)
    regions, _ = image({"params": model.params["img"]}, None, regions=io["roi_feats"])
    for found, name in ((image(variables, images["G"])[0], "image_G"), (regions, "roi_R")):
        np.testing.assert_allclose(found, io[f"{name}_unnormalised"], rtol=1e-4, atol=5e-5)
        np.testing.assert_allclose(l2_normalize(found), io[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(l2_normalize(image(variables, images["L"])[0]), io["image_L"], rtol=1e-4, atol=1e-5)
    for k in "TSA":
        z = text({"params": model.params["txt"]}, io[f"texts_{k}"])[0]
        np.testing.assert_allclose(scale * l2_normalize(z), io[f"text_{k}_times_scale"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", golden_files("pyramidclip_*"))
def test_golden_towers_in_training_with_their_statistics(folder):
    model, io, images, towers = golden(folder)
    variables = {"params": model.params["img"], "batch_stats": model.extra["batch_stats"]["img"]}
    run = jax.jit(lambda variables, x: towers.image.apply(variables, x, train=True, mutable=["batch_stats"]))
    for k in "LG":  # in the order of a step
        (z, _), new = run(variables, images[k])
        np.testing.assert_allclose(l2_normalize(z), io[f"train.image_{k}"], rtol=1e-4, atol=1e-5)
        variables = variables | new
    flat = {
        "/".join(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
    }
    entries = recognize(folder).entries(shapes(recognize(folder).config))
    after = {
        e.theirs: flat[e.ours[0].removeprefix("extra/batch_stats/img/")]
        for e in entries
        if e.ours[0].startswith("extra/")
    }
    assert len(after) == len(flat) == sum(name.startswith("bn_after.") for name in io.files)
    for name, x in after.items():
        np.testing.assert_allclose(x, io[f"bn_after.{name}"], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("folder", golden_files("pyramidclip_vit"))
def test_golden_leff(folder):
    model, g = load_foreign(folder), np.load(folder / "leff_block0.npz")
    image = model.config.model.image
    leff = LeFF(image.mlp_dim, image.act, block_init("clip_image", image.width, image.mlp_dim, image.depth))
    variables = {
        "params": model.params["img"]["block_0"]["mlp"],
        "batch_stats": model.extra["batch_stats"]["img"]["block_0"]["mlp"],
    }
    x = g["x_tokens_first"].swapaxes(0, 1)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad_of_mean_square(x):
        y, (y_train, _) = leff.apply(variables, x), leff.apply(variables, x, True, mutable=["batch_stats"])
        return jnp.mean(y**2), (y, y_train)

    grad, (y, y_train) = grad_of_mean_square(x)
    np.testing.assert_allclose(y, g["y_eval"].swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y_train, g["y_train"].swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, g["grad_x_of_mean_y_squared"].swapaxes(0, 1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("folder", golden_files("pyramidclip_vit"))
def test_weights_round_trip_through_the_layout(folder):
    model, foreign = load_foreign(folder), recognize(folder)
    tree = {"params": model.params, "extra": model.extra}
    ours = {"/".join(p.key for p in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    for e in foreign.entries(ours):
        np.testing.assert_array_equal(
            e.save(ours).reshape(-1), foreign.tensors[e.theirs].read().reshape(-1), err_msg=e.theirs
        )
    layouts.check(foreign.entries(ours), foreign.tensors, ours, foreign.ignored)


def test_oracle_6_leff_keeps_the_class_token_and_can_be_silent():
    leff = LeFF(32, "quick_gelu", block_init("clip_image", 16, 32, 2))
    x, apply = np.random.default_rng(0).standard_normal((2, 10, 16), np.float32), jax.jit(leff.apply)
    variables = initialise(leff.init, x, seed=1)
    y = np.asarray(apply(variables, x))
    assert np.array_equal(y[:, 0], x[:, 0]) and np.abs(y[:, 1:]).min() > 0
    silent = {
        **variables,
        "params": variables["params"] | {"bn3": dict.fromkeys(("scale", "bias"), np.zeros(16, np.float32))},
    }
    assert not np.any(apply(silent, x)[:, 1:])
    with pytest.raises(UserError, match="a square grid of patches, not 8 patches"):
        apply(variables, x[:, :9])


@pytest.fixture(scope="module")
def tower():
    """Returns `(image tower, variables, regions)`."""
    c, _ = setup()
    towers = TwoTower(c.model)
    variables = initialise(towers.image.init, np.zeros((2, 16, 16, 3), np.float32))
    return towers.image, variables, random_regions(c.model.image.region_dim)


def random_regions(width):
    return np.random.default_rng(1).standard_normal((3, 5, width), np.float32)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_oracle_5_order_and_padding_of_regions_do_not_matter(tower, kind):
    image, variables, regions = tower
    if kind == "resnet":
        c = config.load(
            f"{CONFIG}:rn50", ["model.image.layers=(1,1,1,1)", "model.image.width=8", "model.image.size=32"]
        )
        image, regions = TwoTower(c.copy_and_resolve_references().model).image, random_regions(2052)
        variables = jax.jit(image.init)(jax.random.key(0), None, regions=regions)
    embed = jax.jit(
        lambda regions, mask: image.apply({"params": variables["params"]}, None, regions=regions, mask=mask)[0]
    )
    expected = embed(regions, np.ones((3, 5), bool))
    np.testing.assert_allclose(embed(regions[:, ::-1], np.ones((3, 5), bool)), expected, rtol=1e-4, atol=1e-5)
    padded = np.pad(regions, ((0, 0), (0, 2), (0, 0)), constant_values=100)
    np.testing.assert_allclose(embed(padded, np.arange(7) < np.full((3, 1), 5)), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(embed(padded, np.ones((3, 7), bool)) - expected).max() > 1e-2


def test_oracle_7_regions_touch_neither_the_first_blocks_nor_statistics(tower):
    image, variables, regions = tower
    grads, new = jax.jit(
        jax.grad(
            lambda p: (lambda out, new: (jnp.sin(out[0]).sum(), new))(
                *image.apply({**variables, "params": p}, None, train=True, regions=regions, mutable=["batch_stats"])
            ),
            has_aux=True,
        )
    )(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
    grads = jax.device_get(grads)
    touched = {name for name, g in grads.items() if any(np.any(x) for x in jax.tree.leaves(g))}
    assert touched == {"cls", "regions", "ln_pre", "block_1", "ln_post", "proj"}


def test_pooling_over_real_words_ignores_padding():
    c, _ = setup()
    text, end = TwoTower(c.model).text.clone(pool="max_masked"), c.model.text.eot_id
    ids = np.array([[7, 8, end, 0, 0, 0], [7, 8, end, 5, 9, 9]], np.int32)
    variables = initialise(text.init, ids)
    z = jax.jit(text.apply)(variables, ids)[0]
    np.testing.assert_allclose(z[0], z[1], rtol=1e-5)
    everything = jax.jit(text.clone(pool="max").apply)(variables, ids)[0]
    assert np.abs(everything[0] - everything[1]).max() > 1e-3


# The step


@pytest.fixture
def batch():
    rng, (c, _) = np.random.default_rng(3), setup()
    regions = rng.normal(size=(16, 4, c.model.image.region_dim)).astype(np.float32)
    regions[3], regions[5, 2:] = 0, 0
    tags = rng.integers(10, 4000, (16, c.model.text.context), np.int32)
    tags[7] = -1
    texts = {name: rng.integers(10, 4000, tags.shape, np.int32) for name in ("text", "summary")}
    images = {name: rng.integers(0, 256, (16, 16, 16, 3), np.uint8) for name in ("image", "local")}
    return {**BATCH, **images, **texts, "tags": tags, "regions": regions}


def test_oracle_g1_a_mesh_and_micro_batches_give_the_result_of_one_device(batch):
    c, method = setup()
    expected, state = run_steps(c, method, None, steps=2, devices=jax.devices()[:1], batch=batch)
    history, _ = run_steps(c, method, dict(data=2, fsdp=2, tensor=2), steps=2, batch=batch)
    terms = ("loss", *(f"loss_{image}_{text}" for image, text in TERMS))
    compare(history, expected, (*terms, "grad_norm"))
    statistics = state.extra["batch_stats"]["img"]["block_0"]["mlp"]["bn1"]
    assert np.abs(statistics["mean"]).max() > 1e-4
    # Without LeFF there are no statistics over the batch, and micro-batches change nothing.
    c, method = setup("model.image.front=0", "model.image.depth=1")
    expected, _ = run_steps(c, method, None, steps=2, devices=jax.devices()[:1], batch=batch)
    c.micro_batches = 4
    history, _ = run_steps(c, method, None, steps=2, devices=jax.devices()[:1], batch=batch)
    compare(history, expected, (*terms, "grad_norm"))


def compare(history, expected, names):
    for a, b in zip(history, expected, strict=True):
        for name in names:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)


# Configurations and whole runs


#: Parameters on top of CLIP's: nine LeFF with batch norms and 3x3 taps, the regions' projection with its layer norm.
MORE = 9 * (4 * 3072 + 2 * 768 + 9 * 3072) + 2052 * 768
COUNTS = {"b32": 151_277_313 + MORE, "b16": 149_620_737 + MORE, "rn50": 102_007_137 + 2052 * 2048 + 2 * 2048}


@pytest.mark.parametrize("variant, parameters", [("", None), ("smoke", None), *COUNTS.items()])
def test_variants_are_complete(variant, parameters):
    c = config.load(f"{CONFIG}:{variant}")
    config.validate(c)
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    method = make_method(c)
    assert set(c.pyramidclip) == {f.name for f in dataclasses.fields(Options)}
    assert [view.name for view in method.views] == ["image", "local", "text", "summary", "tags", "regions"]
    if parameters:
        batch = method.batch_spec(2)
        params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
        assert sum(x.size for x in jax.tree.leaves(params)) == parameters


def test_a_run_that_was_interrupted_goes_on_the_same_with_its_statistics(tmp_path):
    def run(name, *overrides):
        train.train(config.load(CONFIG, [*SMALL, *overrides]), tmp_path / name, lambda line: None)
        return losses(tmp_path / name), jax.device_get(load(tmp_path / name).extra)

    whole, extra = run("whole", "train.steps=4")
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    found, after = run("parts", "train.steps=4")
    assert found == whole and len(whole) == 4 and np.isfinite(list(whole.values())).all()
    jax.tree.map(np.testing.assert_array_equal, after, extra)
    z = load(tmp_path / "whole").embed_image(BATCH["image"])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_other_towers_are_refused():
    with pytest.raises(UserError, match="needs model.image.kind='pyramid_vit' or 'pyramid_resnet', not 'vit'"):
        make_method(config.load(str(REPO / "configs" / "clip.py"), ["method=pyramidclip"]))
