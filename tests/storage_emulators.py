"""Emulators of object stores on loopback, as processes of their own: `with emulator("gs") as bucket: ...`.

    python tests/storage_emulators.py gs|s3 PORT

Both answer requests one after the other and can fail on demand (`Bucket.fail`). The emulator of Google Cloud Storage
gets what tensorstore needs of the real one: generations in headers, and preconditions.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass

NAME = "bucket"
REGION = "eu-west-1"  # not the default of any client


@dataclass(frozen=True)
class Bucket:
    """A bucket of a running emulator.

    Attributes:
      url: its address, `gs://bucket`.
      endpoint: the address of the emulator.
      env: the variables by which clients find it.
    """

    url: str
    endpoint: str
    env: dict

    def fail(self, count, status=503, name=""):
        """Lets the next `count` requests fail whose address contains a name; -1: all."""
        query = urllib.parse.urlencode({"count": count, "status": status, "name": name})
        urllib.request.urlopen(f"{self.endpoint}/fail?{query}", b"").read()


def variables(kind, endpoint):
    """Returns the environment variables of the clients of an emulator."""
    if kind == "gs":
        return dict(
            STORAGE_EMULATOR_HOST=endpoint,
            TENSORSTORE_GCS_HTTP_URL=endpoint,
            CLOUD_STORAGE_EMULATOR_ENDPOINT=endpoint,
            GOOGLE_CLOUD_PROJECT="test",
            GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
        )
    return dict(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_REGION=REGION)


@contextlib.contextmanager
def emulator(kind):
    """Starts the emulator of `gs` or `s3` on a free port, with one bucket; yields the `Bucket`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, __file__, kind, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        endpoint = f"http://127.0.0.1:{port}"
        bucket, since = Bucket(f"{kind}://{NAME}", endpoint, variables(kind, endpoint)), time.monotonic()
        while True:
            try:
                bucket.fail(0)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() - since < 60, (
                    f"the emulator of {kind} does not start"
                )
                time.sleep(0.05)
        yield bucket
    finally:
        process.kill()
        process.wait()


class Failures:
    """The requests that are to fail: `answer` takes the path of a request and returns a status, or None."""

    def __init__(self):
        self.count, self.status = 0, 503
        self.name, self.lock = "", threading.Lock()

    def answer(self, path):
        url = urllib.parse.urlsplit(path)
        if url.path == "/fail":
            query = dict(urllib.parse.parse_qsl(url.query))
            self.count, self.status = int(query["count"]), int(query["status"])
            self.name = query.get("name", "")
            return 200
        if self.count and self.name in urllib.parse.unquote(path):
            self.count -= 1
            return self.status
        return None


def serve_gs(port):
    """Runs the emulator of Google Cloud Storage."""
    from gcp_storage_emulator import server, storage
    from gcp_storage_emulator.handlers import objects

    failures, handle, download = Failures(), server.Router.handle, objects.download

    def stored_generation(handler, url, query):
        match = re.fullmatch(r".*/b/([^/]+)/o(?:/(.+))?", url.path)
        name = match and (urllib.parse.unquote(match[2]) if match[2] else query.get("name"))
        found = handler.storage.objects.get(match[1], {}).get(name) if name else None
        return found["generation"] if found else "0"

    def checked(router, method):
        handler = router._request_handler
        url = urllib.parse.urlsplit(handler.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        status = failures.answer(handler.path)
        if not status and {"ifGenerationMatch", "ifGenerationNotMatch"} & query.keys():
            generation = stored_generation(handler, url, query)
            if query.get("ifGenerationMatch", generation) != generation:
                status = 412
            elif query.get("ifGenerationNotMatch") == generation:
                status = 304
        if not status:
            return handle(router, method)
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def with_generation(request, response, store, *args, **kwargs):
        download(request, response, store, *args, **kwargs)
        if response.status.value < 300:
            obj = store.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = obj["generation"]

    server.Router.handle, objects.download = checked, with_generation
    storage.Storage._write_config_to_file = lambda self: None  # all of it after each request
    storage.Storage._bucket_soft_delete_retention_seconds = lambda self, name: 0
    server.create_server("127.0.0.1", port, True, NAME).run()


def serve_s3(port):
    """Runs the emulator of S3, moto."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app, failures, made = DomainDispatcherApplication(create_backend_app), Failures(), threading.Event()

    def checked(environ, start_response):
        if environ["PATH_INFO"] == "/fail":  # the first request of `emulator`: there must be a bucket after it
            made.wait()
        status = failures.answer(f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}")
        if status:
            start_response(f"{status} .", [("Content-Length", "0")])
            return [b""]
        with failures.lock:
            return list(app(environ, start_response))

    def make_bucket():
        try:
            client = boto3.client("s3", region_name=REGION)
            client.create_bucket(Bucket=NAME, CreateBucketConfiguration={"LocationConstraint": REGION})
        finally:
            made.set()

    os.environ.update(variables("s3", f"http://127.0.0.1:{port}"))
    threading.Thread(target=make_bucket).start()
    run_simple("127.0.0.1", port, checked, threaded=True)


if __name__ == "__main__":
    {"gs": serve_gs, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]))
