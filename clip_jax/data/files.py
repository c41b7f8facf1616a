"""Reading files: parts by offset, whole files, JSON lines, and the files that a pattern matches."""

import json
import os
import zipfile
import zlib

from clip_jax.data import remote
from clip_jax.data.records import BadRecord

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
# Images that Pillow reads with a plugin, by the reason under which they are counted without it.
PLUGIN_EXTENSIONS = {".heic": "HEIC image", ".heif": "HEIC image", ".jxl": "JPEG XL image"}
# Images that a folder does not read, but counts.
OTHER_EXTENSIONS = (
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".j2k",
    ".tga",
    ".ico",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
)
#: What NumPy raises for a damaged .npz archive. A RuntimeError is a wrong flag or version.
NPZ_ERRORS = (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


class FileReader:
    """Reads parts of files by offset, from any thread.

    Keeps up to `keep` files open. A pickled copy starts with none.
    """

    def __init__(self, keep=256):
        self._keep, self._open = keep, {}

    def __getstate__(self):
        return {"_keep": self._keep, "_open": {}}

    def read(self, path, offset, size):
        """Returns `size` bytes from `offset` on; raises BadRecord when the file is unreadable or shorter."""
        file = self._open.get(path)
        try:
            if file is None:
                file = open(path, "rb", buffering=0)  # closed when it is no longer referenced
                if len(self._open) < self._keep:
                    self._open[path] = file
            data = os.pread(file.fileno(), size, offset)
        except OSError:
            raise BadRecord("unreadable file") from None
        if len(data) < size:
            raise BadRecord("truncated file")
        return data


def read_file(path):
    """Returns the bytes of a whole file; raises BadRecord when it is missing or unreadable."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadRecord("missing file") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise BadRecord("unreadable file") from None


def is_hidden(path):
    """Returns whether some part of a relative path is hidden or a resource fork of macOS, such as `._1.png`."""
    if not path.startswith(".") and "/." not in path and "__MACOSX" not in path:  # a fast answer for most
        return False
    return any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in path.split("/"))


def expand(pattern):
    """Returns the sorted files or addresses that a pattern matches, as `clip_jax.data.remote.expand`."""
    return remote.expand(pattern)


def read_json(text):
    """Returns the value of a line of JSON, None for a blank line, or the text itself when it is not JSON."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):  # RecursionError: brackets nested too deep
        return text


def cache_folder():
    """Returns the folder of files that can be made again: CLIP_JAX_CACHE, or ~/.cache/clip_jax."""
    return os.environ.get("CLIP_JAX_CACHE", os.path.join(os.path.expanduser("~"), ".cache", "clip_jax"))
