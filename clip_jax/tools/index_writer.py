"""The index of the records that a command keeps: `index.npy` with its reports, as `SOURCE?index=FOLDER` reads it."""

import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from clip_jax.data.records import fingerprint
from clip_jax.data.replacing import replacing
from clip_jax.errors import UserError


class IndexWriter:
    """Writes the folder of an index: `index.npy`, `report.json`, `report.txt`. Used in a `with` statement.

    An index that is in the folder already goes only when the new one is complete, and an interrupted command leaves no
    mixture of both.

    Args:
      source: the records.
      out: the folder; it is created when it does not exist.
      start: time by `time.monotonic` at which the command began; None: now.

    Attributes:
      scratch: path of a temporary folder in `out`.
      kept: number of records so far.
      texts: number of their captions.

    Raises UserError as `check_index`, and when the folder cannot be written, within the statement too.
    """

    def __init__(self, source, out, start=None):
        check_index(source, Path(out))
        self._source, self._out = source, Path(out)
        self._start = time.monotonic() if start is None else start
        self.kept = self.texts = 0

    def __enter__(self):
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(dir=self._out)
            self.scratch = self._folder.name
            self._file = open(os.path.join(self.scratch, "index"), "wb")  # noqa: SIM115
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(self, kind, error, _):
        self._file.close()
        self._folder.cleanup()
        if isinstance(error, OSError):
            raise self._unwritable(error) from None

    def _unwritable(self, error):
        return UserError(f"--out={self._out} cannot be written: {error.strerror or error}")

    def add(self, records, bits):
        """Adds kept records.

        Args:
          records: their numbers, int64 `[n]`, in rising order.
          bits: uint64 `[n]`; bit i says whether caption i of the record is kept.
        """
        bits = np.asarray(bits, np.uint64)
        self.kept, self.texts = self.kept + len(bits), self.texts + int(np.bitwise_count(bits).sum())
        np.stack([np.asarray(records, np.int64), bits.view(np.int64)], 1).tofile(self._file)

    def finish(self, report, describe):
        """Writes the index and the reports.

        Args:
          report: a dict of JSON values. The source, the counts, the time and the peak memory are added at its front.
          describe: the whole report -> the lines of report.txt.

        Returns: the whole report.

        Raises UserError when no record is kept. Then removed.txt says why, and an older index stays.
        """
        self._file.close()
        report = {
            "source": self._source.name,
            "fingerprint": fingerprint(self._source),
            "records": len(self._source),
            "kept": self.kept,
            "texts_kept": self.texts,
            **report,
            "seconds": time.monotonic() - self._start,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        told = self._out / ("report.txt" if self.kept else "removed.txt")
        if self.kept:
            for name in ("report.json", "removed.txt"):  # without report.json a folder is no index
                (self._out / name).unlink(missing_ok=True)
            with replacing(self._out / "index.npy") as file:  # a training may have mapped the older one
                np.save(file, np.memmap(self._file.name, np.int64, "r", shape=(self.kept, 2)))
        told.write_text("\n".join(describe(report)) + "\n", errors="replace")
        if not self.kept:
            raise UserError(f"{self._source.name}: all {len(self._source):,} records are removed; {told} says why")
        with replacing(self._out / "report.json") as file:
            file.write(json.dumps(report, indent=1).encode())
        return report


def check_index(source, out):
    """Raises UserError for a mixture, as `?index=` belongs to one of its parts, and for a folder with another array."""
    if (out / "index.npy").exists() and not any((out / name).exists() for name in ("report.json", "report.txt")):
        raise UserError(f"--out={out} holds an index.npy that no command of the package made: name another folder")
    if hasattr(source, "sources"):
        raise UserError(
            f"{source.name} is a mixture: make an index of each part, PART?index=FOLDER + PART?index=FOLDER"
        )


def headline(report):
    """Returns the first line of a report: how many records and texts are kept."""
    n, kept = report["records"], report["kept"]
    return (
        f"{report['source']}: {kept:,} of {n:,} records are kept ({kept / n:.1%}) with {report['texts_kept']:,} texts"
    )


def cost(report):
    """Returns the line of a report about its time and memory."""
    return f"{report['seconds']:,.0f} s, peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"


def bits_of(captions, kept):
    """Returns the bits uint64 `[records]` of an index.

    Args:
      captions: uint8 `[records]`, the number of captions of each record, at most 64.
      kept: bool `[captions]`, of all records one after the other.
    """
    owner, place = places(captions)
    bits = np.zeros(len(captions), np.uint64)
    np.bitwise_or.at(bits, owner[kept], np.uint64(1) << place[kept].astype(np.uint64))
    return bits


def places(captions):
    """Returns the record of each caption and its number in it, int64 `[captions]`; for the argument see `bits_of`."""
    captions = captions.astype(np.int64)
    owner = np.repeat(np.arange(len(captions)), captions)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(captions) - captions, captions)


def example_lines(sections):
    """Yields the lines of a report about `{heading: examples}`.

    Examples are dicts with `record`, `texts`, and `size` or `note` where known.
    """
    for heading, examples in sections.items():
        yield from ("", heading)
        for example in examples:
            size = "x".join(map(str, example.get("size", ())))
            facts = [f"record {example['record']:,}", size, example.get("note", "")]
            texts = (" ".join(text.split())[:100] for text in itertools.islice(example["texts"], 3))
            yield f"  {', '.join(filter(None, facts))}: " + " | ".join(texts)
