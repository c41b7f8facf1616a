"""Contrastive losses as pure functions of features. Logits and losses are float32 for features of any dtype.

Under `jax.jit` with a batch sharded over a mesh these are the losses of the global batch. None of them stores the
matrix of all pairs, in the forward or the backward pass: see `clip_jax.losses.pairwise`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.losses.pairwise import EXCLUDED, Tile, pairwise, pairwise_loss


def cross_entropy(logits, targets):
    """Returns the cross-entropy of each row, `-(targets * log_softmax(logits)).sum(-1)`, float32 `[B]`.

    Args:
      logits: `[B, C]`.
      targets: `[B, C]`, rows of probabilities (soft targets).
    """
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def infonce(z_image, z_text, scale, smoothing=0.0, weights=None, kinds=None):
    """InfoNCE over the global batch, the mean of both directions (CLIP: Radford et al. 2021, figure 3).

    ALIGN's loss is twice this value.

    Args:
      z_image, z_text: unit vectors `[B, E]`. Row i of both is a positive pair.
      scale: scalar, `exp(logit_scale)`.
      smoothing: label smoothing. The target is `1 - smoothing` on the diagonal plus `smoothing / B` everywhere.
      weights: None, or the weight of each example in both directions, `[B]`. The sum is divided by B, not by their sum.
      kinds: None, or `{name: bool [B]}`, kinds of examples with separate accuracies.

    Returns:
      `(loss, metrics)`. The loss is a float32 scalar. The metrics are the accuracies within the batch,
      `image_to_text_acc` and `text_to_image_acc`. With `kinds` they are instead `<name>_acc`, the mean of both
      directions over the examples of a kind, 0 without such examples.
    """
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    positive = scale * jnp.sum(z_image * z_text, axis=1)
    negatives = pairwise(_negatives_tile, scale, z_image, z_text)
    losses = [
        jnp.logaddexp(lse, positive) - (1 - smoothing) * positive for lse in (negatives.row_lse, negatives.col_lse)
    ]
    if smoothing:
        losses[0] -= smoothing * scale * similarities(z_image, z_text.mean(0))
        losses[1] -= smoothing * scale * similarities(z_text, z_image.mean(0))
    if kinds is None:
        return _mean(losses, weights), _accuracies(positive, negatives)
    correct = ((positive > negatives.row_max).astype(jnp.float32) + (positive > negatives.col_max)) / 2
    return _mean(losses, weights), {
        f"{name}_acc": jnp.sum(correct * kind) / jnp.maximum(jnp.sum(kind), 1) for name, kind in kinds.items()
    }


def contrast(queries, keys, scale, smoothing=0.0):
    """InfoNCE in one direction: each query is classified among all keys of the global batch.

    Args:
      queries, keys: unit vectors `[B, E]`. Row i of both is a positive pair. Both receive a gradient.
      scale: scalar factor of the similarities.
      smoothing: label smoothing, spread evenly over the B - 1 wrong keys.

    Returns:
      `(loss, accuracy)`, float32 scalars. The accuracy is the share of the queries whose own key is the most similar
      one.
    """
    queries, keys, scale = (jnp.asarray(x, jnp.float32) for x in (queries, keys, scale))
    positive = scale * jnp.sum(queries * keys, axis=1)
    negatives = pairwise(_contrast_tile, scale, queries, keys)
    loss = jnp.logaddexp(negatives.row_lse, positive) - (1 - smoothing) * positive
    if smoothing:
        wrong = scale * similarities(queries, keys.sum(0)) - positive
        loss -= smoothing / (len(keys) - 1) * wrong
    return loss.mean(), (positive > negatives.row_max).mean()


def views_infonce(images, texts, scale, groups=None, both=True):
    """InfoNCE of every image view with every text view, computed in one pass over the pairs.

    Args:
      images, texts: lists of unit vectors `[B, E]`, one entry per view.
      scale: scalar factor of the similarities.
      groups: None, or one int array `[B]` per text view. A wrong text in the group of the right one is no negative.
      both: True for the mean of both directions, False for image to text alone.

    Returns:
      `(losses, metrics)`. The losses are float32 scalars in the order of `itertools.product(images, texts)`. The
      metrics are the accuracies of the first pair of views, as in `infonce`.
    """
    groups = groups or [jnp.arange(len(images[0]))] * len(texts)
    positives = [scale * jnp.sum(u * v, axis=1) for u in images for v in texts]
    out = pairwise(functools.partial(_views_tile, both), scale, (images, groups), (texts, groups))
    sides = ((out.row_lse, out.row_max), (out.col_lse, out.col_max))[: 1 + both]
    losses = [
        sum(jnp.mean(jnp.logaddexp(lse[k], positive) - positive) for lse, _ in sides) / len(sides)
        for k, positive in enumerate(positives)
    ]
    names = ("image_to_text_acc", "text_to_image_acc")[: len(sides)]
    return losses, {name: (positives[0] > largest[0]).mean() for name, (_, largest) in zip(names, sides, strict=True)}


def soft_infonce(z_image, z_text, scale, target_fn, target_params, image_targets, text_targets, weights=None):
    """InfoNCE with soft targets that are a function of the pair, such as UniCL's labels and ZeroVL's mixtures.

    Args:
      z_image, z_text, scale, weights: as in `infonce`.
      target_fn: pure function `(target_params, image_targets [t, ...], text_targets [u, ...], i [t, 1], j [1, u])` that
        returns a tile `[t, u]` of the target matrix; i and j are positions in the batch. The entries are not negative,
        and each row and column has a positive sum. The target of image i is row i, that of text j is column j, each
        divided by its sum.
      target_params: pytree of arrays that every tile needs whole.
      image_targets, text_targets: pytrees of arrays `[B, ...]`. These and `target_params` receive a gradient.

    Returns:
      `(loss, metrics)` as `infonce`.
    """
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    positive = scale * jnp.sum(z_image * z_text, axis=1)
    tile_fn = functools.partial(_soft_tile, target_fn)
    out = pairwise(tile_fn, (scale, target_params), (z_image, image_targets), (z_text, text_targets))
    losses = [
        jnp.logaddexp(lse, positive) - sums["logits"] / sums["targets"]
        for lse, sums in ((out.row_lse, out.row_sum), (out.col_lse, out.col_sum))
    ]
    return _mean(losses, weights), _accuracies(positive, out)


def sigmoid(z_image, z_text, scale, bias):
    """SigLIP's sigmoid loss (Zhai et al. 2023, equation 1): every pair is a binary classification.

    The loss is the sum over all pairs of the global batch, divided by B.

    Args:
      z_image, z_text: unit vectors `[B, E]`. Row i of both is a positive pair.
      scale, bias: scalars. The logit of a pair is `scale * <z_image, z_text> + bias`.

    Returns:
      `(loss, metrics)` as `infonce`.
    """
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    similarity = jnp.sum(z_image * z_text, axis=1)
    own = lax.stop_gradient(similarity)
    negatives, out = pairwise_loss(_sigmoid_tile, (scale, bias), (z_image, own), (z_text, own))
    accuracies = {
        name: (x["ahead"] == 0).mean()
        for name, x in (("image_to_text_acc", out.row_sum), ("text_to_image_acc", out.col_sum))
    }
    return negatives / len(similarity) + jax.nn.softplus(-(scale * similarity + bias)).mean(), accuracies


def filip(image_tokens, text_tokens, text_mask, scale, keys=None):
    """FILIP's loss (Yao et al. 2022, equations 3 to 6): InfoNCE with token-wise late interaction.

    The loss is the mean of both directions. The similarity of an image to a text is the mean, over the tokens of the
    image, of the largest dot product with a token of the text. That of a text to an image is the same with the roles
    exchanged, over the tokens that are not padding.

    Args:
      image_tokens, text_tokens: unit vectors `[B, P, D]` and `[B, L, D]`, see `token_similarities` for their dtype.
      text_mask: bool `[B, L]`, False at padding. Each text has at least one real token.
      scale: scalar factor of the similarities.
      keys: `(image tokens [B, p, D], (text tokens [B, l, D], their mask bool [B, l]))` over which the maxima are taken.
        None takes them over all tokens.

    Returns:
      `(loss, metrics)` as `infonce`.
    """
    image_keys, text_keys = keys or (None, None)
    rows, cols = (image_tokens, image_keys), ((text_tokens, text_mask), text_keys)
    entry_size = image_tokens.shape[1] * text_tokens.shape[1]
    if keys is not None:
        entry_size = image_tokens.shape[1] * text_keys[0].shape[1] + image_keys.shape[1] * text_tokens.shape[1]
    own = jax.vmap(lambda *pair: _late_interaction(*jax.tree.map(lambda x: x[None], pair)))(rows, cols)
    positives = [scale * x[:, 0, 0] for x in own]
    out = pairwise(_filip_tile, scale, rows, cols, entry_size)
    losses = [
        jnp.logaddexp(lse, positive) - positive
        for lse, positive in zip((out.row_lse, out.col_lse), positives, strict=True)
    ]
    accuracies = _accuracies(positives[0], out), _accuracies(positives[1], out)
    return _mean(losses), {name: accuracies[k][name] for k, name in enumerate(accuracies[0])}


def paired_keys(image_tokens, text_tokens, real, count=16):
    """Returns the tokens that are the most similar to those of the paired sample, the argument `keys` of `filip`.

    Sense-GVT/DeCLIP selects them by the sum of their similarities. The selection has no gradient and never contains
    padding.

    Args:
      image_tokens, text_tokens, real: as in `filip`.
      count: the number of tokens of a sample.
    """
    fixed = lax.stop_gradient((image_tokens, text_tokens))
    similarity = jnp.where(real[:, None], token_similarities("bpd,bld->bpl", *fixed), 0.0)
    image_keys, _ = top_tokens(image_tokens, True, similarity.sum(2), min(count, image_tokens.shape[1]))
    return image_keys, top_tokens(text_tokens, real, similarity.sum(1), min(count, text_tokens.shape[1]))


def top_tokens(tokens, real, score, k):
    """Returns the `k` tokens with the largest scores, `[b, k, D]`, and a mask of those that are real, bool `[b, k]`."""
    values, index = lax.top_k(jnp.where(real, score, EXCLUDED), k)
    return jnp.take_along_axis(tokens, index[..., None], axis=1), values > EXCLUDED


def _mean(losses, weights=None):
    return 0.5 * sum(jnp.mean(x if weights is None else weights * x) for x in losses)


def _accuracies(positive, negatives):
    """Returns the shares of the rows and columns whose positive pair beats every negative. A tie counts as wrong."""
    return {
        "image_to_text_acc": (positive > negatives.row_max).mean(),
        "text_to_image_acc": (positive > negatives.col_max).mean(),
    }


def token_similarities(subscripts, a, b):
    """Returns an `einsum` of tokens, float32. It sums in float32 and differentiates once, in reverse mode.

    Two arrays of bfloat16 are multiplied as they are, and so are the gradients. Others are multiplied in float32, at
    the precision of `similarities`: the gradient of a single pair is below the smallest number of float16.
    """
    if a.dtype == b.dtype == jnp.bfloat16:
        return _bfloat16_einsum(subscripts, a, b)
    return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def compared(tokens, dtype):
    """Returns the float32 tokens in bfloat16 where this is the dtype, or its name, of a model: `token_similarities`."""
    return tokens.astype(jnp.bfloat16) if jnp.dtype(dtype) == jnp.bfloat16 else tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bfloat16_einsum(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _bfloat16_einsum_bwd(subscripts, tokens, gradient):
    (a, b), (x, y, z) = tokens, subscripts.replace("->", ",").split(",")
    gradient = gradient.astype(jnp.bfloat16)  # a product with float32 would be computed in float32
    products = _bfloat16_einsum(f"{z},{y}->{x}", gradient, b), _bfloat16_einsum(f"{z},{x}->{y}", gradient, a)
    return tuple(product.astype(jnp.bfloat16) for product in products)


_bfloat16_einsum.defvjp(lambda subscripts, a, b: (_bfloat16_einsum(subscripts, a, b), (a, b)), _bfloat16_einsum_bwd)


def similarities(a, b):
    """Returns the dot products of all rows of `a[m, E]` and `b[n, E]`, float32 `[m, n]`; `[m]` for a vector `b[E]`."""
    # A scale of 100 would make the error of bfloat16 passes visible.
    return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)


def _negatives_tile(scale, z_image, z_text, i, j):
    logits = jnp.where(i == j, EXCLUDED, scale * similarities(z_image, z_text))
    return Tile(row_lse=logits, col_lse=logits)


def _contrast_tile(scale, queries, keys, i, j):
    return Tile(row_lse=jnp.where(i == j, EXCLUDED, scale * similarities(queries, keys)))


def _views_tile(both, scale, rows, cols, i, j):
    (images, row_groups), (texts, col_groups) = rows, cols
    excluded = [a[:, None] == b for a, b in zip(row_groups, col_groups, strict=True)]
    logits = [
        jnp.where(x, EXCLUDED, scale * similarities(u, v)) for u in images for v, x in zip(texts, excluded, strict=True)
    ]
    return Tile(logits, logits if both else ())


def _soft_tile(target_fn, params, rows, cols, i, j):
    scale, target_params = params
    (z_image, image_targets), (z_text, text_targets) = rows, cols
    logits = scale * similarities(z_image, z_text)
    targets = target_fn(target_params, image_targets, text_targets, i, j).astype(jnp.float32)
    negatives, sums = jnp.where(i == j, EXCLUDED, logits), {"logits": targets * logits, "targets": targets}
    return Tile(negatives, negatives, sums, sums)


def _sigmoid_tile(params, rows, cols, i, j):
    scale, bias = params
    (z_image, own_row), (z_text, own_col) = rows, cols
    similarity = similarities(z_image, z_text)
    negative = i != j
    loss = jnp.where(negative, jax.nn.softplus(scale * similarity + bias), 0.0)
    fixed = lax.stop_gradient(similarity)
    # "ahead" counts the negatives that are at least as similar as the positive pair.
    row = {"loss": loss, "ahead": negative & (fixed >= own_row[:, None])}
    return Tile(row_sum=row, col_sum={"ahead": negative & (fixed >= own_col)})


def _late_interaction(rows, cols):
    """Returns the similarities of images to texts and of texts to images, each `[t, u]`."""
    (image_tokens, image_keys), (text, text_keys) = rows, cols
    pairs = "ipd,jld->ijpl"  # images, patches; texts, words
    similarity = token_similarities(pairs, image_tokens, text[0])
    to_keys = similarity if text_keys is None else token_similarities(pairs, image_tokens, text_keys[0])
    image_scores = jnp.where((text_keys or text)[1][None, :, None], to_keys, EXCLUDED).max(3).mean(2)
    to_keys = similarity if image_keys is None else token_similarities(pairs, image_keys, text[0])
    text_scores = jnp.sum(to_keys.max(2), axis=2, where=text[1][None]) / text[1].sum(1)
    return image_scores, text_scores


def _filip_tile(scale, rows, cols, i, j):
    image_logits, text_logits = (jnp.where(i == j, EXCLUDED, scale * x) for x in _late_interaction(rows, cols))
    return Tile(row_lse=image_logits, col_lse=text_logits)
