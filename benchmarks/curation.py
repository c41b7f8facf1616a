"""Processor time of the commands that select records, without reading any: near hashes, entries in texts, the cut.

    python benchmarks/curation.py

Synthetic input: random hashes of which a tenth are copies with up to 3 other bits; texts of ten words whose frequencies
fall as a power, and up to 500,000 entries of one to four such words; random scores. About a minute.
"""

import resource
import tempfile
import time

import common
import numpy as np

from clip_jax.tools import clip_score, duplicates
from clip_jax.tools.entries import Matcher


def near_hashes(rng, count, distance):
    hashes = rng.integers(0, 256, (count, 16), np.uint8)
    copies = rng.integers(0, count, count // 10)
    hashes[copies] = hashes[rng.integers(0, count, len(copies))]
    for bit in rng.integers(0, 128, (3, len(copies))):
        hashes[copies, bit // 8] ^= (1 << bit % 8).astype(np.uint8)
    pixels = rng.integers(1, 1000, count).astype(np.uint32)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        stays = duplicates.start(pixels)
        duplicates.join_equal(folder, duplicates.hash_keys(hashes), pixels, stays)
        duplicates.join_near(folder, hashes, pixels, stays, distance)
        duplicates.settle(stays)
        return time.process_time() - start


def matched_texts(rng, count):
    words = np.minimum(rng.pareto(0.7, 3_000_000), 200_000).astype(int).tolist()
    entries = dict.fromkeys(f"w{i}" for i in range(150_000))
    for start in range(0, len(words) - 4):
        if len(entries) == 500_000:
            break
        entries[" ".join(f"w{i}" for i in words[start : start + 2 + start % 3])] = None
    texts = [" ".join(f"w{i}" for i in words[10 * row : 10 * row + 10]) + "." for row in range(count)]
    matcher, start = Matcher(list(entries)), time.process_time()
    for text in texts:
        matcher(text)
    return time.process_time() - start


def cut_scores(rng, count):
    parts = np.array_split(rng.standard_normal(count).astype(np.float32), max(1, count // 65_536))
    start = time.process_time()
    clip_score.kth_largest(lambda: parts, round(0.3 * count))
    return time.process_time() - start


def main():
    args = common.make_parser(__doc__, "curation").parse_args()
    columns = {"part": "<24", "rows": ">12,d", "seconds": ">9.1f", "us/row": ">8.2f", "peak MiB": ">10,.0f"}
    report, rng = common.Report(columns), np.random.default_rng(0)
    report.header()
    cases = [
        (f"near hashes, {d} bits", n, near_hashes, (d,)) for n, d in ((100_000, 7), (1_000_000, 3), (1_000_000, 7))
    ]
    cases += [("scores, the 30 % cut", 10_000_000, cut_scores, ()), ("entries in texts", 100_000, matched_texts, ())]
    for name, rows, measure, more in cases:
        seconds = measure(rng, rows, *more)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report.add(**dict(zip(columns, (name, rows, seconds, 1e6 * seconds / rows, peak), strict=True)))
    report.write(args.json)


if __name__ == "__main__":
    main()
