"""Data sources: every data set behind one interface, `len(source)` records that are read by index.

A record is a dict. `image` is encoded bytes or a uint8 array, `texts` a list of captions of that image, `label` an integer (absent when the
data set has none), `class_name` its name; all other fields keep their own names. `make_source` builds a source from a string. Captions that
are not UTF-8 carry surrogates, which the text view refuses, and a record that cannot be read raises `BadRecord`: neither ends a run.
"""

import array
import bisect
import csv
import difflib
import functools
import glob
import itertools
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clip_jax.errors import UserError

Record = dict[str, Any]

EMBEDDED = Path(__file__).parent / "embedded"
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Names that fields have in practice, best first. Compared in lower case.
_IMAGE_NAMES = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "file_name",
    "filename",
    "file",
    "img",
    "image/encoded",
    "image_bytes",
    "jpg",
    "png",
    "webp",
)
_TEXT_NAMES = ("captions", "caption", "texts", "text", "captions/text", "title", "alt_text", "sentence", "sentences", "name", "description")
_CANONICAL = {"image", "texts", "label", "source_id"}  # a data set's own fields of these names give way
_LABEL_NAMES = ("label", "class_id", "class", "category", "target")


class BadRecord(Exception):
    """A record that cannot be used. `args[0]` is the reason, a short category such as "corrupt image" under which it is counted."""


class Source(Protocol):
    """Records by index. Picklable, because worker processes get a copy; files are opened on first use in each process."""

    name: str
    class_names: Sequence[str] | None  # by label, where the data set says so
    broken: Mapping[str, int]  # what was found unreadable while indexing, by reason

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class BaseSource:
    """What all sources below share: the choice of fields and the canonical form of a record."""

    class_names: Sequence[str] | None = None

    def __init__(self, name: str, image: str | None = None, text: str | Sequence[str] | None = None, label: str | None = None):
        self.name = name
        self.broken: Counter = Counter()
        self._fields = (image, (text,) if isinstance(text, str) else tuple(text or ()), label)

    def _peek(self, read: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The first values of all fields that the first 16 readable records have."""
        fields: dict[str, Any] = {}
        for index in range(min(len(self), 16)):
            try:
                fields = read(index) | fields
            except BadRecord:
                continue
        return fields

    def _choose_fields(self, names: Iterable[str]) -> None:
        """Settles which fields are image, captions and label: those asked for, else the first that has a usual name."""
        names = list(names)
        image, texts, label = self._fields
        for field in filter(None, (image, *texts, label)):
            if field not in names:
                raise UserError(f"{self.name}: no field {field!r}{near(field, names)}; fields: {', '.join(names)}")
        self._fields = (
            image or _first(_IMAGE_NAMES, names),
            texts or tuple(filter(None, [_first(_TEXT_NAMES, names)])),
            label or _first(_LABEL_NAMES, names),
        )

    def _canonical(self, raw: Mapping[str, Any]) -> Record:
        """The record with the chosen fields under their canonical names; bytes other than the image become str."""
        image, texts, label = self._fields
        values = {key: _plain(value) for key, value in raw.items() if key != image}
        record = {key: value for key, value in values.items() if key not in _CANONICAL and key != label}
        if image in raw:
            record["image"] = raw[image]
        if values.get(label) is not None:
            record["label"] = self._label(values[label])
        if self.class_names is not None and record.get("label", -1) >= 0:  # TFDS has -1 where it is unknown
            record["class_name"] = self._class_name(record["label"])
        captions = itertools.chain.from_iterable(_as_list(values.get(text)) for text in texts)
        record["texts"] = [str(c) for c in captions] if texts else _as_list(record.get("class_name"))
        return record

    def _drop_text_label(self, raw: Mapping[str, Any], asked: bool) -> None:
        """Text under a usual name of labels is not a label; asked for by name, it is an error."""
        image, texts, label = self._fields
        if label is not None and self.class_names is None and isinstance(raw.get(label), str | bytes):
            if asked:
                raise UserError(f"{self.name}: label field {label!r} holds text; labels here are integers or a TFDS ClassLabel")
            self._fields = (image, texts, None)

    def _label(self, value) -> int:
        """The class's place in the list of names, from 0, or -1 where it is unknown; raises UserError for a label beyond the list."""
        if self.class_names is not None and isinstance(value, str) and value in self._class_index:
            return self._class_index[value]
        try:
            label = int(value)
        except (TypeError, ValueError):
            raise BadRecord("unknown label") from None
        if self.class_names is not None and not -1 <= label < (count := len(self.class_names)):
            raise UserError(f"{self.name}: a record has label {label}, but there are {count} class names, 0 to {count - 1}; -1 is no label")
        return label

    def _set_classes(self, names: Sequence[str]) -> None:
        self.class_names = list(names)
        self._class_index = {name: i for i, name in enumerate(self.class_names)}

    def _class_name(self, label: int) -> str:
        return self.class_names[label].replace("_", " ")


def _first(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[c] for c in candidates if c in lower), None)


def near(word: str, words: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for an error message, empty when nothing is close."""
    match = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _plain(value):
    """NumPy and bytes -> plain Python; invalid UTF-8 becomes surrogates, which the text view refuses."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tolist() if value.ndim == 1 else value
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    return value


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


class MemorySource(BaseSource):
    """Records that are in memory already, in canonical form: `MemorySource([{"image": array, "texts": ["a cat"]}, ...])`."""

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str = "memory", class_names: Sequence[str] | None = None):
        super().__init__(name)
        if not len(records):
            raise UserError(f"{name}: the source is empty")
        self._records = records
        if class_names is not None:
            self._set_classes(class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = dict(self._records[index])
        record.setdefault("texts", [])
        if record.get("label") is not None:
            record["label"] = label = self._label(record["label"])
            if self.class_names is not None and label >= 0:
                record.setdefault("class_name", self._class_name(label))
        return record


class TfdsSource(BaseSource):
    """A prepared TFDS folder in ArrayRecord format, read through `tfds` without TensorFlow; pictures stay encoded."""

    def __init__(self, folder: str | os.PathLike, split: str = "train", *, image=None, text=None, label=None, name: str | None = None):
        super().__init__(name or os.fspath(folder), image, text, label)
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(os.fspath(folder))
        splits, features = builder.info.splits, builder.info.features
        base = re.match(r"\w*", split).group()
        if base not in splits and split != "all":
            raise UserError(f"{self.name}: no split {split!r}{near(base, splits)}; splits: {', '.join(splits)}")
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        if self._fields[0] is None and images and "image" not in images:
            self._fields = (images[0], *self._fields[1:])
        # A feature that holds several, such as COCO's captions = [{text, id}], is addressed as captions/text.
        inner = {key: list(getattr(getattr(features[key], "feature", None), "keys", list)()) for key in features}
        self._choose_fields([name for key in features for name in ([f"{key}/{sub}" for sub in inner[key]] or [key])])
        labels = dict(features.items()).get(self._fields[2])
        if isinstance(labels, tfds.features.ClassLabel) and labels.names:
            self._set_classes(labels.names)
        try:
            self._data = builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in images})
        except NotImplementedError:
            raise UserError(
                f"{self.name}: prepared as {builder.info.file_format.value}, which cannot be read by index; prepare it with "
                "--file_format=array_record"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.name}: split {split!r} is empty or not a split: {str(error).splitlines()[0]}") from None
        self._drop_text_label(self._data[0], asked=label is not None)
        self._names = _names_by_concept(os.fspath(folder))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        raw = {}
        for key, value in self._data[index].items():
            raw |= {f"{key}/{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
        return self._canonical(raw | self._names.get(_plain(raw.get("concept")), {}))


@functools.cache
def _names_by_concept(folder: str) -> dict[str, dict[str, str]]:
    """Names in other languages that lie beside the records (the embedded emoji's), by concept: {"name_ko": "문어", "name_zh_hant": ...}."""
    path = os.path.join(folder, "names_i18n.json.xz")
    if not os.path.exists(path):
        return {}
    with lzma.open(path) as file:
        data = json.load(file)
    fields = ["name_" + locale.replace("-", "_") for locale in data["locales"]]
    return {concept: dict(zip(fields, names, strict=True)) for concept, names in data["names"].items()}


class MixtureSource(BaseSource):
    """Several sources side by side; the loader draws from them in proportion to `weights`. Records gain `source_id`.

    The classes are those of all sources; classes of one name are one class. Of a mixture among them the sources are taken, with its weight
    divided among them by theirs.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], name: str | None = None):
        super().__init__(name or " + ".join(f"{s.name}*{w:g}" for s, w in zip(sources, weights, strict=True)))
        if not sources or min(weights) <= 0:
            raise UserError(f"mixture {self.name!r}: weights must be positive")
        self.sources, self.weights = [], []
        for source, weight in zip(sources, weights, strict=True):
            inner = isinstance(source, MixtureSource)
            self.sources += source.sources if inner else [source]
            self.weights += [weight * w / sum(source.weights) for w in source.weights] if inner else [weight]
        sources = self.sources
        self.broken = sum((Counter(s.broken) for s in sources), Counter())
        self._ends = list(itertools.accumulate(len(s) for s in sources))
        if any(s.class_names is not None for s in sources):
            self._set_classes(list(dict.fromkeys(itertools.chain.from_iterable(s.class_names or () for s in sources))))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        source_id = bisect.bisect_right(self._ends, index)
        start = self._ends[source_id - 1] if source_id else 0
        source = self.sources[source_id]
        record = source[index - start] | {"source_id": source_id}
        if self.class_names is None or record.get("label", -1) < 0:
            return record
        if source.class_names is None:
            raise UserError(f"{source.name}: its labels have no class names, and other sources of the mixture have class names")
        return record | {"label": self._class_index[source.class_names[record["label"]]]}


class ArrayRecordSource(BaseSource):
    """ArrayRecord files of serialised tf.train.Example, without TensorFlow. A feature with one value is read as a scalar."""

    def __init__(self, files: Sequence[str], name: str = "array_record", *, image=None, text=None, label=None):
        super().__init__(name, image, text, label)
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            self._data = ArrayRecordDataSource(list(files))
        except Exception as error:  # the C++ reader raises several classes
            raise UserError(f"{name}: not readable as ArrayRecord: {str(error).splitlines()[0]}") from None
        if not len(self._data):
            raise UserError(f"{name}: no records")
        fields = self._peek(self._features)
        if not fields:
            raise UserError(f"{name}: the first records are not serialised tf.train.Example")
        images = [key for key, value in fields.items() if isinstance(value, bytes) and _is_image(value)]
        if image is None and images:
            self._fields = (images[0], *self._fields[1:])
        self._choose_fields(fields)
        self._drop_text_label(fields, asked=label is not None)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        return self._canonical(self._features(index))

    def _features(self, index: int) -> dict[str, Any]:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            features = tf_example_pb2.Example.FromString(self._data[index]).features.feature
        except Exception:
            raise BadRecord("malformed record") from None
        values = {key: list(getattr(feature, feature.WhichOneof("kind") or "int64_list").value) for key, feature in features.items()}
        return {key: value[0] if len(value) == 1 else value for key, value in values.items()}


class ManifestSource(BaseSource):
    """A table with a row per example: .csv, .tsv (no quoting) or .jsonl. Image paths are relative to the table's folder.

    Only the rows' places in the file are held in memory, 8 bytes each.
    """

    def __init__(self, path: str | os.PathLike, *, image=None, text=None, label=None):
        super().__init__(os.fspath(path), image, text, label)
        self._path, self._folder, self._files = os.fspath(path), os.path.dirname(os.path.abspath(path)), FileReader()
        self._is_json = self._path.endswith("l")
        self._dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if self._path.endswith(".tsv") else {}
        rows = self._scan()
        if self._is_json:
            first = list(itertools.islice(rows, 100))
            rows = itertools.chain(first, rows)
            names = list(dict.fromkeys(key for _, _, row in first if isinstance(row, dict) for key in row))
        else:
            self._header = [field.strip() for field in next(rows, (0, 0, []))[2]]
            names = self._header
        self._choose_fields(names)
        if self._fields[0] is None:
            raise UserError(f"{path}: no column for the image path; name it with image=..., columns: {', '.join(names) or 'none'}")
        spans, labels = array.array("q"), set()
        for start, end, row in rows:
            spans.extend((start, end))
            if self._fields[2] is not None and (value := self._row_dict(row).get(self._fields[2])) is not None:
                labels.add(value)
        self._spans = np.frombuffer(spans, np.int64).reshape(-1, 2)
        if not len(self):
            raise UserError(f"{path}: no rows")
        if not all(isinstance(value, int) or re.fullmatch(r"-?\d+", str(value)) for value in labels):
            self._set_classes(sorted(map(str, labels)))

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        start, end = self._spans[index].tolist()
        raw = self._row_dict(next(iter(self._parse([self._files.read(self._path, start, end - start)])), None))
        path = raw.get(self._fields[0])
        if not path or not isinstance(path, str):
            raise BadRecord("malformed row")
        raw["path"] = os.path.join(self._folder, path)
        return self._canonical(raw | {self._fields[0]: read_file(raw["path"])})

    def _scan(self):
        """Yields (start, end, row) of every row that is not blank; a quoted CSV field may hold line ends."""
        place = 0
        with open(self._path, "rb") as file:

            def lines():
                nonlocal place
                for line in file:
                    place += len(line)
                    yield line

            start = 0
            try:
                for row in self._parse(lines()):
                    if row:
                        yield start, place, row
                    start = place
            except csv.Error as error:
                raise UserError(f"{self._path}: {error} in the row that starts at byte {start}") from None

    def _parse(self, lines: Iterable[bytes]):
        text = (line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape") for line in lines)
        return map(_loads, text) if self._is_json else csv.reader(text, **self._dialect)

    def _row_dict(self, row) -> dict[str, Any]:
        """The row by column name; empty for a row that does not fit the table."""
        if self._is_json:
            return dict(row) if isinstance(row, dict) else {}
        return dict(zip(self._header, row, strict=True)) if len(row or ()) == len(self._header) else {}


def _loads(text: str):
    """JSON, None for a blank line, and the text itself where it is not JSON."""
    try:
        return json.loads(text) if text.strip() else None
    except ValueError:
        return text


class FolderSource(BaseSource):
    """A folder of pictures. Each sub-folder is a class (label, class_name, caption) with its pictures at any depth below.

    Pictures that lie in the folder itself have no label. A caption may lie beside any picture, in a .txt file of the same name.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__(os.fspath(folder))
        self._folder, classes, self._paths, self._labels = os.fspath(folder), [], [], array.array("q")
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            paths = (
                [entry.name]
                if entry.is_file()
                else sorted(os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(entry.path) for file in files)
            )
            paths = [path for path in paths if path.lower().endswith(IMAGE_EXTENSIONS)]
            self._paths += paths
            self._labels.extend([-1 if entry.is_file() else len(classes)] * len(paths))
            if paths and not entry.is_file():
                classes.append(entry.name)
        if not self._paths:
            raise UserError(
                f"{folder}: no pictures ({', '.join(IMAGE_EXTENSIONS)}), tar shards, ArrayRecord files or dataset_info.json in it"
            )
        if classes:
            self._set_classes(classes)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = os.path.join(self._folder, self._paths[index])
        record = {"image": read_file(path), "path": path, "texts": []}
        if (label := self._labels[index]) >= 0:
            name = self._class_name(label)
            record |= {"label": label, "class_name": name, "texts": [name]}
        caption = os.path.splitext(path)[0] + ".txt"
        if os.path.exists(caption):
            record["texts"] = [_plain(read_file(caption)).strip()]
        return record


class FileReader:
    """Reads parts of files by offset, from any thread. Keeps some files open; a copy in another process starts with none."""

    def __init__(self, keep: int = 256):
        self._keep, self._open = keep, {}

    def __getstate__(self):
        return {"_keep": self._keep, "_open": {}}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Raises BadRecord when the file cannot be read or ends before."""
        file = self._open.get(path)
        try:
            if file is None:
                file = open(path, "rb", buffering=0)  # closed when no longer referenced
                if len(self._open) < self._keep:
                    self._open[path] = file
            data = os.pread(file.fileno(), size, offset)
        except OSError:
            raise BadRecord("unreadable file") from None
        if len(data) < size:
            raise BadRecord("truncated file")
        return data


def read_file(path: str) -> bytes:
    """A whole file; raises BadRecord."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadRecord("missing file") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise BadRecord("unreadable file") from None


# Where a sentence ends: marks and closing quotes or brackets, then a space and no lower-case letter; after full-width marks anything.
_SENTENCE_END = re.compile(r"""[.!?…؟।]+["'”’»)\]]* (?=[^a-z])|[。！？]+[」』”’）]* ?(?=.)""")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line. Marks alone decide: an abbreviation before a capital ends a sentence, too."""
    text, ends = " ".join(text.split()), [0]
    ends += [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end].strip() for start, end in itertools.pairwise([*ends, len(text)]) if start < end]


class SentencePairSource(BaseSource):
    """Pairs of consecutive sentences of plain text, the text/text pairs of CLIPPO: `sentences`, two strings, and `text_pair`, 1.

    Of .jsonl files the field `text` of each line is a document; of others, a paragraph, up to a blank line or 64 KiB. Of a document with n
    sentences there are n - 1 records. 40 bytes a document are held in memory; the files are read through once.
    """

    def __init__(self, files: Sequence[str], name: str = "text"):
        super().__init__(name)
        self._paths, self._files = list(files), FileReader()
        spans = array.array("q")
        for number, path in enumerate(self._paths):
            with open(path, "rb") as file:
                for start, document in self._documents(path, file):
                    if (pairs := len(self._sentences(path, document)) - 1) > 0:
                        spans.extend((number, start, len(document), pairs))
        self._spans = np.frombuffer(spans, np.int64).reshape(-1, 4)
        self._ends = self._spans[:, 3].cumsum()
        if not len(self._spans):
            raise UserError(f"{name}: no document with two sentences" + (" in a field 'text'" if self._is_json(path) else ""))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        document = int(np.searchsorted(self._ends, index, "right"))
        number, start, size, pairs = self._spans[document].tolist()
        path, first = self._paths[number], index - int(self._ends[document]) + pairs
        sentences = self._sentences(path, self._files.read(path, start, size))[first : first + 2]
        if len(sentences) < 2:
            raise BadRecord("changed file")
        return {"sentences": sentences, "texts": sentences, "text_pair": 1}

    @staticmethod
    def _is_json(path: str) -> bool:
        return path.endswith((".jsonl", ".json"))

    def _documents(self, path: str, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """Yields (offset, bytes) of every document."""
        start, document = 0, b""
        for line in lines:
            document += line
            if self._is_json(path) or not line.strip() or len(document) > 2**16:
                yield start, document
                start, document = start + len(document), b""
        yield start, document

    def _sentences(self, path: str, document: bytes) -> list[str]:
        text = document.decode("utf-8", "replace")
        if self._is_json(path):
            row = _loads(text)
            text = row.get("text") if isinstance(row, dict) else None
        return split_sentences(text) if isinstance(text, str) else []


def _is_image(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or data[8:12] == b"WEBP"


def make_source(
    spec: str, split: str = "train", *, image: str | None = None, text: str | Sequence[str] | None = None, label: str | None = None
) -> Source:
    """Builds a source from a string. `image`, `text` (one name, or several) and `label` name the fields where their usual names do not fit.

    spec is one of
        emoji, openclipart                    an embedded set
        scenes, scenes?objects=2-3&size=96    emoji pictures composed on a canvas, with boxes: `clip_jax.data.scenes`
        tfds:NAME[/CONFIG]                    a data set prepared by TFDS, in TFDS_DATA_DIR or ~/tensorflow_datasets
        a folder with dataset_info.json       the same, anywhere
        *.array_record*                       a file or pattern: ArrayRecord of tf.train.Example
        *.tar, {00000..00099}.tar, a folder   WebDataset shards as img2dataset writes them
        *.csv, *.tsv, *.jsonl                 a table with image paths
        a folder with one sub-folder a class  pictures
        text:FILE                             pairs of consecutive sentences of .txt or .jsonl files (CLIPPO's text/text pairs)
        SPEC?where=FIELD:VALUE                a selection of it by a field: `clip_jax.data.selection`
        SPEC?index=FOLDER                     what `clip_jax.data.filter` kept of it
        SPEC?columns=PATH                     it with fields that lie beside it: `clip_jax.data.columns`
        SPEC*3 + SPEC*1                       a mixture: numbers of examples in this proportion, 1 if not given; size: that of the source
    `split` is a split of a TFDS data set, slices such as "train[:90%]" included; in all others it replaces "{split}" in the spec, or is a
    sub-folder of a folder. Raises UserError when there is no such data, or nothing in it.
    """
    from clip_jax.data import selection

    if not spec.strip():
        raise UserError("data: no data set is named; give a name such as emoji, or a path")
    parts = [part.strip() for part in spec.split(" + ")]
    weights = [re.fullmatch(r"(.+)\*(size|\d+(?:\.\d+)?)", part) for part in parts]
    if len(parts) > 1:
        sources = [
            make_source(match[1].strip() if match else part, split, image=image, text=text, label=label)
            for match, part in zip(weights, parts, strict=True)
        ]
        weights = [match[2] if match else "1" for match in weights]
        return MixtureSource(sources, [len(s) if w == "size" else float(w) for s, w in zip(sources, weights, strict=True)])
    fields = dict(image=image, text=text, label=label)
    if match := selection.PATTERN.fullmatch(spec):
        return selection.select(make_source(match[1], split, **fields), match[2], spec)
    if match := re.fullmatch(r"(.+)\?index=([^?]+)", spec):
        from clip_jax.data.filter import IndexedSource

        return IndexedSource(make_source(match[1], split, **fields), match[2])
    if match := re.fullmatch(r"(.+)\?columns=([^?]+)", spec):
        from clip_jax.data.columns import ColumnsSource

        return ColumnsSource(make_source(match[1], split, **fields), match[2])
    if match := re.fullmatch(r"scenes(?:\?(.*))?", spec):
        from clip_jax.data.scenes import make_scenes

        if any(fields.values()):
            raise UserError(f"{spec}: scenes have no fields to choose from; the captions are `texts`")
        return make_scenes(match[1] or "", split, spec)
    if spec.startswith("tfds:"):
        return TfdsSource(_tfds_folder(spec.removeprefix("tfds:")), split, name=spec, **fields)
    if spec.startswith("text:"):
        return SentencePairSource(_expand(spec.removeprefix("text:").replace("{split}", split)), spec)
    if embedded := _newest_version(EMBEDDED / spec) if re.fullmatch(r"\w+", spec) else None:
        return TfdsSource(embedded, split, name=spec, **fields)
    if prepared := _newest_version(Path(spec)):
        return TfdsSource(prepared, split, name=spec, **fields)
    return _source_at(spec, split, fields)


def _source_at(spec, split, fields):
    """The source at a path or pattern of paths, by its ending; raises UserError."""
    path = spec.replace("{split}", split)
    if os.path.isdir(os.path.join(path, split)):
        path = os.path.join(path, split)
    elif path == spec and split != "train":
        raise UserError(f"{spec}: no split {split!r}: this kind of data has the split 'train', unless {{split}} stands in its path")
    if os.path.isdir(path):
        path = next((pattern for end in ("*.tar", "*.array_record*") if glob.glob(pattern := os.path.join(glob.escape(path), end))), path)
    if re.search(r"\.(tar\.\w+|tgz)$", path):
        raise UserError(f"{path}: a compressed tar cannot be read by offset; decompress it")
    if path.endswith(".tar"):
        from clip_jax.data.webdataset import WebDatasetSource

        return WebDatasetSource(_expand(path), spec, **fields)
    if ".array_record" in os.path.basename(path):
        return ArrayRecordSource(_expand(path), spec, **fields)
    if path.endswith((".csv", ".tsv", ".jsonl")) and os.path.isfile(path):
        return ManifestSource(path, **fields)
    if os.path.isdir(path):
        if any(fields.values()):
            raise UserError(f"{spec}: a folder of pictures has no fields to choose from")
        return FolderSource(path)
    known = sorted(folder.name for folder in EMBEDDED.iterdir() if _newest_version(folder)) if EMBEDDED.is_dir() else []
    if os.path.exists(path):
        raise UserError(f"{spec}: not a kind of data that is known; use .tar, .array_record, .csv, .tsv, .jsonl or a folder")
    raise UserError(f"{spec}: no such file or folder{near(spec, known)}; embedded sets: {', '.join(known)}")


def configured_source(data: Mapping[str, Any], spec: str = "") -> Source:
    """The source of the section `config.data`, or another one that is read as the section says; raises UserError as `make_source` does."""
    return make_source(spec or data["source"], data["split"], **{name: data[name] or None for name in ("image", "text", "label")})


def _expand(pattern: str) -> list[str]:
    """Files of a path with wildcards, or with ranges such as {00000..00099}, every one of which must exist."""
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        low, high = match.groups()
        parts = [f"{pattern[: match.start()]}{i:0{len(low)}d}{pattern[match.end() :]}" for i in range(int(low), int(high) + 1)]
        return [file for part in parts for file in _expand(part)]
    files = [pattern] if os.path.isfile(pattern) else sorted(file for file in glob.glob(pattern) if os.path.isfile(file))
    if not files:
        raise UserError(f"{pattern}: no such file")
    return files


def _tfds_folder(name: str) -> Path:
    root = Path(os.environ.get("TFDS_DATA_DIR", Path.home() / "tensorflow_datasets"))
    if folder := _newest_version(root / name):
        return folder
    configs = [path.name for path in (root / name).glob("*") if _newest_version(path)] if (root / name).is_dir() else []
    if configs:
        raise UserError(f"tfds:{name}: name one of its configurations: {', '.join(sorted(configs))}")
    known = sorted(path.name for path in root.glob("*")) if root.is_dir() else []
    raise UserError(
        f"tfds:{name}: not prepared in {root}{near(name, known)}; set TFDS_DATA_DIR, or prepare it with: tfds build {name} "
        f"--file_format=array_record --data_dir={root}"
    )


def _newest_version(folder: Path) -> Path | None:
    """The folder itself if it is a prepared TFDS folder, or its newest version that is."""
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [path for path in folder.glob("*.*.*") if (path / "dataset_info.json").is_file()]
    return max(versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")], default=None)
