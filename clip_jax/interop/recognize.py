"""Recognizes the format of third-party weights and finds the files that belong to them."""

import functools
import math
import re

from clip_jax import weight_files
from clip_jax.errors import UserError
from clip_jax.interop import configs
from clip_jax.interop.layouts import big_vision, hf, open_clip
from clip_jax.interop.towers import recognize as towers
from clip_jax.interop.towers.files import Foreign, read_json, weights

HF_KINDS = {
    "clip": (configs.hf.clip, hf.clip_entries, "Hugging Face CLIPModel"),
    "siglip": (configs.hf.siglip, hf.siglip_entries, "Hugging Face SiglipModel"),
    "align": (configs.hf.align, hf.align_entries, "Hugging Face AlignModel"),
}
ACTS = ("quick_gelu", "gelu", "gelu_tanh")


def recognize(path, act=None, heads=None, size=None):
    """Returns the `Foreign` model of a file or folder.

    Args:
      path: a weight file or a folder. A configuration file in the same folder is read too.
      act: the activation, one of `ACTS`. It is needed when neither the configuration nor the file shows it, and must
        not contradict them.
      heads: `(image, text)` heads; needed when they are unknown.
      size: pixels of a side; needed for a model with fixed position embeddings, which fit any size.

    Raises UserError when the format is unknown, the file is damaged, or an argument contradicts it.
    """
    if act not in (None, *ACTS):
        raise UserError(f"--act={act}: allowed are {', '.join(ACTS)}")
    file = weights(path)
    tensors, config = weight_files.read(file), file.parent / "config.json"
    names = {name.removeprefix("params/") for name in tensors}
    if tower := towers.of_tensors(file, tensors, heads and heads[0]):
        foreign = tower
    elif {"embedding/kernel", "img/embedding/kernel"} & names:
        foreign = _big_vision(file, tensors, read_json(config), size)
    elif "transformer.resblocks1.0.ln_1.weight" in names:
        foreign = _pyramidclip(file, tensors, read_json(config), heads)
    elif any(name.startswith(("visual.", "text.")) for name in names):
        foreign = _open_clip(
            file, tensors, read_json(file.parent / "open_clip_config.json") or read_json(config), act, heads
        )
    elif any(name.startswith(("vision_model.", "text_model.")) for name in names):
        foreign = _hf(file, tensors, read_json(config))
    else:
        known = "open_clip, OpenAI or PyramidCLIP (visual.*), CLIPModel (vision_model.*), big_vision (img/*), "
        known += towers.KNOWN
        raise UserError(
            f"{file}: not a model of {known}; the names of its tensors are {', '.join(sorted(names)[:3])}, ..."
        )
    sections = [foreign.config.model[which] for which in ("image", "text") if which in foreign.config.model]
    acts = {tower["act"] for tower in sections if "act" in tower}
    if act and acts != {act}:
        raise UserError(f"--act={act} contradicts {file} or its configuration, which has {' and '.join(sorted(acts))}")
    found = [tower.get("heads") for tower in sections]
    if heads and any(a not in (None, b) for a, b in zip(found, heads, strict=False)):
        raise UserError(f"--heads={heads[0]},{heads[1]} contradicts {file} or its configuration, which has {found}")
    return foreign


def _open_clip(file, tensors, cfg, act, heads):
    preprocess, notes = None, []
    if cfg and "model_cfg" in cfg:
        cfg, preprocess = cfg["model_cfg"], cfg.get("preprocess_cfg")
    if cfg and not {"embed_dim", "vision_cfg", "text_cfg"} <= cfg.keys():
        raise UserError(
            f"{file}: the configuration in its folder is not open_clip's, which has embed_dim, vision_cfg and text_cfg"
        )
    if cfg and heads and "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"].setdefault("heads", heads[0])
    if not cfg:
        openai = "openai" in file.name.lower() or {"input_resolution", "context_length"} <= tensors.keys()
        if not act and not openai:
            raise UserError(
                f"{file}: weights do not show the activation: give --act=quick_gelu (OpenAI's models and models "
                "fine-tuned from them) or --act=gelu (open_clip's default), or add open_clip_config.json to its folder"
            )
        cfg = configs.open_clip.infer_config(tensors, "quick_gelu" if openai else act, heads)
        notes.append("sizes inferred from the weights" + ("; OpenAI's model, so quick_gelu" if openai else ""))
    if not preprocess:
        notes.append("no preprocess_cfg: the published preprocessing is used")
    config = configs.open_clip.from_config(cfg, preprocess, tensors)
    options = dict(custom_text="text.ln_final.weight" in tensors, timm="timm_model_name" in cfg["vision_cfg"])
    entries = functools.partial(open_clip.entries, **options)
    return Foreign("open_clip", file, tensors, config, entries, open_clip.IGNORED, notes)


def _pyramidclip(file, tensors, cfg, heads):
    """`cfg`, the arguments of the released model class or None, gives the heads of the text tower."""
    config, parts = configs.pyramidclip.from_weights(tensors, heads or (None, (cfg or {}).get("transformer_heads")))
    notes = ["sizes inferred from the weights; the published preprocessing is used"]
    entries = functools.partial(open_clip.entries, parts=parts)
    return Foreign("PyramidCLIP", file, tensors, config, entries, open_clip.IGNORED, notes)


def _hf(file, tensors, cfg):
    if not cfg:
        raise UserError(f"{file}: its folder must hold the model's config.json")
    if cfg.get("model_type") not in HF_KINDS:
        raise UserError(
            f"{file.parent / 'config.json'}: model_type={cfg.get('model_type')!r}: allowed are {', '.join(HF_KINDS)}"
        )
    make, entries, kind = HF_KINDS[cfg["model_type"]]
    preprocessor = read_json(file.parent / "preprocessor_config.json")
    config = make(cfg, preprocessor)
    notes = [] if preprocessor else ["no preprocessor_config.json: the published preprocessing is used"]
    return Foreign(kind, file, tensors, config, entries, hf.IGNORED, notes)


def _big_vision(file, tensors, cfg, size):
    tensors = {name.removeprefix("params/"): t for name, t in tensors.items() if not name.startswith("opt/")}
    tensors, notes = _modernize(tensors), []
    if lit := [name for name in tensors if name.startswith("txt/BertEncoder")]:
        notes.append(
            f"LiT's text tower ({lit[0].split('/')[1]}) is not loaded, because its layout is not published; "
            "the image tower alone is loaded"
        )
        tensors = {name: t for name, t in tensors.items() if name.startswith("img/")}
    if "pre_logits/kernel" in tensors:
        notes.append("the classification head with its hidden layer (pre_logits) is left out")
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("pre_logits/", "head/"))}
    bare = "embedding/kernel" in tensors
    image = "" if bare else "img/"
    positions, cls_position = tensors.get(f"{image}pos_embedding"), False
    if positions is None and size:
        cfg = (cfg or {}) | {"resolution": size}
    elif positions is not None and f"{image}cls" in tensors:
        cls_position = math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
    config = configs.big_vision.from_weights(tensors, cfg or {})
    options = dict(
        bare=bare, stacked=f"{image}Transformer/encoderblock/LayerNorm_0/scale" in tensors, cls_position=cls_position
    )
    entries = functools.partial(big_vision.entries, **options)
    return Foreign("big_vision", file, tensors, config, entries, (), notes, "corners")


def _modernize(tensors):
    """Returns the arrays of big_vision under the names that its present code uses."""
    found = {}
    for name, tensor in tensors.items():
        # Before flax.linen the layers of a block were numbered together.
        for old, new in (("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0")):
            name = re.sub(rf"(Transformer/encoderblock_\d+)/{old}/", rf"\1/{new}/", name)
        name = re.sub(r"(encoderblock_\d+/MultiHeadDotProductAttention)_1/", r"\1_0/", name)
        # Formerly the position embedding belonged to the encoder, and the pooling head had no name of its own.
        name = re.sub(r"Transformer/posembed_input/pos_embedding$", "pos_embedding", name)
        name = re.sub(
            r"^(img/)?(probe|MlpBlock_0/|LayerNorm_0/|MultiHeadDotProductAttention_0/)", r"\1MAPHead_0/\2", name
        )
        found[name.replace("img/MAPHead_0/MAPHead_0", "img/MAPHead_0")] = tensor
    if "txt/Encoder_0/pos_embedding" in found:
        first, second = found.pop("txt/Encoder_0/pos_embedding"), found.get("txt/pos_embedding")
        total = (
            first
            if second is None
            else weight_files.Tensor(first.shape, first.dtype, lambda: first.read() + second.read())
        )
        found["txt/pos_embedding"] = total
    return found
