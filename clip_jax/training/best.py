"""Which checkpoint is the best: `checkpoint.best` names the metric."""

import math

from orbax.checkpoint import checkpoint_managers

from clip_jax.errors import StorageError, UserError


def score(metrics, best):
    """Returns a metric by which the largest is best, `-NAME` negated; -inf where it is missing or NaN."""
    value = (metrics or {}).get(best.removeprefix("-"))
    if value is None or math.isnan(value):
        return -math.inf
    return -value if best.startswith("-") else value


class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the newest of the checkpoints with the best metric.

    Orbax's own policy knows the metrics of this start alone, and would delete the best checkpoint of an earlier one.

    Args:
      best: the metric, see `score`.
      read: a function of a step that returns the metrics of its checkpoint.
    """

    def __init__(self, best, read):
        self.best, self.read = best, read
        self.scores = {}  # by step

    def should_preserve(self, checkpoints, *, context):
        scores = [self._score(checkpoint) for checkpoint in checkpoints]
        known = ((value, i) for i, value in enumerate(scores) if value is not None and value > -math.inf)
        top = max(known, default=(0, None))[1]
        return [i == top or value is None for i, value in enumerate(scores)]

    def _score(self, checkpoint):
        """Returns the score of a checkpoint, None while a bucket does not answer."""
        step, metrics = checkpoint.step, checkpoint.metrics
        if step not in self.scores:
            try:
                metrics = self.read(step) if metrics is None else metrics
            except UserError:  # it is damaged, or still being written, without an evaluation
                metrics = None
            except StorageError:
                return None
            self.scores[step] = score(metrics, self.best)
        return self.scores[step]
