"""The order by blocks of real formats: tar, Parquet and ArrayRecord give the same rows on any hosts and workers."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_helpers import PLAIN, assert_equal, concatenate, encoded, loader, take
from tensorflow_datasets.proto import tf_example_pb2

from clip_jax.data.reading import Reading
from clip_jax.data.sources import make_source
from clip_jax.tools import manifest

COUNT, SHARD = 96, 24  # records, and of a shard
END = COUNT // 16 - 1  # a step of 16 rows in which the epoch ends


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            fields = {"jpg": encoded(number, "JPEG"), "txt": b"caption %d" % number}
            for ending, data in (fields | {"json": json.dumps({"number": number}).encode()}).items():
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(path, numbers):
    images = [{"bytes": encoded(number, "JPEG"), "path": None} for number in numbers]
    table = pa.table({"image": images, "caption": [f"caption {n}" for n in numbers], "number": list(numbers)})
    pq.write_table(table, path, row_group_size=6)


def write_array_record(path, numbers):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for number in numbers:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(encoded(number, "JPEG"))
        example.features.feature["caption"].bytes_list.value.append(b"caption %d" % number)
        writer.write(example.SerializeToString())
    writer.close()


WRITERS = {"tar": write_tar, "parquet": write_parquet, "array_record": write_array_record}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source of each format, by a manifest with blocks of 6 records, and their mixture."""
    names = {}
    for kind, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(kind)
        for first in range(0, COUNT, SHARD):
            write(folder / f"{first:05d}.{kind}", range(first, first + SHARD))
        names[kind] = f"{folder}/all.manifest.parquet"
        assert manifest.main([f"{folder}/*.{kind}", f"--out={names[kind]}", "--length=6"]) == 0
    return {name: make_source(spec) for name, spec in (names | {"mixture": " + ".join(names.values())}).items()}


def batches(source, **arguments):
    return loader(source, PLAIN, batch_size=16, reading=Reading(lanes=8, window=2), **(dict(threads=0) | arguments))


@pytest.mark.parametrize("kind", [*WRITERS, "mixture"])
def test_any_number_of_hosts_gives_the_same_rows(kind, sources):
    source = sources[kind]
    assert sum(part.blocks.tolist() == [6] * 16 for part in getattr(source, "sources", [source])) in (1, 3)
    straight = take(batches(source), END + 2)
    if kind != "mixture":
        assert sorted(np.concatenate([b["example_id"] for b in straight[: END + 1]]).tolist()) == list(range(COUNT))
        texts = {tuple(row) for b in straight[: END + 1] for row in b["text"].tolist()}
        assert len(texts) == COUNT  # the texts tell that each record was read
    for start in (0, END, 777):
        expected = straight[start : start + 2] if start <= END else take(batches(source, start_step=start), 2)
        for hosts in (2, 4, 8):
            shares = [batches(source, host=host, hosts=hosts, start_step=start) for host in range(hosts)]
            assert_equal(concatenate([take(share, 2) for share in shares]), expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_rows(workers, sources):
    several = batches(sources["mixture"], workers=workers, start_step=END - 1)
    assert_equal(take(several, 3), take(batches(sources["mixture"], start_step=END - 1), 3))
    several.close()
