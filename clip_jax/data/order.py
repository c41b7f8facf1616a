"""The endless order of training examples: maps a position to a part of the mixture, an epoch and an example id.

The order is a pure function of (seed, position), so any host can start anywhere. The random choices within an example
are a pure function of (seed, epoch, example id).
"""

import functools
import itertools
import threading
from collections import deque

import numpy as np

from clip_jax.data.shuffle import shuffled

# A source up to this length has an explicit permutation: where the range is much smaller than a block of the shuffle by
# index, its walk is long.
_SMALL_SOURCE = 2**16
_BLOCK = 256  # steps; the order of the sources is shuffled within each block


class Stream:
    """The endless order of one part of a mixture: all its ids in a new order every epoch.

    `stream[position]` is (part, epoch, example id).

    Args:
      part: int, the index of the part.
      start: int, the first example id of the part.
      length: int, its number of examples.
      seed: int.
    """

    def __init__(self, part, start, length, seed):
        self._part = part
        self._start, self._length = start, length
        self._seed = _seed(seed, part)

    def __getitem__(self, position):
        epoch, place = divmod(position, self._length)
        return self._part, epoch, self._start + int(self._shuffled(epoch, place))

    def take(self, positions):
        """Returns `(epochs, example ids)` of positions, each int64 of the shape of `positions`."""
        epochs, places = np.divmod(positions, self._length)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            ids[epochs == epoch] = self._start + self._shuffled(int(epoch), places[epochs == epoch])
        return epochs, ids

    def _shuffled(self, epoch, places):
        if self._length <= _SMALL_SOURCE:
            return _permutation(self._seed, epoch, self._length)[places]
        return shuffled(places, self._length, (_seed(self._seed, 1) + epoch) % 2**32)


class Mixed:
    """Interleaves streams: each one has its share, by weight, in any short run of positions."""

    def __init__(self, streams, weights):
        self._index = _mix([stream.__getitem__ for stream in streams], weights)

    def __getitem__(self, position):
        return self._index[position]


class OneSource:
    """Takes each batch from one stream (debiased sampling; ZeroVL, Cui et al. 2022).

    Batches are assigned by weight, as examples are in `Mixed`, and shuffled within blocks of 256 steps. The probability
    of a stream at a step is its weight. Its share of a block is exact up to rounding. Each stream goes through its
    epochs in order.
    """

    def __init__(self, streams, weights, seed, batch_size):
        self._streams, self._batch_size = streams, batch_size
        self._seed = _seed(seed, len(streams))
        self._batches = _mix([functools.partial(_pair, part) for part in range(len(streams))], weights)

    def __getitem__(self, position):
        step, row = divmod(position, self._batch_size)
        part, batch = _block(self, step // _BLOCK)[step % _BLOCK]
        return self._streams[part][batch * self._batch_size + row]

    def block(self, number):
        """Returns (part, index of the part's batch) of each step of a block."""
        assigned = [self._batches[number * _BLOCK + i] for i in range(_BLOCK)]
        shuffled = [assigned[i][0] for i in _permutation(self._seed, number, _BLOCK)]
        waiting = {part: deque(batch for p, batch in assigned if p == part) for part in set(shuffled)}
        return [(part, waiting[part].popleft()) for part in shuffled]


def make_order(starts, weights, seed, batch_size, one_source):
    """Returns the order of a source: `order[position]` is (part, epoch, example id).

    Args:
      starts: list of int, the first example id of each part of the mixture, then the number of all examples.
      weights: positive floats, one per part.
      seed: int in [0, 2**32).
      batch_size: int; positions t * batch_size to (t + 1) * batch_size - 1 are the batch of step t.
      one_source: bool, whether each batch is from one part.
    """
    streams = [Stream(part, start, end - start, seed) for part, (start, end) in enumerate(itertools.pairwise(starts))]
    if len(streams) == 1:
        return streams[0]
    return OneSource(streams, weights, seed, batch_size) if one_source else Mixed(streams, weights)


@functools.lru_cache(maxsize=1024)
def _seed(seed, number):
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _mix(functions, weights):
    import grain

    return grain.MapDataset.mix([grain.MapDataset.range(2**62).map(function) for function in functions], weights)


def _pair(part, batch):
    return part, batch


@functools.lru_cache(maxsize=32)
def _block(order, number):
    return order.block(number)


@functools.lru_cache(maxsize=32)
def _permutation(seed, epoch, length):
    return np.random.default_rng((seed, epoch)).permutation(length)


class _Randomness(threading.local):
    """Random generators by (seed, epoch, example id).

    Each thread has one generator and sets its state, which is much cheaper than making a new one each time.
    """

    def __init__(self):
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state  # counter 0, nothing buffered

    def __call__(self, seed, epoch, example_id):
        """Returns the generator, valid until the thread's next call."""
        self._state["state"]["key"][:] = seed << 32 | epoch, example_id
        self._bits.state = self._state
        return self._generator


randomness = _Randomness()
