"""Gives this interpreter the rule of a bucket that is mounted by gcsfuse: a folder with files cannot be renamed.

A file whose path ends with FLAT_MOUNT_HANGS is never written: opening it waits for ever.
"""

import builtins
import errno
import os
import time

rename, open_file = os.rename, builtins.open


def flat_rename(source, target, **kwargs):
    if os.path.isdir(source) and os.listdir(source):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(source))
    return rename(source, target, **kwargs)


def hanging_open(file, *args, **kwargs):
    name = os.environ.get("FLAT_MOUNT_HANGS")
    if name and not isinstance(file, int) and os.fspath(file).endswith(name):
        time.sleep(3600)
    return open_file(file, *args, **kwargs)


os.rename = os.replace = flat_rename
builtins.open = hanging_open
