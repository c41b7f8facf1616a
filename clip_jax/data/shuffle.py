"""A permutation of [0, length) that is computed index by index, so that no array of its size exists.

It walks the cycles (Black and Rogaway 2002, "Ciphers with arbitrary finite domains") of a Feistel network with the
round function of Simon (Beaulieu et al. 2013). The number of rounds and the keys are those of Grain's `index_shuffle`,
which gives the same permutation one index at a time.
"""

import functools

import numpy as np

_ROUNDS = 4


def shuffled(places, length, seed):
    """Returns where a permutation of [0, length) takes places.

    Args:
      places: an int in [0, length), or an int64 array of them.
      length: int in [2, 2**62).
      seed: int in [0, 2**32); each one gives another permutation.

    Returns:
      An int, or an int64 array of the shape of `places`.
    """
    half, keys = _half_block(length), _keys(seed)
    if not isinstance(places, np.ndarray):
        while (places := _encrypt(places, half, keys)) >= length:
            pass
        return places
    found = _encrypt(places.ravel(), half, keys)
    while len(outside := np.flatnonzero(found >= length)):
        found[outside] = _encrypt(found[outside], half, keys)
    return found.reshape(places.shape)


def _half_block(length):
    """Half the bits of a block, the smallest one of at least 16 bits that holds all indices."""
    return max((length - 1).bit_length() + 1, 16) // 2


def _encrypt(block, bits, keys):
    mask = (1 << bits) - 1
    left, right = block >> bits, block & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ _mixed(right, bits, mask) ^ (first & mask)
        right = right ^ _mixed(left, bits, mask) ^ (second & mask)
    return left << bits | right


def _mixed(x, bits, mask):
    def rotated(by):
        return x << by & mask | x >> bits - by

    return rotated(1) & rotated(8) ^ rotated(2)


@functools.lru_cache(maxsize=1024)
def _keys(seed, count=_ROUNDS):
    """The keys of the rounds: `std::seed_seq{seed}` of C++ (ISO/IEC 14882, [rand.util.seedseq]), `count` words."""
    words, mask = [0x8B8B8B8B] * count, 2**32 - 1
    shift = (count - 1) // 2 if count < 7 else 3
    first = (count - shift) // 2
    steps = max(2, count)
    for k in range(steps + count):
        low, high = (k + first) % count, (k + first + shift) % count
        here, before = k % count, (k - 1) % count
        if k < steps:
            mixed = words[here] ^ words[low] ^ words[before]
            value = 1664525 * (mixed ^ mixed >> 27) & mask
            added = value + (1 if k == 0 else here + seed if k == 1 else here) & mask
            words[low], words[high] = words[low] + value & mask, words[high] + added & mask
        else:
            mixed = words[here] + words[low] + words[before] & mask
            value = 1566083941 * (mixed ^ mixed >> 27) & mask
            added = value - here & mask
            words[low], words[high] = words[low] ^ value, words[high] ^ added
        words[here] = added
    return words
