"""The small data that `test_documents.py` puts in place of the paths which README and docs name."""

import json

import numpy as np
import PIL.Image
from data_helpers import encoded, write_tar

CAPTIONS = ["a cat asleep on a chair", "a dog in the snow", "a red apple", "two birds above the sea"]


def write_data(root):
    """Writes `data/` and pictures below a folder."""
    data, rng = root / "data", np.random.default_rng(0)

    def picture(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
        return path

    for name in ("cat.jpg", "dog.jpg", "images/1.jpg", "images/2.jpg"):
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
    (data / "pictures/husky/1.txt").write_text("a husky in the snow\n")
    for split in ("train", "test"):
        rows = [f'0{i}.jpg,"{text}",{("tabby", "husky")[i % 2]}' for i, text in enumerate(CAPTIONS, 1)]
        (data / f"pets/{split}.csv").write_text("filepath,caption,breed\n" + "\n".join(f"images/0{r}" for r in rows))
        rows = [f"000{i}.png,{text}" for i, text in enumerate(CAPTIONS, 1)]
        (data / f"album/{split}/metadata.csv").write_text("file_name,text\n" + "\n".join(rows))
    rows = [dict(image=f"images/00{i}.jpg", captions=[text, "a picture"]) for i, text in enumerate(CAPTIONS, 1)]
    for name in ("pairs", "flickr", "flickr_test", "flickr_val", "flickr_train"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [dict(image=f"images/00{i}.jpg", labels=["cat", "chair"][: 1 + i % 2]) for i in range(1, 5)]
    (data / "openimages.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for folder, digits in (("", 5), ("cc3m", 5), ("laion", 5), ("pairs", 5), ("yfcc15m", 5), ("datacomp/shards", 8)):
        (data / folder).mkdir(parents=True, exist_ok=True)
        for shard in range(2):
            members = []
            for i, text in enumerate(CAPTIONS):
                key = f"{shard:05}{i:04}"
                fields = dict(key=key, uid=f"{shard * 4 + i:032x}", alt=text, caption=text, width=12, license="?")
                members += [(f"{key}.png", encoded(7 * i + 40 * shard)), (f"{key}.txt", text.encode())]
                members += [(f"{key}.json", json.dumps(fields).encode())]
            write_tar(data / folder / f"{shard:0{digits}}.tar", members)
