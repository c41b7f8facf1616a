"""Fuzzing of the readers: no input may end in a traceback or give a wrong number of records, captions or labels.

    python benchmarks/fuzz.py --minutes=10 --seed=0
    python benchmarks/fuzz.py --round=tar:17        repeats one round

The readers of tables, shards, images and checkpoints' `meta` items take turns. Each round makes a random input of
which the right result is known, reads it, and compares. Then it damages bytes of the input and reads it again: each
record must be read or rejected with a reason, and the whole input read or rejected in one line. A round is a function
of the seed and its number. The exit status is 1 after a failure. A reader of another format is one more function in
`READERS`; `fuzz_shard` does what all shards have in common.
"""

import csv
import functools
import io
import itertools
import json
import math
import os
import pathlib
import random
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings

import common

COLUMNS = {"reader": "<8", "rounds": ">8,", "records": ">10,", "skipped": ">10,", "rejected": ">10,", "failures": ">9,"}
NAMES = ("cat", "dog", "grey whale", "2.5", "Ü")
MISSING = (None, math.nan, "", " ")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")


class Wrong(Exception):
    """A result that differs from the right one."""


class Counts(dict):
    """What the rounds of a reader gave: numbers of records, skipped records and rejected inputs."""

    def __init__(self):
        super().__init__(rounds=0, records=0, skipped=0, rejected=0, failures=0)

    def read(self, make):
        """Reads all records of the source that `make()` returns; returns `[record or None]`, or None when rejected."""
        from clip_jax.data.records import BadRecord
        from clip_jax.errors import UserError

        try:
            source = make()
        except UserError as error:
            if "\n" in str(error).strip():
                raise Wrong(f"an error of several lines: {error}") from None
            self["rejected"] += 1
            return None
        found = []
        for index in range(len(source)):
            try:
                found.append(source[index])
            except (BadRecord, UserError):
                found.append(None)
        self["records"] += len(found)
        self["skipped"] += found.count(None) + sum(source.broken.values())
        return found


def expect(found, right, what):
    """Raises Wrong when a result is not the right one."""
    if found != right:
        raise Wrong(f"{what}: {str(found)[:300]} instead of {str(right)[:300]}")


def damage(rng, data):
    """Returns bytes with some of them changed, removed, repeated or cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 512))
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = data[place : place + size]
        elif kind == 3:
            data[place : place + 1] = rng.choice((b"\0", b'"', b"\n", b"[", b"{", b"\xff", b"-", b"9", b"\r", b"."))
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def image_bytes(rng, form="PNG"):
    """Returns an encoded image and its width and height in pixels."""
    from PIL import Image

    size, mode = (rng.randint(1, 40), rng.randint(1, 40)), rng.choice(("RGB", "L"))
    out = io.BytesIO()
    Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode))).save(out, form)
    return out.getvalue(), size


# Each of the functions below runs one round in an empty folder.


def fuzz_table(rng, folder, counts):
    from clip_jax.data.sources import make_source

    end, is_named = rng.choice(("csv", "tsv", "jsonl")), rng.random() < 0.5
    has_lists = end == "jsonl" and rng.random() < 0.4
    rows, right = [], []
    for _ in range(rng.randint(1, 12)):
        text = "".join(rng.choice("ab ,'ü\"") for _ in range(rng.randint(1, 9))).strip() or "x"
        label = None if rng.random() < 0.2 else rng.choice(NAMES) if is_named else rng.randint(0, 99)
        written = rng.choice(MISSING) if label is None else label
        if label is not None and not is_named:
            written = rng.choice((label, str(label), float(label), f"{label}.0"))
        if has_lists:
            several = [rng.choice(NAMES) if is_named else rng.randint(0, 99) for _ in range(rng.randint(0, 3))]
            label, written = tuple(dict.fromkeys(several)), rng.choice((several, [None, *several, *several]))
        rows.append({"image": "a.png", "caption": text, "label": written})
        right.append([[text], label])
    if end == "jsonl":
        for row, result in zip(rows, right, strict=True):
            text = row["caption"]
            forms = ((text, [text]), ([text, None], [text]), ({"caption": text}, [text]), (None, []), ([math.nan], []))
            row["caption"], result[0] = rng.choice((*forms, ({"en": text}, []), (True, []), ([[text]], [])))
        data = "\n".join(map(json.dumps, rows))
    else:
        cells = [[v if isinstance(v, str) else "" if v is None else str(v) for v in row.values()] for row in rows]
        cells = [["image", "caption", "label"], *cells]
        out = io.StringIO(newline="")
        if end == "csv":
            csv.writer(out).writerows(cells)
        data = out.getvalue() if end == "csv" else "".join("\t".join(row) + "\n" for row in cells)
    (folder / "a.png").write_bytes(b"x")
    path = folder / f"t.{end}"
    path.write_text(data, encoding="utf-8", newline="")
    known = itertools.chain.from_iterable(label if has_lists else [label] for _, label in right)
    classes = sorted(set(known) - {None}) if is_named else None

    def number(label):
        return -1 if label is None else classes.index(label) if is_named else label

    found = counts.read(lambda: make_source(str(path)))
    labels = [tuple(map(number, label)) if has_lists else number(label) for _, label in right]
    expect(
        found and [(r["texts"], r["label"]) for r in found], [*zip([t for t, _ in right], labels, strict=True)], path
    )
    path.write_bytes(damage(rng, path.read_bytes()))
    check_records(counts.read(lambda: make_source(str(path))))


def check_records(records):
    """Raises Wrong for records whose captions are not text or whose labels are not integers or tuples of them."""
    for record in filter(None, records or ()):
        label = record.get("label", -1)
        is_right = all(isinstance(number, int) for number in (label if isinstance(label, tuple) else [label]))
        if not all(isinstance(text, str) for text in record["texts"]) or not is_right:
            raise Wrong(f"captions or label of {str(record)[:300]}")


def make_archive(rng, number):
    """Returns the bytes of a tar archive, and the names of the samples that are whole.

    The image and the caption of a sample are its name. One sample may have two images: it is counted, not read.
    """
    samples, used, out = [], set(), io.BytesIO()
    doubled = rng.randrange(10)
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key in rng.sample([f"{n}{end}" for n in range(12) for end in ("", " v1.2", ".05.01")], rng.randint(1, 8)):
            if key.partition(".")[0] in used:  # a name that continues another one after a dot
                continue
            used.add(key.partition(".")[0])
            name = f"{number} {key}"
            members = [(f"{key}.jpg", name), (f"{key}.txt", name), (f"{key}.json", "{}")]
            if len(used) == doubled:
                members.append((f"{key}.png", name))
            else:
                samples.append(name)
            rng.shuffle(members)
            for path, content in members:
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
    return out.getvalue(), samples


def fuzz_tar(rng, folder, counts):
    from clip_jax.data.sources import make_source, tar

    path = folder / "a.tar"
    archives = [make_archive(rng, number) for number in range(rng.choice((1, 1, 1, 2, 3)))]
    data, samples = b"".join(data for data, _ in archives), [name for _, names in archives for name in names]

    def pairs(records):
        return [(r["image"].decode(), r["texts"]) for r in records or ()]

    def check_blocks():
        for start, end, samples in tar.scan(str(path), rng.choice((1, 3, 512)))[0]:
            expect(len(tar.read(str(path), start, end)), samples, "samples of a block")

    path.write_bytes(data)
    expect(pairs(counts.read(lambda: make_source(str(path)))), [(key, [key]) for key in samples], "samples")
    check_blocks()
    path.with_suffix(".tar.index").unlink(missing_ok=True)
    path.write_bytes(data[: rng.randrange(len(data))])
    for image, texts in pairs(counts.read(lambda: make_source(str(path)))):
        expect(texts, [image], "caption of a shard that was cut off")
    check_blocks()
    path.with_suffix(".tar.index").unlink(missing_ok=True)
    path.write_bytes(damage(rng, data))
    check_records(counts.read(lambda: make_source(str(path))))
    check_blocks()


def make_example(fields):
    """Returns a serialised `tf.train.Example` of features that are lists of bytes."""

    def field(number, content):
        size, encoded = len(content), b""
        while size > 127:
            size, encoded = size >> 7, encoded + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + content

    entries = (
        field(1, name.encode()) + field(2, field(1, b"".join(field(1, value) for value in values)))
        for name, values in fields.items()
    )
    return field(1, b"".join(field(1, entry) for entry in entries))


def make_pairs(rng):
    """Returns random pairs of an image, bytes, and its captions, a list of str."""
    return [
        (rng.randbytes(rng.choice((1, 20, 300))), [f"{n} {i}" for i in range(rng.choice((1, 1, 2)))])
        for n in range(rng.randint(1, 12))
    ]


def fuzz_shard(rng, path, data, pairs, counts):
    """Reads a shard as it is, cut off, and damaged.

    Returns the `(image, texts)` of the records that were read of the shard that was cut off, and of the damaged one.
    """
    from clip_jax.data.sources import make_source
    from clip_jax.data.sources.shards import format_of, load_format

    def read(content):
        path.write_bytes(content)
        found = counts.read(lambda: make_source(str(path), image="image", text="caption")) or []
        check_records(found)
        if found:
            form = load_format(format_of(str(path)))
            rows, _ = form.scan(str(path), rng.choice((1, 3, 512)))
            expect([len(form.read(str(path), *row[:2])) for row in rows], [row[2] for row in rows], "records of blocks")
        return [(record["image"], record["texts"]) for record in found if record]

    expect(read(data), pairs, "records")
    return read(data[: rng.randrange(len(data))]), read(damage(rng, data))


def fuzz_tfrecord(rng, folder, counts):
    """The checksums tell damaged records: what is read is right."""
    from clip_jax.data.sources.tfrecord import masked_crc

    pairs, data, ends = make_pairs(rng), b"", []
    for image, texts in pairs:
        content = make_example({"image": [image], "caption": [text.encode() for text in texts]})
        head = len(content).to_bytes(8, "little")
        crcs = [masked_crc(part).to_bytes(4, "little") for part in (head, content)]
        data += head + crcs[0] + content + crcs[1]
        ends.append(len(data))
    cut, damaged = fuzz_shard(rng, folder / "a.tfrecord", data, pairs, counts)
    expect(cut, pairs[: len(cut)], "records of a shard that was cut off")
    expect([pair for pair in damaged if pair not in pairs], [], "records that were never written")


def fuzz_mds(rng, folder, counts):
    pairs, samples = make_pairs(rng), []
    for image, texts in pairs:
        caption = json.dumps(texts).encode()
        samples.append(struct.pack("<2I", len(caption), len(image)) + caption + image)
    columns = {"column_names": ["caption", "image"], "column_encodings": ["json", "bytes"], "column_sizes": [None] * 2}
    about = json.dumps({"version": 2, "format": "mds", **columns}).encode()
    offsets = itertools.accumulate(map(len, samples), initial=8 + 4 * len(samples) + len(about))
    data = struct.pack(f"<{len(samples) + 2}I", len(samples), *offsets) + about + b"".join(samples)
    cut, _ = fuzz_shard(rng, folder / "a.mds", data, pairs, counts)
    expect(cut, pairs[: len(cut)], "samples of a shard that was cut off")


def fuzz_array_record(rng, folder, counts):
    from array_record.python.array_record_module import ArrayRecordWriter

    pairs, path = make_pairs(rng), folder / "a.array_record"
    writer = ArrayRecordWriter(str(path), f"group_size:{rng.choice((1, 1, 4))}")
    for image, texts in pairs:
        writer.write(make_example({"image": [image], "caption": [text.encode() for text in texts]}))
    writer.close()
    _, damaged = fuzz_shard(rng, path, path.read_bytes(), pairs, counts)
    expect([pair for pair in damaged if pair not in pairs], [], "records that were never written")


def fuzz_image(rng, folder, counts):
    import numpy as np

    from clip_jax.data import decode
    from clip_jax.data.records import BadRecord
    from clip_jax.data.views import ImageView

    data, (width, height) = image_bytes(rng, rng.choice(FORMATS))
    expect(decode.decode_image(data).shape, (height, width, 3), "shape")
    for content in (damage(rng, data), damage(rng, data)):
        counts["records"] += 1
        try:
            image = decode.decode_image(content)
            view = ImageView("image", 16)({"image": content}, None)
        except BadRecord:
            counts["skipped"] += 1
            continue
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or view.shape != (16, 16, 3):
            raise Wrong(f"an image {image.dtype}{image.shape}, a view {view.shape}")


@functools.cache
def right_meta():
    """Returns the text of a `meta` item."""
    from clip_jax import config

    stored = json.loads(config.base().to_json())
    return json.dumps({"config": stored, "tokenizer": {"fingerprint": "x", "files": {}}, "metrics": {}}).encode()


def alter_config(rng, text):
    """Returns a `meta` item whose configuration lacks a field, or has another value in one."""
    meta = json.loads(text)
    parent, keys = meta["config"], []
    while not keys or isinstance(parent.get(keys[-1]), dict) and rng.random() < 0.9:
        parent = parent[keys[-1]] if keys else parent
        keys.append(rng.choice(sorted(parent)))
    if rng.random() < 0.3:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = rng.choice((None, "x", "", -1, 0, 2.5, True, [], [1, "x"], {}, {"x": 1}, "vit", math.nan))
    return json.dumps(meta).encode()


def fuzz_meta(rng, folder, counts):
    from clip_jax import config
    from clip_jax.errors import UserError
    from clip_jax.methods.interface import make_method
    from clip_jax.training import checkpoint

    altered = alter_config(rng, right_meta())
    for content, is_right in ((right_meta(), True), (damage(rng, right_meta()), False), (altered, False)):
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / "metadata").write_bytes(content)
        counts["records"] += 1
        try:
            meta = checkpoint.read_meta(folder)
            if is_right:
                expect(meta, json.loads(content), "meta")
            make_method(config.from_json(json.dumps(meta["config"])))
        except UserError as error:
            if is_right or "\n" in str(error).strip():
                raise Wrong(f"rejected: {error}") from None
            counts["rejected"] += 1


READERS = {
    "table": fuzz_table,
    "tar": fuzz_tar,
    "tfrecord": fuzz_tfrecord,
    "mds": fuzz_mds,
    "array_record": fuzz_array_record,
    "image": fuzz_image,
    "meta": fuzz_meta,
}


def run(reader, number, seed, counts):
    """Runs a round; returns whether it succeeded, and prints why not."""
    rng = random.Random(f"{seed} {reader} {number}")
    counts["rounds"] += 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            READERS[reader](rng, pathlib.Path(folder), counts)
            return True
        except Exception as error:
            counts["failures"] += 1
            reason = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            print(f"FAILED: --seed={seed} --round={reader}:{number}: {reason}", flush=True)
            return False


def silence():
    """Hides the warnings that damaged inputs cause."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    warnings.simplefilter("ignore")


def main(argv=None):
    """Runs the command; returns the exit status."""
    parser = common.make_parser(__doc__, "fuzz")
    parser.add_argument("--minutes", type=float, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--round", metavar="READER:NUMBER", help=f"one round; readers: {', '.join(READERS)}")
    args = parser.parse_args(argv)
    counts = {reader: Counts() for reader in READERS}
    if args.round:
        reader, _, number = args.round.partition(":")
        return int(not run(reader, int(number), args.seed, counts[reader]))
    end, number = time.monotonic() + 60 * args.minutes, 0
    while number == 0 or time.monotonic() < end:
        for reader in READERS:
            run(reader, number, args.seed, counts[reader])
        number += 1
    report = common.Report(COLUMNS, seed=args.seed, minutes=args.minutes)
    report.header()
    for reader, row in counts.items():
        report.add(reader=reader, **row)
    report.write(args.json)
    return int(any(row["failures"] for row in counts.values()))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    silence()
    sys.exit(main())
