"""Which patches and words are masked, drawn per example on the device."""

import jax
import jax.numpy as jnp


def mask_patches(keys, n, share):
    """bool ``[b, n]``, True for the ``round(share * n)`` patches, at least one, that are masked; drawn from ``keys[b]``."""
    count = max(1, round(share * n))
    return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 0), n) < count)(keys)


def mask_words(keys, ids, real, share, kinds, vocab_size):
    """Chooses words as BERT does (Devlin et al. 2019, section 3.1), drawn from ``keys[b]``.

    Args:
      keys: PRNG keys ``[b]``.
      ids: int32 ``[b, n]``.
      real: bool ``[b, n]``, True up to the end-of-text token, which is never chosen.
      share: of a text's words that are chosen, at least one.
      kinds: of the chosen words the share that is hidden, and that becomes a random word; the rest stay.
      vocab_size: random words are drawn below this.

    Returns:
      ``{"ids": with random words, "words": bool [b, n], the hidden ones}``, and ``[b, k]``, k the most that can be chosen:
      ``"positions"``, ``"targets"`` (ids before) and ``"chosen"``, False where there were fewer.
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
