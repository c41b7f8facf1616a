"""OneR: the oracles of its specification, MoCo v3's contrast and heads, masks, the published rows, meshes, a run."""

import base64
import functools
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPO, golden_files
from data_helpers import EOT, texts
from helpers import TINY, losses
from model_helpers import BATCH, initialise, run_steps
from PIL import Image

import clip_jax
from clip_jax import config, train
from clip_jax.data.sources import MemorySource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluation import tasks
from clip_jax.evaluation.report import alignment
from clip_jax.evaluation.report.page import Page
from clip_jax.inference import Model
from clip_jax.methods.interface import make_method
from clip_jax.methods.oner import OneR, contrast, mix
from clip_jax.models.common import l2_normalize
from clip_jax.models.heads import MlpHead
from clip_jax.models.masking import mask_patches, mask_words
from clip_jax.models.one_tower import OneTower, patch_pixels, real_tokens
from clip_jax.runtime import sharding

CONFIG = str(REPO / "configs" / "oner.py")
ROWS = ("itc", "itc_two_heads", "itc_xmc", "itc_xmc_cic", "itc_cmc")
OURS = [o for o in TINY if not o.startswith(("model.text", "checkpoint"))] + [
    "oner.head_width=24",
    "oner.predictor=true",
    "oner.teacher_augment=()",
]
EVERY_TERM = [f"oner.{term}=1" for term in ("itc", "xmc", "cic", "cmc", "mim", "mlm", "joint_mim", "joint_mlm")]
#: Large steps would amplify rounding, through BatchNorm, more on one kind of CPU than on another.
ENGINE = [*EVERY_TERM, "oner.mim_target=teacher", "oner.head_width=32", "optim.lr=0.03"]


def tiny(*overrides, row="itc_cmc"):
    c = config.load(f"{CONFIG}:small_{row}", [*OURS, *overrides])
    return config.resolve(c, make_tokenizer(c.tokenizer))


PAIRS = {**BATCH, "text": texts(0)}


#: Options that leave the initial parameters as they are: tests share these, whose program takes long to compile.
SAME_START = tuple(f"oner.{x}" for x in "cic_kv embed joint_bn joint_cls mim_loss mix momentum".split())


@functools.cache
def initial(*overrides, row):
    return initialise(OneR(tiny(*overrides, row=row)).init, PAIRS)


def start(*overrides, row="itc_cmc"):
    """Returns `(oner, params, extra)`."""
    others = [o for o in overrides if not o.startswith((*SAME_START, "train."))]
    return OneR(tiny(*overrides, row=row)), *initial(*others, row=row)


def objective(oner, params, extra, batch=PAIRS):
    """Returns `(loss, (metrics, extra))` like the train step."""
    features, extra = oner.encode(params, extra, batch, jax.random.key(1), train=True)
    features, extra = oner.heads(params, extra, features, batch, None)
    loss, metrics = oner.loss(params, extra, features, batch, None)
    return loss, (metrics, extra)


# The tower


@functools.cache
def tower(**fields):
    """Returns `(function of the inputs, images, ids, real)` of a tower with a vocabulary of 50."""
    module = OneTower(
        **dict(dict(size=16, patch=8, width=16, depth=2, heads=2, mlp_dim=32, vocab_size=50, context=6), **fields)
    )
    rng, ids = np.random.default_rng(0), texts(1, (3, 6), 50)
    images = rng.standard_normal((3, 16, 16, 3), np.float32)
    inputs = images, ids, ids == ids, "full", np.zeros((3, 4), bool), ids < 0
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(1))
    # Biases and positions are random too, and no program has to be compiled for the values.
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)
    apply = jax.jit(module.apply, static_argnums=4)
    return functools.partial(apply, params), images, ids, np.asarray(real_tokens(ids, EOT))


def test_block_diagonal_is_two_separate_passes_and_full_is_not():
    apply, images, ids, real = tower()
    alone_image, alone_text = apply(images)["image"], apply(None, ids, real)["text"]
    both = apply(images, ids, real, "block_diagonal")
    np.testing.assert_allclose(both["image"], alone_image, atol=2e-6)
    np.testing.assert_allclose(both["text"], alone_text, atol=2e-6)
    assert both["image"].shape == (3, 5, 16) and both["text"].shape == (3, 7, 16)
    full = apply(images, ids, real, "full")
    assert np.abs(full["image"] - alone_image).max() > 1e-2 and np.abs(full["text"] - alone_text)[:, 0].max() > 1e-2


@pytest.mark.parametrize("mode", ["off_diagonal", "off_diagonal_self"])
def test_off_diagonal_sees_the_other_modality_alone(mode):
    apply, images, ids, real = tower(depth=1)

    def image_cls(images, ids):
        return apply(images, ids, real, mode)["image"][:, 0]

    gradient = jax.jit(jax.grad(lambda images: (image_cls(images, ids) ** 2).sum()))(images)
    np.testing.assert_array_equal(gradient, 0)
    other = ids.copy()
    other[:, 1] = 7
    assert np.abs(image_cls(images, other) - image_cls(images, ids)).max() > 1e-3

    def text_cls(images):
        return apply(images, ids, real, mode)["text"][:, 0]

    assert np.abs(text_cls(images + 1) - text_cls(images)).max() > 1e-3


def test_keys_of_the_other_modality_from_its_cross_or_self_attended_states():
    """Both agree in the first layer, whose keys are embeddings. The second layer's are states under F(T|T)."""
    apply, images, ids, real = tower(depth=1)
    np.testing.assert_allclose(
        apply(images, ids, real, "off_diagonal")["image"],
        apply(images, ids, real, "off_diagonal_self")["image"],
        atol=2e-6,
    )
    apply, images, ids, real = tower()
    cross, self_ = (apply(images, ids, real, mode)["image"] for mode in ("off_diagonal", "off_diagonal_self"))
    assert np.abs(cross - self_).max() > 1e-3
    # Patch j reaches the image's CLS by two layers of cross-attention (image, text, image), but not through F(T|T).
    of_cls = {
        mode: lambda x, mode=mode: (apply(x, ids, real, mode)["image"][:, 0] ** 2).sum()
        for mode in ("off_diagonal", "off_diagonal_self")
    }
    assert np.abs(jax.jit(jax.grad(of_cls["off_diagonal"]))(images)).max() > 1e-4
    np.testing.assert_array_equal(jax.jit(jax.grad(of_cls["off_diagonal_self"]))(images), 0)


@pytest.mark.parametrize("mode", ["block_diagonal", "off_diagonal", "off_diagonal_self", "full", "full_one_cls"])
def test_padding_never_influences_anything(mode):
    apply, images, ids, real = tower()
    padded = np.where(real, ids, np.random.default_rng(9).integers(5, 50, ids.shape, np.int32))
    other = ids.copy()
    other[:, 0] = 7
    a, b, changed = (jax.device_get(apply(images, x, real, mode)) for x in (ids, padded, other))
    kept = np.pad(real, ((0, 0), (1, 0)), constant_values=True)[..., None]
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["text"] * kept, b["text"] * kept)
    difference = np.abs(changed["text"][:, 0] - a["text"][:, 0]).max()
    # In the last mode the text's CLS attends to states of the picture alone.
    assert difference == 0 if mode == "off_diagonal_self" else difference > 1e-4


def test_one_cls_for_both_is_seen_alone():
    apply, images, ids, real = tower()
    full, one = (apply(images, ids, real, mode)["image"][:, 0] for mode in ("full", "full_one_cls"))
    assert np.abs(full - one).max() > 1e-3
    assert np.abs(one - apply(images)["image"][:, 0]).max() > 1e-3, "it attends to the words"


@pytest.mark.parametrize("stem", [(), (4, 8, 8)])
def test_what_is_hidden_does_not_show(stem):
    apply, images, ids, real = tower(stem=stem)
    patches = np.arange(4) == np.array([[1], [2], [3]])
    words = (np.arange(6) == 1) & real
    changed_images = np.where(patches.reshape(3, 2, 2).repeat(8, 1).repeat(8, 2)[..., None], np.float32(5), images)
    changed_ids = np.where(words, np.int32(9), ids)
    a = apply(images, ids, real, "full", patches, words)
    b = apply(changed_images, changed_ids, real, "full", patches, words)
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["text"], b["text"])
    assert np.abs(a["image"] - apply(images, ids, real, "full")["image"]).max() > 1e-2


def test_type_embedding_is_optional():
    for given in (True, False):
        module = OneTower(
            size=16, patch=8, width=16, depth=1, heads=2, mlp_dim=32, vocab_size=50, context=6, type_embedding=given
        )
        shapes = jax.eval_shape(
            module.init,
            jax.random.key(0),
            jnp.zeros((1, 16, 16, 3)),
            jnp.zeros((1, 6), jnp.int32),
            jnp.ones((1, 6), bool),
        )
        assert ("type" in shapes["params"]) == given


# Masks


def test_patches_are_hidden_per_example():
    keys = jax.random.split(jax.random.key(0), 6)
    mask = jax.jit(mask_patches, static_argnums=(1, 2))
    hidden = np.asarray(mask(keys, 10, 0.4))
    assert (hidden.sum(1) == 4).all() and len({tuple(row) for row in hidden}) > 1
    np.testing.assert_array_equal(hidden[2:4], mask(keys[2:4], 10, 0.4))


def test_words_are_chosen_as_bert_does():
    ids = texts(3, (2000, 20))
    real = np.asarray(real_tokens(ids, EOT))
    keys = jax.random.split(jax.random.key(0), len(ids))
    masks = jax.device_get(jax.jit(lambda *x: mask_words(*x, 0.15, (0.8, 0.1), 4000))(keys, ids, real))
    chosen = np.zeros(ids.shape, bool)
    np.put_along_axis(chosen, masks["positions"], masks["chosen"], axis=1)
    words = real.sum(1) - 1
    np.testing.assert_array_equal(chosen.sum(1), np.maximum(1, np.round(np.float32(0.15) * words)))
    assert not (chosen & (~real | (ids == EOT))).any(), "neither padding nor the end of the text"
    np.testing.assert_array_equal(np.take_along_axis(ids, masks["positions"], 1), masks["targets"])
    np.testing.assert_array_equal(masks["ids"][~chosen], ids[~chosen])
    assert not (masks["words"] & ~chosen).any()
    hidden, changed = masks["words"][chosen].mean(), (masks["ids"] != ids)[chosen].mean()
    assert abs(hidden - 0.8) < 0.03 and abs(changed - 0.1) < 0.02
    assert (masks["ids"][masks["words"]] == ids[masks["words"]]).all()


def test_pixels_of_patches():
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    pixels = np.asarray(patch_pixels(images, 8))
    np.testing.assert_array_equal(pixels[1, 2].reshape(8, 8, 3), images[1, 8:, :8])


# Contrast and heads


@pytest.mark.parametrize("file", golden_files("oner_moco_ctr_*.npz"))
def test_golden_contrast(file):
    g = np.load(file)
    (loss, _), grad = jax.jit(jax.value_and_grad(contrast, has_aux=True))(
        jnp.asarray(g["q"]), g["k"], float(g["temperature"])
    )
    np.testing.assert_allclose(loss, g["loss"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, g["grad_q"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", golden_files("oner_moco_heads.npz"))
def test_golden_heads(file):
    g = np.load(file)
    layers = {
        head: [g[key] for key in g.files if key.startswith(f"{head}.") and key.endswith("weight") and g[key].ndim == 2]
        for head in ("projector", "predictor")
    }
    heads = {head: MlpHead(tuple(len(kernel) for kernel in kernels)) for head, kernels in layers.items()}

    def variables(head, prefix=""):
        """Returns a head's parameters from PyTorch's sequence of linear layer, batch norm and ReLU."""
        params, stats, last = {}, {}, len(layers[head])
        for i in range(1, last + 1):
            fc, bn = f"{head}.{3 * (i - 1)}", f"{head}.{3 * (i - 1) + 1}"
            params[f"fc{i}"] = {"kernel": g[f"{fc}.weight"].T}
            if i < last:
                params[f"bn{i}"] = {"scale": g[f"{bn}.weight"], "bias": g[f"{bn}.bias"]}
            stats[f"bn{i}"] = {"mean": g[f"{prefix}{bn}.running_mean"], "var": g[f"{prefix}{bn}.running_var"]}
        return {"params": params, "batch_stats": stats}

    given = {head: variables(head) for head in heads}

    def forward(x):
        z, after_z = heads["projector"].apply(given["projector"], x, train=True, mutable=["batch_stats"])
        p, after_p = heads["predictor"].apply(given["predictor"], z, train=True, mutable=["batch_stats"])
        return jnp.sum(p * g["cotangent"]), (z, p, after_z, after_p)

    grad, (z, p, after_z, after_p) = jax.jit(jax.grad(forward, has_aux=True))(g["x"])
    np.testing.assert_allclose(z, g["z"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(p, g["p"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(grad, g["grad_x"], rtol=1e-3, atol=1e-3)
    for head, after in (("projector", after_z), ("predictor", after_p)):
        expected = {"batch_stats": variables(head, "after.")["batch_stats"]}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), after, expected)


@pytest.mark.parametrize("last_norm, names", [("plain", set()), ("affine", {"bn2"}), ("none", set())])
def test_the_end_of_a_head(last_norm, names):
    x = 3 + np.random.default_rng(0).standard_normal((32, 6), np.float32)
    head = MlpHead((5, 4), last_norm=last_norm)
    init = jax.jit(functools.partial(head.init_with_output, train=True))
    y, variables = jax.device_get(init(jax.random.key(1), x))
    assert set(variables["params"]) == {"fc1", "bn1", "fc2"} | names
    assert ("bias" in variables["params"]["fc2"]) == (last_norm == "none") and "bias" not in variables["params"]["fc1"]
    assert (np.abs(y.mean(0)).max() < 1e-5) == (last_norm != "none")


def test_means_are_blind_to_the_gap_and_itc_is_not():
    image, text, keys = np.random.default_rng(0).standard_normal((3, 12, 8), np.float32)
    gap = np.full(8, 2, np.float32)

    @functools.partial(jax.jit, static_argnames="how")
    def xmc(image, text, how):
        return contrast(mix(image, text, how), keys, 0.2)[0]

    np.testing.assert_allclose(xmc(image + gap, text - gap, "mean"), xmc(image, text, "mean"), rtol=1e-5)
    assert abs(xmc(image + gap, text - gap, "norm_mean") - xmc(image, text, "norm_mean")) > 1e-3
    itc = [jax.jit(contrast)(image + g, keys, 0.2)[0] for g in (gap, 0)]
    assert abs(itc[0] - itc[1]) > 1e-2


def test_collapsed_keys_cost_the_logarithm_of_the_batch():
    queries = np.random.default_rng(0).standard_normal((24, 8), np.float32)
    loss, accuracy = jax.jit(contrast)(queries, np.ones((24, 8), np.float32), 0.2)
    np.testing.assert_allclose(loss, 2 * 0.2 * math.log(24), rtol=1e-5)
    assert accuracy < 0.3  # a tie counts as wrong, except by rounding


def test_a_teacher_without_lag_is_the_student():
    """Without momentum, predictor and masks, XMC contrasts the student with itself: a positive pair has cosine 1."""
    overrides = ["oner.momentum=0", "oner.momentum_end=0", "oner.predictor=false", "oner.xmc=1"]
    oner, params, extra = start(*overrides, row="itc_xmc")

    @jax.jit
    def cosines(params, extra):
        changed = jax.tree.map(lambda x: x + 0.1, params)
        extra = oner.update(changed, extra, None, jnp.zeros((), jnp.int32))
        features, _ = oner.encode(changed, extra, PAIRS, jax.random.key(0), train=True)
        pairs = oner.heads(changed, extra, features, PAIRS, None)[0]["pairs"]["xmc"]
        return jnp.sum(l2_normalize(pairs[0][0]) * l2_normalize(pairs[0][1]), axis=1)

    np.testing.assert_allclose(cosines(params, extra), 1, rtol=1e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_statistics_of_both_modalities_or_of_each(joint):
    oner, params, extra = start(f"oner.joint_bn={joint}")
    shifted = np.zeros((16, 32), np.float32), np.ones((16, 32), np.float32)
    shifted[0][:, 0] = shifted[1][:, 1] = np.arange(16)
    run = jax.jit(oner._apply, static_argnums=0)
    (image, text), stats = jax.device_get(run("projector", params, extra["batch_stats"], shifted))
    np.testing.assert_allclose((image + text).mean(0), 0, atol=1e-4)
    assert (np.abs(image.mean(0)).max() < 1e-4) != joint, "statistics of each modality hide the gap"
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (stats["projector"], extra["batch_stats"]["projector"])), strict=True)
    )


# The objective


def test_no_gradient_reaches_the_teacher_and_the_student_gets_one():
    oner, params, extra = start(*ENGINE)

    def loss(teacher, params):
        return objective(oner, params, extra | {"teacher": teacher})[0]

    of_teacher, of_student = jax.jit(jax.grad(loss, argnums=(0, 1)))(extra["teacher"], params)
    for grad in jax.tree.leaves(of_teacher):
        np.testing.assert_array_equal(grad, 0)
    idle = [
        sharding.path_name(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(of_student)
        if not np.abs(grad).max() > 0
    ]
    assert idle == []


def test_the_teacher_follows_the_student():
    oner, params, extra = start("oner.momentum=0.9", "oner.momentum_end=0.9")
    assert extra["teacher"].keys() == {"tower", "projector"}, "no predictor"
    params, extra = jax.device_get((params, extra))
    moved, after, update = jax.tree.map(lambda x: x + 1, params), extra, jax.jit(oner.update)
    for step in range(3):
        after = update(moved, after, None, step)
    for a, b, c in zip(
        *map(jax.tree.leaves, (after["teacher"], extra["teacher"], {k: moved[k] for k in extra["teacher"]})),
        strict=True,
    ):
        np.testing.assert_allclose(a, c * (1 - 0.9**3) + b * 0.9**3, rtol=1e-5, atol=1e-6)


def test_the_momentum_rises_along_half_a_cosine():
    oner, params, extra = start("oner.momentum=0.5", "train.steps=4")
    ones, zeros = (
        jax.tree.map(np.ones_like, params),
        extra | {"teacher": jax.tree.map(np.zeros_like, extra["teacher"])},
    )
    update = jax.jit(oner.update)
    after = [jax.device_get(update(ones, zeros, None, step)["teacher"]) for step in range(4)]
    found = [1 - jax.tree.leaves(teacher)[0].ravel()[0] for teacher in after]
    np.testing.assert_allclose(found, [1 - 0.25 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)], rtol=1e-6)


TERMS = {"itc": {"itc"}, "itc_two_heads": {"itc"}, "itc_xmc": {"itc", "xmc"}, "itc_xmc_cic": {"itc", "xmc", "cic"}}
TERMS["itc_cmc"] = {"itc", "cmc", "mim", "mlm", "joint_mim", "joint_mlm"}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_table(row):
    oner = OneR(tiny(row=row))
    params, extra = jax.eval_shape(oner.init, jax.random.key(0), PAIRS)
    _, (metrics, after) = jax.eval_shape(functools.partial(objective, oner), params, extra)
    assert {name.removeprefix("loss_") for name in metrics if name.startswith("loss_")} == TERMS[row]
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, extra)
    assert set(params) - {"mim", "mlm"} == {"tower", "projector", "predictor"} | (
        {"projector_text", "predictor_text"} if row == "itc_two_heads" else set()
    )


def test_two_heads_are_one_projector_and_one_predictor_more():
    one, two = (
        jax.eval_shape(OneR(tiny(row=row)).init, jax.random.key(0), PAIRS)[0] for row in ("itc", "itc_two_heads")
    )

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(one["tower"]) == count(two["tower"])
    assert count(two) - count(one) == count((one["projector"], one["predictor"]))


@pytest.mark.parametrize("row", ROWS)
def test_published_variants(row):
    c = config.load(f"{CONFIG}:{row}", ["tokenizer=sentencepiece"])
    config.validate(c)
    c.model.text.update(dict(vocab_size=30522, eot_id=102))
    method = make_method(c)
    batch = method.batch_spec(2)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    block = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    embeddings = 768 * 768 + 768 + 196 * 768 + (30522 + 39) * 768
    masks = 2 * 768 if row == "itc_cmc" else 0
    assert sum(x.size for x in jax.tree.leaves(params["tower"])) == 12 * block + embeddings + masks + (1 + 2 + 2) * 768
    assert params["projector"]["fc3"]["kernel"].shape == (4096, 256)
    assert params["predictor"]["fc1"]["kernel"].shape == (256, 4096)
    assert batch["text"].shape == (2, 39) and "teacher_image" in batch


def test_masked_modelling_by_hand():
    """The loss of masked words is their mean over the batch, not over examples; that of images is over patches."""
    oner, params, extra = start()
    encode = jax.jit(functools.partial(oner.encode, train=True))
    features, _ = jax.device_get(encode(params, extra, PAIRS, jax.random.key(1)))
    assert all(features[name].shape == (16, 2) for name in TERMS["itc_cmc"] - {"itc", "cmc"})
    np.testing.assert_array_equal(features["mim"][:, 1], round(0.4 * 4))
    assert set(features["mlm"][:, 1]) == {1, 2}, "texts have up to 11 words"
    features["mlm"] = np.zeros((16, 2), np.float32)
    features["mlm"][:2] = [6, 3], [4, 1]

    @jax.jit
    def loss(features):
        return oner.loss(params, extra, oner.heads(params, extra, features, PAIRS, None)[0], PAIRS, None)

    metrics = loss(features)[1]
    np.testing.assert_allclose(metrics["loss_mlm"], 10 / 4)
    # At the start all words are about equally likely.
    assert abs(float(features["joint_mlm"].sum(0)[0] / features["joint_mlm"].sum(0)[1]) - math.log(4096)) < 0.3


@functools.cache
def loss_at_start(*overrides):
    oner, params, extra = start(*overrides)
    return float(jax.jit(functools.partial(objective, oner))(params, extra)[0])


@pytest.mark.parametrize(
    "changed, same",
    [
        (("oner.mim_target=teacher",), ()),
        (("oner.mim_loss=l2",), ()),
        (("oner.joint_cls=mean",), ()),
        (("oner.mix=norm_mean",), ()),
        (("oner.joint_bn=false",), ()),
        (("oner.cic=1", "model.image.depth=2", "oner.cic_kv=self"), ("oner.cic=1", "model.image.depth=2")),
    ],
)
def test_an_assumption_changes_the_loss(changed, same):
    assert abs(loss_at_start(*changed) - loss_at_start(*same)) > 1e-4


def test_256_pairs_are_learned():
    """ITC and CMC without masks. A predictor also learns the pairs, but does not align embeddings without it."""
    unmasked = [
        f"oner.{x}=0"
        for x in "mim mlm joint_mim joint_mlm image_mask text_mask joint_image_mask joint_text_mask".split()
    ]
    c = tiny(*unmasked, "oner.predictor=false", "oner.momentum=0.9", "oner.temperature=0.1", "oner.head_width=64",
             "model.embed_dim=32", "train.steps=60")  # fmt: skip
    oner = OneR(c)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (256, 16, 16, 3), np.uint8),
        "text": texts(5, (256, 12)),
        "example_id": sharding.id_words(np.arange(256)),
    }
    tx = optax.adam(3e-3)

    @jax.jit
    def init():
        params, extra = oner.init(jax.random.key(0), batch)
        return params, extra, tx.init(params)

    @jax.jit
    def step(i, params, extra, opt):
        def loss(params):
            features, new = oner.encode(params, extra, batch, jax.random.fold_in(jax.random.key(1), i), train=True)
            features, new = oner.heads(params, new, features, batch, None)
            return oner.loss(params, new, features, batch, None)[0], new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        params = optax.apply_updates(params, updates)
        return params, oner.update(params, new, None, i), opt

    params, extra, opt = init()
    for i in range(c.train.steps):
        params, extra, opt = step(i, params, extra, opt)
    z_image = np.asarray(jax.jit(oner.embed_image)(params, extra, batch["image"]))
    z_text = np.asarray(jax.jit(oner.embed_text)(params, extra, batch["text"]))
    similarity = z_image @ z_text.T
    for axis in (0, 1):
        assert (similarity.argmax(axis) == np.arange(256)).mean() > 0.95


# The engine


@pytest.fixture(scope="module")
def one_device():
    c = tiny(*ENGINE)
    return run_steps(c, make_method(c), None, steps=3, devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes, micro_batches", [((8, 1, 1), 1), ((2, 2, 2), 2), (None, 2)])
def test_any_mesh_and_micro_batches_give_the_result_of_one_device(one_device, sizes, micro_batches):
    """Masks are replayed, the heads' BatchNorm sees the whole batch, and teacher and statistics are the same."""
    c, (expected, expected_state) = tiny(*ENGINE, f"micro_batches={micro_batches}"), one_device
    sizes, devices = (dict(zip(sharding.AXES, sizes, strict=True)), None) if sizes else (None, jax.devices()[:1])
    history, state = run_steps(c, make_method(c), sizes, steps=3, devices=devices)
    for a, b in zip(history, expected, strict=True):
        for name in (
            "loss",
            "grad_norm",
            "modality_gap",
            *(f"loss_{term}" for term in (*TERMS["itc_cmc"], "xmc", "cic")),
        ):
            np.testing.assert_allclose(a[name], b[name], rtol=5e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), state.extra, expected_state.extra)
    for path, x in jax.tree_util.tree_leaves_with_path(state.extra["teacher"]):
        student = state.params
        for key in path:
            student = student[key.key]
        assert x.sharding == student.sharding, sharding.path_name(path)
    if devices is None and state.params["tower"]["block_0"]["mlp"]["fc1"]["kernel"].sharding.mesh.shape["fsdp"] == 2:
        assert not state.extra["teacher"]["tower"]["block_0"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated


def test_a_step_changes_the_statistics_that_evaluation_uses(one_device):
    oner, params, extra = start(*ENGINE)
    _, state = one_device
    changed = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), state.extra["batch_stats"], extra["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))
    params, extra = jax.device_get((state.params, state.extra))
    embed = jax.jit(oner.embed_text)
    z = np.asarray(embed(params, extra, PAIRS["text"]))
    np.testing.assert_allclose(embed(params, extra, PAIRS["text"][:3]), z[:3], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    extra["batch_stats"] = jax.tree.map(lambda x: x + np.arange(x.size), extra["batch_stats"])
    assert np.abs(z - embed(params, extra, PAIRS["text"])).max() > 1e-3


@pytest.mark.parametrize("embed", ["cls", "projector", "predictor"])
def test_what_evaluation_compares(embed):
    oner, params, extra = start(f"oner.embed={embed}")
    z = jax.eval_shape(oner.embed_image, params, extra, PAIRS["image"])
    assert z.shape == (16, 32 if embed == "cls" else 16)
    if embed == "cls":
        features, z = (jax.jit(f)(params, extra, PAIRS["image"][:2]) for f in (oner.image_features, oner.embed_image))
        assert np.abs(np.linalg.norm(features, axis=1) - 1).min() > 0.1
        np.testing.assert_allclose(l2_normalize(features), z, atol=1e-6)
    else:
        assert jax.eval_shape(oner.image_features, params, extra, PAIRS["image"]).shape == (16, 32)


def test_query_key_compares_as_training_does():
    @functools.cache
    def embed(modality, name):
        oner, params, extra = start(f"oner.embed={name}")
        return jax.jit(getattr(oner, f"embed_{modality}"))(params, extra, PAIRS[modality][:4])

    np.testing.assert_array_equal(embed("image", "query_key"), embed("image", "predictor"))
    np.testing.assert_array_equal(embed("text", "query_key"), embed("text", "projector"))
    assert np.abs(embed("text", "query_key") - embed("text", "predictor")).max() > 1e-3


# Zero-shot localisation


@pytest.mark.parametrize(("joint", "mode"), [("one", "full_one_cls"), ("mean", "full")])
def test_patches_and_words_are_compared_in_the_pass_of_both_together(joint, mode):
    oner, params, extra = start(f"oner.joint_cls={joint}")
    images, ids = PAIRS["image"][:3], PAIRS["text"][:3]
    real = np.asarray(real_tokens(ids, oner.eot_id))
    assert not real.all()
    found = np.asarray(jax.jit(oner.patch_similarity)(params, extra, images, ids))
    assert found.shape == (3, 4, 12)
    pixels = (images - oner.mean) / oner.std

    def expected(mode):
        states = jax.jit(functools.partial(oner.tower.apply, mode=mode))({"params": params["tower"]}, pixels, ids, real)
        patches, words = (np.asarray(states[name][:, 1:], np.float64) for name in ("image", "text"))
        patches, words = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (patches, words))
        return np.where(real[:, None], patches @ words.transpose(0, 2, 1), -np.inf)

    np.testing.assert_allclose(found, expected(mode), atol=2e-6)
    words = np.broadcast_to(real[:, None], found.shape)
    assert np.abs(found[words] - expected("block_diagonal")[words]).max() > 1e-3
    assert make_method(tiny(row="itc")).patch_similarity is None


def plant(params, ids):
    """Parameters of a tower without attention, in which white patches and the words `ids` have the same state."""
    tower = jax.tree.map(np.zeros_like, params["tower"])
    width = tower["cls"].shape[-1]
    one, other = np.tile([1.0, -1.0], width // 2), np.tile([1.0, 1.0, -1.0, -1.0], width // 4)  # orthogonal, mean 0
    words = np.tile(other, (len(tower["txt"]["embed"]["embedding"]), 1))
    words[ids] = one
    tower["txt"]["embed"]["embedding"] = words.astype(np.float32)
    tower["img"]["patch"]["kernel"] += np.float32(one / 192)
    tower["ln_post"]["scale"] += 1
    return {**params, "tower": tower}


def test_the_planted_patch_is_the_warmest_of_the_heat_map():
    """A white patch among black ones has the state of the word "cat"; the report shows it, for each place."""
    c = tiny()
    tokenizer, method = make_tokenizer(c.tokenizer), make_method(c)
    _, params, extra = start()
    model = Model(c, method, plant(params, tokenizer.encode("cat")), extra, tokenizer)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    places = [(0, 1), (1, 0), (1, 1)]
    for image, (row, column) in zip(images, places, strict=True):
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    source = MemorySource([{"image": image, "texts": [f"cat {i}"]} for i, image in enumerate(images)])
    result = tasks.retrieval_task(model, source, name="r")
    found = result.artefacts["alignment"]["r"]
    assert found.words == [["cat", str(i)] for i in range(3)]
    for similarity, place in zip(found.similarity, places, strict=True):
        assert similarity.shape == (2, 2, 3)
        expected = np.full((2, 2), -1.0)
        expected[place] = 1
        np.testing.assert_allclose(similarity[..., 0], expected, atol=1e-5)
        np.testing.assert_allclose(alignment.heat(similarity), expected / 2, atol=1e-5)
    page = found.draw(Page())
    pictures = re.findall(r'class="over" alt="heat map" src="data:image/png;base64,([^"]+)"', page)
    for picture, place in zip(pictures, places, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).astype(int)
        red = pixels[..., 0] - pixels[..., 2]
        assert pixels.shape == (2, 2, 4) and np.unravel_index(red.argmax(), (2, 2)) == place
        assert (red < 0).sum() == 3 and (pixels[..., 3] == 153).all()
    assert page.count("<span>all words</span><b>-0.50 – 0.50</b>") == 3
    model.params = jax.tree.map(lambda x: x * np.nan, model.params)
    with pytest.raises(UserError, match="3 of 3 embeddings are not finite"):
        model.patch_similarity(images, ["cat 0", "cat 1", "cat 2"])


def test_a_run_and_its_checkpoint(tmp_path):
    overrides = [
        "train.steps=2",
        "eval.steps=0",
        "eval.train_tasks=()",
        "oner.teacher_augment=resize,center_crop",
        "checkpoint.steps=2",
    ]
    c = config.load(f"{CONFIG}:smoke", [*OURS, *overrides])
    train.train(c, tmp_path, lambda line: None)
    assert np.isfinite(list(losses(tmp_path).values())).all() and len(losses(tmp_path)) == 2
    model = clip_jax.load(tmp_path)
    assert model.extra.keys() == {"teacher", "batch_stats"}
    z = model.embed_text(["a cat", "an octopus " * 20])
    assert z.shape == (2, 16)
    np.testing.assert_allclose(model.embed_image(PAIRS["image"])[:2], model.embed_image(PAIRS["image"][:2]), atol=1e-5)


# Configurations


def test_a_field_of_another_tower_is_refused():
    c = tiny().unlock()
    c.model.image.pool = "map"
    with pytest.raises(UserError, match="model.image.pool is no field of a tower for images and texts"):
        make_method(c)
