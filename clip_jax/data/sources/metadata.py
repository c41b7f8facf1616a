"""Folders of pictures with a table beside them: Hugging Face's ImageFolder layout.

pets/train/metadata.csv     file_name,text
pets/train/0001.png         0001.png,a cat on a chair
"""

import os

from clip_jax.data.files import is_hidden
from clip_jax.data.sources.folder import SPLIT_FOLDER, holds_data
from clip_jax.data.sources.table import TableSource
from clip_jax.errors import UserError

NAMES = ("metadata.csv", "metadata.jsonl")
PATH = "file_name"
FOLDER = "folder_name"  # the field of the class folders


def find(folder):
    """Returns the path of the table in a folder, or None; raises UserError when there are two."""
    found = [path for name in NAMES if os.path.isfile(path := os.path.join(folder, name))]
    if len(found) > 1:
        raise UserError(f"{folder}: holds {NAMES[0]} and {NAMES[1]}; remove one of them")
    return found[0] if found else None


def find_for(folder, split=""):
    """Returns `(table, sub-folder)` for a folder and one of its splits, or None.

    The table lies in the split's sub-folder, or in the folder itself; then its rows below the sub-folder are the split.
    """
    below = os.path.join(folder, split)
    if split and os.path.isdir(below) and (table := find(below)):
        return table, ""
    table = find(folder)
    return table and (table, split if split and os.path.isdir(below) else "")


class MetadataSource(TableSource):
    """The pictures that a table `metadata.csv` or `metadata.jsonl` lists, with its columns as fields.

    The column `file_name` holds the paths, relative to the table's folder. Without a column of labels, sub-folders are
    the classes where the table's folder has two or more with pictures: the field `folder_name`.

    Args:
      path: the table.
      within: a sub-folder, whose rows alone are read; "" for all.
      image, text, label: as for `TableSource`; the image is `file_name` by default.

    Raises UserError as `TableSource` does, for a table without `file_name`, and when no row is in the sub-folder.
    """

    def __init__(self, path, within="", *, image=None, text=None, label=None):
        self._within = f"{within}/" if within else ""
        top = os.path.join(os.path.dirname(os.path.abspath(path)), within)
        entries = sorted(os.scandir(top), key=lambda entry: entry.name)
        folders = [e.name for e in entries if e.is_dir() and not is_hidden(e.name)]
        folders = [name for name in folders if not SPLIT_FOLDER.fullmatch(name) and holds_data(os.path.join(top, name))]
        self._has_classes = len(folders) > 1
        super().__init__(path, image=image or PATH, text=text, label=None if label == FOLDER else label)

    def _choose_fields(self, names):
        if PATH not in names and self._fields.image == PATH:
            raise UserError(
                f"{self._path}: no column {PATH!r} with the paths of the pictures; columns: {', '.join(names)}"
            )
        super()._choose_fields(names)
        if self._fields.label is None and self._has_classes:
            self._fields = self._fields._replace(label=FOLDER)

    def _scan(self):
        rows = super()._scan()
        if not self._is_json:
            yield next(rows, (0, 0, []))
        for start, end, row in rows:
            if self._path_in(row).startswith(self._within):
                yield start, end, row

    def _path_in(self, row):
        """Returns the path of a row as the table has it; "" for a damaged row."""
        path = super()._row_dict(row).get(PATH) if self._within else None
        return path.removeprefix("./") if isinstance(path, str) else ""

    def _row_dict(self, row):
        found = super()._row_dict(row)
        if self._fields.label == FOLDER and isinstance(path := found.get(PATH), str):
            parts = path.removeprefix("./").removeprefix(self._within).split("/")
            found[FOLDER] = parts[0] if len(parts) > 1 else None
        return found
