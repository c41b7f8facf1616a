import numpy as np
import pytest
from conftest import golden_files

from clip_jax.errors import UserError
from clip_jax.evaluation.classifier import (
    accuracy,
    class_scores,
    flat_hit_at,
    make_classifier,
    per_class_accuracy,
)
from clip_jax.evaluation.embed import normalize
from clip_jax.evaluation.prompts import (
    canonicalize,
    class_prompts,
    load_class_names,
    load_templates,
    resolve_duplicates,
    template_sets,
)


class TableModel:
    """Embeds a text by looking it up."""

    def __init__(self, table, similarity=lambda images, texts: images @ texts.T):
        self.table, self.similarity = table, similarity

    def embed_text(self, texts):
        return np.stack([self.table[text] for text in texts])


# --- prompts ---


def test_named_templates():
    sizes = {name: len(load_templates(name)) for name in template_sets()}
    assert sizes["clip_80"] == 80 and sizes["clip_7"] == 7 and sizes["cifar100"] == sizes["cifar10"] == 18
    for name in template_sets():
        templates = load_templates(name)
        assert load_templates(list(templates)) == templates  # each passes the checks for a user's own
        assert len(set(templates)) == len(templates)
    assert set(load_templates("clip_7")) <= set(load_templates("clip_80"))
    assert load_templates("simple") == ("a photo of a {}.",)


def test_templates_from_a_file_and_wrong_ones(tmp_path):
    (tmp_path / "mine.txt").write_text("a drawing of {}\n\n  {} on white \n")
    assert load_templates(f"{tmp_path}/mine.txt") == ("a drawing of {}", "{} on white")
    (tmp_path / "empty.txt").write_text("\n")
    for spec, message in [
        ("clip_81", "neither a set"),
        (f"{tmp_path}/empty.txt", "at least one"),
        (["a photo"], "exactly one {}"),
        (["{} and {}"], "exactly one {}"),
        ([], "at least one"),
    ]:
        with pytest.raises(UserError) as e:
            load_templates(spec)
        assert message in str(e.value) and "\n" not in str(e.value)


def test_files_of_clip_benchmark(tmp_path):
    (tmp_path / "t.json").write_text('{"pets": ["a {c}.", "the {c}"], "sun": ["{c}"], "custom": {"cat": ["a cat"]}}')
    (tmp_path / "one.json").write_text('{"pets": ["cat", "dog"]}')
    (tmp_path / "list.json").write_text('["cat"]')
    (tmp_path / "t.txt").write_text("a photo of {c}.\n")
    (tmp_path / "damaged.json").write_text("{")
    assert load_templates(f"{tmp_path}/t.json:pets") == ("a {}.", "the {}")
    assert load_templates(f"{tmp_path}/t.txt") == load_templates(["a photo of {c}."]) == ("a photo of {}.",)
    assert load_class_names(f"{tmp_path}/one.json") == ["cat", "dog"]
    assert load_class_names(f"{tmp_path}/list.json") == ["cat"]
    for spec, message in [
        ("t.json", "t.json:NAME with one of pets, sun, custom"),
        ("t.json:pet", "no list 'pet' (did you mean 'pets'?)"),
        ("t.json:custom", "a list of texts is needed, not dict"),
        ("list.json:pets", "holds no names of lists"),
        ("damaged.json", "cannot be read as JSON"),
        ("no.json:pets", "no.json: No such file or directory"),
    ]:
        with pytest.raises(UserError) as e:
            load_templates(f"{tmp_path}/{spec}")
        assert message in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="exactly one {} is needed"):
        load_templates(["{c} and {}"])


def test_class_names(tmp_path):
    imagenet = load_class_names("imagenet")
    assert (len(imagenet), imagenet[0], imagenet[207]) == (1000, "tench", "Golden Retriever")
    (tmp_path / "names.txt").write_text("cat\nhot dog\n")
    assert load_class_names(f"{tmp_path}/names.txt") == ["cat", "hot dog"]
    for wrong in (f"{tmp_path}/no.txt", [], ["cat", " "]):
        with pytest.raises(UserError, match="class_names"):
            load_class_names(wrong)


def test_duplicate_class_names():
    names = ["crane", "cat", "crane", "bat", "bat"]
    with pytest.raises(UserError, match="'crane', 'bat'"):
        resolve_duplicates(names)
    assert resolve_duplicates(names, "merge") == (["crane", "cat", "bat"], [0, 1, 0, 2, 2])
    assert resolve_duplicates(names, "keep") == (names, [0, 1, 2, 3, 4])
    assert resolve_duplicates(["a", "b"]) == (["a", "b"], [0, 1])
    with pytest.raises(UserError, match="'first'"):
        resolve_duplicates(names, "first")


def test_canonical_form_of_prompts():
    assert canonicalize("A  Photo_of a {}, isn't it?", "{}") == "a photo of a {} isnt it"
    assert canonicalize("Hot_Dog, (grilled)", ",") == "hot dog, grilled"
    assert class_prompts(["Hot_Dog"], ["A photo of {}."], canonical=True) == ["a photo of hot dog"]
    assert class_prompts(["a{b}", "c"], ["x {}.", "{}!"]) == ["x a{b}.", "a{b}!", "x c.", "c!"]


# --- classifier ---


@pytest.mark.parametrize("file", golden_files("eval_zeroshot*.npz"))
def test_golden_classifier_and_accuracy(file):
    data = np.load(file)
    classes, templates = data["prompt_features_raw"].shape[:2]
    names, forms = [f"class{i}" for i in range(classes)], [f"t{j} {{}}" for j in range(templates)]
    raw = data["prompt_features_raw"]
    table = {f"t{j} class{i}": raw[i, j] for i in range(classes) for j in range(templates)}
    model, z_image = TableModel(table), normalize(data["image_features_raw"])
    classifier = make_classifier(model, names, forms)
    np.testing.assert_allclose(classifier.embeddings.T, data["classifier"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(100 * class_scores(model, z_image, names, forms), data["logits"], rtol=1e-4, atol=1e-5)
    top, scores = classifier.top(z_image)
    np.testing.assert_array_equal(top[:, 0], data["pred"])
    np.testing.assert_allclose(scores, np.take_along_axis(classifier.scores(z_image), top, 1), rtol=1e-6)
    assert accuracy(top, data["labels"], 1) == pytest.approx(data["top1"], abs=1e-6)
    assert accuracy(top, data["labels"], 5) == pytest.approx(data["top5"], abs=1e-6)


def test_scores_are_averaged_where_an_embedding_is_several_vectors():
    rng = np.random.default_rng(0)
    table = {f"{t} {c}": rng.normal(size=(3, 8)).astype(np.float32) for c in "abcd" for t in ("x", "y")}

    def late_interaction(images, texts):  # mean over an image's tokens of the best text token
        return np.einsum("nte,mse->nmts", images, texts).max(-1).mean(-1)

    model, images = TableModel(table, late_interaction), rng.normal(size=(10, 5, 8)).astype(np.float32)
    classifier = make_classifier(model, list("abcd"), ["x {}", "y {}"])
    by_hand = np.stack(
        [np.mean([late_interaction(images, table[f"{t} {c}"][None])[:, 0] for t in "xy"], 0) for c in "abcd"], 1
    )
    np.testing.assert_allclose(classifier.scores(images), by_hand, rtol=1e-5)
    np.testing.assert_array_equal(classifier.top(images, 4)[0], np.argsort(-by_hand, 1))


def test_average_of_scores_differs_from_average_of_embeddings():
    table = {
        "x a": np.array([1.0, 0.0]),
        "y a": np.array([-1.0, 0.1]),
        "x b": np.array([0.0, 1.0]),
        "y b": np.array([0.0, 1.0]),
    }
    model, image = TableModel(table), np.array([[1.0, 0.0]])
    scores = make_classifier(model, ["a", "b"], ["x {}", "y {}"], average="scores").scores(image)
    np.testing.assert_allclose(scores, [[0.0, 0.0]], atol=1e-6)
    embeddings = make_classifier(model, ["a", "b"], ["x {}", "y {}"]).scores(image)
    mean = np.array([1 - 1 / np.sqrt(1.01), 0.1 / np.sqrt(1.01)])
    np.testing.assert_allclose(embeddings, [[mean[0] / np.linalg.norm(mean), 0.0]], atol=1e-6)
    with pytest.raises(UserError, match="'mean'"):
        make_classifier(model, ["a"], ["x {}"], average="mean")


def test_prediction_does_not_depend_on_the_block_size(monkeypatch):
    from clip_jax.evaluation import classifier

    rng = np.random.default_rng(1)
    names = [str(i) for i in range(7)]
    table = {f"{t} {name}": rng.normal(size=4).astype(np.float32) for name in names for t in "xy"}
    model, images = TableModel(table), rng.normal(size=(11, 4)).astype(np.float32)
    expected = [
        make_classifier(model, names, ["x {}", "y {}"], average=a).top(images, 3) for a in ("embeddings", "scores")
    ]
    monkeypatch.setattr(classifier, "_SCORES_AT_ONCE", 20)
    monkeypatch.setattr(classifier, "_PROMPTS_AT_ONCE", 4)
    for average, (labels, scores) in zip(("embeddings", "scores"), expected, strict=True):
        again = make_classifier(model, names, ["x {}", "y {}"], average=average).top(images, 3)
        np.testing.assert_array_equal(again[0], labels)
        np.testing.assert_allclose(again[1], scores, rtol=1e-5, atol=1e-6)


def test_ties_and_nan_predict_the_lowest_label():
    model = TableModel({name: np.ones(2) for name in "abc"})
    assert make_classifier(model, list("abc")).top(np.ones((2, 2)), 2)[0].tolist() == [[0, 1], [0, 1]]
    assert make_classifier(model, list("abc")).top(np.full((1, 2), np.nan), 3)[0].tolist() == [[0, 1, 2]]


def test_per_class_accuracy():
    top, labels = np.array([[0], [1], [1], [0]]), np.array([0, 1, 0, 0])
    np.testing.assert_allclose(per_class_accuracy(top, labels, 3), [2 / 3, 1.0, np.nan])


def test_flat_hits_are_rows_with_a_label_among_the_first_k():
    rng = np.random.default_rng(0)
    top = np.argsort(rng.random((200, 12)), axis=1)[:, :8].astype(np.int32)
    sets = [rng.choice(12, rng.integers(1, 5), replace=False).tolist() for _ in top]
    padded = np.asarray([labels + [-1] * (4 - len(labels)) for labels in sets], np.int32)
    for k in (1, 3, 8, 20):
        expected = np.mean([bool(set(row[:k]) & set(labels)) for row, labels in zip(top.tolist(), sets, strict=True)])
        assert flat_hit_at(top, padded, k) == pytest.approx(expected, abs=1e-12)
        assert flat_hit_at(top, padded[:, :1], k) == accuracy(top, padded[:, 0], k)
    assert flat_hit_at(top[:0], padded[:0], 1) == 0
