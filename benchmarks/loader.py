"""Images per second and core from JPEG to a random crop of 224: our loader, Pillow as in torchvision, and torchvision.

    python benchmarks/loader.py [--rounds 1] [--workers=1,2] [--json=FILE]

Prints one table from one run of about a minute; `--rounds` scales the duration. The sides of a comparison take turns,
and the median turn counts. `relative` is the rate beside that of the first side.

- `crop`: from JPEG to a crop, by CPU time of this process, on one thread. torchvision has a row where it is installed.
- `decode`: from bytes to a PIL image with its pixels, by CPU time. simplejpeg has a row where it is installed.
- `workers`: our loader with worker processes, by elapsed time on all cores.
"""

import functools
import importlib.util
import io
import math
import random
import statistics
import time

import common
import numpy as np
from PIL import Image, features

from clip_jax.data import decode
from clip_jax.data.loader import Loader
from clip_jax.data.sources import MemorySource
from clip_jax.data.views import ImageView

SIZE = 224
COLUMNS = {"what": "<8", "picture": ">10", "area": ">8", "side": "<18", "images/s": ">10.0f", "relative": ">10.2f"}
CASES = (  # width, height, smallest share of the area, batch, rounds
    (500, 375, 0.9, 32, 40),
    (500, 375, 0.08, 32, 40),
    (2048, 1536, 0.9, 4, 12),
)


def synthetic_photograph(width, height, rng):
    """Returns a PIL image with the spectrum of a photograph: smooth fields at several scales, and sensor noise."""
    image = 128 + rng.normal(0, 4, (height, width, 3)).astype(np.float32)
    for cells, strength in ((4, 90), (16, 40), (64, 20)):
        field = (strength * rng.normal(0, 1, (cells, cells, 3))).astype(np.float32)
        planes = [Image.fromarray(field[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        image += np.stack(planes, -1)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", quality=90):
    """Returns the bytes of a PIL image in the format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
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


def make_loader(jpegs, min_area, batch, **options):
    view = ImageView("image", SIZE, (f"rrc({min_area}, 1.0)",))
    return Loader(MemorySource([{"image": data} for data in jpegs]), [view], None, batch_size=batch, seed=0, **options)


def our_pipeline(jpegs, min_area, batch):
    for arrays in make_loader(jpegs, min_area, batch, threads=0):
        yield arrays["image"]


def rates_of(calls, images, turns, clock=time.process_time):
    """Returns `{side: images/s}` of calls that each handle `images` images. The first two turns do not count."""
    seconds = {side: [] for side in calls}
    for turn in range(turns + 2):
        for side, call in calls.items():
            start = clock()
            call()
            if turn >= 2:
                seconds[side].append(clock() - start)
    return {side: images / statistics.median(times) for side, times in seconds.items()}


def add_rows(report, rates, **row):
    for side, rate in rates.items():
        report.add(**row, side=side, **{"images/s": rate}, relative=rate / next(iter(rates.values())))


def decoders(image):
    """Returns `{name: function without arguments}` that decode one picture to a PIL image with its pixels."""

    def by_us(data):
        return decode.load(decode.open_image(data))

    def by_simplejpeg(data):
        pixels = simplejpeg.decode_jpeg(data)
        return Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "RGB", 0, 1)

    jpeg = encoded(image)
    calls = {"clip_jax, JPEG": functools.partial(by_us, jpeg)}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        assert np.array_equal(by_us(jpeg), by_simplejpeg(jpeg))
        calls["simplejpeg, JPEG"] = functools.partial(by_simplejpeg, jpeg)
    for kind in ("WebP", "AVIF"):
        if features.check(kind.lower()):
            calls[f"clip_jax, {kind}"] = functools.partial(by_us, encoded(image, kind))
    return calls


def main():
    parser = common.make_parser(__doc__, "loader")
    parser.add_argument(
        "--rounds", type=float, default=1.0, help="multiplies the batches of each pipeline (default: %(default)s)"
    )
    parser.add_argument("--workers", default="1,2", help="numbers of worker processes (default: %(default)s)")
    args = parser.parse_args()
    pipelines = {"Pillow": pillow_pipeline, "clip_jax": our_pipeline}
    if importlib.util.find_spec("torchvision"):
        pipelines["torchvision"] = torchvision_pipeline
    report = common.Report(COLUMNS)
    report.header()
    rng = np.random.default_rng(0)
    random.seed(0)
    pictures = {}
    for width, height, min_area, batch, rounds in CASES:
        name, turns = f"{width}x{height}", math.ceil(args.rounds * rounds)
        images = [synthetic_photograph(width, height, rng) for _ in range(8)]
        jpegs = [encoded(image) for image in images]
        running = {side: make(jpegs, min_area, batch) for side, make in pipelines.items()}
        calls = {side: functools.partial(next, iterator) for side, iterator in running.items()}
        assert all(call().shape == (batch, SIZE, SIZE, 3) for call in calls.values())
        add_rows(report, rates_of(calls, batch, turns), what="crop", picture=name, area=f"{min_area:g}-1")
        pictures[name] = images[0], jpegs, batch, turns
    for name, (image, _, _, turns) in pictures.items():
        add_rows(report, rates_of(decoders(image), 1, turns), what="decode", picture=name)
    name, (_, jpegs, batch, turns) = next(iter(pictures.items()))
    rates = {}
    for workers in args.workers.split(","):  # one after the other: the processes of all would share the cores
        loader = make_loader(jpegs, 0.08, batch, workers=int(workers))
        calls = {f"workers={workers}": functools.partial(next, loader)}
        rates |= rates_of(calls, batch, 4 * turns, time.perf_counter)
        loader.close()
    add_rows(report, rates, what="workers", picture=name, area="0.08-1")
    report.write(args.json)


if __name__ == "__main__":
    main()
