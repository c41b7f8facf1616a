"""ZeroVL: Cui et al. 2022, "Contrastive Vision-Language Pre-training with Limited Resources" (arXiv 2112.09331).

CLIP's two towers with four techniques for limited data and hardware. This module adds two of them. A coin decides in
each step whether the images, or the text embeddings before normalisation, are mixed with those of the reversed batch;
the targets of InfoNCE are mixed alike. Tokens of the texts are masked, replaced and deleted
(`clip_jax/data/token_augment.py`). The other two work with every method: debiased sampling is
`data.sampling="one_source"`, decoupled gradient accumulation is `micro_batches`.

    x~_i = lam x_i + (1 - lam) x_flip(i),  Y = lam I + (1 - lam) Flip,  lam ~ Beta(0.1, 0.1), one value for the batch

The published code reverses the part of the batch on each device. Here `mix_group` sets the size of that part, so the
result does not depend on the devices. The temperature is the constant 0.02 in all released configurations. A run from
scratch learns it like CLIP, in log space and clamped.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.losses.contrastive import soft_infonce
from clip_jax.methods import clip
from clip_jax.methods.interface import read_options, two_tower_method
from clip_jax.models.common import l2_normalize, shard_batch
from clip_jax.models.two_tower import TwoTower

#: Folded into the key for the randomness of a step. An example whose id has this number as its low half gets the same
#: key.
STEP = 2**31


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.zerovl`. Raises UserError for invalid values.

    Attributes:
      mix_alpha: the parameter of the Beta distribution of lam; 0 mixes nothing.
      mix_images: the probability that images are mixed. Otherwise texts are.
      mix_group: the number of consecutive examples that are reversed together; 0: the whole batch.
      temperature: a constant temperature; 0: learned, as in CLIP.
      text_augment: operations on texts (docs/data.md).
    """

    mix_alpha: float = 0.1
    mix_images: float = 0.5
    mix_group: int = 0
    temperature: float = 0.0
    text_augment: tuple[str, ...] = ("tokens(0.2)",)

    def __post_init__(self):
        if not 0 <= self.mix_images <= 1:
            raise UserError(f"zerovl.mix_images={self.mix_images}: must be between 0 and 1")
        for name in ("mix_alpha", "mix_group", "temperature"):
            if not getattr(self, name) >= 0:
                raise UserError(f"zerovl.{name}={getattr(self, name)}: must be at least 0")


def make(config):
    """Returns the ZeroVL method of a configuration; raises UserError for invalid options or towers."""
    options = read_options(config, "zerovl", Options)
    group, batch_size = options.mix_group, config.data.batch_size
    if group and batch_size % group:
        raise UserError(f"zerovl.mix_group={group} does not divide data.batch_size={batch_size}")

    def prepare(batch, rng):
        lam, of_images = draw(options, rng)
        # The towers normalise pixels by an affine map and the weights sum to 1, so mixing may come before it.
        images = batch["image"].astype(jnp.float32)
        return batch | {"image": shard_batch(mix(images, jnp.where(of_images, lam, 1.0), group))}

    def loss(params, extra, features, batch, rng):
        lam, of_images = draw(options, rng)
        text = l2_normalize(mix(features["text"], jnp.where(of_images, 1.0, lam), group))
        value, metrics = mixed_infonce(features["image"], text, base.scale(params), lam, group)
        return value, {**metrics, "logit_scale": base.scale(params)}

    if options.temperature:
        base = two_tower_method(config, (), loss, scale=lambda params: jnp.float32(1 / options.temperature))
    else:
        base = clip.make(config)
    image_view, text_view = base.views
    views = (image_view, dataclasses.replace(text_view, augment=options.text_augment))
    return dataclasses.replace(base, views=views, prepare=prepare, encode=Towers(config.model).encode, loss=loss)


class Towers(TwoTower):
    """CLIP's towers. Text embeddings are not normalised, because they are mixed before, across micro-batches."""

    def encode_text(self, params, extra, ids, train=False, keys=None):
        return self._encode(self.text, "txt", params, extra, shard_batch(ids), train, keys, normalize=False)


def draw(options, rng):
    """Returns `(lam, mix images)` of a step, float32 and bool scalars.

    lam is at least 1/2. lam and 1 - lam give the same batch in another order, and the metrics then refer to the larger
    part.
    """
    of_lam, of_coin = jax.random.split(jax.random.fold_in(rng, STEP))
    if not options.mix_alpha:
        return jnp.float32(1), jnp.bool_(False)
    lam = jax.random.beta(of_lam, options.mix_alpha, options.mix_alpha)
    return jnp.maximum(lam, 1 - lam), jax.random.bernoulli(of_coin, options.mix_images)


def mix(x, lam, group=0):
    """Returns `lam` times `x` plus `1 - lam` times `x` in reverse order.

    Args:
      x: `[B, ...]`.
      lam: scalar.
      group: the number of consecutive examples that are reversed together; 0: all.
    """
    groups = x.reshape(-1, group or len(x), *x.shape[1:])
    return (lam * groups + (1 - lam) * groups[:, ::-1]).reshape(x.shape)


def mixed_infonce(z_image, z_text, scale, lam, group=0):
    """Returns InfoNCE against the targets `lam I + (1 - lam) Flip`.

    Args:
      z_image, z_text, scale: as for `infonce`. One of the two sides is mixed by `mix`.
      lam, group: as for `mix`.

    Returns:
      `(loss, metrics)` like `infonce`.
    """
    size = group or len(z_image)

    def targets(lam, image, text, i, j):
        return lam * (i == j) + (1 - lam) * (j == i + size - 1 - 2 * (i % size))

    return soft_infonce(z_image, z_text, scale, targets, lam, (), ())
