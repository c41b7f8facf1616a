"""Makes a source of a string.

emoji, openclipart                    an embedded data set
scenes, scenes?objects=2-3&size=96    emoji composed on a canvas, with boxes: `clip_jax.data.sources.scenes`
tfds:NAME[/CONFIG]                    a data set that TFDS prepared, in TFDS_DATA_DIR or ~/tensorflow_datasets
a folder with dataset_info.json       the same, anywhere
*.array_record*                       a file or pattern: ArrayRecord of tf.train.Example
*.tar, {00000..00099}.tar, a folder   WebDataset shards as img2dataset writes them
*.csv, *.tsv, *.jsonl                 a table with image paths
a folder with one sub-folder a class  images
text:FILE                             pairs of consecutive sentences of .txt or .jsonl files (CLIPPO's text/text pairs)
my_package.my_source?KEY=VALUE        a module with `make(split, **options)`, the options as text
SPEC?where=FIELD:VALUE                a selection by a field: `clip_jax.data.sources.selection`
SPEC?index=FOLDER                     the records that `clip_jax.tools.filter` kept
SPEC?columns=PATH                     SPEC with the fields of a file beside it: `clip_jax.data.sources.columns`
SPEC*3 + SPEC*1                       a mixture: examples in this proportion (default 1); size: in proportion to the records
"""

import glob
import importlib
import os
import re

from clip_jax import plugins
from clip_jax.data.files import expand
from clip_jax.data.sources import selection, tfds
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.spec import parse
from clip_jax.errors import UserError, did_you_mean

_STEPS = ("index", "columns", *selection.FORMS)


def make_source(spec, split="train", *, image=None, text=None, label=None):
    """Makes the source of a string; `spec.py` has the grammar.

    Args:
      spec: see the module's docstring.
      split: a split of a TFDS data set, slices such as "train[:90%]" included. For other data it replaces "{split}" in the spec, or is a
        sub-folder of a folder.
      image, label: name of the field, where it has no usual name.
      text: name of the field of the captions, or several names.

    Raises UserError when there is no such data, or nothing in it.
    """
    parts, fields = parse(spec), dict(image=image, text=text, label=label)
    sources = [_make_part(part, split, fields) for part in parts]
    if len(sources) == 1:
        return sources[0]
    weights = [len(s) if p.weight == "size" else float(p.weight or 1) for s, p in zip(sources, parts, strict=True)]
    return MixtureSource(sources, weights)


def configured_source(data, spec=""):
    """The source of the section `config.data`, or `spec` read with that section's split and fields; raises as `make_source`."""
    fields = {name: data[name] or None for name in ("image", "text", "label")}
    return make_source(spec or data["source"], data["split"], **fields)


def _make_part(spec, split, fields):
    own = 1 if spec.steps and spec.steps[0][0][0] not in _STEPS else 0  # the first step may hold options of the base
    options = dict(spec.steps[0]) if own else {}
    source = _make_base(spec.base, options, split, fields, spec.prefix(own))
    for number, step in enumerate(spec.steps[own:], own + 1):
        name, (key, value) = spec.prefix(number), step[0]
        if key not in _STEPS:
            raise _unknown_option(name, key)
        if key in ("index", "columns"):
            if len(step) > 1:
                raise UserError(f"{name}: {key}= stands alone; write the next option with a '?' of its own")
            module = importlib.import_module(f"clip_jax.data.sources.{key}")
            source = module.join(source, value)
        else:
            source = selection.select(source, step, name)
    return source


def _unknown_option(name, key):
    return UserError(f"{name}: unknown option {key!r}{did_you_mean(key, _STEPS)}; options: {', '.join(_STEPS)}")


def _make_base(base, options, split, fields, name):
    """The source of a base; `name` is the base with its own options."""
    if base == "scenes":
        from clip_jax.data.sources.scenes import make_scenes

        if any(fields.values()):
            raise UserError(f"{name}: scenes have no fields to choose from; the captions are `texts`")
        return make_scenes(options, split, name)
    if (module := _user_module(base)) is not None:
        if not hasattr(module, "make"):
            raise UserError(f"{base}: the module has no function make(split, **options)")
        return module.make(split, **options, **{key: value for key, value in fields.items() if value})
    if options:
        raise _unknown_option(name, next(iter(options)))
    if base.startswith("tfds:"):
        return tfds.TfdsSource(tfds.prepared_folder(base.removeprefix("tfds:")), split, name=base, **fields)
    if base.startswith("text:"):
        from clip_jax.data.sources.sentences import SentencePairSource

        return SentencePairSource(expand(base.removeprefix("text:").replace("{split}", split)), base)
    if folder := tfds.embedded_folder(base) or tfds.newest_version(base):
        return tfds.TfdsSource(folder, split, name=base, **fields)
    return _source_at(base, split, fields)


def _user_module(base):
    """The module at an import path; None for a path of a file or folder, or of a file by its ending."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", base) or os.path.exists(base):
        return None
    return None if base.endswith((".tar", ".csv", ".tsv", ".jsonl", ".array_record")) else plugins.find(base)


def _source_at(spec, split, fields):
    """The source at a path or pattern of paths, by its ending; raises UserError."""
    path = spec.replace("{split}", split)
    if os.path.isdir(os.path.join(path, split)):
        path = os.path.join(path, split)
    elif path == spec and split != "train":
        raise UserError(
            f"{spec}: no split {split!r}: this kind of data has the split 'train', unless {{split}} stands in its path"
        )
    if os.path.isdir(path):
        patterns = (os.path.join(glob.escape(path), end) for end in ("*.tar", "*.array_record*"))
        path = next((pattern for pattern in patterns if glob.glob(pattern)), path)
    if re.search(r"\.(tar\.\w+|tgz)$", path):
        raise UserError(f"{path}: a compressed tar cannot be read by offset; decompress it")
    if path.endswith(".tar"):
        from clip_jax.data.sources.webdataset import WebDatasetSource

        return WebDatasetSource(expand(path), spec, **fields)
    if ".array_record" in os.path.basename(path):
        from clip_jax.data.sources.arrayrecord import ArrayRecordSource

        return ArrayRecordSource(expand(path), spec, **fields)
    if path.endswith((".csv", ".tsv", ".jsonl")) and os.path.isfile(path):
        from clip_jax.data.sources.table import ManifestSource

        return ManifestSource(path, **fields)
    if os.path.isdir(path):
        from clip_jax.data.sources.folder import FolderSource

        if any(fields.values()):
            raise UserError(f"{spec}: a folder of images has no fields to choose from")
        return FolderSource(path)
    if os.path.exists(path):
        raise UserError(f"{spec}: unknown kind of data; known are .tar, .array_record, .csv, .tsv, .jsonl and folders")
    known = tfds.embedded_names()
    hint = did_you_mean(spec, known)
    raise UserError(f"{spec}: no such file or folder{hint}; embedded data sets: {', '.join(known)}")
