"""Writes prepared TFDS folders in ArrayRecord format, without TensorFlow, byte for byte reproducible."""

import argparse
import shutil
from pathlib import Path

from clip_jax.data.files import cache_folder

# TFDS and Grain expect one record per group, so random access decompresses one record only. Brotli has a built-in
# dictionary, which compresses even a few hundred bytes of text.
_OPTIONS = "group_size:1,brotli:11"


def write_dataset(
    folder,
    *,
    name,
    version,
    features,
    splits,
    description,
    homepage,
    citation,
    license_text,
    extra_files=None,
):
    """Writes one shard for each split, and the metadata that `tfds.builder_from_directory(folder)` needs.

    Args:
      folder: the folder, such as `.../emoji/1.0.0`. It is replaced only after everything is written.
      name, version: of the data set in TFDS.
      features: `{field: tfds.features connector}`. Images are given as encoded bytes, texts as str.
      splits: `{split: records}`, written in this order. No split may be empty.
      description, homepage, citation, license_text: for `dataset_info.json`; the last also for `LICENSE`.
      extra_files: `{file name: bytes}` of further files in the folder.

    Returns:
      `{split: number of records}`.

    Raises ValueError when a split has no records.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    connector = tfds.features.FeaturesDict(dict(features))
    serializer = tfds.core.example_serializer.ExampleSerializer(connector.get_serialized_info())
    infos = []
    for split, records in splits.items():
        writer = ArrayRecordWriter(str(partial / f"{name}-{split}.array_record-00000-of-00001"), _OPTIONS)
        count = size = 0
        for record in records:
            example = serializer.get_tf_example(connector.encode_example(record))
            data = example.SerializeToString(deterministic=True)  # the order of a protobuf map is unspecified
            writer.write(data)
            count, size = count + 1, size + len(data)
        writer.close()
        if not count:
            raise ValueError(f"split {split!r} of {name!r} has no records")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[count], num_bytes=size))

    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features=connector,
        split_infos=infos,
        version=version,
        check_data=False,  # the check reads through tf.data
        description=description,
        homepage=homepage,
        citation=citation,
        license=license_text,
    )
    for file_name, content in (extra_files or {}).items():
        (partial / file_name).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return {info.name: info.num_examples for info in infos}


def command(doc, build, out):
    """Runs a builder's command line and prints the number of records of each split.

    Args:
      doc: the docstring of the builder's module; its first line is the help text.
      build: function `(cache folder, output folder) -> {split: number of records}`.
      out: the default output folder.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(cache_folder()),
        help="folder of the downloaded packages (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=out, help="folder to write or replace (default: %(default)s)")
    args = parser.parse_args()
    for split, count in build(args.cache, args.out).items():
        print(f"{split:20} {count:6}")
