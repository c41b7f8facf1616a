"""Threads that work ahead with results in order, and the runs of records that one thread reads."""

import functools
import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np


@functools.cache
def end_with_parent():
    """Lets a worker process end when its parent is killed; else it waits for work for ever. Elsewhere does nothing."""
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def mapped(work, items, ahead):
    """Yields `work(item)` of each item in order; threads, one per core and at most 8, are up to `ahead` items ahead."""
    pending = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def runs_of(source, first, end, size=64):
    """Returns the runs of the records first..end-1 of a source, and how many of them to read ahead.

    A run is a block of a source that has blocks, else `size` records.

    Returns: an iterator of `(read, begin, indices)`, where `read()[i]` is record `begin + i` for each `i` of the range
    `indices`; and an int.
    """
    sizes = getattr(source, "blocks", None)
    if sizes is not None:
        return _blocks(source, sizes, first, end), 8
    return ((lambda: source, 0, range(start, min(start + size, end))) for start in range(first, end, size)), 64


def _blocks(source, sizes, first, end):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for number in range(np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, end)):
        begin = int(starts[number])
        if indices := range(max(first - begin, 0), min(int(sizes[number]), end - begin)):
            yield functools.partial(source.read_block, number), begin, indices
