"""Time and memory of RA-CLIP's retrieval augmentation: the nearest rows of a bank for a batch, compared with faiss.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --rows=100000,1000000 --batch=256 --k=64

One device, float32. Three columns are medians of `--repeats` turns in ms on all cores: `ours`
(`clip_jax.losses.neighbors.top_k`, jitted), `faiss` (the exact `IndexFlatIP`) and `product`, which computes all dot
products and their maximum per query only. `faiss-1` is faiss on one thread, which is faster than many threads where
other processes run. `taskset -c 0` before the command gives each side one core. `temp` is the compiled program's
memory on top of the bank and the batch, `matrix` the memory of all scores, both in MiB. Without `faiss-cpu` its
columns are empty. The run stops when the two sides differ.
"""

import statistics
import time

import common

COLUMNS = {
    "rows": ">10,",
    "dim": ">5",
    "batch": ">6",
    "k": ">4",
    "ours": ">9.0f",
    "faiss": ">9.0f",
    "faiss-1": ">9.0f",
    "product": ">9.0f",
}
COLUMNS |= {"temp": ">8.1f", "matrix": ">8.1f"}


def unit_rows(rng, rows, dim):
    import numpy as np

    z = rng.standard_normal((rows, dim), np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return z


def check(ours, theirs):
    """Exits unless both sides, `(dot products [b, k], rows [b, k])`, agree. Rounding may swap neighbours."""
    import numpy as np

    same = np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(ours[1], theirs[1], strict=True)])
    if not (same > 0.999 and np.allclose(ours[0], theirs[0], atol=1e-5)):
        raise SystemExit(f"the two sides do not find the same: {same:.2%} of the neighbours are")


def measure(rows, dim, batch, k, repeats):
    """Measures a row of the report."""
    import jax
    import numpy as np

    from clip_jax.losses.neighbors import top_k

    rng = np.random.default_rng(0)
    bank, queries = unit_rows(rng, rows, dim), unit_rows(rng, batch, dim)
    block = next(size for size in range(4096, 0, -1) if rows % size == 0)

    @jax.jit
    def product(queries, bank):
        return jax.lax.map(lambda rows: (queries @ rows.T).max(1), bank.reshape(-1, block, dim)).max(0)

    on_device = jax.device_put((queries, bank))
    compiled = jax.jit(lambda *x: top_k(*x, k)).lower(*on_device).compile()
    sides = {
        "ours": lambda: jax.device_get(compiled(*on_device)),
        "product": lambda: product(*on_device).block_until_ready(),
    }
    try:
        import faiss

        index = faiss.IndexFlatIP(dim)
        index.add(bank)
        cores = faiss.omp_get_max_threads()

        def search(threads):
            faiss.omp_set_num_threads(threads)
            return index.search(queries, k)

        sides |= {"faiss": lambda: search(cores), "faiss-1": lambda: search(1)}
    except ImportError:
        pass
    first = {name: side() for name, side in sides.items()}  # compiles
    if "faiss" in first:
        check(first["ours"], first["faiss"])
    turns = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            turns[name].append(1e3 * (time.perf_counter() - start))
    temp = compiled.memory_analysis().temp_size_in_bytes
    return dict(
        rows=rows, dim=dim, batch=batch, k=k, temp=temp / 2**20, matrix=4 * rows * batch / 2**20, turns=turns,
        **{name: statistics.median(values) for name, values in turns.items()},
    )  # fmt: skip


def main(argv=None):
    parser = common.make_parser(__doc__, "retrieval")
    parser.add_argument("--rows", default="1000000", help="of the bank, separated by commas (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    report = common.Report(COLUMNS)
    report.header()
    for rows in map(int, args.rows.split(",")):
        report.add(**measure(rows, args.dim, args.batch, args.k, args.repeats))
    report.write(args.json)


if __name__ == "__main__":
    main()
