"""A folder of parts of objects that were read from a bucket, of limited size, shared by the processes of a host.

CLIP_JAX_SHARD_CACHE names the folder, CLIP_JAX_SHARD_CACHE_GB the limit. An entry is found by its key alone: when an
object is replaced under the same address, the folder has to be emptied.
"""

import contextlib
import functools
import hashlib
import os
import threading

from absl import logging

from clip_jax.data.replacing import replacing
from clip_jax.errors import UserError

FOLDER = "CLIP_JAX_SHARD_CACHE"
LIMIT = "CLIP_JAX_SHARD_CACHE_GB"
_DEFAULT_GB = 100
_DIGEST = 16  # bytes at the end of an entry
_SHARE = 64  # a process looks at the whole folder each time it has written this part of the limit
_KEPT = 0.9  # of the limit, after old entries were removed


def configured():
    """Returns the `DiskCache` of the environment, or None. Raises UserError when its limit is no positive number."""
    folder = os.environ.get(FOLDER)
    return _open(os.path.expanduser(folder), os.environ.get(LIMIT) or str(_DEFAULT_GB)) if folder else None


@functools.cache
def _open(folder, limit):
    try:
        size = int(float(limit) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{LIMIT}={limit} must be a positive number of gigabytes")
    return DiskCache(folder, size)


class DiskCache:
    """Bytes by key. The least recently used entries are removed; several processes may share the folder.

    The folder may exceed the limit by 1/64 for each process beyond the sixth.

    Args:
      folder: path, created when the first entry is written.
      limit: int, bytes.
    """

    def __init__(self, folder, limit):
        self._folder, self._limit = folder, limit
        self._lock, self._written = threading.Lock(), limit  # the first entry also looks at the folder

    def get(self, key, make):
        """Returns the bytes of a key, `make()` where the folder has none or a damaged one.

        Where the folder cannot be written, a warning says so and nothing is kept.
        """
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        path = os.path.join(self._folder, name[:2], name)
        if (data := _read(path)) is None:
            data = make()
            try:
                self._write(path, data)
            except OSError as error:
                logging.log_every_n_seconds(
                    logging.WARNING, "%s=%s cannot be written: %s", 600, FOLDER, self._folder, error.strerror
                )
        return data

    def _write(self, path, data):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as file:
            os.fchmod(file.fileno(), 0o600)  # what credentials gave is for this user alone
            file.write(data)
            file.write(_digest(data))
        with self._lock:
            self._written += len(data) + _DIGEST
            if self._written < self._limit / _SHARE:
                return
            self._written = 0
        self._shrink()

    def _shrink(self):
        """Removes the entries that were used longest ago, when the folder exceeds its limit."""
        found = []
        for folder, _, names in os.walk(self._folder):
            for path in (os.path.join(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # another process has removed it
                    status = os.stat(path)
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._limit - self._limit / _SHARE:
            return
        for _, size, path in sorted(found):
            if total <= _KEPT * self._limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


def _digest(data):
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _read(path):
    """Returns the bytes of an entry and marks it as used; None when it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        with contextlib.suppress(OSError):
            os.utime(path)
    except OSError:
        return None
    data = content[:-_DIGEST]
    return data if content[len(data) :] == _digest(data) else None
