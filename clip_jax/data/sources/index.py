"""The records that an index keeps; the commands of docs/curation.md write one."""

import json
import os
from pathlib import Path

import numpy as np

from clip_jax.data.records import fingerprint
from clip_jax.data.sources.kept import KeptSource, Places, starts_of
from clip_jax.errors import UserError

TEXTS = 64  # captions of a record that an index covers, one bit each; later ones are dropped


class IndexedSource(KeptSource):
    """The records of a source that an index keeps, each with the captions that it keeps.

    The index takes 16 bytes a record and is mapped into memory.

    Args:
      source: the source that the index was made of.
      folder: the folder with index.npy and report.json.

    Raises UserError when the index is missing, damaged, or made of another data set.
    """

    def __init__(self, source, folder):
        try:
            report = json.loads((Path(folder) / "report.json").read_text())
            index = _Index(os.path.join(folder, "index.npy"), source)
            made_of, length = report["fingerprint"], report["records"]
        except FileNotFoundError:
            raise UserError(
                f"index={folder}: no index in this folder; docs/curation.md has commands that write one"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"index={folder}: damaged ({type(error).__name__}: {error})") from None
        if made_of != fingerprint(source):
            raise UserError(
                f"index={folder} was made of another data set: {report['source']}, {length:,} records, not "
                f"{source.name}, {len(source):,}"
            )
        super().__init__(source, index, f"{source.name}?index={folder}")

    def _make(self, record, index):
        bits = self._kept.bits(index)
        return record | {"texts": [text for i, text in enumerate(record["texts"][:TEXTS]) if bits >> i & 1]}

    def column(self, field):
        return None if field == "texts" else super().column(field)


class _Index(Places):
    """The rows of an index, (place, bits of its captions), mapped into memory once per process."""

    def __init__(self, path, source):
        self._path = path
        self._rows, self._stamp = mapped(path)
        super().__init__(self._rows[:, 0], starts_of(source))

    def __getstate__(self):
        return self.__dict__ | {"_rows": None, "_places": None}

    def __setstate__(self, state):
        rows, _ = mapped(state["_path"], state["_stamp"])
        self.__dict__ |= state | {"_rows": rows, "_places": rows[:, 0]}

    def bits(self, number):
        """Returns which captions of a kept record the index keeps, bit by bit."""
        return int(self._rows[number, 1])


def mapped(path, stamp=None):
    """Returns the array of a file, mapped into memory, and what tells the file from one that replaces it.

    Raises UserError for another file than that of `stamp`.
    """
    status = os.stat(path)
    found = status.st_ino, status.st_size, status.st_mtime_ns
    if stamp not in (None, found):
        raise UserError(f"{path} was made anew since it was opened; start again")
    return np.load(path, mmap_mode="r"), found


def join(source, folder):
    """Returns the source of "SOURCE?index=FOLDER"; raises UserError as `IndexedSource` does."""
    return IndexedSource(source, folder)
