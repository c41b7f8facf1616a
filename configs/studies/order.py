"""The order by blocks against a full shuffle, on shards in random order and on sorted ones, the worst case.

    python configs/studies/order.py runs/shards  # writes the emoji, 64 to a tar shard, in two orders, with manifests
    python -m clip_jax.study --config=configs/studies/order.py --workdir=runs/order

A shard is a block. Sorted shards hold neighbours in subgroup and name. The rows are a full shuffle, the default lanes
and window on both kinds of shards, and two lanes without a window of blocks.
"""

import io
import json
import pathlib
import sys
import tarfile

import numpy as np

from clip_jax.data.sources import make_source
from clip_jax.study import Row, Study
from clip_jax.tools import manifest

STUDIES = ("",)
SHARDS = "runs/shards/{}.manifest.parquet"
ROWS = {
    "full shuffle": ("sorted", "data.order=records"),
    "blocks: 8 lanes, windows of 8 blocks (default)": ("shuffled", "data.order=blocks"),
    "the same, sorted shards": ("sorted", "data.order=blocks"),
    "sorted shards, 2 lanes, windows of 1 block": ("sorted", "data.order=blocks", "data.lanes=2", "data.window=1"),
}
CELLS = [(concept, vendor) for concept in ("seen", "unseen") for vendor in ("seen", "unseen")]


def get_study(variant=""):
    config = f"{pathlib.Path(__file__).parents[1] / 'clip.py'}:emoji"
    rows = tuple(
        Row(name, config, (f"data.source={SHARDS.format(kind)}", "train.steps=350", *overrides))
        for name, (kind, *overrides) in ROWS.items()
    )
    metrics = {f"{c} concept, {v} vendor": f"emoji/{c}_concept_{v}_vendor/top1" for c, v in CELLS}
    # The shards are not known as the embedded data set, whose tasks are left out for other data.
    return Study("Orders", rows, metrics, tasks=("emoji()",))


def write_shards(folder, records, length=64):
    """Writes records of the embedded emoji as tar shards of `length` records, and their manifest beside the folder."""
    folder.mkdir(parents=True)
    for number, record in enumerate(records):
        fields = {key: value for key, value in record.items() if key not in ("image", "texts", "label", "class_name")}
        members = {"png": record["image"], "txt": record["name"].encode(), "json": json.dumps(fields).encode()}
        with tarfile.open(folder / f"{number // length:05d}.tar", "a") as tar:
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    manifest.main([f"{folder}/*.tar", f"--out={folder}.manifest.parquet"])


if __name__ == "__main__":
    place, source = pathlib.Path(sys.argv[1]), make_source("emoji")
    found = [source[i] for i in np.random.default_rng(0).permutation(len(source)).tolist()]
    write_shards(place / "shuffled", found)
    write_shards(place / "sorted", sorted(found, key=lambda r: (r["subgroup"], r["name"], r["vendor"])))
