"""The endless order of training examples: a pure function of (seed, step), so any host can start anywhere.

A row of a batch is a draw of a part of the mixture, and the draws of a part are numbered. A part gives its records in
one of two orders. In the order by records (`Stream`) draw k is a record from anywhere. In the order by blocks
(`clip_jax.data.lanes`) row r of a batch of B belongs to lane r * lanes // B, and draws of a part are numbered in each
lane. The random choices within an example are a pure function of (seed, epoch, example id).
"""

import functools
import hashlib
import itertools
import threading
from collections import deque
from typing import NamedTuple

import numpy as np

from clip_jax.data.lanes import Lanes
from clip_jax.data.shuffle import permute

# A source up to this length has an explicit permutation: a shuffle by index encrypts the indices of a small range many
# times.
_SMALL_SOURCE = 2**16
_BLOCK = 256  # steps; the order of the sources is shuffled within each block
_SAFE_SUM = 2**31  # below it the products of `Mixed` fit into 64 bits


class Draw(NamedTuple):
    """A row of a batch.

    Attributes:
      part: int, the part of the mixture.
      epoch: int, of that part.
      example_id: int, for a part that is read by records; else -1.
      lane: int, for a part that is read by blocks, as are the next two; else -1.
      window: int, the number of the window in the epoch of the lane.
      place: int, the index in the window.
    """

    part: int
    epoch: int
    example_id: int = -1
    lane: int = -1
    window: int = -1
    place: int = -1


class Stream:
    """The records of one part of a mixture: all its ids in a new order every epoch.

    Args:
      part: int, the index of the part.
      start: int, the first example id of the part.
      length: int, its number of examples.
      seed: int.
    """

    def __init__(self, part, start, length, seed):
        self._start, self._length = start, length
        self._seed = _seed(seed, part)

    def take(self, positions):
        """Returns (epochs, example ids), each int64 `[n]`, of positions int64 `[n]`."""
        epochs, places = np.divmod(positions, self._length)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            if self._length <= _SMALL_SOURCE:
                ids[chosen] = _permutation(self._seed, epoch, self._length)[places[chosen]]
            else:
                # Grain derives the seed of a shuffle from the data set's and the shuffle's distance to it.
                ids[chosen] = permute(places[chosen], self._length, (_seed(self._seed, 1) + epoch) % 2**32)
        return epochs, self._start + ids


def whole_weights(weights):
    """Returns positive weights as integers, 100 for the smallest; a list of int."""
    return [int(weight * (100 / min(weights))) for weight in weights]


class Mixed:
    """Interleaves parts: each one has its share, by weight, in any short run of positions.

    Grain's rule (`grain.MapDataset.mix`), for arrays: the weights become integers, 100 for the smallest, and a part's
    draws are where its share of the positions, rounded down, grows by one.
    """

    def __init__(self, weights):
        self._weights = whole_weights(weights)

    def draws(self, positions):
        """Returns (parts, numbers of the parts' draws), each int64 `[n]`, of positions int64 `[n]`."""
        left = sum(self._weights)
        positions = positions.astype(object) if left >= _SAFE_SUM else positions
        rounds, now = positions // left, positions % left  # the pattern repeats
        after = now + 1
        parts, numbers = np.full(len(positions), -1), np.zeros(len(positions), np.int64)
        for part, weight in enumerate(self._weights):
            now_left, after_left = now * (left - weight) // left, after * (left - weight) // left
            count = after - after_left
            is_new = (now - now_left != count) & (parts < 0)
            parts[is_new] = part
            numbers[is_new] = (count - 1 + rounds * weight)[is_new].astype(np.int64)
            left -= weight
            now, after = now_left, after_left
        return parts, numbers

    def before(self, position):
        """Returns how often each part is drawn before a position, a list of int."""
        left = sum(self._weights)
        rounds, now = divmod(position, left)
        counts = []
        for weight in self._weights:
            now_left = now * (left - weight) // left
            counts.append(now - now_left + rounds * weight)
            left, now = left - weight, now_left
        return counts


class OneSource:
    """Takes each batch from one part (debiased sampling; ZeroVL, Cui et al. 2022).

    Batches are assigned by weight, as examples are in `Mixed`, and shuffled within blocks of 256 steps. The probability
    of a part at a step is its weight. Its share of a block is exact up to rounding.
    """

    def __init__(self, weights, seed):
        self._seed = _seed(seed, len(weights))
        self._batches = Mixed(weights)

    def batch(self, step):
        """Returns (part, number of the part's batch) of a step."""
        return _block(self, step // _BLOCK)[step % _BLOCK]

    def before(self, step):
        """Returns how many batches each part has before a step, a list of int."""
        start = step // _BLOCK * _BLOCK
        counts = self._batches.before(start)
        for part, _ in _block(self, step // _BLOCK)[: step - start]:
            counts[part] += 1
        return counts

    def block(self, number):
        """Returns (part, number of the part's batch) of each step of a block."""
        parts, batches = (x.tolist() for x in self._batches.draws(number * _BLOCK + np.arange(_BLOCK)))
        shuffled = [parts[i] for i in _permutation(self._seed, number, _BLOCK)]
        waiting = {part: deque(b for p, b in zip(parts, batches, strict=True) if p == part) for part in set(parts)}
        return [(part, waiting[part].popleft()) for part in shuffled]


class Order:
    """The order of the rows of all batches.

    Args:
      starts: list of int, the first example id of each part of the mixture, then the number of all examples.
      weights: positive floats, one per part.
      seed: int in [0, 2**32).
      batch_size: int.
      one_source: bool, whether each batch is from one part.
      lanes: int, the number of lanes; 0 where no part is read by blocks.
      blocks: list of the sizes of the blocks of each part, int64 `[blocks]`, or None for a part that is read by
        records.
      window: int, blocks of a window. In a mixture it is shared by the parts according to their weights.

    Attributes:
      parts: list of `Lanes` or None, one per part.
      lanes: int, as given.
      digest: str of 16 hex digits; equal orders have the same.
    """

    def __init__(self, starts, weights, seed, batch_size, one_source, *, lanes=0, blocks=None, window=1):
        pairs = list(enumerate(itertools.pairwise(starts)))
        self._streams = [Stream(part, start, end - start, seed) for part, (start, end) in pairs]
        self.lanes, self._length = lanes, batch_size // max(1, lanes)
        self._one_source = OneSource(weights, seed) if one_source and len(weights) > 1 else None
        self._mixed = Mixed(weights) if len(weights) > 1 and not one_source else None
        if self._mixed:  # how often a part is drawn before a lane begins
            self._begin = np.array([self._mixed.before(lane * self._length) for lane in range(max(1, lanes))])
        windows = [window if self._mixed is None else max(1, round(window * w / sum(weights))) for w in weights]
        self.parts = [
            None if sizes is None else Lanes(sizes, _seed(seed, part), lanes, windows[part])
            for part, sizes in enumerate(blocks or [None] * len(weights))
        ]
        known = [*map(int, starts)], whole_weights(weights), seed, batch_size, bool(self._one_source), lanes, windows
        digest = hashlib.blake2b(repr(known).encode(), digest_size=8)
        for sizes in blocks or ():
            digest.update(b"records" if sizes is None else np.asarray(sizes, np.int64).tobytes())
        self.digest = digest.hexdigest()

    def rows(self, step, first, last):
        """Returns the `Draw` of each row from `first` to `last - 1` of the batch of a step, a list."""
        rows = np.arange(first, last)
        lanes = rows // self._length
        parts, numbers = self._draws(step, lanes, rows - lanes * self._length)
        found = np.full((len(rows), 6), -1)
        found[:, 0] = parts
        for part in np.unique(parts).tolist():
            drawn = parts == part
            if self.parts[part] is None:
                positions = numbers[drawn] * (self.lanes or 1) + lanes[drawn]
                found[drawn, 1:3] = np.stack(self._streams[part].take(positions), 1)
            else:
                epochs, windows, places = self.parts[part].locate(lanes[drawn], numbers[drawn])
                found[drawn, 1] = epochs
                found[drawn, 3:] = np.stack([lanes[drawn], windows, places], 1)
        return list(map(Draw._make, found.tolist()))

    def _draws(self, step, lanes, rows):
        """Returns (parts, numbers of the parts' draws in their lanes), each int64 `[n]`.

        Args:
          step: int.
          lanes: int64 `[n]`.
          rows: int64 `[n]`, the rows within the lanes' shares of the batch.
        """
        if self._one_source:
            part, batch = self._one_source.batch(step)
            return np.full(len(rows), part), batch * self._length + rows
        positions = step * self._length + rows
        if not self._mixed:
            return np.zeros(len(rows), np.int64), positions
        # A lane begins where the lane before it is after one step. So a batch is a run of positions, with exact shares.
        parts, numbers = self._mixed.draws(lanes * self._length + positions)
        return parts, numbers - self._begin[lanes, parts]

    def first_draws(self, step, lane):
        """Returns the number of the first draw of each part in a lane from a step on, a list of int."""
        if self._one_source:
            return [count * self._length for count in self._one_source.before(step)]
        if not self._mixed:
            return [step * self._length]
        return (np.array(self._mixed.before((step + lane) * self._length)) - self._begin[lane]).tolist()

    def describe(self, sources, hosts):
        """Returns a line on how a host reads blocks; empty when no part is read by blocks.

        Args:
          sources: list of the sources of the parts.
          hosts: int, the number of hosts.
        """
        read = [(part, lanes) for part, lanes in zip(sources, self.parts, strict=True) if lanes]
        if not read:
            return ""
        records = " + ".join(f"{lanes.window_length:,}" for _, lanes in read)
        line = f"order by blocks: {self.lanes // hosts} of {self.lanes} lanes, windows of {records} records"
        sizes = [(getattr(part, "block_bytes", None), lanes.window_length / lanes.mean_size) for part, lanes in read]
        if any(size is None for size, _ in sizes):
            return line
        memory = 2 * self.lanes // hosts * sum(size * blocks for size, blocks in sizes)
        return line + f", at most {memory / 2**20:,.0f} MiB on each host"


def _seed(seed, number):
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


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
