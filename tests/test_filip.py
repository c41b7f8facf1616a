"""FILIP: the oracles of its specification, golden losses, memory, meshes, search and evaluation by tokens, runs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from data_helpers import EOT, texts
from helpers import TINY, interrupted, losses, unit
from model_helpers import BATCH, initialise, run_steps

import clip_jax
from clip_jax import config, search, train
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.evaluation import tasks
from clip_jax.evaluation.classifier import make_classifier
from clip_jax.evaluation.report import alignment, assembly
from clip_jax.evaluation.report.page import Page
from clip_jax.losses import contrastive
from clip_jax.losses.contrastive import paired_keys
from clip_jax.methods import filip as method_lib
from clip_jax.methods.filip import Options, late_interaction, select_keys
from clip_jax.methods.interface import make_method, resolve
from clip_jax.models.common import l2_normalize
from clip_jax.models.towers import image_tower
from clip_jax.runtime.sharding import batch_sharding, make_mesh

CONFIG = str(REPO / "configs" / "filip.py")
PAIRS = {**BATCH, "text": texts(0)}
N, P = 6, 5
L, D = 7, 16
REAL, SCALE = np.arange(L) < np.array([7, 1, 3, 5, 2, 6])[:, None], np.float32(9)


U, V = unit(0, N, P, D), unit(1, N, L, D)


@jax.jit
def loss(u, v, real=REAL):
    return contrastive.filip(u, v, real, jnp.asarray(SCALE))[0]


def directions(u, v, real):
    """Returns the similarities image to text `[n, m]` and text to image `[m, n]` by loops over pairs, in float64."""
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    i2t = [[(p @ w[r].T).max(1).mean() for w, r in zip(v, real, strict=True)] for p in u]
    t2i = [[(w[r] @ p.T).max(1).mean() for p in u] for w, r in zip(v, real, strict=True)]
    return np.array(i2t), np.array(t2i)


def padded(v, real):
    return np.asarray(v) * np.asarray(real)[..., None]


similarity = jax.jit(late_interaction)


def both(u, v, real):
    return np.asarray(similarity(u, padded(v, real))), np.asarray(similarity(padded(v, real), u))


def setup(*overrides, variant=""):
    c = config.load(f"{CONFIG}:{variant}", [*TINY, *overrides])
    c = resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


# The loss


@pytest.mark.parametrize("path", golden_files("loss_filip_paper_*.npz"))
def test_golden_similarities_of_both_directions(path):
    g = np.load(path)
    i2t, t2i = both(g["image_tokens"], g["text_tokens"], g["text_mask"])
    np.testing.assert_allclose(i2t, g["s_i2t"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t2i, g["s_t2i"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", golden_files("loss_filip_repo_*.npz"))
def test_golden_selection_by_the_own_partner(path):
    g = np.load(path)
    k, all_real = int(g["top_k"]), np.ones(g["text_tokens_raw"].shape[:2], bool)

    def objective(image, text, log_scale):
        u, v = l2_normalize(image), l2_normalize(text)
        keys = paired_keys(u, v, all_real, k) if k else None
        if k:
            assert keys[0].shape[1] == keys[1][0].shape[1] == k
        return contrastive.filip(u, v, all_real, jnp.exp(log_scale), keys)[0]

    args = g["image_tokens_raw"], g["text_tokens_raw"], g["log_scale"]
    value, grads = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))(*args)
    np.testing.assert_allclose(value, g["loss"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("image_tokens_raw", "text_tokens_raw", "log_scale"), strict=True):
        np.testing.assert_allclose(grad, g[f"grad_{name}"], rtol=1e-4, atol=1e-5, err_msg=name)


def test_oracle_g2_equal_embeddings_give_ln_n():
    u, v = np.broadcast_to(U[:1, :1], U.shape), np.broadcast_to(U[:1, :1], V.shape)
    np.testing.assert_allclose(loss(u, v), np.log(N), rtol=1e-6)


def test_oracle_1_of_one_token_each_it_is_clip_and_repeating_it_changes_nothing():
    u, v = U[:, :1], V[:, :1]
    expected = jax.jit(contrastive.infonce)(u[:, 0], v[:, 0], SCALE)[0]
    np.testing.assert_allclose(loss(u, v, np.ones((N, 1), bool)), expected, rtol=1e-6)
    repeated = np.repeat(u, P, 1), np.repeat(v, L, 1)
    np.testing.assert_allclose(loss(*repeated), expected, rtol=1e-5)


def test_oracle_2_padding_changes_nothing_and_has_no_gradient():
    value, grad = jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=1))(U, V))
    misleading = np.where(REAL[..., None], V, np.roll(U, 1, 0)[:, :1])
    np.testing.assert_allclose(loss(U, misleading), value, rtol=1e-6)
    wider = np.concatenate([misleading, unit(2, N, 3, D)], 1), np.pad(REAL, ((0, 0), (0, 3)))
    np.testing.assert_allclose(loss(U, *wider), value, rtol=1e-6)
    assert (grad == 0).all(-1)[~REAL].all() and (np.abs(grad).sum(-1) > 0)[REAL].any()
    more = np.pad(padded(V, REAL), ((0, 0), (0, 3), (0, 0)))
    np.testing.assert_allclose(similarity(U, more), both(U, V, REAL)[0], rtol=1e-6)


def test_oracle_3_the_order_of_tokens_does_not_matter():
    patches, words = np.random.default_rng(0).permutation(P), np.random.default_rng(1).permutation(L)
    np.testing.assert_allclose(loss(U[:, patches], V[:, words], REAL[:, words]), loss(U, V), rtol=1e-6)


def test_oracle_4_the_directions_differ_and_equal_sets_of_tokens_give_one():
    i2t, t2i = both(U, V, REAL)
    for found, expected in zip((i2t, t2i), directions(U, V, REAL), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(found).max() <= 1 + 1e-6
    assert np.abs(i2t - t2i.T).max() > 0.05
    same = V.copy(), REAL.copy()
    same[0][0, :P], same[1][0] = U[0, ::-1], np.arange(L) < P
    i2t, t2i = both(U, *same)
    np.testing.assert_allclose([i2t[0, 0], t2i[0, 0]], 1, rtol=1e-6)


def test_oracle_5_tiles_equal_the_whole(monkeypatch):
    """The similarity with a partial last tile. test_contrastive.py checks the loss."""
    monkeypatch.setattr("clip_jax.losses.pairwise.TILE_ENTRIES", 4 * P * L)
    u, v = unit(3, 7, P, D), unit(4, 9, L, D)
    real = np.arange(L) < np.random.default_rng(0).integers(1, L, (9, 1))
    i2t, t2i = directions(u, v, real)
    found = both(u, v, real)
    np.testing.assert_allclose(found[0], i2t, atol=1e-6)
    np.testing.assert_allclose(found[1], t2i, atol=1e-6)


def chosen_loss(u, v, real, how, **options):
    keys = select_keys(Options(token_select=how, **options), u, v, real)
    return contrastive.filip(u, v, real, jnp.asarray(SCALE), keys)[0]


@pytest.mark.parametrize("how", ["repo16", "paper25"])
def test_oracle_6_as_many_as_there_are_is_all(how, monkeypatch):
    monkeypatch.setattr(method_lib, "PAPER_SHARE", 1)
    value, grads = jax.jit(jax.value_and_grad(functools.partial(chosen_loss, how=how, local_batch=3), argnums=(0, 1)))(
        U, V, REAL
    )
    expected, expected_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(U, V)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_quarter_of_the_real_tokens_is_chosen_by_the_best_match_among_neighbours():
    select = jax.jit(functools.partial(select_keys, Options(token_select="paper25", local_batch=3)))
    image_keys, (text_keys, is_key) = jax.device_get(select(U, V, REAL))
    assert image_keys.shape == (N, 2, D) and is_key.sum(1).tolist() == [2, 1, 1, 2, 1, 2]
    u, v = U, V
    for i in range(N):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        words = np.concatenate([v[j][REAL[j]] for j in group])
        best = np.argsort(-(u[i] @ words.T).max(1))[:2]
        np.testing.assert_allclose(image_keys[i], u[i][best], atol=1e-6)
        score = (v[i] @ np.concatenate([u[j] for j in group]).T).max(1)
        best = [k for k in np.argsort(-score) if REAL[i, k]][: int(is_key[i].sum())]
        np.testing.assert_allclose(text_keys[i][is_key[i]], v[i][best], atol=1e-6)


def test_the_choice_follows_the_partner_and_never_takes_padding():
    select = jax.jit(functools.partial(paired_keys, count=3))
    image_keys, (text_keys, is_key) = jax.device_get(select(U, V, REAL))
    assert is_key.sum(1).tolist() == np.minimum(REAL.sum(1), 3).tolist()
    for i in range(N):
        own = U[i] @ V[i][REAL[i]].T
        np.testing.assert_allclose(image_keys[i], U[i][np.argsort(-own.sum(1))[:3]], atol=1e-6)
        np.testing.assert_allclose(text_keys[i][is_key[i]], V[i][REAL[i]][np.argsort(-own.sum(0))[:3]], atol=1e-6)


def test_oracle_7_a_word_that_matches_nothing_better_counts_for_texts_alone():
    u, v = np.abs(U), np.abs(V)  # every word is somewhat similar to every patch
    unrelated = np.linalg.svd(u[0])[2][-1]  # orthogonal to the patches of image 0
    i2t, t2i = both(u, v, np.broadcast_to(np.arange(L) < 3, REAL.shape))
    v[:, 3] = unrelated
    more_i2t, more_t2i = both(u, v, np.broadcast_to(np.arange(L) < 4, REAL.shape))
    np.testing.assert_allclose(more_i2t[0], i2t[0], rtol=1e-6)
    np.testing.assert_allclose(more_t2i[:, 0], 0.75 * t2i[:, 0], rtol=1e-5)


# Memory


def temporary_mib(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in shapes]
    return jax.jit(fn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize("how", [None, "repo16", "paper25"])
def test_the_loss_at_batch_1024_needs_less_than_a_gibibyte_on_one_device(how):
    b, p = 1024, 49
    n, d = 77, 256

    def objective(u, v, real):
        keys = select_keys(Options(token_select=how), u, v, real) if how else None
        return contrastive.filip(u, v, real, jnp.asarray(SCALE), keys)[0]

    mib = temporary_mib(
        jax.value_and_grad(objective, (0, 1)), ((b, p, d), "float32"), ((b, n, d), "float32"), ((b, n), "bool")
    )
    assert mib < 1024  # one copy of all token similarities takes 15 GiB


def test_the_similarity_of_a_block_of_retrieval_is_never_held_by_token():
    mib = temporary_mib(late_interaction, ((1024, 49, 64), "float32"), ((8192, 77, 64), "float32"))
    assert mib < 256 < 1024 * 8192 * 49 * 77 / 2**18


# The method


def test_padding_and_class_tokens():
    c, method = setup("model.image.cls_token=true", "model.text.context=12")
    params, extra = initialise(method.init, PAIRS)
    _, with_cls = setup("model.image.cls_token=true", "filip.use_cls=true", "filip.use_bos_eos=false")
    tower = image_tower(c.model).clone(embed_dim=0)
    pixels = (PAIRS["image"] / np.float32(255) - np.asarray(c.model.image_mean)) / np.asarray(c.model.image_std)

    @jax.jit
    def of_images(params):
        embedded = [m.embed_image(params, extra, PAIRS["image"]) for m in (method, with_cls)]
        features = [m.image_features(params, extra, PAIRS["image"]) for m in (method, with_cls)]
        return embedded, features, tower.apply({"params": params["img"]}, pixels.astype(np.float32))[1]

    (z_image, z), found, tokens = jax.device_get(of_images(params))
    z_text = np.asarray(jax.jit(method.embed_text)(params, extra, PAIRS["text"]))
    assert z_image.shape == (16, 4, 16) and z_text.shape == (16, 12, 16) and z_image.dtype == z_text.dtype == np.float32
    end = (PAIRS["text"] == EOT).argmax(1)
    real = np.arange(12) <= end[:, None]
    np.testing.assert_allclose(np.linalg.norm(z_text, axis=-1), real, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(z_image, axis=-1), 1, rtol=1e-5)
    assert not {"proj", "pool"} & {*params["img"], *params["txt"]}

    assert z.shape == (16, 5, 16)
    for features, start in zip(found, (1, 0), strict=True):
        np.testing.assert_allclose(features, tokens[:, start:].mean(1), atol=1e-4)
    np.testing.assert_allclose(z[:, 1:], z_image, atol=1e-6)
    empty = np.zeros((1, 12), np.int32)
    empty[0, 0] = EOT
    without = np.asarray(jax.jit(with_cls.embed_text)(params, extra, np.concatenate([PAIRS["text"], empty])))
    expected = np.where((np.arange(12) < end[:, None])[..., None], z_text, 0)
    np.testing.assert_allclose(without[:16], expected, atol=1e-6)
    # An empty text keeps its end token.
    assert np.linalg.norm(without[16], axis=-1).round(4).tolist() == [1.0] + [0.0] * 11


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_loss_compares_bfloat16_tokens_where_the_model_has_this_dtype(dtype, monkeypatch):
    seen, whole = [], method_lib.filip
    monkeypatch.setattr(method_lib, "filip", lambda *given: (seen.extend(given[:2]), whole(*given))[1])
    _, method = setup(f"model.dtype={dtype}")
    features = {"image": unit(0, 4, 3, 8), "text": unit(1, 4, 2, 8)}
    jax.eval_shape(lambda x: method.loss({"logit_scale": 1.0}, {}, x, {}, None), features)
    assert [x.dtype for x in seen] == [jnp.dtype("bfloat16" if dtype == "bfloat16" else "float32")] * 2


def test_the_scale_is_clamped():
    _, method = setup()
    assert method.constrain({"logit_scale": jnp.float32(9)})["logit_scale"] == np.float32(4.6052)
    bound = config.load(f"{CONFIG}:b32_repo").model.logit_scale_max
    _, method = setup(f"model.logit_scale_max={bound}")
    assert method.constrain({"logit_scale": jnp.float32(9)})["logit_scale"] == 9


def test_oracle_g1_a_mesh_and_micro_batches_give_the_result_of_one_device():
    c, method = setup()
    expected, expected_state = run_steps(c, method, None, steps=3, devices=jax.devices()[:1], batch=PAIRS)
    c = c.copy_and_resolve_references()
    for sizes, micro_batches in ((dict(data=8, fsdp=1, tensor=1), 2), (dict(data=2, fsdp=2, tensor=2), 4)):
        c.micro_batches = micro_batches
        history, state = run_steps(c, method, sizes, steps=3, batch=PAIRS)
        for a, b in zip(history, expected, strict=True):
            for name in ("loss", "grad_norm", "logit_scale", "image_to_text_acc"):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} {sizes} {micro_batches}")
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("how", ["paper25", "repo16"])
def test_selections_give_the_same_gradients_on_eight_devices(how):
    u, v = unit(5, 16, P, D), unit(6, 16, L, D)
    real = np.arange(L) < np.random.default_rng(0).integers(1, L, (16, 1))
    step = jax.jit(jax.value_and_grad(functools.partial(chosen_loss, how=how, local_batch=2), argnums=(0, 1)))
    expected = step(u, v, real)
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    with jax.set_mesh(mesh):
        found = step(*(jax.device_put(x, batch_sharding(mesh)) for x in (u, v, real)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("b32_yfcc", (95_214, 8192, 0.024, "lamb", 256, "paper25")),
        ("b32", (249_023, 40_960, 2e-3 * 80**0.5, "lamb", 256, "paper25")),
        ("l14", (332_031, 30_720, 1.5e-3 * 60**0.5, "lamb", 256, "paper25")),
        ("b32_repo", (128_000, 4096, 5e-4, "adamw", 256, "repo16")),
    ],
)
def test_published_recipes(variant, expected):
    c = config.load(f"{CONFIG}:{variant}")
    c = resolve(c, make_tokenizer(c.tokenizer))
    config.validate(c)
    make_method(c)
    found = c.train.steps, c.data.batch_size, c.optim.lr, c.optim.name, c.model.embed_dim, c.filip.token_select
    assert found == pytest.approx(expected)


# A trained model in use


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("filip")
    c = config.load(CONFIG, [*TINY, "train.steps=4", "model.text.context=8"])
    train.train(c, workdir, lambda line: None)
    return workdir


@pytest.fixture(scope="module")
def model(workdir):
    return clip_jax.load(workdir)


def random_images(n, size=16):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_the_model_ranks_both_ways(model):
    z_image, z_text = model.embed_image(random_images(5)), model.embed_text(["a cat", "two red dogs", ""])
    assert z_image.shape == (5, 4, 16) and z_text.shape == (3, 8, 16)
    i2t, t2i = directions(z_image, z_text, z_text.any(-1))
    np.testing.assert_allclose(model.similarity(z_image, z_text), i2t, atol=1e-5)
    np.testing.assert_allclose(model.text_similarity(z_text, z_image), t2i, atol=1e-5)
    p = model.classify(random_images(5), ["cat", "dog"], templates=("a {}", "the big {}"))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_oracle_8_scores_are_averaged_over_prompts_not_embeddings(model):
    names, z = ["cat", "red dog", "house"], model.embed_image(random_images(6))
    scores = [
        model.similarity(z, model.embed_text([t.format(name) for name in names])) for t in ("a {}", "my very big {}")
    ]
    one = make_classifier(model, names, ("a {}",)).scores(z)
    np.testing.assert_allclose(one, scores[0], rtol=1e-5)
    two = make_classifier(model, names, ("a {}", "my very big {}")).scores(z)
    np.testing.assert_allclose(two, np.mean(scores, 0), rtol=1e-5)
    of_embeddings = make_classifier(model, names, ("a {}", "my very big {}"), average="embeddings").scores(z)
    assert np.abs(two - of_embeddings).max() > 1e-3


def test_retrieval_takes_each_direction_by_its_own_similarity(model):
    images, emoji = random_images(40), make_source("emoji", "train")
    source = MemorySource([{"image": image, "texts": [emoji[100 * i]["name"]]} for i, image in enumerate(images)])
    result = tasks.retrieval_task(model, source, name="r")
    z_image = model.embed_image(np.stack([model.image_view(record, None) for record in source]))
    z_text = model.embed_text([record["texts"][0] for record in source])
    for name, scores in (
        ("image_to_text", model.similarity(z_image, z_text)),
        ("text_to_image", model.text_similarity(z_text, z_image)),
    ):
        ahead = scores - np.diag(scores)[:, None]
        assert (np.abs(ahead) > 1e-7).sum() == 40 * 39  # the rank does not depend on rounding
        rank = (ahead > 0).sum(1)
        assert result.metrics[f"r/{name}_R@10"] == pytest.approx((rank < 10).mean())
    assert result.artefacts["map"]["r"].z_image.shape == (40, 16)
    assert len(result.artefacts["alignment"]["r"].words) == alignment.IMAGES


def test_words_are_told_by_the_positions_of_their_tokens(model):
    text = "grinning cat, with extraordinarily long ears"
    words, places = alignment.words_of(model.tokenizer, text, 40)
    ids = model.tokenizer([text], 40)[0]
    assert words == text.split() and places[0].start == 0 and ids[places[-1].stop] == model.tokenizer.eot_id
    for word, place in zip(words, places, strict=True):
        assert model.tokenizer.decode(ids[place.start : place.stop]).strip() == word
    cut, places = alignment.words_of(model.tokenizer, text, 4)
    assert cut == words[: len(cut)] and len(cut) < len(words) and places[-1].stop == 3
    bpe = make_tokenizer("clip_bpe")
    words, places = alignment.words_of(bpe, "a cat", 6)
    assert (words, places) == (["a", "cat"], [range(1, 2), range(2, 3)])
    assert alignment.words_of(bpe, "", 6) == ([], [])


class Drawn:
    """A model with known patches: the first half shows one word, the second half the other."""

    def __init__(self, model):
        self.tokenizer, self.image_view = model.tokenizer, lambda record, rng: record["image"]


@pytest.mark.parametrize("cls", [0, 1])
def test_the_picture_shows_which_patch_answers_which_word(model, cls):
    axes, records = np.eye(4, dtype=np.float32), [{"image": random_images(1)[0]}] * 2
    z_image = np.stack([axes[[3] * cls + [0, 0, 1, 2]], axes[[3] * cls + [1, 1, 1, 1]]])
    (_, places), z_text = alignment.words_of(model.tokenizer, "cat <b>", 8), np.zeros((2, 8, 4), np.float32)
    z_text[:, places[0].start], z_text[:, places[1].start] = axes[0], axes[1]
    z_text[:, places[1].stop] = axes[2]
    found = alignment.align(Drawn(model), z_image, z_text, ["cat <b>"] * 2, records)
    assert found.words[0] == ["cat", "<b>"] and found.similarity[0].shape == (2, 2, 3)
    assert found.similarity[0].argmax(2).tolist() == [[0, 0], [1, 2]]
    assert found.similarity[1].argmax(2).tolist() == [[1, 1], [1, 1]]
    text = found.draw(Page())
    assert text.count('<div class="card patches">') == 2
    assert text.count("<i class") + text.count("<i style") + text.count("<i></i>") >= 8
    assert "<b>50% 1.00</b>" in text and "&lt;b&gt;" in text and "><b><" not in text
    assert alignment.align(Drawn(model), z_image[:, 0], z_text, ["a"] * 2, records) is None
    assert alignment.align(Drawn(model), np.zeros((2, 7, 4), np.float32), z_text, ["a"] * 2, records) is None


def test_search_compares_tokens(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    images = random_images(9)
    source = MemorySource([{"image": image, "texts": [f"number {i}"]} for i, image in enumerate(images)])
    index = search.make_index(model, source, "images", "memory", folder=tmp_path / "index")
    again = search.make_index(model, source, "images", "memory", folder=tmp_path / "index")
    assert index.z.shape == (9, 4, 16) and np.array_equal(index.z, again.z)
    queries = search.make_queries(model, ["a cat", "number 3"], [("x", images[5])])
    for of_texts, of_kind in ((True, queries[:2]), (False, queries[2:])):
        z = np.stack([q.z for q in of_kind])
        rows, scores = search.Bank(index.z, model.mesh).search(z, 4, search.scores_of(model.method, of_texts))
        expected = np.asarray(similarity(z, index.z))
        np.testing.assert_array_equal(rows, np.argsort(-expected, 1)[:, :4])
        np.testing.assert_allclose(scores, -np.sort(-expected, 1)[:, :4], rtol=1e-5)
    assert rows[0, 0] == 5 and scores[0, 0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="--plus and --minus add vectors, but method 'filip' has one for each token"):
        search.make_queries(model, ["a cat"], plus=["red"])


def test_the_search_command(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path))
    out = tmp_path / "found.json"
    arguments = [
        f"--checkpoint={workdir}",
        "--images=emoji",
        "--split=val_unseen_vendor",
        "--text=a cat",
        "--image=#3",
        f"--json={out}",
    ]
    assert search.main(arguments) == 0 and search.main([*arguments, "--find=texts", "--k=3"]) == 0
    assert search.main([*arguments[:3], "--image=#3", "--k=1", f"--json={out}"]) == 0
    (found,) = json.loads(out.read_text())
    assert found["found"][0]["record"] == 3  # an image is most similar to itself


def test_a_run_evaluates_reports_and_resumes(workdir, tmp_path):
    c = config.load(CONFIG, [*TINY, "train.steps=4", "model.text.context=8"])
    again = interrupted(workdir, tmp_path / "again", 2)
    train.train(c, again, lambda line: None)
    assert losses(again) == losses(workdir)
    result = tasks.emoji_task(clip_jax.load(workdir), "val")
    page = assembly.render(result, title="x")
    assert "Words and patches" in page and page.count('<div class="card patches">') == 2 * alignment.IMAGES
