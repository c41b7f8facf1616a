"""ALIP: Yang et al. 2023, "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption" (arXiv 2308.08428).

CLIP on two texts of each image, the raw text of the data and a synthetic caption (`clip_jax/tools/caption.py`), with
one text tower. Examples are weighted by how well image and texts agree. Let u, r and c be the unit embeddings of image,
raw text and caption, S_rc = r.c, S_ur = u.r, S_uc = u.c, and H the running averages of these three over the global
batch:

    H    <- m H + (1 - m) mean(S), before it is used
    W    = min(exp(gamma_s (S_rc - H_rc)), 1)                    language consistency gate: the weight of an example
    W_ur = exp(gamma_p (S_ur - H_ur)) where W < 1, else 1        description consistency gate: the weight of a pair
    W_uc = exp(gamma_p (S_uc - H_uc)) where W < 1, else 1
    loss = mean(W W_ur pair(u, r)) + mean(W W_uc pair(u, c))     pair: InfoNCE, half the sum of both directions

The loss is a sum of two terms, not their mean. The weights have no gradient. The three averages start at 1, as in the
released code, and take about 300 steps to settle. They are part of `extra` and therefore of checkpoints; the released
code restarts them when a run resumes. In the released code each of eight processes computes the whole loss without the
gradient through the features of the others, so the mean over processes is an eighth of the gradient. Here the gradient
is that of the loss, and a bound on the gradient norm applies to it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.losses.contrastive import infonce
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options, text_view
from clip_jax.models.common import fold_in_ids, shard_batch, stack_views, unstack_views
from clip_jax.models.two_tower import TwoTower

PAIRS = ("text_synthetic", "image_text", "image_synthetic")


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.alip`. The defaults are those of the released run. Raises UserError for invalid values.

    Attributes:
      gamma_sample, gamma_pair: how fast the weights of examples and of pairs fall when a similarity is below the
        average.
      momentum: of the running averages.
      synthetic: templates of the synthetic caption with fields of the record, as in `data.templates`.
    """

    gamma_sample: float = 2.0
    gamma_pair: float = 2.0
    momentum: float = 0.99
    synthetic: tuple[str, ...] = ("{synthetic}",)

    def __post_init__(self):
        for name in ("gamma_sample", "gamma_pair"):
            if not getattr(self, name) >= 0:
                raise UserError(f"alip.{name}={getattr(self, name)}: must be at least 0")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"alip.momentum={self.momentum}: must be between 0 and 1")
        if not self.synthetic:
            raise UserError('alip.synthetic=(): at least one template is needed, such as "{synthetic}"')


def make(config):
    """Returns the ALIP method of a configuration; raises UserError for invalid options or towers."""
    options = read_options(config, "alip", Options)
    base, towers = clip.make(config), TwoTower(config.model)

    def init(rng, batch):
        params, extra = base.init(rng, batch)
        return params, extra | {"averages": {pair: jnp.ones((), jnp.float32) for pair in PAIRS}}

    def encode(params, extra, batch, rng, train):
        """Returns the unit rows `image`, `text` and `synthetic`, float32 `[b, E]`."""
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(fold_in_ids(rng, batch["example_id"]))
        image, _, extra = towers.encode_image(params, extra, batch["image"], train, keys[:, 0])
        ids, text_keys = stack_views([shard_batch(batch[name]) for name in ("text", "synthetic")], keys[:, 1:])
        texts, _, extra = towers.encode_text(params, extra, ids, train, text_keys)
        raw, synthetic = jnp.moveaxis(unstack_views(texts, len(image)), 1, 0)
        return {"image": image, "text": raw, "synthetic": synthetic}, extra

    def heads(params, extra, features, batch, rng):
        found, m = similarities(features), options.momentum
        return features, extra | {
            "averages": {pair: m * extra["averages"][pair] + (1 - m) * found[pair].mean() for pair in PAIRS}
        }

    def loss(params, extra, features, batch, rng):
        scale = base.scale(params)
        value, metrics = adaptive_infonce(features, extra["averages"], scale, options.gamma_sample, options.gamma_pair)
        return value, {**metrics, "logit_scale": scale} | {
            f"average_{pair}": x for pair, x in extra["averages"].items()
        }

    views = (*base.views, text_view(config, "synthetic", templates=options.synthetic, rewrites=()))
    return dataclasses.replace(base, views=views, init=init, encode=encode, heads=heads, loss=loss)


def similarities(features):
    """Returns `{pair: float32 [B]}`, the similarities within each example, without a gradient."""
    fixed = jax.lax.stop_gradient({name: x.astype(jnp.float32) for name, x in features.items()})
    return {pair: jnp.sum(fixed[a] * fixed[b], axis=1) for pair in PAIRS for a, b in [pair.split("_")]}


def weights(found, averages, gamma_sample=2.0, gamma_pair=2.0):
    """Returns the weights of the loss.

    Args:
      found: similarities `[B]` by the names of `PAIRS`.
      averages: scalars by the names of `PAIRS`.
      gamma_sample, gamma_pair: see `Options`.

    Returns:
      `(sample, pairs)`: the weights of the examples, float32 `[B]`, and `{"text": ..., "synthetic": ...}`, those of the
      pairs of the image with either text, float32 `[B]`.
    """
    below = {pair: found[pair] - averages[pair] for pair in PAIRS}
    raw = jnp.exp(gamma_sample * below["text_synthetic"])
    pairs = {
        text: jnp.where(raw < 1, jnp.exp(gamma_pair * below[f"image_{text}"]), 1.0) for text in ("text", "synthetic")
    }
    return jnp.minimum(raw, 1.0), pairs


def adaptive_infonce(features, averages, scale, gamma_sample=2.0, gamma_pair=2.0):
    """Returns ALIP's loss.

    Args:
      features: unit vectors `image`, `text` and `synthetic`, `[B, E]`.
      averages: scalars by the names of `PAIRS`, which already include this step.
      scale: scalar.
      gamma_sample, gamma_pair: see `Options`.

    Returns:
      `(loss, metrics)`: the metrics are the accuracies of the raw text and of the synthetic caption, both terms and the
      mean weights.
    """
    of_sample, of_pair = weights(similarities(features), averages, gamma_sample, gamma_pair)
    metrics, value = {"weight_sample": of_sample.mean()}, 0.0
    for text, of_text in of_pair.items():
        term, found = infonce(features["image"], features[text], scale, weights=of_sample * of_text)
        value += term
        metrics |= {f"loss_{text}": term, f"weight_{text}": of_text.mean()}
        metrics |= found if text == "text" else {"synthetic_acc": sum(found.values()) / 2}
    return value, metrics
