"""Rows of Parquet and Arrow files as raw records: which column holds the images, and what Hugging Face's schema says.

A column of images is one of

    a struct with the member `bytes`    Hugging Face's {bytes, path}; where `bytes` is null, `path` is a file
    binary                              the bytes of an image file, as in the column `jpg` of img2dataset
    text with a usual name              the path of a file; a relative one begins at the folder of the shard

Other columns of images, and other binary columns, are not read. A struct of lists becomes a field for each of its
members, `captions/text`. A null image makes its record unusable.
"""

import bisect
import json
import os

import numpy as np

from clip_jax.data import remote
from clip_jax.data.blocks import Block
from clip_jax.data.files import read_file
from clip_jax.data.records import BadRecord, usual_image
from clip_jax.errors import UserError


def image_column(schema, asked=None):
    """Returns the name of the column of images of a `pyarrow.Schema`, or None when no column is known to hold them.

    Args:
      schema: the schema.
      asked: the name that the user gives, or None. The first choice is then a column that Hugging Face's metadata calls
        an image, the next a struct or binary column with a usual name, any struct with `bytes`, a text column with a
        usual name.
    """
    names = list(schema.names)
    if asked is not None:
        return asked if asked in names else None
    declared = [name for name, feature in features(schema).items() if feature.get("_type") == "Image" and name in names]
    structs = [field.name for field in schema if _is_struct_of_bytes(field.type)]
    binary = [field.name for field in schema if _is_binary(field.type)]
    texts = [field.name for field in schema if _is_text(field.type)]
    for group in (declared, structs + binary):
        if name := usual_image(group):
            return name
    return next(iter(declared + structs), None) or usual_image(texts)


def kept_columns(schema, image):
    """Returns the names of the columns to read: all but the binary columns and the images other than `image`."""
    if image is None:
        return list(schema.names)
    return [f.name for f in schema if f.name == image or not (_is_binary(f.type) or _is_struct_of_bytes(f.type))]


def features(schema):
    """Returns Hugging Face's description of the columns, `{column: {"_type": ...}}`; empty without such metadata."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: _inner(feature) for name, feature in found.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def class_names(schema):
    """Returns `{column: class names}` of the columns that Hugging Face's metadata calls ClassLabel, or lists of it."""
    return {
        name: list(feature["names"])
        for name, feature in features(schema).items()
        if feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _inner(feature):
    """Returns the description of a column, or of the items of a column of lists of labels."""
    item = feature[0] if isinstance(feature, list) else feature.get("feature")
    if isinstance(item, dict) and item.get("_type") == "ClassLabel":
        return item
    return feature if isinstance(feature, dict) else {}


def preferred(fields):
    """Returns `{"image": field}` of the first field that holds bytes, given the first value of each field."""
    return next(({"image": name} for name, value in fields.items() if isinstance(value, bytes)), {})


def rows(batches, image, path):
    """Returns the raw records of `pyarrow.RecordBatch`es of one schema, a `Block`.

    Args:
      batches: the batches.
      image: the name of the column of images, or None.
      path: the shard; the folder of relative paths.
    """
    batches = [batch for batch in batches if batch.num_rows]
    ends = np.cumsum([batch.num_rows for batch in batches]).tolist()
    folder, columns = os.path.dirname(path), [batch.columns for batch in batches]
    schema = batches[0].schema if batches else ()
    names, nested = [field.name for field in schema], {f.name for f in schema if _is_struct_of_lists(f.type)}

    def make(index):
        number = bisect.bisect_right(ends, index)
        row = index - (ends[number - 1] if number else 0)
        try:
            record = {name: column[row].as_py() for name, column in zip(names, columns[number], strict=True)}
        except UnicodeDecodeError:
            raise BadRecord("text is not UTF-8") from None
        except (ValueError, OverflowError):  # such as a date after the year 9999
            raise BadRecord("unreadable value") from None
        if image is not None:
            record[image] = _image(record[image], folder)
        for name in nested:
            record |= {f"{name}/{key}": item for key, item in (record.pop(name) or {}).items()}
        return record

    return Block(ends[-1] if ends else 0, make)


def broken(count, reason):
    """Returns `count` records that are all unusable for one reason, a `Block`."""

    def make(index):
        raise BadRecord(reason)

    return Block(count, make)


def joined(counts, length):
    """Returns the `(first, last + 1, rows)` of blocks of whole groups, each about `length` rows.

    Args:
      counts: list of int, the rows of each group.
      length: rows of a block.
    """
    blocks, first = [], 0
    held = 0
    for number, count in enumerate(counts):
        if held and abs(held + count - length) > abs(held - length):
            blocks.append((first, number, held))
            first, held = number, 0
        held += count
    return [*blocks, (first, len(counts), held)] if held else blocks


def _image(value, folder):
    """Returns the bytes of an image from the value of its column; raises BadRecord."""
    path = value
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    if not path or not isinstance(path, str):
        raise BadRecord("no image")
    if not remote.is_remote(path):
        path = os.path.join(folder, path)
    if not remote.is_remote(path):
        return read_file(path)
    try:
        return remote.read(path)
    except UserError:
        raise BadRecord("missing file") from None


def _is_binary(kind):
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind):
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_struct_of_bytes(kind):
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    inner, has_path = kind.field("bytes").type, kind.get_field_index("path") >= 0
    return _is_binary(inner) or types.is_null(inner) and has_path


def _is_struct_of_lists(kind):
    from pyarrow import types

    return types.is_struct(kind) and any(types.is_list(f.type) or types.is_large_list(f.type) for f in kind)
