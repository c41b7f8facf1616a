"""Towers by configuration: the one place that knows which kinds of towers there are, and the published sizes."""

import dataclasses
import difflib

import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.models import text, vit
from clip_jax.models.common import ACTIVATIONS

IMAGE_TOWERS = {"vit": vit.VisionTransformer}
TEXT_TOWERS = {"transformer": text.TextTransformer}

_VIT_B = dict(width=768, depth=12, heads=12, mlp_dim=3072)
_VIT_L = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
_TEXT_512 = dict(width=512, depth=12, heads=8, mlp_dim=2048)
_TEXT_768 = dict(width=768, depth=12, heads=12, mlp_dim=3072)
_TEXT_1024 = dict(width=1024, depth=24, heads=16, mlp_dim=4096)

#: Published CLIP sizes: name -> (image tower, text tower, embedding dimension). Radford et al. 2021, table 20; H/14 of open_clip.
CLIP_SIZES = {
    "ViT-B/32": (dict(_VIT_B, patch=32, size=224), _TEXT_512, 512),
    "ViT-B/16": (dict(_VIT_B, patch=16, size=224), _TEXT_512, 512),
    "ViT-L/14": (dict(_VIT_L, patch=14, size=224), _TEXT_768, 768),
    "ViT-L/14@336": (dict(_VIT_L, patch=14, size=336), _TEXT_768, 768),
    "ViT-H/14": (dict(width=1280, depth=32, heads=16, mlp_dim=5120, patch=14, size=224), _TEXT_1024, 1024),
}


def image_tower(model):
    """The image tower of the section ``config.model``; raises UserError as :func:`_make` does."""
    size, patch = model.image.size, 2 ** len(model.image.stem) if model.image.stem else model.image.patch
    if size % patch:
        raise UserError(
            f"model.image.size={size} is not divisible by the patch size {patch}" + (" (2 ** len(stem))" if model.image.stem else "")
        )
    if model.image.pool not in vit.POOLS:
        raise UserError(f"model.image.pool={model.image.pool!r}: allowed are {', '.join(vit.POOLS)}")
    if model.image.pool == "cls" and not model.image.cls_token:
        raise UserError("model.image.pool='cls' needs model.image.cls_token=True")
    return _make(IMAGE_TOWERS, model, "image")


def text_tower(model):
    """The text tower of the section ``config.model``; raises UserError as :func:`_make` does."""
    if model.text.pool not in text.POOLS:
        raise UserError(f"model.text.pool={model.text.pool!r}: allowed are {', '.join(text.POOLS)}")
    return _make(TEXT_TOWERS, model, "text")


def _make(kinds, model, which):
    """Builds a tower from ``model[which]``; every one of its fields but ``kind`` is an argument of the tower's module.

    Raises UserError for an unknown kind, activation or field, and for a width that the heads do not divide.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in model[which].items()}
    kind = fields.pop("kind")
    shared = {name: model[name] for name in ("embed_dim", "remat", "scan", "attention")} | {"dtype": jnp.dtype(model.dtype)}
    if kind not in kinds:
        raise UserError(f"model.{which}.kind={kind!r} is not there (yet): allowed are {', '.join(kinds)}")
    known = {f.name for f in dataclasses.fields(kinds[kind])} - {"parent", "name", *shared}
    for name in set(fields) - known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(f"model.{which}.{name} is no field of a {kind!r} tower" + (f"; did you mean {near[0]!r}?" if near else ""))
    if fields["act"] not in ACTIVATIONS:
        raise UserError(f"model.{which}.act={fields['act']!r}: allowed are {', '.join(ACTIVATIONS)}")
    if fields["width"] % fields["heads"]:
        raise UserError(f"model.{which}.width={fields['width']} is not divisible by model.{which}.heads={fields['heads']}")
    return kinds[kind](**fields, **shared)
