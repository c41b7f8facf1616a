"""Makes a source from a string. The grammar of source strings is in `spec.py`; these are the bases and steps.

A base is one of

    emoji, openclipart                     an embedded data set
    scenes, scenes?objects=2-3&size=96     emoji composed on a canvas, with boxes: `clip_jax.data.sources.scenes`
    tfds:NAME[/CONFIG]                     a data set prepared by TFDS, in TFDS_DATA_DIR or ~/tensorflow_datasets
    a folder with dataset_info.json        a data set prepared by TFDS, anywhere
    *.array_record*, *.tfrecord*           ArrayRecord and TFRecord files of tf.train.Example
    *.mds, a folder                        shards of mosaicml-streaming
    *.manifest.parquet                     the shards of a manifest: `clip_jax.data.sources.manifest`; "?shards=FOLDER"
                                           says where they are now
    *.tar, {00000..00099}.tar, a folder    WebDataset shards in img2dataset's layout; "?captions=lines" reads each line
                                           of a .txt member as a caption
    *.parquet, *.arrow                     tables with the images in them, as Hugging Face and img2dataset write them
    a folder with state.json               a data set that Hugging Face's `save_to_disk` wrote; with dataset_dict.json
                                           it has splits
    *.csv, *.tsv, *.jsonl                  a table with image paths
    a folder with one sub-folder a class   image files; "?captions=lines" as for tars
    a folder with metadata.csv or .jsonl   image files and a table with their `file_name`, as Hugging Face's ImageFolder
    *.json                                 Karpathy's COCO and Flickr, COCO's captions; "?images=FOLDER" says where the
                                           images are: `clip_jax.data.sources.caption_json`
    text:FILE                              pairs of consecutive sentences of .txt or .jsonl files (CLIPPO)
    my_package.my_source?KEY=VALUE         a module with `make(split, **options)`; the options are str

A path or pattern may hold wildcards, numeric ranges and "{split}". A step changes the source before it:

    SOURCE?where=FIELD:VALUE               a selection by a field: `clip_jax.data.sources.selection`
    SOURCE?index=FOLDER                    the records that an index keeps: `clip_jax.data.sources.index`
    SOURCE?uids=FILE.npy                   the records of a subset that DataComp publishes
    SOURCE?holdout=0.1                     a tenth of the records by a hash of their images, "!0.1" the others:
                                           `clip_jax.data.sources.holdout`
    SOURCE?exchange=0.3                    three of ten records have the captions of each other:
                                           `clip_jax.data.sources.exchange`
    SOURCE?columns=PATH                    additional fields from a file or folder: `clip_jax.data.sources.columns`

A mixture `SOURCE*3 + SOURCE*1` draws examples in this proportion. The default weight is 1; "size" stands for the
number of records.
"""

import importlib
import inspect
import os
import re

from clip_jax import plugins
from clip_jax.data.files import expand
from clip_jax.data.sources import arrow, caption_json, selection, tfds
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.shards import FORMATS, format_of, scanned_source, shards_in
from clip_jax.data.sources.spec import parse, with_step
from clip_jax.errors import TextLabelError, UserError, did_you_mean, unknown

# Steps that are made by the module of this name; each takes one option.
_JOINS = ("index", "columns", "uids", "holdout", "exchange")
_TABLES = (".csv", ".tsv", ".jsonl")
_STEPS = (*_JOINS, *selection.FORMS)


def make_source(spec, split="train", *, image=None, text=None, label=None):
    """Returns the source that a string names.

    Args:
      spec: str, such as "emoji", "/data/{00000..00331}.tar" or "emoji*3 + /data/pairs.csv*1"; the docstring of this
        module lists the kinds.
      split: str, a split of a TFDS data set, slices such as "train[:90%]" included. For other data it replaces
        "{split}" in the spec, or names a sub-folder of a folder.
      image: name of the image field; None finds it by its usual names.
      text: name of the caption field, or a list of several; None finds it by its usual names.
      label: name of the label field; None finds it by its usual names.

    Returns:
      A `clip_jax.data.records.Source`: `len(source)` records, `source[index]` is a dict.

    Raises UserError when there is no such data, it has no records, or an option is unknown.
    """
    parts, fields = parse(spec), dict(image=image, text=text, label=label)
    sources = [_make_part(part, split, fields) for part in parts]
    if len(sources) == 1:
        return sources[0]
    weights = [len(s) if p.weight == "size" else float(p.weight or 1) for s, p in zip(sources, parts, strict=True)]
    return MixtureSource(sources, weights)


def configured_source(data, spec=""):
    """Returns the source of the configuration's section `data`, without the records that `data.holdout` keeps out.

    Args:
      data: the section, with the keys `source`, `split`, `image`, `text`, `label` and, optionally, `holdout`.
      spec: str, read instead of `data.source` with that section's split and fields.

    Raises UserError as `make_source` does.
    """
    fields, spec = {name: data[name] or None for name in ("image", "text", "label")}, spec or data["source"]
    if share := data.get("holdout", 0.0):
        spec = with_step(spec, "holdout", f"!{share:g}")
    return make_source(spec, data["split"], **fields)


def _make_part(part, split, fields):
    """Returns the source of one `Spec`."""
    own = int(bool(part.steps) and part.steps[0][0][0] not in _STEPS)  # the first step may hold options of the base
    options = dict(part.steps[0]) if own else {}
    try:
        source = _make_base(part.base, dict(options), split, fields, part.prefix(own))
    except TextLabelError as text:  # the names of classes; a selection numbers them
        source = _make_base(part.base, dict(options), split, fields | {"label": None}, part.prefix(own))
        source = selection.select(source, (("label", text.field),), part.prefix(own))
    for number, step in enumerate(part.steps[own:], own + 1):
        source = _apply_step(source, step, part.prefix(number))
    return source


def _apply_step(source, step, name):
    """Returns the source after a step; `name` is the source string up to this step."""
    key, value = step[0]
    if key not in _STEPS:
        raise unknown(f"{name}: unknown option", key, _STEPS)
    if key not in _JOINS:
        return selection.select(source, step, name)
    if len(step) > 1:
        raise UserError(f"{name}: {key}= takes no second option; write the next one as a step, after a '?'")
    return importlib.import_module(f"clip_jax.data.sources.{key}").join(source, value)


def _make_base(base, options, split, fields, name):
    """Returns the source of a base; `name` is the base with its own options."""
    if base == "scenes":
        from clip_jax.data.sources.scenes import make_scenes

        if any(fields.values()):
            raise UserError(f"{name}: scenes have no fields to choose from; the captions are `texts`")
        return make_scenes(options, split, name)
    if (module := user_module(base)) is not None:
        return _make_user_source(module, split, options | {k: v for k, v in fields.items() if v}, name)
    if (lines := options.pop("captions", None)) not in (None, "lines"):
        raise UserError(f"{name}: captions={lines}: allowed is captions=lines, each line of a .txt file a caption")
    folder, images = options.pop("shards", ""), options.pop("images", "")
    if options:
        key = next(iter(options))
        if key in _STEPS:
            raise UserError(f"{name}: {key}= is a step of its own; write it after another '?'")
        raise unknown(f"{name}: unknown option", key, (*_STEPS, "captions", "shards", "images"))
    if base.endswith(".json") and os.path.isfile(base):
        if lines or folder:
            raise UserError(f"{name}: the only option of a JSON file of captions is images=FOLDER")
        caption_json.check_fields(name, fields)
        return caption_json.CaptionJsonSource(base, split, images)
    if images:
        raise UserError(
            f"{name}: images={images} is an option of JSON files of captions alone, such as dataset_coco.json"
        )
    if lines or folder:
        return _source_at(base, split, fields, bool(lines), folder)
    if base.startswith("tfds:"):
        return tfds.TfdsSource(tfds.prepared_folder(base.removeprefix("tfds:")), split, name=base, **fields)
    if base.startswith("text:"):
        from clip_jax.data.sources.sentences import SentencePairSource

        return SentencePairSource(expand(base.removeprefix("text:").replace("{split}", split)), base)
    if folder := tfds.embedded_folder(base) or tfds.newest_version(base):
        return tfds.TfdsSource(folder, split, name=base, **fields)
    return _source_at(base, split, fields)


def user_module(base):
    """Returns the module at an import path, or None when the base is a path or has the ending of a file."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", base) or os.path.exists(base):
        return None
    return None if base.endswith((*_TABLES, ".json", *FORMATS)) else plugins.find(base)


def _make_user_source(module, split, options, name):
    if not hasattr(module, "make"):
        raise UserError(f"{name}: the module has no function make(split, **options)")
    try:
        inspect.signature(module.make).bind(split, **options)
    except TypeError as error:
        raise UserError(f"{name}: {module.__name__}.make{inspect.signature(module.make)}: {error}") from None
    return module.make(split, **options)


def _source_at(spec, split, fields, lines=False, folder=""):
    """Returns the source at a path or pattern, by its ending; raises UserError.

    `lines` is whether each line of a .txt member is a caption, `folder` where the shards of a manifest are now.
    """
    from clip_jax.data.sources.folder import FolderSource, folder_splits
    from clip_jax.data.sources.metadata import MetadataSource, find_for

    path = spec.replace("{split}", split)
    has_split, spec = path != spec, path  # messages name the files of this split
    if saved := arrow.saved_folder(path, "train" if has_split else split):
        return scanned_source(saved, spec, **fields)
    if not has_split and os.path.isdir(path):
        # The default "train" is no choice of the user between a split and a class of this name.
        if split == "train" and split not in (splits := folder_splits(path)):
            raise unknown(f"{path}: no split", split, splits)
        table = find_for(path, split)
        if os.path.isdir(os.path.join(path, split)):
            path = os.path.join(path, split)
    else:
        table = find_for(path)
    if table and (has_split or path != spec or split == "train"):
        if lines or folder:
            raise UserError(f"{spec}: a folder with {os.path.basename(table[0])} has no captions= and no shards=")
        return MetadataSource(*table, **fields)
    if not has_split and path == spec and split != "train":
        raise UserError(f"{spec}: no split {split!r}; a path without {{split}} has the split 'train' alone")
    path = shards_in(path) or path
    if re.search(r"\.((tar|mds)\.\w+|tgz|tfrec\S*\.(gz|zlib))$", path):
        raise UserError(f"{path}: a compressed shard cannot be read by offset; decompress it")
    if path.endswith(".parquet") and (about := _about_manifest(path)):
        from clip_jax.data.sources.manifest import manifest_source

        fields = fields | {"lines": True} if lines else fields
        if lines and about["format"] != "tar":
            raise UserError(f"{spec}: captions=lines is an option of tar shards alone")
        return manifest_source(path, spec, folder, **fields)
    if folder:
        raise UserError(f"{spec}: shards={folder} is an option of manifests alone")
    if path.endswith(".tar"):
        from clip_jax.data.sources.webdataset import WebDatasetSource

        if "://" in path:
            return scanned_source(path, spec, **fields, lines=lines)
        return WebDatasetSource(expand(path), spec, **fields, lines=lines)
    if lines and not os.path.isdir(path):
        raise UserError(f"{spec}: captions=lines is an option of tar shards and folders of images alone")
    if format_of(path):
        return scanned_source(path, spec, **fields)
    if "://" in path and path.endswith(_TABLES):
        raise UserError(
            f"{spec}: a table is read from a local disk alone; clip_jax.tools.to_parquet makes Parquet of it"
        )
    if "://" in path:
        raise UserError(f"{spec}: an address names shards: {', '.join(FORMATS)}; write a pattern such as {spec}/*.tar")
    if path.endswith(_TABLES) and os.path.isfile(path):
        from clip_jax.data.sources.table import TableSource

        return TableSource(path, **fields)
    if os.path.isdir(path):
        if any(fields.values()):
            raise UserError(f"{spec}: a folder of images has no fields to choose from")
        return FolderSource(path, lines)
    if os.path.exists(path):
        known = ", ".join((*FORMATS, *_TABLES))
        raise UserError(f"{spec}: unknown kind of data; known are {known} and folders")
    raise missing_data(spec)


def _about_manifest(path):
    """Returns the metadata of a manifest, or None for what is no manifest, such as a pattern."""
    from clip_jax.data.sources.manifest import read_about

    is_one = not re.search(r"[*?\[{]", path) and ("://" in path or os.path.isfile(path))
    return read_about(path) if is_one else None


def missing_data(spec):
    """Returns the UserError for a source string that names neither a path nor an embedded data set."""
    known = tfds.embedded_names()
    hint = did_you_mean(spec, known)
    return UserError(f"{spec}: no such file or folder{hint}; embedded data sets: {', '.join(known)}")
