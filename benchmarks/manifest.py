"""Time and memory to open a manifest at the scale of billions, and the time to read headers of tar shards.

    python benchmarks/manifest.py [--shards=200000] [--blocks=20]

The manifest is synthetic: `--shards` shards with `--blocks` blocks of 500 samples each, 2 billion samples by default.
It is opened in a fresh process; its memory is the growth of that process, and the peak is that of the whole process.
The tar shard has 9,000 members, an image, a JSON and a caption of each sample. Times of members are CPU time.

Then a loader starts at the same scale: the shards are links to one real shard. Measured in a fresh process are the time
to the first batch, from the manifest's path on, and the memory, without and with the windows.
"""

import collections
import io
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
import tempfile
import time

import common
import numpy as np

from clip_jax.data.shared import Shared
from clip_jax.data.sources import manifest, tar, tar_members, tar_samples

SAMPLES = 3000
BLOCK = 500  # samples


def write_manifest(path, shards, blocks):
    rng = np.random.default_rng(0)

    def rows():
        for number in range(shards):
            ends = np.cumsum(rng.integers(20_000, 40_000, blocks) * 512).tolist()
            found = list(zip([0, *ends[:-1]], ends, [BLOCK] * blocks, strict=True))
            yield f"gs://bucket/laion2B-en/data/{number:06d}.tar", ends[-1], found, {}

    manifest.write(path, rows(), {"format": "tar", "source": "", "command": "", "broken": {}}, {})


def resident():
    """Returns the MiB of anonymous memory of this process: what it does not share with others."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def open_manifest(path, answers, done):
    """Opens a manifest and puts its figures into the queue `answers`; ends when `done` has an item."""
    import pyarrow.parquet  # noqa: F401 (its import is not part of the time)

    before, start = resident(), time.perf_counter()
    found = manifest.Manifest(path)
    answers.put((time.perf_counter() - start, resident() - before))
    answers.put(pickle.dumps(Shared(found.blocks)))
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    done.get()  # the memory is kept until the copy is made


def measure_manifest(report, shards, blocks):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.manifest.parquet")
        start = time.perf_counter()
        write_manifest(path, shards, blocks)
        report.add(what="writing the manifest", value=time.perf_counter() - start, unit="s")
        report.add(what="its file", value=os.path.getsize(path) / 2**20, unit="MiB")
        context = multiprocessing.get_context("spawn")
        answers, done = context.Queue(), context.Queue()
        process = context.Process(target=open_manifest, args=(path, answers, done))
        process.start()
        seconds, held = answers.get()
        report.add(what="opening it", value=seconds, unit="s")
        report.add(what="memory of the open manifest", value=held, unit="MiB")
        text, before = answers.get(), resident()
        copy = pickle.loads(text)
        report.add(what="memory of a copy in another process", value=resident() - before, unit="MiB")
        assert len(copy.arrays[0]) == shards * blocks
        report.add(what="peak of the process that opened it", value=answers.get(), unit="MiB")
        done.put(None)
        process.join()


def measure_start(report, shards, blocks, batch):
    """Adds the time and the memory up to the first batch, of a data set of `shards` links to one shard."""
    with tempfile.TemporaryDirectory() as folder:
        write_shard(os.path.join(folder, "shard.tar"), blocks * BLOCK)
        rows, _ = tar.scan(os.path.join(folder, "shard.tar"), BLOCK)
        size = os.path.getsize(os.path.join(folder, "shard.tar"))
        names = [os.path.join(folder, f"{number:06d}.tar") for number in range(shards)]
        for name in names:
            os.symlink("shard.tar", name)
        path = os.path.join(folder, "x.manifest.parquet")
        about = {"format": "tar", "source": "", "command": "", "broken": {}}
        manifest.write(path, ((name, size, rows, {}) for name in names), about, {})
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        process = context.Process(target=start_loader, args=(path, batch, answers))
        process.start()
        records, seconds, line, windows, before, after = answers.get()
        report.add(what=f"records: {records:,}; first batch after", value=seconds, unit="s")
        print(line)
        report.add(what="memory at the first batch", value=after, unit="MiB")
        report.add(what="of it the process without data", value=before, unit="MiB")
        report.add(what="of it blocks in memory", value=windows, unit="MiB")
        process.join()


def start_loader(path, batch, answers):
    """Starts a loader of texts and puts its figures into the queue `answers`."""
    from clip_jax.data.loader import Loader
    from clip_jax.data.sources import make_source
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.data.views import TextView

    tokenizer, read = make_tokenizer("sentencepiece"), []
    plain = tar.read

    def counted(path, start, end, **options):
        read.append(end - start)
        return plain(path, start, end, **options)

    tar.read = counted
    before, start = resident(), time.perf_counter()
    source = make_source(path)
    loader = Loader(source, [TextView("text", 32)], tokenizer, batch_size=batch, seed=0, threads=1, prefetch=1)
    next(loader)
    seconds = time.perf_counter() - start
    answers.put((len(source), seconds, loader.blocks, sum(read) / 2**20, before, resident()))
    loader.close()


def write_shard(path, samples):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(samples):
            for ending, data in (("jpg", rng.bytes(2000)), ("txt", b"a cat %d" % number)):
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def measure_tar(report):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.tar")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for i in range(SAMPLES):
                meta = json.dumps({"uid": str(i), "width": 320, "caption": "a cat"}).encode()
                for ending, data in (("jpg", rng.bytes(8000)), ("json", meta), ("txt", b"a cat")):
                    info = tarfile.TarInfo(f"{i:09d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        with open(path, "rb") as file:
            data = file.read()
        members = []
        for what, work in (
            ("headers of a tar in memory, a member", lambda: members.append(parse(data))),
            ("members to samples, a member", lambda: tar_samples.samples_among(members[0], collections.Counter())),
            ("scanning a local shard, a member", lambda: tar.scan(path)),
        ):
            seconds = []
            for _ in range(5):
                start = time.process_time()
                work()
                seconds.append(time.process_time() - start)
            report.add(what=what, value=min(seconds) / (3 * SAMPLES) * 1e6, unit="us")


def parse(data):
    return tar_members.read_members(lambda offset, n: data[offset : offset + n], 0, len(data), tar_samples.is_known)[0]


def main():
    parser = common.make_parser(__doc__, "manifest")
    parser.add_argument("--shards", type=int, default=200_000, help="shards of the manifest")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of a shard")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch of this host")
    args = parser.parse_args()
    report = common.Report({"what": "<48", "value": ">10.2f", "unit": "<4"}, shards=args.shards, blocks=args.blocks)
    report.header()
    measure_tar(report)
    measure_manifest(report, args.shards, args.blocks)
    measure_start(report, args.shards, args.blocks, args.batch)
    report.write(args.json)


if __name__ == "__main__":
    main()
