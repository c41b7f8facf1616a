"""Which patches and words are masked, drawn per example on the device."""

import math

import jax
import jax.numpy as jnp


def mask_patches(keys, n, share):
    """bool `[b, n]`, True for the `round(share * n)` patches, at least one, that are masked; drawn from `keys[b]`."""
    count = max(1, round(share * n))
    return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 0), n) < count)(keys)


def mask_words(keys, ids, real, share, kinds, vocab_size):
    """Chooses words as BERT does (Devlin et al. 2019, section 3.1), drawn from `keys[b]`.

    Args:
      keys: PRNG keys `[b]`.
      ids: int32 `[b, n]`.
      real: bool `[b, n]`, True up to the end-of-text token, which is never chosen.
      share: of a text's words that are chosen, at least one.
      kinds: of the chosen words the share that is hidden, and that becomes a random word; the rest stay.
      vocab_size: random words are drawn below this.

    Returns:
      `{"ids": with random words, "words": bool [b, n], the hidden ones}`, and `[b, k]`, k the most that can be chosen:
      `"positions"`, `"targets"` (ids before) and `"chosen"`, False where there were fewer.
    """
    n = ids.shape[1]
    most = max(1, round(share * (n - 1)))

    def one(key, ids, real):
        of_order, of_kind, of_word = jax.random.split(jax.random.fold_in(key, 1), 3)
        count = real.sum() - 1
        order = jnp.where(jnp.arange(n) < count, jax.random.uniform(of_order, (n,)), -1.0)
        found, positions = jax.lax.top_k(order, most)
        chosen = (found >= 0) & (jnp.arange(most) < jnp.maximum(1, jnp.round(share * count)))
        kind = jax.random.uniform(of_kind, (most,))
        targets, random_words = ids[positions], jax.random.randint(of_word, (most,), 0, vocab_size, ids.dtype)
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
    """Chooses each token with the chance `share`, as DeCLIP does (Li et al. 2022, after Devlin et al. 2019), drawn from `keys[b]`.

    Special tokens are neither chosen nor drawn: a text ends where it ended before, so a tower pools the same position.

    Args:
      keys: PRNG keys `[b]`.
      ids: int32 `[b, n]`.
      real: bool `[b, n]`, False at padding, which is never chosen.
      share: the chance of a token.
      kinds: of the chosen tokens the share that becomes `mask_id`, and that becomes a random id; the rest stay.
      vocab_size: random ids are drawn below this.
      special_ids: ids that stand for no text.

    Returns:
      `{"ids": masked, int32 [b, n]}`, and `"positions"`, `"targets"`, `"chosen"` `[b, k]` as `mask_words`. `k` is six
      standard deviations above what is expected: of more than that, which no run will see, only the first are chosen.
    """
    n = ids.shape[1]
    most = min(n, math.ceil(share * n + 6 * math.sqrt(share * (1 - share) * n)))
    allowed = real & ~jnp.isin(ids, jnp.asarray(special_ids, ids.dtype))

    def one(key, ids, allowed):
        of_choice, of_kind, of_word = jax.random.split(jax.random.fold_in(key, 2), 3)
        picked = allowed & jax.random.bernoulli(of_choice, share, (n,))
        positions = jnp.argsort(~picked, stable=True)[:most]
        chosen, targets = picked[positions], ids[positions]
        kind = jax.random.uniform(of_kind, (most,))
        words = jax.random.randint(of_word, (most,), 0, vocab_size - len(special_ids), ids.dtype)
        for special in sorted(special_ids):
            words += words >= special
        new = jnp.where(kind < kinds[0], mask_id, jnp.where(kind < sum(kinds), words, targets))
        masked = ids.at[positions].set(jnp.where(chosen, new, targets))
        return {"ids": masked, "positions": positions, "targets": targets, "chosen": chosen}

    return jax.vmap(one)(keys, ids, allowed)


def sum_and_count(losses, chosen):
    """float32 `[b, 2]` of `[b, n]`: the sum of the losses of the chosen tokens of each example, and their number."""
    return jnp.stack([jnp.sum(losses, axis=1, where=chosen), chosen.sum(1).astype(jnp.float32)], axis=1)


def mean_of_chosen(sums):
    """The mean loss of all chosen tokens of a batch, of `sum_and_count`; 0 when there is none."""
    total, count = sums.sum(0)
    return total / jnp.maximum(count, 1)
