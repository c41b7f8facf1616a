"""The order by blocks against a full shuffle, on shards whose records are sorted, the worst order for it.

    python configs/studies/order.py runs/sorted  # writes the emoji, sorted by subgroup and name, 64 to a tar shard
    python -m clip_jax.data.manifest 'runs/sorted/*.tar' --out=runs/sorted/emoji.manifest.parquet
    python -m clip_jax.study --config=configs/studies/order.py --workdir=runs/order

A shard is a block. The rows are a full shuffle, the default lanes and window, and two lanes without a window of blocks.
"""

import io
import json
import pathlib
import sys
import tarfile

from clip_jax.data.sources import make_source
from clip_jax.study import Row, Study

STUDIES = ("",)
SOURCE = "runs/sorted/emoji.manifest.parquet"
ROWS = {
    "full shuffle": ("data.order=records",),
    "blocks: 8 lanes, windows of 8 blocks (default)": ("data.order=blocks",),
    "blocks: 2 lanes, windows of 1 block": ("data.order=blocks", "data.lanes=2", "data.window=1"),
}
CELLS = [(concept, vendor) for concept in ("seen", "unseen") for vendor in ("seen", "unseen")]


def get_study(variant=""):
    config = f"{pathlib.Path(__file__).parents[1] / 'clip.py'}:emoji"
    common = (f"data.source={SOURCE}", "train.steps=350")
    rows = tuple(Row(name, config, (*common, *overrides)) for name, overrides in ROWS.items())
    return Study("Orders", rows, {f"{c} concept, {v} vendor": f"emoji/{c}_concept_{v}_vendor/top1" for c, v in CELLS})


def write_shards(folder, length=64):
    """Writes the embedded emoji as tar shards of `length` records, sorted by subgroup and name."""
    source, folder = make_source("emoji"), pathlib.Path(folder)
    records = sorted((source[i] for i in range(len(source))), key=lambda r: (r["subgroup"], r["name"], r["vendor"]))
    folder.mkdir(parents=True)
    for number, record in enumerate(records):
        fields = {key: value for key, value in record.items() if key not in ("image", "texts", "label", "class_name")}
        members = {"png": record["image"], "txt": record["name"].encode(), "json": json.dumps(fields).encode()}
        with tarfile.open(folder / f"{number // length:05d}.tar", "a") as tar:
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    write_shards(sys.argv[1])
