"""An image tower and a text tower that embed into one space."""

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.common import l2_normalize, shard_batch
from clip_jax.models.towers import image_tower, text_tower


class TwoTower:
    """The towers of a configuration as pure functions of `(params, extra)`.

    Parameters are `{"img": ..., "txt": ...}`. Running statistics of towers with BatchNorm are
    `extra["batch_stats"] = {"img": ...}` with the same paths; without such a tower `extra` is empty. In training (`train`) a
    tower uses the statistics of the batch at hand and `extra` comes back changed, otherwise the running ones, and it does not.
    Other entries of `extra` and of the parameters are the method's own and are let through.
    """

    def __init__(self, model, tokens=False):
        """The towers of the section `config.model`, of their tokens or not; raises UserError for towers that cannot be built."""
        self.image, self.text = image_tower(model, tokens), text_tower(model, tokens)
        self.mean, self.std = (np.asarray(x, np.float32) * 255 for x in (model.image_mean, model.image_std))

    def init(self, rng, batch):
        """`(params, extra)` for `batch["image"]` and `batch["text"]`."""
        rng_image, rng_text = jax.random.split(rng)
        variables = {
            "img": self.image.init(rng_image, batch["image"].astype(jnp.float32)),
            "txt": self.text.init(rng_text, batch["text"]),
        }
        stats = {name: v["batch_stats"] for name, v in variables.items() if "batch_stats" in v}
        return {name: v["params"] for name, v in variables.items()}, {"batch_stats": stats} if stats else {}

    def encode_image(self, params, extra, images, train=False, keys=None, normalize=True):
        """`(unit rows float32 [b, E], tokens [b, n, D], extra)` of pixels 0 to 255, `[b, h, w, 3]`; `keys[b]`: randomness.

        Without `normalize` the rows are as the tower gives them.
        """
        images = (shard_batch(images).astype(jnp.float32) - self.mean) / self.std
        return self._encode(self.image, "img", params, extra, images, train, keys, normalize)

    def encode_text(self, params, extra, ids, train=False, keys=None):
        """`(unit rows float32 [b, E], tokens [b, n, D], extra)` of int32 ids `[b, n]`; `keys[b]`: randomness."""
        return self._encode(self.text, "txt", params, extra, shard_batch(ids), train, keys)

    def encode(self, params, extra, batch, rng, train):
        """`({"image", "text"}: unit rows, extra)` of a batch; randomness is folded from `rng` and the examples' ids."""
        keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(batch["example_id"])
        text_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        image, _, extra = self.encode_image(params, extra, batch["image"], train, keys)
        text, _, extra = self.encode_text(params, extra, batch["text"], train, text_keys)
        return {"image": image, "text": text}, extra

    def embed_image(self, params, extra, images):
        """Unit rows, float32 `[b, E]`."""
        return self.encode_image(params, extra, images)[0]

    def embed_text(self, params, extra, ids):
        """Unit rows, float32 `[b, E]`."""
        return self.encode_text(params, extra, ids)[0]

    def _encode(self, tower, name, params, extra, x, train, keys, normalize=True):
        stats = extra.get("batch_stats", {})
        variables = {"params": params[name]} | ({"batch_stats": stats[name]} if name in stats else {})
        mutable = ["batch_stats"] if train and name in stats else []
        (embedding, tokens), new = tower.apply(variables, x, train=train, keys=keys, mutable=mutable)
        if mutable:
            extra = extra | {"batch_stats": stats | {name: new["batch_stats"]}}
        return l2_normalize(embedding) if normalize else embedding, tokens, extra
