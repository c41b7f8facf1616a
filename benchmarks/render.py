"""Captions per second and core drawn as images, by length, script and image size.

    python benchmarks/render.py

Times are CPU time of this process, which works on one thread. Captions are drawn one by one, as the loader does, or
256 at once, as an evaluation does. The median of the rounds counts. About 20 s.
"""

import statistics
import time

import common

from clip_jax.data.sources import make_source
from clip_jax.data.tokenizers import make_tokenizer

COUNT, ROUNDS = 2000, 5
SIZES = (64, 224)


def captions():
    """Returns `{name: texts}`: names of the embedded emoji, and a text of the maximum length."""
    source = make_source("emoji")
    records = [source[i] for i in range(COUNT)]
    named = {
        f"names, {language}": [record[f"name_{language}"] for record in records] for language in ("en", "ko", "hi")
    }
    return {**named, "768 characters": [" ".join(record["keywords"] * 100)[:768] or "x" for record in records]}


def one_by_one(font, texts, size):
    for text in texts:
        font([text], size)


def at_once(font, texts, size):
    for start in range(0, len(texts), 256):
        font(texts[start : start + 256], size)


def rate(draw, font, texts, size):
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        draw(font, texts, size)
        seconds.append(time.process_time() - start)
    return len(texts) / statistics.median(seconds[1:])


def main():
    args = common.make_parser(__doc__, "render").parse_args()
    font = make_tokenizer("unifont")
    columns = {
        "captions": "<16",
        "characters": ">12.1f",
        "pixels": ">8d",
        "one by one/s": ">14,.0f",
        "256 at once/s": ">14,.0f",
    }
    report = common.Report(columns, font=font.fingerprint())
    report.header()
    for name, texts in captions().items():
        for size in SIZES:
            rates = [rate(draw, font, texts, size) for draw in (one_by_one, at_once)]
            report.add(**dict(zip(columns, (name, statistics.mean(map(len, texts)), size, *rates), strict=True)))
    report.write(args.json)


if __name__ == "__main__":
    main()
