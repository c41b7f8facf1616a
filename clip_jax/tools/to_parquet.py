"""Writes any data source as Parquet files with small row groups, which training reads by block.

    python -m clip_jax.tools.to_parquet /data/pairs.jsonl --out=/data/pairs
    python -m clip_jax.tools.to_parquet '/data/cc3m/{00000..00331}.tar' --out=/data/cc3m_parquet --embed
    python -m clip_jax.tools.to_parquet /data/one_large_row_group.parquet --out=/data/small_row_groups

A table (.csv, .tsv, .jsonl) of any size is read in order, in bounded memory, and its images stay where they are: their
paths are written relative to OUT. With --embed the images are in the files, of every kind of source. Parquet files
without --embed keep their columns; only their row groups are made anew.

The files are written in OUT/.partial and move into OUT when all are there. After an interruption the same command
starts anew, or completes the moves.

OUT gets part-000000.parquet and so on, of about 512 MiB, with the columns `image` (Hugging Face's {bytes, path}),
`captions` (the record's texts), `label` with the names of the classes, and the record's other fields. A field has the
type of its values in the first 4,096 records; a value that does not fit becomes null, or text in a field of text.
"""

import contextlib
import io
import itertools
import json
import os
import re
from collections import Counter

import numpy as np

from clip_jax.data import decode, remote
from clip_jax.data.claim import claimed_folder
from clip_jax.data.files import read_file
from clip_jax.data.records import BadRecord, plain, records
from clip_jax.data.sources import parquet
from clip_jax.data.sources.arrow_columns import image_column
from clip_jax.data.sources.manifest import read_about
from clip_jax.data.sources.shards import PARTIAL, UNMOVED, find_shards, shards_in
from clip_jax.data.sources.spec import parse
from clip_jax.data.sources.table import TableStream
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.source_arguments import add_fields, open_source
from clip_jax.tools.text_columns import format_reasons

ROWS = 512  # of a row group
_PEEKED = 4096  # records whose values decide the types of the columns
_PART_BYTES = 2**29  # of an output file
_PART_ROWS = 2**20
_DERIVED = {"class_name", "texts", "caption_error", "captions", "image", "label"}  # not copied under their own names
_OTHER = "value of another type"


class Parts:
    """A folder of Parquet files that are written one after the other. Used in a `with` statement.

    The files are in FOLDER/.partial until the statement ends without an error, and then move into the folder one by
    one, since some mounts rename no folder. After an error they are deleted. Where the moves were interrupted, the next
    `Parts` of the folder completes them.

    Args:
      folder: the folder; it is made, and must hold no Parquet file.

    Attributes:
      rows: the number of rows so far.

    Raises UserError when the folder holds Parquet files or cannot be written, when FOLDER/.partial holds files of
    others, when another process writes it, and when moves were completed.
    """

    def __init__(self, folder):
        self._out, self._folder = str(folder), os.path.join(folder, PARTIAL)
        self._unmoved = os.path.join(folder, UNMOVED)
        self._writer, self._number = None, 0
        self.rows = 0

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            try:
                if not os.path.exists(self._out):
                    os.makedirs(self._out)
                    stack.callback(_remove_empty, self._out)
                stack.enter_context(claimed_folder(self._out))
                os.makedirs(self._folder, exist_ok=True)
                stack.callback(_remove_empty, self._folder)
                self._check()
                self._delete()  # files of a command that was killed
            except OSError as error:
                raise UserError(f"--out={self._out}: cannot be written: {error.strerror}") from None
            self._stack = stack.pop_all()
        return self

    def _check(self):
        if os.path.exists(self._unmoved):
            self._move()
            raise UserError(f"--out={self._out}: has all files of an earlier command now; nothing else was written")
        if found := [name for name in os.listdir(self._out) if name.endswith(".parquet")]:
            raise UserError(f"--out={self._out}: holds {min(found)} already; give an empty folder")
        if others := set(os.listdir(self._folder)).difference(self._names()):
            raise UserError(f"{self._folder}: holds {min(others)}; remove it, or give another --out")

    def __exit__(self, kind, *_):
        with self._stack:
            if kind is None:
                open(self._unmoved, "wb").close()
                self._move()
            else:
                with contextlib.suppress(OSError):
                    self._delete()

    def _names(self):
        return [name for name in os.listdir(self._folder) if re.fullmatch(r"part-\d{6}\.parquet", name)]

    def _move(self):
        for name in self._names():
            os.replace(os.path.join(self._folder, name), os.path.join(self._out, name))
        os.unlink(self._unmoved)

    def _delete(self):
        for name in self._names():
            os.unlink(os.path.join(self._folder, name))

    def write(self, table):
        """Writes a `pyarrow.Table` as one row group."""
        import pyarrow.parquet as pq

        if self._writer is None:
            path = os.path.join(self._folder, f"part-{self._number:06d}.parquet")
            self._writer, self._size = pq.ParquetWriter(path, table.schema, compression="zstd"), [0, 0]
        self._writer.write_table(table, row_group_size=len(table))
        self.rows += len(table)
        self._size = [self._size[0] + table.nbytes, self._size[1] + len(table)]
        if self._size[0] >= _PART_BYTES or self._size[1] >= _PART_ROWS:
            self.end_file()

    def end_file(self):
        """Ends the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self._number = None, self._number + 1


def _remove_empty(folder):
    with contextlib.suppress(OSError):
        os.rmdir(folder)


class Columns:
    """Makes tables of records; the columns and their types are those of the first ones.

    Args:
      first: list of records.
      class_names: the names of the classes, or None.

    Attributes:
      failures: `Counter` of the values that did not fit, by column, and of the fields that came later.
    """

    def __init__(self, first, class_names=None):
        import pyarrow as pa

        self._image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        self.failures = Counter()
        names = dict.fromkeys(name for record in first for name in record if name not in _DERIVED)
        types = {"captions": pa.list_(pa.string())}
        if any("label" in record for record in first):
            several = any(isinstance(record.get("label"), tuple) for record in first)
            types["label"] = pa.list_(pa.int64()) if several else pa.int64()
        types |= {name: _type([record.get(name) for record in first]) for name in names}
        features = {name: _feature(kind) for name, kind in types.items()}
        if class_names is not None and "label" in types:
            label = {"names": list(class_names), "_type": "ClassLabel"}
            features["label"] = label if types["label"] == pa.int64() else {"feature": label, "_type": "Sequence"}
        metadata = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
        self._schema = pa.schema([("image", self._image), *types.items()], {"huggingface": json.dumps(metadata)})

    def table(self, chunk):
        """Returns the `pyarrow.Table` of records whose `image` is `{"bytes": ..., "path": ...}`."""
        import pyarrow as pa

        known = set(self._schema.names) | _DERIVED
        self.failures.update(f"field {name!r} came later" for record in chunk for name in record.keys() - known)
        columns = [pa.array([record["image"] for record in chunk], self._image)]
        for field in itertools.islice(self._schema, 1, None):
            values = [_value(record.get("texts" if field.name == "captions" else field.name)) for record in chunk]
            columns.append(self._array(values, field))
        return pa.table(columns, schema=self._schema)

    def _array(self, values, field):
        import pyarrow as pa

        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, TypeError, OverflowError):
            fitting = [self._fitting(value, field) for value in values]
            return pa.array(fitting, field.type)

    def _fitting(self, value, field):
        """Returns a value as one of a column's type, None where it is not."""
        import pyarrow as pa

        try:
            return pa.scalar(value, field.type).as_py()
        except (pa.ArrowException, TypeError, OverflowError):
            if pa.types.is_string(field.type):
                return _text(value)
            self.failures[f"column {field.name!r}: {_OTHER}"] += 1
            return None


def _type(values):
    """Returns the type of a column by some of its values: a number, text, or a list of them; else text, as JSON."""
    import pyarrow as pa

    try:
        kind = inner = pa.array([_value(value) for value in values]).type
    except (pa.ArrowException, TypeError, OverflowError):
        return pa.string()
    while pa.types.is_list(inner):
        inner = inner.value_type
    simple = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return kind if any(is_kind(inner) for is_kind in simple) else pa.string()


def _feature(kind):
    """Returns Hugging Face's description of a type of `_type`."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}


def _value(value):
    """Returns a field's value as plain Python values; text in valid UTF-8."""
    value = plain(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value


def _text(value):
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _embedded(record):
    """Returns a record with the bytes of its image; raises BadRecord."""
    image = record.get("image")
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        decode.open_image(image).save(buffer, "PNG")
        image = buffer.getvalue()
    elif isinstance(image, str):
        image = read_file(image)
    if not isinstance(image, bytes) or not image:
        raise BadRecord("no image")
    return record | {"image": {"bytes": image, "path": None}}


def write(source, out, prepare, log=print):
    """Writes records as Parquet.

    Args:
      source: an iterable of records, with BadRecord in the place of unusable ones, and with `class_names`.
      out: the folder.
      prepare: a function of a record that returns it with `image` as {"bytes": ..., "path": ...} or raises BadRecord.
      log: takes a line of progress.

    Returns:
      `(rows, failures)`: the number of rows, and a Counter of what was left out.

    Raises UserError as `Parts`, and when no record is usable.
    """
    failures = Counter()

    def usable():
        for record in source:
            try:
                if isinstance(record, BadRecord):
                    raise record
                yield prepare(record)
            except BadRecord as bad:
                failures[bad.args[0]] += 1

    with Parts(out) as parts:
        rows = usable()
        if not (first := list(itertools.islice(rows, _PEEKED))):
            raise UserError(f"no record is usable ({format_reasons(failures)})")
        columns, rows = Columns(first, source.class_names), itertools.chain(first, rows)
        del first
        while chunk := list(itertools.islice(rows, ROWS)):
            parts.write(columns.table(chunk))
            if parts.rows % (200 * ROWS) == 0:
                log(f"{parts.rows:,} rows")
        parts.end_file()
    return parts.rows, failures + columns.failures


def regroup(files, out, log=print):
    """Copies Parquet files into files with row groups of 512 rows, in bounded memory; returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with Parts(out) as parts:
        for path in files:
            image = image_column(parquet.schema_of(path))
            try:
                # Buffered and not read ahead: else a row group is in memory as a whole.
                with remote.opened(path) as opened, pq.ParquetFile(opened, buffer_size=2**20, pre_buffer=False) as file:
                    for batch in file.iter_batches(ROWS, use_threads=False):
                        parts.write(_moved(pa.Table.from_batches([batch]), image, os.path.dirname(path), out))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: damaged ({str(error).splitlines()[0]})") from None
            parts.end_file()
            log(f"{path}: {parts.rows:,} rows")
    return parts.rows


def _moved(table, image, folder, out):
    """Returns a table whose relative paths of image files begin at the folder `out` instead of `folder`."""
    import pyarrow as pa

    def moved(value):
        if isinstance(value, dict):
            return value if value["bytes"] is not None else value | {"path": moved(value.get("path"))}
        if not isinstance(value, str) or not value or remote.is_remote(value) or os.path.isabs(value):
            return value
        return f"{folder}/{value}" if remote.is_remote(folder) else os.path.relpath(os.path.join(folder, value), out)

    if image is None or os.path.abspath(folder) == os.path.abspath(out):
        return table
    index = table.schema.get_field_index(image)
    values = table.column(index)
    held = values.combine_chunks().field("bytes") if pa.types.is_struct(values.type) else values
    if not (pa.types.is_string(held.type) or pa.types.is_large_string(held.type) or held.null_count):
        return table
    return table.set_column(index, table.schema.field(index), pa.array(map(moved, values.to_pylist()), values.type))


class _Records:
    """The records of a source in order."""

    def __init__(self, source):
        self._source, self.class_names = source, source.class_names

    def __iter__(self):
        return (record for _, record in records(self._source))


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = command.make_parser("clip_jax.tools.to_parquet", __doc__)
    parser.add_argument("source", help="any source string of clip_jax.data.sources")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder without Parquet files")
    parser.add_argument("--embed", action="store_true", help="write the images into the files")
    add_fields(parser)
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    spec = parse(args.source)
    base = spec[0].base.replace("{split}", args.split) if len(spec) == 1 and not spec[0].steps else ""
    base = shards_in(base) or base
    if base.endswith(".parquet") and not args.embed and not (os.path.isfile(base) and read_about(base)):
        print(f"{args.out}: {regroup(find_shards(base)[1], args.out):,} rows")
        return
    if base.endswith((".csv", ".tsv", ".jsonl")):
        source = TableStream(base, args.image, args.text, args.label)
    elif args.embed:
        source = _Records(open_source(args))
    else:
        raise UserError(f"{args.source}: the images are no files beside a table; write them into Parquet with --embed")

    def beside(record):
        return record | {"image": {"bytes": None, "path": os.path.relpath(record["image"], args.out)}}

    rows, failures = write(source, args.out, _embedded if args.embed else beside)
    print(f"{args.out}: {rows:,} rows. {format_reasons(failures)}")


if __name__ == "__main__":
    command.script(main)
