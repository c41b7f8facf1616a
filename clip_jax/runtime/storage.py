"""Files of a run in a local folder, on a mount, or in a bucket: `gs://bucket/run`, `s3://bucket/run`.

This is the only module that knows the difference. `path` returns a `pathlib.Path` or an `etils.epath.Path`, which have
the same methods. The packages of a bucket are imported when its first path is made. Objects of a bucket cannot be
appended to: `Log` writes a numbered object for each part.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import urllib.parse

from clip_jax.errors import StorageError, UserError
from clip_jax.runtime import faults

#: `{scheme: (package that reads it, extra of this package)}`
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
#: The newest part of a `Log` is written at most this often, and is full at this size.
PART_SECONDS = 10
PART_CHARACTERS = 1 << 20
#: Versions of Orbax whose private functions `prepare_orbax` replaces.
ORBAX = "0.12."
#: Errors of a mount that may pass.
MOUNT_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
#: By these words tensorstore says that a service fails, and by these packages an error of the other clients is known.
_SERVICE = re.compile("retry attempts failed|http_response_code='(401|403|429|5..)'|UNAUTHENTICATED|PERMISSION_DENIED")
_CLIENTS = {"aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3"}


def is_remote(path):
    """Whether a path is the address of an object in a bucket."""
    return "://" in str(path)


def path(text):
    """Returns the path object of a text or path. Raises UserError for an unknown scheme and for a missing package."""
    if not is_remote(text):
        return pathlib.Path(text).expanduser()
    scheme = str(text).partition("://")[0]
    if scheme not in SCHEMES:
        raise UserError(f"{text}: {scheme}:// is unknown; allowed are a folder, gs://BUCKET/NAME and s3://BUCKET/NAME")
    package, extra = SCHEMES[scheme]
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"{text}: {package} is not installed: pip install 'clip-jax-pretraining[{extra}]'") from None
    import fsspec

    logging.getLogger(package).setLevel(logging.CRITICAL)  # it logs stacks of errors that it raises
    os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow, where it is installed, has no s3://
    # Another process may have written since the last listing.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    from etils import epath

    return epath.Path(str(text))


def absolute(text):
    """Returns `path(text)`, absolute."""
    return path(text) if is_remote(text) else path(text).absolute()


def prepare(workdir, what="--workdir"):
    """Creates a work folder and returns its path.

    Args:
      workdir: the folder.
      what: the flag that gave it, for messages.

    Raises UserError when the folder cannot be written, and StorageError when its mount or bucket fails.
    """
    try:
        folder = path(workdir)
    except UserError as error:
        raise UserError(f"{what}={error}") from None
    if not is_remote(workdir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            kind = StorageError if error.errno in MOUNT_ERRORS else UserError
            raise kind(f"{what}={workdir} cannot be written: {error.strerror}") from None
        return folder
    if not urllib.parse.urlsplit(str(workdir)).netloc:
        raise UserError(f"{what}={workdir} names no bucket")
    try:
        if str(workdir).startswith("s3://"):
            _check_region(workdir, what)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{what}={workdir} is an object, not a folder: give another name")
        probe = folder / f".write_test_{os.getpid()}_{time.time_ns()}"
        probe.write_text("")
        probe.unlink()
    except UserError:
        raise
    except Exception as error:
        if reason := _refusal(error):
            raise UserError(f"{what}={workdir} cannot be written: {reason} ({_one_line(error)})") from None
        raise StorageError(f"{what}={workdir} cannot be written: {_one_line(error)}") from error
    return folder


def _check_region(workdir, what):
    """Raises UserError unless a region is configured for s3:// and is that of the bucket."""
    import botocore.session
    import fsspec

    region = os.environ.get("AWS_REGION") or botocore.session.Session().get_config_variable("region")
    if not region:
        raise UserError(f"{what}={workdir}: no region is configured: set AWS_REGION")
    os.environ["AWS_REGION"] = region  # for tensorstore
    bucket = urllib.parse.urlsplit(str(workdir)).netloc
    found = fsspec.filesystem("s3").call_s3("head_bucket", Bucket=bucket).get("BucketRegion")
    if found and found != region:
        raise UserError(f"{what}={workdir}: the bucket is in the region {found}, AWS_REGION is {region}")


def _refusal(error):
    """Returns why a service refuses a correct request, so that it is refused again; None for any other error."""
    name, code = type(error).__name__, getattr(error, "code", None)
    if name in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError") or str(code) == "401":
        return "there are no valid credentials"
    if isinstance(error, FileNotFoundError):
        return "the bucket does not exist"
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # s3fs; gcsfs
        return "permission denied"
    return None


def _one_line(error):
    return faults.one_line(error) or type(error).__name__


def is_failure(error):
    """Whether an error, or a cause of it, says that the service of a bucket fails, and nothing about the object."""
    while error is not None and not isinstance(error, FileNotFoundError):
        is_client = type(error).__module__.partition(".")[0] in _CLIENTS
        if is_client or isinstance(error, StorageError | TimeoutError | PermissionError) or _SERVICE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def guard(place):
    """A context that turns every error about a place in a bucket into a StorageError; local paths are left alone.

    FileNotFoundError and UserError stay.
    """
    try:
        yield
    except (FileNotFoundError, UserError, StorageError):
        raise
    except Exception as error:
        if not is_remote(place):
            raise
        raise StorageError(f"{place}: {_one_line(error)}") from error


def write(place, content):
    """Writes text or bytes to a file, whose folder is created, or to an object; a complete one replaces the old one.

    Raises OSError, or StorageError for a bucket.
    """
    place, content = path(place), content.encode() if isinstance(content, str) else content
    with guard(place):
        if is_remote(place) or (place.exists() and not place.is_file()):  # such as /dev/stdout
            place.write_bytes(content)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def create(place, content):
    """Writes a file or object that does not exist yet; returns False, and writes nothing, when there is one.

    Nothing comes between the look and the write: the file is opened exclusively, and the services get the condition
    that there is no object (`ifGenerationMatch=0` of Google Cloud Storage, `If-None-Match: *` of S3). A service that
    ignores the condition, as some with S3's interface do, would replace an object that was made in that instant.

    Args:
      place: the path.
      content: text.

    Raises OSError, or StorageError for a bucket.
    """
    place = path(place)
    with guard(place):
        try:
            if not is_remote(place):
                with open(place, "x") as file:
                    file.write(content)
                return True
            import fsspec

            system, name = fsspec.core.url_to_fs(str(place))
            if place.exists():
                return False
            system.pipe_file(name, content.encode(), mode="create")
            return True
        except FileExistsError:
            return False


def read(place):
    """Returns the text of a file or object, None when it is missing. Raises OSError, or StorageError for a bucket."""
    try:
        with guard(place):
            return path(place).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def files(folder):
    """Yields the names of all files below a folder, relative to it."""
    for item in sorted(folder.iterdir()):
        if item.is_dir():
            yield from (f"{item.name}/{name}" for name in files(item))
        else:
            yield item.name


def copy(folder, place, last="", instead=()):
    """Copies all files below a folder to a place.

    Args:
      folder: the folder.
      place: the place, another folder.
      last: the name of the file that is copied after all others.
      instead: `{name: content}` of files whose content is replaced.

    Raises OSError, or StorageError for a bucket.
    """
    folder, place = path(folder), path(place)
    for name in sorted(files(folder), key=last.__eq__):
        with guard(folder):
            content = instead[name] if name in instead else (folder / name).read_bytes()
        write(place / name, content)


def remove(folder):
    """Deletes a folder with all that is in it, if it exists. Raises OSError, or StorageError for a bucket."""
    with guard(folder):
        if is_remote(folder):
            path(folder).rmtree(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_folder(place):
    """A context with a local folder whose files are at a place at its end: the place itself, or a temporary folder."""
    if not is_remote(place):
        yield path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)
        copy(folder, place)


class Log:
    """Lines of text at a path: a file that is appended to, or a folder of numbered objects in a bucket.

    The newest object is written again as a whole until it is full. Lines of a bucket, also of a mounted one, are safe
    after `flush`.
    """

    def __init__(self, place):
        self.path, self.file = path(place), None
        if is_remote(place):
            with guard(place):
                self.number = max((_number(part) for part in _parts(self.path)), default=0) + 1
            self.lines, self.is_new = [], False
            self.written = time.monotonic()
        else:
            self.file = open(self.path, "a")
            if _is_torn(self.path):  # by a machine that went down
                self.file.write("\n")

    def write(self, line):
        """Adds a line. Raises StorageError when a bucket does not take it."""
        if self.file:
            print(line, file=self.file, flush=True)
            return
        self.lines.append(line)
        self.is_new = True
        if time.monotonic() - self.written > PART_SECONDS:
            self.flush()

    def flush(self):
        """Makes all lines safe."""
        if self.file:  # gcsfuse uploads a file when it is closed
            self.file.close()
            self.file = open(self.path, "a")
            return
        if not self.is_new:
            return
        text = "".join(f"{line}\n" for line in self.lines)
        write(self.path / f"{self.number:06d}", text)
        self.written, self.is_new = time.monotonic(), False
        if len(text) >= PART_CHARACTERS:
            self.number, self.lines = self.number + 1, []

    def close(self):
        """Makes all lines safe and closes the file."""
        self.flush()
        if self.file:
            self.file.close()


def _is_torn(file):
    """Returns whether the last line of a file is unfinished."""
    with open(file, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
        return stream.read() not in (b"", b"\n")


def _parts(folder):
    try:
        return sorted((part for part in folder.iterdir() if part.name.isdigit()), key=_number)
    except FileNotFoundError:
        return []


def _number(part):
    return int(part.name)


def read_log(place):
    """Returns the text of a `Log`, also of a folder of parts that was copied from a bucket; empty when it is missing.

    Raises StorageError when a bucket cannot be read.
    """
    place = path(place)
    try:
        with guard(place):
            files = _parts(place) if place.is_dir() else [place]
            return "".join(file.read_bytes().decode("utf-8", "replace") for file in files)
    except OSError:
        return ""


def read_rows(place):
    """Returns the rows `{"step": int, ...}` of a `Log` of JSON lines; a line that is being written is left out.

    Raises StorageError when a bucket cannot be read.
    """
    rows = []
    for line in read_log(place).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Mirror:
    """A folder for a library that writes local files: the folder itself, or a copy of its files in a bucket.

    Attributes:
      folder: the local folder.
    """

    def __init__(self, place):
        self.path = path(place)
        self._temporary = tempfile.TemporaryDirectory() if is_remote(place) else None
        self.folder = pathlib.Path(self._temporary.name) if self._temporary else self.path

    def flush(self):
        """Copies all files to the bucket, each as a whole."""
        if self._temporary:
            copy(self.folder, self.path)

    def close(self):
        """Copies all files to the bucket and deletes the local ones."""
        self.flush()
        if self._temporary:
            self._temporary.cleanup()


def prepare_orbax(place):
    """Lets Orbax write to s3://, which its version 0.12 does not know; other paths need nothing.

    Raises UserError when another version of Orbax is installed.
    """
    if not str(place).startswith("s3://"):
        return
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    needed = (
        (gcs_utils, "get_kvstore_for_gcs"),
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
    )
    if not ocp.__version__.startswith(ORBAX) or not all(hasattr(module, name) for module, name in needed):
        raise UserError(
            f"{place}: checkpoints in s3:// need orbax-checkpoint {ORBAX}x; {ocp.__version__} is installed:"
            " install that version, or mount the bucket"
        )
    if gcs_utils.get_kvstore_for_gcs is _kvstore:
        return
    _kvstore.gcs = gcs_utils.get_kvstore_for_gcs
    gcs_utils.get_kvstore_for_gcs = _kvstore
    tensorstore_utils._use_gcs_driver = lambda folder: folder.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda folder: (
        os.path.normpath(folder).replace("gs:/", "gs://").replace("s3:/", "s3://")
    )


def _kvstore(folder):
    """Returns tensorstore's JSON description of a key-value store in a bucket."""
    if not folder.startswith("s3://"):
        return _kvstore.gcs(folder)
    url = urllib.parse.urlsplit(folder)
    spec = {"driver": "s3", "bucket": url.netloc, "path": url.path.lstrip("/")}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION"):
        spec["aws_region"] = region
    return spec
