"""Images per second and core from JPEG to a random crop of 224: our loader, Pillow as in torchvision, and torchvision.

    python benchmarks/loader.py [--rounds 1] [--json=FILE]

Prints one table from one run of about 25 s; `--rounds` scales the duration. Times are CPU time of this process,
which works on one thread. The pipelines take turns batch by batch, and the median batch counts. torchvision has a
column where it is installed.
"""

import importlib.util
import io
import math
import random
import statistics
import time

import common
import numpy as np
from PIL import Image

from clip_jax.data.loader import Loader
from clip_jax.data.sources import MemorySource
from clip_jax.data.views import ImageView

SIZE = 224
CASES = (  # width, height, smallest share of the area, batch, rounds
    (500, 375, 0.9, 32, 40),
    (500, 375, 0.08, 32, 40),
    (2048, 1536, 0.9, 4, 12),
)


def synthetic_jpeg(width, height, rng):
    """Returns an image with the spectrum of a photograph: smooth fields at several scales, and sensor noise."""
    image = 128 + rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    for cells, strength in ((4, 90), (16, 40), (64, 20)):
        field = (strength * rng.normal(0, 1, (cells, cells, 3))).astype(np.float32)
        planes = [Image.fromarray(field[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        image += np.stack(planes, -1)
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pillow_pipeline(jpegs, min_area, batch):
    """Decodes all, crops and resizes, like torchvision's RandomResizedCrop on PIL images."""
    while True:
        images = []
        for data in random.choices(jpegs, k=batch):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            width, height = image.size
            for _ in range(10):
                area = width * height * random.uniform(min_area, 1)
                aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if w <= width and h <= height:
                    left, top = random.randint(0, width - w), random.randint(0, height - h)
                    break
            else:  # for images of aspect 4:3, torchvision's fallback is the whole image
                left, top = 0, 0
                w, h = width, height
            images.append(
                np.array(image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            )
        yield np.stack(images)


def torchvision_pipeline(jpegs, min_area, batch):
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(SIZE, scale=(min_area, 1), interpolation=transforms.InterpolationMode.BICUBIC)
    while True:
        yield np.stack(
            [np.array(crop(Image.open(io.BytesIO(data)).convert("RGB"))) for data in random.choices(jpegs, k=batch)]
        )


def our_pipeline(jpegs, min_area, batch):
    view = ImageView("image", SIZE, (f"rrc({min_area}, 1.0)",))
    for arrays in Loader(
        MemorySource([{"image": data} for data in jpegs]), [view], None, batch_size=batch, seed=0, threads=0
    ):
        yield arrays["image"]


def main():
    parser = common.make_parser(__doc__, "loader")
    parser.add_argument(
        "--rounds", type=float, default=1.0, help="multiplies the batches of each pipeline (default: %(default)s)"
    )
    args = parser.parse_args()
    pipelines = {"clip_jax loader": our_pipeline, "Pillow": pillow_pipeline}
    if importlib.util.find_spec("torchvision"):
        pipelines["torchvision"] = torchvision_pipeline
    columns = {"JPEG": ">10", "area": ">8", **dict.fromkeys(pipelines, ">18.0f"), "ours / Pillow": ">16.2f"}
    report = common.Report(columns, unit="images/s per core")
    report.header()
    rng = np.random.default_rng(0)
    random.seed(0)
    for width, height, min_area, batch, rounds in CASES:
        jpegs = [synthetic_jpeg(width, height, rng) for _ in range(8)]
        running = {name: make(jpegs, min_area, batch) for name, make in pipelines.items()}
        seconds = {name: [] for name in pipelines}
        for turn in range(math.ceil(args.rounds * rounds) + 2):
            for name, iterator in running.items():
                start = time.process_time()
                assert next(iterator).shape == (batch, SIZE, SIZE, 3)
                if turn >= 2:
                    seconds[name].append(time.process_time() - start)
        rate = {name: batch / statistics.median(times) for name, times in seconds.items()}
        rate["ours / Pillow"] = rate["clip_jax loader"] / rate["Pillow"]
        report.add(JPEG=f"{width}x{height}", area=f"{min_area:g}-1", **rate)
    report.write(args.json)


if __name__ == "__main__":
    main()
