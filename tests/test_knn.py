import numpy as np
import pytest

from clip_jax.evaluation import topk
from clip_jax.evaluation.knn import classes_by_votes


def brute_force(x_train, labels, x_test, k, temperature):
    """The classes of each row by votes, in float64: first those with more votes, then those with a nearer neighbour."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (x_train, x_test)]
    rows = []
    for cosines in unit[1] @ unit[0].T:
        nearest = sorted(range(len(labels)), key=lambda i: (-round(cosines[i], 6), i))[:k]
        votes = {}
        for i in nearest:
            weight = np.exp(cosines[i] / temperature) if temperature else 1
            votes[labels[i]] = votes.get(labels[i], 0) + weight
        found = sorted(votes, key=lambda label: -round(votes[label], 6))  # stable: the nearer first
        rows.append(found + [-1] * (min(k, len(labels)) - len(found)))
    return np.asarray(rows)


@pytest.mark.parametrize("temperature", [0, 0.07])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_votes_equal_brute_force(k, temperature, monkeypatch):
    monkeypatch.setattr(topk, "_CANDIDATES", 16)  # several blocks
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 50)
    x_train, x_test = rng.normal(size=(50, 5)), rng.normal(size=(30, 5))
    found = classes_by_votes(x_train, labels, x_test, k, temperature)
    np.testing.assert_array_equal(found, brute_force(x_train, labels, x_test, k, temperature))
    # Few directions: most cosines, and so most votes, are equal.
    x_train, x_test = rng.integers(-1, 2, (50, 2)) + [0.0, 3], rng.integers(-1, 2, (30, 2)) + [0.0, 3]
    found = classes_by_votes(x_train, labels, x_test, k, temperature)
    np.testing.assert_array_equal(found, brute_force(x_train, labels, x_test, k, temperature))


def test_ties_and_weights():
    degrees = np.radians([0, 10, 20, 30, 40])
    x_train = np.stack([np.cos(degrees), np.sin(degrees)], 1)
    labels, x_test = [3, 1, 1, 3, 0], [[2.0, 0.0]]
    assert classes_by_votes(x_train, labels, x_test, 2, 0).tolist() == [[3, 1]]  # one vote each: 3 is nearer
    assert classes_by_votes(x_train, labels, x_test, 3, 0).tolist() == [[1, 3, -1]]
    assert classes_by_votes(x_train, labels, x_test, 4, 0).tolist() == [[3, 1, -1, -1]]
    assert classes_by_votes(x_train, labels, x_test, 9, 0).tolist() == [[3, 1, 0, -1, -1]]
    # The third neighbour lies so far off that its vote counts for little at a low temperature.
    assert classes_by_votes(x_train, labels, x_test, 3, 0.01).tolist() == [[3, 1, -1]]
    assert classes_by_votes(x_train, labels, x_test, 3, 1e-6).tolist() == [[3, 1, -1]]
    # Equal cosines: the training image with the lower number comes first.
    assert classes_by_votes([[1.0, 1], [1, -1], [1, 1]], [2, 0, 1], x_test, 1, 0.07).tolist() == [[2]]
