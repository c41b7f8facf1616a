"""The records that an index of `clip_jax.tools.filter` keeps."""

import json
import os
from pathlib import Path

import numpy as np

from clip_jax.data.records import fingerprint
from clip_jax.errors import UserError

TEXTS = 64  # of a record: as many bits as the index has for them


class IndexedSource:
    """The records of a source that an index keeps, with the texts that it keeps of each. 16 bytes a record, mapped into memory."""

    def __init__(self, source, folder):
        """Raises UserError when there is no such index, or it is one of another data set."""
        try:
            report = json.loads((Path(folder) / "report.json").read_text())
            self._path = os.path.join(folder, "index.npy")
            self._length = len(np.load(self._path, mmap_mode="r"))
            made_for, length = report["fingerprint"], report["records"]
        except FileNotFoundError:
            raise UserError(f"index={folder}: no index, which clip_jax.tools.filter writes, is there") from None
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"index={folder}: damaged ({type(error).__name__}: {error})") from None
        if made_for != fingerprint(source):
            raise UserError(
                f"index={folder} was made of another data set: {report['source']}, {length:,} records, not {source.name}, {len(source):,}"
            )
        self._source, self._index = source, None
        self.name, self.class_names, self.broken = f"{source.name}?index={folder}", source.class_names, source.broken

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
    """The source of "SPEC?index=FOLDER"; raises UserError as `IndexedSource`."""
    return IndexedSource(source, folder)
