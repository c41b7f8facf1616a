"""The splits of the data that a source string names, listed without opening the data."""

import glob
import os
import re

from clip_jax.data.files import expand
from clip_jax.data.remote import is_remote
from clip_jax.data.sources import caption_json, scenes, tfds
from clip_jax.data.sources.folder import folder_splits, holds_data
from clip_jax.data.sources.make import missing_data, user_module
from clip_jax.data.sources.spec import parse
from clip_jax.errors import UserError, unknown

# The parts of a pattern that are no literal text.
_WILD = re.compile(r"\{split\}|\{\d+\.\.\d+\}|\*+|\?|\[[^\]]+\]")


def list_splits(spec):
    """Returns the splits that all parts of a source string have, a list; None when a user's module lacks `SPLITS`.

    A prepared TFDS data set names its splits. Where a path holds "{split}", the splits are what it stands for in the
    names of existing files. The splits of a folder are its sub-folders with the usual names of splits (train, val, test
    and the like) that hold data. All other data has the split "train" alone. A module of the user names its splits in
    `SPLITS`.

    Raises UserError when the data does not exist and when the parts of a mixture have no split in common.
    """
    found = {part.base: _splits_of(part.base) for part in parse(spec)}
    known = {base: splits for base, splits in found.items() if splits is not None}
    if not known:
        return None
    first, *others = known.values()
    common = [split for split in first if all(split in other for other in others)]
    if not common:
        parts = "; ".join(f"{base}: {', '.join(splits)}" for base, splits in known.items())
        raise UserError(f"{spec}: its parts have no split in common ({parts})")
    return common


def evaluation_split(spec):
    """Returns the split of a source string that is evaluated when none is named: "test", or the only split.

    Raises UserError, which lists the splits, when there is no "test" among several splits.
    """
    splits = list_splits(spec)
    if splits is None or "test" in splits:
        return "test"
    if len(splits) > 1:
        raise UserError(f"{spec}: has no split 'test'; name one of its splits: {', '.join(splits)}")
    return splits[0]


def check_split(spec, split):
    """Raises UserError when the data of a source string does not exist or lacks a split; opens nothing.

    Args:
      spec: a source string.
      split: name of a split, or slices of splits, such as "train[:90%]+test".
    """
    for part in parse(spec):
        splits = _splits_of(part.base)
        names = [re.match(r"[^\[]*", piece).group() for piece in split.split("+")]
        for name in names if splits is not None else ():
            if name not in [*splits, "all"] and not os.path.isdir(os.path.join(part.base, name)):
                raise unknown(f"{part.base}: no split", name, splits)


def _splits_of(base):
    """Returns the splits of one base, a list, or None."""
    if base == "scenes":
        return list(scenes.SPLITS)
    if (module := user_module(base)) is not None:
        splits = getattr(module, "SPLITS", None)
        return None if splits is None else list(splits)
    if base.startswith("tfds:"):
        return _tfds_splits(tfds.prepared_folder(base.removeprefix("tfds:")))
    path = base.removeprefix("text:")
    if "{split}" in path:
        return _pattern_splits(path)
    if folder := tfds.embedded_folder(path) or tfds.newest_version(path):
        return _tfds_splits(folder)
    if os.path.isdir(path):
        return folder_splits(path)
    if path == base and path.endswith(".json") and os.path.isfile(path):
        return caption_json.list_splits(path)
    if not is_remote(path) and not os.path.exists(path):
        if not _WILD.search(path) and path == base:
            raise missing_data(path)
        expand(path)
    return ["train"]


def _tfds_splits(folder):
    import tensorflow_datasets

    return list(tensorflow_datasets.builder_from_directory(os.fspath(folder)).info.splits)


def _pattern_splits(pattern):
    """Returns what "{split}" stands for in the existing paths that match a pattern."""
    shell = re.sub(r"\{split\}|\{\d+\.\.\d+\}", "*", pattern)
    paths = sorted(glob.glob(shell))
    if any(os.path.isdir(path) for path in paths):
        paths = [path for path in paths if os.path.isdir(path) and holds_data(path)]
    matches = (re.fullmatch(_pattern_regex(pattern), path) for path in paths)
    splits = list(dict.fromkeys(match["split"] for match in matches if match))
    if not splits:
        raise UserError(f"{pattern}: no such file or folder, whatever {{split}} stands for")
    return splits


def _pattern_regex(pattern):
    """Returns the regular expression of a path pattern; its group "split" is what "{split}" stands for."""
    regex, end = "", 0
    for wild in _WILD.finditer(pattern):
        regex += re.escape(pattern[end : wild.start()])
        end = wild.end()
        if wild[0] == "{split}":
            regex += r"(?P=split)" if "?P<split>" in regex else r"(?P<split>[^/]+)"
        else:
            regex += {"{": r"\d+", "*": r"[^/]*", "?": r"[^/]", "[": r"[^/]"}[wild[0][0]]
    return regex + re.escape(pattern[end:])
