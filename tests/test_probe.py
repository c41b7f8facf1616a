import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import baselines
from clip_jax.evaluation.linear_probe import linear_probe


def blobs(n, seed, classes=4, size=6, noise=0.3):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, size))
    labels = rng.integers(0, classes, n)
    return (centres[labels] + noise * rng.normal(size=(n, size))).astype(np.float32), labels.astype(np.int32)


def test_probe_solves_what_is_linearly_separable_whatever_the_scale():
    for scale, shift in ((1.0, 0.0), (1e-3, 5e-3), (100.0, -300.0)):
        (x, y), (x_test, y_test) = blobs(200, 0), blobs(100, 1)
        result = linear_probe(x * scale + shift, y, x_test * scale + shift, y_test)
        assert result.accuracy >= 0.97
        assert result.accuracy == pytest.approx((result.predictions == y_test).mean())


def test_fit_is_the_minimum_of_the_documented_objective():
    from jax import tree

    from clip_jax.evaluation.linear_probe import _fit

    x, y = blobs(60, 2, noise=1.0)
    weights = np.full(60, 1 / 60, np.float32)
    zeros = {"weights": np.zeros((6, 4), np.float32), "bias": np.zeros(4, np.float32)}
    params = tree.map(np.asarray, _fit(zeros, x, y, weights, 0.1, 500))
    logits = x @ params["weights"] + params["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(4)[y]) / 60
    np.testing.assert_allclose(x.T @ error + 0.1 * params["weights"], 0, atol=1e-4)
    np.testing.assert_allclose(error.sum(0), 0, atol=1e-4)
    assert np.abs(params["weights"]).max() > 0.05


def test_strength_is_chosen_on_the_validation_set():
    rng = np.random.default_rng(3)
    # 8 informative and 200 noise features from 60 examples: without regularisation the probe fits the noise.
    (x, y), (x_val, y_val), (x_test, y_test) = (
        blobs(n, seed, size=8, noise=0.8) for n, seed in ((60, 4), (400, 5), (400, 6))
    )
    x, x_val, x_test = (np.concatenate([part, 2 * rng.normal(size=(len(part), 200))], 1) for part in (x, x_val, x_test))
    chosen = linear_probe(x, y, x_test, y_test, z_val=x_val, labels_val=y_val)
    weak = linear_probe(x, y, x_test, y_test, z_val=x_val, labels_val=y_val, l2_grid=[1e-6])
    assert chosen.l2 > 1e-4
    assert chosen.val_accuracy > weak.val_accuracy
    assert weak.l2 == 1e-6


def test_probe_is_deterministic():
    (x, y), (x_test, y_test) = blobs(100, 7, noise=1.5), blobs(50, 8, noise=1.5)
    a, b = linear_probe(x, y, x_test, y_test), linear_probe(x, y, x_test, y_test)
    assert (a.accuracy, a.val_accuracy, a.l2) == (b.accuracy, b.val_accuracy, b.l2)
    np.testing.assert_array_equal(a.predictions, b.predictions)


def test_probe_refuses():
    x, y = blobs(20, 9)
    with pytest.raises(UserError, match="two classes"):
        linear_probe(x, np.zeros(20, int), x, y)
    with pytest.raises(UserError, match="test set is empty"):
        linear_probe(x, y, x[:0], y[:0])
    with pytest.raises(UserError, match="validation"):
        linear_probe(x[:4], np.arange(4), x, y)


# --- baselines ---


def test_nearest_classes_equals_brute_force():
    rng = np.random.default_rng(0)
    references, queries, labels = rng.normal(size=(40, 5)), rng.normal(size=(700, 5)), rng.integers(0, 6, 40)
    labels[labels == 3] = 2  # a class without reference comes last
    distances = np.linalg.norm(queries[:, None] - references, axis=2)
    by_class = np.stack([np.where(labels == c, distances, np.inf).min(1) for c in range(6)], 1)
    top = baselines.nearest_classes(references, labels, queries, 6, k=6)
    np.testing.assert_array_equal(top, np.argsort(by_class, 1, kind="stable"))
    assert (top[:, 5] == 3).all()


def test_nearest_classes_leaves_the_query_itself_out():
    references, labels = np.array([[0.0], [0.1], [5.0]]), np.array([0, 1, 2])
    assert baselines.nearest_classes(references, labels, references, 3, 1).tolist() == [[0], [1], [2]]
    assert baselines.nearest_classes(references, labels, references, 3, 1, leave_out=[0, 1, -1]).tolist() == [
        [1],
        [0],
        [2],
    ]


def test_pixel_features_average_over_areas():
    image = np.zeros((32, 48, 3), np.uint8)
    image[:2, :3] = 255  # one area of 16 x 16
    image[2:4, :3, 0] = 51
    features = baselines.pixel_features([image, np.full((16, 16, 3), 255, np.uint8)]).reshape(2, 16, 16, 3)
    np.testing.assert_allclose(features[0, 0, 0], [0.5] * 3)
    np.testing.assert_allclose(features[0, 1, 0], [-0.3, -0.5, -0.5], atol=1e-6)
    assert (features[0, 2:] == -0.5).all() and (features[1] == 0.5).all()


def test_chance():
    assert baselines.chance(4) == 0.25
    assert baselines.chance(4, 5) == 1.0
