"""UniCL: the oracles of its specification, golden losses, labels and class texts of a batch, memory, meshes, runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, golden_files
from data_helpers import write_table
from helpers import TINY, interrupted, losses, unit
from model_helpers import BATCH, run_steps

from clip_jax import config, train
from clip_jax.data.loader import Loader
from clip_jax.data.records import BadRecord
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import TextView
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import infonce
from clip_jax.methods.interface import make_method
from clip_jax.methods.unicl import unified_infonce
from clip_jax.runtime.sharding import batch_sharding, make_mesh

CONFIG = str(REPO / "configs" / "unicl.py")
LABEL = np.array([0, 3, -1, 0, 1, -1, 3, 3, -1, 0, 2, -1, 1, 1, 0, -1], np.int32)  # in the loader's form
Y = LABEL + 1
N = len(Y)


def setup(*overrides):
    c = config.load(CONFIG, [*TINY, *overrides])
    c = config.resolve(c, make_tokenizer(c.tokenizer))
    return c, make_method(c)


U, V = unit(0, N, 16), unit(1, N, 16)
clip = jax.jit(infonce)


@jax.jit
def value(u, v, y, scale=9.0):
    return unified_infonce(u, v, scale, y)


def positives(y):
    """The paper's positives: each caption gets a fresh label, and equal labels are positives."""
    y = np.asarray(y)
    fresh = np.where(y > 0, y, y.max() + 1 + np.arange(len(y)))
    return fresh[:, None] == fresh


def half(logits, target):
    return -(target * np.asarray(jax.nn.log_softmax(logits, axis=1))).sum(1) / target.sum(1)


def plain(u, v, y, scale=9.0):
    target = positives(y)
    return (half(scale * u @ v.T, target).mean() + half(scale * v @ u.T, target.T).mean()) / 2


# The loss


@pytest.mark.parametrize("file", golden_files("loss_unicl_*.npz"))
def test_golden_loss_and_gradients(file):
    g = np.load(file)

    def loss(u, v, scale):
        return unified_infonce(u, v, scale, g["labels"])[0]

    found, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        g["image_features"], g["text_features"], g["scale"]
    )
    np.testing.assert_allclose(found, g["loss"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("grad_image", "grad_text", "grad_scale"), strict=True):
        np.testing.assert_allclose(grad, g[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(positives(g["labels"]), g["targets"] > 0)


@pytest.mark.parametrize(
    "y", [np.zeros(N, np.int32), np.arange(1, N + 1, dtype=np.int32)], ids=["captions", "distinct classes"]
)
def test_oracle_a_without_equal_classes_it_is_clip(y):
    found, metrics = value(U, V, y)
    expected, expected_metrics = clip(U, V, 9.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert metrics["loss_floor"] == 0 and metrics["class_share"] == (y > 0).mean()
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name])


def test_oracle_b_order_does_not_matter():
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(value(U[order], V[order], Y[order])[0], value(U, V, Y)[0], rtol=1e-6)


@pytest.mark.parametrize("y", [Y, 0 * Y, 0 * Y + 1], ids=["both", "captions", "one class"])
def test_oracle_c_equal_embeddings_give_ln_n(y):
    z = np.tile(U[:1], (N, 1))
    np.testing.assert_allclose(value(z, z, y)[0], np.log(N), rtol=1e-5)


def test_oracle_d_the_floor():
    floor = np.log(positives(Y).sum(1)).mean()
    np.testing.assert_allclose(value(U, V, Y)[1]["loss_floor"], floor, rtol=1e-6)
    assert floor > 0.5
    for seed in range(6):
        assert value(unit(seed, N, 16), unit(seed + 10, N, 16), Y)[0] >= floor
    perfect = np.eye(N, dtype=np.float32)[np.where(Y > 0, Y - 1, 4 + np.arange(N) % 12)]
    assert len(np.unique(perfect, axis=0)) == 4 + 5
    loss, metrics = value(perfect, perfect, Y, 100.0)
    np.testing.assert_allclose(loss, floor, rtol=1e-5)
    assert metrics["image_to_text_acc"] == metrics["text_to_image_acc"] == 1


def test_oracle_e_one_text_of_each_class_is_cross_entropy_over_classes():
    y = np.array([1, 2, 2, 3, 3, 3, 1, 4, 4, 1, 1, 1, 2, 3, 4, 4])
    counts, w = np.bincount(y, minlength=5)[1:], unit(2, 4, 16)
    image_to_text = half(9.0 * U @ w[y - 1].T, positives(y)).mean()
    over_classes = 9.0 * U @ w.T + np.log(counts)
    log_shares = np.asarray(jax.nn.log_softmax(over_classes, axis=1))
    expected = (-log_shares[np.arange(N), y - 1] + np.log(counts[y - 1])).mean()
    np.testing.assert_allclose(image_to_text, expected, rtol=1e-5)
    np.testing.assert_allclose(value(U, w[y - 1], y)[0], plain(U, w[y - 1], y), rtol=1e-5)


def test_oracle_f_gradient_in_the_logits():
    """If v is the identity, the images are the logits of one half of the loss, and the other half is known."""
    target, z = positives(Y), unit(3, N, N)

    def loss(z):
        return unified_infonce(z, np.eye(N, dtype=np.float32), np.float32(1), Y)[0]

    by_row = (np.asarray(jax.nn.softmax(z, axis=1)) - target / target.sum(1, keepdims=True)) / N
    by_col = (np.asarray(jax.nn.softmax(z, axis=0)) - target / target.sum(0)) / N
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), (by_row + by_col) / 2, atol=1e-6)


def test_oracle_g_of_one_set_of_vectors_it_is_supcon_with_itself():
    logits = 9.0 * U @ U.T
    by_hand = [
        np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, k] for k in np.flatnonzero(positives(Y)[i])])
        for i in range(N)
    ]
    np.testing.assert_allclose(value(U, U, Y)[0], np.mean(by_hand), rtol=1e-5)


def test_oracle_h_targets_are_those_of_fresh_labels():
    rng = np.random.default_rng(0)
    for _ in range(10):
        y = rng.integers(0, 5, N).astype(np.int32)
        found, metrics = value(U, V, y)
        np.testing.assert_allclose(found, plain(U, V, y), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss_floor"], np.log(positives(y).sum(1)).mean(), rtol=1e-5)


def test_accuracy_does_not_count_positives_as_rivals():
    z = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    _, metrics = value(z, z, np.array([1, 1, 0, 0], np.int32), 5.0)
    assert metrics["image_to_text_acc"] == metrics["text_to_image_acc"] == 1
    _, metrics = value(z, z, np.array([1, 2, 0, 0], np.int32), 5.0)
    assert metrics["image_to_text_acc"] == 0.5, "a tie with another class counts as wrong"


def test_no_matrix_of_all_pairs():
    mesh, b = make_mesh({"data": 8, "fsdp": 1, "tensor": 1}), 16_384
    rows = batch_sharding(mesh)
    z, y = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for shape, dtype in (((b, 64), jnp.float32), ((b,), jnp.int32))
    )
    with jax.set_mesh(mesh):
        fn = jax.jit(jax.value_and_grad(lambda u, v, y: unified_infonce(u, v, 9.0, y), argnums=(0, 1), has_aux=True))
        memory = fn.lower(z, z, y).compile().memory_analysis().temp_size_in_bytes
    assert memory < 64 * 2**20 < b * b * 4 / 8, "a device's share of the matrix alone would take 128 MiB"


# The step


@pytest.mark.parametrize("label, y", [(LABEL, Y), (None, 0 * Y), (0 * LABEL - 1, 0 * Y), (0 * LABEL, 0 * Y + 1)])
def test_labels_of_a_batch(label, y):
    """-1 marks a caption and 0 the first class. Without labels all texts are captions."""
    _, method = setup()
    batch = {} if label is None else {"label": label}
    params = {"logit_scale": np.float32(np.log(9))}
    found, metrics = jax.jit(method.loss)(params, {}, {"image": U, "text": V}, batch, None)
    expected, expected_metrics = value(U, V, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert metrics["class_share"] == expected_metrics["class_share"] == (y > 0).mean()
    np.testing.assert_allclose(metrics["logit_scale"], 9, rtol=1e-6)


def test_a_mesh_and_micro_batches_give_the_result_of_one_device():
    c, method = setup()
    batch = {**BATCH, "label": LABEL}
    expected, _ = run_steps(c, method, None, steps=3, devices=jax.devices()[:1], batch=batch)
    assert expected[0]["class_share"] == (LABEL >= 0).mean() and expected[0]["loss_floor"] > 0.5
    for sizes, micro_batches in ((dict(data=8, fsdp=1, tensor=1), 2), (dict(data=2, fsdp=2, tensor=2), 4)):
        c = c.copy_and_resolve_references()
        c.micro_batches = micro_batches
        history, _ = run_steps(c, method, sizes, steps=3, batch=batch)
        for a, b in zip(history, expected, strict=True):
            for name in ("loss", "grad_norm", "logit_scale", "loss_floor"):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} {sizes} {micro_batches}")


# Texts of classes


def test_texts_of_classes_and_captions():
    view = TextView("text", 16, ("{name}",), class_templates=("a {class_name}", "the {class_name} of {name}"))
    record = {"name": "Tom", "label": 3, "class_name": "cat", "texts": ["x"]}
    assert view.caption(record, None) == "a cat"
    assert {view.caption(record, np.random.default_rng(i)) for i in range(30)} == {"a cat", "the cat of Tom"}
    assert view.caption({**record, "label": -1}, None) == view.caption({"name": "Tom"}, None) == "Tom"
    captions = TextView("text", 16, class_templates=("a {class_name}",))
    assert captions.caption({"texts": ["x"]}, None) == "x" and captions.caption(record, None) == "a cat"
    assert TextView("text", 16).caption(record, None) == "x"
    with pytest.raises(BadRecord, match="no class name"):
        view.caption({"name": "Tom", "label": 0}, None)
    with pytest.raises(UserError, match="template 3 is int, not text"):
        TextView(templates=("{name}", 3))
    with pytest.raises(UserError, match="names no field"):
        TextView("text", 16, class_templates=("a {}".replace("{}", ""),))


def test_class_names_are_cleaned_and_one_of_several_is_drawn():
    view = TextView("text", 16, class_templates=("{class_name}",))
    assert view.caption({"label": 0, "class_name": "tench, Tinca tinca"}, None) == "tench Tinca tinca"
    assert view.caption({"label": 0, "class_name": "rock+roll"}, None) == "rock roll"
    synonyms = {"label": 0, "class_name": ["cat", "tom cat"]}
    assert {view.caption(synonyms, np.random.default_rng(i)) for i in range(20)} == {"cat", "tom cat"}


def test_the_embedded_halves():
    """Half of the concepts have their subgroup as text, the others their names, and no concept has both."""
    c, method = setup("data.batch_size=256", "data.word_dropout=0")
    source, tokenizer = make_source(c.data.source), make_tokenizer(c.tokenizer)
    loader = Loader(source, method.views[1:], tokenizer, batch_size=256, seed=0)
    batch = next(loader)
    classes = batch["label"] >= 0
    assert abs(classes.mean() - 0.5) < 0.01 and (batch["source_id"] == ~classes).all()
    assert batch["label"].max() < len(source.class_names)
    concepts = [set(), set()]
    for i, label, ids in zip(batch["example_id"], batch["label"], batch["text"], strict=True):
        record = source[int(i)]
        concepts[int(label >= 0)].add(record["concept"])
        if label >= 0:
            assert record["class_name"] == record["subgroup"] == source.class_names[label]
            np.testing.assert_array_equal(ids, tokenizer([record["subgroup"]], 12)[0])
        else:
            assert "class_name" not in record
    assert not concepts[0] & concepts[1]
    loader.close()


# Configurations, whole runs and wrong labels


@pytest.mark.parametrize("variant, differing", [("", 1), ("smoke", 1), ("labels", 1), ("captions", 1), ("b16", None)])
def test_variants_are_complete(variant, differing):
    c = config.load(f"{CONFIG}:{variant}")
    config.validate(c)
    assert c.method == "unicl" and (" + " in c.data.source) == (variant in ("", "smoke"))
    if differing:
        clip = config.load(f"{REPO}/configs/clip.py:{variant if variant == 'smoke' else 'emoji'}")
        own = {"unicl.class_templates", "unicl.pairs_only"}
        assert {key for key, *_ in config.differences(clip, c)} == {"method", "data.source", *own}
    else:
        assert len(c.unicl.class_templates) == 81 and c.optim.lr == pytest.approx(4e-3) and c.optim.grad_clip_norm == 5
        assert c.eval.transform == ("resize(256)", "center_crop")
        c.model.text.update(dict(vocab_size=49408, eot_id=49407))
        assert {"{class_name}.", "a photo of a {class_name}."} <= set(make_method(c).views[1].class_templates)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [
        {"name": f"a thing number {i}", "tags": ["t"], "concept": i, "subgroup": f"group-{i % 3}"} for i in range(40)
    ]
    return write_table(tmp_path_factory.mktemp("unicl"), rows)


HALVES = ("part=concept:1/2&label=subgroup", "part=concept:2/2")


def run(folder, table, *overrides):
    """Trains on classes and captions; returns the loss of each step."""
    source = " + ".join(f"{table}?{half}" for half in HALVES)
    train.train(config.load(CONFIG, [*TINY, f"data.source={source}", *overrides]), folder, lambda line: None)
    return losses(folder)


def test_a_run_that_was_interrupted_goes_on_the_same(table, tmp_path):
    whole = run(tmp_path / "whole", table, "train.steps=4")
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    assert run(tmp_path / "parts", table, "train.steps=4") == whole and len(whole) == 4
    assert np.isfinite(list(whole.values())).all()


@pytest.mark.parametrize(
    "part, keys", [(0, {"text", "example_id", "label"}), (1, {"text", "example_id"})], ids=["classes", "captions"]
)
def test_classes_or_captions_alone(table, part, keys):
    """test_labels_of_a_batch covers the loss of batches without labels or with labels only."""
    c = config.load(CONFIG, [*TINY, f"data.source={table}?{HALVES[part]}"])
    _, source, tokenizer, method = train.make_parts(c)
    batch = next(Loader(source, method.views[1:], tokenizer, batch_size=16, seed=0, threads=0))
    assert batch.keys() == keys and np.all(batch.get("label", 0) >= 0)


def test_wrong_labels_are_one_line(table):
    """A label beyond the class list, such as an off-by-one error, and labels without class names."""
    views, tokenizer = setup()[1].views, make_tokenizer("sentencepiece")
    record = {"image": np.zeros((16, 16, 3), np.uint8), "texts": ["x"], "name": "x", "tags": ["y"]}
    one_based = MemorySource([record | {"label": 1 + i // 10} for i in range(20)], "pets", class_names=["cat", "dog"])
    captions = MemorySource([record])
    loader = Loader(MixtureSource([one_based, captions], [1, 1]), views, tokenizer, batch_size=16, seed=0)
    with pytest.raises(UserError, match="pets: a record has label 2, but there are 2 class names, 0 to 1") as error:
        next(loader)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"numbers: no usable record among 4 tried \(no class name: 4\)"):
        Loader(
            MemorySource([record | {"label": i} for i in range(4)], "numbers"), views, tokenizer, batch_size=4, seed=0
        )


def test_with_one_text_a_class_the_loss_is_clips():
    """A text is as similar to a picture as the other texts of its class are; so the mean over positives is a term."""
    y = np.array([1, 2, 1, 0, 1, 0])
    images, texts = unit(0, 2, 6, 8)
    texts = texts[[0, 1, 0, 3, 0, 5]]
    found = [value(images, texts, labels, 10.0)[0] for labels in (y, np.zeros_like(y))]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
