"""Frozen means frozen: parameters, running statistics, moving average and embeddings of what a run does not train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO
from helpers import TINY, tiny_config
from model_helpers import BATCH, BERT, EFFICIENTNET, initialise, run_steps, starting_state

import clip_jax
from clip_jax import config as config_lib
from clip_jax import train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.methods.interface import make_method, resolve
from clip_jax.models.common import FROZEN, mark_frozen, moving_average, unmark_frozen
from clip_jax.training import optimizers

RESNET = dict(kind="resnet", size=32, layers=(1, 1), width=8)
EFFICIENTNET = EFFICIENTNET | dict(stages=((8, 3, 3, 2, 1),), proj=True, stochastic_depth=0.5)
PYRAMID = dict(size=32, region_dim=8)
PYRAMID_VIT = PYRAMID | dict(kind="pyramid_vit", patch=16, width=16, depth=2, heads=2, mlp_dim=32, front=1)
PYRAMID_RESNET = PYRAMID | dict(kind="pyramid_resnet", layers=(1, 1), width=8)
CLIPPO = [o for o in TINY if not o.startswith("model.text")] + ["model.image.size=32", "model.image.patch_drop=0.5"]
FREEZE = dict(freeze=("^img/",))
FREEZE_SCALE = dict(freeze=("^img/", "^logit_scale$"))
BATCH = BATCH | {"image": np.random.default_rng(2).integers(0, 256, (16, 32, 32, 3), np.uint8)}
ONE_DEVICE, MESH = None, dict(data=2, fsdp=2, tensor=2)


def clip(image=None, optim=FREEZE, text=None, overrides=()):
    """Returns a configuration of CLIP and its method."""
    c = tiny_config("optim.lr=0.01", "model.image.size=32", *overrides).unlock()
    c.optim.update(optim)
    if image:
        c.model.image = image
    if text:
        c.model.text = text
    c = resolve(c.lock(), make_tokenizer(c.tokenizer))
    return c, make_method(c)


def start_and_end(c, method, sizes=ONE_DEVICE, batch=BATCH, steps=2):
    """Returns the states before and after some steps."""
    before, _ = starting_state(c, method, batch)
    _, after = run_steps(c, method, sizes, steps, None if sizes else jax.devices()[:1], batch)
    assert jax.tree.structure(before) == jax.tree.structure(after), "the state holds no marks"
    return before, jax.device_get(after)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize(
    "image, optim, sizes, overrides",
    [
        (RESNET, dict(lr_mult=(("^img/", 0),)), MESH, ["micro_batches=2"]),
        (PYRAMID_VIT, FREEZE_SCALE, ONE_DEVICE, ["micro_batches=2", "optim.ema_decay=0.7", "model.logit_scale_max=2"]),
    ],
)
def test_a_frozen_tower_stays(image, optim, sizes, overrides):
    c, method = clip(image, optim, overrides=overrides)
    start, end = start_and_end(c, method, sizes)
    assert same(start.params["img"], end.params["img"]) and same(start.extra, end.extra)
    assert jax.tree.leaves(end.extra["batch_stats"]["img"])
    assert not same(start.params["txt"], end.params["txt"])
    if end.ema:
        assert start.params["logit_scale"] == end.params["logit_scale"] > c.model.logit_scale_max
        assert same(end.ema["img"], end.params["img"]) and not same(end.ema["txt"], end.params["txt"])


def test_each_batch_norm_of_a_tower_that_is_frozen_in_part():
    frozen, moving = ("stem_bn", "mbconv_1_to_2"), ("mbconv_0",)
    freeze = tuple(f"^img/{name}/" for name in frozen)
    c, method = clip(EFFICIENTNET, dict(freeze=freeze), overrides=["model.scan=true", "micro_batches=2"])
    start, end = start_and_end(c, method)
    for tree in (lambda state: state.params["img"], lambda state: state.extra["batch_stats"]["img"]):
        for name in (*frozen, *moving):
            assert same(tree(start)[name], tree(end)[name]) == (name in frozen), name


@pytest.mark.parametrize(
    "image, text, overrides",
    [
        (EFFICIENTNET, None, []),
        (None, None, ["model.image.patch_drop=0.5"]),
        (None, BERT | dict(vocab_size=0, eot_id=-1, depth=1, dropout=0.5), []),
    ],
)
def test_a_frozen_tower_trains_as_it_is_evaluated(image, text, overrides):
    part, name = ("txt", "text") if text else ("img", "image")
    c, method = clip(image, dict(freeze=(f"^{part}/",)), text, overrides)
    batch = BATCH | {"text": BATCH["text"][:, :8]} if text else BATCH
    params, extra = initialise(method.init, batch)

    @jax.jit
    def encode(params, extra):
        marked = mark_frozen(extra, optimizers.frozen(c.optim, params))
        assert marked[FROZEN].keys() == {part}
        return method.encode(params, marked, batch, jax.random.key(1), train=True)[0][name]

    expected = jax.jit(method.embed_text if text else method.embed_image)(params, extra, batch[name])
    np.testing.assert_allclose(encode(params, extra), expected, atol=1e-5)


def test_the_one_tower_of_clippo():
    c = config_lib.load(str(REPO / "configs" / "clippo.py:smoke"), CLIPPO)
    c = resolve(c, make_tokenizer(c.tokenizer))
    method = make_method(c)
    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in method.batch_spec(2).items()}
    batch["image"] += jnp.asarray(BATCH["image"][:2])
    params, extra = initialise(method.init, batch)

    @jax.jit
    def encode(params, extra):
        marked = mark_frozen(extra, {"img": jax.tree.map(lambda x: True, params["img"]), "logit_scale": False})
        return method.encode(params, marked, batch, jax.random.key(1), train=True)[0]["image"]

    expected = jax.jit(method.embed_image)(params, extra, batch["image"])
    np.testing.assert_allclose(encode(params, extra), expected, atol=1e-5)


def head_inputs(method):
    rng = np.random.default_rng(0)
    if method == "declip":
        return {"image": rng.normal(size=(16, 2, 16)).astype(np.float32)}
    return {name: tuple(rng.normal(size=(2, 16, 32)).astype(np.float32)) for name in ("student", "teacher")}


HEADS = {
    "declip": ("smoke", ["declip.head_width=24", "declip.predictor_width=8", "declip.queue_size=48"]),
    "oner": ("small_itc", ["oner.head_width=24", "oner.predictor=true", "oner.teacher_augment=()"]),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_frozen_head_keeps_its_statistics(name):
    """The last norm of OneR's projector has no parameters: it is frozen with its head."""
    variant, overrides = HEADS[name]
    tiny = [o for o in TINY if name != "oner" or not o.startswith("model.text")]
    c = config_lib.load(str(REPO / "configs" / f"{name}.py:{variant}"), [*tiny, *overrides])
    c = resolve(c, make_tokenizer(c.tokenizer))
    c.optim.freeze = ("^projector/",)
    method = make_method(c)
    params, extra = initialise(method.init, method.batch_spec(16))
    marked = mark_frozen(extra, optimizers.frozen(c.optim, params))
    features, new = jax.jit(method.heads)(params, marked, head_inputs(name), None, None)
    stats, new = extra["batch_stats"], unmark_frozen(new)["batch_stats"]
    assert same(stats["projector"], new["projector"]) and not same(stats["predictor"], new["predictor"])


def test_a_resumed_run_keeps_the_frozen_tower(tmp_path):
    def run(steps):
        c = tiny_config("optim.freeze=^img/", f"train.steps={steps}").unlock()
        c.model.image = PYRAMID_VIT
        train.train(c.lock(), tmp_path, lambda line: None)
        model = clip_jax.load(tmp_path)
        return jax.device_get((model.params, model.extra))

    (start, stats), (end, stats_after) = run(1), run(2)
    assert same(start["img"], end["img"]) and same(stats, stats_after) and not same(start["txt"], end["txt"])


def test_the_average_of_a_constant_is_the_constant():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for decay in (0.0, 0.7, 0.996, 0.9999):
        assert same(x, moving_average(x, x, decay))
    np.testing.assert_allclose(moving_average(x, 2 * x, 0.75), 1.25 * x, rtol=1e-6)


def test_marks():
    norm, plain = {"mean": jnp.zeros(2), "var": jnp.ones(2)}, {"mean": jnp.ones(2), "var": jnp.ones(2)}
    extra = {"queue": jnp.zeros(3), "batch_stats": {"head": {"bn1": norm, "bn2": plain}, "img": {"bn": norm}}}
    nothing = {"head": {"bn1": {"scale": False}, "fc": {"kernel": False}}, "img": {"bn": {"scale": False}}}
    assert mark_frozen(extra, nothing) is extra

    def marks(head, norm, image):
        frozen = {"head": {"bn1": {"scale": norm}, "fc": {"kernel": head}}, "img": {"bn": {"scale": image}}}
        marked = mark_frozen(extra, frozen)
        assert jax.tree.structure(unmark_frozen(marked)) == jax.tree.structure(extra)
        paths = {"bn1": ("head", "bn1"), "bn2": ("head", "bn2"), "bn": ("img", "bn")}
        found = {name for name, (part, key) in paths.items() if FROZEN in marked["batch_stats"][part][key]}
        return set(marked[FROZEN]), found

    assert marks(True, True, False) == ({"head"}, {"bn1", "bn2"})
    assert marks(True, False, False) == (set(), set())
    assert marks(False, True, True) == ({"img"}, {"bn1", "bn"})
