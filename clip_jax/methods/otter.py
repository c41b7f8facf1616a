"""OTTER: Wu et al. 2022, "Data Efficient Language-Supervised Zero-Shot Recognition with Optimal Transport
Distillation".

A caption may also describe other images of the batch. A teacher, the exponential moving average of the student, embeds
the same batch. An entropic optimal transport between its images and texts, based on the similarities of images, of
texts and of both, estimates which pairs match. The rows of the plan, without the diagonal, are soft targets in addition
to the pair itself. With the teacher's embeddings U, V and the student's u, v:

    S_image = gamma_image U U^T + gamma_text V V^T + U V^T,  S_text = S_image^T
    M(S)    = Sinkhorn's plan for S, with each row divided by its sum
    InfoNCE = CE(s u v^T) + CE(s v u^T)
    Distill = KL(M(S_image) || softmax(s' u v^T)) + KL(M(S_text) || softmax(s' v u^T))
    loss    = alpha InfoNCE + (1 - alpha) Distill

As in the released code, both directions are summed and there are two scales, s and s', clipped to [1, 100] in the loss.
The paper's form, one cross-entropy, equals this up to a constant when the scales are equal. In the released runs with
eight processes, `remove_diag` clears the right diagonal only on the first process; here it clears the right one. The
teacher is in training mode, with batch statistics of its own. The other rows of the paper's table are options:
`alpha=1` is InfoNCE, with `label_smoothing` LS; `iterations=0, entropy=0.01, remove_diag=False`, a softmax of 100 S, is
KD. `warmup_steps`, for towers that start from random weights, is not in the paper.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.losses.contrastive import contrast
from clip_jax.losses.transport import divergence, sinkhorn
from clip_jax.methods.interface import read_options, two_tower_method
from clip_jax.models.common import moving_average
from clip_jax.models.two_tower import TwoTower

SCALES = ("logit_scale", "logit_scale_distill")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.otter`. The defaults are those of the published run. Raises UserError for invalid values.

    Attributes:
      alpha: the weight of InfoNCE. The distillation has 1 - alpha. A value of 1 removes the teacher.
      label_smoothing: of InfoNCE's targets, spread over the wrong pairs.
      gamma_image, gamma_text: weights of the similarities of images and of texts in S.
      entropy: lambda, which divides the similarities.
      iterations: the number of Sinkhorn iterations; 0: a softmax of each row.
      remove_diag: the pair itself is no target: `eta = 100 (gamma_image + gamma_text)` is subtracted from its
        similarity, which is 0 where both weights are.
      keys_stopgrad: the keys of each direction have no gradient; only the queries do.
      decay: of the teacher. Update n, counted from 1, uses at most `(1 + n) / (10 + n)`.
      warmup_steps: the number of steps in which the weight of the distillation grows linearly from 0. InfoNCE has the
        rest.
    """

    alpha: float = 0.5
    label_smoothing: float = 0.0
    gamma_image: float = 1.0
    gamma_text: float = 1.0
    entropy: float = 0.15
    iterations: int = 5
    remove_diag: bool = True
    keys_stopgrad: bool = True
    decay: float = 0.999
    warmup_steps: int = 0

    def __post_init__(self):
        for name in ("alpha", "label_smoothing", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"otter.{name}={getattr(self, name)}: must be between 0 and 1")
        for name in ("gamma_image", "gamma_text", "iterations", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"otter.{name}={getattr(self, name)}: must be at least 0")
        if not self.entropy > 0:
            raise UserError(f"otter.entropy={self.entropy}: must be above 0")


def make(config):
    """Returns the OTTER method of a configuration.

    Raises UserError for invalid options or towers and for a batch of fewer than two examples.
    """
    options = read_options(config, "otter", Options)
    if config.data.batch_size < 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: method='otter' compares a pair with others and needs at least 2"
        )
    scale_max = config.model.logit_scale_max
    base = two_tower_method(
        config,
        SCALES[:1],
        functools.partial(loss, options, scale_max),
        scale=lambda params: clipped_scale(params["logit_scale"], scale_max),
    )
    return base if options.alpha == 1 else with_teacher(base, TwoTower(config.model), options.decay)


def clipped_scale(parameter, scale_max):
    """Returns `exp(parameter)` between 1 and `exp(scale_max)`, float32."""
    return jnp.exp(jnp.clip(parameter, 0.0, scale_max))


def decay_of(n, decay):
    """Returns the teacher's decay in update `n`, counted from 1. Early updates follow the student faster."""
    return jnp.minimum(decay, (1 + n) / (10 + n))


def with_teacher(base, towers, decay):
    """Returns the method with the features `teacher_image` and `teacher_text` of `extra["teacher"]`.

    The teacher is the moving average of the towers and is updated at the start of a step. In the first step the teacher
    is a copy of the student, because the student may have been loaded from other weights after `init`.
    """

    def init(rng, batch):
        params, extra = base.init(rng, batch)
        params["logit_scale_distill"] = params["logit_scale"]
        return params, extra | {
            "teacher": {name: params[name] for name in ("img", "txt")},
            "updates": jnp.zeros((), jnp.int32),
        }

    def moved(params, extra):
        n = extra["updates"] + 1
        d = jnp.where(n == 1, 0.0, decay_of(n, decay))
        student = jax.lax.stop_gradient({name: params[name] for name in extra["teacher"]})
        average = moving_average(extra["teacher"], student, d)
        return jax.tree.map(lambda t, p: jnp.where(n == 1, p, t), average, student)

    def encode(params, extra, batch, rng, train):
        features, new_extra = base.encode(params, extra, batch, rng, train)
        teacher, _ = towers.encode(moved(params, extra), extra, batch, jax.random.fold_in(rng, 0), train)
        return features | {f"teacher_{name}": jax.lax.stop_gradient(z) for name, z in teacher.items()}, new_extra

    def heads(params, extra, features, batch, rng):
        return features, extra | {"teacher": moved(params, extra), "updates": extra["updates"] + 1}

    return dataclasses.replace(base, init=init, encode=encode, heads=heads)


def loss(options, scale_max, params, extra, features, batch, rng):
    """Returns OTTER's loss, as `Method.loss` does.

    `features` holds unit rows float32 `[B, E]`: `image`, `text` and, unless alpha is 1, `teacher_image` and
    `teacher_text`.

    Args:
      options: the `Options`.
      scale_max: the largest logarithm of a scale.
      params, extra, features, batch, rng: as for `Method.loss`.
    """
    o = options
    image, text = features["image"], features["text"]
    scales = {name: clipped_scale(params[name], scale_max) for name in SCALES if name in params}
    keys = jax.lax.stop_gradient((text, image)) if o.keys_stopgrad else (text, image)
    directions = list(zip((image, text), keys, strict=True))
    found = [contrast(query, key, scales["logit_scale"], o.label_smoothing) for query, key in directions]
    value = sum(x for x, _ in found)
    metrics = (
        dict(zip(("image_to_text_acc", "text_to_image_acc"), (accuracy for _, accuracy in found), strict=True)) | scales
    )
    if o.alpha == 1:
        return value, metrics
    u, v = features["teacher_image"], features["teacher_text"]
    rows, cols = jnp.concatenate([u, v], axis=1), jnp.concatenate([o.gamma_image * u + v, o.gamma_text * v], axis=1)
    diagonal = 100 * (o.gamma_image + o.gamma_text) * o.remove_diag
    distill = 0.0
    for (query, key), sides in zip(directions, ((rows, cols), (cols, rows)), strict=True):
        plan = sinkhorn(*sides, o.entropy, o.iterations, diagonal)
        distill += divergence(query, key, scales["logit_scale_distill"], *sides, plan, o.entropy, diagonal)
    weight = 1 - o.alpha
    if o.warmup_steps:  # `heads` has already counted this step
        weight *= jnp.minimum(1.0, (extra["updates"] - 1) / o.warmup_steps)
    return (1 - weight) * value + weight * distill, metrics | {"loss_infonce": value, "loss_distill": distill}
