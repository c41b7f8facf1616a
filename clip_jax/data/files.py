"""Files: reading them by offset, and the files that a pattern names."""

import glob
import json
import os
import re

from clip_jax.data.records import BadRecord
from clip_jax.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class FileReader:
    """Reads parts of files by offset, from any thread. Keeps some files open; a copy in another process starts with none."""

    def __init__(self, keep=256):
        self._keep, self._open = keep, {}

    def __getstate__(self):
        return {"_keep": self._keep, "_open": {}}

    def read(self, path, offset, size):
        """Raises BadRecord when the file cannot be read or ends before."""
        file = self._open.get(path)
        try:
            if file is None:
                file = open(path, "rb", buffering=0)  # closed when no longer referenced
                if len(self._open) < self._keep:
                    self._open[path] = file
            data = os.pread(file.fileno(), size, offset)
        except OSError:
            raise BadRecord("unreadable file") from None
        if len(data) < size:
            raise BadRecord("truncated file")
        return data


def read_file(path):
    """A whole file; raises BadRecord."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadRecord("missing file") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise BadRecord("unreadable file") from None


def expand(pattern):
    """Files of a path with wildcards, or with ranges such as {00000..00099}, every one of which must exist."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        low, high = match.groups()
        parts = [
            f"{pattern[: match.start()]}{i:0{len(low)}d}{pattern[match.end() :]}"
            for i in range(int(low), int(high) + 1)
        ]
        return [file for part in parts for file in expand(part)]
    files = (
        [pattern] if os.path.isfile(pattern) else sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
    )
    if not files:
        raise UserError(f"{pattern}: no such file")
    return files


def read_json(text):
    """JSON, None for a blank line, and the text itself where it is not JSON."""
    try:
        return json.loads(text) if text.strip() else None
    except ValueError:
        return text
