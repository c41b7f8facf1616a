"""The two-level order of a source that is read in blocks: blocks are shuffled, then records within windows.

In every epoch all blocks are permuted, and the sequence of their records is cut into lanes of equal length. A lane is
read from front to back. Its records are permuted within windows that follow one another. Windows of different lanes end
at different times, so that reading is even. All of it is a pure function of (seed, lane, position), and a record comes
at most once in an epoch: fewer records than there are lanes are left out, others in each epoch.

A host reads some of the lanes, each with few large requests.
"""

import functools
from typing import NamedTuple

import numpy as np

from clip_jax.data.shared import Shared


class Window(NamedTuple):
    """The records of a window, in the order in which they are drawn.

    Attributes:
      ids: int64 `[n]`, the indices of the records in their source.
      blocks: int64 `[n]`, the numbers of their blocks.
      rows: int64 `[n]`, their indices in these blocks.
      reading: list of int, the blocks from front to back, each once.
    """

    ids: np.ndarray
    blocks: np.ndarray
    rows: np.ndarray
    reading: list


class Lanes:
    """The order of one source.

    Args:
      sizes: int64 `[blocks]`, the numbers of records of the blocks.
      seed: int in [0, 2**32).
      lanes: int, the number of lanes, at most the number of records.
      window: int, the blocks of a window; its records are this number times the mean number of records of a block.

    Attributes:
      lane_length: int, the records of a lane in an epoch.
      window_length: int, the records of a whole window.
      mean_size: float, the mean number of records of a block that has any.
    """

    def __init__(self, sizes, seed, lanes, window):
        self._seed, self._lanes = seed, lanes
        self._shared = Shared([sizes, np.concatenate([[0], np.cumsum(sizes)])])
        self._sizes, self._starts = self._shared.arrays
        self.lane_length = int(self._starts[-1]) // lanes
        self.mean_size = float(self._starts[-1] / max(1, np.count_nonzero(sizes)))
        self.window_length = max(1, min(round(window * self.mean_size), self.lane_length))
        self._epoch = functools.lru_cache(2)(self._make_epoch)

    def __getstate__(self):
        return self.__dict__ | {"_sizes": None, "_starts": None, "_epoch": None}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._sizes, self._starts = self._shared.arrays
        self._epoch = functools.lru_cache(2)(self._make_epoch)

    def _shift(self, lane):
        """Returns how much shorter the first window of a lane is."""
        return lane * self.window_length // self._lanes

    def locate(self, lanes, positions):
        """Returns (epochs, windows, places), each int64 `[n]`, of positions int64 `[n]` in their endless lanes `[n]`.

        `windows` are numbers within the epoch, `places` indices within the window.
        """
        epochs, within = np.divmod(positions, self.lane_length)
        windows, places = np.divmod(within + self._shift(lanes), self.window_length)
        return epochs, windows, np.where(windows == 0, within, places)

    def span(self, lane, window):
        """Returns the first position of a window in its epoch of the lane, and the one after its last."""
        first = window * self.window_length - self._shift(lane)
        return max(0, first), min(first + self.window_length, self.lane_length)

    def next(self, lane, epoch, window):
        """Returns (epoch, window) of the window after a window."""
        is_last = self.span(lane, window)[1] == self.lane_length
        return (epoch + 1, 0) if is_last else (epoch, window + 1)

    def window(self, lane, epoch, number):
        """Returns the `Window` with a number in an epoch of a lane."""
        first, end = self.span(lane, number)
        order, ends = self._epoch(epoch)
        # Lane 0 would share the numbers of the blocks' permutation: NumPy fills up seeds with zeros.
        shuffled = np.random.default_rng((self._seed, epoch, lane + 1, number)).permutation(end - first)
        sequence = lane * self.lane_length + first + np.arange(end - first)
        turns = np.searchsorted(ends, sequence, "right")  # which block of the epoch, by record
        blocks = order[turns]
        rows = sequence - ends[turns] + self._sizes[blocks]
        ids = self._starts[blocks] + rows
        reading = order[turns[0] : turns[-1] + 1]
        reading = reading[self._sizes[reading] > 0].tolist()
        return Window(ids[shuffled], blocks[shuffled], rows[shuffled], reading)

    def _make_epoch(self, epoch):
        """Returns the blocks of an epoch in order, and the number of records up to the end of each."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._sizes))
        return order, np.cumsum(self._sizes[order])


def choose_lanes(batch_size, lanes=0):
    """Returns the number of lanes: `lanes`, or for 0 the largest divisor of the batch size up to a 32nd of it, or 8."""
    return lanes or max(n for n in range(1, max(8, batch_size // 32) + 1) if batch_size % n == 0)
