"""What others write into their configuration files, as a configuration of ours. What they do not say is never guessed."""

import dataclasses
import math
import re

from clip_jax import config as config_lib
from clip_jax.data.augment import CLIP_MEAN, CLIP_STD
from clip_jax.errors import UserError

HALF = (0.5, 0.5, 0.5)
BILINEAR = "squash(interpolation='bilinear', antialias=False)"  # TensorFlow's resize in big_vision
ACTS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # Hugging Face's names
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers

# Fields of open_clip that change the model and that we have no counterpart for, with the values that change nothing.
NEUTRAL = {
    "vision_cfg": dict(
        ls_init_value=None, attentional_pool=False, final_ln_after_pool=False, pos_embed_type="learnable", block_type=None, qk_norm=False,
        scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False, scale_attn=False, scale_fc=False, timm_proj_bias=False,
        input_patchnorm=False, global_average_pool=False,
    ),
    "text_cfg": dict(
        ls_init_value=None, embed_cls=False, final_ln_after_pool=False, proj_type="linear", block_type=None, qk_norm=False,
        scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False, scale_attn=False, scale_fc=False, hf_model_name=None,
    ),
}  # fmt: skip
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # of open_clip's ViT-H, g and bigG; 64 in the smaller ones
TIMM_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # of timm's SigLIP towers by width
TIMM_TANH = r"vit_(base_patch32|large_patch16_siglip(_gap)?_512|so400m_patch16|giantopt)"  # of them those with tanh GELU; others: exact


def open_clip(cfg, preprocess, shapes):
    """Of the arguments of open_clip's `CLIP` or `CustomTextCLIP` (`model_cfg`).

    Args:
      cfg: the arguments, `vision_cfg` and `text_cfg` among them.
      preprocess: `preprocess_cfg` (mean, std, interpolation, resize_mode), or nothing.
      shapes: `{name: something with a shape}`, of which the sizes of a timm tower are taken.
    """
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    for section, neutral in NEUTRAL.items():
        for field, value in cfg[section].items():
            if field in neutral and value != neutral[field] and value is not None:
                raise UserError(f"{section}.{field}={value!r} of open_clip is not supported")
    act = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    c = _start("siglip" if "logit_bias" in shapes else "clip", cfg["embed_dim"])
    if "timm_model_name" in vision:
        c.model.image = _timm(vision, shapes)
    elif isinstance(vision.get("layers", 12), list | tuple):
        if vision.get("head_width", 64) != 64:
            raise UserError(
                f"vision_cfg.head_width={vision['head_width']}: the heads of a ResNet's attention pooling have a width of 64"
            )
        c.model.image = dict(
            kind="resnet", size=_square(vision), layers=tuple(vision["layers"]), width=vision.get("width", 64)
        )
    else:
        c.model.image = _open_clip_vit(vision, act)
    pools = {"argmax": "eot", "eos": "eot", "last": "last", "first": "first"}
    width, pool = text.get("width", 512), text.get("pool_type", "argmax")
    vocab = text.get("vocab_size", 49408)
    c.model.text = dict(
        _transformer(text, width, text.get("layers", 12), text.get("heads", 8), act),
        kind="transformer",
        context=text.get("context_length", 77),
        vocab_size=vocab,
        # CLIP's end of text is the largest id; "last" is SigLIP's, whose padding is its end of text, 1.
        eot_id=text.get("eos_id", 2) if pool == "eos" else 1 if pool == "last" else vocab - 1,
        pool=_known(pools, pool, "text_cfg.pool_type"),
        causal=not text.get("no_causal_mask", False),
        proj_bias=text.get("proj_bias", False),
    )
    published = {"mean": HALF, "std": HALF, "resize_mode": "squash"} if c.method == "siglip" else {}
    preprocess = (
        {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": "shortest", "interpolation": "bicubic"}
        | published
        | (preprocess or {})
    )
    filter_ = preprocess["interpolation"]
    modes = {
        "shortest": (f"resize(interpolation={filter_!r})", "center_crop"),
        "squash": (f"squash(interpolation={filter_!r})",),
    }
    _preprocess(
        c, preprocess["mean"], preprocess["std"], _known(modes, preprocess["resize_mode"], "preprocess_cfg.resize_mode")
    )
    return c


def _open_clip_vit(vision, act):
    width = vision.get("width", 768)
    pool = _known({"tok": "cls", "avg": "gap"}, vision.get("pool_type", "tok"), "vision_cfg.pool_type")
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
    """What open_clip's two transformers share."""
    if cfg.get("act_kwargs"):
        act = _known(
            {"tanh": "gelu_tanh", "none": "gelu"}, cfg["act_kwargs"].get("approximate"), "act_kwargs.approximate"
        )
    eps = (cfg.get("norm_kwargs") or {}).get("eps", 1e-5)
    return dict(
        width=width, depth=depth, heads=heads, mlp_dim=int(width * cfg.get("mlp_ratio", 4.0)), act=act, ln_eps=eps
    )


def _timm(vision, shapes):
    """timm's ViT with attention pooling; `timm_model_name` alone does not give its sizes, the weights do."""
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
            f"the image tower {vision['timm_model_name']!r} is no ViT with attention pooling as SigLIP has it"
        ) from None
    heads = vision.get("timm_tiny_overrides", {}).get("heads") or vision.get("heads") or TIMM_HEADS.get(width)
    if not heads:
        raise UserError(f"how many heads an image tower of width {width} has cannot be told: give --heads=IMAGE,TEXT")
    name = vision["timm_model_name"]
    act = {"GELU none": "gelu", "GELU tanh": "gelu_tanh"}.get(
        vision.get("timm_act"), "gelu_tanh" if re.match(TIMM_TANH, name) else "gelu"
    )
    eps = vision.get("timm_norm_eps", 1e-6)
    fields = dict(
        width=width,
        depth=_count(shapes, rf"{trunk}\.blocks\.(\d+)\."),
        heads=heads,
        mlp_dim=mlp_dim,
        act=act,
        ln_eps=eps,
    )
    proj = f"{trunk.removesuffix('trunk')}head.proj.weight" in shapes
    return dict(
        _map_vit(fields, _square(vision), patch, proj),
        proj_bias=f"{trunk.removesuffix('trunk')}head.proj.bias" in shapes,
    )


def _map_vit(fields, size, patch, proj):
    """SigLIP's image tower."""
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


def open_clip_of_weights(shapes, act, heads):
    """The arguments of open_clip's `CLIP` for a state dict without a configuration.

    Args:
      shapes: `{name: something with a shape}`.
      act: the activation, which weights do not tell.
      heads: of the image and the text tower, or None for those of the published models.

    Raises UserError when the sizes cannot be told.
    """
    if "visual.trunk.patch_embed.proj.weight" in shapes or "text_projection" not in shapes:
        raise UserError(
            "a state dict of a CustomTextCLIP (timm or text.* in its names) needs its open_clip_config.json beside it"
        )
    text = {
        "context_length": shapes["positional_embedding"].shape[0],
        "vocab_size": shapes["token_embedding.weight"].shape[0],
        "width": shapes["ln_final.weight"].shape[0],
        "layers": _count(shapes, r"transformer\.resblocks\.(\d+)\."),
    }
    text["heads"] = heads[1] if heads else text["width"] // 64
    text["mlp_ratio"] = _ratio(shapes["transformer.resblocks.0.mlp.c_fc.weight"])
    if "visual.proj" in shapes:
        width, patch, size = _vit_sizes(shapes)
        if heads and width % heads[0]:
            raise UserError(
                f"--heads={heads[0]},{heads[1]}: {heads[0]} heads do not divide the width of the image tower, {width}"
            )
        vision = {
            "width": width,
            "layers": _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
            "patch_size": patch,
            "image_size": size,
            "head_width": width // heads[0] if heads else HEAD_WIDTHS.get(width, 64),
            "mlp_ratio": _ratio(shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        }
    else:
        vision = dict(zip(("layers", "width", "image_size"), _resnet_sizes(shapes), strict=True))
    for which, fields in (("image", vision), ("text", text)):
        if not heads and (fields["width"] % 64 or fields["width"] < 512) and isinstance(fields["layers"], int):
            raise UserError(
                f"how many heads the {which} tower of width {fields['width']} has cannot be told: give --heads=IMAGE,TEXT"
            )
    embed_dim = shapes["text_projection"].shape[1]
    approximate = {"act_kwargs": {"approximate": "tanh"}} if act == "gelu_tanh" else {}
    return {
        "embed_dim": embed_dim,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": vision | approximate,
        "text_cfg": text | approximate,
    }


def pyramidclip(shapes, heads=(None, None)):
    """Of the weights of a released PyramidCLIP.

    Args:
      shapes: `{name: something with a shape}`.
      heads: of the image and the text tower, None where they are 64 wide.

    Returns:
      `(configuration, (blocks in the first part of the image tower, of the text tower))`.
    """
    from clip_jax.methods.pyramidclip import Options

    def tower(prefix, width, heads):
        parts = [_count(shapes, rf"{re.escape(prefix)}transformer\.resblocks{part}\.(\d+)\.") for part in (1, 2)]
        mlp_dim = next(
            x.shape[0]
            for name, x in shapes.items()
            if re.match(rf"{re.escape(prefix)}transformer\..*\.c_fc\.bias", name)
        )
        return parts[0], dict(
            width=width, depth=sum(parts), heads=heads or max(1, width // 64), mlp_dim=mlp_dim, act="quick_gelu"
        )

    c = _start("pyramidclip", shapes["text_projection"].shape[1])
    front = 0
    if "visual.proj_pre" in shapes:
        width, patch, size = _vit_sizes(shapes)
        front, fields = tower("visual.", width, heads[0])
        region_dim = shapes["visual.proj_pre"].shape[0]
        c.model.image = dict(fields, kind="pyramid_vit", size=size, patch=patch, front=front, region_dim=region_dim)
    else:
        layers, width, size = _resnet_sizes(shapes)
        region_dim = shapes["visual.attnpool.proj_pre"].shape[0]
        c.model.image = dict(kind="pyramid_resnet", size=size, layers=tuple(layers), width=width, region_dim=region_dim)
    text_front, fields = tower("", shapes["ln_final.weight"].shape[0], heads[1])
    context, (vocab, _) = shapes["positional_embedding"].shape[0], shapes["token_embedding.weight"].shape
    c.model.text = dict(
        fields, kind="transformer", context=context, vocab_size=vocab, eot_id=vocab - 1, pool="max", causal=True
    )
    c.pyramidclip = config_lib.ConfigDict(dataclasses.asdict(Options()))
    return c, (front, text_front)


def _vit_sizes(shapes):
    """`(width, patch size, pixels of a side)` of the ViT of OpenAI's layout."""
    width, _, patch, _ = shapes["visual.conv1.weight"].shape
    return width, patch, patch * math.isqrt(shapes["visual.positional_embedding"].shape[0] - 1)


def _resnet_sizes(shapes):
    """`(blocks of each layer, width, pixels of a side)` of the ModifiedResNet of OpenAI's layout."""
    layers = [_count(shapes, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)]
    side = math.isqrt(shapes["visual.attnpool.positional_embedding"].shape[0] - 1)
    return layers, shapes["visual.layer1.0.conv1.weight"].shape[0], 32 * side


def _ratio(weight):
    """The ratio of an MLP's width to the tower's of which open_clip's rounding down makes the width again."""
    return (weight.shape[0] + 0.5) / weight.shape[1]


# Defaults of Hugging Face's configuration classes: their files may leave out what is as published first.
_HF_TRANSFORMER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_HF_CLIP = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)
_HF_SIGLIP = dict(_HF_TRANSFORMER, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
_HF_ALIGN_VISION = dict(
    image_size=600, width_coefficient=2.0, depth_coefficient=3.1, depth_divisor=8, kernel_sizes=[3, 3, 5, 3, 5, 5, 3],
    in_channels=[32, 16, 24, 40, 80, 112, 192], out_channels=[16, 24, 40, 80, 112, 192, 320], depthwise_padding=[],
    strides=[1, 2, 2, 2, 1, 2, 1], num_block_repeats=[1, 2, 2, 3, 3, 4, 1], expand_ratios=[1, 6, 6, 6, 6, 6, 6],
    squeeze_expansion_ratio=0.25, hidden_act="swish", batch_norm_eps=0.001, pooling_type="mean",
)  # fmt: skip


def hf_clip(cfg, preprocessor):
    """Of the `config.json` and `preprocessor_config.json` of a CLIPModel."""
    vision = {**_HF_TRANSFORMER, **_HF_CLIP, "image_size": 224, "patch_size": 32} | cfg.get("vision_config", {})
    small = dict(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408, max_position_embeddings=77
    )
    text = {**_HF_TRANSFORMER, **_HF_CLIP, **small, "eos_token_id": 49407} | cfg.get("text_config", {})
    c = _start("clip", cfg.get("projection_dim", 512))
    image = _hf_transformer(vision)
    c.model.image = dict(
        image,
        kind="vit",
        size=vision["image_size"],
        patch=vision["patch_size"],
        pool="cls",
        cls_token=True,
        ln_pre=True,
    )
    # An end-of-text id of 2 stands in old files for "the largest id".
    eot_id = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    c.model.text = dict(_hf_text(text), eot_id=eot_id, pool="eot", causal=True)
    defaults = dict(
        size={"shortest_edge": 224}, crop_size=224, do_center_crop=True, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    _hf_preprocess(c, preprocessor, defaults | dict(resample=3))
    return c


def hf_siglip(cfg, preprocessor):
    """Of the `config.json` and `preprocessor_config.json` of a SiglipModel."""
    vision = {**_HF_SIGLIP, "image_size": 224, "patch_size": 16} | cfg.get("vision_config", {})
    text = {**_HF_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64, "eos_token_id": 1} | cfg.get(
        "text_config", {}
    )
    c = _start("siglip", vision["hidden_size"])
    if text.get("projection_size", c.model.embed_dim) != c.model.embed_dim:
        raise UserError(
            f"text_config.projection_size={text['projection_size']} is not vision_config.hidden_size={c.model.embed_dim}"
        )
    if vision.get("vision_use_head") is False:
        raise UserError(
            "vision_config.vision_use_head=false: a SiglipModel without attention pooling has no image embedding"
        )
    c.model.image = _map_vit(_hf_transformer(vision), vision["image_size"], vision["patch_size"], proj=False)
    # Their files name other ids as end of text; the tokenizer's, and the padding, is 1.
    c.model.text = dict(_hf_text(text), eot_id=1, pool="last", causal=False, proj_bias=True)
    _hf_preprocess(c, preprocessor, dict(size=dict(height=224, width=224), image_mean=HALF, image_std=HALF, resample=3))
    return c


def hf_align(cfg, preprocessor):
    """Of the `config.json` and `preprocessor_config.json` of an AlignModel."""
    vision = _HF_ALIGN_VISION | cfg.get("vision_config", {})
    text = {
        **_HF_TRANSFORMER,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }
    text = text | {"type_vocab_size": 2, "pad_token_id": 0} | cfg.get("text_config", {})
    for field in (
        "depth_divisor",
        "depthwise_padding",
        "squeeze_expansion_ratio",
        "hidden_act",
        "batch_norm_eps",
        "pooling_type",
    ):
        if vision[field] != _HF_ALIGN_VISION[field]:
            raise UserError(
                f"vision_config.{field}={vision[field]!r} of an AlignModel: only {_HF_ALIGN_VISION[field]!r} is supported"
            )
    c = _start("align", cfg.get("projection_dim", 640))
    columns = ("out_channels", "num_block_repeats", "kernel_sizes", "strides", "expand_ratios")
    coefficients = {name: vision[name] for name in ("width_coefficient", "depth_coefficient")}
    stages = tuple(zip(*(vision[name] for name in columns), strict=True))
    c.model.image = dict(
        coefficients, kind="efficientnet", size=vision["image_size"], stages=stages, padding="even", proj=False
    )
    fields = dict(
        _hf_text(text),
        kind="bert",
        positions=text["max_position_embeddings"],
        types=text["type_vocab_size"],
        proj_bias=True,
    )
    fields["context"] = min(64, fields["positions"])  # what ALIGN was trained with and its processor pads to
    c.model.text = dict(fields, pad_id=text["pad_token_id"], eot_id=-1)
    defaults = dict(size=dict(height=346, width=346), do_center_crop=True, crop_size=vision["image_size"], resample=2)
    _hf_preprocess(c, preprocessor, defaults | dict(image_mean=HALF, image_std=HALF))
    return c


def _hf_transformer(cfg):
    act = _known(ACTS, cfg["hidden_act"], "hidden_act")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    return dict(
        zip(("width", "depth", "heads", "mlp_dim", "ln_eps"), (cfg[name] for name in names), strict=True), act=act
    )


def _hf_text(cfg):
    return dict(
        _hf_transformer(cfg), kind="transformer", context=cfg["max_position_embeddings"], vocab_size=cfg["vocab_size"]
    )


def _hf_preprocess(c, given, defaults):
    """The transforms of an image processor; without its file those of the model as published."""
    p, size = defaults | (given or {}), c.model.image.size
    filter_, to = _known(RESAMPLE, p["resample"], "preprocessor_config.json: resample"), p["size"] if given else size
    if (
        isinstance(to, dict)
        and "shortest_edge" in to
        or p.get("do_center_crop")
        and isinstance(to, int)
        and c.method == "clip"
    ):
        edge = to["shortest_edge"] if isinstance(to, dict) else to
        steps = (_sized("resize", edge, size, filter_), "center_crop")
    else:
        edge = to["height"] if isinstance(to, dict) else to
        steps = (_sized("squash", edge, size, filter_),) + (("center_crop",) if p.get("do_center_crop") else ())
    _preprocess(c, p["image_mean"], p["image_std"], steps)


def _sized(name, edge, size, filter_):
    return f"{name}({'' if edge == size else f'{edge}, '}interpolation={filter_!r})"


def big_vision(shapes, cfg):
    """Of the arrays of an .npz of big_vision (names without `params/`); `cfg`: what the models were made with, checked if given.

    The method is `siglip` or `clip` for two towers, `clippo` for one with a temperature. An image tower alone has an
    empty method and no section `model.text`.
    """
    bare = "embedding/kernel" in shapes
    image, prefix = (cfg, "") if bare else (cfg.get("image", {}), "img/")
    fields = _bv_encoder(shapes, f"{prefix}Transformer", image)
    patch, kernel = shapes[f"{prefix}embedding/kernel"].shape[0], shapes.get(f"{prefix}pos_embedding")
    size = cfg.get("resolution") or (patch * math.isqrt(kernel.shape[1]) if kernel else 0)
    if not size:
        raise UserError("the size of the images cannot be told, as the positions are fixed ones: give --size=PIXELS")
    _agree(image, "patch_size", [patch, patch] if isinstance(image.get("patch_size"), list) else patch)
    pool = "map" if f"{prefix}MAPHead_0/probe" in shapes else "tok" if f"{prefix}cls" in shapes else "gap"
    _agree(image, "pool_type", pool)
    posemb = "learn" if kernel else "sincos2d"
    _agree(image, "posemb", posemb)
    head = shapes.get(f"{prefix}head/kernel")
    width = fields["width"] if head is None else head.shape[-1]
    c = _start("siglip" if "b" in shapes else "clip", width)
    pools = {"map": "map", "tok": "cls", "gap": "gap"}
    c.model.image = dict(
        fields, kind="vit", size=size, patch=patch, pool=pools[pool], cls_token=pool == "tok", ln_pre=False, patch_bias=True, posemb=posemb,
        proj=head is not None, proj_bias=True,
    )  # fmt: skip
    if "txt/Embed_0/embedding" in shapes:
        text = cfg.get("text", {})
        vocab = shapes["txt/Embed_0/embedding"].shape[0]
        _agree(text, "vocab_size", vocab)
        context = shapes["txt/pos_embedding"].shape[1]
        fields = _bv_encoder(shapes, "txt/Encoder_0", text)
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
    c.model.logit_scale_max = math.inf  # big_vision has no bound
    _preprocess(c, HALF, HALF, (BILINEAR,))
    return c


def _bv_encoder(shapes, prefix, cfg):
    stacked = f"{prefix}/encoderblock/LayerNorm_0/scale" in shapes
    block = f"{prefix}/encoderblock" if stacked else f"{prefix}/encoderblock_0"
    try:
        heads = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"].shape[-2]
        width, mlp_dim = shapes[f"{block}/MlpBlock_0/Dense_0/kernel"].shape[-2:]
        depth = (
            shapes[f"{block}/LayerNorm_0/scale"].shape[0]
            if stacked
            else _count(shapes, rf"{prefix}/encoderblock_(\d+)/")
        )
    except (KeyError, IndexError):
        raise UserError(f"there is no transformer of big_vision under {prefix!r}") from None
    for field, value in dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=heads).items():
        _agree(cfg, field, value)
    return dict(
        width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, act="gelu_tanh", ln_eps=1e-6, weight_init="xavier"
    )


def _agree(cfg, field, value):
    """Raises UserError when a configuration says another thing than the weights."""
    if cfg.get(field) not in (None, value):
        raise UserError(f"the configuration contradicts the weights: {field} is {cfg[field]!r} there, {value!r} here")


def _count(shapes, pattern):
    """How many different numbers the pattern's group finds in the names."""
    return len({m[1] for name in shapes if (m := re.match(pattern, name))})


def _start(method, embed_dim):
    c = config_lib.base().unlock()
    c.method, c.model.embed_dim, c.model.dtype = method, embed_dim, "float32"  # the same numbers as theirs
    return c


def _preprocess(c, mean, std, transform):
    c.model.image_mean, c.model.image_std, c.eval.transform = tuple(mean), tuple(std), tuple(transform)


def _square(vision):
    size = vision.get("image_size", 224)
    if isinstance(size, list | tuple):
        if size[0] != size[1]:
            raise UserError(f"vision_cfg.image_size={list(size)}: only square images are supported")
        size = size[0]
    return size


def _known(table, name, field):
    if name not in table:
        raise UserError(f"{field}={name!r} is not supported: allowed are {', '.join(map(str, table))}")
    return table[name]
