"""How well the order by blocks mixes, what it costs and what memory it takes, beside a full shuffle.

    python benchmarks/mixing.py [--batch=32768] [--records=400e6,2e9] [--bytes=30000] [--json=FILE]

For each number of records, size of blocks, lanes and window, from eight batches of one epoch:

- blocks: distinct blocks in a batch;
- own block: other examples of a batch from the block of an example, on average;
- variance: of the share that a kind of records has in a batch, when each block holds a single one of 1,000 kinds, the
  worst order that shards can have, divided by that of independent draws, 1;
- MiB: of the windows of all lanes, two each, at `--bytes` a record; a host has its share of it;
- steps: in a window of a lane;
- us: of CPU time for the order, a row, and s: of CPU time until the first rows are known.

The last lines say what the order of a mixture of 20 parts costs, of 100 million records each.
"""

import itertools
import sys
import time

import common
import numpy as np

from clip_jax.data.order import Order

KINDS = 1000
BATCHES = 8
BLOCKS = (512, 10_000)  # records
WINDOWS = (1, 4, 8, 16, 32)


def parse(argv):
    parser = common.make_parser(__doc__, "mixing")
    parser.add_argument("--batch", type=int, default=32_768, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--records", default="400e6", help="numbers of records (default: %(default)s)")
    parser.add_argument("--bytes", type=float, default=30_000, help="of a record (default: %(default)s)")
    return parser.parse_args(argv)


def batches(order, batch, sizes):
    """Yields the block of each row, int64 `[batch]`, of batches that are spread over an epoch."""
    epoch = int(sizes.sum()) // batch
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for step in np.linspace(0, epoch - 1, BATCHES).astype(int).tolist():
        rows = np.array(order.rows(step, 0, batch))
        if not order.lanes:
            yield np.searchsorted(starts, rows[:, 2], "right") - 1
            continue
        blocks = np.empty(batch, np.int64)
        for lane, window in np.unique(rows[:, 3:5], axis=0).tolist():
            chosen = (rows[:, 3] == lane) & (rows[:, 4] == window)
            blocks[chosen] = order.parts[0].window(lane, 0, window).blocks[rows[chosen, 5]]
        yield blocks


def measure(records, block, batch, lanes, window):
    """Returns a row of the table; `lanes` 0 is a full shuffle."""
    sizes = np.full(records // block, block)
    start = time.process_time()
    blocks = [sizes] if lanes else None
    order = Order([0, int(sizes.sum())], [1.0], 0, batch, False, lanes=lanes, blocks=blocks, window=window)
    order.rows(0, 0, batch)
    if lanes:
        order.parts[0].window(0, 0, 0)
    first = time.process_time() - start
    start = time.process_time()
    order.rows(7, 0, batch)
    cost = (time.process_time() - start) / batch * 1e6
    kind_of = np.random.default_rng(3).integers(0, KINDS, len(sizes))
    distinct, own, variance = [], [], []
    for found in batches(order, batch, sizes):
        counts = np.unique(found, return_counts=True)[1]
        distinct.append(len(counts))
        own.append((counts * (counts - 1)).sum() / batch)
        shares = np.bincount(kind_of[found], minlength=KINDS)
        expected = batch * np.bincount(kind_of, minlength=KINDS) / len(sizes)
        variance.append(((shares - expected) ** 2 / expected).mean())
    return dict(
        records=records, block=block, lanes=lanes or None, window=window if lanes else None,
        blocks=int(np.mean(distinct)), **{"own block": float(np.mean(own))}, variance=float(np.mean(variance)),
        steps=window * block * lanes // batch if lanes else None, us=cost, s=first,
    )  # fmt: skip


def mixture_cost(batch, by_blocks, parts=20, records=10**8):
    """Returns the microseconds of CPU time a row for the order of a mixture, the best of five steps."""
    weights = [1 + 0.37 * part for part in range(parts)]
    starts = [part * records for part in range(parts + 1)]
    blocks = [np.full(records // BLOCKS[0], BLOCKS[0])] * parts
    options = dict(lanes=batch // 32, blocks=blocks, window=8) if by_blocks else {}
    order, seconds = Order(starts, weights, 0, batch, False, **options), []
    for step in range(5):
        start = time.process_time()
        order.rows(step, 0, batch)
        seconds.append(time.process_time() - start)
    return min(seconds) / batch * 1e6


def main(argv=None):
    args = parse(argv)
    columns = {"records": ">13,", "block": ">7,", "lanes": ">6", "window": ">7", "blocks": ">8,", "own block": ">10.1f"}
    columns |= {"variance": ">9.2f", "MiB": ">10,.0f", "steps": ">6", "us": ">6.2f", "s": ">6.1f"}
    report = common.Report(columns, batch=args.batch, bytes_of_a_record=args.bytes)
    report.header()
    for records in (int(float(text)) for text in args.records.split(",")):
        report.add(**measure(records, BLOCKS[0], args.batch, 0, 1))
        some = (args.batch // 128, args.batch // 32)
        for block, lanes, window in itertools.product(BLOCKS, some, WINDOWS):
            if block == BLOCKS[0] or window <= WINDOWS[1]:
                row = measure(records, block, args.batch, lanes, window)
                report.add(**row, MiB=2 * lanes * window * block * args.bytes / 2**20)
    for name, by_blocks in (("records", False), ("blocks", True)):
        report.about[f"us a row of 20 parts by {name}"] = cost = mixture_cost(args.batch, by_blocks)
        print(f"mixture of 20 parts, order by {name}: {cost:.2f} us a row")
    report.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
