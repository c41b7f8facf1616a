"""The same records in every format of shards give the same batches, on any hosts and workers."""

import json
import struct

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_helpers import VIEWS, assert_equal, concatenate, encoded, loader, take, write_tar
from example_helpers import tfrecord, write_array_record
from test_mds import shard as mds

from clip_jax.data.reading import Reading
from clip_jax.data.sources import make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.shards import ShardSource, format_of, scan_shards
from clip_jax.errors import UserError
from clip_jax.tools import manifest

SHARDS, LENGTH = 9, 8


def rows(shard):
    numbers = range(LENGTH * shard, LENGTH * (shard + 1))
    return [{"image": encoded(i), "caption": f"picture {i}", "number": i} for i in numbers]


def write_samples(path, rows):
    members = []
    for row in rows:
        about = json.dumps({"caption": row["caption"], "number": row["number"]}).encode()
        members += [(f"{row['number']:09d}.png", row["image"]), (f"{row['number']:09d}.json", about)]
    write_tar(path, members)


def write_mds(path, rows):
    columns = [("caption", "str", None), ("image", "png", None), ("number", "int", 8)]
    values = [[row["caption"].encode(), row["image"], struct.pack("<q", row["number"])] for row in rows]
    path.write_bytes(mds(values, columns))


WRITERS = {
    "tar": write_samples,
    "parquet": lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path),
    "tfrecord": lambda path, rows: path.write_bytes(tfrecord(rows)),
    "array_record": write_array_record,
    "mds": write_mds,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("formats"), {}
    for ending, write in WRITERS.items():
        paths = [folder / f"{number}.{ending}" for number in range(SHARDS)]
        for number, path in enumerate(paths):
            write(path, rows(number))
        kind, paths = format_of(str(paths[0])), list(map(str, paths))
        blocks, broken = scan_shards(kind, paths)
        assert blocks.samples.tolist() == [LENGTH] * SHARDS and not broken
        made[ending] = ShardSource(kind, paths, blocks, ending)
    return made


def by_blocks(source, **arguments):
    return loader(source, VIEWS, reading=Reading("blocks", 8, 2), threads=0, **arguments)


@pytest.mark.parametrize("ending", WRITERS)
def test_batches_are_equal_in_all_formats_and_on_all_hosts(sources, ending):
    for start, hosts in ((0, 2), (7, 1), (7, 4), (777, 8)):  # the end of the epoch of 72 records is in step 8
        straight = take(by_blocks(sources["tar"], start_step=start), 3)
        shares = [by_blocks(sources[ending], start_step=start, host=h, hosts=hosts) for h in range(hosts)]
        assert_equal(concatenate([take(share, 3) for share in shares]), straight)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(sources, workers):
    mixture = MixtureSource(list(sources.values()), [1.0] * len(sources))
    many = by_blocks(mixture, workers=workers)
    assert_equal(take(many, 4), take(by_blocks(mixture), 4))
    many.close()


@pytest.mark.parametrize("ending", ["array_record", "mds"])
def test_manifest(tmp_path, sources, ending):
    """A manifest gives the batches of the shards, and tells a shard that shrank."""
    for number in range(SHARDS):
        WRITERS[ending](tmp_path / f"{number}.{ending}", rows(number))
    path = tmp_path / "x.manifest.parquet"
    assert manifest.main([str(tmp_path), f"--out={path}", "--processes=1"]) == 0
    source = make_source(str(path))
    assert source.sequential
    assert_equal(take(by_blocks(source, start_step=7), 3), take(by_blocks(sources["tar"], start_step=7), 3))
    WRITERS[ending](tmp_path / f"4.{ending}", rows(4)[:-1])
    with pytest.raises(UserError, match=f"4.{ending} changed since the manifest was made; make it again: python -m "):
        source.read_block(4)
