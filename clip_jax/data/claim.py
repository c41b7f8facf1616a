"""The claim of one process on a file or folder that it writes."""

import contextlib
import fcntl
import os

from clip_jax.errors import UserError

_LOCK = ".clip_jax.lock"


def claim(file, path):
    """Claims a file until it is closed or its process ends. Storage without locks grants every claim.

    Args:
      file: the open file. SMB closes a locked file to every other descriptor, so its owner reads and writes by this
        one. NFS locks a file only for a descriptor that may write.
      path: what is claimed, for messages.

    Raises UserError when another process has claimed it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # PermissionError: SMB
        raise _is_written(path) from None
    except OSError:
        pass


@contextlib.contextmanager
def claimed_folder(folder):
    """A context in which no other process can claim a folder, which exists.

    A file in it is locked, because NFS locks a folder for one host alone.

    Raises UserError when another process has claimed it, and OSError when it cannot be written.
    """
    path = os.path.join(folder, _LOCK)
    with open(path, "ab") as file:
        claim(file, folder)
        # A former owner may have deleted the file after it was opened here; a third process then locks a new one.
        if not (os.path.exists(path) and os.path.samefile(path, file.fileno())):
            raise _is_written(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _is_written(path):
    return UserError(f"{path} is being written by another process: let it end, or name another file")
