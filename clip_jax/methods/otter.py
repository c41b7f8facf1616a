"""OTTER: Wu et al. 2022, "Data Efficient Language-Supervised Zero-Shot Recognition with Optimal Transport Distillation".

A caption may describe other images of the batch too. A teacher, the exponential moving average of the student, embeds the same batch; an
entropic optimal transport between its images and texts, by similarities of images, of texts and of both, says which. The plan's rows,
without the diagonal, are soft targets beside the pair itself (U, V: the teacher's embeddings, u, v: the student's):

    S_image = gamma_image U U^T + gamma_text V V^T + U V^T,  S_text = S_image^T,  M(S): Sinkhorn's plan, its rows divided by their sums
    InfoNCE = CE(s u v^T) + CE(s v u^T),  Distill = KL(M(S_image) || softmax(s' u v^T)) + KL(M(S_text) || softmax(s' v u^T))
    loss    = alpha InfoNCE + (1 - alpha) Distill

Sums of both directions and two scales s and s', clipped to [1, 100] where they are used, as in the released code; the paper's form, one
cross-entropy, is the same up to a constant where both scales are equal. Released runs have eight processes, whose `remove_diag` clears
the right diagonal on the first one alone; here it is the right one. The teacher is in training mode, with statistics of its own batch.
The rest of the paper's table: `alpha=1` is InfoNCE, with `label_smoothing` LS; `iterations=0, entropy=0.01, remove_diag=False`,
a softmax of 100 S, is KD. Not in the paper: `warmup_steps`, for runs whose towers start from nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.losses.contrastive import contrast
from clip_jax.losses.transport import divergence, sinkhorn
from clip_jax.methods.interface import read_options, two_tower_method
from clip_jax.models.two_tower import TwoTower

SCALES = ("logit_scale", "logit_scale_distill")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.otter`; defaults are the published run's. Raises UserError for wrong values.

    Attributes:
      alpha: weight of InfoNCE; 1 - alpha is the distillation's. With 1 there is no teacher.
      label_smoothing: of InfoNCE's targets, spread over the wrong pairs.
      gamma_image, gamma_text: weights of the similarities of images and of texts in the teacher's.
      entropy: lambda, by which similarities are divided.
      iterations: of Sinkhorn; 0: rows are softmaxes.
      remove_diag: the pair itself is no target, by `eta = 100 (gamma_image + gamma_text)` taken from its similarity.
      keys_stopgrad: an image learns from finding its text and a text from finding its image, but neither from being found.
      decay: of the teacher; update n, from 1, has at most `(1 + n) / (10 + n)`.
      warmup_steps: the distillation's weight grows linearly from 0 so long; the rest is InfoNCE's.
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
    """The OTTER method of a configuration; raises UserError for options or towers that cannot be, and a batch without a wrong pair."""
    options = read_options(config, "otter", Options)
    if config.data.batch_size < 2:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: method='otter' matches a pair with other pairs: at least 2 are needed"
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
    """The teacher's decay in update `n`, from 1: less in the first ones, which follow the student faster."""
    return jnp.minimum(decay, (1 + n) / (10 + n))


def with_teacher(base, towers, decay):
    """The method with the features `teacher_image` and `teacher_text` of a moving average of its towers, `extra["teacher"]`.

    The average is moved at the start of a step, so the first one would move it to where it is: there the student, which may have got
    weights from elsewhere, is its own teacher.
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
        return jax.tree.map(lambda t, p: jnp.where(n == 1, p, d * t + (1 - d) * p), extra["teacher"], student)

    def encode(params, extra, batch, rng, train):
        features, new_extra = base.encode(params, extra, batch, rng, train)
        teacher, _ = towers.encode(moved(params, extra), extra, batch, jax.random.fold_in(rng, 0), train)
        return features | {f"teacher_{name}": jax.lax.stop_gradient(z) for name, z in teacher.items()}, new_extra

    def heads(params, extra, features, batch, rng):
        return features, extra | {"teacher": moved(params, extra), "updates": extra["updates"] + 1}

    return dataclasses.replace(base, init=init, encode=encode, heads=heads)


def loss(options, scale_max, params, extra, features, batch, rng):
    """OTTER's loss on unit rows `image`, `text` and, unless alpha is 1, `teacher_image`, `teacher_text`, float32 `[B, E]`."""
    o, image, text = options, features["image"], features["text"]
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
    if o.warmup_steps:  # heads has counted this step already
        weight *= jnp.minimum(1.0, (extra["updates"] - 1) / o.warmup_steps)
    return (1 - weight) * value + weight * distill, metrics | {"loss_infonce": value, "loss_distill": distill}
