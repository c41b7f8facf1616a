"""Configurations of open_clip and of OpenAI's CLIP."""

import math
import re

from clip_jax.data.augment import CLIP_MEAN, CLIP_STD
from clip_jax.errors import UserError
from clip_jax.interop.configs.common import HALF, count, known, map_vit, set_preprocessing, start

# Fields of open_clip that change the model and have no counterpart here, with the values that change nothing.
NEUTRAL = {
    "vision_cfg": dict(
        ls_init_value=None, attentional_pool=False, final_ln_after_pool=False, pos_embed_type="learnable",
        block_type=None, qk_norm=False, scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False,
        scale_attn=False, scale_fc=False, timm_proj_bias=False, input_patchnorm=False, global_average_pool=False,
    ),
    "text_cfg": dict(
        ls_init_value=None, embed_cls=False, final_ln_after_pool=False, proj_type="linear", block_type=None,
        qk_norm=False, scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False, scale_attn=False,
        scale_fc=False, hf_model_name=None,
    ),
}  # fmt: skip
# Width of a head by the tower's width in open_clip's ViT-H, g and bigG; 64 in the smaller ones.
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
# Number of heads of timm's SigLIP towers by width.
TIMM_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
# timm's SigLIP towers with the tanh GELU; the others have the exact one.
TIMM_TANH = r"vit_(base_patch32|large_patch16_siglip(_gap)?_512|so400m_patch16|giantopt)"


def from_config(cfg, preprocess, shapes):
    """Returns the configuration of open_clip's `CLIP` or `CustomTextCLIP`.

    Args:
      cfg: its arguments (`model_cfg`), including `vision_cfg` and `text_cfg`.
      preprocess: `preprocess_cfg` (mean, std, interpolation, resize_mode), or None for the published preprocessing.
      shapes: `{name: object with a shape}` of the weights. They give the sizes of a timm tower, which `cfg` lacks.
        A logit bias means SigLIP's loss. SigLIP's preprocessing goes with its image tower, which is timm's.

    Raises UserError for a field or value that has no counterpart here.
    """
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    for section, neutral in NEUTRAL.items():
        for field, value in cfg[section].items():
            if field in neutral and value != neutral[field] and value is not None:
                raise UserError(f"{section}.{field}={value!r} of open_clip is not supported")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    c = start("siglip" if "logit_bias" in shapes else "clip", cfg["embed_dim"])
    if "timm_model_name" in vision:
        c.model.image = _timm(vision, shapes)
    elif isinstance(vision.get("layers", 12), list | tuple):
        width, head_width = vision.get("width", 64), vision.get("head_width", 64)
        if 32 * width % head_width:
            raise UserError(f"vision_cfg.head_width={head_width} does not divide 32 * vision_cfg.width={32 * width}")
        fields = dict(layers=tuple(vision["layers"]), width=width, head_width=head_width)
        c.model.image = dict(fields, kind="resnet", size=_square(vision))
    else:
        c.model.image = _vit(vision, act)
    pools = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}
    width, pool = text.get("width", 512), text.get("pool_type", "argmax")
    vocab = text.get("vocab_size", 49408)
    c.model.text = dict(
        _transformer(text, width, text.get("layers", 12), text.get("heads", 8), act),
        kind="transformer",
        context=text.get("context_length", 77),
        vocab_size=vocab,
        # open_clip needs `eos_id` for "eos" alone; our exports always have it. "last" means SigLIP, which pads with its
        # end of text, 1.
        eot_id=vocab - 1 if pool == "argmax" else text.get("eos_id", {"eos": 2, "last": 1}.get(pool, vocab - 1)),
        pool=known(pools, pool, "text_cfg.pool_type"),
        causal=not text.get("no_causal_mask", False),
        proj_bias=text.get("proj_bias", False),
    )
    is_siglip = c.method == "siglip" and "timm_model_name" in vision
    published = {"mean": HALF, "std": HALF, "resize_mode": "squash"} if is_siglip else {}
    preprocess = (
        {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest", "interpolation": "bicubic"}
        | published
        | (preprocess or {})
    )
    filter_ = preprocess["interpolation"]
    modes = {
        "shortest": (f"resize(interpolation={filter_!r})", "center_crop", "drop_alpha"),
        "squash": (f"squash(interpolation={filter_!r})", "drop_alpha"),
    }
    set_preprocessing(
        c, preprocess["mean"], preprocess["std"], known(modes, preprocess["resize_mode"], "preprocess_cfg.resize_mode")
    )
    return c


def _vit(vision, act):
    width = vision.get("width", 768)
    pool = known({"tok": "cls", "avg": "gap"}, vision.get("pool_type", "tok"), "vision_cfg.pool_type")
    fields = _transformer(vision, width, vision.get("layers", 12), width // vision.get("head_width", 64), act)
    patch = vision.get("patch_size", 16)
    return dict(
        fields,
        kind="vit",
        size=_square(vision),
        patch=patch,
        pool=pool,
        cls_token=True,
        ln_pre=not vision.get("no_ln_pre", False),
    )


def _transformer(cfg, width, depth, heads, act):
    """Returns the fields that the image and the text transformer share."""
    if cfg.get("act_kwargs"):
        act = known(
            {"tanh": "gelu_tanh", "none": "gelu"}, cfg["act_kwargs"].get("approximate"), "act_kwargs.approximate"
        )
    eps = (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)
    return dict(
        width=width, depth=depth, heads=heads, mlp_dim=int(width * cfg.get("mlp_ratio", 4.0)), act=act, ln_eps=eps
    )


def _timm(vision, shapes):
    """Returns the fields of timm's ViT with attention pooling; its sizes come from the weights."""
    for field, allowed in (("timm_pool", ("map", "")), ("timm_proj", ("none", "", None, "linear"))):
        if vision.get(field) not in allowed:
            raise UserError(f"vision_cfg.{field}={vision.get(field)!r} of open_clip is not supported")
    trunk = "visual.trunk"
    try:
        width, _, patch, _ = shapes[f"{trunk}.patch_embed.proj.weight"].shape
        mlp_dim, _ = shapes[f"{trunk}.blocks.0.mlp.fc1.weight"].shape
        shapes[f"{trunk}.attn_pool.latent"]
    except (KeyError, ValueError):
        raise UserError(
            f"vision_cfg.timm_model_name={vision['timm_model_name']!r} is not supported: "
            "only ViTs with SigLIP's attention pooling are"
        ) from None
    heads = vision.get("timm_tiny_overrides", {}).get("heads") or vision.get("heads") or TIMM_HEADS.get(width)
    if not heads:
        raise UserError(f"the number of heads of an image tower of width {width} is unknown: give --heads=IMAGE,TEXT")
    name = vision["timm_model_name"]
    act = {"GELU none": "gelu", "GELU tanh": "gelu_tanh"}.get(
        vision.get("timm_act"), "gelu_tanh" if re.match(TIMM_TANH, name) else "gelu"
    )
    eps = vision.get("timm_norm_eps", 1e-6)
    fields = dict(
        width=width,
        depth=count(shapes, rf"{trunk}\.blocks\.(\d+)\."),
        heads=heads,
        mlp_dim=mlp_dim,
        act=act,
        ln_eps=eps,
    )
    proj = f"{trunk.removesuffix('trunk')}head.proj.weight" in shapes
    return dict(
        map_vit(fields, _square(vision), patch, proj),
        proj_bias=f"{trunk.removesuffix('trunk')}head.proj.bias" in shapes,
    )


def _square(vision):
    size = vision.get("image_size", 224)
    if isinstance(size, list | tuple):
        if size[0] != size[1]:
            raise UserError(f"vision_cfg.image_size={list(size)}: only square images are supported")
        size = size[0]
    return size


def infer_config(shapes, act, heads):
    """Returns the arguments of open_clip's `CLIP` that fit a state dict without a configuration.

    Args:
      shapes: `{name: object with a shape}`.
      act: the activation, which the weights do not show.
      heads: `(image, text)` heads, or None for those of the published models of equal width.

    Raises UserError when the weights do not determine the sizes.
    """
    if "visual.trunk.patch_embed.proj.weight" in shapes or "text_projection" not in shapes:
        raise UserError(
            "a state dict of a CustomTextCLIP (timm or text.* in its names) needs open_clip_config.json in its folder"
        )
    text = {
        "context_length": shapes["positional_embedding"].shape[0],
        "vocab_size": shapes["token_embedding.weight"].shape[0],
        "width": shapes["ln_final.weight"].shape[0],
        "layers": count(shapes, r"transformer\.resblocks\.(\d+)\."),
    }
    text["heads"] = heads[1] if heads else text["width"] // 64
    text["mlp_ratio"] = _ratio(shapes["transformer.resblocks.0.mlp.c_fc.weight"])
    if "visual.proj" in shapes:
        width, patch, size = vit_sizes(shapes)
        if heads and width % heads[0]:
            raise UserError(
                f"--heads={heads[0]},{heads[1]}: {heads[0]} heads do not divide the width {width} of the image tower"
            )
        vision = {
            "width": width,
            "layers": count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
            "patch_size": patch,
            "image_size": size,
            "head_width": width // heads[0] if heads else HEAD_WIDTHS.get(width, 64),
            "mlp_ratio": _ratio(shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        }
    else:
        vision = dict(zip(("layers", "width", "image_size"), resnet_sizes(shapes), strict=True))
    for which, fields in (("image", vision), ("text", text)):
        if not heads and (fields["width"] % 64 or fields["width"] < 512) and isinstance(fields["layers"], int):
            raise UserError(
                f"the number of heads of the {which} tower of width {fields['width']} is unknown: "
                "give --heads=IMAGE,TEXT"
            )
    embed_dim = shapes["text_projection"].shape[1]
    approximate = {"act_kwargs": {"approximate": "tanh"}} if act == "gelu_tanh" else {}
    return {
        "embed_dim": embed_dim,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": vision | approximate,
        "text_cfg": text | approximate,
    }


def vit_sizes(shapes):
    """Returns `(width, patch size, pixels of a side)` of a ViT in OpenAI's layout."""
    width, _, patch, _ = shapes["visual.conv1.weight"].shape
    return width, patch, patch * math.isqrt(shapes["visual.positional_embedding"].shape[0] - 1)


def resnet_sizes(shapes):
    """Returns `(blocks of each layer, width, pixels of a side)` of a ModifiedResNet in OpenAI's layout."""
    layers = [count(shapes, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)]
    side = math.isqrt(shapes["visual.attnpool.positional_embedding"].shape[0] - 1)
    return layers, shapes["visual.layer1.0.conv1.weight"].shape[0], 32 * side


def _ratio(weight):
    """Returns the ratio of an MLP's width to the tower's width.

    open_clip computes the MLP's width from it and rounds down.
    """
    return (weight.shape[0] + 0.5) / weight.shape[1]
