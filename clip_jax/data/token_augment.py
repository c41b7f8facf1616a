"""Augments the token ids of a caption as the published code of ZeroVL does (Cui et al. 2022)."""

import numpy as np

from clip_jax.errors import UserError


def tokens(ids, rng, tokenizer, share=0.2, mask=0.5, replace=0.1):
    """Returns ids of which a random share is masked, replaced or deleted.

    Each token is selected with probability `share`. A selected token is masked with probability `mask`, replaced by a
    random token with probability `replace`, and deleted otherwise. The published code deletes where its comment says
    that tokens are kept. Two deviations from it: the code joins the result to words of at most three pieces and splits
    these again, which is not done here; and it may delete all tokens, while here one stays.

    Args:
      ids: list of int, the caption without special tokens.
      rng: `np.random.Generator`.
      tokenizer: a `clip_jax.data.tokenizers.Tokenizer`.
      share: float in [0, 1], the probability that a token is selected.
      mask: float, the share of the selected tokens that is masked.
      replace: float, the share of the selected tokens that is replaced, never by a special token.

    Raises UserError for a tokenizer without a mask token, and for shares out of range.
    """
    if min(share, mask, replace) < 0 or share > 1 or mask + replace > 1:
        raise UserError(
            f"augment: tokens({share}, {mask}, {replace}): shares are between 0 and 1, and so is mask + replace"
        )
    if mask and tokenizer.mask_id is None:
        raise UserError(
            f"augment: tokens masks words, but the tokenizer {tokenizer.kind!r} has no mask token: give mask=0"
        )
    selected, action = rng.random(len(ids)) < share, rng.random(len(ids))
    is_deleted = selected & (action >= mask + replace)
    if len(ids) and is_deleted.all():
        is_deleted[rng.integers(len(ids))] = False
    changed = []
    for i, is_selected, draw in zip(ids, selected, action, strict=True):
        if is_selected and draw < mask:
            i = tokenizer.mask_id
        elif is_selected and draw < mask + replace:
            i = _random_token(rng, tokenizer)
        changed.append(i)
    return [i for i, deleted in zip(changed, is_deleted, strict=True) if not deleted]


def _random_token(rng, tokenizer):
    while (token := int(rng.integers(tokenizer.vocab_size))) in tokenizer.special_ids:
        pass
    return token


def pack(ids, tokenizer, context):
    """Returns the ids of a text with special tokens, int32 `[context]`, truncated so that EOT stays last and padded."""
    empty = tokenizer([""], context)[0]
    start = int(tokenizer.sot_id is not None)
    room = context - start - tokenizer.options["eot"]
    return np.concatenate([empty[:start], ids[:room], empty[start:]])[:context].astype(np.int32)
