"""Contrastive losses as pure functions of features. Logits and losses are float32 whatever the features' dtype.

Under `jax.jit` with the batch sharded over a mesh the functions below are the losses of the global batch. None of them holds
the matrix of all pairs, forward or backward: see `clip_jax.losses.pairwise`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.losses.pairwise import EXCLUDED, Tile, pairwise, pairwise_loss


def cross_entropy(logits, targets):
    """Soft cross-entropy per row, `-(targets * log_softmax(logits)).sum(-1)`, float32 `[B]`."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def infonce(z_image, z_text, scale, smoothing=0.0, weights=None, kinds=None):
    """InfoNCE over the global batch: the mean of both directions (CLIP: Radford et al. 2021, figure 3; ALIGN: twice this).

    Args:
      z_image, z_text: unit vectors `[B, E]`; row i of one belongs to row i of the other.
      scale: `exp(logit_scale)`, scalar.
      smoothing: label smoothing; the target is `1 - smoothing` on the diagonal plus `smoothing / B` everywhere.
      weights: of the examples' losses, `[B]`, for both directions; the sum is divided by B all the same.
      kinds: `{name: bool [B]}`, kinds of examples whose accuracies are to be told apart.

    Returns:
      `(loss, metrics)`: a float32 scalar, and the accuracy in the batch of both directions, `image_to_text_acc` and
      `text_to_image_acc`; with `kinds` in their place `<name>_acc`, their mean over the examples of a kind, 0 without any.
    """
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    positive = scale * jnp.sum(z_image * z_text, axis=1)
    negatives = pairwise(_negatives_tile, scale, z_image, z_text)
    losses = [
        jnp.logaddexp(lse, positive) - (1 - smoothing) * positive for lse in (negatives.row_lse, negatives.col_lse)
    ]
    if smoothing:
        losses[0] -= smoothing * scale * z_image @ z_text.mean(0)
        losses[1] -= smoothing * scale * z_text @ z_image.mean(0)
    if kinds is None:
        return _mean(losses, weights), _accuracies(positive, negatives)
    won = ((positive > negatives.row_max).astype(jnp.float32) + (positive > negatives.col_max)) / 2
    return _mean(losses, weights), {
        f"{name}_acc": jnp.sum(won * kind) / jnp.maximum(jnp.sum(kind), 1) for name, kind in kinds.items()
    }


def contrast(queries, keys, scale, smoothing=0.0):
    """InfoNCE in one direction: each query is to find its own key among all keys of the global batch.

    Args:
      queries, keys: unit vectors `[B, E]`; both get a gradient.
      scale: scalar, multiplies the similarities.
      smoothing: of the target, spread evenly over the wrong keys.

    Returns:
      `(loss, share of the queries whose key beats all others)`, float32 scalars.
    """
    queries, keys, scale = (jnp.asarray(x, jnp.float32) for x in (queries, keys, scale))
    positive = scale * jnp.sum(queries * keys, axis=1)
    negatives = pairwise(_contrast_tile, scale, queries, keys)
    loss = jnp.logaddexp(negatives.row_lse, positive) - (1 - smoothing) * positive
    if smoothing:
        wrong = scale * queries @ keys.sum(0) - positive
        loss -= smoothing / (len(keys) - 1) * wrong
    return loss.mean(), (positive > negatives.row_max).mean()


def views_infonce(images, texts, scale, groups=None, both=True):
    """InfoNCE of every view of the images with every view of the texts, all in one pass over the pairs.

    Args:
      images, texts: lists of unit vectors `[B, E]`.
      scale: scalar.
      groups: for each view of the texts int `[B]`; wrong texts of the group of an image's own text are left out. None: all count.
      both: the mean of both directions; False: images are to find texts alone.

    Returns:
      `(losses, metrics)`: float32 scalars in the order of `itertools.product(images, texts)`, and the accuracies of the first pair.
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
    """InfoNCE against soft targets that are a function of the pair: UniCL's labels, ZeroVL's mixtures, OTTER's matchings.

    Args:
      z_image, z_text, scale, weights: as for `infonce`.
      target_fn: pure function `(target_params, image_targets [t, ...], text_targets [u, ...], i [t, 1], j [1, u])` to a tile
        `[t, u]` of the target, not negative and with a positive sum over each row and column. The target of image i is its
        row, that of text j its column, each divided by its sum.
      target_params, image_targets, text_targets: pytrees of arrays; of the last two with leading axis B. They get a gradient.

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
    """SigLIP's loss (Zhai et al. 2023, equation 1): every pair a binary decision; the sum over all pairs divided by B.

    Args:
      z_image, z_text: unit vectors `[B, E]`.
      scale, bias: scalars; a pair's logit is `scale * <z_image, z_text> + bias`.

    Returns:
      `(loss, metrics)` as `infonce`.
    """
    z_image, z_text = z_image.astype(jnp.float32), z_text.astype(jnp.float32)
    similarity = jnp.sum(z_image * z_text, axis=1)
    own = lax.stop_gradient(similarity)
    negatives, out = pairwise_loss(_sigmoid_tile, (scale, bias), (z_image, own), (z_text, own))
    ahead = {
        name: (x["ahead"] == 0).mean()
        for name, x in (("image_to_text_acc", out.row_sum), ("text_to_image_acc", out.col_sum))
    }
    return negatives / len(similarity) + jax.nn.softplus(-(scale * similarity + bias)).mean(), ahead


def filip(image_tokens, text_tokens, text_mask, scale, keys=None):
    """FILIP's token-wise late interaction (Yao et al. 2022, equations 3 to 6), mean of both directions.

    An image scores a text by the mean over its tokens of the best text token, a text an image by the mean over its real
    tokens of the best image token.

    Args:
      image_tokens, text_tokens: unit vectors `[B, P, D]` and `[B, L, D]`.
      text_mask: bool `[B, L]`, True for real tokens, at least one in each text.
      scale: scalar.
      keys: `(image tokens [B, p, D], (text tokens [B, l, D], their mask))` among which the best ones are sought; None: all.

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


def _mean(losses, weights=None):
    return 0.5 * sum(jnp.mean(x if weights is None else weights * x) for x in losses)


def _accuracies(positive, negatives):
    """Shares of the rows and of the columns whose positive pair beats every negative; a tie is lost."""
    return {
        "image_to_text_acc": (positive > negatives.row_max).mean(),
        "text_to_image_acc": (positive > negatives.col_max).mean(),
    }


def similarities(a, b):
    """Dot products of all rows of two arrays, float32 `[a, b]`."""
    return jnp.matmul(
        a, b.T, precision=lax.Precision.HIGHEST
    )  # a scale of 100 makes the error of bfloat16 passes visible


def _negatives_tile(scale, z_image, z_text, i, j):
    logits = jnp.where(i == j, EXCLUDED, scale * similarities(z_image, z_text))
    return Tile(row_lse=logits, col_lse=logits)


def _contrast_tile(scale, queries, keys, i, j):
    return Tile(row_lse=jnp.where(i == j, EXCLUDED, scale * similarities(queries, keys)))


def _views_tile(both, scale, rows, cols, i, j):
    (images, own), (texts, others) = rows, cols
    left_out = [a[:, None] == b for a, b in zip(own, others, strict=True)]
    logits = [
        jnp.where(x, EXCLUDED, scale * similarities(u, v)) for u in images for v, x in zip(texts, left_out, strict=True)
    ]
    return Tile(logits, logits if both else ())


def _soft_tile(target_fn, params, rows, cols, i, j):
    (scale, target_params), (z_image, image_targets), (z_text, text_targets) = params, rows, cols
    logits = scale * similarities(z_image, z_text)
    targets = target_fn(target_params, image_targets, text_targets, i, j).astype(jnp.float32)
    negatives, sums = jnp.where(i == j, EXCLUDED, logits), {"logits": targets * logits, "targets": targets}
    return Tile(negatives, negatives, sums, sums)


def _sigmoid_tile(params, rows, cols, i, j):
    (scale, bias), (z_image, own_row), (z_text, own_col) = params, rows, cols
    similarity = similarities(z_image, z_text)
    negative = i != j
    loss = jnp.where(negative, jax.nn.softplus(scale * similarity + bias), 0.0)
    fixed = lax.stop_gradient(similarity)
    row = {"loss": loss, "ahead": negative & (fixed >= own_row[:, None])}
    return Tile(row_sum=row, col_sum={"ahead": negative & (fixed >= own_col)})


def _late_interaction(rows, cols):
    """Scores `[t, u]` of images for texts, and of texts for images."""
    (image_tokens, image_keys), (text, text_keys) = rows, cols
    similarity = _token_similarities(image_tokens, text[0])
    to_keys = similarity if text_keys is None else _token_similarities(image_tokens, text_keys[0])
    of_image = jnp.where((text_keys or text)[1][None, :, None], to_keys, EXCLUDED).max(3).mean(2)
    to_keys = similarity if image_keys is None else _token_similarities(image_keys, text[0])
    of_text = jnp.sum(to_keys.max(2), axis=2, where=text[1][None]) / text[1].sum(1)
    return of_image, of_text


def _token_similarities(image_tokens, text_tokens):
    return jnp.einsum("ipd,jld->ijpl", image_tokens, text_tokens, preferred_element_type=jnp.float32)


def _filip_tile(scale, rows, cols, i, j):
    of_image, of_text = (jnp.where(i == j, EXCLUDED, scale * x) for x in _late_interaction(rows, cols))
    return Tile(row_lse=of_image, col_lse=of_text)
