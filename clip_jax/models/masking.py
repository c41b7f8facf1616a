"""Random masks of patches and words, drawn per example on the device."""

import math

import jax
import jax.numpy as jnp


def mask_patches(keys, n, share):
    """Draws which patches are masked.

    Args:
      keys: PRNG keys `[b]`.
      n: number of patches.
      share: share of the patches to mask.

    Returns:
      bool `[b, n]`, True at `round(share * n)` patches of each example, at least one.
    """
    count = max(1, round(share * n))
    return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 0), n) < count)(keys)


def mask_words(keys, ids, real, share, kinds, vocab_size):
    """Chooses a fixed share of the words of each text, as BERT does (Devlin et al. 2019, section 3.1).

    Args:
      keys: PRNG keys `[b]`.
      ids: int32 `[b, n]`.
      real: bool `[b, n]`, True up to and including the end-of-text token, which is never chosen.
      share: share of the words of a text that are chosen, at least one word.
      kinds: `(hidden, random)`: the share of the chosen words that is hidden, and the share that becomes a random word.
        The rest stay unchanged.
      vocab_size: random words are drawn uniformly from 0 to `vocab_size - 1`.

    Returns:
      A dict:
        ids: int32 `[b, n]`, with the random words.
        words: bool `[b, n]`, True at hidden words.
        positions: int32 `[b, k]`, where k is the largest possible number of chosen words.
        targets: int32 `[b, k]`, the original ids at `positions`.
        chosen: bool `[b, k]`, False where a text has fewer chosen words.
    """
    n = ids.shape[1]
    most = max(1, round(share * (n - 1)))

    def one(key, ids, real):
        order_key, kind_key, word_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        count = real.sum() - 1
        order = jnp.where(jnp.arange(n) < count, jax.random.uniform(order_key, (n,)), -1.0)
        order, positions = jax.lax.top_k(order, most)
        chosen = (order >= 0) & (jnp.arange(most) < jnp.maximum(1, jnp.round(share * count)))
        kind = jax.random.uniform(kind_key, (most,))
        targets, random_words = ids[positions], jax.random.randint(word_key, (most,), 0, vocab_size, ids.dtype)
        is_random = chosen & (kind >= kinds[0]) & (kind < sum(kinds))
        return {
            "ids": ids.at[positions].set(jnp.where(is_random, random_words, targets)),
            "words": jnp.zeros(n, bool).at[positions].set(chosen & (kind < kinds[0])),
            "positions": positions,
            "targets": targets,
            "chosen": chosen,
        }

    return jax.vmap(one)(keys, ids, real)


def mask_tokens(keys, ids, real, share, kinds, vocab_size, special_ids, mask_id):
    """Chooses each token with the chance `share`, as DeCLIP does (Li et al. 2022, after Devlin et al. 2019).

    Special tokens are neither chosen nor drawn. The end of a text thus stays in place, and a tower pools the same
    position.

    Args:
      keys: PRNG keys `[b]`.
      ids: int32 `[b, n]`.
      real: bool `[b, n]`, False at padding, which is never chosen.
      share: the chance of a token to be chosen.
      kinds: `(masked, random)`: the share of the chosen tokens that becomes `mask_id`, and the share that becomes a
        random id. The rest stay unchanged.
      vocab_size: random ids are drawn uniformly from 0 to `vocab_size - 1`, without the special ids.
      special_ids: ids of tokens that stand for no text.
      mask_id: id of the mask token.

    Returns:
      A dict with `ids` int32 `[b, n]`, the masked texts, and `positions`, `targets`, `chosen` `[b, k]` as in
      `mask_words`. k lies six standard deviations above the expected number of chosen tokens. Further tokens would not
      be chosen; no run is long enough for that to happen.
    """
    n = ids.shape[1]
    most = min(n, math.ceil(share * n + 6 * math.sqrt(share * (1 - share) * n)))
    allowed = real & ~jnp.isin(ids, jnp.asarray(special_ids, ids.dtype))

    def one(key, ids, allowed):
        choice_key, kind_key, word_key = jax.random.split(jax.random.fold_in(key, 2), 3)
        picked = allowed & jax.random.bernoulli(choice_key, share, (n,))
        positions = jnp.argsort(~picked, stable=True)[:most]
        chosen, targets = picked[positions], ids[positions]
        kind = jax.random.uniform(kind_key, (most,))
        words = jax.random.randint(word_key, (most,), 0, vocab_size - len(special_ids), ids.dtype)
        for special in sorted(special_ids):  # skips the special ids
            words += words >= special
        new = jnp.where(kind < kinds[0], mask_id, jnp.where(kind < sum(kinds), words, targets))
        masked = ids.at[positions].set(jnp.where(chosen, new, targets))
        return {"ids": masked, "positions": positions, "targets": targets, "chosen": chosen}

    return jax.vmap(one)(keys, ids, allowed)


def sum_and_count(losses, chosen):
    """Returns float32 `[b, 2]`, for each example the sum of the losses of its chosen tokens and their number.

    Args:
      losses: float32 `[b, n]`.
      chosen: bool `[b, n]`.
    """
    return jnp.stack([jnp.sum(losses, axis=1, where=chosen), chosen.sum(1).astype(jnp.float32)], axis=1)


def mean_of_chosen(sums):
    """Returns the mean loss of all chosen tokens of a batch from its `sum_and_count`; 0 without chosen tokens."""
    total, count = sums.sum(0)
    return total / jnp.maximum(count, 1)
