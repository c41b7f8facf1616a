"""The small data that `test_documents.py` puts in place of the paths which README and docs name."""

import json

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import test_mds
from data_helpers import encoded, write_tar
from example_helpers import write_array_record

CAPTIONS = ["a cat asleep on a chair", "a dog in the snow", "a red apple", "two birds above the sea"]


def write_data(root):
    """Writes `data/` and pictures below a folder."""
    data, rng = root / "data", np.random.default_rng(0)

    def picture(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        return path

    for name in ("flickr30k", "coco"):
        folder = {"flickr30k": "flickr30k-images", "coco": "coco"}[name]
        images = [dict(filename=f"{i}.jpg", split="test", sentences=[dict(raw=CAPTIONS[i])]) for i in range(4)]
        for image in images:
            picture(data / folder / image["filename"])
        (data / f"dataset_{name}.json").write_text(json.dumps(dict(images=images)))
    rows = [{"jpeg": encoded(i, "JPEG"), "alt_text": text.encode()} for i, text in enumerate(CAPTIONS)]
    write_array_record(data / "pairs-00000.array_record", rows)
    (data / "mds/train").mkdir(parents=True)
    (data / "mds/train/shard.00000.mds").write_bytes(test_mds.shard(test_mds.rows(3)))
    for name in ("n01440764", "n02102040"):
        picture(data / f"imagenette2/val/{name}/1.jpg")
    for name in ("cat.jpg", "dog.jpg"):
        picture(root / name)
    for i in range(1, 5):
        picture(data / f"images/00{i}.jpg")
        picture(data / f"images/{i}.jpg")
        picture(data / f"pets/images/00{i}.jpg")
        picture(data / f"photos/{i}.jpg")
        for split in ("train", "val", "test"):
            picture(data / f"album/{split}/000{i}.png")
        for name in ("tabby_cat", "husky"):
            picture(data / f"pictures/{name}/{i}.jpg")
            for split in ("train", "val", "test"):
                picture(data / f"pets/{split}/{name}/{i}.jpg")
    (data / "pictures/husky/1.txt").write_text("a husky in the snow\n")
    for split in ("train", "test"):
        rows = [f'0{i}.jpg,"{text}",{("tabby", "husky")[i % 2]}' for i, text in enumerate(CAPTIONS, 1)]
        (data / f"pets/{split}.csv").write_text("filepath,caption,breed\n" + "\n".join(f"images/0{r}" for r in rows))
        rows = [f"000{i}.png,{text}" for i, text in enumerate(CAPTIONS, 1)]
        (data / f"album/{split}/metadata.csv").write_text("file_name,text\n" + "\n".join(rows))
    rows = [f"{picture(root / f'images/{i}.jpg').relative_to(root)}\t{CAPTIONS[i % 4]} {i}" for i in range(1, 41)]
    (data / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]))
    (root / "pairs.tsv").write_text("filepath\tcaption\n" + "\n".join(rows))
    rows = [dict(image=f"images/00{i}.jpg", captions=[text, "a picture"]) for i, text in enumerate(CAPTIONS, 1)]
    for name in ("pairs", "flickr", "flickr_test", "flickr_val", "flickr_train"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pyarrow.Table.from_pylist([dict(image=r["image"], caption=r["captions"][0]) for r in rows])
    pyarrow.parquet.write_table(table, data / "large.parquet")
    rows = [dict(image=f"images/00{i}.jpg", labels=["cat", "chair"][: 1 + i % 2]) for i in range(1, 5)]
    (data / "openimages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for folder, digits in (("", 5), ("cc3m", 5), ("laion", 5), ("pairs", 5), ("yfcc15m", 5), ("datacomp/shards", 8)):
        (data / folder).mkdir(parents=True, exist_ok=True)
        for shard in range(2):
            members = []
            for i, text in enumerate(CAPTIONS):
                key = f"{shard:05}{i:04}"
                fields = dict(key=key, uid=f"{shard * 4 + i:032x}", alt=text, caption=text, width=12, license="?")
                fields |= dict(summary="a thing", tags=["a", "b"], boxes=[[0, 0, 9, 9], [3, 3, 12, 16]])
                members += [(f"{key}.png", encoded(7 * i + 40 * shard, size=208)), (f"{key}.txt", text.encode())]
                members += [(f"{key}.json", json.dumps(fields).encode())]
            write_tar(data / folder / f"{shard:0{digits}}.tar", members)
    np.save(data / "datacomp/subset.npy", np.array([(0, 1), (0, 6)], "u8,u8"))
