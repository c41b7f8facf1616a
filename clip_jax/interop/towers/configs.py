"""Configurations of single towers: BertModel, MPNetModel, ViTs of timm, DINO, DINOv2 and Hugging Face, ResNets.

Their method is empty and the section of the other tower is missing.
"""

import math
import re

from clip_jax.errors import UserError
from clip_jax.interop.configs.common import count, known, start

# Fields of Hugging Face with the only value that has a counterpart here; a file may leave them out.
_BERT = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
_MPNET = {"model_type": "mpnet", "hidden_act": "gelu", "relative_attention_num_buckets": 32}
_VIT = {"qkv_bias": True, "use_swiglu_ffn": False, "apply_layernorm": True}
_VIT_ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
#: Heads of timm's published plain ViTs, tiny to gigantic, by width and width of the MLP.
HEADS = {(192, 768): 3, (384, 1536): 6, (768, 3072): 12, (1024, 4096): 16, (1280, 5120): 16, (1408, 6144): 16}
HEADS |= {(1664, 8192): 16}


def bert(shapes, cfg):
    """Returns the configuration of a BertModel.

    Args:
      shapes: `{name: object with a shape}`, names without `bert.`.
      cfg: the content of its `config.json`.

    Raises UserError for a field that has no counterpart here or is missing.
    """
    return _text(shapes, cfg, _BERT, dict(pad_id=0, types=shapes["embeddings.token_type_embeddings.weight"].shape[0]))


def mpnet(shapes, cfg):
    """Returns the configuration of an MPNetModel; as for `bert`. Positions are counted from `pad_token_id + 1`."""
    pad_id = cfg.get("pad_token_id", 1)
    buckets = shapes["encoder.relative_attention_bias.weight"].shape[0]
    return _text(shapes, cfg, _MPNET, dict(pad_id=pad_id, types=0, first_position=pad_id + 1, buckets=buckets))


def _text(shapes, cfg, allowed, fields):
    _only(cfg, allowed)
    if "num_attention_heads" not in cfg:
        raise UserError("the number of heads is unknown: the folder must hold config.json with num_attention_heads")
    vocab, width = shapes["embeddings.word_embeddings.weight"].shape
    positions = shapes["embeddings.position_embeddings.weight"].shape[0]
    c = start("", width)
    del c.model.image
    c.model.text = dict(
        fields, kind="bert", context=positions - fields.get("first_position", 0), positions=positions,
        vocab_size=vocab, eot_id=-1, width=width, depth=count(shapes, r"encoder\.layer\.(\d+)\."),
        heads=cfg["num_attention_heads"], mlp_dim=shapes["encoder.layer.0.intermediate.dense.weight"].shape[0],
        act="gelu", ln_eps=cfg.get("layer_norm_eps", 1e-12), proj=False,
    )  # fmt: skip
    return c


def _only(cfg, allowed):
    """Raises UserError for a field of `config.json` with another value than that in `allowed`."""
    for field, value in allowed.items():
        if cfg.get(field, value) != value:
            raise UserError(f"config.json: {field}={cfg[field]!r} is not supported: only {value!r} is")


def timm_vit(shapes, cfg, heads=None):
    """Returns the configuration of a vision transformer with the names of timm, which DINO's and DINOv2's have too.

    Args:
      shapes: `{name: object with a shape}`.
      cfg: timm's `config.json`, or {}. Without it mean and deviation are unknown, None.
      heads: the number of heads, or None for `model_args.num_heads` of `cfg`, otherwise that of the published model
        with the same width and width of the MLP.

    Raises UserError when the number of heads is unknown.
    """
    width, patch = shapes["patch_embed.proj.weight"].shape[0], shapes["patch_embed.proj.weight"].shape[2]
    if "blocks.0.mlp.fc1.weight" not in shapes:
        raise UserError("a vision transformer without blocks.0.mlp.fc1 is not supported, such as one with SwiGLU")
    mlp_dim = shapes["blocks.0.mlp.fc1.weight"].shape[0]
    given = cfg.get("model_args", {}).get("num_heads")
    heads = heads or given or HEADS.get((width, mlp_dim))
    if not heads:
        raise UserError(
            f"the number of heads of a vision transformer of width {width} with an MLP of {mlp_dim} is unknown: "
            'write it into config.json beside the weights, {"model_args": {"num_heads": N}}'
        )
    if given not in (None, heads):
        raise UserError(f"--heads={heads} contradicts config.json, which has model_args.num_heads={given}")
    registers = next((shapes[n].shape[1] for n in ("reg_token", "register_tokens") if n in shapes), 0)
    c = _image(
        shapes["pos_embed"].shape[1], has_cls_position(shapes), "cls_token" in shapes, patch=patch, width=width,
        depth=count(shapes, r"blocks\.(\d+)\."), heads=heads, mlp_dim=mlp_dim, act="gelu", ln_eps=1e-6,
        patch_bias="patch_embed.proj.bias" in shapes, registers=registers,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in shapes else 0.0,
    )  # fmt: skip
    _set_colours(c, cfg.get("pretrained_cfg", cfg), "mean", "std")
    return c


def has_cls_position(shapes):
    """Returns whether the class token of timm's vision transformer has a position embedding, the first row."""
    positions = shapes["pos_embed"].shape[1]
    return "cls_token" in shapes and math.isqrt(positions) ** 2 != positions


def hf_vit(shapes, cfg, preprocessor):
    """Returns the configuration of Hugging Face's ViTModel or Dinov2Model, with or without registers.

    Args:
      shapes: `{name: object with a shape}`.
      cfg: the content of its `config.json`.
      preprocessor: the content of its `preprocessor_config.json`, or {}. Without it mean and deviation are unknown.

    Raises UserError for a field that has no counterpart here or is missing.
    """
    if not {"hidden_act", "num_attention_heads", "layer_norm_eps"} <= cfg.keys():
        raise UserError("the folder must hold config.json with hidden_act, num_attention_heads and layer_norm_eps")
    _only(cfg, _VIT)
    width, _, patch, _ = shapes["embeddings.patch_embeddings.projection.weight"].shape
    mlp = "mlp.fc1" if "encoder.layer.0.norm1.weight" in shapes else "intermediate.dense"
    if f"encoder.layer.0.{mlp}.weight" not in shapes:
        raise UserError(f"no tensor encoder.layer.0.{mlp}.weight, the MLP of a ViTModel or Dinov2Model")
    c = _image(
        shapes["embeddings.position_embeddings"].shape[1], True, True, patch=patch, width=width,
        depth=count(shapes, r"encoder\.layer\.(\d+)\."), heads=cfg["num_attention_heads"],
        mlp_dim=shapes[f"encoder.layer.0.{mlp}.weight"].shape[0], patch_bias=True, ln_eps=cfg["layer_norm_eps"],
        act=known(_VIT_ACTS, cfg["hidden_act"], "config.json: hidden_act"),
        registers=shapes["embeddings.register_tokens"].shape[1] if "embeddings.register_tokens" in shapes else 0,
        layer_scale=1e-5 if "encoder.layer.0.layer_scale1.lambda1" in shapes else 0.0,
    )  # fmt: skip
    _set_colours(c, preprocessor, "image_mean", "image_std")
    return c


def _image(positions, cls_position, cls_token, **fields):
    """Returns the configuration of a vision transformer with `positions` position embeddings."""
    c = start("", fields["width"])
    del c.model.text
    size = fields["patch"] * math.isqrt(positions - cls_position)
    pool = "cls" if cls_token else "gap"
    c.model.image = dict(
        fields, kind="vit", size=size, proj=False, pool=pool, cls_token=cls_token, ln_pre=False, posemb="learn"
    )
    return c


def resnet(shapes, cfg):
    """Returns the configuration of a ResNet with the names of torchvision, which timm's has too.

    Args:
      shapes: `{name: object with a shape}`.
      cfg: as for `timm_vit`.

    Raises UserError for a ResNet of another kind.
    """
    name = cfg.get("architecture", "")
    if name and not re.fullmatch(r"(tv_)?resnet\d+", name.partition(".")[0]):
        raise UserError(
            f"config.json: architecture={name!r} is not supported: of a ResNet only resnet50, 101 and 152 are"
        )
    if "layer1.0.conv3.weight" not in shapes:
        raise UserError("a ResNet of basic blocks is not supported: only bottlenecks are, as in ResNet-50")
    width = shapes["conv1.weight"].shape[0]
    c = start("", 32 * width)
    del c.model.text
    layers = tuple(count(shapes, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    c.model.image = dict(kind="plain_resnet", size=224, layers=layers, width=width, proj=False)
    _set_colours(c, cfg.get("pretrained_cfg", cfg), "mean", "std")
    return c


def _set_colours(c, given, mean, std):
    """Sets mean and deviation of the images to the fields `mean` and `std`; without these they are unknown, None."""
    c.model.image_mean, c.model.image_std = (tuple(given[name]) if name in given else None for name in (mean, std))
