"""Reading data at addresses: local paths, gs://, s3://, https://, hf:// (data sets of the Hub) and memory://.

A call of `read` is one request for a range of bytes. Errors that may pass are retried with pauses that double; the
pauses of one read are CLIP_JAX_STORAGE_SECONDS (60) in total. After the last retry StorageError names the address. All
functions may be called from any thread.
"""

import errno
import functools
import glob
import io
import math
import os
import random
import re
import time

from absl import logging

from clip_jax.data import clients, disk_cache
from clip_jax.errors import StorageError, UserError

SECONDS = "CLIP_JAX_STORAGE_SECONDS"
#: Requests for one read.
TRIES = 6
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true if public",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}
#: Errors of a mount that may pass.
_MOUNT_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
#: By these packages an error of a client is known.
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "httpx2"}
_CLIENTS |= {"huggingface_hub", "requests", "s3fs", "urllib3"}
_BUSY = {408, 425, 429}  # of the statuses from 400 to 499, those that may pass
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

_jitter = random.Random()
_down = {}  # {bucket or host: when a read of it has failed for good}


def is_remote(path):
    """Whether a path is an address, such as `gs://bucket/name`."""
    return "://" in str(path)


def read(path, start=0, end=None):
    """Returns the bytes `[start, end)` of a file or object, by one request; up to its end where `end` is None.

    There are fewer bytes where the file or object ends before `end`, and only there. Where `CLIP_JAX_SHARD_CACHE` names
    a folder, parts of objects are kept in it.

    Raises UserError for what is missing, not allowed or of an unknown kind, and StorageError when the last retry fails.
    """
    if end is not None and end <= start:
        return b""
    cache = disk_cache.configured() if is_remote(path) else None
    make = functools.partial(_retry, path, functools.partial(_read, path, start, end))
    return cache.get(f"{path} {start} {end}", make) if cache else make()


def size(path):
    """Returns the size of a file or object in bytes; raises as `read`. An object costs one request."""
    return _retry(path, functools.partial(clients.size if is_remote(path) else os.path.getsize, path))


def opened(path, length=None):
    """Returns a file or object as a binary file that can be read and sought, as pyarrow takes it; raises as `read`.

    Each read of an object is a request. A file is for one thread.

    Args:
      path: str.
      length: int, the size of the object where it is known; None asks for it.
    """
    if is_remote(path):
        return _Object(path, size(path) if length is None else length)
    return _retry(path, functools.partial(open, path, "rb"))


def expand(pattern):
    """Returns the sorted files or addresses that a pattern matches.

    Each local file of a range must exist. An object of a range is not asked for: it is found missing when it is read.
    Wildcards of an address cost one listing.

    Args:
      pattern: a path or address with wildcards or with numeric ranges such as `{00000..00099}`; https:// takes ranges
        alone.

    Raises UserError when nothing matches, and as `read`.
    """
    if match := _RANGE.search(pattern):
        low, high = match.groups()
        before, after = pattern[: match.start()], pattern[match.end() :]
        parts = (f"{before}{i:0{len(low)}d}{after}" for i in range(int(low), int(high) + 1))
        found = list(dict.fromkeys(file for part in parts for file in expand(part)))  # "1*" has the files of "10*"
    elif is_remote(pattern):
        found = _matches(pattern)
    else:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not found:
        raise UserError(f"{pattern}: no such {_kind(pattern)}")
    return found


class _Object(io.RawIOBase):
    """An object as a file."""

    def __init__(self, path, length):
        super().__init__()
        self._path, self._length = path, length
        self._position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self._position

    def seek(self, offset, whence=io.SEEK_SET):
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def read(self, count=-1):
        end = self._length if count is None or count < 0 else min(self._position + count, self._length)
        data = read(self._path, self._position, end)
        self._position += len(data)
        return data

    def readall(self):
        return self.read()

    def readinto(self, buffer):
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Short(Exception):
    """The body of an answer ended too early."""


def _kind(path):
    return "object" if is_remote(path) else "file"


def _matches(pattern):
    """Returns the addresses that a pattern matches; an address without wildcards as it is."""
    is_web = clients.scheme_of(pattern) in ("http", "https")
    if not re.search(r"[*\[]" if is_web else r"[*?\[]", pattern):
        return [pattern]
    if is_web:
        raise UserError(f"{pattern}: https:// has no wildcards; write a range such as {{00000..00099}}")
    return _retry(pattern, functools.partial(clients.matches, pattern))


def _read(path, start, end):
    """Returns the bytes of one request; raises _Short when they are too few though the object has more."""
    if not is_remote(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)
    if end is None and start:
        end = clients.size(path)
        if end <= start:
            return b""
    try:
        data, total = clients.get(path, start, end)
    except Exception as error:
        if clients.status_of(error) != 416:
            raise
        return b""  # the object ends before `start`
    if end is None or len(data) == end - start:
        return data
    if len(data) > end - start:
        raise UserError(f"{path}: the server does not answer requests for a range of bytes")
    total = clients.size(path) if total is None else total
    if start + len(data) < total:
        raise _Short(f"the answer ended after {len(data)} of {min(end, total) - start} bytes")
    return data


def _retry(path, work):
    """Returns `work()`, called again after an error that may pass."""
    seconds, since = _seconds(), time.monotonic()
    store = "/".join(str(path).split("/")[:3])
    for number in range(1, TRIES + 1):
        try:
            result = work()
            _down.pop(store, None)
            return result
        except Exception as error:
            if problem := _refusal(path, error):
                raise problem from None
            if not _may_pass(error):
                raise
            waited = time.monotonic() - since
            if number == TRIES or waited > seconds + 2 * clients.TIMEOUT or _is_down(store, seconds):
                _down[store] = time.monotonic()
                message = f"{path} cannot be read: {_one_line(error)} ({number} tries in {waited:.0f} s)"
                raise StorageError(message) from error
            logging.log_every_n_seconds(
                logging.WARNING, "%s: %s; trying again, up to %d times", 10, path, _one_line(error), TRIES - number
            )
        until = time.monotonic() + seconds * 2**number / (2**TRIES - 2) * _jitter.uniform(0.5, 1.5)
        while not _is_down(store, seconds) and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 1))
    return None


def _is_down(store, seconds):
    """Whether a read of a bucket or host has failed for good in the last `seconds`, and none has succeeded since.

    Reads that wait in other threads then give up too, so that the process can end.
    """
    return time.monotonic() - _down.get(store, -math.inf) < seconds


def _seconds():
    """Returns the sum of the pauses of a read."""
    text = os.environ.get(SECONDS, "60")
    try:
        if (seconds := float(text)) >= 0:
            return seconds
    except ValueError:
        pass
    raise UserError(f"{SECONDS}={text} must be a number of seconds, at least 0")


def _refusal(path, error):
    """Returns the UserError for an error that the same request would meet again, or None."""
    if isinstance(error, UserError):
        return error
    text, status = _one_line(error), clients.status_of(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or status in (404, 410):
        detail = re.search(r" \((repository|revision) not found\).*", text)  # of the Hub
        return UserError(f"{path}: no such {_kind(path)}{detail[0] if detail else ''}")
    has_none = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
    is_refused = isinstance(error, PermissionError) or text.startswith("Forbidden")  # local, s3fs; gcsfs
    if has_none or is_refused or status in (401, 403):
        remedy = _LOGIN.get(str(path).partition("://")[0])
        reason = "there are no valid credentials" if has_none or status == 401 else "permission denied"
        return UserError(f"{path}: {reason} ({text})" + (f": {remedy}" if remedy else ""))
    if isinstance(error, ValueError) or (status is not None and 400 <= status < 500 and status not in _BUSY):
        return UserError(f"{path}: the request is refused ({text})")
    if not is_remote(path) and isinstance(error, OSError) and error.errno not in _MOUNT_ERRORS:
        return UserError(f"{path} cannot be read: {error.strerror}")
    return None


def _may_pass(error):
    """Whether an error, not a refusal, is one of a client, a connection or a mount."""
    is_client = type(error).__module__.partition(".")[0] in _CLIENTS
    return is_client or isinstance(error, OSError | EOFError | _Short)


def _one_line(error):
    """Returns the message of an exception as one line of at most 200 characters, without the address."""
    text = re.split(r",? (?:for )?url[ =]", " ".join(str(error).split()))[0].lstrip(", ")[:200]
    if text.isdigit():
        return f"status {text}"
    return text or ("no answer" if isinstance(error, TimeoutError) else type(error).__name__)
