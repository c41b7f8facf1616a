"""A pass over a data source that leaves its results on disk in parts, so that the same command resumes it."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from clip_jax.data.records import BadRecord, fingerprint, hash64, records
from clip_jax.data.replacing import replacing
from clip_jax.data.sources.kept import starts_of
from clip_jax.data.threads import mapped
from clip_jax.errors import UserError
from clip_jax.runtime import command, faults
from clip_jax.tools.index_writer import check_index
from clip_jax.tools.source_arguments import FIELDS, source_parser

PART = 65_536  # records of a part; those of whole blocks where the source has such
_PREPARED = 512  # records that threads prepare ahead


def pass_parser(module, doc):
    """Returns the parser of a command that makes a pass: with `--out`, `--part` and the arguments of a source."""
    parser = source_parser(module, doc, FIELDS)
    parser.add_argument("--out", required=True, help="folder of the parts, the index and the report")
    parser.add_argument(
        "--part", default="", metavar="K/N", help="read share K of N only, K in 1..N; then run it without --part"
    )
    return parser


def run_command(work):
    """Calls `work` as `clip_jax.runtime.command.run` does; Ctrl-C prints one line. Returns the exit status."""
    try:
        return command.run(work)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return faults.INTERRUPTED


def share_of(text):
    """Returns `(k - 1, n)` of the argument "K/N", None for an empty one; raises UserError for any other."""
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part={text} must be one of 1/N to N/N, such as 2/4")
    return int(match[1]) - 1, int(match[2])


def checkpoint_arguments(parser):
    """Adds `--checkpoint` and `--which` to a parser."""
    parser.add_argument(
        "--checkpoint", help="a work folder, a checkpoint, or third-party weights (docs/checkpoints.md)"
    )
    parser.add_argument("--which", default="latest", help="latest (default), best, or a step")


def load_model(args, made):
    """Returns the model of `--checkpoint` and begins a `Pass` whose parts depend on its weights.

    Without `--checkpoint` returns None; then all parts must be there.

    Raises UserError when it cannot be loaded, the folder holds parts of other weights, or parts are missing.
    """
    if not args.checkpoint:
        if missing := len(made.missing()):
            raise UserError(f"{missing:,} of {len(made):,} parts of {args.out} are missing: give --checkpoint")
        return None
    from clip_jax import inference
    from clip_jax.search_index import model_key

    model = inference.load(args.checkpoint, which=args.which)
    made.begin({"checkpoint": model_key(model)}, checkpoint=args.checkpoint)
    return model


class Pass:
    """The parts of a pass over a source, files `OUT/parts/NUMBER.npz` of arrays by name.

    Args:
      source: the source.
      out: the folder of the command.
      command: the command's name.

    Attributes:
      start: the time, by `time.monotonic`, at which it was made.
      key: what the parts depend on, `{word: JSON value}`; empty before `begin` in a new folder.
      about: what `begin` was told of it, a dict of JSON values.

    Raises UserError as `check_index`, when the folder holds parts of another source or command, and when it cannot be
    written.
    """

    def __init__(self, source, out, command):
        check_index(source, Path(out))
        self.start = time.monotonic()
        self.source, self._out = source, out
        self._folder, self._edges = Path(out) / "parts", _edges(source)
        self._fixed = {"command": command, "data set": fingerprint(source), "cut": hash64(self._edges.tobytes())}
        self.key, self.about = {}, {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (path := self._folder / "key.json").exists():
                found = json.loads(path.read_text())
                self.key, self.about = found["key"], found["about"]
            else:
                with replacing(self._folder / "writable"):
                    pass
                (self._folder / "writable").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; remove {self._folder}") from None
        if self.key:
            self._check(self._fixed)

    def begin(self, key, **about):
        """Says what the parts depend on.

        Args:
          key: `{word: JSON value}`.
          about: JSON values that are kept with the parts and decide nothing.

        Raises UserError when the folder holds parts of another key.
        """
        if self.key:
            return self._check(self._fixed | key)
        self.key, self.about = self._fixed | key, about
        with replacing(self._folder / "key.json") as file:
            file.write(json.dumps({"key": self.key, "about": about}, indent=1).encode())

    def _check(self, key):
        for name, value in key.items():
            if self.key.get(name) != value:
                told = f"--out={self._out} holds parts of another {name}"
                raise UserError(f"{told}; remove {self._folder}, or name another folder")

    def __len__(self):
        return len(self._edges) - 1

    def bounds(self, number):
        """Returns the first record of a part and the one after its last."""
        return tuple(self._edges[number : number + 2].tolist())

    def missing(self, share=None):
        """Returns the numbers of the parts that are not on disk; `share` is that of `share_of`, or None for all."""
        index, count = share or (0, 1)
        mine = range(index * len(self) // count, (index + 1) * len(self) // count)
        return [number for number in mine if not self._path(number).exists()]

    def run(self, work, share=None, log=print):
        """Makes the missing parts.

        Args:
          work: `(first, end) -> {name: array}` of the records first..end-1.
          share: of `share_of`, or None for all parts.
          log: function of a line.
        """
        for number in self.missing(share):
            start, (first, end) = time.monotonic(), self.bounds(number)
            arrays = work(first, end)
            with replacing(self._path(number)) as file:
                np.savez(file, **arrays)
            rate = (end - first) / max(time.monotonic() - start, 1e-9)
            log(f"part {number + 1} of {len(self)}: {end - first:,} records, {rate:,.0f} a second")
        if share:
            done, missing = f"share {share[0] + 1}/{share[1]} is done", len(self.missing())
            log(f"{done}; {missing:,} parts of others are missing. Then run without --part")

    def __getitem__(self, number):
        """Returns the arrays of a part, `{name: array}`; raises UserError for a damaged one."""
        try:
            with np.load(self._path(number)) as file:
                return dict(file)
        except Exception as error:  # a damaged archive raises many kinds
            raise UserError(f"{self._path(number)} is damaged ({error}); remove it and run again") from None

    def __iter__(self):
        """Yields the arrays of each part in order."""
        return (self[number] for number in range(len(self)))

    def _path(self, number):
        return self._folder / f"{number:07}.npz"


def _edges(source):
    """Returns the first record of each part, and the number of all records, int64; no block is in two parts."""
    edges = np.append(np.arange(0, len(source), PART), len(source))
    if getattr(source, "blocks", None) is None:
        return edges
    starts = starts_of(source)
    return np.unique(starts[np.searchsorted(starts, edges)])


def prepared(source, first, end, work):
    """Returns an iterator of `(index, work(record))` of the records first..end-1 in order; threads work ahead.

    An unusable record gives the `BadRecord` that it or `work` raised.
    """

    def attempt(record):
        if isinstance(record, BadRecord):
            return record
        try:
            return work(record)
        except BadRecord as bad:
            return bad

    def indexed(item):
        return item[0], attempt(item[1])

    return mapped(indexed, records(source, first, end), _PREPARED)


def show(lines, args, log=print):
    """Prints the lines of a report, and how to train on the index."""
    for line in lines:
        log(line)
    log(f"\nindex: {args.out}; train on it with --config.data='{args.source}?index={args.out}'")
