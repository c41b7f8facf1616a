"""Seconds and memory to load third-party weights: CLIP in OpenAI's layout with random weights that the script writes.

    python benchmarks/load.py
    python benchmarks/load.py --sizes ViT-B/32,ViT-L/14 --formats float32,float16

Each load is a process of its own. `seconds` cover `clip_jax.interop.load.load` until the parameters are on their
devices, without the import of JAX and the start of its devices (`start`). `cpu` is the processor time of `seconds`,
which other processes on the machine hardly affect. `peak` is the process's largest resident memory, absolute and
relative to the file's size. `before` is the memory before loading and `file` the file's size, both in GB.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time

import common

COLUMNS = {"size": "<14", "dtype": "<9", "file": ">6.2f", "start": ">6.1f", "seconds": ">8.1f", "cpu": ">6.1f"}
COLUMNS |= {"before": ">7.2f", "peak": ">6.2f", "peak/file": ">9.2f"}


def write(path, size, dtype):
    """Writes a safetensors file of a published CLIP size with random weights, tensor by tensor."""
    import numpy as np

    from clip_jax import config
    from clip_jax.interop import load
    from clip_jax.interop.layouts import open_clip
    from clip_jax.models.towers import use_size

    c = config.base().unlock()
    use_size(c.model, size)
    c.model.text.update(dict(vocab_size=49408, eot_id=49407))
    ours = load.shapes(c)
    shapes = {e.theirs: e.shape({path: x.shape for path, x in ours.items()}) for e in open_clip.entries(ours)}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": {"float32": "F32", "float16": "F16"}[dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    header, rng = json.dumps(header).encode(), np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            file.write((0.02 * rng.standard_normal(shape, np.float32)).astype(dtype).tobytes())


def peak():
    """Returns the largest resident memory of this process in GB. `getrusage` would include the parent process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9


def measure(path):
    """Loads the file in this process and prints a row."""
    start = time.perf_counter()
    import jax

    from clip_jax.interop import load

    importlib.import_module("clip_jax.methods.clip")  # every command imports it

    jax.devices()
    ready, cpu = time.perf_counter(), time.process_time()
    before = peak()
    imported = load.load(path, act="quick_gelu")
    jax.block_until_ready(imported.params)
    seconds, cpu = time.perf_counter() - ready, time.process_time() - cpu
    size = os.path.getsize(path) / 1e9
    row = {"file": size, "start": ready - start, "seconds": seconds, "cpu": cpu, "before": before, "peak": peak()}
    print(json.dumps(row | {"peak/file": row["peak"] / size}))


def main():
    parser = common.make_parser(__doc__, "load")
    parser.add_argument("--sizes", default="ViT-B/32,ViT-L/14", help="separated by commas (default: %(default)s)")
    parser.add_argument("--formats", default="float32,float16", help="float32, float16 (default: %(default)s)")
    parser.add_argument("--measure", metavar="FILE", help="only load this file, in this process")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    report = common.Report(COLUMNS)
    report.header()
    for size in args.sizes.split(","):
        for dtype in args.formats.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.safetensors")
                write(path, size, dtype)
                out = subprocess.run(
                    [sys.executable, __file__, "--measure", path], check=True, capture_output=True, text=True
                ).stdout
                report.add(size=size, dtype=dtype, **json.loads(out))
    report.write(args.json)


if __name__ == "__main__":
    main()
