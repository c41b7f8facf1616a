"""Reads the windows of lanes (`clip_jax.data.lanes`) ahead: each block once, by few threads, in bounded memory.

While a window is drawn from, the blocks of the next one are read in step with it. A window is dropped with its last
draw. So a lane takes the memory of at most two windows, and of more only where the batches that threads make at a time
are longer than a window.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

_THREADS = 16  # requests at a time for each part of a mixture


class _Open:
    """A window in memory.

    Attributes:
      window: its `lanes.Window`.
      futures: `{block: Future of its records}`; blocks that are not yet asked for are missing.
      left: int, the draws that are still to come.
    """

    def __init__(self, window, left):
        self.window, self.left = window, left
        self.futures = {}

    def record(self, place):
        """Returns the record at an index of the window; raises BadRecord."""
        block = int(self.window.blocks[place])
        return self.futures[block].result()[int(self.window.rows[place])]


class WindowReader:
    """The windows of some lanes of one part of a mixture.

    Args:
      lanes: the part's `Lanes`.
      read_block: a function of the number of a block, which returns its records.
      first: `{lane: int}`, the position of the first draw of each lane that is read.
    """

    def __init__(self, lanes, read_block, first):
        self._lanes, self._read = lanes, read_block
        self._first = first
        self._open = {lane: {} for lane in first}  # {lane: {(epoch, number): _Open}}
        self._lock, self._pool = threading.Lock(), None

    def __getstate__(self):
        return self.__dict__ | {"_open": {lane: {} for lane in self._first}, "_lock": None, "_pool": None}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._lock = threading.Lock()

    def get(self, draw):
        """Returns the window of a `Draw`, with its blocks read or being read.

        Every draw of a lane from its first on is to be got once, and released after use.
        """
        with self._lock:
            opened = self._window(draw.lane, draw.epoch, draw.window)
            self._ask(draw.lane, opened, len(opened.window.reading))
        return opened

    def release(self, draw):
        """Counts a draw as used: reads the next window on and drops a window that is used up."""
        with self._lock:
            windows = self._open[draw.lane]
            opened = windows[draw.epoch, draw.window]
            opened.left -= 1
            number = self._lanes.next(draw.lane, draw.epoch, draw.window)
            # Threads may draw from later windows meanwhile: one that is dropped already is not to be opened again.
            if number in windows or number > max(windows):
                following = self._window(draw.lane, *number)
                blocks, used = len(following.window.reading), 1 - opened.left / len(opened.window.ids)
                self._ask(draw.lane, following, min(blocks, 1 + int(blocks * used)))
            if not opened.left:
                del windows[draw.epoch, draw.window]

    def _window(self, lane, epoch, number):
        windows = self._open[lane]
        if (epoch, number) not in windows:
            begin, end = (epoch * self._lanes.lane_length + place for place in self._lanes.span(lane, number))
            left = end - max(begin, self._first[lane])
            windows[epoch, number] = _Open(self._lanes.window(lane, epoch, number), left)
        return windows[epoch, number]

    def _ask(self, lane, opened, count):
        """Starts to read the first `count` blocks of a window. One that another window of the lane has is shared."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "blocks")
        for block in opened.window.reading[len(opened.futures) : count]:
            others = (other.futures[block] for other in self._open[lane].values() if block in other.futures)
            opened.futures[block] = next(others, None) or self._pool.submit(self._read, block)

    def close(self):
        """Ends the threads; safe to call twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
