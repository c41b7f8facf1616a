import itertools

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import baselines, linear_probe


def blobs(n, seed, classes=4, size=6, noise=0.3):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, size))
    labels = rng.integers(0, classes, n)
    return (centres[labels] + noise * rng.normal(size=(n, size))).astype(np.float32), labels.astype(np.int32)


def test_probe_solves_what_is_linearly_separable_whatever_the_scale():
    for scale, shift in ((1.0, 0.0), (1e-3, 5e-3), (100.0, -300.0)):
        (x, y), (x_test, y_test) = blobs(100, 0), blobs(100, 1)
        result = linear_probe.linear_probe(x * scale + shift, y, x_test * scale + shift, y_test, l2=1e-6 * scale**2)
        assert result.accuracy >= 0.97
        assert result.accuracy == pytest.approx((result.predictions == y_test).mean())


def logistic_regression(x, y, l2, classes):
    """Weights and bias that minimise the cross-entropies plus l2/2 |weights|^2, by Newton's method in float64."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
    n, d = x.shape
    params, penalty = np.zeros((d, classes)), np.full((d, classes), float(l2))
    penalty[-1] = 0  # the bias
    for _ in range(40):
        p = np.exp(x @ params - (x @ params).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - np.eye(classes)[y]) + penalty * params
        curvature = p[:, :, None] * (np.eye(classes) - p[:, None])
        hessian = np.einsum("ni,njk,nl->ijlk", x, curvature, x).reshape(d * classes, -1) + np.diag(penalty.ravel())
        # The biases are free up to a constant, so the Hessian is singular.
        params -= np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-12)[0].reshape(params.shape)
    assert np.abs(gradient).max() < 1e-8
    return params[:-1], params[-1]


@pytest.mark.parametrize("l2", [1e4, 30.0, 0.1])
def test_fit_is_the_minimum_of_the_documented_objective(l2):
    x, y = blobs(60, 2, noise=1.0)
    x = x * np.asarray([20, 1, 1, 1, 1, 0.1], np.float32) + 3  # the penalty is that of the features as they are
    subset = np.arange(60) >= 10
    fitter = linear_probe.Fitter(x, y, 4)
    params = fitter.fit(l2, subset)
    weights, bias = logistic_regression(x[subset], y[subset], l2, 4)
    np.testing.assert_allclose(params["weights"], weights, atol=1e-3 * np.abs(weights).max())
    centred = np.asarray(params["bias"]) - fitter.mean @ weights
    np.testing.assert_allclose(centred - centred.mean(), bias - bias.mean(), atol=5e-3)
    np.testing.assert_array_equal(fitter.predict(params, x), (x @ weights + bias).argmax(1))
    again = fitter.fit(l2, subset, start=fitter.fit(l2 / 100, subset))
    np.testing.assert_allclose(again["weights"], weights, atol=1e-3 * np.abs(weights).max())


def visited(accuracy):
    """Returns the logarithms of the values of lambda that the search tries, in order, and that of its choice."""
    tried = []

    def counted(value):
        tried.append(round(np.log10(value), 3))
        return accuracy(tried[-1])

    chosen, best = linear_probe.search(counted)
    assert best == max(accuracy(x) for x in tried)
    return tried, round(np.log10(chosen), 3)


def test_search_halves_the_interval_around_the_best_strength():
    assert len(linear_probe.LAMBDAS) == 97  # 96 steps
    coarse = [6, 4, 2, 0, -2, -4, -6]
    tried, chosen = visited(lambda x: -abs(x + 2.6))
    assert tried == [*coarse, -1, -3, -2.5, -3.5, -2.25, -2.75, -2.375, -2.625]
    assert chosen == -2.625
    tried, chosen = visited(lambda x: x)  # nothing lies beyond the ends
    assert tried == [*coarse, 5, 5.5, 5.75, 5.875] and chosen == 6
    tried, chosen = visited(lambda x: float(x <= 1.3))  # the strongest among equals
    assert chosen == 1.25 and len(tried) == len(set(tried)) == 15


def test_strength_is_chosen_on_the_validation_set():
    rng = np.random.default_rng(3)
    # 8 informative and 200 noise features from 60 examples: without regularisation the probe fits the noise.
    (x, y), (x_val, y_val), (x_test, y_test) = (
        blobs(n, seed, size=8, noise=0.8) for n, seed in ((60, 4), (400, 5), (400, 6))
    )
    x, x_val, x_test = (
        np.concatenate([part, 0.5 * rng.normal(size=(len(part), 200))], 1) for part in (x, x_val, x_test)
    )
    chosen = linear_probe.linear_probe(x, y, x_test, y_test, x_val=x_val, labels_val=y_val)
    weak = linear_probe.linear_probe(x, y, x_test, y_test, x_val=x_val, labels_val=y_val, l2=1e-6)
    assert chosen.l2 > 1 and chosen.l2 in linear_probe.LAMBDAS
    assert chosen.val_accuracy > weak.val_accuracy and chosen.accuracy > weak.accuracy
    assert weak.l2 == 1e-6


def test_the_last_fit_is_on_training_and_validation_examples():
    (x, y), (x_val, y_val), (x_test, y_test) = (blobs(n, n, noise=1.5) for n in (40, 60, 100))
    result = linear_probe.linear_probe(x, y, x_test, y_test, x_val=x_val, labels_val=y_val, l2=5.0)
    for fitted, tested, accuracy in (
        ((np.concatenate([x, x_val]), np.concatenate([y, y_val])), (x_test, y_test), result.accuracy),
        ((x, y), (x_val, y_val), result.val_accuracy),
    ):
        weights, bias = logistic_regression(*fitted, 5.0, 4)
        assert accuracy == pytest.approx(((tested[0] @ weights + bias).argmax(1) == tested[1]).mean())


def test_probe_is_deterministic():
    (x, y), (x_test, y_test) = blobs(100, 7, noise=1.5), blobs(50, 8, noise=1.5)
    a, b = (linear_probe.linear_probe(x, y, x_test, y_test) for _ in range(2))
    assert (a.accuracy, a.val_accuracy, a.l2) == (b.accuracy, b.val_accuracy, b.l2)
    np.testing.assert_array_equal(a.predictions, b.predictions)


def test_probe_refuses():
    x, y = blobs(20, 9)
    with pytest.raises(UserError, match="two classes"):
        linear_probe.linear_probe(x, np.zeros(20, int), x, y)
    with pytest.raises(UserError, match="test set is empty"):
        linear_probe.linear_probe(x, y, x[:0], y[:0])
    with pytest.raises(UserError, match="validation"):
        linear_probe.linear_probe(x[:4], np.arange(4), x, y)


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


def test_majority():
    assert baselines.majority([2, 2, 1, 0], [1, 1, 2]) == 0.25  # the class is that of the training images
    assert baselines.majority([2, 2, 1, 0], [2, 2, 1, 0]) == 0.5
    assert baselines.majority([0, 1], [1, 0]) == 0.5 and baselines.majority([], [0]) == 0.0


def test_chance():
    assert baselines.chance(4) == 0.25
    assert baselines.chance(4, 5) == 1.0
    for classes, k, labels in ((5, 2, 2), (6, 3, 1), (4, 3, 3), (3, 1, 3)):
        draws = list(itertools.combinations(range(classes), k))
        share = np.mean([min(draw) < labels for draw in draws])
        assert baselines.chance(classes, k, labels) == pytest.approx(share, rel=1e-12)
