"""The claim of one process on a file or folder that it writes."""

import contextlib
import fcntl
import os

from clip_jax.errors import UserError


@contextlib.contextmanager
def claimed(path):
    """A context in which no other process of this machine can claim a file or folder, which exists.

    The claim ends with the process, however that ends. Storage without locks grants every claim.

    Raises UserError when another has claimed it.
    """
    # NFS locks a file only for a descriptor that may write.
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process: let it end, or name another file") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
