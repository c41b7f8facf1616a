"""What the formats of shards share: heads of records, read with few requests where the shard is remote; versions."""

import contextlib
import os

from clip_jax.data import remote
from clip_jax.errors import UserError

_PIECE = 32 * 2**20  # bytes of a remote shard that are read at once, and held


@contextlib.contextmanager
def heads(path):
    """Gives `(get, size)` of a shard: `get(offset, n)` returns n bytes, fewer at the end of the shard.

    In a local shard only what is asked for is read. A remote one is read in large pieces; offsets have to ascend.
    """
    if remote.is_remote(path):
        size = remote.size(path)
        yield _pieces(path, size), size
        return
    with remote.opened(path) as file:

        def get(offset, n):
            try:
                return os.pread(file.fileno(), n, offset)
            except OSError:
                return b""  # as where a shard is cut off

        yield get, os.fstat(file.fileno()).st_size


def version(path):
    """Returns a key of what is kept of a file: its path, with the size and time of a local one, which may change.

    Raises UserError for a missing local file.
    """
    if remote.is_remote(path):
        return path, None, None
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return path, status.st_size, status.st_mtime_ns


def _pieces(path, size):
    """Returns the function `get` of a remote shard."""
    piece, begin = b"", 0

    def get(offset, n):
        nonlocal piece, begin
        end = min(offset + n, size)
        if not begin <= offset <= end <= begin + len(piece):
            piece, begin = b"", offset  # the old piece is free before the new one comes
            piece = remote.read(path, begin, min(max(begin + _PIECE, end), size))
        return piece[offset - begin : end - begin]

    return get
