"""ALIP: the oracles of its specification, golden losses and averages, meshes, runs that resume with their averages."""

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
from clip_jax.data.records import BadRecord
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.inference import load
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.alip import PAIRS, Options, adaptive_infonce, similarities, weights
from clip_jax.methods.interface import make_method
from clip_jax.models.common import l2_normalize

CONFIG = str(REPO / "configs" / "alip.py")
N, SCALE = 12, 9.0
FEATURES = {
    name: l2_normalize(x + 0.5 * jax.random.normal(jax.random.key(9), (N, 16)))  # somewhat similar to each other
    for name, x in zip(("image", "text", "synthetic"), jax.random.normal(jax.random.key(0), (3, N, 16)), strict=True)
}
FOUND = jax.device_get(similarities(FEATURES))
#: Halfway between two similarities of the texts, so that some examples are gated and none is near the gate.
HALFWAY = {pair: np.float32(np.sort(s)[N // 2 - 1 : N // 2 + 1].mean()) for pair, s in FOUND.items()}
LOW = dict.fromkeys(PAIRS, np.float32(-1))

loss = functools.partial(jax.jit(adaptive_infonce), scale=np.float32(SCALE))


def pair(a, b):
    """The loss of each example, float32 `[N]`."""
    logits = SCALE * FEATURES[a] @ FEATURES[b].T
    return -(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)) + jnp.diagonal(jax.nn.log_softmax(logits, axis=0))) / 2


def two_clips(features=FEATURES):
    return sum(infonce(features["image"], features[text], SCALE)[0] for text in ("text", "synthetic"))


def setup(*overrides):
    c = config.load(CONFIG, [*TINY, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


# The loss


@pytest.mark.parametrize("file", golden_files("loss_alip_*.npz"))
def test_golden_weights_averages_loss_and_gradients(file):
    """Steps, each with the averages that the method's heads computed in the previous one."""
    g = np.load(file)
    _, method = setup("alip.momentum=0.99")
    names = {"text_synthetic": "raw_caption", "image_text": "image_raw", "image_synthetic": "image_caption"}
    extra = {"averages": {pair: jnp.float32(g[f"H_init_{name}"]) for pair, name in names.items()}}
    value = jax.jit(
        jax.value_and_grad(
            lambda f, averages, scale: adaptive_infonce(f, averages, scale), argnums=(0, 2), has_aux=True
        )
    )
    for k in range(len(g["loss"])):
        kinds = {"image": "image_features", "text": "raw_text_features", "synthetic": "caption_features"}
        features = {name: jnp.asarray(g[kind][k]) for name, kind in kinds.items()}
        _, extra = method.heads({}, extra, features, {}, None)
        for pair, name in names.items():
            np.testing.assert_allclose(extra["averages"][pair], g[f"H_{name}"][k], rtol=1e-4, atol=1e-5)
        of_sample, of_pair = weights(similarities(features), extra["averages"])
        for found, name in (
            (of_sample, "sample"),
            (of_pair["text"], "pair_raw"),
            (of_pair["synthetic"], "pair_caption"),
        ):
            np.testing.assert_allclose(found, g[f"weight_{name}"][k], rtol=1e-4, atol=1e-5)
        (found, metrics), (grads, of_scale) = value(features, extra["averages"], g["scale"])
        for a, b in (
            (found, "loss"),
            (metrics["loss_text"], "loss_raw"),
            (metrics["loss_synthetic"], "loss_caption"),
            (of_scale, "grad_scale"),
        ):
            np.testing.assert_allclose(a, g[b][k], rtol=1e-4, atol=1e-5, err_msg=b)
        for name, theirs in (("image", "grad_image"), ("text", "grad_raw_text"), ("synthetic", "grad_caption")):
            np.testing.assert_allclose(grads[name], g[theirs][k], rtol=1e-4, atol=1e-5, err_msg=theirs)


def test_the_loss_is_that_of_the_formula():
    below = {name: FOUND[name] - HALFWAY[name] for name in PAIRS}
    raw = np.exp(2 * below["text_synthetic"])
    of_text, of_synthetic = (np.where(raw < 1, np.exp(2 * below[f"image_{text}"]), 1) for text in ("text", "synthetic"))
    assert 2 < (raw < 1).sum() < N - 2 and (of_text > 1).any(), (
        "examples on both sides of the gate, and pair weights above 1"
    )
    terms = [
        np.mean(np.minimum(raw, 1) * w * pair("image", text))
        for w, text in ((of_text, "text"), (of_synthetic, "synthetic"))
    ]
    found, metrics = loss(FEATURES, HALFWAY)
    np.testing.assert_allclose(found, sum(terms), rtol=1e-5)
    np.testing.assert_allclose([metrics["loss_text"], metrics["loss_synthetic"]], terms, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight_sample"], np.minimum(raw, 1).mean(), rtol=1e-5)


def test_oracle_a_without_gammas_it_is_clip_twice():
    np.testing.assert_allclose(loss(FEATURES, HALFWAY, gamma_sample=0.0, gamma_pair=0.0)[0], two_clips(), rtol=1e-6)
    assert abs(loss(FEATURES, HALFWAY)[0] - two_clips()) > 1e-2


@pytest.mark.parametrize("gammas", [(2.0, 2.0), (7.0, 0.3)])
def test_oracle_b_consistent_texts_have_the_weight_1_for_any_gamma(gammas):
    averages = HALFWAY | {"text_synthetic": FOUND["text_synthetic"].min() - np.float32(0.01)}
    np.testing.assert_allclose(
        loss(FEATURES, averages, gamma_sample=gammas[0], gamma_pair=gammas[1])[0], two_clips(), rtol=1e-6
    )


def test_oracle_c_averages_move_by_a_hundredth_before_they_are_used():
    c, method = setup("alip.momentum=0.99")
    _, extra = initialise(method.init, BATCH | {"synthetic": BATCH["text"]})
    assert extra["averages"] == dict.fromkeys(PAIRS, 1)
    _, after = method.heads({}, extra, FEATURES, {}, None)
    for name in PAIRS:
        np.testing.assert_allclose(after["averages"][name], 0.99 + 0.01 * FOUND[name].mean(), rtol=1e-6)
    found, metrics = method.loss({"logit_scale": jnp.log(SCALE)}, after, FEATURES, {}, None)
    np.testing.assert_allclose(found, loss(FEATURES, after["averages"])[0], rtol=1e-5)
    assert metrics["average_image_text"] == after["averages"]["image_text"]


def test_oracle_d_exchanging_the_texts_changes_nothing():
    exchanged = {"image": FEATURES["image"], "text": FEATURES["synthetic"], "synthetic": FEATURES["text"]}
    averages = HALFWAY | {"image_text": HALFWAY["image_synthetic"], "image_synthetic": HALFWAY["image_text"]}
    np.testing.assert_allclose(loss(exchanged, averages)[0], loss(FEATURES, HALFWAY)[0], rtol=1e-6)


def test_oracle_e_weights_have_no_gradient():
    of_sample, of_pair = jax.device_get(weights(similarities(FEATURES), HALFWAY))

    def constant(features):
        return sum(
            infonce(features["image"], features[t], np.float32(SCALE), weights=of_sample * w)[0]
            for t, w in of_pair.items()
        )

    found, expected = (
        jax.jit(jax.grad(f))(FEATURES) for f in (lambda x: adaptive_infonce(x, HALFWAY, np.float32(SCALE))[0], constant)
    )
    for name in FEATURES:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-7)


def test_oracle_f_ranges_of_the_weights():
    of_sample, of_pair = weights(FOUND, HALFWAY)
    assert np.all((of_sample > 0) & (of_sample <= 1)) and np.any(of_sample == 1) and np.any(of_sample < 1)
    for w in of_pair.values():
        assert np.all(w[of_sample == 1] == 1) and np.all(w[of_sample < 1] != 1)


def test_oracle_g_half_below_the_average_weighs_1_over_e():
    of_sample, _ = weights(FOUND | {"text_synthetic": np.full(N, 0.2, np.float32)}, HALFWAY | {"text_synthetic": 0.7})
    np.testing.assert_allclose(of_sample, np.exp(-1), rtol=1e-6)


def test_oracle_h_equal_texts_are_twice_clip():
    features = FEATURES | {"synthetic": FEATURES["text"]}
    averages = HALFWAY | {"text_synthetic": np.float32(1 - 2e-3)}
    np.testing.assert_allclose(
        loss(features, averages)[0], 2 * infonce(features["image"], features["text"], SCALE)[0], rtol=1e-6
    )


# The step


def test_a_mesh_and_micro_batches_give_the_result_of_one_device():
    batch = {**BATCH, "synthetic": np.random.default_rng(5).integers(10, 4000, (16, 12), np.int32)}
    c, method = setup()
    expected, state = run_steps(c, method, None, steps=3, devices=jax.devices()[:1], batch=batch)
    averages = jax.device_get(state.extra["averages"])
    assert all(0 < x < 1 for x in averages.values())
    assert expected[0]["average_image_text"] != expected[2]["average_image_text"]
    c.micro_batches = 4
    history, state = run_steps(c, method, dict(data=2, fsdp=2, tensor=2), steps=3, batch=batch)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "logit_scale", "weight_sample", *(f"average_{name}" for name in PAIRS)):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
    for name in PAIRS:
        np.testing.assert_allclose(state.extra["averages"][name], averages[name], rtol=1e-5)


def test_texts_of_a_record():
    _, method = setup("data.word_dropout=0", "data.templates=()")
    tokenizer, (_, raw, synthetic) = make_tokenizer("sentencepiece"), method.views
    record = {"texts": ["a cat"], "synthetic": "a small animal"}
    np.testing.assert_array_equal(raw(record, None, tokenizer), tokenizer(["a cat"], 12)[0])
    np.testing.assert_array_equal(
        synthetic(record, np.random.default_rng(0), tokenizer), tokenizer(["a small animal"], 12)[0]
    )
    listed = record | {"synthetic": ["a cat", "a tiger"]}
    assert {synthetic.caption(listed, np.random.default_rng(i)) for i in range(30)} == {
        "a cat",
        "a tiger",
        "a cat, a tiger",
        "a tiger, a cat",
    }
    with pytest.raises(BadRecord, match="empty caption"):
        synthetic(record | {"synthetic": ""}, None, tokenizer)


# Configurations and whole runs


@pytest.mark.parametrize("variant", ["", "smoke", "b32"])
def test_variants_are_complete(variant):
    c = config.load(f"{CONFIG}:{variant}")
    config.validate(c)
    assert set(c.alip) == {f.name for f in dataclasses.fields(Options)}
    if variant == "b32":
        assert c.optim.no_decay == () and c.optim.grad_clip_norm == 1 and c.train.steps == 32 * 3678
        assert c.alip.to_dict() == vars(Options())
    else:
        changed = {
            key for key, *_ in config.differences(config.load(f"{REPO}/configs/clip.py:{variant or 'emoji'}"), c)
        }
        assert changed == {"method", "data.source", *(f"alip.{name}" for name in c.alip)}
    c.model.text.update(dict(vocab_size=49408, eot_id=49407))
    assert [view.name for view in make_method(c).views] == ["image", "text", "synthetic"]


def test_a_run_that_was_interrupted_goes_on_the_same_with_its_averages(tmp_path):
    def run(name, *overrides):
        train.train(config.load(CONFIG, [*TINY, *overrides]), tmp_path / name, lambda line: None)
        return losses(tmp_path / name), jax.device_get(load(tmp_path / name).extra["averages"])

    whole, averages = run("whole", "train.steps=4")
    before = load(interrupted(tmp_path / "whole", tmp_path / "parts", 2)).extra["averages"]
    found, after = run("parts", "train.steps=4")
    assert found == whole and after == averages and len(whole) == 4 and np.isfinite(list(whole.values())).all()
    assert all(1 > before[name] != averages[name] for name in PAIRS)
