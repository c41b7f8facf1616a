"""Exports a model for open_clip or Hugging Face transformers; the command is `python -m clip_jax.tools.export`.

`open_clip` writes a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`. `hf` writes one for
`from_pretrained("FOLDER")` of transformers' `CLIPModel`, `SiglipModel` or `AlignModel`, and of `AutoProcessor`. A
folder has the weights in float32, the configuration, the preprocessing and the tokenizer. docs/checkpoints.md lists
what fits.

The written configuration is read again as an import reads it, and must describe the same model. A field that the target
cannot express is an error and is never left out.
"""

import json
import math
import runpy
import sys

from clip_jax import config as config_lib
from clip_jax.errors import UserError, unknown
from clip_jax.interop import configs, export_tokenizer, layouts, load
from clip_jax.interop.layouts import hf, open_clip
from clip_jax.methods.interface import Method
from clip_jax.models.efficientnet import has_first_residual
from clip_jax.plugins import parse_call
from clip_jax.runtime import storage

WEIGHTS = {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}
TARGETS = tuple(WEIGHTS)
HF_ACTS = {ours: theirs for theirs, ours in configs.hf.ACTS.items() if theirs != "gelu_new"}
HF_RESAMPLE = {name: number for number, name in configs.hf.RESAMPLE.items()}
#: timm's ViTs with attention pooling, by (patch, width, depth, MLP width): the name without the size, and the sizes.
TIMM_SIGLIP = {
    (16, 768, 12, 3072): ("vit_base_patch16_siglip", (224, 256, 384, 512)),
    (32, 768, 12, 3072): ("vit_base_patch32_siglip", (256,)),
    (16, 1024, 24, 4096): ("vit_large_patch16_siglip", (256, 384, 512)),
    (14, 1152, 27, 4304): ("vit_so400m_patch14_siglip", (224, 378, 384)),
    (16, 1152, 27, 4304): ("vit_so400m_patch16_siglip", (256, 384, 512)),
    (16, 1536, 40, 6144): ("vit_giantopt_patch16_siglip", (256, 384)),
}
#: Fields of the towers that affect training only.
TRAINING = {"weight_init", "proj_init", "patch_drop", "dropout", "attention_dropout", "bn_group"}


def export(model, to, out, tokenizer=True):
    """Writes a `clip_jax.inference.Model` into the folder `out`, which must be new or empty.

    Args:
      model: the model.
      to: `"open_clip"` or `"hf"`.
      out: the folder.
      tokenizer: whether to write the tokenizer too.

    Returns:
      Lines on what was written.

    Raises UserError, in one line and before anything is written, for a model or tokenizer that the target cannot
    express.
    """
    from safetensors.numpy import save_file

    if to not in TARGETS:
        raise unknown("--to: unknown target", to, TARGETS)
    out = check_out(out)
    config, arrays = model.config.copy_and_resolve_references().unlock(), _arrays(model)
    load.shapes(config)  # fills in all fields of the towers
    if model.method.similarity is not Method.similarity:
        raise UserError(f"--to={to} cannot express method={config.method!r}: its similarity is not a dot product")
    make = {"open_clip": _open_clip, "hf": _hf}[to]
    files, entries, note = make(config, arrays)
    theirs = layouts.save(entries, arrays)
    _same_model(config, files, theirs, to)
    layouts.check(entries, theirs, arrays)
    head = f"note: the classifier of {len(model.class_names)} classes is left out" if model.class_names else None
    notes = [line for line in (note, _alpha_note(config, to), head) if line]
    if not tokenizer or model.tokenizer is None:
        notes.append("note: no tokenizer is written")
    elif to == "open_clip":
        text_cfg = files["open_clip_config.json"]["model_cfg"]["text_cfg"]
        files |= export_tokenizer.for_open_clip(model.tokenizer, config.model.text.context, text_cfg)
    else:
        files |= export_tokenizer.for_hf(model.tokenizer, config.model.text.context)
    if "merges.txt" in files and _sees_padding(config.model.text) and not model.tokenizer.options["pad_with_eot"]:
        raise UserError(
            "CLIP's tokenizer of transformers pads with the end of text. This text tower sees the padding, which is 0 "
            "here: export without the tokenizer (--without-tokenizer)"
        )
    with storage.local_folder(out) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(
                content if isinstance(content, bytes) else (json.dumps(content, indent=1) + "\n").encode()
            )
        save_file(theirs, folder / WEIGHTS[to], metadata={"format": "pt"})
    count = sum(math.prod(x.shape) for path, x in arrays.items() if path.startswith("params/"))
    return [f"written: {out}: {count:,} parameters; {', '.join(sorted([WEIGHTS[to], *files]))}", *notes]


def check_out(out):
    """Returns the path of the folder to write; raises UserError unless it is new or empty."""
    out = storage.path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} already exists and is not an empty folder: give a new folder")
    return out


def _arrays(model):
    """Returns `{path: array}` of parameters and running statistics, with unstacked layers."""
    import jax

    from clip_jax.models.transformer import unstack_layers
    from clip_jax.runtime.sharding import path_name

    params = {name: x for name, x in model.params.items() if not (name == "head" and model.class_names)}
    tree = unstack_layers({"params": params, "extra": model.extra})
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _open_clip(config, arrays):
    """Returns `(files, layout, note or None)` for open_clip."""
    image, text = _towers(config, "open_clip", {"vit", "resnet"}, {"transformer"})
    timm = image.get("pool") == "map"
    acts = [tower["act"] for tower in (image, text) if "act" in tower]
    pools = {"eot": "argmax" if text["eot_id"] == text["vocab_size"] - 1 else "eos", "last": "last", "first": "first"}
    size, steps = image["size"], _steps(config)
    if timm:
        name, sizes = TIMM_SIGLIP.get(tuple(image[field] for field in ("patch", "width", "depth", "mlp_dim")), ("", ()))
        if size not in sizes:
            raise UserError(
                "--to=open_clip: open_clip takes towers with attention pooling from timm, which has none of this "
                "patch, width, depth and size; --to=hf can express it"
            )
        vision = dict(
            image_size=size,
            timm_model_name=f"{name}_{size}",
            timm_pool="map",
            timm_proj="linear" if image["proj"] else "none",
        )
        vision |= dict(timm_model_pretrained=False, timm_proj_bias=image["proj_bias"])
    elif image["kind"] == "resnet":
        fields = {name: image[name] for name in ("width", "head_width")}
        vision = dict(fields, image_size=size, layers=list(image["layers"]))
    else:
        vision = dict(
            _open_clip_transformer(image),
            image_size=size,
            patch_size=image["patch"],
            head_width=image["width"] // image["heads"],
        )
        vision |= dict(pool_type="avg" if image["pool"] == "gap" else "tok", no_ln_pre=not image["ln_pre"])
    cfg = {
        "embed_dim": config.model.embed_dim,
        "quick_gelu": "quick_gelu" in acts,
        "vision_cfg": vision,
        "text_cfg": _open_clip_transformer(text)
        | dict(
            context_length=text["context"],
            vocab_size=text["vocab_size"],
            heads=text["heads"],
            proj_bias=text["proj_bias"],
        )
        | dict(pool_type=pools.get(text["pool"], "argmax"), eos_id=text["eot_id"], no_causal_mask=not text["causal"]),
    }
    if timm:
        cfg["custom_text"] = True
    if "params/logit_bias" in arrays:
        cfg["init_logit_bias"] = -10.0
    filter_ = steps["filter"] if steps["filter"] in ("bicubic", "bilinear") else "bicubic"
    preprocess = dict(mean=list(config.model.image_mean), std=list(config.model.image_std), interpolation=filter_)
    preprocess |= dict(size=size, mode="RGB", resize_mode="shortest" if steps["keep"] else "squash")
    entries = open_clip.entries(arrays, custom_text=timm, timm=timm)
    files = {"open_clip_config.json": {"model_cfg": cfg, "preprocess_cfg": preprocess}}
    return files, entries, _preprocessing_note(config, steps, (size, filter_))


def _open_clip_transformer(tower):
    ratio = tower["mlp_dim"] / tower["width"]
    if int(ratio * tower["width"]) < tower["mlp_dim"]:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    fields = dict(width=tower["width"], layers=tower["depth"], mlp_ratio=ratio)
    fields["norm_kwargs"] = {"eps": tower["ln_eps"]}
    return fields | ({"act_kwargs": {"approximate": "tanh"}} if tower["act"] == "gelu_tanh" else {})


def _hf(config, arrays):
    """Returns `(files, layout, note or None)` for transformers."""
    if config.method == "align":
        cfg, entries = _hf_align(config), hf.align_entries
    elif "params/logit_bias" in arrays:
        cfg, entries = _hf_siglip(config), hf.siglip_entries
    else:
        cfg, entries = _hf_clip(config), hf.clip_entries
    size, steps = config.model.image.size, _steps(config)
    edge, crop = steps["edge"], steps["keep"] or steps["edge"] != size
    kinds = {"siglip": "Siglip", "align": "EfficientNet"} if not steps["keep"] else {}
    preprocessor = {
        "image_processor_type": f"{kinds.get(cfg['model_type'], 'CLIP')}ImageProcessor",
        "do_resize": True, "size": {"shortest_edge": edge} if steps["keep"] else {"height": edge, "width": edge},
        "resample": HF_RESAMPLE[steps["filter"]], "do_center_crop": crop, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": list(config.model.image_mean), "image_std": list(config.model.image_std),
    }  # fmt: skip
    note = _preprocessing_note(config, steps, (edge, steps["filter"]))
    return {"config.json": cfg, "preprocessor_config.json": preprocessor}, entries(arrays), note


def _hf_clip(config):
    image, text = _towers(config, "CLIPModel of transformers", {"vit"}, {"transformer"})
    vision = dict(_hf_transformer(image), image_size=image["size"], patch_size=image["patch"])
    text = dict(
        _hf_transformer(text),
        vocab_size=text["vocab_size"],
        max_position_embeddings=text["context"],
        eos_token_id=text["eot_id"],
    )
    text |= dict(bos_token_id=text["eos_token_id"] - 1, pad_token_id=0)
    cfg = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=config.model.embed_dim)
    return _hf_sections(cfg, vision, text, "clip", projection_dim=config.model.embed_dim)


def _hf_siglip(config):
    image, text = _towers(config, "SiglipModel of transformers", {"vit"}, {"transformer"})
    vision = dict(_hf_transformer(image), image_size=image["size"], patch_size=image["patch"])
    text = dict(_hf_transformer(text), vocab_size=text["vocab_size"], max_position_embeddings=text["context"])
    text |= dict(projection_size=config.model.embed_dim, eos_token_id=1, pad_token_id=1, bos_token_id=1)
    return _hf_sections(dict(architectures=["SiglipModel"], model_type="siglip"), vision, text, "siglip")


def _hf_align(config):
    image, text = _towers(config, "AlignModel of transformers", {"efficientnet"}, {"bert"})
    columns = ("out_channels", "num_block_repeats", "kernel_sizes", "strides", "expand_ratios")
    stages = [list(column) for column in zip(*image["stages"], strict=True)]
    vision = dict(zip(columns, stages, strict=True), image_size=image["size"], hidden_dim=config.model.embed_dim)
    vision |= {name: image[name] for name in ("width_coefficient", "depth_coefficient")}
    vision["in_channels"] = [32, *vision["out_channels"][:-1]]
    text = dict(_hf_transformer(text), vocab_size=text["vocab_size"], max_position_embeddings=text["positions"])
    text |= dict(type_vocab_size=config.model.text.types, pad_token_id=config.model.text.pad_id)
    cfg = dict(architectures=["AlignModel"], model_type="align", projection_dim=config.model.embed_dim)
    return _hf_sections(cfg, vision, text, "align")


def _hf_transformer(tower):
    return dict(
        hidden_size=tower["width"], num_hidden_layers=tower["depth"], num_attention_heads=tower["heads"],
        intermediate_size=tower["mlp_dim"], layer_norm_eps=tower["ln_eps"],
        hidden_act=HF_ACTS.get(tower["act"], tower["act"]),
    )  # fmt: skip


def _hf_sections(cfg, vision, text, kind, **shared):
    sections = {
        "vision_config": vision | {"model_type": f"{kind}_vision_model"},
        "text_config": text | {"model_type": f"{kind}_text_model"},
    }
    return cfg | {"torch_dtype": "float32"} | {name: section | shared for name, section in sections.items()}


def _towers(config, target, images, texts):
    """Returns the fields of both towers; raises UserError for a method or tower that the target cannot express."""
    if "text" not in config.model:
        raise UserError(f"{target} cannot express method={config.method!r}: its texts must be token ids, not images")
    for which, kinds in (("image", images), ("text", texts)):
        if config.model[which].kind not in kinds:
            found = f"model.{which}.kind={config.model[which].kind!r}"
            raise UserError(f"{target} cannot express {found}: its {which} tower must be {' or '.join(sorted(kinds))}")
    if config.model.image.get("stem"):
        stem = tuple(config.model.image.stem)
        raise UserError(f"{target} cannot express model.image.stem={stem}: it embeds patches by one convolution")
    return config.model.image.to_dict(), config.model.text.to_dict()


def _same_model(config, files, theirs, to):
    """Raises UserError, which names the field, unless the written files are read as the same model."""
    if to == "open_clip":
        content = files["open_clip_config.json"]
        again = configs.open_clip.from_config(
            json.loads(json.dumps(content["model_cfg"])), content["preprocess_cfg"], theirs
        )
    else:
        cfg = files["config.json"]
        make = {"clip": configs.hf.clip, "siglip": configs.hf.siglip, "align": configs.hf.align}[cfg["model_type"]]
        again = make(cfg, files["preprocessor_config.json"])
    load.shapes(again)
    ignored = set(TRAINING)
    text, image = config.model.text, config.model.image
    if image.kind == "efficientnet" and not has_first_residual(image.stages, image.get("width_coefficient", 1.0)):
        ignored.add("first_residual")
    if text.get("causal") and text.get("pool") == "eot":
        ignored.add("mask_padding")  # causal attention never reaches the tokens after EOT
    if text.get("pool") in ("last", "first") and not text.get("mask_padding") or text.get("pad_id", -1) >= 0:
        ignored.add("eot_id")
    for key, ours, found in config_lib.differences(config, again, ["model.image", "model.text", "model.embed_dim"]):
        section, name = key.rsplit(".", 1)
        if name in ignored or section == "model.text" and name == "context" and config.method == "align":
            continue
        raise UserError(f"--to={to} cannot express {key}={ours!r}: only {found!r} is possible for this model")


def _sees_padding(text):
    """Whether what follows the end of a text changes its embedding."""
    return text.kind != "bert" and not text.mask_padding and not (text.causal and text.pool == "eot")


def _steps(config):
    """Returns the preprocessing in the terms of open_clip and transformers.

    Returns:
      `{"keep": whether the aspect ratio is kept, "edge": pixels of the resized shorter side or of both sides,
      "filter": the interpolation, "exact": whether these terms describe the preprocessing completely}`.
    """
    found = dict(keep=True, edge=config.model.image.size, filter="bicubic", exact=True)
    for name, args, kwargs in (parse_call(step, "eval.transform") for step in config.eval.transform):
        if name in ("resize", "squash"):
            found |= dict(keep=name == "resize", filter=kwargs.get("interpolation", "bicubic"))
            found["edge"] = (args[0] if args else kwargs.get("size")) or found["edge"]
            found["exact"] &= len(args) < 2 and kwargs.get("antialias", True)
        elif name != "drop_alpha":  # `_alpha_note` tells of transparency
            found["exact"] &= name == "center_crop" and not args and kwargs.keys() <= {"rounding"}
    return found


def _alpha_note(config, to):
    """Returns a line when the target treats transparent pictures in another way; otherwise None."""
    drops = "drop_alpha" in config.eval.transform
    if drops == (to == "open_clip"):
        return None
    ways = ("their colours show", "they are put on white")
    return f"note: transparent pictures: here {ways[not drops]}; in the target {ways[drops]}"


def _preprocessing_note(config, steps, written):
    """Returns a line when the target resizes images differently, by `written`: its edge and filter; otherwise None."""
    if steps["exact"] and written == (steps["edge"], steps["filter"]):
        return None
    sides = "shorter side" if steps["keep"] else "both sides"
    return (
        f"note: the target has no equal of the preprocessing {', '.join(config.eval.transform)}; "
        "the nearest is written: "
        f"{sides} to {written[0]} pixels, {written[1]}, antialiased, center crop"
    )


if __name__ == "__main__":
    print("clip_jax.interop.export is now clip_jax.tools.export", file=sys.stderr)
    runpy.run_module("clip_jax.tools.export", run_name="__main__", alter_sys=True)
