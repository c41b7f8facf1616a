"""Writes prepared TFDS directories in ArrayRecord format, without TensorFlow and byte for byte reproducibly."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

# One record per group is what TFDS and Grain ask for: random access never decompresses a neighbour. Brotli brings a dictionary of
# its own, which is what helps with a few hundred bytes of text at a time.
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
    """Writes one shard per split, and the metadata that `tfds.builder_from_directory(folder)` needs.

    Args:
        folder: the folder to (re)place, e.g. `.../emoji/1.0.0`. It changes only once everything has been written.
        name, version: of the data set, as TFDS names it.
        features: field name -> `tfds.features` connector. Images are given as encoded bytes, texts as str.
        splits: split name -> records, written in the order given. A split may not be empty.
        description, homepage, citation, license_text: go into `dataset_info.json`; the last also into `LICENSE`.
        extra_files: file name -> content of what is to lie beside the records.

    Returns:
        split name -> number of records.

    Raises:
        ValueError: if a split has no records.
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
            data = example.SerializeToString(deterministic=True)  # protobuf maps have no order of their own
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
    """The command line of a builder: `build(cache folder, output folder)` gives the records of each split, which are printed."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/clip_jax").expanduser(), help="where packages are kept"
    )
    parser.add_argument("--out", type=Path, default=out, help="the prepared TFDS folder to (re)place")
    args = parser.parse_args()
    for split, count in build(args.cache, args.out).items():
        print(f"{split:20} {count:6}")
