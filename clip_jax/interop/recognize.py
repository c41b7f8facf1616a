"""What kind of model a file or folder of others holds, and the files that belong to it."""

import json
import math
import pathlib
import re
from dataclasses import dataclass, field
from typing import Any

from clip_jax import weight_files as readers
from clip_jax.errors import UserError
from clip_jax.interop import configs
from clip_jax.interop.layouts import big_vision, hf, open_clip

# Where the weights are, the first that is there; in a folder that holds a model for open_clip and for transformers, open_clip's.
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
HF_KINDS = {
    "clip": (configs.hf_clip, hf.clip_entries, "Hugging Face CLIPModel"),
    "siglip": (configs.hf_siglip, hf.siglip_entries, "Hugging Face SiglipModel"),
    "align": (configs.hf_align, hf.align_entries, "Hugging Face AlignModel"),
}
ACTS = ("quick_gelu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Foreign:
    """A model of others, its weights not read yet.

    Attributes:
      kind: what it is, in words.
      file: the weights, or the index of their files.
      tensors: `{name: Tensor}`.
      config: our configuration of it, without tokenizer.
      entries: function of our paths that gives the layout.
      ignored: patterns of names that are no parameters.
      notes: what a user should know of how the configuration came about.
    """

    kind: str
    file: pathlib.Path
    tensors: dict
    config: Any
    entries: Any
    ignored: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def recognize(path, act=None, heads=None, size=None):
    """The `Foreign` model of a file or folder.

    Args:
      path: a weight file, with the configuration beside it if there is one, or a folder.
      act: the activation; needed where neither a configuration nor the file itself tells it, and may not contradict them.
      heads: the heads of the image and the text tower, where they cannot be told.
      size: pixels of a side, for a model with fixed positions, which fits any.

    Raises UserError for what is not known, damaged or contradictory.
    """
    if act not in (None, *ACTS):
        raise UserError(f"--act={act}: allowed are {', '.join(ACTS)}")
    file = _weights(pathlib.Path(path))
    tensors, config = readers.read(file), file.parent / "config.json"
    names = {name.removeprefix("params/") for name in tensors}
    if {"embedding/kernel", "img/embedding/kernel"} & names:
        foreign = _big_vision(file, tensors, _json(config), size)
    elif "transformer.resblocks1.0.ln_1.weight" in names:
        foreign = _pyramidclip(file, tensors, _json(config), heads)
    elif any(name.startswith(("visual.", "text.")) for name in names):
        foreign = _open_clip(file, tensors, _json(file.parent / "open_clip_config.json") or _json(config), act, heads)
    elif any(name.startswith(("vision_model.", "text_model.")) for name in names):
        foreign = _hf(file, tensors, _json(config))
    else:
        known = "open_clip, OpenAI or PyramidCLIP (visual.*), Hugging Face (vision_model.*) or big_vision (img/*)"
        raise UserError(f"{file}: not a model of {known}: its tensors are called {', '.join(sorted(names)[:3])}, ...")
    towers = [foreign.config.model[which] for which in ("image", "text") if which in foreign.config.model]
    acts = {tower["act"] for tower in towers if "act" in tower}
    if act and acts != {act}:
        raise UserError(
            f"--act={act} contradicts {file} or the configuration beside it: {' and '.join(sorted(acts))} there"
        )
    found = [tower.get("heads") for tower in towers]
    if heads and any(a not in (None, b) for a, b in zip(found, heads, strict=False)):
        raise UserError(
            f"--heads={heads[0]},{heads[1]} contradicts {file} or the configuration beside it: {found} there"
        )
    return foreign


def is_foreign(path):
    """Does a path lead to weights of others, and not to a work folder of ours?"""
    path = pathlib.Path(path)
    return path.is_file() or path.is_dir() and bool(_candidates(path))


def _candidates(folder):
    files, npz = (
        [folder / name for name in (*OPEN_CLIP_FILES, *HF_FILES, "checkpoint.npz")],
        sorted(folder.glob("*.npz")),
    )
    return [file for file in files if file.is_file()] + (npz if len(npz) == 1 else [])


def _weights(path):
    if path.is_dir():
        found = _candidates(path)
        if not found:
            names = ", ".join((*OPEN_CLIP_FILES, *HF_FILES, "checkpoint.npz"))
            raise UserError(f"{path}: there are no weights in it: looked for {names} and a single .npz")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder")
    return path


def _json(path):
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


def _open_clip(file, tensors, cfg, act, heads):
    preprocess, notes = None, []
    if cfg and "model_cfg" in cfg:
        cfg, preprocess = cfg["model_cfg"], cfg.get("preprocess_cfg")
    if cfg and not {"embed_dim", "vision_cfg", "text_cfg"} <= cfg.keys():
        raise UserError(
            f"{file}: the configuration beside it is none of open_clip: embed_dim, vision_cfg and text_cfg are expected"
        )
    if cfg and heads and "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"].setdefault("heads", heads[0])
    if not cfg:
        openai = "openai" in file.name.lower() or {"input_resolution", "context_length"} <= tensors.keys()
        if not act and not openai:
            raise UserError(
                f"{file}: the activation cannot be told from weights: give --act=quick_gelu (OpenAI's, and models made from them) "
                "or --act=gelu (open_clip's default), or put its open_clip_config.json beside it"
            )
        cfg = configs.open_clip_of_weights(tensors, "quick_gelu" if openai else act, heads)
        notes.append("sizes read off the weights" + ("; OpenAI's, so quick_gelu" if openai else ""))
    if not preprocess:
        notes.append("no preprocess_cfg: the published preprocessing is taken")
    config = configs.open_clip(cfg, preprocess, tensors)
    options = dict(custom_text="text.ln_final.weight" in tensors, timm="timm_model_name" in cfg["vision_cfg"])
    return Foreign(
        "open_clip", file, tensors, config, lambda ours: open_clip.entries(ours, **options), open_clip.IGNORED, notes
    )  # fmt: skip


def _pyramidclip(file, tensors, cfg, heads):
    """`cfg`: the arguments of the released model class, or nothing; it tells the text tower's heads."""
    config, parts = configs.pyramidclip(tensors, heads or (None, (cfg or {}).get("transformer_heads")))
    notes = ["sizes read off the weights; the published preprocessing is taken"]
    return Foreign(
        "PyramidCLIP", file, tensors, config, lambda ours: open_clip.entries(ours, parts=parts), open_clip.IGNORED, notes
    )  # fmt: skip


def _hf(file, tensors, cfg):
    if not cfg:
        raise UserError(f"{file}: the model's config.json has to be beside it")
    if cfg.get("model_type") not in HF_KINDS:
        raise UserError(
            f"{file.parent / 'config.json'}: model_type={cfg.get('model_type')!r}: allowed are {', '.join(HF_KINDS)}"
        )
    make, entries, kind = HF_KINDS[cfg["model_type"]]
    preprocessor = _json(file.parent / "preprocessor_config.json")
    config = make(cfg, preprocessor)
    notes = [] if preprocessor else ["no preprocessor_config.json: the published preprocessing is taken"]
    return Foreign(kind, file, tensors, config, entries, hf.IGNORED, notes)


def _big_vision(file, tensors, cfg, size):
    tensors = {name.removeprefix("params/"): t for name, t in tensors.items() if not name.startswith("opt/")}
    tensors, notes = _modernize(tensors), []
    if lit := [name for name in tensors if name.startswith("txt/BertEncoder")]:
        notes.append(
            f"LiT's text tower ({lit[0].split('/')[1]}) is left out: its layout is not published; the image tower alone is loaded"
        )
        tensors = {name: t for name, t in tensors.items() if name.startswith("img/")}
    bare = "embedding/kernel" in tensors
    image = "" if bare else "img/"
    positions, cls_position = tensors.get(f"{image}pos_embedding"), False
    if positions is None and size:
        cfg = (cfg or {}) | {"resolution": size}
    elif positions is not None and f"{image}cls" in tensors:
        cls_position = math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]
    config = configs.big_vision(tensors, cfg or {})
    options = dict(
        bare=bare, stacked=f"{image}Transformer/encoderblock/LayerNorm_0/scale" in tensors, cls_position=cls_position
    )
    return Foreign(
        "big_vision", file, tensors, config, lambda ours: big_vision.entries(ours, **options), big_vision.IGNORED, notes
    )  # fmt: skip


def _modernize(tensors):
    """Arrays of big_vision under the names of its present code."""
    found = {}
    for name, tensor in tensors.items():
        # A position embedding once belonged to the encoder; the pooling head once had no name of its own.
        name = re.sub(r"Transformer/posembed_input/pos_embedding$", "pos_embedding", name)
        name = re.sub(
            r"^(img/)?(probe|MlpBlock_0/|LayerNorm_0/|MultiHeadDotProductAttention_0/)", r"\1MAPHead_0/\2", name
        )
        found[name.replace("img/MAPHead_0/MAPHead_0", "img/MAPHead_0")] = tensor
    if "txt/Encoder_0/pos_embedding" in found:
        first, second = found.pop("txt/Encoder_0/pos_embedding"), found.get("txt/pos_embedding")
        total = (
            first if second is None else readers.Tensor(first.shape, first.dtype, lambda: first.read() + second.read())
        )
        found["txt/pos_embedding"] = total
    return found
