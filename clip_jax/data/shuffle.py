"""A random permutation of a range of any length, computed index by index, for arrays; and hashes of integers.

A block cipher permutes the numbers of an even number of bits. A result outside of the range is encrypted again until it
falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking). The cipher is four rounds
of Simon (Beaulieu et al. 2013), keyed by C++'s `std::seed_seq`. The results are those of `grain.MapDataset.shuffle`,
but for lengths of 2^k + 1 with an even k of at least 16, of which it leaves one index out.
"""

import functools

import numpy as np

#: The state of SplitMix64 grows by it from number to number.
SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIN_BITS = 16
_ROUNDS = 4


def permute(indices, length, seed):
    """Returns the places of indices in a permutation of `range(length)`, int64 `[n]`.

    Args:
      indices: int64 `[n]` in [0, length).
      length: int in [2, 2**62].
      seed: int in [0, 2**32).
    """
    bits = (length - 1).bit_length()
    word = max(_MIN_BITS, bits + bits % 2) // 2
    result, left = indices.astype(np.uint64), np.arange(len(indices))
    while len(left):
        result[left] = _encrypt(result[left], _keys(seed), np.uint64(word))
        left = left[result[left] >= length]
    return result.astype(np.int64)


def _encrypt(values, keys, word):
    """Returns uint64 `[n]` encrypted; `word` is half the number of bits of a block."""
    mask = (np.uint64(1) << word) - np.uint64(1)

    def rotate(x, count):
        return (x << np.uint64(count) | x >> word - np.uint64(count)) & mask

    def mix(x):
        return rotate(x, 1) & rotate(x, 8) ^ rotate(x, 2)

    left, right = values >> word, values & mask
    for key in keys:
        left, right = right, left ^ mix(right) ^ (np.uint64(key) & mask)
    return left << word | right


@functools.lru_cache(maxsize=256)
def _keys(seed):
    """Returns the keys of the rounds, those of `std::seed_seq{seed}` (C++ standard, rand.util.seedseq)."""
    n, mask = _ROUNDS, 2**32 - 1
    keys, values = [0x8B8B8B8B] * n, [seed]
    s, t = len(values), (n - 1) // 2
    p, m = (n - t) // 2, max(len(values) + 1, n)
    q = p + t

    def scramble(x):
        return x ^ x >> 27

    for k in range(m):
        r = 1664525 * scramble(keys[k % n] ^ keys[(k + p) % n] ^ keys[(k - 1) % n]) & mask
        keys[(k + p) % n] = keys[(k + p) % n] + r & mask
        r = r + (s if k == 0 else k % n + values[k - 1] if k <= s else k % n) & mask
        keys[(k + q) % n] = keys[(k + q) % n] + r & mask
        keys[k % n] = r
    for k in range(m, m + n):
        r = 1566083941 * scramble(keys[k % n] + keys[(k + p) % n] + keys[(k - 1) % n] & mask) & mask
        keys[(k + p) % n] ^= r
        r = r - k % n & mask
        keys[(k + q) % n] ^= r
        keys[k % n] = r
    return keys


def splitmix64(states):
    """Returns the numbers that SplitMix64 (Steele et al. 2014) gives next from some states, uint64 as `states`."""
    with np.errstate(over="ignore"):  # of single numbers
        x = states + SPLITMIX_STEP
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
