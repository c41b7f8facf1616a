"""Configurations of PyramidCLIP's released weights."""

import dataclasses
import re

from clip_jax import config as config_lib
from clip_jax.interop.configs.common import count, start
from clip_jax.interop.configs.open_clip import resnet_sizes, vit_sizes


def from_weights(shapes, heads=(None, None)):
    """Returns the configuration of a released PyramidCLIP, and how its towers are divided.

    Args:
      shapes: `{name: object with a shape}` of the weights.
      heads: `(image, text)` heads; None for heads of width 64.

    Returns:
      `(configuration, (blocks in the first part of the image tower, blocks in the first part of the text tower))`.
    """
    from clip_jax.methods.pyramidclip import Options

    def tower(prefix, width, heads):
        parts = [count(shapes, rf"{re.escape(prefix)}transformer\.resblocks{part}\.(\d+)\.") for part in (1, 2)]
        mlp_dim = next(
            x.shape[0]
            for name, x in shapes.items()
            if re.match(rf"{re.escape(prefix)}transformer\..*\.c_fc\.bias", name)
        )
        return parts[0], dict(
            width=width, depth=sum(parts), heads=heads or max(1, width // 64), mlp_dim=mlp_dim, act="quick_gelu"
        )

    c = start("pyramidclip", shapes["text_projection"].shape[1])
    front = 0
    if "visual.proj_pre" in shapes:
        width, patch, size = vit_sizes(shapes)
        front, fields = tower("visual.", width, heads[0])
        region_dim = shapes["visual.proj_pre"].shape[0]
        c.model.image = dict(fields, kind="pyramid_vit", size=size, patch=patch, front=front, region_dim=region_dim)
    else:
        layers, width, size = resnet_sizes(shapes)
        region_dim = shapes["visual.attnpool.proj_pre"].shape[0]
        c.model.image = dict(kind="pyramid_resnet", size=size, layers=tuple(layers), width=width, region_dim=region_dim)
    text_front, fields = tower("", shapes["ln_final.weight"].shape[0], heads[1])
    context, (vocab, _) = shapes["positional_embedding"].shape[0], shapes["token_embedding.weight"].shape
    c.model.text = dict(
        fields, kind="transformer", context=context, vocab_size=vocab, eot_id=vocab - 1, pool="max", causal=True
    )
    c.pyramidclip = config_lib.ConfigDict(dataclasses.asdict(Options()))
    return c, (front, text_front)
