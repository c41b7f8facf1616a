"""ZeroVL: the oracles of its specification, golden gradients of decoupled accumulation, token augmentation, a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from data_helpers import write_table
from helpers import TINY, interrupted, losses
from model_helpers import BATCH, run_steps

from clip_jax import config, train
from clip_jax.data.token_augment import tokens
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import TextView
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import make_method
from clip_jax.methods.zerovl import Options, draw, mix, mixed_infonce
from clip_jax.models.common import l2_normalize
from clip_jax.training.step import make_gradients, make_init

CONFIG = str(REPO / "configs" / "zerovl.py")
N = 12


def setup(*overrides):
    c = config.load(CONFIG, [*TINY, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


def rows(seed, b=N, e=16):
    return np.random.default_rng(seed).normal(size=(b, e)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


U, V = unit(rows(0)), unit(rows(1))
mixed = jax.jit(mix, static_argnums=2)


@functools.partial(jax.jit, static_argnums=3)
def value(u, v, lam, group=0):
    return mixed_infonce(u, v, 9.0, lam, group)[0]


def targets(lam, group=0, n=N):
    """Returns the whole matrix of targets by hand."""
    flip = np.arange(n).reshape(-1, group or n)[:, ::-1].reshape(-1)
    return lam * np.eye(n) + (1 - lam) * np.eye(n)[flip]


# The loss


def test_oracle_a_unmixed_is_clip_and_fully_mixed_is_clip_of_the_reversed():
    clip = jax.jit(infonce)
    np.testing.assert_allclose(value(U, V, 1.0), clip(U, V, 9.0)[0], rtol=1e-6)
    np.testing.assert_allclose(value(U, V, 0.0), clip(U, V[::-1], 9.0)[0], rtol=1e-6)


def test_oracle_b_reversal_exchanges_the_weights():
    x = rows(2)
    first, second = np.asarray(mixed(x, 0.3)), np.asarray(mixed(x, 0.7))
    np.testing.assert_allclose(first[::-1], second, rtol=1e-6)
    np.testing.assert_allclose(value(U[::-1], V[::-1], 0.3), value(U, V, 0.3), rtol=1e-6)
    # So lam can be restricted to 1/2 and above.
    np.testing.assert_allclose(value(unit(first), V, 0.3), value(unit(second), V, 0.7), rtol=1e-6)


@pytest.mark.parametrize("group", [0, 4, 3])
def test_oracle_c_targets(group):
    y = targets(0.3, group)
    np.testing.assert_allclose(y.sum(0), 1)
    np.testing.assert_array_equal(y, y.T)
    logits = 9.0 * U @ V.T
    expected = [-(y * np.asarray(jax.nn.log_softmax(x, axis=1))).sum(1).mean() for x in (logits, logits.T)]
    np.testing.assert_allclose(value(U, V, 0.3, group), np.mean(expected), rtol=1e-5)
    found = np.asarray(mixed(rows(3), 0.3, group))
    np.testing.assert_allclose(found, y @ rows(3), rtol=1e-4, atol=1e-6)
    if group == 3:
        np.testing.assert_allclose(
            found[1::3], rows(3)[1::3], rtol=1e-6, err_msg="the middle of an odd group is not mixed"
        )


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("file", golden_files("zerovl_dga_*.npz"))
def test_golden_oracle_d_gradients_in_parts_are_those_of_the_batch(file, micro_batches):
    """The engine's micro-batches are decoupled gradient accumulation."""
    g = np.load(file)
    lam, group = g["lam"], int(g["sub_batch"])
    of_text = "textmix" in file.name

    def encode(params, extra, batch, rng, train):
        text = jnp.tanh(batch["text"] @ params["W_text"])
        return {"image": l2_normalize(jnp.tanh(batch["image"] @ params["W_image"])), "text": text}, extra

    def loss(params, extra, features, batch, rng):
        text = l2_normalize(mix(features["text"], lam if of_text else 1.0, group))
        return mixed_infonce(features["image"], text, 1 / params["tau"], lam, group)

    method = dataclasses.replace(setup()[1], encode=encode, loss=loss)
    params = {name: g[name] for name in ("W_image", "W_text", "tau")}
    batch = {"image": g["x_image"] if of_text else mixed(g["x_image"], lam, group), "text": g["x_text"]}
    found, _, _, _, grads = jax.jit(make_gradients(method, micro_batches), static_argnums=4)(
        params, {}, batch, None, lambda p: p
    )
    np.testing.assert_allclose(found, g["loss"], rtol=5e-4, atol=1e-4)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, g[f"grad_{name}"], rtol=5e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("file", golden_files("loss_zerovl_mixup.npz"))
def test_golden_loss(file):
    g = np.load(file)

    def loss(u, v, tau):
        return mixed_infonce(u, v, 1 / tau, g["lam"])[0]

    found, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        g["image_features"], g["text_features"], g["tau"]
    )
    np.testing.assert_allclose(found, g["loss"], rtol=2e-4, atol=1e-4)
    for grad, name in zip(grads, ("grad_image", "grad_text", "grad_tau"), strict=True):
        np.testing.assert_allclose(grad, g[name], rtol=2e-4, atol=1e-4)


# The draws and the step


def test_oracle_f_the_coin_and_the_weight():
    keys = jax.random.split(jax.random.key(0), 4000)
    lam, of_images = jax.device_get(jax.jit(jax.vmap(lambda key: draw(Options(), key)))(keys))
    assert abs(of_images.mean() - 0.5) < 0.03 and (lam >= 0.5).all() and (lam <= 1).all()
    folded = np.maximum(*(lambda x: (x, 1 - x))(np.random.default_rng(0).beta(0.1, 0.1, 4000)))
    np.testing.assert_allclose(np.quantile(lam, [0.1, 0.2, 0.4]), np.quantile(folded, [0.1, 0.2, 0.4]), atol=0.04)
    assert abs(np.corrcoef(lam, of_images)[0, 1]) < 0.05
    lam, of_images = draw(Options(mix_alpha=0.0), jax.random.key(0))
    assert lam == 1 and not of_images


def test_oracle_f_one_modality_is_mixed_in_a_step():
    def check(share, which):
        _, method = setup(f"zerovl.mix_images={share}", "zerovl.mix_alpha=1")
        rng = jax.random.key(4)
        params, extra = jax.jit(method.init)(rng, BATCH)

        @jax.jit
        def run(params, extra, batch, rng):
            prepared = method.prepare(batch, rng)
            lam, of_images = draw(Options(mix_alpha=1.0, mix_images=share), rng)
            features, _ = method.encode(params, extra, prepared, rng, train=True)
            loss, _ = method.loss(params, extra, features, prepared, rng)
            text = features["text"] if which == "image" else mix(features["text"], lam)
            scale = jnp.exp(params["logit_scale"])
            expected, _ = mixed_infonce(features["image"], l2_normalize(text), scale, lam)
            embedding = method.embed_text(params, extra, batch["text"])
            return prepared, lam, of_images, features, embedding, loss, expected

        prepared, lam, of_images, features, embedding, loss, expected = jax.device_get(run(params, extra, BATCH, rng))
        images = np.asarray(BATCH["image"], np.float32)
        assert bool(of_images) == (which == "image") and 0.5 < lam < 0.99
        np.testing.assert_allclose(
            prepared["image"], lam * images + (1 - lam) * images[::-1] if of_images else images, rtol=1e-5
        )
        np.testing.assert_array_equal(prepared["text"], BATCH["text"])
        np.testing.assert_allclose(np.linalg.norm(features["image"], axis=1), 1, rtol=1e-5)
        assert np.abs(np.linalg.norm(features["text"], axis=1) - 1).min() > 1e-3, (
            "not yet normalised, since mixing comes first"
        )
        np.testing.assert_allclose(unit(features["text"]), embedding, atol=1e-5)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    seen = set()
    for share, which in ((1.0, "image"), (0.0, "text")):
        check(share, which)
        seen.add(which)
    assert seen == {"image", "text"}


def test_the_temperature_is_learned_or_constant():
    c, method = setup("zerovl.temperature=0.02")
    params, _ = jax.eval_shape(method.init, jax.random.key(0), BATCH)
    assert "logit_scale" not in params and method.constrain(params) is params
    features = {"image": U, "text": 3 * V}
    _, metrics = jax.jit(method.loss)({}, {}, features, {}, jax.random.key(0))
    np.testing.assert_allclose(metrics["logit_scale"], 50)
    _, method = setup()
    params, _ = jax.eval_shape(method.init, jax.random.key(0), BATCH)
    assert params["logit_scale"].shape == ()
    np.testing.assert_allclose(method.constrain({"logit_scale": jnp.float32(9)})["logit_scale"], np.log(100), rtol=1e-4)


@pytest.fixture(scope="module")
def one_device():
    c, method = setup("zerovl.mix_alpha=1", "zerovl.mix_group=8")
    return c, method, run_steps(c, method, None, steps=4, devices=jax.devices()[:1])[0]


@pytest.mark.parametrize("sizes, micro_batches", [((8, 1, 1), 2), ((2, 2, 2), 4)])
def test_a_mesh_and_micro_batches_give_the_result_of_one_device(one_device, sizes, micro_batches):
    c, method, expected = one_device
    c = c.copy_and_resolve_references()
    c.micro_batches = micro_batches
    history, _ = run_steps(c, method, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), steps=4)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "logit_scale"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


# Token augmentation


SENTENCEPIECE = make_tokenizer("sentencepiece")


def test_oracle_g_nothing_is_chosen_at_0():
    view = TextView("text", 16, augment=("tokens(0)",))
    for text in ("octopus", "a red apple", "x" * 300, "", "문어"):
        record = {"texts": [text or " ", "y"]}
        plain = dataclasses.replace(view, augment=())(record, np.random.default_rng(0), SENTENCEPIECE)
        np.testing.assert_array_equal(view(record, np.random.default_rng(0), SENTENCEPIECE), plain)


@pytest.mark.parametrize(
    "options", ["", "?sot=true", "?pad_with_eot=true", "?eot=false", "clip_bpe?mask=true", "wordpiece"]
)
def test_oracle_g_other_tokenizers(options, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\napple\n##s\n")
    spec = (
        f"wordpiece:{tmp_path}/vocab.txt"
        if options == "wordpiece"
        else options
        if "clip" in options
        else f"sentencepiece{options}"
    )
    tokenizer = make_tokenizer(spec)
    for text in ("red apples", "red apple " * 20):
        same = TextView("text", 9, augment=("tokens(0.0)",))({"texts": [text]}, np.random.default_rng(0), tokenizer)
        np.testing.assert_array_equal(same, tokenizer([text], 9)[0])
        assert same.dtype == np.int32
        masked = TextView("text", 9, augment=("tokens(1.0, mask=1.0, replace=0.0)",))(
            {"texts": [text]}, np.random.default_rng(0), tokenizer
        )
        expected = np.where(
            np.isin(same, list(tokenizer.special_ids | {tokenizer.pad_id, tokenizer.eot_id})), same, tokenizer.mask_id
        )
        np.testing.assert_array_equal(masked, expected)


def test_oracle_g_shares():
    ids, rng = list(range(300, 340)), np.random.default_rng(0)
    texts = [tokens(ids, rng, SENTENCEPIECE) for _ in range(500)]
    count = 40 * len(texts)
    assert abs(sum(map(len, texts)) / count - 0.92) < 0.01
    masked = sum(text.count(SENTENCEPIECE.mask_id) for text in texts)
    assert abs(masked / count - 0.1) < 0.01
    random = [i for text in texts for i in text if i not in ids and i != SENTENCEPIECE.mask_id]
    assert abs(len(random) / count - 0.02) < 0.005 and not set(random) & SENTENCEPIECE.special_ids
    assert max(random) < 4096
    for text in texts:
        kept = [i for i in text if i in ids]
        assert len(kept) > 20 and sum(a > b for a, b in zip(kept, kept[1:], strict=False)) <= 1, (
            "in order, except for a random one"
        )


def test_a_text_never_loses_all_its_tokens():
    rng = np.random.default_rng(0)
    assert {len(tokens([500], rng, SENTENCEPIECE)) for _ in range(100)} == {1}
    assert [len(tokens([500, 501], rng, SENTENCEPIECE, 1.0, 0.0, 0.0)) for _ in range(9)] == [1] * 9
    assert tokens([], rng, SENTENCEPIECE) == []


def test_evaluation_changes_nothing():
    view = TextView("text", 16, augment=("tokens(0.9)",))
    np.testing.assert_array_equal(
        view({"texts": ["a red apple"]}, None, SENTENCEPIECE), SENTENCEPIECE(["a red apple"], 16)[0]
    )


# Configurations and whole runs


@pytest.mark.parametrize("variant", ["", "smoke", "b16", "b16_1024"])
def test_variants_are_complete(variant):
    c = config.load(f"{CONFIG}:{variant}")
    config.validate(c)
    assert c.method == "zerovl" and c.data.sampling == "one_source"
    if variant.startswith("b16"):
        c.model.text.update(dict(vocab_size=30522, eot_id=102))
        assert c.data.batch_size == 1024 * c.micro_batches
        assert c.train.steps * c.data.batch_size == pytest.approx(20 * 14.2e6, rel=1e-3)
        assert c.zerovl.temperature == 0.02 and c.optim.no_decay == ()
        assert c.model.image_mean == (0.485, 0.456, 0.406) and c.model.image.act == "gelu"
        method = make_method(c)
        batch = method.batch_spec(2)
        params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
        make_init(c, method, batch)
        assert params["img"]["proj"]["kernel"].shape == (768, 512) and "bias" not in params["img"]["proj"]
    else:
        clip = config.load(f"{REPO}/configs/clip.py:{variant or 'emoji'}")
        assert {key for key, *_ in config.differences(clip, c) if not key.startswith("zerovl")} == {
            "method",
            "data.source",
            "data.sampling",
        }


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [{"name": f"a thing number {i}", "tags": ["t"], "vendor": f"v{i % 2}"} for i in range(40)]
    return write_table(tmp_path_factory.mktemp("zerovl"), rows)


def test_a_run_that_was_interrupted_goes_on_the_same(table, tmp_path):
    def run(folder, steps):
        c = config.load(CONFIG, [*TINY, f"data.source={table}?by=vendor", f"train.steps={steps}"])
        train.train(c, tmp_path / folder, lambda line: None)
        return losses(tmp_path / folder)

    whole = run("whole", 4)
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    assert run("parts", 4) == whole and len(whole) == 4 and np.isfinite(list(whole.values())).all()
