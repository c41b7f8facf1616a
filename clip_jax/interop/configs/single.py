"""Configurations of single towers: Hugging Face's BertModel, ViTs of timm and DINO, ResNets of torchvision and timm.

Their method is empty and the section of the other tower is missing.
"""

import math
import re

from clip_jax.errors import UserError
from clip_jax.interop.configs.common import count, start

_BERT = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}


def bert(shapes, cfg):
    """Returns the configuration of a BertModel.

    Args:
      shapes: `{name: object with a shape}`, names without `bert.`.
      cfg: the content of its `config.json`, or {}; heads are 64 wide without it.

    Raises UserError for a field that has no counterpart here.
    """
    for field, allowed in _BERT.items():
        if cfg.get(field, allowed) != allowed:
            raise UserError(f"config.json: {field}={cfg[field]!r} is not supported: only {allowed!r} is")
    vocab, width = shapes["embeddings.word_embeddings.weight"].shape
    positions = shapes["embeddings.position_embeddings.weight"].shape[0]
    c = start("", width)
    del c.model.image
    c.model.text = dict(
        kind="bert", context=positions, positions=positions, vocab_size=vocab, eot_id=-1, pad_id=0, width=width,
        depth=count(shapes, r"encoder\.layer\.(\d+)\."), heads=cfg.get("num_attention_heads", width // 64),
        mlp_dim=shapes["encoder.layer.0.intermediate.dense.weight"].shape[0],
        types=shapes["embeddings.token_type_embeddings.weight"].shape[0], act="gelu", ln_eps=1e-12, proj=False,
    )  # fmt: skip
    return c


def timm_vit(shapes, cfg):
    """Returns the configuration of a vision transformer with the names of timm, which DINO's has too.

    Args:
      shapes: `{name: object with a shape}`.
      cfg: timm's `config.json` (`pretrained_cfg`), or {}. Without it mean and deviation are unknown, None.
    """
    width, patch = shapes["patch_embed.proj.weight"].shape[0], shapes["patch_embed.proj.weight"].shape[2]
    has_cls = "cls_token" in shapes
    grid = math.isqrt(shapes["pos_embed"].shape[1] - has_cls)
    c = start("", width)
    del c.model.text
    c.model.image = dict(
        kind="vit", size=grid * patch, patch=patch, width=width, depth=count(shapes, r"blocks\.(\d+)\."),
        heads=width // 64, mlp_dim=shapes["blocks.0.mlp.fc1.weight"].shape[0], act="gelu", ln_eps=1e-6, proj=False,
        pool="cls" if has_cls else "gap", cls_token=has_cls, ln_pre=False,
        patch_bias="patch_embed.proj.bias" in shapes, posemb="learn",
    )  # fmt: skip
    _set_colours(c, cfg)
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
            f"config.json: architecture={name!r} is not supported: of these names only resnet50 and its like"
        )
    if "layer1.0.conv3.weight" not in shapes:
        raise UserError("a ResNet of basic blocks is not supported: only bottlenecks are, as in ResNet-50")
    width = shapes["conv1.weight"].shape[0]
    c = start("", 32 * width)
    del c.model.text
    layers = tuple(count(shapes, rf"layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    c.model.image = dict(kind="plain_resnet", size=224, layers=layers, width=width, proj=False)
    _set_colours(c, cfg)
    return c


def _set_colours(c, cfg):
    """Sets mean and deviation to those of timm's `pretrained_cfg`; without it they are unknown, None."""
    pretrained = cfg.get("pretrained_cfg", cfg)
    c.model.image_mean, c.model.image_std = (
        tuple(pretrained[name]) if name in pretrained else None for name in ("mean", "std")
    )
