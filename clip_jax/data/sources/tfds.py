"""Data sets that TFDS has prepared, the embedded ones among them."""

import functools
import json
import lzma
import os
import re
from pathlib import Path

from clip_jax.data.records import BaseSource, plain
from clip_jax.errors import UserError, did_you_mean

EMBEDDED = Path(__file__).parents[1] / "embedded"


class TfdsSource(BaseSource):
    """A prepared TFDS folder in ArrayRecord format, read through `tfds` without TensorFlow; pictures stay encoded."""

    def __init__(self, folder, split="train", *, image=None, text=None, label=None, name=None):
        super().__init__(name or os.fspath(folder), image, text, label)
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(os.fspath(folder))
        splits, features = builder.info.splits, builder.info.features
        base = re.match(r"\w*", split).group()
        if base not in splits and split != "all":
            raise UserError(f"{self.name}: no split {split!r}{did_you_mean(base, splits)}; splits: {', '.join(splits)}")
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
            raise UserError(
                f"{self.name}: split {split!r} is empty or not a split: {str(error).splitlines()[0]}"
            ) from None
        self._drop_text_label(self._data[0], asked=label is not None)
        self._names = _names_by_concept(os.fspath(folder))

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        raw = {}
        for key, value in self._data[index].items():
            raw |= {f"{key}/{sub}": item for sub, item in value.items()} if isinstance(value, dict) else {key: value}
        return self._canonical(raw | self._names.get(plain(raw.get("concept")), {}))


@functools.cache
def _names_by_concept(folder):
    """Names in other languages that lie beside the records (the embedded emoji's), by concept: {"name_ko": "문어", "name_zh_hant": ...}."""
    path = os.path.join(folder, "names_i18n.json.xz")
    if not os.path.exists(path):
        return {}
    with lzma.open(path) as file:
        data = json.load(file)
    fields = ["name_" + locale.replace("-", "_") for locale in data["locales"]]
    return {concept: dict(zip(fields, names, strict=True)) for concept, names in data["names"].items()}


def prepared_folder(name):
    root = Path(os.environ.get("TFDS_DATA_DIR", Path.home() / "tensorflow_datasets"))
    if folder := newest_version(root / name):
        return folder
    configs = [path.name for path in (root / name).glob("*") if newest_version(path)] if (root / name).is_dir() else []
    if configs:
        raise UserError(f"tfds:{name}: name one of its configurations: {', '.join(sorted(configs))}")
    known = sorted(path.name for path in root.glob("*")) if root.is_dir() else []
    raise UserError(
        f"tfds:{name}: not prepared in {root}{did_you_mean(name, known)}; set TFDS_DATA_DIR, or prepare it with: tfds build {name} "
        f"--file_format=array_record --data_dir={root}"
    )


def newest_version(folder):
    """The folder itself if it is a prepared TFDS folder, else the newest version in it that is one, else None."""
    folder = Path(folder)
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [path for path in folder.glob("*.*.*") if (path / "dataset_info.json").is_file()]
    return max(versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")], default=None)


def embedded_names():
    """The names of the data sets that come with the package."""
    return sorted(folder.name for folder in EMBEDDED.iterdir() if newest_version(folder)) if EMBEDDED.is_dir() else []


def embedded_folder(name):
    """The folder of a data set that comes with the package, or None when there is none of that name."""
    return newest_version(EMBEDDED / name) if re.fullmatch(r"\w+", name) else None


def embedded(name, split):
    """The source of a data set that comes with the package, such as `emoji`; raises UserError for an unknown split."""
    return TfdsSource(embedded_folder(name), split, name=name)
