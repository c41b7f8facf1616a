"""Functions that the configurations of several third-party formats share."""

import re

from clip_jax import config as config_lib
from clip_jax.errors import UserError

HALF = (0.5, 0.5, 0.5)


def start(method, embed_dim):
    """Returns the default configuration, unlocked, with a method and an embedding width."""
    c = config_lib.base().unlock()
    c.method, c.model.embed_dim = method, embed_dim
    c.data.source = ""  # not known
    c.model.dtype = "float32"  # embeddings are equal to those of the original program
    return c


def set_preprocessing(c, mean, std, transform):
    """Sets the mean and standard deviation of each channel and the steps of `eval.transform`.

    What the library does with transparency is among the steps, see `clip_jax.data.augment.drop_alpha`.
    """
    c.model.image_mean, c.model.image_std = tuple(mean), tuple(std)
    c.eval.transform = tuple(transform)


def known(table, name, field):
    """Returns `table[name]`; raises UserError, which names `field`, when the table lacks it."""
    if name not in table:
        raise UserError(f"{field}={name!r} is not supported: allowed are {', '.join(map(str, table))}")
    return table[name]


def count(shapes, pattern):
    """Returns how many distinct numbers the pattern's group matches at the beginning of the names."""
    return len({m[1] for name in shapes if (m := re.match(pattern, name))})


def map_vit(fields, size, patch, proj):
    """Returns the section `model.image` of SigLIP's image tower, a ViT with attention pooling.

    Args:
      fields: width, depth, heads, mlp_dim, act and ln_eps.
      size: pixels of a side.
      patch: pixels of a patch's side.
      proj: whether a linear layer follows the pooling.
    """
    return dict(
        fields,
        kind="vit",
        size=size,
        patch=patch,
        pool="map",
        cls_token=False,
        ln_pre=False,
        patch_bias=True,
        proj=proj,
    )
