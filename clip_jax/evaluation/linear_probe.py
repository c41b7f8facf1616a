"""Multinomial logistic regression on frozen embeddings, as CLIP's evaluation fits it."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.errors import UserError

L2_GRID = tuple(10.0**e for e in (1, 0, -1, -2, -3, -4, -5, -6))
_VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class ProbeResult:
    """The result of a linear probe.

    Attributes:
      accuracy: on the test set, in [0, 1].
      val_accuracy: on the validation set, with the chosen `l2`.
      l2: the chosen strength of the regularisation.
      predictions: int32 `[n]`, of the test set.
    """

    accuracy: float
    val_accuracy: float
    l2: float
    predictions: np.ndarray


def linear_probe(
    z_train, labels_train, z_test, labels_test, *, z_val=None, labels_val=None, l2_grid=L2_GRID, max_steps=1000
):
    """Fits `mean cross-entropy + l2/2 * |weights|^2` by full-batch L-BFGS; the bias is not regularised.

    `l2` is the value of the grid with the highest validation accuracy, the strongest one among equals. The classifier
    is then fitted again on training and validation examples together. The features are centred and divided by their
    overall root mean square, so one grid suits every embedding size and scale.

    Args:
      z_train, z_test, z_val: float `[n, E]`. Without a validation set, every fifth example of each class, in a fixed
        random order, is held out of the training set.
      labels_train, labels_test, labels_val: int `[n]`, classes counted from 0.
      l2_grid: strengths to choose from.
      max_steps: limit of L-BFGS steps of one fit; a fit ends when the gradient vanishes.

    Returns: a `ProbeResult`.

    Raises UserError when there are fewer than two classes or no test example.
    """
    z_train, labels_train = np.asarray(z_train, np.float32), np.asarray(labels_train, np.int32)
    z_test, labels_test = np.asarray(z_test, np.float32), np.asarray(labels_test, np.int32)
    if len(np.unique(labels_train)) < 2:
        raise UserError("linear probe: the training set has fewer than two classes")
    if not len(z_test):
        raise UserError("linear probe: the test set is empty")
    if z_val is None:
        held_out = _validation_split(labels_train)
    else:
        held_out = np.arange(len(z_train) + len(z_val)) >= len(z_train)
        z_train = np.concatenate([z_train, np.asarray(z_val, np.float32)])
        labels_train = np.concatenate([labels_train, np.asarray(labels_val, np.int32)])
    if not held_out.any():
        raise UserError("linear probe: no class has enough examples for a validation set; give one")

    mean = z_train[~held_out].mean(0)
    scale = np.sqrt(np.mean((z_train[~held_out] - mean) ** 2)) + 1e-12
    x, x_test = jnp.asarray((z_train - mean) / scale), jnp.asarray((z_test - mean) / scale)
    labels = jnp.asarray(labels_train)
    classes = int(max(labels_train.max(), labels_test.max())) + 1
    zeros = {"weights": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}
    train_only = jnp.asarray(~held_out / (~held_out).sum(), jnp.float32)

    best_accuracy, best_l2 = -1.0, 0.0
    best_params, params = zeros, zeros
    for l2 in sorted(l2_grid, reverse=True):  # each fit starts from the one with the next stronger l2
        params = _fit(params, x, labels, train_only, l2, max_steps)
        correct = np.asarray(_predict(params, x) == labels)[held_out].mean()
        if correct > best_accuracy:
            best_accuracy, best_l2 = float(correct), l2
            best_params = params
    params = _fit(best_params, x, labels, jnp.full(len(x), 1 / len(x)), best_l2, max_steps)
    predictions = np.asarray(_predict(params, x_test), np.int32)
    return ProbeResult(float((predictions == labels_test).mean()), best_accuracy, best_l2, predictions)


def _validation_split(labels):
    """Returns a mask, bool `[n]`, of a random fifth of every class; the same for the same labels."""
    held_out = np.zeros(len(labels), bool)
    rng = np.random.default_rng(0)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out[rows[: int(len(rows) * _VALIDATION_SHARE)]] = True
    return held_out


def _logits(params, x):
    return jnp.matmul(x, params["weights"], precision=jax.lax.Precision.HIGHEST) + params["bias"]


@jax.jit
def _predict(params, x):
    return _logits(params, x).argmax(-1)


@functools.partial(jax.jit, static_argnames="max_steps")
def _fit(params, x, labels, example_weights, l2, max_steps):
    """Minimises the objective from `params`; `example_weights` float `[n]` sum to 1, weight 0 excludes an example."""

    def objective(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), labels)
        return jnp.sum(example_weights * losses) + 0.5 * l2 * jnp.sum(params["weights"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(params, updates), state

    def proceed(carry):
        state = carry[1]
        count, grad = optax.tree.get(state, "count"), optax.tree.get(state, "grad")
        return (count == 0) | ((count < max_steps) & (optax.tree.norm(grad) > 1e-5))

    return jax.lax.while_loop(proceed, step, (params, solver.init(params)))[0]
