"""DeCLIP: the oracles of its specification, the released loss, masks, the queue on meshes, optional terms, runs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import model_helpers
import numpy as np
import pytest
import scipy.special
from conftest import REPO, golden_files
from data_helpers import EOT, texts
from helpers import TINY, interrupted, losses, unit
from model_helpers import initialise, run_steps

import clip_jax
from clip_jax import config, train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.losses.contrastive import filip, infonce, paired_keys
from clip_jax.losses.neighbors import enqueue, nearest, new_queue
from clip_jax.methods import declip as declip_module
from clip_jax.methods.declip import IMAGES, TERMS, DeCLIP, make, nt_xent
from clip_jax.methods.interface import make_method, resolve
from clip_jax.models.common import l2_normalize
from clip_jax.models.heads import MlpHead
from clip_jax.models.masking import mask_tokens
from clip_jax.models.one_tower import real_tokens
from clip_jax.runtime import sharding

CONFIG = str(REPO / "configs" / "declip.py")


def tiny(*overrides, variant="smoke"):
    given = [
        *TINY,
        "declip.head_width=24",
        "declip.predictor_width=8",
        "declip.queue_size=48",
        "declip.wait_for_queue=false",
    ]
    return resolve(config.load(f"{CONFIG}:{variant}", [*given, *overrides]), make_tokenizer("sentencepiece"))


def weights(**given):
    return [f"declip.{term}={given.get(term, 0)}" for term in TERMS]


BATCH = {
    "image": model_helpers.BATCH["image"],
    "image_2": np.random.default_rng(7).integers(0, 256, (16, 16, 16, 3), np.uint8),
    "image_3": np.random.default_rng(8).integers(0, 256, (16, 16, 16, 3), np.uint8),
    "text": texts(0, (16, 2, 12)),
    "example_id": model_helpers.BATCH["example_id"],
}


def start(*overrides):
    """Returns `(declip, params, extra)`."""
    declip = DeCLIP(tiny(*overrides))
    return declip, *initialise(declip.init, BATCH)


@pytest.fixture(scope="module")
def started():
    declip, params, extra = start()
    features = jax.jit(lambda params, seed: declip.encode(params, extra, BATCH, jax.random.key(seed), True)[0])
    return declip, params, extra, features


# The released loss


class Golden:
    """A golden file as the method's features, parameters and state."""

    def __init__(self, file):
        self.g = g = np.load(file)
        self.declip = declip = DeCLIP(tiny("model.logit_scale_max=4.605170186"))
        projector, predictor, mlm = (
            g[f"param.{name}.weight"] for name in ("projector.linear1", "predictor.linear1", "text_label_predictor")
        )
        width = len(projector)
        declip.modules["projector"] = MlpHead((width,) * 3, bias=True, last_norm="affine")
        declip.modules["predictor"] = MlpHead((len(predictor), width), bias=True, last_norm="none")
        declip.mlm = declip.mlm.clone(features=len(mlm))
        declip.options = dataclasses.replace(declip.options, queue_size=len(g["queue"]))
        self.params = {
            "logit_scale": g["param.logit_scale"],
            "projector": self.head("param.projector", 3),
            "predictor": self.head("param.predictor", 2),
            "mlm": {"kernel": g["param.text_label_predictor.weight"].T, "bias": g["param.text_label_predictor.bias"]},
        }
        queue = {"rows": g["queue"], "next": g["queue_ptr"], "filled": np.int32(0)}
        self.extra = {
            "queue": queue,
            "batch_stats": {
                "projector": self.stats("param", "projector", 3),
                "predictor": self.stats("param", "predictor", 1),
            },
        }
        labels = g["mlm_labels"]
        self.masks = {
            "positions": np.tile(np.arange(labels.shape[1]), (len(labels), 1)),
            "targets": np.maximum(labels, 0),
            "chosen": labels >= 0,
        }
        names = ("image_raw_1", "image_raw_2", "text_raw", "text_aug_raw", "word_features")
        self.inputs = tuple(g[name] for name in names)
        self.gradients = tuple(g[f"grad_{name}"] for name in names)

    def head(self, prefix, layers):
        """Returns a head's parameters. PyTorch names layers linear1, ... and a last one without batch norm `layer`."""
        g, params = self.g, {}
        for i in range(1, layers + 1):
            fc = f"{prefix}.linear{i}" if f"{prefix}.linear{i}.weight" in g else f"{prefix}.layer{i}"
            params[f"fc{i}"] = {"kernel": g[f"{fc}.weight"].T, "bias": g[f"{fc}.bias"]}
            if f"{prefix}.bn{i}.weight" in g:
                params[f"bn{i}"] = {"scale": g[f"{prefix}.bn{i}.weight"], "bias": g[f"{prefix}.bn{i}.bias"]}
        return params

    def stats(self, prefix, head, layers):
        return {
            f"bn{i}": {k: self.g[f"{prefix}.{head}.bn{i}.running_{k}"] for k in ("mean", "var")}
            for i in range(1, layers + 1)
        }

    def __call__(self, params, inputs):
        """Returns `(loss, (metrics, features, extra))`."""
        u1, u2, v, va, words = inputs
        features = {"image": jnp.stack([u1, u2], 1), "text": l2_normalize(jnp.stack([v, va], 1))}
        features["mlm"] = self.declip.masked_modelling(params, words, self.masks)
        features, extra = self.declip.heads(params, self.extra, features, None, None)
        loss, metrics = self.declip.loss(params, extra, features, None, None)
        return loss, (metrics, features, extra)


@pytest.mark.parametrize("file", golden_files("loss_declip_*.npz"))
def test_golden_loss(file):
    golden = Golden(file)
    g, close = golden.g, functools.partial(np.testing.assert_allclose, rtol=5e-4, atol=2e-5)
    (total, (metrics, features, extra)), (d_params, d_inputs) = jax.jit(
        jax.value_and_grad(golden, argnums=(0, 1), has_aux=True)
    )(golden.params, golden.inputs)
    close(total, g["loss_total"])
    close(0.25 * metrics["loss_clip"] + 0.75 * metrics["loss_multi_view"], g["loss_clip"])
    for term in ("nn", "simsiam", "mlm"):
        close(metrics[f"loss_{term}"], g[f"loss_{term}"])
    for k in (0, 1):
        close(features["projected"][:, k], g[f"z{k + 1}"])
        close(features["predicted"][:, k], g[f"p{k + 1}"])
    for x, expected in zip(d_inputs, golden.gradients, strict=True):
        close(x, expected)
    close(d_params["logit_scale"], g["grad_logit_scale"])
    for name, layers in (("projector", 3), ("predictor", 2)):
        jax.tree.map(close, d_params[name], golden.head(f"grad.{name}", layers))
    close(d_params["mlm"]["kernel"], g["grad.text_label_predictor.weight"].T)
    close(d_params["mlm"]["bias"], g["grad.text_label_predictor.bias"])
    stats = {
        "projector": golden.stats("bn_after", "projector", 3),
        "predictor": golden.stats("bn_after", "predictor", 1),
    }
    jax.tree.map(close, extra["batch_stats"], stats)
    features, search = jax.device_get(features), jax.jit(nearest)
    for k, name in enumerate(("nn_index_text", "nn_index_text_aug")):
        rows, index = search(features["text"][:, k], g["queue"])
        np.testing.assert_array_equal(index, g[name])
        np.testing.assert_array_equal(rows, g["queue"][g[name]])
    queue = jax.jit(golden.declip.update)(golden.params, extra, features, 0)["queue"]
    close(queue["rows"], g["queue_after_fifo"])
    assert queue["next"] == g["queue_ptr_after_fifo"]


# Oracles of the terms


def log_softmax(logits):
    return scipy.special.log_softmax(np.float64(logits), axis=1)


def parts(*overrides, image=None, text=None, queue=None, **more):
    """Returns `loss(log scale, **changed features) -> (loss, metrics)` of two image and two text views of 8 pairs."""
    declip = DeCLIP(tiny(*overrides))
    queue = {"rows": unit(4, 20, 16) if queue is None else queue, "next": 0, "filled": 0}
    base = {"image": image or (unit(0, 8, 16), unit(1, 8, 16)), "text": text or (unit(2, 8, 16), unit(3, 8, 16))} | more

    @jax.jit
    def of_features(log_scale, features):
        features = {name: jnp.stack(x, axis=1) if isinstance(x, tuple) else x for name, x in features.items()}
        return declip.loss({"logit_scale": log_scale}, {"queue": queue}, features, None, None)

    def loss(log_scale=3.0, **changed):
        return of_features(log_scale, base | changed)

    return loss


def test_oracle_1_simsiam():
    z = unit(0, 8, 24)
    loss = parts(*weights(simsiam=1), projected=(z, z), predicted=(z, z))
    np.testing.assert_allclose(loss()[0], -1, rtol=1e-6)
    far = parts(*weights(simsiam=1), projected=(z, z), predicted=(-3 * z, -z))
    np.testing.assert_allclose(far()[0], 1, rtol=1e-6)

    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda z: loss(projected=(z, z), predicted=(unit(5, 8, 24),) * 2)[0]))(z), 0
    )


def test_oracles_2_and_8_equal_views_are_clip():
    u, v = unit(0, 8, 16), unit(2, 8, 16)
    expected = jax.jit(lambda: infonce(l2_normalize(u), v, jnp.exp(jnp.float32(3.0)))[0])()
    one = parts(*weights(clip=1), image=(u,), text=(v,))
    np.testing.assert_allclose(one()[0], expected, rtol=1e-6)
    four = parts(*weights(clip=0.25, multi_view=0.75), image=(u, u), text=(v, v))
    np.testing.assert_allclose(four()[0], expected, rtol=1e-6)


def test_oracle_3_the_queue_holds_the_caption_itself():
    v, u = unit(2, 8, 16), unit(0, 8, 16)
    rows, search = np.concatenate([unit(9, 5, 16), v]), jax.jit(nearest)
    found, index = search(v, rows)
    np.testing.assert_array_equal(found, v)
    np.testing.assert_array_equal(index, np.arange(5, 13))
    np.testing.assert_array_equal(search(7.5 * v, rows)[1], index)
    loss = parts(*weights(nn=1), image=(u, u), text=(v, v), queue=rows)
    expected = -log_softmax(np.exp(3.0) * u @ v.T).diagonal().mean()
    np.testing.assert_allclose(loss()[0], expected, rtol=1e-5)


def test_oracle_4_neighbours_teach_images_alone():
    u, v = (unit(0, 8, 16), unit(1, 8, 16)), (unit(2, 8, 16), unit(3, 8, 16))
    loss = parts(*weights(nn=1))
    d_image, d_text = jax.jit(jax.grad(lambda u, v: loss(image=u, text=v)[0], argnums=(0, 1)))(u, v)
    assert all(np.abs(x).max() > 1e-3 for x in d_image)
    np.testing.assert_array_equal(np.stack(d_text), 0)


def test_neighbours_that_several_captions_share():
    """Such captions are negatives of each other, as in the released code, or excluded."""
    u, rows = unit(0, 8, 16), unit(4, 2, 16)
    v = rows[[0, 0, 0, 1, 1, 1, 1, 1]]
    given = dict(image=(u, u), text=(v, v), queue=rows)
    plain, skipping = (parts(*weights(nn=1), f"declip.skip_same_neighbor={x}", **given)()[0] for x in (False, True))
    logits = np.exp(3.0) * u @ v.T
    np.testing.assert_allclose(plain, -log_softmax(logits).diagonal().mean(), rtol=1e-5)
    same = (v @ v.T > 0.999) & ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(skipping, -log_softmax(np.where(same, -1e30, logits)).diagonal().mean(), rtol=1e-5)
    assert skipping < plain


def test_oracle_8_the_loss_is_linear_in_the_weights():
    z = unit(0, 8, 24)
    more = dict(projected=(z, z), predicted=(unit(5, 8, 24),) * 2, contrasted=(z, unit(6, 8, 24)), mlm=np.ones((8, 2)))
    terms = ("clip", "multi_view", "nn", "simsiam", "mlm", "simclr")
    alone = {term: parts(*weights(**{term: 1}), **more)()[0] for term in terms}
    given = dict(zip(terms, (0.1, 0.3, 0.2, 0.25, 0.5, 0.7), strict=True))
    np.testing.assert_allclose(
        parts(*weights(**given), **more)()[0], sum(w * alone[t] for t, w in given.items()), rtol=1e-5
    )


def test_oracle_g2_equal_embeddings():
    same = (np.tile(unit(0, 1, 16), (8, 1)),) * 2
    for term in ("clip", "multi_view", "nn"):
        np.testing.assert_allclose(parts(*weights(**{term: 1}), image=same, text=same)()[0], math.log(8), rtol=1e-6)


def test_simclr_is_the_plain_form():
    a, b = unit(0, 6, 8), unit(1, 6, 8)
    t = 0.2
    z = np.concatenate([a, b])
    logits = np.where(np.eye(12, dtype=bool), -np.inf, z @ z.T / t)
    expected = -log_softmax(logits)[np.arange(12), (np.arange(12) + 6) % 12].mean()
    np.testing.assert_allclose(jax.jit(nt_xent)(np.stack([3 * a, b], 1), t), expected, rtol=1e-5)


def test_the_scale_is_capped_with_a_gradient():
    loss = parts(*weights(clip=1))
    assert loss(8.0)[1]["logit_scale"] == pytest.approx(100, rel=1e-4)
    slope = jax.jit(jax.grad(lambda s: loss(s)[0]))
    assert abs(slope(8.0)) > 1e-3
    np.testing.assert_allclose(slope(2.0), (loss(2.01)[0] - loss(1.99)[0]) / 0.02, rtol=1e-2)
    declip = DeCLIP(tiny())
    for start, expected in ((1.0, 3.0), (4.0, 4.0), (9.0, 6.0)):
        assert declip.constrain({"logit_scale": jnp.float32(start), "other": 9.0}) == {
            "logit_scale": expected,
            "other": 9.0,
        }


def test_the_first_random_rows_may_be_waited_for():
    declip = DeCLIP(tiny(*weights(nn=1), "declip.wait_for_queue=true"))
    features, rows = {"image": unit(0, 8, 2, 16), "text": unit(2, 8, 2, 16)}, unit(4, 48, 16)

    @jax.jit
    def loss(filled):
        queue = {"rows": rows, "next": 0, "filled": filled}
        return declip.loss({"logit_scale": 3.0}, {"queue": queue}, features, None, None)[0]

    for filled, counts in ((0, False), (47, False), (48, True)):
        assert bool(loss(filled)) == counts


# The queue


@pytest.mark.parametrize("size, batches", [(10, [4, 4, 4, 4]), (10, [7, 7]), (4, [11]), (5, [5, 2, 9])])
def test_oracle_5_the_queue_is_first_in_first_out(size, batches):
    queue = jax.jit(new_queue, static_argnums=(1, 2))(jax.random.key(0), size, 3)
    random, given = np.asarray(queue["rows"]), np.zeros((0, 3), np.float32)
    np.testing.assert_allclose(np.linalg.norm(random, axis=1), 1, rtol=1e-5)
    rng, put = np.random.default_rng(1), jax.jit(enqueue)
    for n in batches:
        x = rng.standard_normal((n, 3), np.float32)
        queue, given = put(queue, x), np.concatenate([given, x])
        expected = np.concatenate([random[len(given) :], given[-size:]])
        np.testing.assert_array_equal(sorted(map(tuple, np.asarray(queue["rows"]))), sorted(map(tuple, expected)))
        assert queue["filled"] == min(len(given), size) and queue["next"] == len(given) % size
    assert not set(map(tuple, random)) & set(map(tuple, np.asarray(queue["rows"]))), "no initial row is left"


@pytest.mark.parametrize("batch, size", [(16, 64), (16, 24), (12, 64), (16, 63)])
def test_the_nearest_on_eight_devices(mesh8, batch, size):
    """The devices need divide neither size. The first of equal rows wins."""
    queries, rows = unit(0, batch, 8), np.array(unit(1, size, 8))
    rows[size - 1] = rows[3]
    expected = (queries @ rows.T).argmax(1)
    found, index = jax.jit(nearest)(queries, rows)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(found, rows[expected])


def test_no_device_holds_the_queue_or_all_similarities(mesh8):
    """Queries 2 MiB, rows 32 MiB, all similarities 1 GiB."""
    spread = sharding.batch_sharding(mesh8)
    shapes = [jax.ShapeDtypeStruct((n, 128), "float32", sharding=spread) for n in (4096, 65536)]
    compiled = jax.jit(nearest).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20


# Masks


def test_oracle_6_masks():
    ids, special = texts(3, (20_000, 20)), (0, EOT, 2, 9)
    mask_id = 4096
    ids[:, 0] = 2  # a token for the start

    @jax.jit
    def masked(ids):
        real, keys = real_tokens(ids, EOT), jax.random.split(jax.random.key(0), len(ids))
        masks = mask_tokens(keys, ids, real, 0.15, (0.8, 0.1), 4000, special, mask_id)
        return real, masks, real_tokens(masks["ids"], EOT)

    real, masks, real_after = jax.device_get(masked(ids))
    chosen = np.zeros(ids.shape, bool)
    np.put_along_axis(chosen, masks["positions"], masks["chosen"], axis=1)
    allowed = real & ~np.isin(ids, special)
    assert allowed.sum() > 1e5 and not (chosen & ~allowed).any()
    assert abs(chosen.sum() / allowed.sum() - 0.15) < 0.003
    np.testing.assert_array_equal(np.take_along_axis(ids, masks["positions"], 1), masks["targets"])
    np.testing.assert_array_equal(masks["ids"][~chosen], ids[~chosen])
    hidden, new = masks["ids"][chosen] == mask_id, masks["ids"][chosen]
    is_random = ~hidden & (new != ids[chosen])
    assert abs(hidden.mean() - 0.8) < 0.01 and abs(is_random.mean() - 0.1) < 0.01
    assert not np.isin(new[is_random], special).any() and new[is_random].max() < 4000 and new[is_random].min() < 9
    np.testing.assert_array_equal(real_after, real)
    assert len({tuple(row) for row in chosen}) > 1000, "drawn per example"


def test_oracle_7_modelling_at_the_start_and_without_a_masked_word(started):
    declip, params, _, encode = started
    features = encode(params | {"mlm": jax.tree.map(np.zeros_like, params["mlm"])}, 1)
    loss = parts(*weights(mlm=1), image=(unit(0, 16, 16),), text=(unit(2, 16, 16),), mlm=features["mlm"])
    np.testing.assert_allclose(loss()[0], math.log(4096), rtol=1e-5)
    assert features["mlm"][:, 1].sum() > 5
    value, grad = jax.jit(jax.value_and_grad(lambda x: loss(mlm=x)[0]))(np.zeros((16, 2), np.float32))
    assert value == 0 and np.isfinite(grad).all()


def test_the_mask_is_the_tokenizers_or_one_id_more():
    c = config.load(f"{CONFIG}:b32")
    c = resolve(c, make_tokenizer(c.tokenizer))
    assert (c.model.text.vocab_size, c.declip.mask_id, c.declip.special_ids) == (49409, 49406, (49406, 49407, 49408))
    declip = DeCLIP(c)
    assert declip.text.vocab_size == 49409 and declip.mlm.features == 49409
    c = config.load(f"{CONFIG}:b32", ["tokenizer=clip_bpe"])
    c = resolve(c, make_tokenizer(c.tokenizer))
    assert (c.model.text.vocab_size, c.declip.mask_id) == (49408, 49408)
    assert DeCLIP(c).text.vocab_size == 49409 and DeCLIP(c).mlm.features == 49409


def test_the_text_is_embedded_masked_or_as_it_is(started):
    declip, params, extra, encode = started
    first, second = jax.device_get((encode(params, 1), encode(params, 2)))
    assert np.abs(first["text"][:, 0] - second["text"][:, 0]).max() > 1e-3
    np.testing.assert_array_equal(first["text"][:, 1], second["text"][:, 1])
    clean = DeCLIP(tiny("declip.contrast_on_masked=false"))

    @jax.jit
    def encode_clean(params):
        features, _ = clean.encode(params, extra, BATCH, jax.random.key(1), True)
        return features, clean.towers.embed_text(params, extra, BATCH["text"][:, 0])

    ours, embedded = jax.device_get(encode_clean(params))
    np.testing.assert_allclose(ours["text"][:, 0], embedded, atol=1e-5)
    np.testing.assert_allclose(ours["mlm"], first["mlm"], rtol=1e-5)


# Terms that are switched off cost nothing


def passes(monkeypatch, *overrides):
    """Returns the views that pass each tower in a step, the parameters, the state and the shapes of views."""
    c, counts = tiny(*overrides), {"img": 0, "txt": 0}
    method, encode = make_method(c), declip_module.TwoTower._encode

    def count(self, tower, name, params, extra, x, *args, **kwargs):
        counts[name] += len(x) // 4
        return encode(self, tower, name, params, extra, x, *args, **kwargs)

    batch = {key: np.zeros(spec.shape, spec.dtype) for key, spec in method.batch_spec(4).items()}
    params, extra = jax.eval_shape(method.init, jax.random.key(0), batch)
    with monkeypatch.context() as patch:
        patch.setattr(declip_module.TwoTower, "_encode", count)
        jax.eval_shape(lambda p, e: method.encode(p, e, batch, jax.random.key(0), True), params, extra)
    return counts, set(params) - {"img", "txt", "logit_scale"}, set(extra), [view.shape for view in method.views]


@pytest.mark.parametrize(
    "given, expected",
    [
        (dict(clip=1), ((1, 1), set(), set())),
        (dict(clip=1, mlm=1), ((1, 1), {"mlm"}, set())),
        (dict(clip=1, simclr=1), ((3, 1), {"simclr"}, {"batch_stats"})),
        (dict(clip=1, simsiam=1), ((2, 1), {"projector", "predictor"}, {"batch_stats"})),
        (dict(clip=1, multi_view=1), ((2, 2), set(), set())),
        (dict(clip=1, nn=1), ((2, 2), set(), {"queue"})),
        (dict(clip=1, filip=1), ((1, 1), {"filip", "logit_scale_tokens"}, set())),
        (
            dict.fromkeys(TERMS, 1),
            (
                (3, 2),
                {"mlm", "simclr", "projector", "predictor", "filip", "logit_scale_tokens"},
                {"queue", "batch_stats"},
            ),
        ),
    ],
)
def test_a_term_of_weight_0_costs_nothing(monkeypatch, given, expected):
    counts, params, extra, shapes = passes(monkeypatch, *weights(**given))
    assert ((counts["img"], counts["txt"]), params, extra) == expected
    assert shapes == [(16, 16, 3)] * counts["img"] + [(counts["txt"], 12)]
    if given == dict(clip=1, mlm=1):
        assert passes(monkeypatch, *weights(**given), "declip.contrast_on_masked=false")[0] == {"img": 1, "txt": 2}


def test_filip_sees_the_first_views():
    declip, params, extra = start(*weights(filip=1))
    params["logit_scale_tokens"] = np.float32(5.5)  # above ln 100, which bounds the other scale
    assert declip.constrain(params)["logit_scale_tokens"] == 5.5

    @jax.jit
    def losses_of(params):
        features, _ = declip.encode(params, extra, BATCH, jax.random.key(1), True)
        given = features["tokens_img"], features["tokens_txt"], real_tokens(BATCH["text"][:, 0], EOT)
        expected = filip(*given, np.exp(5.5), paired_keys(*given))[0]
        return features, declip.loss(params, extra, features, BATCH, None)[0], expected

    features, loss, expected = losses_of(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert features["tokens_img"].shape[1:] == (4, 128) and "bias" in params["filip"]["img"], "patches only, by Linear"
    np.testing.assert_allclose(np.linalg.norm(features["tokens_txt"], axis=-1), 1, rtol=1e-5)


# The engine


ENGINE = ["declip.skip_same_neighbor=true"]


def steps(c, sizes, count, devices=None):
    return run_steps(c, make_method(c), sizes, steps=count, devices=devices, batch=BATCH)


@pytest.fixture(scope="module")
def one_device():
    return steps(tiny(*ENGINE), None, 3, jax.devices()[:1])


# Four devices: with eight on two busy cores XLA's collectives have waited for each other for ever.
@pytest.mark.parametrize("sizes, micro_batches", [((2, 2, 1), 2), (None, 4)])
def test_oracle_g1_any_mesh_and_micro_batches_give_the_result_of_one_device(one_device, sizes, micro_batches):
    c, (expected, expected_state) = tiny(*ENGINE, f"micro_batches={micro_batches}"), one_device
    sizes, devices = dict(zip(sharding.AXES, sizes, strict=True)) if sizes else None, jax.devices()[: 4 if sizes else 1]
    history, state = steps(c, sizes, 3, devices)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", *(f"loss_{term}" for term in TERMS[:5])):
            np.testing.assert_allclose(a[name], b[name], rtol=3e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), state.extra, expected_state.extra)
    assert state.extra["queue"]["filled"] == 48 and state.extra["queue"]["next"] == 0
    rows = state.extra["queue"]["rows"]
    shares = math.prod((sizes or {"data": 1, "fsdp": 1})[axis] for axis in ("data", "fsdp"))
    assert rows.addressable_shards[0].data.shape == (48 // shares, 16)


def test_a_run_resumes_bit_by_bit_with_its_queue(tmp_path):
    quick = ["eval.steps=0", "eval.train_tasks=()", "checkpoint.steps=2", "declip.queue_size=40"]
    quick += weights(clip=1, nn=1, simsiam=1)

    def run(name, steps):
        overrides = [*TINY, "declip.head_width=24", *quick, f"train.steps={steps}"]
        train.train(config.load(f"{CONFIG}:smoke", overrides), tmp_path / name, lambda line: None)

    run("whole", 3)
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    run("parts", 3)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert np.isfinite(list(whole.values())).all() and whole == parts and len(whole) == 3
    a, b = clip_jax.load(tmp_path / "whole"), clip_jax.load(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, a.extra, b.extra)
    assert int(a.extra["queue"]["next"]) == 3 * 32 % 40 and set(a.extra) == {"queue", "batch_stats"}
    assert a.embed_text(["a cat", "an octopus"]).shape == (2, 16)


# Configurations


def test_weights_of_the_variants():
    released, paper = (config.load(f"{CONFIG}:{name}").declip for name in ("b32", "b32_paper"))
    assert [released[t] for t in TERMS[:5]] == [0.1, 0.3, 0.2, 0.2, 0.2]
    assert [paper[t] for t in TERMS[:5]] == [0.4, 0.2, 0.2, 0.2, 0.2]
    assert config.load(f"{CONFIG}:b32_defilip").declip.filip == 0.2
    slip = config.load(f"{CONFIG}:b32_slip").declip
    assert [t for t in TERMS if slip[t]] == ["clip", "simclr"]
    assert (slip.simclr_width, slip.simclr_dim, slip.temperature) == (4096, 256, 0.1)


def test_the_scale_of_slip_has_the_bound_of_its_parameter_alone():
    bounds = {name: config.load(f"{CONFIG}:{name}").model.logit_scale_max for name in ("b32_slip", "b32_clip")}
    assert bounds == {"b32_slip": 6.0, "b32_clip": 4.6052}
    declip = DeCLIP(tiny(f"model.logit_scale_max={bounds['b32_slip']}"))
    np.testing.assert_allclose(declip.scale({"logit_scale": jnp.float32(5.5)}), np.exp(5.5), rtol=1e-6)
    assert declip.constrain({"logit_scale": jnp.float32(7.0)}) == {"logit_scale": 6.0}


def test_slip_contrasts_two_further_views_of_the_feature_before_the_projection():
    more = "declip.simclr_augment=('squash', 'flip')", "declip.simclr_width=24", "declip.simclr_dim=8"
    declip, params, extra = start(*weights(clip=1, simclr=1), *more)
    c = tiny(*weights(clip=1, simclr=1), *more)
    assert [view.augment for view in make(c).views[:3]] == [tuple(c.data.augment), *[("squash", "flip")] * 2]
    shapes = {name: layer["kernel"].shape for name, layer in params["simclr"].items() if name.startswith("fc")}
    width = params["img"]["ln_post"]["scale"].shape[0]
    assert shapes == {"fc1": (width, 24), "fc2": (24, 24), "fc3": (24, 8)} and "bn3" not in params["simclr"]

    @jax.jit
    def encode(params):
        features, _ = declip.encode(params, extra, BATCH, jax.random.key(1), True)
        return features, [declip.towers.encode_image(params, extra, BATCH[name])[1] for name in IMAGES[1:]]

    features, tokens = jax.device_get(encode(params))
    assert features["image"].shape[1] == 1 and features["feature"].shape[1:] == (2, width)
    for k in (0, 1):
        np.testing.assert_allclose(features["feature"][:, k], tokens[k].mean(1), rtol=1e-4, atol=1e-5)
