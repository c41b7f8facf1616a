"""Data sets prepared by TFDS (TensorFlow Datasets), the embedded ones among them."""

import functools
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np

from clip_jax.data.blocks import RUN, Block, runs
from clip_jax.data.records import BadRecord, BaseSource, plain
from clip_jax.data.sources import example
from clip_jax.errors import UserError, did_you_mean

#: Types whose values protobuf gives back as TFDS does.
_PLAIN = np.object_, np.int32, np.int64, np.float32
EMBEDDED = Path(__file__).parents[1] / "embedded"


class TfdsSource(BaseSource):
    """A prepared TFDS folder in ArrayRecord format, read without TensorFlow; images stay encoded.

    A block of records is read by one call.

    Args:
      folder: the folder that holds dataset_info.json.
      split: str, a split or slices of splits, such as "train[:90%]+test".
      image: name of the image feature, or None.
      text: name or names of the caption features, or None.
      label: name of the label feature, or None.
      name: str, for messages; the folder by default.

    Raises UserError for an unknown or empty split, an unknown field, and a folder in another format.
    """

    def __init__(self, folder, split="train", *, image=None, text=None, label=None, name=None):
        super().__init__(name or os.fspath(folder), image, text, label)
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(os.fspath(folder))
        splits, features = builder.info.splits, builder.info.features
        base = re.match(r"\w*", split).group()
        if base not in splits and split != "all":
            raise UserError(f"{self.name}: no split {split!r}{did_you_mean(base, splits)}; splits: {', '.join(splits)}")
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        if self._fields.image is None and images and "image" not in images:
            self._fields = self._fields._replace(image=images[0])
        # A feature of dicts, such as COCO's captions = [{text, id}], is addressed as captions/text.
        inner = {key: list(getattr(getattr(features[key], "feature", None), "keys", list)()) for key in features}
        self._choose_fields([name for key in features for name in ([f"{key}/{sub}" for sub in inner[key]] or [key])])
        labels = dict(features.items()).get(self._fields.label)
        labels = getattr(labels, "feature", labels)  # a sequence holds several labels
        if isinstance(labels, tfds.features.ClassLabel) and labels.names:
            self._set_classes(labels.names)
        try:
            self._examples = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except NotImplementedError:
            raise UserError(
                f"{self.name}: prepared as {builder.info.file_format.value}, which cannot be read by index; prepare it "
                f"with --file_format=array_record, or read its files, such as {folder}/*.tfrecord*"
            ) from None
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.name}: split {split!r} is empty or not a split: {reason}") from None
        self._parse = _parser(features, {key: tfds.decode.SkipDecoding() for key in images})
        self.blocks = runs(len(self))
        self._check_label_field(self._parse(self._examples[0]), asked=label is not None)
        self._files_of_labels = (os.fspath(folder),)
        self._names = _names_by_concept(os.fspath(folder))

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        try:
            found = self._examples[index]
        except RuntimeError:  # a damaged chunk of the file
            raise BadRecord("unreadable record") from None
        return self._record(found)

    def read_block(self, number):
        first = number * RUN
        count = min(RUN, len(self) - first)
        try:
            found = self._examples.__getitems__(range(first, first + count))
        except RuntimeError:  # one damaged chunk fails the call
            return Block(count, lambda index: self[first + index])
        return Block(count, lambda index: self._record(found[index]))

    def _record(self, data):
        raw = {}
        for key, value in self._parse(data).items():
            raw |= {f"{key}/{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
        return self._canonical(raw | self._names.get(plain(raw.get("concept")), {}))


def _parser(features, decoders):
    """Returns the function that parses the bytes of an example into `{feature: value}`.

    TFDS takes 0.3 ms an example, longer than a small image takes to decode. So bytes, numbers and sequences of them are
    read here. TFDS parses the examples of a data set that has other features.
    """
    import tensorflow_datasets as tfds

    is_list = {name: type(feature) is tfds.features.Sequence for name, feature in features.items()}
    items = [
        features[name].feature if some else features[name] for name, some in is_list.items() if name not in decoders
    ]
    if all(map(_is_plain, items)):
        return functools.partial(_parse, is_list)
    return functools.partial(features.deserialize_example_np, decoders=decoders)


def _is_plain(feature):
    """Returns whether a feature is serialised as bytes or as a number that protobuf and NumPy give back alike."""
    from tensorflow_datasets import features

    if type(feature) not in (features.Text, features.ClassLabel, features.Scalar, features.Tensor):
        return False
    value, stored = feature.get_tensor_info(), feature.get_serialized_info()
    is_same = value.shape == stored.shape == () and value.np_dtype == stored.np_dtype and not stored.optional
    return is_same and value.np_dtype in _PLAIN


def _parse(is_list, data):
    found, values = example.parse(data), {}
    for name, some in is_list.items():
        value = found.get(name, [])
        if isinstance(value, list) and not some:
            raise BadRecord(f"{len(value)} values of the feature {name}")
        values[name] = [value] if some and not isinstance(value, list) else value
    return values


@functools.cache
def _names_by_concept(folder):
    """Returns the names of the emoji set's concepts in other languages: `{concept: {"name_ko": "문어", ...}}`.

    They lie in names_i18n.json.xz next to the records; empty for a folder without that file.
    """
    path = os.path.join(folder, "names_i18n.json.xz")
    if not os.path.exists(path):
        return {}
    with lzma.open(path) as file:
        data = json.load(file)
    fields = ["name_" + locale.replace("-", "_") for locale in data["locales"]]
    return {concept: dict(zip(fields, names, strict=True)) for concept, names in data["names"].items()}


def prepared_folder(name):
    """Returns the folder of "NAME" or "NAME/CONFIG" in TFDS_DATA_DIR; raises UserError when it is not prepared."""
    root = Path(os.environ.get("TFDS_DATA_DIR", Path.home() / "tensorflow_datasets"))
    if folder := newest_version(root / name):
        return folder
    configs = [path.name for path in (root / name).glob("*") if newest_version(path)] if (root / name).is_dir() else []
    if configs:
        raise UserError(f"tfds:{name}: name one of its configurations: {', '.join(sorted(configs))}")
    known = sorted(path.name for path in root.glob("*")) if root.is_dir() else []
    raise UserError(
        f"tfds:{name}: not prepared in {root}{did_you_mean(name, known)}; set TFDS_DATA_DIR, or prepare it with: "
        f"tfds build {name} --file_format=array_record --data_dir={root}"
    )


def newest_version(folder):
    """Returns the folder if it is a prepared TFDS folder, else its newest version that is one, else None."""
    folder = Path(folder)
    if (folder / "dataset_info.json").is_file():  # Hugging Face's `save_to_disk` writes it too, with a state.json
        return None if (folder / "state.json").is_file() else folder
    versions = [path for path in folder.glob("*.*.*") if (path / "dataset_info.json").is_file()]
    return max(versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")], default=None)


def embedded_names():
    """Returns the sorted names of the data sets in the package."""
    return sorted(folder.name for folder in EMBEDDED.iterdir() if newest_version(folder)) if EMBEDDED.is_dir() else []


def embedded_folder(name):
    """Returns the folder of a data set in the package, or None when there is none of that name."""
    return newest_version(EMBEDDED / name) if re.fullmatch(r"\w+", name) else None


def embedded(name, split):
    """Returns the source of a data set in the package, such as `emoji`; raises UserError for an unknown split."""
    return TfdsSource(embedded_folder(name), split, name=name)
