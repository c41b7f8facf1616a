"""Time and memory of the exact search: queries against embeddings on all devices, compared with NumPy's score matrix.

    python benchmarks/search.py
    python benchmarks/search.py --rows=100000,1000000 --dim=512 --queries=16

`ours` and `numpy` are medians of `--repeats` turns in ms. `temp` is the compiled program's memory on each device on
top of the embeddings, `matrix` the memory of all scores, both in MiB. `--no-numpy` skips the other side.
"""

import statistics
import time

import common

COLUMNS = {"rows": ">10,", "dim": ">5", "queries": ">7", "k": ">4", "devices": ">7", "ours": ">9.1f", "numpy": ">9.1f"}
COLUMNS |= {"bank": ">8.0f", "temp": ">8.1f", "matrix": ">8.1f"}


def whole_matrix(z, queries, k):
    """Returns the rows of the k largest products, best first, from the matrix of all products."""
    import numpy as np

    scores = queries @ z.T
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)


def measure(rows, dim, queries, k, repeats, with_numpy):
    """Measures a row of the report and compares the results of both sides."""
    import jax
    import numpy as np

    from clip_jax import config, search_index
    from clip_jax.runtime import sharding

    mesh, rng = sharding.make_mesh(config.base().mesh), np.random.default_rng(0)
    z = rng.standard_normal((rows, dim), np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    q = z[:: rows // queries][:queries] + 0.01 * rng.standard_normal((queries, dim), np.float32)
    bank = search_index.Bank(z, mesh)
    memory = search_index.program(mesh, k).lower(bank.z, q, rows).compile().memory_analysis()
    sides = {"ours": lambda: bank.search(q, k)[0]} | ({"numpy": lambda: whole_matrix(z, q, k)} if with_numpy else {})
    first = {name: side() for name, side in sides.items()}  # compiles
    if (
        with_numpy and not (np.sort(first["ours"]) == np.sort(first["numpy"])).mean() > 0.999
    ):  # rounding may swap neighbours
        raise SystemExit("the two sides do not find the same")
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(1e3 * (time.perf_counter() - start))
    return dict(
        rows=rows, dim=dim, queries=queries, k=k, devices=len(jax.devices()), bank=bank.z.nbytes / 2**20,
        temp=memory.temp_size_in_bytes / 2**20, matrix=4 * rows * queries / 2**20, turns=times,
        **{name: statistics.median(values) for name, values in times.items()},
    )  # fmt: skip


def main():
    parser = common.make_parser(__doc__, "search")
    parser.add_argument(
        "--rows", default="100000,1000000", help="embeddings, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--dim", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--queries", default="1,16", help="separated by commas (default: %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--no-numpy", action="store_true", help="only ours")
    args = parser.parse_args()
    report = common.Report(COLUMNS)
    report.header()
    for rows in map(int, args.rows.split(",")):
        for queries in map(int, args.queries.split(",")):
            report.add(**measure(rows, args.dim, queries, args.k, args.repeats, not args.no_numpy))
    report.write(args.json)


if __name__ == "__main__":
    main()
