"""Records a second from tar shards behind a store that takes 30 ms to answer, beside the same shards on disk.

    python benchmarks/remote.py [--delay=0.03] [--records=20000] [--batch=1024] [--json=FILE]

A server process on loopback answers requests for ranges of bytes after a delay. The order is that by blocks, from a
manifest. Each side runs first without decoding, with texts alone, and then with pictures, in turns; the best of
`--rounds` counts. The last line counts the requests of one epoch.
"""

import http.server
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request

import common
import numpy as np
from loader import encoded, synthetic_photograph

from clip_jax.data.loader import Loader
from clip_jax.data.reading import Reading
from clip_jax.data.sources import make_source
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import ImageView, TextView
from clip_jax.tools import manifest

SHARD = 2048  # records
PICTURES = 64  # different ones
SIZE = 224
READY = 4  # batches that a loader has ready ahead


def parse(argv):
    parser = common.make_parser(__doc__, "remote")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds of a request (default: %(default)s)")
    parser.add_argument("--records", type=int, default=20_480, help="records in shards (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="batches without decoding (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns (default: %(default)s)")
    parser.add_argument("--serve", metavar="FOLDER", help="serves a folder; for the benchmark's own use")
    return parser.parse_args(argv)


class Store(http.server.BaseHTTPRequestHandler):
    """Answers requests for ranges of bytes of the files of a folder; `/requests` counts those for data."""

    protocol_version, delay, folder = "HTTP/1.1", 0.0, "."
    count = 0

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.path == "/requests":
            return self.answer(200, str(Store.count).encode())
        path = os.path.join(self.folder, os.path.basename(self.path))
        size = os.path.getsize(path)
        first, last = 0, size - 1
        if given := self.headers.get("Range"):
            first, last = (int(text) if text else size - 1 for text in given.removeprefix("bytes=").split("-"))
            last = min(last, size - 1)
        if self.command == "GET":
            Store.count += 1
        time.sleep(self.delay)
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first) if self.command == "GET" else b""
        headers = {"Content-Range": f"bytes {first}-{last}/{size}"} if given else {}
        self.answer(206 if given else 200, data, headers, last + 1 - first)

    def answer(self, status, data, headers=(), length=None):
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": length or len(data), "Accept-Ranges": "bytes"}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve(folder, delay):
    """Serves a folder until it is ended; prints the port."""
    Store.folder, Store.delay = folder, delay
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    print(server.server_port, flush=True)
    server.serve_forever()


def write_shards(folder, records):
    """Writes tar shards of pictures whose short side is 224, with captions; returns the bytes of a record."""
    rng = np.random.default_rng(0)
    pictures = [encoded(synthetic_photograph(SIZE + int(rng.integers(120)), SIZE, rng)) for _ in range(PICTURES)]
    for first in range(0, records, SHARD):
        with tarfile.open(f"{folder}/{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, records)):
                for ending, data in (("jpg", pictures[number % PICTURES]), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return sum(map(len, pictures)) / PICTURES


def rate(source, views, tokenizer, batch, steps):
    """Returns records a second of `steps` batches, after those that were ready ahead."""
    loader = Loader(source, views, tokenizer, batch_size=batch, seed=0, threads=2, reading=Reading("blocks"))
    for _ in range(READY):
        next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    seconds = time.perf_counter() - start
    loader.close()
    return steps * batch / seconds


def count_requests(source, tokenizer, address):
    """Returns the requests of one epoch, the second one, and the number of lanes."""
    loader = Loader(source, [TextView("text", 64)], tokenizer, batch_size=256, seed=0, reading=Reading(lanes=2))
    counts = []
    for _ in range(2):
        for _ in range(len(source) // 256):
            next(loader)
        time.sleep(1)  # what was asked for ahead arrives
        counts.append(requests(address))
    loader.close()
    return counts[1] - counts[0], 2


def main(argv=None):
    args = parse(argv)
    if args.serve:
        return serve(args.serve, args.delay)
    columns = {"shards": "<9", "decoding": "<9", "records/s": ">10,.0f", "of local": ">9.0%"}
    report = common.Report(columns, delay=args.delay, batch=args.batch, records=args.records)
    tokenizer = make_tokenizer("sentencepiece")
    views = {"off": [TextView("text", 64)], "on": [ImageView("image", SIZE, ("rrc(0.9, 1.0)",)), TextView("text", 64)]}
    with tempfile.TemporaryDirectory() as folder:
        size = write_shards(folder, args.records)
        print(f"{args.records:,} records of {size / 1024:.0f} KiB, {args.delay * 1000:.0f} ms a request")
        command = [sys.executable, __file__, f"--serve={folder}", f"--delay={args.delay}"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = f"http://127.0.0.1:{int(server.stdout.readline())}"
            shards = f"{{00000..{(args.records - 1) // SHARD:05d}}}.tar"
            sources = {}
            for name, place in (("local", folder), ("remote", address)):
                out = f"{folder}/{name}.manifest.parquet"
                manifest.main([f"{place}/{shards}", f"--out={out}"])
                sources[name] = make_source(out)
            report.header()
            for decoding, steps in (("off", args.steps), ("on", max(READY, args.steps // 2))):
                rates = {name: [] for name in sources}
                for _ in range(args.rounds):
                    for name, source in sources.items():
                        rates[name].append(rate(source, views[decoding], tokenizer, args.batch, steps))
                best = {name: max(found) for name, found in rates.items()}
                for name in sources:
                    figures = {"records/s": best[name], "of local": best[name] / best["local"]}
                    report.add(shards=name, decoding=decoding, **figures)
            count, lanes = count_requests(sources["remote"], tokenizer, address)
            blocks = len(sources["remote"].blocks)
            print(f"one epoch of {lanes} lanes: {count} requests for {blocks} blocks")
            report.about["requests"] = {"requests": count, "blocks": blocks}
        finally:
            server.kill()
    report.write(args.json)
    return 0


def requests(address):
    """Returns the number of requests for data that the server has answered."""
    with urllib.request.urlopen(f"{address}/requests") as answer:
        return int(answer.read())


if __name__ == "__main__":
    sys.exit(main())
