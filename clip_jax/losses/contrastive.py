"""Contrastive losses as pure functions of features. Logits and losses are float32 whatever the features' dtype.

Under ``jax.jit`` with the batch sharded over a mesh the functions below are the losses of the global batch: the partitioner
inserts the collectives.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits, targets):
    """Soft cross-entropy per row, ``-(targets * log_softmax(logits)).sum(-1)``, float32 ``[B]``."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def infonce(z_image, z_text, scale, smoothing=0.0):
    """InfoNCE over the global batch: the mean of both directions (CLIP: Radford et al. 2021, figure 3; ALIGN: twice this).

    Args:
      z_image, z_text: unit vectors ``[B, E]``; row i of one belongs to row i of the other.
      scale: ``exp(logit_scale)``, scalar.
      smoothing: label smoothing; the target is ``1 - smoothing`` on the diagonal plus ``smoothing / B`` everywhere.

    Returns:
      ``(loss, metrics)``: a float32 scalar, and the accuracy in the batch of both directions, ``image_to_text_acc`` and
      ``text_to_image_acc``.
    """
    logits = scale * jnp.matmul(z_image, z_text.T, preferred_element_type=jnp.float32)
    index = jnp.arange(logits.shape[0])
    # Not jnp.diagonal: its gradient is a scatter, for which the partitioner gathers indices over all devices.
    positives = index[:, None] == index

    def direction(logits_BB):
        log_p = jax.nn.log_softmax(logits_BB, axis=1)
        loss = -((1 - smoothing) * jnp.sum(log_p, axis=1, where=positives) + smoothing * log_p.mean(1)).mean()
        return loss, (jnp.argmax(logits_BB, axis=1) == index).mean()

    loss_i2t, acc_i2t = direction(logits)
    loss_t2i, acc_t2i = direction(logits.T)
    return 0.5 * (loss_i2t + loss_t2i), {"image_to_text_acc": acc_i2t, "text_to_image_acc": acc_t2i}
