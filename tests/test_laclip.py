"""LaCLIP: the oracles of its specification, rewrites, LaCLIP-MT on meshes, layer norms on queries and keys, runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO
from helpers import TINY, interrupted, losses, unit
from model_helpers import BATCH, initialise, run_steps

from clip_jax import config, train
from clip_jax.data.loader import Loader
from clip_jax.data.order import randomness
from clip_jax.data.sources import MemorySource
from clip_jax.data.sources.columns import ColumnsSource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import RewritesView, TextVariants, TextView
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import make_method
from clip_jax.methods.laclip import Options, multi_text_infonce
from clip_jax.models.transformer import Attention, block_init
from clip_jax.models.vit import VisionTransformer

CONFIG = str(REPO / "configs" / "laclip.py")
REWRITES = ["first rewrite", "second rewrite", "third rewrite", "fourth rewrite"]
RECORD = {"image": np.zeros((16, 16, 3), np.uint8), "texts": ["the caption"], "rewrites": REWRITES}
WITH_REWRITES = {**BATCH, "text": np.random.default_rng(1).integers(10, 4000, (16, 5, 12), np.int32)}


def view(**fields):
    return TextView("text", 8, rewrites=("rewrites",), **fields)


def draws(view, record=RECORD, count=1000, epoch=0):
    return [view.caption(record, randomness(0, epoch, i)) for i in range(count)]


def setup(variant="", *overrides):
    c = config.load(f"{CONFIG}:{variant}", [*TINY, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


# The choice of a text


def test_oracle_c_all_texts_are_equally_likely_and_follow_from_seed_epoch_and_id():
    found = draws(view(), count=50_000)
    shares = {text: found.count(text) / 50_000 for text in ("the caption", *REWRITES)}
    assert len(set(found)) == 5 and all(abs(share - 0.2) < 0.01 for share in shares.values())
    assert draws(view(), count=1000) == found[:1000]
    same = np.mean([a == b for a, b in zip(draws(view(), epoch=1), found[:1000], strict=True)])
    assert abs(same - 0.2) < 0.05, "another epoch is independent"


@pytest.mark.parametrize("bad", ["", "dog", " dog ", "caf\udce9 noir"])
def test_oracle_d_a_rewrite_without_two_words_gives_way_to_the_caption(bad):
    assert set(draws(view(rewrite_prob=1.0), RECORD | {"rewrites": [bad]}, 20)) == {"the caption"}
    found = draws(view(rewrite_prob=1.0), RECORD | {"rewrites": [bad, "two words"]}, 2000)
    assert abs(found.count("two words") / 2000 - 0.5) < 0.05, (
        "the caption replaces it after the draw, so the other rewrite does not become more likely"
    )


@pytest.mark.parametrize("prob, expected", [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_the_chance_of_a_rewrite(prob, expected):
    found = draws(view(rewrite_prob=prob), count=4000)
    assert abs(1 - found.count("the caption") / 4000 - expected) < 0.03
    assert len(set(found) - {"the caption"}) == (4 if prob else 0)


def test_records_with_several_captions_fields_and_templates():
    five = RECORD | {"texts": [f"caption {k}" for k in range(5)], "rewrites": [f"rewrite {k}" for k in range(20)]}
    assert abs(np.mean([text.startswith("rewrite") for text in draws(view(), five, 5000)]) - 0.8) < 0.02
    several = TextView("text", 8, rewrites=("a", "b", "c"))
    found = draws(several, RECORD | {"a": "of a", "b": ["of b", "of bb"]}, 4000)
    assert {text: round(found.count(text) / 4000, 1) for text in set(found)} == dict.fromkeys(
        ["of a", "of b", "of bb", "the caption"], 0.2
    ) | {text: pytest.approx(0.25, abs=0.06) for text in set(found)}
    templated = view(templates=("{name}: {tags}",))
    assert set(draws(templated, RECORD | {"name": "Tom", "tags": "x"}, 60)) == {"Tom: x", *REWRITES}
    of_class = view(class_templates=("a {class_name}",), rewrite_prob=1.0)
    assert set(draws(of_class, RECORD | {"label": 0, "class_name": "cat"}, 20)) == {"a cat"}
    assert view(rewrite_prob=1.0).caption(RECORD, None) == "the caption", "evaluation uses the caption itself"


def test_rewrites_of_other_programs_are_a_text_file_for_each_family(tmp_path):
    for family in ("human", "coco"):
        (tmp_path / f"{family}.txt").write_text("".join(f"{family} line {k}\n" for k in range(3)))
    source = MemorySource([{"texts": [f"caption {k}"]} for k in range(3)])
    for family in ("human", "coco"):
        source = ColumnsSource(source, f"{tmp_path}/{family}.txt")
    both = TextView("text", 8, rewrites=("human", "coco"))
    assert {both.caption(source[1], np.random.default_rng(i)) for i in range(40)} == {
        "caption 1",
        "human line 1",
        "coco line 1",
    }


@pytest.mark.parametrize(
    "fields, record", [(dict(rewrite_prob=0.0), RECORD), ({}, RECORD | {"rewrites": []})], ids=["p=0", "M=0"]
)
def test_oracle_a_without_rewrites_batches_are_bit_identical_to_clips(fields, record):
    """The method shares CLIP's loss, so equal batches suffice. test_a_run compares losses."""
    records = [{**record, "texts": [f"a {k} b c d", "e f"]} for k in range(12)]
    batches = []
    for options in (dict(rewrites=("rewrites",), **fields), {}):
        text = TextView("text", 8, word_dropout=0.3, augment=("eda",), **options)
        loader = Loader(MemorySource(records), [text], make_tokenizer("sentencepiece"), batch_size=8, seed=0, threads=0)
        batches.append([next(loader)["text"] for _ in range(4)])
        loader.close()
    np.testing.assert_array_equal(*batches)


def test_all_texts_of_a_picture():
    tokenizer = make_tokenizer("sentencepiece")
    all_texts = RewritesView("text", 8, rewrites=("rewrites",), count=4)
    assert all_texts.shape == (5, 8)
    np.testing.assert_array_equal(all_texts(RECORD, None, tokenizer), tokenizer(["the caption", *REWRITES], 8))
    some = RECORD | {"rewrites": ["first rewrite", "one"]}
    expected = tokenizer(["the caption", "first rewrite", *["the caption"] * 3], 8)
    np.testing.assert_array_equal(all_texts(some, randomness(0, 0, 0), tokenizer), expected)
    two = RECORD | {
        "texts": ["caption one", "caption two"],
        "rewrites": ["of one", "also of one", "of two", "also of two"],
    }
    found = {
        tuple(map(tuple, dataclasses.replace(all_texts, count=2)(two, randomness(0, 0, i), tokenizer)))
        for i in range(20)
    }
    wanted = [["caption one", "of one", "also of one"], ["caption two", "of two", "also of two"]]
    assert found == {tuple(map(tuple, tokenizer(texts, 8))) for texts in wanted}
    np.testing.assert_array_equal(
        dataclasses.replace(all_texts, count=0)(RECORD, None, tokenizer), tokenizer(["the caption"], 8)
    )


@pytest.mark.parametrize("name", ["clip", "siglip", "align", "declip", "oner", "otter", "unicl", "zerovl", "clippo"])
def test_rewrites_are_a_view_of_every_method(name):
    c = config.load(str(REPO / "configs" / f"{name}.py"), ["data.rewrites=rewrites", "data.rewrite_prob=0.5"])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    text = next(v for v in make_method(c).views if isinstance(v, TextView))
    assert text.rewrites == ("rewrites",) and text.rewrite_prob == 0.5 and "rewrites" in text.fields


# LaCLIP-MT


U, V = unit(0, 12, 16), unit(1, 12, 5, 16)
DRAWN = jnp.arange(12) % 5


@functools.partial(jax.jit, static_argnums=3)
def mt(u, v, drawn, which):
    return multi_text_infonce(u, v, drawn, jnp.float32(9), which)


@pytest.mark.parametrize("which", ["sampled", "all"])
def test_oracle_b_one_text_or_equal_texts_are_clip(which):
    expected, expected_metrics = infonce(U, V[:, 0], 9.0)
    for texts in (V[:, :1], jnp.tile(V[:, :1], (1, 5, 1))):
        found, metrics = mt(U, texts, DRAWN % texts.shape[1], which)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value)


@pytest.mark.parametrize("which", ["sampled", "all"])
def test_the_loss_is_that_of_the_formula(which):
    def cross_entropy(logits):
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, axis=1)))

    def plain(u, v):
        to_text = sum(cross_entropy(9.0 * u @ v[:, j].T) for j in range(5)) / 5
        to_image = sum(cross_entropy(9.0 * v[:, j] @ u.T) for j in range(5)) / 5
        return 0.5 * (to_text + (to_image if which == "all" else cross_entropy(9.0 * v[jnp.arange(12), DRAWN] @ u.T)))

    expected, expected_grads = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(U, V)
    found, grads = jax.jit(jax.value_and_grad(lambda u, v: mt(u, v, DRAWN, which)[0], argnums=(0, 1)))(U, V)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_mesh_and_micro_batches_give_the_result_of_one_device():
    c, method = setup("mt")
    expected, _ = run_steps(c, method, None, steps=2, devices=jax.devices()[:1], batch=WITH_REWRITES)
    c.micro_batches = 2
    history, _ = run_steps(c, method, dict(data=4, fsdp=2, tensor=1), steps=2, batch=WITH_REWRITES)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "logit_scale"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


def test_the_text_that_finds_its_picture_is_drawn_for_each_example():
    _, method = setup("mt")
    params, extra = initialise(method.init, WITH_REWRITES)
    features = jax.jit(lambda rng: method.encode(params, extra, WITH_REWRITES, rng, True)[0]["drawn"])
    drawn = np.stack([features(jax.random.key(k)) for k in range(40)])
    assert drawn.min() == 0 and drawn.max() == 4 and all(len(set(column)) > 2 for column in drawn.T)
    assert len(set(drawn[0])) > 2


# Layer norms on queries and keys


def test_oracle_f_the_scale_of_queries_does_not_matter():
    def attention(eps):
        return Attention(2, block_init("bert", 16, 32, 1), qk_norm_eps=eps)

    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    for eps, same in ((1e-6, True), (None, False)):
        params = attention(eps).init(jax.random.key(1), x, x)["params"]
        params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        scaled = params | {"query": jax.tree.map(lambda p: 7.0 * p, params["query"])}
        before, after = (attention(eps).apply({"params": p}, x, x) for p in (params, scaled))
        assert (np.abs(before - after).max() < 1e-5) == same
        assert {k: v["scale"].shape for k, v in params.items() if k.endswith("_norm")} == (
            {f"{n}_norm": (8,) for n in ("query", "key")} if same else {}
        )


def test_an_image_tower_has_them_in_every_block():
    tower = VisionTransformer(16, 8, 16, 2, 2, 32, 8, qk_norm=True)
    params = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert all({"query_norm", "key_norm"} <= set(params[f"block_{i}"]["attn"]) for i in range(2))


# Configurations and whole runs


@pytest.mark.parametrize(
    "variant", ["", "smoke", "mt", "slip", "cc3m", "cc12m", "redcaps", "laion_b32", "laion_b16", "laion_l14"]
)
def test_variants_are_complete(variant):
    c = config.load(f"{CONFIG}:{variant}")
    config.validate(c)
    assert c.data.rewrites == ("rewrites",) and ("slip" == variant) == (c.method == "declip")
    if variant in ("", "smoke"):
        clip = config.load(f"{REPO}/configs/clip.py:{variant or 'emoji'}")
        changed = {key for key, *_ in config.differences(clip, c)}
        assert changed == {
            "method",
            "data.source",
            "data.rewrites",
            *(f"laclip.{f.name}" for f in dataclasses.fields(Options)),
        }
    c.model.text.update(dict(vocab_size=49408, eot_id=49407))
    text = next(v for v in make_method(c).views if isinstance(v, TextView))
    assert text.rewrites == ("rewrites",)
    assert type(text) is {"mt": RewritesView, "slip": TextVariants}.get(variant, TextView)
    if c.method == "laclip":
        assert set(c.laclip) == {f.name for f in dataclasses.fields(Options)}
    if variant in ("cc3m", "cc12m", "redcaps"):
        assert c.model.image.qk_norm and c.optim.lr == 1e-3 and c.optim.weight_decay == 0.5
        assert c.data.batch_size == 8192


def test_a_run(tmp_path):
    """Without rewrites the losses equal CLIP's bit for bit, otherwise not. An interrupted run resumes exactly."""

    def run(name, spec, *overrides):
        train.train(config.load(spec, [*TINY, *overrides]), tmp_path / name, lambda line: None)
        return losses(tmp_path / name)

    clip = run("clip", str(REPO / "configs" / "clip.py:emoji"), "train.steps=3")
    assert run("none", CONFIG, "train.steps=3", "data.rewrite_prob=0") == clip and len(clip) == 3
    whole = run("whole", CONFIG, "train.steps=3")
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    assert run("parts", CONFIG, "train.steps=3") == whole != clip
