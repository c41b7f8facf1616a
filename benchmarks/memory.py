"""Peak memory and time to open a source, per million rows, of shards, tables and columns.

    python benchmarks/memory.py [--rows=1000000] [--kinds=parquet,csv] [--json=FILE]

Each kind is written to a temporary folder and opened in a process of its own, which has opened a source of 1,000 rows
of the kind before. The images are 100 bytes that are never decoded. "pickled" is what each worker process gets. It
needs Linux.
"""

import json
import multiprocessing
import os
import pickle
import tempfile
import time

import common
import formats

from clip_jax.data.sources import MemorySource, columns, make_source

_GROUP = 512  # rows of a row group and of a record batch
_CAPTION = "a photo of a cat number {} on a chair in the garden"


def _arrow_table(first, count):
    import pyarrow as pa

    rows = range(first, first + count)
    images = [{"bytes": i.to_bytes(100), "path": None} for i in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(images, kind), "caption": [_CAPTION.format(i) for i in rows], "width": rows})


def write_parquet(folder, rows):
    """Writes 100,000 rows a file; returns the source string."""
    import pyarrow.parquet as pq

    for number in range(0, rows, 100_000):
        table = _arrow_table(number, min(100_000, rows - number))
        pq.write_table(table, f"{folder}/{number:012d}.parquet", row_group_size=_GROUP)
    return folder


def write_arrow(folder, rows):
    """Writes a stream of 100,000 rows a file; returns the source string."""
    import pyarrow as pa

    for number in range(0, rows, 100_000):
        table = _arrow_table(number, min(100_000, rows - number))
        with pa.OSFile(f"{folder}/{number:012d}.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_GROUP)
    return folder


def write_shards(ending):
    """Returns a function that writes shards of 10,000 rows in a format of `formats.WRITERS`."""

    def write(folder, rows):
        for number in range(0, rows, 10_000):
            pairs = ((_image(i), _CAPTION.format(i).encode()) for i in range(number, min(number + 10_000, rows)))
            formats.WRITERS[ending](f"{folder}/{number:012d}.{ending}", pairs)
        return folder

    return write


def _image(number):
    return b"\xff\xd8\xff" + number.to_bytes(97)


def write_csv(folder, rows):
    with open(f"{folder}/pairs.csv", "w") as file:
        file.write("filepath,caption,label\n")
        file.writelines(f"images/{i:09d}.jpg,{_CAPTION.format(i)},{i % 1000}\n" for i in range(rows))
    return f"{folder}/pairs.csv"


def write_jsonl(folder, rows):
    with open(f"{folder}/pairs.jsonl", "w") as file:
        for i in range(rows):
            row = {"image": f"images/{i:09d}.jpg", "caption": _CAPTION.format(i), "label": i % 1000}
            file.write(json.dumps(row) + "\n")
    return f"{folder}/pairs.jsonl"


def write_columns(ending):
    """Returns a function that writes a column of rewrites; it is joined to records in memory that are all the same."""

    def write(folder, rows):
        source = _Same(rows)
        path = f"{folder}/rewrites{ending}"
        with columns.text_writer(path, source, {}) as out:
            for i in range(rows):
                out.write(source[0], {"rewrites": [_CAPTION.format(i)]})
        return path

    return write


class _Same(MemorySource):
    """`rows` times the same record."""

    def __init__(self, rows):
        super().__init__([{"image": b"\x89PNG", "texts": ["a cat"]}])
        self._count = rows

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return super().__getitem__(0)


KINDS = {
    "parquet": (write_parquet, lambda spec, rows: make_source(spec)),
    "arrow": (write_arrow, lambda spec, rows: make_source(spec)),
    **{
        ending: (write_shards(ending), lambda spec, rows: make_source(spec))
        for ending in ("tar", "tfrecord", "mds", "array_record")
    },
    "csv": (write_csv, lambda spec, rows: make_source(spec)),
    "jsonl": (write_jsonl, lambda spec, rows: make_source(spec)),
    "columns .jsonl": (write_columns(".jsonl"), lambda spec, rows: columns.ColumnsSource(_Same(rows), spec)),
    "columns .parquet": (write_columns(".parquet"), lambda spec, rows: columns.ColumnsSource(_Same(rows), spec)),
}


def _resident(name):
    """Returns `VmRSS`, the resident size of this process, or `VmHWM`, its largest so far, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def measure(kind, small, large, rows):
    """Returns the figures of one kind; `small` and `large` are source strings of 1,000 and of `rows` rows."""
    make = KINDS[kind][1]
    pickle.dumps(make(small, 1000))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    before, start = _resident("VmRSS"), time.perf_counter()
    source = make(large, rows)
    seconds, peak = time.perf_counter() - start, _resident("VmHWM") - before
    millions = rows / 1e6
    pickled = len(pickle.dumps(source)) / 1e6
    return {"MB": peak / 1e6 / millions, "pickled MB": pickled / millions, "s": seconds / millions, "rows": len(source)}


def main():
    parser = common.make_parser(__doc__, "memory")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each source (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds to measure (default: all)")
    args = parser.parse_args()
    shown = {"kind": "<18", "rows": ">12,", "MB": ">10.1f", "pickled MB": ">12.2f", "s": ">8.2f"}
    report = common.Report(shown, unit="per million rows")
    report.header()
    context = multiprocessing.get_context("spawn")
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            specs = []
            for name, count in (("small", 1000), ("large", args.rows)):
                os.makedirs(f"{folder}/{name}")
                specs.append(KINDS[kind][0](f"{folder}/{name}", count))
            with context.Pool(1) as pool:
                report.add(kind=kind, **pool.apply(measure, (kind, *specs, args.rows)))
    report.write(args.json)


if __name__ == "__main__":
    main()
