"""Imports third-party weights as a checkpoint of this package.

    python -m clip_jax.interop.load --from=ViT-B-32.pt --workdir=runs/openai_b32
    python -m clip_jax.interop.load --from=model.safetensors --workdir=runs/imported --act=gelu

PATH is a weight file or a folder of OpenAI's CLIP, open_clip, PyramidCLIP, Hugging Face transformers (CLIPModel,
SiglipModel, AlignModel) or big_vision. docs/checkpoints.md lists what loads and what to check.

OUT becomes a work folder as training leaves it, for `clip_jax.load`, `clip_jax.evaluate` and `clip_jax.search`.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.interop import layouts, recognize
from clip_jax.interop.towers.load import resize_positions, tower_shapes
from clip_jax.runtime import command, storage

POS = "params/img/pos"
ALPHA = ("white", "drop")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A third-party model in this package's form.

    Attributes:
      config: the configuration. An image tower alone has an empty method and no `model.text`.
      params, extra: as `Method.init` returns them, float32, sharded. An image tower alone has `{"img": ...}`.
      tokenizer: the model's tokenizer, or None when none was found.
      summary: lines on what was loaded and what was assumed.
    """

    config: Any
    params: Any
    extra: Any
    tokenizer: Any
    summary: list[str]


def load(path, act=None, heads=None, size=None, tokenizer=None, alpha=None, mesh=None):
    """Returns the `Imported` model of third-party weights.

    Args:
      path: a weight file or a folder, see the module's docstring.
      act: the activation (`quick_gelu`, `gelu`, `gelu_tanh`); needed for a bare state dict that is not OpenAI's.
      heads: `(image, text)` heads; needed when the widths are not those of published models.
      size: pixels of a side. Position embeddings are resized when it is not the model's own size.
      tokenizer: a string of clip_jax.data.tokenizers; by default the tokenizer in the folder, or CLIP's when its
        vocabulary has the right size.
      alpha: what becomes of transparent pictures: "white" puts them on white, "drop" shows the colours under the
        transparency; by default as in the library of the weights.
      mesh: the mesh over which the parameters are sharded (runtime/sharding.py); by default all devices.

    Raises UserError, in one line and before anything is loaded, when the model cannot be loaded.
    """
    foreign = recognize.recognize(path, act, heads, size)
    if "image" not in foreign.config.model:
        raise UserError(f"{path} holds a text tower alone: use it in init_from")
    config, tensors = foreign.config, foreign.tensors
    _set_alpha(config, alpha)
    tokenizer = find_tokenizer(foreign, tokenizer)
    ours = shapes(config)
    entries = foreign.entries(ours)
    layouts.check(entries, tensors, ours, foreign.ignored, str(foreign.file))
    notes = [*foreign.notes]
    if size and size != config.model.image.size:
        if POS not in ours or config.model.image.kind != "vit":
            raise UserError(
                f"--size={size}: must be {config.model.image.size}; only learned positions of a ViT can be resized"
            )
        notes.append(f"position embeddings resized from {config.model.image.size} to {size} pixels")
        tensors = _resize(config, entries, tensors, ours, size, foreign.resize)
        ours = shapes(config)
    summary = [*_describe(foreign, config, ours, tokenizer), *notes]
    found = layouts.load(entries, tensors, _placed(config, ours, mesh))
    tree = _nested(found)
    return Imported(config.lock(), tree["params"], tree.get("extra", {}), tokenizer, summary)


def _set_alpha(config, alpha):
    """Sets what becomes of transparent pictures in `eval.transform`; None leaves it as it is."""
    if alpha not in (None, *ALPHA):
        raise UserError(f"--alpha={alpha}: allowed are {', '.join(ALPHA)}")
    steps = tuple(config.eval.transform)
    if alpha == "white":
        config.eval.transform = tuple(step for step in steps if step != "drop_alpha")
    elif alpha == "drop" and "drop_alpha" not in steps:
        config.eval.transform = ("drop_alpha", *steps)


def is_image_tower(config):
    """Returns whether a configuration has only one tower, mostly an image tower, and hence no method."""
    return not config.method


def shapes(config):
    """Returns `{path: ShapeDtypeStruct}` of the parameters and running statistics of a configuration.

    Fills in all fields of the configuration's towers, and touches no device.
    """
    import jax

    from clip_jax.methods.interface import init_shapes
    from clip_jax.models import towers
    from clip_jax.runtime.sharding import path_name

    if is_image_tower(config):
        return tower_shapes(config)
    towers.fill(config.model)
    tree = dict(zip(("params", "extra"), init_shapes(config), strict=True))
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _placed(config, ours, mesh):
    import jax

    from clip_jax.methods.interface import make_method
    from clip_jax.runtime import sharding

    mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
    rules = () if is_image_tower(config) else make_method(config).sharding_rules
    tree = sharding.state_shardings(_nested(ours), mesh, rules)
    shardings = {sharding.path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(tree)}
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in ours.items()}


def _nested(flat):
    from flax import traverse_util

    return traverse_util.unflatten_dict(flat, sep="/")


def _resize(config, entries, tensors, ours, size, how):
    """Returns the tensors with position embeddings for images of `size` pixels.

    Sets the size in the configuration, with the pixels of its transform.
    """
    from clip_jax.models.towers import image_tower
    from clip_jax.weight_files import Tensor

    entry, old = next(e for e in entries if POS in e.ours), ours[POS].shape
    image = config.model.image
    config.eval.transform = resized(config.eval.transform, image.size, size)
    image.size = size
    image_tower(config.model)  # raises UserError for a size that the patch does not divide
    first, grid = int(image.cls_token), size // image.patch

    def read():
        ((_, pos),) = entry.load(tensors[entry.theirs].read(), {POS: old})
        return entry.save({POS: resize_positions(pos.astype(np.float32), grid, first, how)})

    shape = entry.shape({POS: (1, first + grid**2, old[2])})
    return tensors | {entry.theirs: Tensor(shape, np.dtype(np.float32), read)}


def resized(transform, old, new):
    """Returns the steps of a transform with their pixels for images of `new` instead of `old` pixels."""

    def scaled(match):
        return f"{match[1]}{round(int(match[2]) * new / old)}"

    return tuple(re.sub(r"^(\w+\()(\d+)", scaled, step) for step in transform)


def find_tokenizer(foreign, spec=None):
    """Returns the tokenizer of a spec or of the model's folder, or None; sets its name in the configuration."""
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.interop.tokenizer import find

    config, text = foreign.config, foreign.config.model.get("text", {})
    if not spec and not is_image_tower(config):
        spec = find(foreign.file.parent, config.method, text.get("vocab_size"), foreign.kind)
    tokenizer = make_tokenizer(spec) if spec else None
    config.tokenizer = spec or ""
    if tokenizer is None or "vocab_size" not in text:
        return tokenizer
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer!r} has {tokenizer.vocab_size} ids, but the text tower of {foreign.file} "
            f"has only {text.vocab_size}"
        )
    if text.eot_id == -1:
        text.eot_id = tokenizer.eot_id
    elif text.eot_id != tokenizer.eot_id:
        raise UserError(
            f"the tokenizer {config.tokenizer!r} ends texts with id {tokenizer.eot_id}, but {foreign.file} "
            f"with id {text.eot_id}"
        )
    return tokenizer


def _describe(foreign, config, ours, tokenizer):
    image, text = config.model.image, config.model.get("text", {})
    count = sum(math.prod(x.shape) for path, x in ours.items() if path.startswith("params/"))
    sizes = " ".join(
        f"{name}={image[name]}" for name in ("size", "patch", "width", "depth", "layers", "heads") if name in image
    )
    lines = [
        f"{foreign.kind} from {foreign.file}: {count:,} parameters; method {config.method or 'none'}",
        f"image tower: {image.kind} {sizes}",
    ]
    if text:
        sizes = " ".join(f"{name}={text[name]}" for name in ("context", "vocab_size", "width", "depth", "heads"))
        lines.append(f"text tower: {text.kind} {sizes}")
    acts = {name: tower["act"] for name, tower in (("image", image), ("text", text)) if "act" in tower}
    lines.append(f"activation: {', '.join(f'{name} {act}' for name, act in acts.items()) or 'fixed'}")
    colours = [
        "unknown" if values is None else f"({', '.join(f'{x:.4g}' for x in values)})"
        for values in (config.model.image_mean, config.model.image_std)
    ]
    drops = "drop_alpha" in config.eval.transform
    alpha = "their colours show (--alpha=white: on white)" if drops else "on white (--alpha=drop: their colours show)"
    lines.append(f"preprocessing: {', '.join(config.eval.transform)}; mean {colours[0]}, std {colours[1]}")
    lines.append(f"transparent pictures: {alpha}")
    lines.append(
        f"tokenizer: {config.tokenizer or 'none'}"
        + (f", {tokenizer.vocab_size:,} ids" if tokenizer and tokenizer.vocab_size else "")
    )
    return lines


def write(imported, workdir):
    """Writes an `Imported` model as checkpoint 0 of a work folder.

    Raises UserError when the folder has a checkpoint, or the model has no text tower or no tokenizer.
    """
    from clip_jax.training import checkpoint

    workdir = storage.path(workdir)
    if is_image_tower(imported.config):
        raise UserError("an image tower alone cannot become a checkpoint: give its file to --config.init_from of a run")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: this folder already has checkpoints")
    if imported.tokenizer is None:
        raise UserError(
            "the model has no tokenizer: give --tokenizer=SPEC, such as clip_bpe or sentencepiece:/path/to.model"
        )
    storage.prepare(workdir)
    with checkpoint.Checkpointer(workdir, imported.config, imported.tokenizer) as checkpointer:
        checkpointer.save(0, {"params": imported.params, "extra": imported.extra}, {})
        checkpointer.wait()


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    from clip_jax.runtime import command

    parser = command.make_parser("clip_jax.interop.load", __doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="PATH", help="weight file or folder")
    parser.add_argument("--workdir", required=True, metavar="OUT", help="work folder to write")
    parser.add_argument("--act", help=f"activation of a bare state dict: {', '.join(recognize.ACTS)}")
    parser.add_argument(
        "--heads",
        type=_pair,
        metavar="IMAGE,TEXT",
        help="attention heads, when the weights and the configuration do not show them",
    )
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="resize the position embeddings for images of this size"
    )
    parser.add_argument(
        "--alpha",
        choices=ALPHA,
        help="transparent pictures: on white, or the colours under the transparency (default: as in their library)",
    )
    parser.add_argument("--tokenizer", metavar="SPEC", help="tokenizer (default: the one in the folder of the weights)")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args))


def _pair(text):
    image, text = map(int, text.split(","))
    return image, text


def _run(args):
    imported = load(args.source, args.act, args.heads, args.size, args.tokenizer, args.alpha)
    write(imported, args.workdir)
    print("\n".join(imported.summary))
    print(
        f"written: {args.workdir}; use it with clip_jax.load({args.workdir!r}) or "
        f"python -m clip_jax.evaluate --checkpoint={args.workdir}"
    )


if __name__ == "__main__":
    command.script(main)
