"""Folders of images."""

import array
import os

from clip_jax.data.files import IMAGE_EXTENSIONS, read_file
from clip_jax.data.records import BaseSource, plain
from clip_jax.errors import UserError


class FolderSource(BaseSource):
    """A folder of pictures. Each sub-folder is a class (label, class_name, caption) with its pictures at any depth below.

    Pictures that lie in the folder itself have no label. A caption may lie beside any picture, in a .txt file of the same name.
    """

    def __init__(self, folder):
        super().__init__(os.fspath(folder))
        self._folder, classes, self._paths, self._labels = os.fspath(folder), [], [], array.array("q")
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            paths = (
                [entry.name]
                if entry.is_file()
                else sorted(
                    os.path.relpath(os.path.join(root, file), folder)
                    for root, _, files in os.walk(entry.path)
                    for file in files
                )
            )
            paths = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
            self._paths += paths
            self._labels.extend([-1 if entry.is_file() else len(classes)] * len(paths))
            if paths and not entry.is_file():
                classes.append(entry.name)
        if not self._paths:
            raise UserError(
                f"{folder}: no pictures ({', '.join(IMAGE_EXTENSIONS)}), tar shards, ArrayRecord files or dataset_info.json in it"
            )
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
