"""Configurations of big_vision."""

import math

from clip_jax.errors import UserError
from clip_jax.interop.configs.common import HALF, count, set_preprocessing, start

BILINEAR = "squash(interpolation='bilinear', antialias=False)"  # TensorFlow's resize in big_vision


def from_weights(shapes, cfg):
    """Returns the configuration of the arrays of a big_vision .npz.

    Two towers have the method `siglip` or `clip`; one tower with a temperature has `clippo`. An image tower alone
    has an empty method and no section `model.text`.

    Args:
      shapes: `{name: object with a shape}`, names without `params/`.
      cfg: the model's configuration in big_vision, or {}; it is checked against the shapes.

    Raises UserError when `cfg` contradicts the shapes, or when the image size is unknown.
    """
    bare = "embedding/kernel" in shapes
    image, prefix = (cfg, "") if bare else (cfg.get("image", {}), "img/")
    fields = _encoder(shapes, f"{prefix}Transformer", image)
    patch, kernel = shapes[f"{prefix}embedding/kernel"].shape[0], shapes.get(f"{prefix}pos_embedding")
    size = cfg.get("resolution") or (patch * math.isqrt(kernel.shape[1]) if kernel else 0)
    if not size:
        raise UserError("the image size is unknown, because the position embeddings are fixed: give --size=PIXELS")
    _agree(image, "patch_size", [patch, patch] if isinstance(image.get("patch_size"), list) else patch)
    pool = "map" if f"{prefix}MAPHead_0/probe" in shapes else "tok" if f"{prefix}cls" in shapes else "gap"
    _agree(image, "pool_type", pool)
    posemb = "learn" if kernel else "sincos2d"
    _agree(image, "posemb", posemb)
    head = shapes.get(f"{prefix}head/kernel")
    width = fields["width"] if head is None else head.shape[-1]
    c = start("siglip" if "b" in shapes else "clip", width)
    pools = {"map": "map", "tok": "cls", "gap": "gap"}
    c.model.image = dict(
        fields, kind="vit", size=size, patch=patch, pool=pools[pool], cls_token=pool == "tok", ln_pre=False,
        patch_bias=True, posemb=posemb, proj=head is not None, proj_bias=True,
    )  # fmt: skip
    if "txt/Embed_0/embedding" in shapes:
        text = cfg.get("text", {})
        vocab = shapes["txt/Embed_0/embedding"].shape[0]
        _agree(text, "vocab_size", vocab)
        context = shapes["txt/pos_embedding"].shape[1]
        fields = _encoder(shapes, "txt/Encoder_0", text)
        c.model.text = dict(
            fields,
            kind="transformer",
            context=context,
            vocab_size=vocab,
            eot_id=1,
            pool="last",
            causal=False,
            proj_bias=True,
        )
    else:
        del c.model.text
        c.method = "clippo" if "t" in shapes else ""
    c.model.logit_scale_max = math.inf  # big_vision does not bound the logit scale
    set_preprocessing(c, HALF, HALF, ("drop_alpha", BILINEAR))
    return c


def _encoder(shapes, prefix, cfg):
    stacked = f"{prefix}/encoderblock/LayerNorm_0/scale" in shapes
    block = f"{prefix}/encoderblock" if stacked else f"{prefix}/encoderblock_0"
    try:
        heads = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].shape[-2]
        width, mlp_dim = shapes[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[-2:]
        depth = (
            shapes[f"{block}/LayerNorm_0/scale"].shape[0]
            if stacked
            else count(shapes, rf"{prefix}/encoderblock_(\d+)/")
        )
    except (KeyError, IndexError):
        raise UserError(f"no big_vision transformer under {prefix!r}") from None
    for field, value in dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads).items():
        _agree(cfg, field, value)
    return dict(
        width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, act="gelu_tanh", ln_eps=1e-6, weight_init="xavier"
    )


def _agree(cfg, field, value):
    """Raises UserError when a configuration gives another value than the weights."""
    if cfg.get(field) not in (None, value):
        raise UserError(
            f"the configuration contradicts the weights: {field}={cfg[field]!r}, but the weights have {value!r}"
        )
