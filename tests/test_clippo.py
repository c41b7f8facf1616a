"""CLIPPO: its size, big_vision's outputs, loss and gradients, the oracles of its specification, and whole runs."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from helpers import TINY, losses, unit
from model_helpers import initialise, run_steps

import clip_jax
from clip_jax import config, evaluate, train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluation import emoji
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import make_method
from clip_jax.models.common import l2_normalize
from clip_jax.runtime import sharding

CONFIG = str(REPO / "configs" / "clippo.py")
OURS = [o for o in TINY if not o.startswith(("model.text", "model.image.size"))] + [
    "model.image.size=32",
    "model.image.patch=16",
]


def tiny(*overrides):
    return config.load(CONFIG, [*OURS, *overrides])


def random_images(seed, count=16, channels=3, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


IDS = sharding.id_words(np.arange(16))
BATCH = {"image": random_images(0), "text": random_images(1, channels=1), "example_id": IDS}


@functools.cache
def start():
    """Returns `(method, params)`."""
    method = make_method(tiny("model.dtype=float32"))
    return method, initialise(method.init, BATCH)[0]


@pytest.mark.parametrize("variant, total", [("b16", 93_474_817), ("l16", 316_681_985)])
def test_published_parameter_counts(variant, total):
    c = config.load(f"{CONFIG}:{variant}")
    method = make_method(c)
    batch = method.batch_spec(2)
    params, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
    assert set(params) == {"img", "logit_scale"} and extra == {}
    assert sum(x.size for x in jax.tree.leaves(params)) == total


@pytest.mark.parametrize("folder", golden_files("bv_clippo"))
def test_golden_big_vision(folder):
    """Outputs, loss and gradients equal big_vision's one_tower on a checkpoint in its layout."""
    from clip_jax.interop.load import load

    imported, io = load(folder / "checkpoint.npz"), np.load(folder / "io.npz")
    method = make_method(imported.config)
    tower = {"images": io["image_nhwc"], "texts": io["text_image_nhwc"]}

    def to_pixels(x):
        return x * 127.5 + 127.5

    def forward(params, images):
        ids = sharding.id_words(np.arange(len(images)))
        batch = {"image": to_pixels(images), "text": to_pixels(tower["texts"]), "example_id": ids}
        features, _ = method.encode(params, {}, batch, jax.random.key(0), train=True)
        return method.loss(params, {}, features, batch, None)[0], features

    grad_fn = jax.jit(jax.value_and_grad(forward, argnums=(0, 1), has_aux=True))
    (loss, features), (grads, grad_image) = grad_fn(imported.params, tower["images"])
    tolerance = dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features["image"], io["zimg"], **tolerance)
    np.testing.assert_allclose(features["text"], io["ztxt"], **tolerance)
    scale = jnp.exp(imported.params["logit_scale"])
    np.testing.assert_allclose(
        scale * method.similarity(features["image"], features["text"]), io["logits"], **tolerance
    )
    np.testing.assert_allclose(loss, io["loss"], **tolerance)
    np.testing.assert_allclose(grad_image, io["grad_image"], **tolerance)
    expected = load(folder / "grads.npz").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), grads, expected)


def test_both_inputs_go_through_the_same_parameters():
    """One pass over both equals the two passes of the paper. The same image twice is a pair with cosine 1."""
    method, params = start()
    encode = jax.jit(lambda batch: method.encode(params, {}, batch, jax.random.key(0), train=True)[0])
    embed_image, features = jax.jit(method.embed_image), encode(BATCH)
    np.testing.assert_allclose(features["image"], embed_image(params, {}, BATCH["image"]), atol=1e-6)
    np.testing.assert_allclose(features["text"], jax.jit(method.embed_text)(params, {}, BATCH["text"]), atol=1e-6)
    before = np.asarray(jax.jit(method.image_features)(params, {}, BATCH["image"]))
    proj = jax.device_get(params["img"]["proj"])
    z = before @ proj["kernel"] + proj.get("bias", 0)
    np.testing.assert_allclose(l2_normalize(z), features["image"], atol=1e-5)
    np.testing.assert_allclose(
        features["text"], embed_image(params, {}, np.repeat(BATCH["text"], 3, axis=3)), atol=1e-6
    )
    features = jax.device_get(encode({**BATCH, "text": BATCH["image"]}))
    np.testing.assert_allclose(np.sum(features["image"] * features["text"], axis=1), 1, rtol=1e-6)


def test_swapped_roles_give_the_same_loss():
    method, params = start()
    z = {"image": unit(1, 16, 8), "text": unit(2, 16, 8)}
    swapped = {"image": z["text"], "text": z["image"]}
    loss = jax.jit(method.loss)
    value, swapped_value = (loss(params, {}, features, BATCH, None)[0] for features in (z, swapped))
    np.testing.assert_allclose(value, swapped_value, rtol=1e-6)


def test_the_gradient_is_the_sum_of_both_passes():
    method, params = start()

    def loss(image_params, text_params):
        features = {
            "image": method.embed_image(image_params, {}, BATCH["image"]),
            "text": method.embed_text(text_params, {}, BATCH["text"]),
        }
        return infonce(features["image"], features["text"], jnp.exp(params["logit_scale"]))[0]

    def one_pass(params):
        features, _ = method.encode(params, {}, BATCH, jax.random.key(0), train=True)
        return method.loss(params, {}, features, BATCH, None)[0]

    of_images, of_texts = (g["img"]["patch"]["kernel"] for g in jax.jit(jax.grad(loss, argnums=(0, 1)))(params, params))
    both = jax.jit(jax.grad(one_pass))(params)["img"]["patch"]["kernel"]
    np.testing.assert_allclose(both, np.add(of_images, of_texts), atol=2e-5)
    assert min(np.abs(of_images).max(), np.abs(of_texts).max()) > 1e-4


def test_accuracy_of_image_text_and_text_text_pairs_apart():
    z = [unit(i, 24, 4) for i in (0, 1)]
    z[1][:5] = z[0][:5]
    is_pair = np.arange(24) % 3 == 0
    similarity = z[0] @ z[1].T
    won = np.stack([similarity.argmax(axis) == np.arange(24) for axis in (0, 1)]).mean(0)
    method, params = start()

    @jax.jit
    def accuracies(is_pair):
        return method.loss(params, {}, {"image": z[0], "text": z[1]}, {"text_pair": is_pair}, None)[1]

    metrics = accuracies(is_pair.astype(np.int32))
    np.testing.assert_allclose(metrics["text_text_acc"], won[is_pair].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["image_text_acc"], won[~is_pair].mean(), rtol=1e-6)
    assert 0 < metrics["text_text_acc"] != metrics["image_text_acc"]
    assert accuracies(np.zeros(24, np.int32))["text_text_acc"] == 0


def history(sizes, *overrides):
    """Returns losses, gradient norms and accuracies of some steps on a mixed batch; on one device without `sizes`."""
    c, devices = tiny("model.image.patch_drop=0.5", *overrides), None if sizes else jax.devices()[:1]
    batch = {**BATCH, "text_pair": (np.arange(16) % 4 == 0).astype(np.int32)}
    steps, _ = run_steps(c, make_method(c), sizes, steps=3, devices=devices, batch=batch)
    return [[metrics[name] for name in ("loss", "grad_norm", "image_text_acc", "text_text_acc")] for metrics in steps]


@pytest.fixture(scope="module")
def expected():
    return history(None)


@pytest.mark.parametrize("sizes, micro_batches", [((8, 1, 1), 1), (None, 4), ((2, 2, 2), 4)])
def test_any_mesh_and_micro_batches_give_the_result_of_one_device(expected, sizes, micro_batches):
    sizes = sizes and dict(zip(sharding.AXES, sizes, strict=True))
    np.testing.assert_allclose(history(sizes, f"micro_batches={micro_batches}"), expected, rtol=2e-5)


def write_text(folder):
    (folder / "text.txt").write_text(" ".join(f"The story goes on in sentence {i}." for i in range(80)))
    return f"text:{folder}/text.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on image-text pairs and text-text pairs."""
    workdir = tmp_path_factory.mktemp("clippo")
    train.train(tiny(f"data.source=emoji*3 + {write_text(workdir)}*1", "train.steps=2"), workdir, lambda line: None)
    return workdir


def test_a_run_with_text_pairs_tells_their_accuracy_apart(trained):
    rows = list(map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()))
    assert {"image_text_acc", "text_text_acc"} <= rows[0].keys() and len(losses(trained)) == 2


def test_pairs_of_text_alone_train_the_same_way(tmp_path):
    train.train(
        tiny(f"data.source={write_text(tmp_path)}", "data.templates=()", "train.steps=2"),
        tmp_path / "run",
        lambda line: None,
    )
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()


def test_the_checkpoint_alone_embeds_texts(trained):
    """It contains the font, draws strings in any batch, and compares by the method's own functions."""
    model = clip_jax.load(trained)
    assert model.tokenizer == make_tokenizer("unifont")
    texts = ["a cat", "문어", "", "a very long text " * 50, "octopus"]
    z = model.embed_text(texts)
    assert z.shape == (5, 16) and z.dtype == np.float32
    embed = jax.jit(model.method.embed_text)
    np.testing.assert_allclose(z, embed(model.params, {}, model.tokenizer(texts, 32)), atol=1e-5)
    np.testing.assert_allclose(np.concatenate([model.embed_text(texts[:3]), model.embed_text(texts[3:])]), z, atol=1e-5)
    assert model.embed_text([]).shape == (0, 16)
    probabilities = model.classify(list(random_images(3, 2)), ["a cat", "문어"], templates=("{}", "a picture of {}"))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def test_another_font_is_refused(trained, tmp_path):
    font = tmp_path / "one.hex"
    font.write_text("0061:" + "10" * 16)
    c = tiny(f"data.source=emoji*3 + text:{trained}/text.txt*1", f"tokenizer=unifont:{font}", "train.steps=3")
    with pytest.raises(UserError, match="tokenizer was 'unifont', is now 'unifont:"):
        train.train(c, trained, lambda line: None)


def test_the_emoji_are_named_in_the_language_asked_for(trained):
    model = clip_jax.load(trained)
    korean, english = (
        evaluate.run(model, [f"emoji(subset='val', language={x!r})"], lambda line: None) for x in ("ko", "en")
    )
    assert {re.sub(r"^emoji_val_ko/", "emoji_val/", key) for key in korean.metrics} == set(english.metrics)
    names = korean.artefacts["classification"]["emoji_val_ko/unseen_concept_unseen_vendor"].class_names
    assert len(names) == 196 and all(re.search("[가-힣]", name) for name in names if not name.isascii())
    assert next(iter(emoji.summary(korean.metrics))).startswith("emoji_val_ko zero-shot")
    with pytest.raises(
        UserError, match=r"language='kr': no such names \(did you mean 'hr'|language='kr': no such names"
    ):
        evaluate.run(model, ["emoji(subset='val', language='kr')"], lambda line: None)


def test_a_font_in_the_place_of_tokens_is_refused(tmp_path):
    c = config.load(str(REPO / "configs" / "clip.py:emoji"), [*TINY, "tokenizer=unifont"])
    with pytest.raises(
        UserError, match="view 'text' needs token ids, which no font gives, but the tokenizer is unifont"
    ):
        train.train(c, tmp_path, lambda line: None)


def test_a_text_tower_is_refused():
    c = config.base()
    c.method = "clippo"
    with pytest.raises(
        UserError, match="one tower for images and texts, but the configuration has a section model.text"
    ):
        make_method(c)
