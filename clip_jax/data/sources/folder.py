"""Folders of image files, with one sub-folder per class."""

import array
import os
import re

from absl import logging
from PIL import Image

from clip_jax.data.files import IMAGE_EXTENSIONS, OTHER_EXTENSIONS, PLUGIN_EXTENSIONS, is_hidden, read_file
from clip_jax.data.records import BaseSource, listed, plain
from clip_jax.data.sources.shards import format_of
from clip_jax.data.sources.tar_samples import lines_of
from clip_jax.errors import UserError

SPLIT_FOLDER = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(\d{4})?", re.IGNORECASE)
_DATA_ENDINGS = (*IMAGE_EXTENSIONS, *PLUGIN_EXTENSIONS, ".tar", ".csv", ".tsv", ".jsonl", ".parquet", ".arrow")


class FolderSource(BaseSource):
    """A folder of images.

    Each sub-folder is a class (`label`, `class_name` and the caption) with its images at any depth. Images in the
    folder itself have no label. A .txt file of the same name as an image replaces its caption. Links to folders are
    followed. Hidden files and folders and the resource forks of macOS are left out. `broken` counts the images of other
    formats, and those that Pillow reads only with a plugin when the plugin is missing.

    If every sub-folder is a shard of `img2dataset --output_format files`, the images have no label. A shard has a name
    of at least five digits and holds .txt or .json files next to its images, or images whose names start with its
    number.

    Args:
      folder: the folder.
      lines: bool, whether each line of a .txt file is a caption.

    Raises UserError for an unreadable folder and for one without images.
    """

    def __init__(self, folder, lines=False):
        super().__init__(os.fspath(folder))
        self._folder, self._lines = os.fspath(folder), lines
        self._paths = []
        self._labels, classes = array.array("q"), {}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                continue
            is_class = entry.is_dir()
            files = files_below(entry.path, (os.path.realpath(folder),)) if is_class else [entry.path]
            files = sorted(os.path.relpath(path, folder) for path in files)
            paths = [path for path in files if self._is_image(path)]
            self._paths += paths
            self._labels.extend([len(classes) if is_class else -1] * len(paths))
            if paths and is_class:
                classes[entry.name] = _is_shard(entry.name, files, paths)
        if not self._paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            left_out = "".join(f"; {count} times {reason}" for reason, count in self.broken.items())
            raise UserError(
                f"{folder}: no images ({kinds}), tar shards, ArrayRecord files or dataset_info.json in it{left_out}"
            )
        if classes and all(classes.values()):
            logging.warning("%s: its %d sub-folders are shards of img2dataset, not classes", folder, len(classes))
            self._labels = array.array("q", [-1]) * len(self._labels)
        elif classes:
            self._set_classes(classes)

    def check_labels(self):
        """Raises UserError when the only class holds its images in several folders, which may be the classes."""
        below = {path.split(os.sep)[1] for path in self._paths if path.count(os.sep) > 1}
        if self.class_names and len(self.class_names) == 1 and len(below) > 1:
            (only,), folders = self.class_names, listed(sorted(below))
            raise UserError(
                f"{self.name}: the only class is {only!r}, which holds the folders {folders}; if these are classes or"
                f" splits, give the source {os.path.join(self._folder, only)}"
            )

    def __len__(self):
        return len(self._paths)

    def key_of(self, index):
        """Returns the path of an image, relative to the folder."""
        return self._paths[index]

    def __getitem__(self, index):
        path = os.path.join(self._folder, self._paths[index])
        record = {"image": read_file(path), "path": path, "texts": []}
        if (label := self._labels[index]) >= 0:
            name = self._class_name(label)
            record |= {"label": label, "class_name": name, "texts": [name]}
        caption = os.path.splitext(path)[0] + ".txt"
        if os.path.exists(caption):
            text = plain(read_file(caption))
            record["texts"] = lines_of(text) if self._lines else [text.strip()]
        return record

    def _is_image(self, path):
        """Returns whether a file is an image that is read; counts one that is not."""
        ending = os.path.splitext(path)[1].lower()
        if ending in PLUGIN_EXTENSIONS and ending not in Image.registered_extensions():
            self.broken[PLUGIN_EXTENSIONS[ending]] += 1
            return False
        if ending in IMAGE_EXTENSIONS or ending in PLUGIN_EXTENSIONS:
            return True
        if ending in OTHER_EXTENSIONS:
            self.broken[f"image that ends in {ending}"] += 1
        return False


def _is_shard(name, files, images):
    """Returns whether a sub-folder is a shard of img2dataset: 00012/000120034.jpg with .txt and .json."""
    if not re.fullmatch(r"[0-9]{5,}", name):
        return False
    files, stems = set(files), [os.path.splitext(path)[0] for path in images]
    if any(stem + ending in files for stem in stems for ending in (".json", ".txt")):
        return True
    return all(re.fullmatch(f"{name}[0-9]+", os.path.basename(stem)) for stem in stems)


def files_below(folder, above=()):
    """Yields the paths of the files at any depth below a folder, without hidden ones.

    Links to folders are followed, except to one of the folders `above`, which would never end. Raises UserError for a
    folder that it cannot read.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir():
            yield from files_below(entry.path, (*above, real))
        else:
            yield entry.path


def folder_splits(folder):
    """Returns the splits of a folder: its sub-folders with usual names of splits that hold data, else "train" alone.

    Raises UserError when one sub-folder has the name of a split and others have not, so that it may be a class.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = [e.name for e in entries if e.is_dir() and not is_hidden(e.name) and holds_data(e.path)]
    splits = [name for name in names if SPLIT_FOLDER.fullmatch(name)]
    if len(splits) == 1 and len(names) > 1:
        others = ", ".join(name for name in names if name not in splits)
        raise UserError(
            f"{folder}: is the sub-folder {splits[0]!r} a split or a class like {others}? For the split give the "
            f"source {os.path.join(folder, splits[0])}; for classes rename the sub-folder"
        )
    return splits or ["train"]


def holds_data(folder):
    """Returns whether any file below a folder has the ending of data."""
    names = (os.path.basename(path).lower() for path in files_below(folder))
    return any(name.endswith(_DATA_ENDINGS) or format_of(name) for name in names)
