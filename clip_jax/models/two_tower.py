"""An image tower and a text tower with one embedding space."""

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.common import FROZEN, fold_in_ids, l2_normalize, shard_batch
from clip_jax.models.towers import image_tower, text_tower, unprojected


class TwoTower:
    """The two towers of a configuration as pure functions of `(params, extra)`.

    The parameters are `{"img": ..., "txt": ...}`. Towers with batch norm keep their running statistics under the same
    paths in `extra["batch_stats"]`. Without such a tower `extra` is empty. With `train` a tower uses the statistics of
    the batch and returns an updated `extra`. Otherwise it uses the running statistics and returns `extra` unchanged.
    With `train`, too, a tower that is frozen as a whole (`clip_jax.models.common.mark_frozen`) runs as in evaluation:
    with its running statistics, and without dropout, stochastic depth and patch dropout. Other entries of `params` and
    `extra` belong to the method and are preserved.
    """

    def __init__(self, model, tokens=False):
        """Builds the towers.

        Args:
          model: the section `config.model`.
          tokens: whether the towers return their tokens; without, they may return None.

        Raises UserError for invalid towers.
        """
        self.image, self.text = image_tower(model, tokens), text_tower(model, tokens)
        self.mean, self.std = (np.asarray(x, np.float32) * 255 for x in (model.image_mean, model.image_std))

    def init(self, rng, batch):
        """Returns initial `(params, extra)` for the shapes of `batch["image"]` and `batch["text"]`."""
        rng_image, rng_text = jax.random.split(rng)
        variables = {
            "img": self.image.init(rng_image, batch["image"].astype(jnp.float32)),
            "txt": self.text.init(rng_text, batch["text"]),
        }
        stats = {name: v["batch_stats"] for name, v in variables.items() if "batch_stats" in v}
        return {name: v["params"] for name, v in variables.items()}, {"batch_stats": stats} if stats else {}

    def encode_image(self, params, extra, images, train=False, keys=None, normalize=True):
        """Embeds images.

        Args:
          params, extra: of the model.
          images: `[b, h, w, 3]`, pixels from 0 to 255.
          train: whether batch norm uses the statistics of the batch and dropout is on.
          keys: PRNG keys `[b]` for dropout.
          normalize: False returns the embeddings of the tower without scaling them to unit length.

        Returns:
          `(embeddings float32 [b, E], tokens [b, n, D], extra)`. The embeddings have unit length.
        """
        return self._encode(self.image, "img", params, extra, self._pixels(images), train, keys, normalize)

    def encode_text(self, params, extra, ids, train=False, keys=None):
        """Embeds texts.

        Args:
          params, extra, train, keys: as for `encode_image`.
          ids: int32 `[b, n]`.

        Returns:
          `(embeddings float32 [b, E], tokens [b, n, D], extra)`. The embeddings have unit length.
        """
        return self._encode(self.text, "txt", params, extra, shard_batch(ids), train, keys)

    def encode(self, params, extra, batch, rng, train):
        """Embeds a batch.

        Args:
          params, extra, train: as for `encode_image`.
          batch: `image [b, h, w, 3]`, `text` int32 `[b, n]` and `example_id` uint32 `[b, 2]`.
          rng: PRNG key. The id of each example is folded into it, so that its randomness does not depend on the batch.

        Returns:
          `({"image": ..., "text": ...}, extra)`, unit vectors float32 `[b, E]`.
        """
        keys = fold_in_ids(rng, batch["example_id"])
        text_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        image, _, extra = self.encode_image(params, extra, batch["image"], train, keys)
        text, _, extra = self.encode_text(params, extra, batch["text"], train, text_keys)
        return {"image": image, "text": text}, extra

    def embed_image(self, params, extra, images):
        """Returns the embeddings of images `[b, h, w, 3]` in evaluation, unit vectors float32 `[b, E]`."""
        return self.encode_image(params, extra, images)[0]

    def image_features(self, params, extra, images):
        """Returns the features of images `[b, h, w, 3]` before the projection, float32 `[b, D]`, in evaluation.

        They are not normalised. A tower without a projection (`proj=False`) and a ResNet, whose attention pooling
        projects, return their embeddings (`towers.unprojected`).
        """
        return self._encode(unprojected(self.image), "img", params, extra, self._pixels(images), False, None, False)[0]

    def embed_text(self, params, extra, ids):
        """Returns the embeddings of int32 ids `[b, n]` in evaluation, unit vectors float32 `[b, E]`."""
        return self.encode_text(params, extra, ids)[0]

    def _pixels(self, images):
        return (shard_batch(images).astype(jnp.float32) - self.mean) / self.std

    def _encode(self, tower, name, params, extra, x, train, keys, normalize=True):
        train = train and name not in extra.get(FROZEN, {})
        stats = extra.get("batch_stats", {})
        variables = {"params": params[name]} | ({"batch_stats": stats[name]} if name in stats else {})
        mutable = ["batch_stats"] if train and name in stats else []
        (embedding, tokens), new = tower.apply(variables, x, train=train, keys=keys, mutable=mutable)
        if mutable:
            extra = extra | {"batch_stats": stats | {name: new["batch_stats"]}}
        return l2_normalize(embedding) if normalize else embedding, tokens, extra
