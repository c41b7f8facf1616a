import numpy as np
import pytest
from conftest import golden_files

from clip_jax.evaluation import retrieval, topk
from clip_jax.evaluation.recall import recall
from clip_jax.evaluation.topk import top_k


@pytest.mark.parametrize("block", [None, 7, 64])
@pytest.mark.parametrize("file", golden_files("eval_retrieval*.npz"))
def test_golden_recall(file, block, monkeypatch):
    if block:
        monkeypatch.setattr(topk, "_QUERIES", block)
        monkeypatch.setattr(topk, "_CANDIDATES", block)
    data = np.load(file)
    images = len(data["image_features"])
    found = recall(data["image_features"], data["text_features"], np.arange(images), data["text_to_image_index"])
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert found.metrics[f"{direction}_R@{k}"] == pytest.approx(data[f"{direction}_r{k}"], abs=1e-6)


@pytest.mark.parametrize(("queries", "candidates"), [(5, 3), (5, 4), (100, 100)])
def test_top_k_equals_a_stable_sort(queries, candidates, monkeypatch):
    monkeypatch.setattr(topk, "_QUERIES", queries)
    monkeypatch.setattr(topk, "_CANDIDATES", candidates)
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (12, 17)).astype(np.float32)  # many ties
    scores[scores == 0] *= rng.choice([-1, 1], (scores == 0).sum())  # zeros of both signs
    indices, values = top_k(np.arange(12), np.arange(17), 6, lambda q, c: scores[q[:, None] % 12, c % 17])
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, 1))


def test_top_k_never_returns_padding(monkeypatch):
    monkeypatch.setattr(topk, "_CANDIDATES", 4)
    z = -np.ones((2, 3), np.float32)
    indices, _ = top_k(z, np.ones((5, 3), np.float32), 9)  # padding would score 0, candidates score -3
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3, 4]] * 2)
    for broken in (np.nan, -np.inf):
        indices, _ = top_k(np.full((1, 3), broken, np.float32), np.ones((5, 3), np.float32), 3)
        np.testing.assert_array_equal(indices, [[0, 1, 2]])


def test_collapsed_embeddings_are_not_rewarded():
    z = np.ones((20, 4), np.float32)
    metrics = recall(z, z, np.arange(20), np.arange(20)).metrics
    assert metrics["image_to_text_R@1"] == pytest.approx(1 / 20)
    assert metrics["text_to_image_R@10"] == pytest.approx(10 / 20)


def test_recall_with_several_matches_and_queries_without_any():
    z_image = np.eye(4, dtype=np.float32)
    z_text = np.array([[0, 1, 0, 0], [1, 0.5, 0, 0], [0, 0, 1, 0.9]], np.float32)
    # Texts 0 and 1 belong to image 0, text 2 to images 2 and 3; image 1 has no text.
    found = recall(z_image, z_text, [0, 1, 2, 2], [0, 0, 2], ks=(1, 2))
    assert found.metrics == pytest.approx(
        {"image_to_text_R@1": 1.0, "image_to_text_R@2": 1.0, "text_to_image_R@1": 2 / 3, "text_to_image_R@2": 1.0}
    )
    np.testing.assert_array_equal(found.text_to_image[0], [1, 0])


def test_recall_uses_the_given_similarity():
    z_image, z_text = np.array([[1.0], [2.0]]), np.array([[2.1], [1.1]])
    distance = recall(z_image, z_text, [0, 1], [1, 0], ks=(1,), similarity=lambda a, b: -np.abs(a - b.T))
    assert distance.metrics == {"image_to_text_R@1": 1.0, "text_to_image_R@1": 1.0}
    assert recall(z_image, z_text, [0, 1], [1, 0], ks=(1,)).metrics["image_to_text_R@1"] == 0.5


def test_the_loss_of_pairs_is_the_contrastive_loss_of_blocks(monkeypatch):
    monkeypatch.setattr(retrieval, "_LOSS_PAIRS", 3)
    z_image, z_text = np.random.default_rng(0).normal(size=(2, 5, 4))

    class Scaled:
        scale = 7.0

        def similarity(self, z_image, z_text):
            return z_image @ z_text.T

    wanted = 0.0
    for rows in (slice(0, 3), slice(3, 5)):  # five pairs in two blocks
        exp = np.exp(7 * z_image[rows] @ z_text[rows].T)
        wanted -= (np.log(np.diag(exp) / exp.sum(0)) + np.log(np.diag(exp) / exp.sum(1))).sum() / 2 / 5
    assert retrieval.pair_loss(Scaled(), z_image, z_text) == {"loss": pytest.approx(wanted, rel=1e-9)}
    assert retrieval.pair_loss(Scaled(), z_image[:1], z_text[:1]) == {}
    assert retrieval.pair_loss(object(), z_image, z_text) == {}
