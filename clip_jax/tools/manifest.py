"""Writes the manifest of a data set: where its blocks are, so that training opens it at once.

    python -m clip_jax.data.manifest '/data/laion/{00000..41407}.tar' --out=/data/laion/laion.manifest.parquet
    python -m clip_jax.data.manifest 'gs://bucket/pairs/*.tar' --out=pairs.manifest.parquet --processes=64

Training then reads `--config.data=/data/laion/laion.manifest.parquet`.

SOURCE is a path or pattern of shards, such as tar, Parquet, TFRecord or ArrayRecord, local or remote, or a folder of
them. Each shard is gone through once: at its headers or footer where it is local, from front to end where it is a
remote tar or TFRecord. `--columns=width,license` also reads these fields of every sample, so that a selection such as
`?where=license:cc0` needs no pass over the data.

The work is kept shard by shard in OUT.parts, so that the same command continues after an interruption. On several hosts
that see the same OUT, run `--part=1/4` to `--part=4/4`, one on each, and then the same command with `--join`.
"""

import base64
import collections
import concurrent.futures.process
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import signal
import time
import zlib

from clip_jax.data.blocks import RUN
from clip_jax.data.records import BadRecord, plain
from clip_jax.data.replacing import replacing
from clip_jax.data.sources import manifest
from clip_jax.data.sources.shards import find_shards, load_format, scan_shard
from clip_jax.data.threads import end_with_parent
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.passes import run_command, share_of

_SECONDS = 10.0  # between lines of progress
_FEW = 5  # shards that could not be read, which are named at the end
_UNREADABLE = "unreadable shard"
_JOB = "job.json"


def scan(kind, path, length, columns):
    """Returns what a manifest holds of a shard, a dict.

    Args:
      kind: the name of the format.
      path: of the shard.
      length: int, samples of a block where the format leaves the choice.
      columns: list of the fields whose values are read.

    Returns: the keys
      size: int, bytes.
      rows: list of the (start, end, samples) of the blocks.
      broken: `{reason: count}`.
      columns: `{field: values of all samples}`; None for a missing value.
      error: str, why the shard cannot be read; else empty.
    """
    try:
        size, rows, broken = scan_shard(kind, path, length)
        values = {field: [] for field in columns}
        for start, end, samples in rows if columns else ():
            found = _values(load_format(kind), path, start, end, columns)
            for field in columns:
                values[field] += map(_simple, found.get(field, [None] * samples))
    except EOFError:
        return _unreadable(f"{path} changed while it was read")
    except UserError as error:
        return _unreadable(str(error))
    return {"size": size, "rows": rows, "broken": dict(broken), "columns": values, "error": ""}


def _unreadable(error):
    return {"size": 0, "rows": [], "broken": {_UNREADABLE: 1}, "columns": {}, "error": error}


def _values(form, path, start, end, fields):
    """Returns `{field: values of all records}` of a block; a field may be absent."""
    if hasattr(form, "values"):
        return form.values(path, start, end, fields)
    records, block = [], form.read(path, start, end)
    for index in range(len(block)):
        try:
            records.append(block[index])
        except BadRecord:
            records.append({})
    return {field: [record.get(field) for record in records] for field in fields}


def _simple(value):
    """Returns a value as JSON holds it; None for NaN, and text for what JSON does not know."""
    value = plain(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_simple(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _simple(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | float | int) else str(value)


class Parts:
    """The work on a manifest, in the folder OUT.parts: a file for each part, with a line for each shard that is done.

    A line is the shard's number, its `Summary` as JSON and its result. A line that was cut off is done again.

    Args:
      out: path of the manifest.
      job: dict that tells this manifest from another one of the same name: format, source, shards, columns.

    Raises UserError when the folder holds the parts of another manifest.
    """

    def __init__(self, out, job):
        self.folder, self._job = f"{out}.parts", json.dumps(job, sort_keys=True)
        place = os.path.join(self.folder, _JOB)
        os.makedirs(self.folder, exist_ok=True)
        if not os.path.exists(place):
            with replacing(place) as file:
                file.write(self._job.encode())
        with open(place) as file:
            found = file.read()
        if found != self._job:
            was = json.loads(found)
            names = [f"{key} {was.get(key)!r}, not {job[key]!r}" for key in job if was.get(key) != job[key]]
            names = ", ".join(name for name in names if not name.startswith("digest")) or "of other shards"
            raise UserError(f"{self.folder} holds parts of another manifest: {names}; remove it or take another --out")

    def done(self):
        """Returns where the shards are that are done, `{number: (file, offset, length, summary)}`."""
        found = {}
        for name in sorted(os.listdir(self.folder)):
            if not name.endswith(".part"):
                continue
            path, offset = os.path.join(self.folder, name), 0
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n") and line.count(b"\t") == 2:
                        number, summary, _ = line.split(b"\t")
                        found[int(number)] = path, offset, len(line), json.loads(summary)
                    offset += len(line)
        return found

    def writer(self, share):
        """Returns the file of a `share_of`, opened to add lines; a line that was cut off before is ended as none."""
        file = open(os.path.join(self.folder, f"{share[0] + 1}-of-{share[1]}.part"), "ab+")
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\t\t\t\n")  # with more tabs than a line of a shard has
        return file

    def remove(self):
        """Deletes the files, and the folder where it holds nothing else."""
        for name in os.listdir(self.folder):
            if name == _JOB or name.endswith(".part"):
                os.unlink(os.path.join(self.folder, name))
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    @staticmethod
    def line(number, result):
        """Returns the line of a shard."""
        summary = {key: result[key] for key in ("size", "broken", "error")}
        summary |= {"samples": sum(row[2] for row in result["rows"]), "blocks": len(result["rows"])}
        summary["types"] = {field: sorted({_kind(v) for v in values}) for field, values in result["columns"].items()}
        body = base64.b64encode(zlib.compress(json.dumps([result["rows"], result["columns"]]).encode(), 1))
        return b"%d\t%s\t%s\n" % (number, json.dumps(summary).encode(), body)

    @staticmethod
    def read(place):
        """Returns the (rows, columns) of a shard; `place` is a value of `done`."""
        path, offset, length, _ = place
        with open(path, "rb") as file:
            file.seek(offset)
            return json.loads(zlib.decompress(base64.b64decode(file.read(length).split(b"\t")[2])))


def _kind(value):
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "large"
    return "none" if value is None else type(value).__name__


def scan_part(kind, shards, parts, share, processes, length, columns, show):
    """Scans the shards of a part that are not done yet.

    Args:
      kind: the name of the format.
      shards: list of all shards.
      parts: the `Parts`.
      share: of `share_of`.
      processes: int.
      length: int, samples of a block where the format leaves the choice.
      columns: list of fields.
      show: a function of a line of progress.
    """
    mine = range(share[0], len(shards), share[1])
    done = parts.done()
    todo = [i for i in mine if i not in done]
    if len(todo) < len(mine):
        show(f"{len(mine) - len(todo):,} of {len(mine):,} shards are done already")
    work = functools.partial(scan, kind, length=length, columns=columns)
    start = shown = time.monotonic()
    finished, samples = 0, 0
    with parts.writer(share) as file, _pool(processes) as pool:
        waiting, left = {}, iter(todo)
        try:
            while True:
                for i in left:
                    waiting[pool.submit(work, shards[i])] = i
                    if len(waiting) >= 2 * processes:
                        break
                if not waiting:
                    break
                for future in concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED").done:
                    result = future.result()
                    file.write(parts.line(waiting.pop(future), result))
                    file.flush()
                    finished += 1
                    samples += sum(row[2] for row in result["rows"])
                if time.monotonic() - shown >= _SECONDS:
                    shown = time.monotonic()
                    show(_progress(finished, len(todo), samples, shown - start))
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process was killed, which happens when the memory is full; the same command continues, with "
                f"fewer --processes than {processes}"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if finished:
        show(_progress(finished, len(todo), samples, time.monotonic() - start))


def _pool(processes):
    if processes == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_prepare)


def _prepare():
    """Lets a worker process end at Ctrl-C without a message, and when the command is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _progress(finished, todo, samples, seconds):
    rate = finished / max(seconds, 1e-9)
    left = (todo - finished) / rate
    return (
        f"{finished:,} of {todo:,} shards, {samples:,} samples, {rate:,.1f} shards/s, "
        f"{samples / seconds:,.0f} samples/s, {left / 60:,.1f} min left"
    )


def join(out, source, kind, shards, parts, columns, line):
    """Writes the manifest of the parts; returns the lines of a report.

    Args:
      out: path of the manifest.
      source: str, the source.
      kind: the name of the format.
      shards: list of all shards.
      parts: the `Parts`.
      columns: list of fields.
      line: str, the command, for messages of training.

    Raises UserError when shards are missing, no sample is left, or a column has no value.
    """
    done = parts.done()
    if missing := len(shards) - len(done):
        raise UserError(f"{parts.folder}: {missing:,} of {len(shards):,} shards are not done; run the missing --part")
    summaries = [done[i][3] for i in range(len(shards))]
    broken = collections.Counter()
    for summary in summaries:
        broken.update(summary["broken"])
    errors = [summary["error"] for summary in summaries if summary["error"]]
    samples = sum(summary["samples"] for summary in summaries)
    if not samples:
        reasons = ", ".join(broken) or "empty"
        raise UserError(errors[0] if errors else f"{source}: no usable sample in {len(shards):,} shards ({reasons})")
    types = {field: _column_type(field, summaries) for field in columns}
    about = {"format": kind, "source": source, "command": line, "broken": dict(broken)}
    manifest.write(out, _rows(out, shards, done, types), about, types)
    parts.remove()
    yield (
        f"{out}: {samples:,} samples in {sum(s['blocks'] for s in summaries):,} blocks of {len(shards):,} shards, "
        f"{sum(s['size'] for s in summaries) / 2**30:,.2f} GiB"
    )
    for reason, count in broken.most_common():
        yield f"left out: {count:,} {reason}"
    yield from errors[:_FEW]


def _rows(out, shards, done, types):
    """Yields the shards as `clip_jax.data.sources.manifest.write` takes them."""
    import pyarrow

    for number, path in enumerate(shards):
        rows, columns = Parts.read(done[number])
        if rows:
            for field, kind in types.items():
                if kind == pyarrow.json_():
                    columns[field] = [v if v is None else json.dumps(v) for v in columns[field]]
            yield manifest.relative(path, out), done[number][3]["size"], rows, columns


def _column_type(field, summaries):
    """Returns the pyarrow type that holds all values of a field; JSON where they are lists or of several kinds."""
    import pyarrow

    kinds = set().union(*(summary["types"].get(field, ()) for summary in summaries)) - {"none"}
    if not kinds:
        raise UserError(f"--columns: no sample has a field {field!r}")
    types = {"int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_(), "str": pyarrow.string()}
    return types.get(kinds.pop(), pyarrow.json_()) if len(kinds) == 1 else pyarrow.json_()


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = command.make_parser("clip_jax.data.manifest", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="a path, pattern or folder of shards")
    parser.add_argument(
        "--out", required=True, help="path of the manifest, which ends in .parquet; a local path or mount"
    )
    parser.add_argument("--columns", default="", help="fields of the records that are stored for selections, a,b,c")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="shards at once (default: the cores)")
    parser.add_argument(
        "--part", default="", metavar="K/N", help="scans this part of the shards alone, and does not join"
    )
    parser.add_argument(
        "--join", action="store_true", help="joins the parts that several hosts made, and scans nothing"
    )
    parser.add_argument("--length", type=int, default=RUN, help="samples of a block (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_command(lambda: _main(args))


def _main(args):
    _check(args)
    kind, shards = find_shards(args.source)
    _check_out(args.out, shards)
    columns = list(dict.fromkeys(filter(None, map(str.strip, args.columns.split(",")))))
    digest = hashlib.blake2b("\0".join(shards).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    job = {"source": args.source, "format": kind, "shards": len(shards), "digest": digest, "columns": columns}
    if args.join and not os.path.isdir(f"{args.out}.parts"):
        raise UserError(f"{args.out}.parts: no such folder; --part=1/N to --part=N/N make it")
    parts = Parts(args.out, job | {"length": args.length})
    if not args.join:
        share = share_of(args.part) or (0, 1)
        scan_part(kind, shards, parts, share, args.processes, args.length, columns, print)
    if args.part:
        print(f"part {args.part} is done; after the last one: the same command with --join in the place of --part")
        return
    options = [f"--out={shlex.quote(args.out)}"]
    options += [f"--columns={shlex.quote(args.columns)}"] if columns else []
    options += [f"--length={args.length}"] if args.length != RUN else []
    line = " ".join(["python -m clip_jax.data.manifest", shlex.quote(args.source), *options])
    for text in join(args.out, args.source, kind, shards, parts, columns, line):
        print(text)
    print(f"train on it with --config.data={shlex.quote(args.out)}")


def _check(args):
    """Raises UserError for wrong arguments."""
    if not args.out.endswith(".parquet") or "://" in args.out:
        raise UserError(f"--out={args.out} must be a local path that ends in .parquet, such as NAME.manifest.parquet")
    for name in ("processes", "length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    share_of(args.part)
    if args.join and args.part:
        raise UserError("--join takes no --part: it joins the parts that are done")


def _check_out(out, shards):
    """Raises UserError where the manifest would replace data."""
    if os.path.abspath(out) in map(os.path.abspath, shards):
        raise UserError(f"--out={out} is one of the shards; take another name, such as NAME.manifest.parquet")
    if os.path.exists(out) and manifest.read_about(out) is None:
        raise UserError(f"--out={out} exists and is no manifest; take another name, such as NAME.manifest.parquet")


if __name__ == "__main__":
    command.script(main)
