"""A local server of the search page: a text field, and a place to drop a picture.

It listens on 127.0.0.1 alone, answers no request for another host name, and serves nothing but the page and the
pictures of the data set.
"""

import email.message
import html
import http.server
import io
import re
import threading
import urllib.parse

from clip_jax import search_page
from clip_jax.data import decode
from clip_jax.data.records import BadRecord
from clip_jax.errors import UserError

#: The largest request in bytes.
LIMIT = 64 << 20
_SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp"}
_FORM = """<form class="search" method="post" action="/" enctype="multipart/form-data">
<input type="search" name="text" placeholder="what to look for" aria-label="text" value="{text}" autofocus>
<button>Search</button>
<label class="drop">or drop a picture here, or choose one <input type="file" name="image" accept="image/*"></label>
<label>plus <input name="plus" placeholder="a text to add" value="{plus}"></label>
<label>minus <input name="minus" placeholder="a text to take away" value="{minus}"></label>
</form>
<script>
"use strict";
(() => {{
const form = document.querySelector("form.search"), file = form.elements.image, drop = form.querySelector(".drop");
const send = () => {{
  const chosen = file.files.length > 0;
  form.method = chosen ? "post" : "get";
  file.disabled = !chosen;
  drop.classList.toggle("busy", chosen);
  form.submit();
  setTimeout(() => {{ file.disabled = false; }}, 0);
}};
form.addEventListener("submit", event => {{ event.preventDefault(); send(); }});
file.addEventListener("change", send);
addEventListener("dragover", event => {{ event.preventDefault(); drop.classList.add("over"); }});
addEventListener("dragleave", () => drop.classList.remove("over"));
addEventListener("drop", event => {{
  event.preventDefault();
  drop.classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  file.files = event.dataTransfer.files;
  send();
}});
addEventListener("pageshow", () => {{ file.value = ""; drop.classList.remove("busy"); }});
}})();
</script>"""


def open_server(port):
    """Returns a server that listens on 127.0.0.1 and answers once it has its `app`, an `App`.

    Args:
      port: its port; 0: any free one.

    Raises UserError when the port is taken.
    """
    try:
        return _Server(("127.0.0.1", port), _Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "ports go up to 65535"
        raise UserError(f"--serve={port}: {reason}; give another port, or 0 for any free one") from None


class App:
    """What the server shows.

    Args:
      title, about: as for `search_page.render`.
      ask: `(texts, images, plus, minus)`, as of `clip_jax.search.make_queries` -> `[(Query, hits), ...]`.
      read_image: `(name or "#N", bytes or None) -> (name, PIL image)`, an upload or record N of the data set.
      picture: the number of a record -> its image, as records hold it; raises IndexError and BadRecord.
    """

    def __init__(self, title, about, ask, read_image, picture):
        self.title, self.about = title, about
        self.ask, self.read_image = ask, read_image
        self.picture = picture
        self._lock = threading.Lock()  # one query at a time

    def page(self, fields):
        """Returns `(status, page)` of a query, a dict of strings with "image" bytes; {} for none."""
        of_picture = bool(fields.get("image") or fields.get("record"))
        text, plus, minus = (fields.get(name, "").strip() for name in ("text", "plus", "minus"))
        text = "" if of_picture else text
        form = _FORM.format(text=html.escape(text), plus=html.escape(plus), minus=html.escape(minus))
        try:
            with self._lock:
                images = []
                if fields.get("image"):
                    images = [self.read_image(fields.get("filename") or "the picture", fields["image"])]
                elif fields.get("record"):
                    images = [self.read_image(f"#{fields['record']}", None)]
                texts, *signs = ([value] if value else [] for value in (text, plus, minus))
                results = self.ask(texts, images, *signs) if texts or images else []
                if not results and (plus or minus):
                    raise UserError("plus and minus change a query: give a text or a picture")
                return 200, search_page.render(
                    self.title, self.about, results, link=_picture_of, similar=_similar_to, form=form
                )
        except UserError as error:
            message = f'<p role="alert"><mark>{html.escape(str(error))}</mark></p>'
            return 400, search_page.render(self.title, self.about, [], form=form + message)

    def picture_bytes(self, number):
        """Returns `(content type, bytes)` of a record's picture; raises IndexError and BadRecord."""
        data = self.picture(number)
        image = decode.open_image(data)
        if isinstance(data, bytes) and image.format in _SHOWN:
            return _SHOWN[image.format], data
        buffer = io.BytesIO()
        decode.flatten(image).save(buffer, "PNG")
        return "image/png", buffer.getvalue()


def _picture_of(hit):
    return f"/picture/{hit['record']}" if "record" in hit else None


def _similar_to(hit):
    return f"/?record={hit['record']}"


def form_fields(content_type, body):
    """Returns the fields of a multipart form: strings by name, "image" as bytes and its name as "filename".

    Args:
      content_type: the header Content-Type.
      body: bytes.

    Raises UserError when it is no such form.
    """
    message = email.message.Message()
    message["Content-Type"] = content_type or ""
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise UserError("the request is no multipart form")
    fields = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        names = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode("utf-8", "replace")))
        if names.get("name") == "image":
            fields |= {"image": content, "filename": names.get("filename", "")}
        elif "name" in names:
            fields[names["name"]] = content.decode("utf-8", "replace")
    return fields


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    app = None


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds that a client may be silent

    def do_GET(self):
        if not self._is_local():
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            self._page({name: values[0] for name, values in urllib.parse.parse_qs(query).items() if name != "image"})
        elif match := re.fullmatch(r"/picture/(\d{1,18})", path):
            try:
                self._send(200, *self.server.app.picture_bytes(int(match[1])))
            except (IndexError, BadRecord):
                self._send(404, "text/plain", b"no such picture")
        else:
            self._send(404, "text/plain", b"no such page")

    def do_POST(self):
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LIMIT:
            self._send(413, "text/plain", f"a picture may have {LIMIT >> 20} MiB at most".encode())
            return
        try:
            self._page(form_fields(self.headers.get("Content-Type"), self.rfile.read(int(length))))
        except UserError as error:
            self._send(400, "text/plain", str(error).encode())

    def _is_local(self):
        """Answers a request for another host, which a page of another site may have made, with 403."""
        name = self.headers.get("Host", "").rpartition(":")[0]
        if name in ("127.0.0.1", "localhost"):
            return True
        self._send(403, "text/plain", b"this server answers for 127.0.0.1 and localhost")
        return False

    def _page(self, fields):
        status, page = self.server.app.page(fields)
        self._send(status, "text/html; charset=utf-8", page.encode("utf-8", "replace"))

    def _send(self, status, content_type, content):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Prints nothing about each request."""
