"""One request to an object at gs://, s3://, http(s)://, hf:// or memory://, without retries and without caches.

The errors are those of the clients: `clip_jax.data.remote` reads them, retries, and is what other modules call. A
process, also a forked one, has its own connections; its threads share them.
"""

import functools
import logging
import os
import re
import threading

from clip_jax.errors import UserError

#: `{scheme: (package that reads it, extra of this package)}`
SCHEMES = {
    "gs": ("gcsfs", "gcs"),
    "s3": ("s3fs", "s3"),
    "hf": ("huggingface_hub", ""),
    "https": ("aiohttp", "http"),
    "http": ("aiohttp", "http"),
    "memory": ("fsspec", ""),
}
#: Seconds after which a connection without an answer, or without progress, is given up.
TIMEOUT = 30
_CONNECTIONS = 100  # of a process

_lock, _systems = threading.Lock(), {}


def _forget():
    """Gives up the connections of the parent process."""
    global _lock
    _lock = threading.Lock()
    _systems.clear()


os.register_at_fork(after_in_child=_forget)


def scheme_of(path):
    """Returns the scheme of an address.

    Raises UserError when it is unknown, names no object, or its package is missing.
    """
    scheme, _, rest = str(path).partition("://")
    if scheme not in SCHEMES:
        known = "gs://, s3://, hf:// and https://"
        raise UserError(f"{path}: {scheme}:// is unknown; allowed are a local path, {known}")
    if not rest if scheme == "memory" else not rest.partition("/")[2]:
        raise UserError(f"{path} names no object")
    package, extra = SCHEMES[scheme]
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"{path}: {package} is not installed: pip install 'clip-jax-pretraining[{extra}]'") from None
    return scheme


def get(path, start, end):
    """Returns the bytes `[start, end)` of an object and its size.

    Args:
      path: str, an address.
      start: int.
      end: int, or None for the whole object from 0 on.

    Returns:
      `(bytes, size)`; the size is None where the answer does not tell it. There are no bytes where the object ends
      before `start`.
    """
    scheme = scheme_of(path)
    if scheme in _RANGED:
        return _RANGED[scheme](path, start, end)
    system = _system(scheme)
    if end is not None:
        return system.cat_file(path, start=start, end=end), None
    # s3fs would ask for the size first, to read in pieces.
    return system.cat_file(path, **({"max_concurrency": 1} if scheme == "s3" else {})), None


def size(path):
    """Returns the size of an object in bytes, by one request."""
    scheme = scheme_of(path)
    if scheme not in _RANGED:
        return int(_system(scheme).info(path)["size"])
    total = _RANGED[scheme](path, 0, 1)[1]
    if total is None:
        raise UserError(f"{path}: the server does not tell the size")
    return total


def matches(pattern):
    """Returns the sorted addresses of the objects that a pattern with wildcards matches, by one listing."""
    scheme = scheme_of(pattern)
    found = _system(scheme).glob(pattern, detail=True)
    return sorted(f"{scheme}://{name.lstrip('/')}" for name, info in found.items() if info["type"] == "file")


def status_of(error):
    """Returns the HTTP status that an error of a client tells; None where there is none."""
    answer = getattr(error, "response", None)
    if isinstance(error, OSError) and error.__cause__ is not None:  # s3fs raises OSError from botocore's error
        answer = getattr(error.__cause__, "response", answer)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = ((answer, "status_code"), (error, "status"), (error, "code"))  # requests, httpx; aiohttp; gcsfs
    status = next((getattr(of, name) for of, name in found if hasattr(of, name)), None)
    return int(status) if str(status).isdigit() else None


def _system(scheme):
    """Returns the fsspec file system of a scheme in this process."""
    with _lock:
        if scheme not in _systems:
            _systems[scheme] = _MAKERS[scheme]()
        return _systems[scheme]


def _timeout():
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)


def _make_gs():
    # Not the class that gcsfs gives by default, which asks for the kind of the bucket first.
    from gcsfs.core import GCSFileSystem

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs stacks of errors that it raises
    system = GCSFileSystem(
        requests_timeout=_timeout(),
        session_kwargs={"trust_env": True},
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    # Without its decorator, which tries six times.
    once = getattr(GCSFileSystem._request, "__wrapped__", None)
    if once:
        system._request = functools.partial(once, system)
    return system


def _make_s3():
    from s3fs import S3FileSystem

    logging.getLogger("s3fs").setLevel(logging.CRITICAL)
    config = dict(
        connect_timeout=TIMEOUT,
        read_timeout=TIMEOUT,
        retries={"total_max_attempts": 1},
        max_pool_connections=_CONNECTIONS,
    )
    system = S3FileSystem(config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
    system.retries = 1
    return system


def _make_web():
    from fsspec.implementations.http import HTTPFileSystem

    return HTTPFileSystem(client_kwargs={"timeout": _timeout(), "trust_env": True}, skip_instance_cache=True)


def _make_hub():
    from huggingface_hub import HfFileSystem

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each error that it raises
    return HfFileSystem(skip_instance_cache=True)


def _make_memory():
    import fsspec

    return fsspec.filesystem("memory")


_MAKERS = {"gs": _make_gs, "s3": _make_s3, "web": _make_web, "hf": _make_hub, "memory": _make_memory}


def _range(start, end):
    return {} if end is None else {"Range": f"bytes={start}-{end - 1}"}


def _total(path, end, status, headers):
    """Returns the size of an object by the headers of an answer; None where they do not tell it.

    Raises UserError when the server has ignored the range.
    """
    if end is not None and status == 200:
        raise UserError(f"{path}: the server does not answer requests for a range of bytes")
    match = re.fullmatch(r"bytes .*/(\d+)", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _get_web(path, start, end):
    from fsspec.asyn import sync

    system = _system("web")

    async def fetch():
        session = await system.set_session()
        headers = {"Accept-Encoding": "identity"} | _range(start, end)
        async with session.get(system.encode_url(path), headers=headers) as answer:
            total = _total(path, end, answer.status, answer.headers)
            if answer.status == 416 and total is not None:  # the object ends before `start`
                return b"", total
            answer.raise_for_status()
            return await answer.read(), total

    return sync(system.loop, fetch)


def _get_hub(path, start, end):
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    system = _system("hf")
    place = system.resolve_path(path)
    if not hasattr(place, "repo_id"):
        raise UserError(f"{path}: what can be read is hf://datasets/ORG/NAME/FILE")
    where = dict(repo_type=place.repo_type, revision=place.revision, endpoint=system.endpoint)
    url = hf_hub_url(place.repo_id, place.path_in_repo, **where)
    headers = build_hf_headers() | _range(start, end)
    answer = http_backoff("GET", url, headers=headers, timeout=TIMEOUT, max_retries=0)
    total = _total(path, end, answer.status_code, answer.headers)
    if answer.status_code == 416 and total is not None:
        return b"", total
    hf_raise_for_status(answer)
    return answer.content, total


_RANGED = {"http": _get_web, "https": _get_web, "hf": _get_hub}
