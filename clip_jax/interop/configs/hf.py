"""Configurations of Hugging Face transformers: CLIPModel, SiglipModel and AlignModel."""

from clip_jax.data.augment import CLIP_MEAN, CLIP_STD
from clip_jax.errors import UserError
from clip_jax.interop.configs.common import HALF, known, map_vit, set_preprocessing, start

# Activations by their names in Hugging Face transformers.
ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
CROP = "center_crop(rounding='down')"  # transformers.image_transforms.center_crop

# Defaults of the configuration classes; a configuration file may leave out fields with these values.
_TRANSFORMER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_CLIP = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)
_SIGLIP = dict(_TRANSFORMER, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
_ALIGN_VISION = dict(
    image_size=600, width_coefficient=2.0, depth_coefficient=3.1, depth_divisor=8, kernel_sizes=[3, 3, 5, 3, 5, 5, 3],
    in_channels=[32, 16, 24, 40, 80, 112, 192], out_channels=[16, 24, 40, 80, 112, 192, 320], depthwise_padding=[],
    strides=[1, 2, 2, 2, 1, 2, 1], num_block_repeats=[1, 2, 2, 3, 3, 4, 1], expand_ratios=[1, 6, 6, 6, 6, 6, 6],
    squeeze_expansion_ratio=0.25, hidden_act="swish", batch_norm_eps=0.001, pooling_type="mean",
)  # fmt: skip


def clip(cfg, preprocessor):
    """Returns the configuration of a CLIPModel.

    Args:
      cfg: the content of its `config.json`.
      preprocessor: the content of its `preprocessor_config.json`, or None for the published preprocessing.

    Raises UserError for a field or value that has no counterpart here.
    """
    vision = {**_TRANSFORMER, **_CLIP, "image_size": 224, "patch_size": 32} | cfg.get("vision_config", {})
    small = dict(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408, max_position_embeddings=77
    )
    text = {**_TRANSFORMER, **_CLIP, **small, "eos_token_id": 49407} | cfg.get("text_config", {})
    c = start("clip", cfg.get("projection_dim", 512))
    image = _transformer(vision)
    c.model.image = dict(
        image,
        kind="vit",
        size=vision["image_size"],
        patch=vision["patch_size"],
        pool="cls",
        cls_token=True,
        ln_pre=True,
    )
    # In old files, an end-of-text id of 2 means "the largest id".
    eot_id = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    c.model.text = dict(_text(text), eot_id=eot_id, pool="eot", causal=True)
    defaults = dict(
        size={"shortest_edge": 224}, crop_size=224, do_center_crop=True, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    _preprocess(c, preprocessor, defaults | dict(resample=3))
    return c


def siglip(cfg, preprocessor):
    """Returns the configuration of a SiglipModel.

    Args:
      cfg: the content of its `config.json`.
      preprocessor: the content of its `preprocessor_config.json`, or None for the published preprocessing.

    Raises UserError for a field or value that has no counterpart here.
    """
    vision = {**_SIGLIP, "image_size": 224, "patch_size": 16} | cfg.get("vision_config", {})
    text = {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64, "eos_token_id": 1} | cfg.get(
        "text_config", {}
    )
    c = start("siglip", vision["hidden_size"])
    if text.get("projection_size", c.model.embed_dim) != c.model.embed_dim:
        raise UserError(
            f"text_config.projection_size={text['projection_size']}: must equal the width {c.model.embed_dim}"
        )
    if vision.get("vision_use_head") is False:
        raise UserError(
            "vision_config.vision_use_head=false is not supported: the image embedding needs the attention pooling"
        )
    c.model.image = map_vit(_transformer(vision), vision["image_size"], vision["patch_size"], proj=False)
    # The files name other ids, but the tokenizer ends and pads a text with id 1.
    c.model.text = dict(_text(text), eot_id=1, pool="last", causal=False, proj_bias=True)
    _preprocess(c, preprocessor, dict(size=dict(height=224, width=224), image_mean=HALF, image_std=HALF, resample=3))
    return c


def align(cfg, preprocessor):
    """Returns the configuration of an AlignModel.

    Args:
      cfg: the content of its `config.json`.
      preprocessor: the content of its `preprocessor_config.json`, or None for the published preprocessing.

    Raises UserError for a field or value that has no counterpart here.
    """
    from clip_jax.models.efficientnet import has_first_residual

    vision = _ALIGN_VISION | cfg.get("vision_config", {})
    text = {
        **_TRANSFORMER,
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
        if vision[field] != _ALIGN_VISION[field]:
            allowed = _ALIGN_VISION[field]
            raise UserError(f"vision_config.{field}={vision[field]!r} is not supported: only {allowed!r} is")
    c = start("align", cfg.get("projection_dim", 640))
    columns = ("out_channels", "num_block_repeats", "kernel_sizes", "strides", "expand_ratios")
    coefficients = {name: vision[name] for name in ("width_coefficient", "depth_coefficient")}
    stages = tuple(zip(*(vision[name] for name in columns), strict=True))
    c.model.image = dict(
        coefficients, kind="efficientnet", size=vision["image_size"], stages=stages, padding="even", proj=False,
        first_residual=not has_first_residual(stages, vision["width_coefficient"]),  # True where it has no effect
    )  # fmt: skip
    fields = dict(
        _text(text),
        kind="bert",
        positions=text["max_position_embeddings"],
        types=text["type_vocab_size"],
        proj_bias=True,
    )
    fields["context"] = min(64, fields["positions"])  # ALIGN was trained with 64 tokens, and its processor pads to 64
    c.model.text = dict(fields, pad_id=text["pad_token_id"], eot_id=-1)
    defaults = dict(size=dict(height=346, width=346), do_center_crop=True, crop_size=vision["image_size"], resample=2)
    _preprocess(c, preprocessor, defaults | dict(image_mean=HALF, image_std=HALF))
    return c


def _transformer(cfg):
    act = known(ACTS, cfg["hidden_act"], "hidden_act")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    return dict(
        zip(("width", "depth", "heads", "mlp_dim", "ln_eps"), (cfg[name] for name in names), strict=True), act=act
    )


def _text(cfg):
    return dict(
        _transformer(cfg), kind="transformer", context=cfg["max_position_embeddings"], vocab_size=cfg["vocab_size"]
    )


def _preprocess(c, given, defaults):
    """Sets the preprocessing of an image processor, by default that of the published model."""
    p, size = defaults | (given or {}), c.model.image.size
    filter_, to = known(RESAMPLE, p["resample"], "preprocessor_config.json: resample"), p["size"] if given else size
    if (
        isinstance(to, dict)
        and "shortest_edge" in to
        or p.get("do_center_crop")
        and isinstance(to, int)
        and c.method == "clip"
    ):
        edge = to["shortest_edge"] if isinstance(to, dict) else to
        steps = (_sized("resize", edge, size, filter_), CROP)
    else:
        edge = to["height"] if isinstance(to, dict) else to
        steps = (_sized("squash", edge, size, filter_),) + ((CROP,) if p.get("do_center_crop") else ())
    set_preprocessing(c, p["image_mean"], p["image_std"], steps)


def _sized(name, edge, size, filter_):
    return f"{name}({'' if edge == size else f'{edge}, '}interpolation={filter_!r})"
