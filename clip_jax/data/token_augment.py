"""Augmentation of the ids of a caption: that of ZeroVL (Cui et al. 2022), as its code has it."""

import numpy as np

from clip_jax.errors import UserError


def tokens(ids, rng, tokenizer, share=0.2, mask=0.5, replace=0.1):
    """Each token is chosen with the chance `share`; of these a part is masked, a part becomes a random token, and the rest is deleted.

    The published code deletes, where its comment says that tokens are kept. It joins what is left to words, of three pieces at most, and
    splits these again, which is not done here, and it may delete all; here one token stays.

    Args:
        ids: of the text alone, without start, end and padding.
        mask, replace: of the chosen ones the part that is masked, and that becomes random; never a special token.

    Raises UserError for a tokenizer without a mask, and for values that are no shares.
    """
    if min(share, mask, replace) < 0 or share > 1 or mask + replace > 1:
        raise UserError(
            f"augment: tokens({share}, {mask}, {replace}): shares are between 0 and 1, the last two together as well"
        )
    if mask and tokenizer.mask_id is None:
        raise UserError(
            f"augment: tokens masks words, but the tokenizer {tokenizer.kind!r} has no mask token: give mask=0"
        )
    chosen, kind = rng.random(len(ids)) < share, rng.random(len(ids))
    deleted = chosen & (kind >= mask + replace)
    if len(ids) and deleted.all():
        deleted[rng.integers(len(ids))] = False
    changed = [
        i if not c else tokenizer.mask_id if k < mask else _random_token(rng, tokenizer) if k < mask + replace else i
        for i, c, k in zip(ids, chosen, kind, strict=True)
    ]
    return [i for i, is_deleted in zip(changed, deleted, strict=True) if not is_deleted]


def _random_token(rng, tokenizer):
    while (token := int(rng.integers(tokenizer.vocab_size))) in tokenizer.special_ids:
        pass
    return token


def pack(ids, tokenizer, context):
    """The ids of a text as the tokenizer gives them, int32 [context]: with start and end, cut so that the end stays last, and padded."""
    empty = tokenizer([""], context)[0]
    start = int(tokenizer.sot_id is not None)
    return np.concatenate([empty[:start], ids[: context - start - tokenizer.options["eot"]], empty[start:]])[
        :context
    ].astype(np.int32)
