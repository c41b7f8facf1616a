"""Finds third-party weight files, and what is known of a model before its weights are read."""

import json
import pathlib
from dataclasses import dataclass, field
from typing import Any

from clip_jax.errors import UserError
from clip_jax.runtime import storage

# Names of weight files; the first that exists is read, so open_clip's in a folder that also suits transformers.
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Foreign:
    """A third-party model whose weights are not read yet.

    Attributes:
      kind: the name of its format.
      file: the weight file, or the index of several.
      tensors: `{name: Tensor}`.
      config: its configuration in this package, without tokenizer.
      entries: function of this package's paths that returns the layout, see `clip_jax.interop.layouts`.
      ignored: regular expressions of the names that are no parameters.
      notes: lines for the user on the origin of the configuration.
      resize: how its library resizes position embeddings, see `clip_jax.interop.towers.load.resize_positions`.
    """

    kind: str
    file: pathlib.Path
    tensors: dict
    config: Any
    entries: Any
    ignored: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    resize: str = "antialias"


def sources(text, field="init_from"):
    """Returns `{prefix of parameter paths: path}` of a field that names weights.

    Args:
      text: a path, which has the prefix "", or one for each tower, "img=PATH, txt=PATH".
      field: its name, for messages.

    Raises UserError for another name of a tower, or one that is given twice.
    """
    parts = [part.strip().partition("=") for part in text.split(",")]
    if not all(name.isidentifier() and equals and path for name, equals, path in parts):
        return {"": text}
    names = [name for name, _, _ in parts]
    if len(set(names)) < len(names) or not set(names) <= {"img", "txt"}:
        raise UserError(f"{field}={text!r}: give one path, or one for each tower: img=PATH, txt=PATH")
    return {f"{name}/": path for name, _, path in parts}


def is_foreign(path):
    """Returns whether a path holds third-party weights, and not a work folder of this package."""
    if storage.is_remote(path):  # third-party weights are read from local files
        return False
    path = pathlib.Path(path)
    is_run = (path / "checkpoints").is_dir()  # a work folder may hold other arrays, such as outcomes.npz
    return path.is_file() or path.is_dir() and not is_run and bool(_candidates(path))


def _candidates(folder):
    files = [folder / name for name in (*OPEN_CLIP_FILES, *HF_FILES, "checkpoint.npz")]
    npz = sorted(folder.glob("*.npz"))
    return [file for file in files if file.is_file()] + (npz if len(npz) == 1 else [])


def weights(path):
    """Returns the weight file of a file or folder; raises UserError when there is none."""
    path = pathlib.Path(path)
    if path.is_dir():
        found = _candidates(path)
        if not found:
            names = ", ".join((*OPEN_CLIP_FILES, *HF_FILES, "checkpoint.npz"))
            raise UserError(f"{path}: no weights in this folder; allowed are {names} or a single .npz")
        return found[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    return path


def read_json(path):
    """Returns the object of a JSON file, or None without the file; raises UserError for anything else."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None
