"""Folders of image files, with one sub-folder per class."""

import array
import os

from clip_jax.data.files import IMAGE_EXTENSIONS, read_file
from clip_jax.data.records import BaseSource, plain
from clip_jax.errors import UserError


class FolderSource(BaseSource):
    """A folder of images.

    Each sub-folder is a class (`label`, `class_name` and the caption) with its images at any depth. Images in the
    folder itself have no label. A .txt file of the same name as an image replaces its caption.

    Raises UserError for a folder without images.
    """

    def __init__(self, folder):
        super().__init__(os.fspath(folder))
        self._folder, self._paths = os.fspath(folder), []
        self._labels, classes = array.array("q"), []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            paths = [entry.name] if entry.is_file() else _files_below(entry.path, folder)
            paths = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
            self._paths += paths
            self._labels.extend([-1 if entry.is_file() else len(classes)] * len(paths))
            if paths and not entry.is_file():
                classes.append(entry.name)
        if not self._paths:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise UserError(f"{folder}: no images ({kinds}), tar shards, ArrayRecord files or dataset_info.json in it")
        if classes:
            self._set_classes(classes)

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        path = os.path.join(self._folder, self._paths[index])
        record = {"image": read_file(path), "path": path, "texts": []}
        if (label := self._labels[index]) >= 0:
            name = self._class_name(label)
            record |= {"label": label, "class_name": name, "texts": [name]}
        caption = os.path.splitext(path)[0] + ".txt"
        if os.path.exists(caption):
            record["texts"] = [plain(read_file(caption)).strip()]
        return record


def _files_below(folder, start):
    """Returns the files at any depth below a folder, sorted, relative to `start`."""
    files = (os.path.join(root, file) for root, _, files in os.walk(folder) for file in files)
    return sorted(os.path.relpath(file, start) for file in files)
