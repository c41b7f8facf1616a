"""Builds towers from a configuration: the registry of their kinds and the published sizes."""

import dataclasses
import typing

import jax.numpy as jnp

from clip_jax.errors import UserError, did_you_mean
from clip_jax.models import bert, efficientnet, pyramid, resnet, text, vit
from clip_jax.models.common import ACTIVATIONS
from clip_jax.models.transformer import PROJ_INITS, WEIGHT_INITS

IMAGE_TOWERS = {
    "vit": vit.VisionTransformer, "resnet": resnet.ModifiedResNet, "efficientnet": efficientnet.EfficientNet,
    "pyramid_vit": pyramid.PyramidViT, "pyramid_resnet": pyramid.PyramidResNet, "plain_resnet": resnet.PlainResNet,
}  # fmt: skip
TEXT_TOWERS = {"transformer": text.TextTransformer, "bert": bert.BertTower}
#: Fields of towers that hold a probability: at least 0 and below 1.
PROBABILITIES = ("dropout", "attention_dropout", "patch_drop", "stochastic_depth")
CHOICES = {
    "act": ACTIVATIONS,
    "weight_init": WEIGHT_INITS,
    "proj_init": PROJ_INITS,
    "posemb": vit.POSEMBS,
    "padding": efficientnet.PADDINGS,
}
#: Fields of `config.model` that are passed to every tower whose module declares them.
SHARED = ("embed_dim", "dtype", "remat", "scan", "attention")

_B = dict(width=768, depth=12, heads=12, mlp_dim=3072)
_L = dict(width=1024, depth=24, heads=16, mlp_dim=4096)
_H = dict(width=1280, depth=32, heads=16, mlp_dim=5120, act="gelu")
_SO400M = dict(width=1152, depth=27, heads=16, mlp_dim=4304)


def _text(width, depth=12):
    return dict(kind="transformer", context=77, width=width, depth=depth, heads=width // 64, mlp_dim=4 * width)


def _siglip(tower, patch, size, context=64):
    """SigLIP (Zhai et al. 2023): attention pooling without projection; bidirectional text, its last token projected."""
    shared = dict(tower, act="gelu_tanh", ln_eps=1e-6, weight_init="xavier")
    image = dict(
        kind="vit", size=size, patch=patch, pool="map", cls_token=False, ln_pre=False, patch_bias=True, proj=False
    )
    text = dict(kind="transformer", context=context, pool="last", causal=False, proj_bias=True)
    return dict(image, **shared), dict(text, **shared), tower["width"]


def _align(width_coefficient, depth_coefficient, proj, text_width, text_depth, embed_dim):
    """ALIGN (Jia et al. 2021, section 5); both dropouts are BERT's, the projections start as in coyo-align."""
    coefficients = dict(width_coefficient=width_coefficient, depth_coefficient=depth_coefficient, proj_init="glorot")
    image = dict(coefficients, kind="efficientnet", size=289, proj=proj)
    text = dict(_text(text_width, text_depth), kind="bert", context=64, dropout=0.1)
    text |= dict(attention_dropout=0.1, proj_init="glorot")
    return image, text, embed_dim


#: Published sizes: name -> (image tower, text tower, embedding dimension). Other fields have the module's defaults.
#: CLIP: Radford et al. 2021, tables 19 and 20. H/14: open_clip. SigLIP, SigLIP 2: the released models of big_vision.
#: ALIGN: Jia et al. 2021. The embedding dimensions of B3 and B7 are those of coyo-align. That of L2, its width, is
#: an assumption.
SIZES = {
    "ViT-B/32": (dict(_B, kind="vit", patch=32, size=224), _text(512), 512),
    "ViT-B/16": (dict(_B, kind="vit", patch=16, size=224), _text(512), 512),
    "ViT-L/14": (dict(_L, kind="vit", patch=14, size=224), _text(768), 768),
    "ViT-L/14@336": (dict(_L, kind="vit", patch=14, size=336), _text(768), 768),
    "ViT-H/14": (dict(_H, kind="vit", patch=14, size=224), dict(_text(1024, 24), act="gelu"), 1024),
    "RN50": (dict(kind="resnet", size=224, layers=(3, 4, 6, 3), width=64), _text(512), 1024),
    "RN101": (dict(kind="resnet", size=224, layers=(3, 4, 23, 3), width=64), _text(512), 512),
    "RN50x4": (dict(kind="resnet", size=288, layers=(4, 6, 10, 6), width=80), _text(640), 640),
    "SigLIP-B/16-224": _siglip(_B, 16, 224),
    "SigLIP-L/16-256": _siglip(_L, 16, 256),
    "SigLIP-So400m/14-224": _siglip(_SO400M, 14, 224, context=16),
    "SigLIP2-B/16-256": _siglip(_B, 16, 256),
    "ALIGN-B3-mini": _align(1.2, 1.4, True, 256, 4, 640),
    "ALIGN-B7-base": _align(2.0, 3.1, False, 768, 12, 640),
    "PyramidCLIP-B/32": (dict(_B, kind="pyramid_vit", patch=32, size=224), dict(_text(512), pool="max"), 512),
    "PyramidCLIP-B/16": (dict(_B, kind="pyramid_vit", patch=16, size=224), dict(_text(512), pool="max"), 512),
    "PyramidCLIP-RN50": (
        dict(kind="pyramid_resnet", size=224, layers=(3, 4, 6, 3), width=64), dict(_text(512), pool="max"), 1024,
    ),
    "ALIGN-L2-large": _align(4.3, 5.3, False, 1024, 24, 1376),
}  # fmt: skip

#: EfficientNets: name -> (width coefficient, depth coefficient). Tan & Le 2019; L2: Xie et al. 2020.
EFFICIENTNETS = {
    "B0": (1.0, 1.0), "B1": (1.0, 1.1), "B2": (1.1, 1.2), "B3": (1.2, 1.4), "B4": (1.4, 1.8), "B5": (1.6, 2.2),
    "B6": (1.8, 2.6), "B7": (2.0, 3.1), "L2": (4.3, 5.3),
}  # fmt: skip


def use_size(model, name):
    """Sets `model.image`, `model.text` and `model.embed_dim` to the published size `name` of `SIZES`.

    Both sections get every field of their tower and are locked.

    Args:
      model: the section `config.model`, changed in place.
      name: a key of `SIZES`.
    """
    image, text, model.embed_dim = SIZES[name]
    model.image = all_fields(IMAGE_TOWERS, image)
    model.text = all_fields(TEXT_TOWERS, dict(text, vocab_size=0, eot_id=-1))  # the tokenizer sets these two
    for section in (model.image, model.text):
        section.lock()


def fill(model):
    """Gives the towers in the section `config.model` all their fields, in place."""
    for which, kinds in (("image", IMAGE_TOWERS), ("text", TEXT_TOWERS)):
        if which in model:
            model[which] = all_fields(kinds, model[which].to_dict())


def all_fields(kinds, given):
    """Returns all fields of a tower: those in `given`, and the defaults of its module for the others.

    Args:
      kinds: `IMAGE_TOWERS` or `TEXT_TOWERS`.
      given: dict of fields; `kind` is a key of `kinds`.
    """
    defaults = {
        f.name: f.default for f in dataclasses.fields(kinds[given["kind"]]) if f.default is not dataclasses.MISSING
    }
    return {k: v for k, v in defaults.items() if k not in (*SHARED, "tokens", "parent", "name")} | given


def reads_end(text):
    """Whether the text tower of the section `config.model.text` looks for the end of a text."""
    if text.get("kind") == "bert":
        return text.get("pad_id", -1) < 0
    return text.get("pool") in ("eot", "mean", "max_masked") or text.get("mask_padding", False)


def image_tower(model, tokens=True):
    """Returns the image tower of a configuration, a flax module.

    Args:
      model: the section `config.model`; `model.image` holds `kind`, `proj` and the arguments of the tower's module.
      tokens: whether the tower returns its tokens.

    Raises UserError for a size that the patch or the stride does not divide, for `pool="cls"` without a class token,
    and for the same reasons as `_make`.
    """
    _check_complete(IMAGE_TOWERS, model, "image")
    image = model.image
    stride, divisor = 1, ""
    if image.kind in ("vit", "pyramid_vit"):
        stem = image.get("stem")
        stride = 2 ** len(stem) if stem else image.patch
        divisor = f"the patch size {stride}" + (" (2 ** len(stem))" if stem else "")
        if image.get("pool", "cls") == "cls" and not image.get("cls_token", True):
            raise UserError("model.image.pool='cls' needs model.image.cls_token=True")
    elif image.kind in ("resnet", "pyramid_resnet"):
        stride, divisor = 32, f"32, the stride of a {image.kind!r} tower"
    if image.size % stride:
        raise UserError(f"model.image.size={image.size} is not divisible by {divisor}")
    return _make(IMAGE_TOWERS, model, "image", CHOICES | {"pool": vit.POOLS}, tokens)


def unprojected(tower):
    """Returns a copy of an image tower whose embedding is the pooled feature before its projection.

    A ResNet stays as it is, because the output layer of its attention pooling is its projection.
    """
    return tower.clone(embed_dim=0) if hasattr(tower, "proj_bias") else tower


def text_tower(model, tokens=True):
    """Returns the text tower of a configuration, a flax module.

    Args:
      model: the section `config.model`; `model.text` holds `kind`, `proj` and the arguments of the tower's module.
      tokens: whether the tower returns its tokens.

    Raises UserError for a context longer than the position embedding, and for the same reasons as `_make`.
    """
    _check_complete(TEXT_TOWERS, model, "text")
    first = model.text.get("first_position", 0)
    if model.text.context > model.text.get("positions", model.text.context) - first:
        rest = f" less model.text.first_position={first}" if first else ""
        raise UserError(
            f"model.text.context={model.text.context} is more than model.text.positions={model.text.positions}{rest}"
        )
    pools = bert.POOLS if model.text.kind == "bert" else text.POOLS
    return _make(TEXT_TOWERS, model, "text", CHOICES | {"pool": pools}, tokens)


def _check_complete(kinds, model, which):
    """Raises UserError for an unknown kind and for a missing field that has no default."""
    if which not in model:
        raise UserError(f"the configuration has no section model.{which}")
    given = model[which]
    if given.get("kind") not in kinds:
        raise UserError(f"model.{which}.kind={given.get('kind')!r}: allowed are {', '.join(kinds)}")
    for field in dataclasses.fields(kinds[given.kind]):
        if field.default is dataclasses.MISSING and field.name not in (*SHARED, *given):
            raise UserError(f"model.{which}.{field.name} is missing")
    check_types(kinds[given.kind], given, f"model.{which}")


def check_types(kind, given, section):
    """Raises UserError for a value of `given` whose type is not that of the field of the dataclass `kind`."""
    for field in dataclasses.fields(kind):
        if field.name in given and not _has_type(given[field.name], field.type):
            shown = " ".join(repr(given[field.name]).split())  # a section's text has several lines
            wanted = field.type.__name__ if isinstance(field.type, type) else field.type
            raise UserError(f"{section}.{field.name}={shown}: must be of type {wanted}")


def _has_type(value, wanted):
    """Says whether `value` is of the scalar type or the tuple type `wanted`; any other type is not checked."""
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        return isinstance(value, tuple | list) and all(_has_type(x, item) for x in value)
    if wanted not in (int, float, bool, str):
        return True
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _make(kinds, model, which, choices, tokens):
    """Builds the tower of the section `model[which]`. Its fields except `kind` and `proj` are arguments of the module.

    Args:
      kinds: `{kind: module class}`.
      model: the section `config.model`.
      which: `image` or `text`.
      choices: `{field: allowed values}`.
      tokens: the argument `tokens` of a module that has one.

    Raises UserError for an unknown kind or field, for a value outside the `choices` of its field, for a probability
    that is none, for a width that `heads` does not divide, and for `proj=False` (no projection) where the width of the
    tower is not `model.embed_dim`.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in model[which].items()}
    kind = fields.pop("kind")
    known = {f.name for f in dataclasses.fields(kinds[kind])} - {"parent", "name"}
    shared = {name: model[name] for name in SHARED if name in known} | {"dtype": jnp.dtype(model.dtype)}
    shared |= {"tokens": tokens} if "tokens" in known else {}
    known = known - {*SHARED, "tokens"} | ({"proj"} if "proj_bias" in known else set())
    for name in sorted(set(fields) - known):
        raise UserError(f"model.{which}.{name} is no field of a {kind!r} tower{did_you_mean(name, known)}")
    for name in fields.keys() & choices.keys():
        if fields[name] not in choices[name]:
            raise UserError(f"model.{which}.{name}={fields[name]!r}: allowed are {', '.join(choices[name])}")
    for name in PROBABILITIES:
        if not 0 <= fields.get(name, 0) < 1:
            raise UserError(f"model.{which}.{name}={fields[name]}: must be at least 0 and below 1")
    if "heads" in fields and fields["width"] % fields["heads"]:
        raise UserError(
            f"model.{which}.width={fields['width']} is not divisible by model.{which}.heads={fields['heads']}"
        )
    projected = fields.pop("proj", True)
    tower = kinds[kind](**fields, **shared | ({} if projected else {"embed_dim": 0}))
    width = 0 if projected else tower.width * (32 if kind == "plain_resnet" else 1)
    if not projected and width != model.embed_dim:
        raise UserError(
            f"model.{which}.proj=False needs model.embed_dim={width}, the width of the tower, not {model.embed_dim}"
        )
    return tower
