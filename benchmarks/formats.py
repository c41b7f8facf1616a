"""CPU time to find and to read the records of every format of shards, and the cost of TFRecord's checksums.

    python benchmarks/formats.py [--records=2000] [--bytes=20000] [--files=200]

A shard of `--records` images of `--bytes` random bytes with a caption is written in each format, and stays in the
system's cache of files. Times are the CPU time of the process, the least of three rounds: `scan` finds the blocks,
`block` reads them, `record` reads records one by one, in random order, where the format has local files by record. Then
`--files` ArrayRecord files of 10 records are scanned, and uids are looked up in a subset of `--uids` pairs.
"""

import io
import json
import os
import struct
import tarfile
import tempfile
import time

import common
import numpy as np

from clip_jax.data.sources import make_source
from clip_jax.data.sources.shards import format_of, load_format, scan_shards

COLUMNS = {"format": "<12", "scan": ">9.2f", "block": ">9.2f", "record": ">9.2f", "unit": "<10"}


def records(count, size):
    """Yields pairs of image and caption, bytes; the images have the first bytes of a JPEG."""
    rng = np.random.default_rng(0)
    for i in range(count):
        yield b"\xff\xd8\xff\xe0" + rng.bytes(size - 4), b"a photo of %d" % i


def example(image, caption):
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature["image"].bytes_list.value.append(image)
    message.features.feature["caption"].bytes_list.value.append(caption)
    return message.SerializeToString()


def write_tar(path, rows):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i, row in enumerate(rows):
            for ending, data in zip(("jpg", "txt"), row, strict=True):
                info = tarfile.TarInfo(f"{i:09d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_tfrecord(path, rows):
    from clip_jax.data.sources.tfrecord import masked_crc

    with open(path, "wb") as file:
        for row in rows:
            data = example(*row)
            head = struct.pack("<Q", len(data))
            for part in (head, data):
                file.write(part + struct.pack("<I", masked_crc(part)))


def write_array_record(path, rows):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(path, "group_size:1")
    for row in rows:
        writer.write(example(*row))
    writer.close()


def write_mds(path, rows):
    samples = [struct.pack("<2I", len(caption), len(image)) + caption + image for image, caption in rows]
    columns = {"column_names": ["caption", "image"], "column_encodings": ["str", "jpeg"], "column_sizes": [None] * 2}
    about = json.dumps({"version": 2, "format": "mds", **columns}).encode()
    offsets = np.cumsum([8 + 4 * len(samples) + len(about), *map(len, samples)])
    with open(path, "wb") as file:
        file.write(struct.pack(f"<{len(samples) + 2}I", len(samples), *offsets) + about + b"".join(samples))


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    images, captions = zip(*rows, strict=True)
    table = pa.table({"image": images, "caption": [caption.decode() for caption in captions]})
    parquet.write_table(table, path, row_group_size=512)


WRITERS = {
    "tar": write_tar,
    "parquet": write_parquet,
    "tfrecord": write_tfrecord,
    "mds": write_mds,
    "array_record": write_array_record,
}


def least(work, count):
    """Returns the least CPU time of three calls, in us per record."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds) / count * 1e6


def measure(report, folder, ending, count, size):
    path = os.path.join(folder, f"a.{ending}")
    WRITERS[ending](path, records(count, size))
    form = load_format(format_of(path))
    blocks = form.scan(path)[0]

    def read_blocks():
        for start, end, samples in blocks:
            block = form.read(path, start, end)
            for index in range(samples):
                block[index]

    row = {"scan": least(lambda: form.scan(path), count), "block": least(read_blocks, count)}
    source = make_source(path)
    if not getattr(source, "sequential", False):
        order = np.random.default_rng(0).permutation(count).tolist()
        row["record"] = least(lambda: [source[i] for i in order], count)
    report.add(format=ending, **row, unit="us/record")


def main():
    parser = common.make_parser(__doc__, "formats")
    parser.add_argument("--records", type=int, default=2000, help="records of a shard")
    parser.add_argument("--bytes", type=int, default=20_000, help="bytes of an image")
    parser.add_argument("--files", type=int, default=200, help="ArrayRecord files that are scanned")
    parser.add_argument("--uids", type=int, default=10_000_000, help="pairs of a subset in which uids are looked up")
    args = parser.parse_args()
    report = common.Report(COLUMNS, records=args.records, bytes=args.bytes)
    report.header()
    with tempfile.TemporaryDirectory() as folder:
        for ending in WRITERS:
            measure(report, folder, ending, args.records, args.bytes)
        files = [os.path.join(folder, f"{i}.array_record") for i in range(args.files)]
        for file in files:
            write_array_record(file, records(10, args.bytes))
        start = time.process_time()
        scan_shards("arrayrecord", files)
        report.add(format="array_record", scan=(time.process_time() - start) / args.files * 1e6, unit="us/file")
        measure_uids(report, os.path.join(folder, "subset.npy"), args.uids)
    measure_checksum(report)
    report.write(args.json)


def measure_uids(report, path, count):
    from clip_jax.data.sources.uids import Subset, halves_of

    rng = np.random.default_rng(0)
    pairs = np.empty(count, "u8,u8")
    for half in ("f0", "f1"):
        pairs[half] = rng.integers(0, 2**64, count, np.uint64)
    pairs["f0"].sort()
    np.save(path, pairs)
    known = [f"{high:016x}{low:016x}" for high, low in pairs[rng.integers(0, count, 2**15)].tolist()]
    asked = [*known, *(rng.bytes(16).hex() for _ in known)]
    subset = Subset(path)
    report.add(format="uids", block=least(lambda: subset.contains(*halves_of(asked)), len(asked)), unit="us/uid")


def measure_checksum(report):
    from clip_jax.data.sources.tfrecord import masked_crc

    data = os.urandom(2**20)
    report.add(format="checksum", block=least(lambda: [masked_crc(data) for _ in range(200)], 200), unit="us/MiB")


if __name__ == "__main__":
    main()
