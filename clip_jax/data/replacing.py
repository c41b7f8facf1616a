"""Writing a file that is there either whole or not at all."""

import contextlib
import os


@contextlib.contextmanager
def replacing(path):
    """A context that yields an open binary file; it gets the name `path` at the end, in the place of an older one.

    An exception leaves the older file as it is. Several processes and hosts may write the same file at once.
    """
    partial = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
