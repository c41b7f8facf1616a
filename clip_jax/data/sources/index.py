"""The records that an index of `clip_jax.tools.filter` keeps."""

import json
import os
from pathlib import Path

import numpy as np

from clip_jax.data.records import DerivedSource, fingerprint
from clip_jax.errors import UserError

TEXTS = 64  # captions of a record that an index covers, one bit each; later ones are dropped


class IndexedSource(DerivedSource):
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
            self._path = os.path.join(folder, "index.npy")
            self._length = len(np.load(self._path, mmap_mode="r"))
            made_of, length = report["fingerprint"], report["records"]
        except FileNotFoundError:
            raise UserError(f"index={folder}: no index in this folder; clip_jax.tools.filter writes one") from None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"index={folder}: damaged ({type(error).__name__}: {error})") from None
        if made_of != fingerprint(source):
            raise UserError(
                f"index={folder} was made of another data set: {report['source']}, {length:,} records, not "
                f"{source.name}, {len(source):,}"
            )
        super().__init__(source, f"{source.name}?index={folder}")
        self._index = None

    def __getstate__(self):
        return self.__dict__ | {"_index": None}

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        if self._index is None:
            self._index = np.load(self._path, mmap_mode="r")
        number, bits = self._index[index].tolist()
        record = self._source[number]
        return record | {"texts": [text for i, text in enumerate(record["texts"][:TEXTS]) if bits >> i & 1]}


def join(source, folder):
    """Returns the source of "SOURCE?index=FOLDER"; raises UserError as `IndexedSource` does."""
    return IndexedSource(source, folder)
