"""Writes text columns of a data set: the loop over its records, and the form of a text."""

import itertools
import time

from clip_jax.data.records import BadRecord, records
from clip_jax.data.sources.columns import text_writer
from clip_jax.errors import UserError

_LOG_SECONDS = 30


def one_line(text):
    """Returns the text on one line, in valid UTF-8, with "->" for "=>", which separates the parts of a prompt."""
    return " ".join(text.replace("=>", "->").encode("utf-8", "replace").decode().split())


def format_reasons(reasons):
    """Returns the five most frequent reasons of a Counter and their counts: "corrupt image: 3, no image: 1"."""
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))


def write_texts(source, out, about, batch, make, log=print):
    """Writes text columns of a source in batches of records; resumes an unfinished file.

    A batch of which only a part was written is made again as a whole, because some models sample a batch as a whole.

    Args:
      source: the records.
      out: the file, `NAME.jsonl`, or a folder of parts, `NAME.parquet`.
      about: what makes the columns; it goes into the header, and a file with another header is refused.
      batch: records in a batch.
      make: function `[(index, record), ...] -> [{field: value}, ...]`; an unreadable record is None.
      log: takes a line of progress, at most every 30 seconds.

    Raises UserError as `make` and `text_writer` do, and for a batch below 1.
    """
    if batch < 1:
        raise UserError(f"--batch={batch}: must be at least 1")
    last = time.monotonic()
    with text_writer(out, source, about) as writer:
        rows = (
            (i, None if isinstance(r, BadRecord) else r) for i, r in records(source, writer.done - writer.done % batch)
        )
        while chunk := list(itertools.islice(rows, batch)):
            try:
                made = make(chunk)
            except UserError as error:
                rest = f"{out} has {writer.done:,} of {len(source):,} records; the same command resumes there"
                raise UserError(f"{error}; {rest}") from None
            for (i, record), values in zip(chunk, made, strict=True):
                if i >= writer.done:
                    writer.write(record, values)
            if time.monotonic() - last > _LOG_SECONDS:
                last = time.monotonic()
                log(f"{writer.done:,} of {len(source):,} records")
