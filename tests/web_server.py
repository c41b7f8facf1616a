"""A web server on loopback that answers ranges of bytes, fails on demand, and stands in for the Hub of Hugging Face."""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse


class WebServer:
    """Objects by path, the requests that came, and what is to go wrong.

    Attributes:
      url: the address of the server, `http://127.0.0.1:PORT`.
      objects: `{path: bytes}`, paths from the root on without the first slash.
      requests: list of `(method, path, value of the header Range)`.
      failures: list of what the next requests meet: a status, "short" (the connection ends early), "few"
        (an answer of half of the bytes), "reset", "hang", "no_range"; None is none.
      left: the number of requests until all fail with 503; None is no end.
      repository: `ORG/NAME` of the data set that the Hub has; its files are the objects below `hub/`.
    """

    def __init__(self):
        self.objects, self.requests = {}, []
        self.failures, self.left = [], None
        self.repository = "org/pairs"
        self.url, self.done = "", threading.Event()

    def reset(self):
        self.objects.clear()
        self.requests.clear()
        self.failures.clear()
        self.left = None


@contextlib.contextmanager
def web_server():
    """Starts a server on a free port; yields the `WebServer`."""
    web = WebServer()
    handler = type("Handler", (_Handler,), {"web": web})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield web
    finally:
        web.done.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        self.web.requests.append((self.command, path, self.headers.get("Range")))
        failure = self.web.failures.pop(0) if self.web.failures else None
        if self.web.left is not None:
            self.web.left -= 1
            failure = 503 if self.web.left < 0 else failure
        if isinstance(failure, int):
            return self._send(failure, b"")
        if failure == "hang":
            self.web.done.wait(20)
            self.close_connection = True
            return None
        if failure == "reset":
            self.close_connection = True
            return None
        if path.startswith("api/"):
            return self._answer_hub(path)
        path = re.sub(f"^datasets/{self.web.repository}/resolve/main/", "hub/", path)
        if path not in self.web.objects:
            return self._send(404, b"")
        return self._send_object(self.web.objects[path], failure)

    def _send_object(self, data, failure):
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or failure == "no_range":
            return self._send(200, data, failure)
        start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._send(416, b"", None, **{"Content-Range": f"bytes */{len(data)}"})
        found = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        return self._send(206, data[start:end], failure, **found)

    def _send(self, status, body, failure=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if failure == "few":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if failure == "short":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _answer_hub(self, path):
        place = f"api/datasets/{self.web.repository}"
        if path in (place, f"{place}/revision/main"):
            return self._send_json({"id": self.web.repository, "sha": "0" * 40, "tags": [], "siblings": []})
        if not (match := re.fullmatch(f"{place}/tree/main/?(.*)", path)):
            return self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})
        folder, found = match[1] + "/" if match[1] else "", {}
        for name, data in self.web.objects.items():
            name = name.removeprefix("hub/")
            if name.startswith(folder):
                rest = name.removeprefix(folder)
                is_file = "/" not in rest
                name = folder + rest.partition("/")[0]
                found[name] = dict(type="file" if is_file else "directory", path=name, oid="0" * 40)
                found[name]["size"] = len(data) if is_file else 0
        if not found:
            return self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
        return self._send_json(list(found.values()))

    def _send_json(self, value):
        return self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})


def serve_as_hub(web, monkeypatch):
    """Makes a web server the Hub of this process; huggingface_hub reads the address once, when it is imported."""
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", web.url)
    template = web.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
