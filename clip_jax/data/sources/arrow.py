"""Arrow IPC files and streams (.arrow) as shards, and the folders that Hugging Face's `save_to_disk` writes.

A block is one or more record batches that lie one after the other; `start` and `end` are offsets in bytes. A file
format's body is a stream, so that both are read in the same way. A local file is mapped into memory and a record copies
no more than its own values; a remote block is one request.

The layout is that of the specification (Arrow columnar format, "IPC streaming format"): a message is FFFFFFFF, the size
of its description as int32, the description as a flatbuffer, and its body. The fields of the descriptions are those of
Message.fbs.
"""

import json
import os
import struct
from collections import Counter

from clip_jax.data import remote
from clip_jax.data.blocks import Recent
from clip_jax.data.sources import arrow_columns
from clip_jax.data.sources.arrow_columns import preferred  # noqa: F401 part of the format
from clip_jax.data.sources.ranges import version
from clip_jax.errors import UserError, unknown

BYTES = True  # start and end of a block are offsets in bytes
FOOTER = True  # `scan` reads no bodies
COLUMNS = True  # `read` takes `column`
_FILE_MAGIC = b"ARROW1\0\0"
_SCHEMA, _DICTIONARY = 1, 2  # MessageHeader
_RECORDS = 3
_AHEAD = 2**18  # bytes that are read for the description of a message
_schemas = Recent(64)


def scan(path, length=512):
    """Returns the blocks of a file, `[(start, end, rows), ...]` in bytes, and `{reason: count}`.

    Reads the descriptions of the record batches, not their bodies. A truncated file gives its complete batches.
    Raises UserError for columns that are encoded by dictionaries.
    """
    import pyarrow as pa

    found, damage = [], Counter()
    try:
        arrow_columns.image_column(_schema(path))
        for kind, start, end, rows in _messages(path):
            if kind == _DICTIONARY:
                raise UserError(f"{path}: columns encoded by a dictionary are not read; write the values themselves")
            if kind == _RECORDS:
                found.append((start, end, rows))
    except EOFError:
        damage["truncated shard" if found else "unreadable shard"] = 1
    except (struct.error, IndexError, pa.ArrowException, OSError, UnicodeDecodeError):
        damage["unreadable shard"] = 1
    groups = arrow_columns.joined([rows for _, _, rows in found], length)
    return [(found[first][0], found[last - 1][1], rows) for first, last, rows in groups], damage


def read(path, start, end, column=None):
    """Returns the raw records of the record batches in a byte range.

    Args:
      path: the file.
      start, end: offsets in bytes, of `scan`.
      column: the column of images, or None to choose it.

    Raises EOFError when the file is shorter.
    """
    import pyarrow as pa

    try:
        data, schema = _bytes(path, start, end), _schema(path)
        messages = pa.ipc.MessageReader.open_stream(pa.BufferReader(data))
        batches = [pa.ipc.read_record_batch(message, schema) for message in messages]
    except (pa.ArrowException, OSError, struct.error):
        raise EOFError(path) from None
    try:
        for batch in batches:
            batch.validate(full=True)  # else a wrong offset ends the process
    except pa.ArrowException:
        return arrow_columns.broken(sum(batch.num_rows for batch in batches), "corrupt record batch")
    image = arrow_columns.image_column(schema, column)
    names = set(arrow_columns.kept_columns(schema, image))
    kept = [number for number, name in enumerate(schema.names) if name in names]
    return arrow_columns.rows([batch.select(kept) for batch in batches], image, path)


def classes(path):
    """Returns `{column: class names}` that the file's schema holds."""
    return arrow_columns.class_names(_schema(path))


def saved_folder(folder, split):
    """Returns the folder of a Dataset that `save_to_disk` of Hugging Face's `datasets` wrote, or None.

    Args:
      folder: a local path. It holds state.json (a Dataset), or dataset_dict.json and a sub-folder for each split.
      split: str, the split of a DatasetDict.

    Raises UserError for an unknown split.
    """
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = _saved(folder, "dataset_dict.json", "splits")
        if split not in splits:
            raise unknown(f"{folder}: no split", split, splits)
        folder, split = os.path.join(folder, split), "train"
    if not os.path.isfile(os.path.join(folder, "state.json")):
        return None
    if split != "train":
        raise UserError(f"{folder}: no split {split!r}; this folder is the split 'train' alone")
    return folder


def saved_files(folder):
    """Returns the Arrow files of a folder of `saved_folder`, in the order of their rows; none without a state.json.

    Raises UserError for a damaged folder, and for a selection of rows that was saved by an old version.
    """
    if not os.path.isfile(os.path.join(folder, "state.json")):
        return []
    files = [os.path.join(folder, str(part.get("filename"))) for part in _saved(folder, "state.json", "_data_files")]
    if _saved(folder, "state.json", "_indices_data_files", []):
        raise UserError(f"{folder}: holds a selection of rows; save it again after flatten_indices()")
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{missing[0]}: no such file, which state.json of its folder names")
    return files


def _saved(folder, name, key, default=None):
    """Returns the value of a key, a list, of a JSON file in a folder that `save_to_disk` wrote; raises UserError."""
    path = os.path.join(folder, name)
    try:
        with open(path) as file:
            found = json.load(file).get(key, default)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if not isinstance(found, list):
        raise UserError(f"{path}: has no list {key!r}; save the data set again with a newer version of `datasets`")
    return found


def _bytes(path, start, end):
    """Returns a part of a file, a `pyarrow.Buffer`; raises EOFError when the file is shorter."""
    import pyarrow as pa

    if not remote.is_remote(path) and os.path.getsize(path) >= end:
        with pa.memory_map(path) as file:
            file.seek(start)
            return file.read_buffer(end - start)
    data = pa.py_buffer(remote.read(path, start, end))
    if len(data) < end - start:
        raise EOFError(path)
    return data


def _schema(path):
    return _schemas.get(version(path), _read_schema)


def _read_schema(key):
    import pyarrow as pa

    path = key[0]
    for kind, start, end, _ in _messages(path):
        if kind == _SCHEMA:
            return pa.ipc.read_schema(pa.BufferReader(_bytes(path, start, end)))
    raise EOFError(path)


def _messages(path):
    """Yields `(kind, start, end, rows)` of the messages of a file; raises EOFError at a message that is cut off."""
    size, window = remote.size(path), (0, b"")

    def at(place, count):
        nonlocal window
        if place + count > size:
            raise EOFError(path)
        if not window[0] <= place <= place + count <= window[0] + len(window[1]):
            window = place, remote.read(path, place, min(size, place + max(count, _AHEAD)))
        return window[1][place - window[0] : place - window[0] + count]

    place = len(_FILE_MAGIC) if at(0, 8) == _FILE_MAGIC else 0
    while place < size:
        mark, length = struct.unpack("<ii", at(place, 8))
        if mark != -1 or length < 0:
            raise struct.error("no message")
        if not length:  # the end of the stream; in a file its footer follows
            return
        kind, body, rows = _description(at(place + 8, length))
        end = place + 8 + length + body
        if end > size:
            raise EOFError(path)
        yield kind, place, end, rows
        place = end


def _description(data):
    """Returns the kind of a message, the bytes of its body, and the rows of a record batch; `data` is a flatbuffer."""

    def number(form, place):
        return struct.unpack_from(form, data, place)[0]

    def field(table, index):
        """Returns the place of a field, or 0 for one that is not written."""
        fields, where = table - number("<i", table), 4 + 2 * index
        offset = number("<H", fields + where) if where < number("<H", fields) else 0
        return table + offset if offset else 0

    message = number("<I", 0)
    kind, header, body = (field(message, index) for index in (1, 2, 3))
    kind, body = data[kind] if kind else 0, number("<q", body) if body else 0
    count = field(header + number("<I", header), 0) if kind == _RECORDS else 0
    rows = number("<q", count) if count else 0
    if min(body, rows) < 0:
        raise struct.error("no message")
    return kind, body, rows
