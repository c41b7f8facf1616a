"""Multinomial logistic regression on frozen features, by the protocol of CLIP's linear probes.

Radford et al. 2021, appendix A.3. As there:
  - The objective is that of scikit-learn's LogisticRegression with C = 1 / lambda: the sum over the examples of the
    cross-entropy, plus lambda / 2 times the sum of the squared weights. The bias is not regularised. The features are
    neither centred nor scaled nor normalised.
  - The solver is L-BFGS with at most 1,000 iterations.
  - Validation accuracy chooses lambda from 1e-6 to 1e6, eight steps a decade, by the search of `search`.
  - The classifier is then fitted again on training and validation examples together.

Not as there: scikit-learn computes in float64 and starts each fit at zero. Here a fit is in float32 and starts at that
of the nearest lambda. It has centred features and scaled weights as its variables. That leaves the minimum where it is
and brings a fit closer to it within the limit. CLIP reports accuracies averaged over classes on some data sets; here
the accuracy is that over all images.

Assumptions, as the paper does not say: the strongest lambda among equals, a fifth of each class as the validation set
where a data set has none, and the point at which a fit ends.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.errors import UserError

STEPS_PER_DECADE = 8
LAMBDAS = tuple(10.0 ** (i / STEPS_PER_DECADE - 6) for i in range(12 * STEPS_PER_DECADE + 1))
MAX_STEPS = 1000
_TOLERANCE = 1e-6  # of the norm of the gradient of the mean loss
_PATIENCE = 5  # steps without a lower objective, after which a fit ends
_VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class ProbeResult:
    """The result of a linear probe.

    Attributes:
      accuracy: on the test set, in [0, 1].
      val_accuracy: on the validation set, with the chosen `l2`.
      l2: the chosen lambda.
      predictions: int32 `[n]`, of the test set.
    """

    accuracy: float
    val_accuracy: float
    l2: float
    predictions: np.ndarray


def linear_probe(x_train, labels_train, x_test, labels_test, *, x_val=None, labels_val=None, l2=None):
    """Fits a classifier on the training examples and tests it, as the module describes.

    Args:
      x_train, x_test, x_val: features, float `[n, D]`. Without a validation set, every fifth example of each class, in
        a fixed random order, is held out of the training set.
      labels_train, labels_test, labels_val: int `[n]`, classes counted from 0.
      l2: lambda; None searches for it.

    Returns: a `ProbeResult`.

    Raises UserError when there are fewer than two classes or no test example.
    """
    x_train, labels_train = np.asarray(x_train, np.float32), np.asarray(labels_train, np.int32)
    x_test, labels_test = np.asarray(x_test, np.float32), np.asarray(labels_test, np.int32)
    if len(np.unique(labels_train)) < 2:
        raise UserError("linear probe: the training set has fewer than two classes")
    if not len(x_test):
        raise UserError("linear probe: the test set is empty")
    if x_val is None:
        held_out = _validation_split(labels_train)
    else:
        held_out = np.arange(len(x_train) + len(x_val)) >= len(x_train)
        x_train = np.concatenate([x_train, np.asarray(x_val, np.float32)])
        labels_train = np.concatenate([labels_train, np.asarray(labels_val, np.int32)])
    if not held_out.any():
        raise UserError("linear probe: no class has enough examples for a validation set; give one")

    fitter = Fitter(x_train, labels_train, int(max(labels_train.max(), labels_test.max())) + 1)
    x_val, labels_val = x_train[held_out], labels_train[held_out]
    fits = {}

    def validation_accuracy(value):
        nearest = min(fits, key=lambda other: abs(np.log(other / value)), default=None)
        fits[value] = fitter.fit(value, ~held_out, fits.get(nearest))
        return float((fitter.predict(fits[value], x_val) == labels_val).mean())

    chosen, accuracy = search(validation_accuracy) if l2 is None else (l2, validation_accuracy(l2))
    params = fitter.fit(chosen, np.ones_like(held_out), fits[chosen])
    predictions = fitter.predict(params, x_test)
    return ProbeResult(float((predictions == labels_test).mean()), accuracy, chosen, predictions)


def search(accuracy):
    """Returns the best of `LAMBDAS` and its accuracy, found by CLIP's parametric binary search.

    It starts with every second power of ten, 1e-6 to 1e6. Then it halves the interval around the best value, the
    strongest among equals, until the steps are an eighth of a decade: at most 15 values of 97.

    Args:
      accuracy: lambda -> validation accuracy; called once for each value.
    """
    found, step = {}, 2 * STEPS_PER_DECADE
    places = range(len(LAMBDAS) - 1, -1, -step)  # the strongest first: each fit starts from a stronger one
    while True:
        found |= {i: accuracy(LAMBDAS[i]) for i in places if i not in found and 0 <= i < len(LAMBDAS)}
        best = max(found, key=lambda i: (found[i], i))
        if step == 1:
            return LAMBDAS[best], found[best]
        step //= 2
        places = (best + step, best - step)


class Fitter:
    """Fits classifiers to subsets of one set of examples.

    Args:
      x: features, float32 `[n, D]`.
      labels: int32 `[n]`.
      classes: how many there are.
    """

    def __init__(self, x, labels, classes):
        self.mean = x.mean(0, dtype=np.float64).astype(np.float32)
        centred = x - self.mean  # the bias is free, so the minimum has the same weights
        self.variance = np.mean(centred**2, axis=0)
        self.x, self.labels = jnp.asarray(centred), jnp.asarray(labels)
        self.zeros = {"weights": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}

    def fit(self, l2, subset, start=None):
        """Returns the minimum of the objective: `weights` float32 `[D, classes]`, `bias` float32 `[classes]`.

        The bias is that of the centred features.

        Args:
          l2: lambda.
          subset: bool `[n]`, the examples to fit.
          start: such parameters to start from; None: zeros.
        """
        count = subset.sum()
        weights, penalty = jnp.asarray(subset / count, jnp.float32), l2 / count
        # The curvature of the mean loss in a feature's weights is at most its variance plus the penalty.
        scale = jnp.asarray(1 / np.sqrt(self.variance + penalty), jnp.float32)
        return _fit(start or self.zeros, self.x, self.labels, weights, penalty, scale, MAX_STEPS)

    def predict(self, params, x):
        """Returns the most probable class of features `[m, D]`, int32 `[m]`."""
        return np.asarray(_predict(params, jnp.asarray(x - self.mean)), np.int32)


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
def _fit(params, x, labels, example_weights, penalty, scale, max_steps):
    """Minimises the cross-entropies, weighted by `example_weights` `[n]`, plus penalty / 2 times |weights|^2.

    L-BFGS runs on the weights divided by `scale` `[D]`. It ends after `max_steps`, when the gradient vanishes, or where
    float32 resolves no further descent.
    """

    def unscaled(params):
        return params | {"weights": params["weights"] * scale[:, None]}

    def objective(scaled):
        params = unscaled(scaled)
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), labels)
        return jnp.sum(example_weights * losses) + 0.5 * penalty * jnp.sum(params["weights"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state, idle = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        idle = jnp.where(optax.tree.get(state, "value") < value, 0, idle + 1)
        return optax.apply_updates(params, updates), state, idle

    def proceed(carry):
        _, state, idle = carry
        count, grad = optax.tree.get(state, "count"), optax.tree.get(state, "grad")
        moving = (optax.tree.norm(grad) > _TOLERANCE) & (idle < _PATIENCE)
        return (count == 0) | ((count < max_steps) & moving)

    scaled = params | {"weights": params["weights"] / scale[:, None]}
    return unscaled(jax.lax.while_loop(proceed, step, (scaled, solver.init(scaled), 0))[0])
