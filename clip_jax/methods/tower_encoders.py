"""Single towers of others as frozen encoders: vision transformers and ResNets, and sentence transformers.

They have one side of the members that `clip_jax/methods/frozen_encoders.py` lists, and work without their files once
their weights are in a checkpoint.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.interop.towers import sentence
from clip_jax.interop.towers.load import checked, tower_variables
from clip_jax.interop.towers.recognize import KNOWN, recognize
from clip_jax.models import towers
from clip_jax.models.common import l2_normalize

TEXTS_AT_ONCE = 256
#: Mean and deviation of towers whose files do not show them: ImageNet's, as in DINO, DINOv2 and torchvision.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: DINOv2 was trained at 518 pixels last, and evaluated at 224.
_DINOV2, _DINOV2_SIZE = ("DINOv2", "Hugging Face Dinov2Model"), 224
#: How the stored string of a tower begins.
MARK = '{"tower": '


def resized(images, size):
    """Returns images `[b, size, size, 3]` with pixels in 0 to 255, float32."""
    images = images.astype(jnp.float32)
    if images.shape[1:3] == (size, size):
        return images
    return jax.image.resize(images, (len(images), size, size, 3), "cubic").clip(0, 255)


class _Tower:
    """A tower of `path`, whose configuration `stored` holds; only `load` reads the path."""

    which = ""

    def __init__(self, path, stored):
        self.path = path
        self.config = config_lib.from_json(json.dumps(json.loads(stored)["tower"]))

    @classmethod
    def stored_config(cls, path):
        """Returns the string to store with the weights; raises UserError for files that are not such a tower."""
        config = cls.recognized(path).config
        towers.fill(config.model)
        return json.dumps({"tower": config.to_dict()})

    @classmethod
    def recognized(cls, path):
        """Returns the `Foreign` tower with the fields of this side, as checked against its weights."""
        foreign = recognize(path)
        if foreign is None or cls.which not in foreign.config.model:
            raise UserError(f"encoder: {path} holds no {cls.which} tower alone; known are {KNOWN}")
        checked(foreign)
        return foreign


class ImageTower(_Tower):
    """An image tower: its pooled embedding, not projected, of unit length."""

    which = "image"
    sharding_rules = ()

    def __init__(self, path, stored):
        super().__init__(path, stored)
        self.size, self.image_dim = self.config.model.image.size, self.config.model.embed_dim
        self.tower = towers.image_tower(self.config.model, tokens=False)
        colours = self.config.model.image_mean, self.config.model.image_std
        self._mean, self._std = (255 * np.asarray(x, np.float32) for x in colours)

    @classmethod
    def recognized(cls, path):
        foreign = super().recognized(path)
        model = foreign.config.model
        model.image_mean, model.image_std = model.image_mean or _MEAN, model.image_std or _STD
        if foreign.kind in _DINOV2:
            model.image.size = min(model.image.size, _DINOV2_SIZE)
        return foreign

    def variables(self):
        """Returns zeros in the shapes of the weights."""
        image = jnp.zeros((1, self.size, self.size, 3))
        shapes = jax.eval_shape(self.tower.init, jax.random.key(0), image)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def load(self, mesh):
        """Returns the weights as NumPy arrays."""
        return tower_variables(recognize(self.path), self.size)

    def embed_image(self, variables, images):
        """Returns unit rows, float32 `[b, E]`, of images `[b, h, w, 3]` with pixels in 0 to 255, after resizing."""
        return l2_normalize(self.tower.apply(variables, (resized(images, self.size) - self._mean) / self._std)[0])


class TextTower(_Tower):
    """A sentence transformer, a BertModel or MPNetModel: its pooled states, of unit length."""

    which = "text"

    def __init__(self, path, stored):
        super().__init__(path, stored)
        self.text_dim = self.config.model.embed_dim

    @classmethod
    def recognized(cls, path):
        foreign = super().recognized(path)
        folder, text = foreign.file.parent, foreign.config.model.text
        text.pool, text.context = sentence.pooling(folder), sentence.longest(folder, text.context)
        text.eot_id = _tokenizer(folder, text).eot_id
        return foreign

    def load(self, mesh):
        """Reads the weights and the tokenizer, for `embed_text`."""
        tower, foreign = towers.text_tower(self.config.model, tokens=False), recognize(self.path)
        self._variables = jax.device_put(tower_variables(foreign))
        self._tokenizer = _tokenizer(foreign.file.parent, self.config.model.text)
        self._embed = jax.jit(lambda variables, ids: l2_normalize(tower.apply(variables, ids)[0]))

    def embed_text(self, texts):
        """Returns unit rows, float32 `[n, E]`, of n texts."""
        rows, context = [np.zeros((0, self.text_dim), np.float32)], self.config.model.text.context
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            block = list(texts[start : start + TEXTS_AT_ONCE])
            # Padding changes nothing. Powers of two as sizes need few compilations.
            padded = block + [""] * ((1 << (len(block) - 1).bit_length()) - len(block))
            ids = self._tokenizer(padded, context)
            length = min(context, max(16, 1 << int(self._tokenizer.lengths(ids).max() - 1).bit_length()))
            rows.append(np.asarray(self._embed(self._variables, ids[:, :length]))[: len(block)])
        return np.concatenate(rows)


def _tokenizer(folder, text):
    """Returns the tokenizer of a folder; raises UserError when it does not fit the text tower."""
    found = sentence.tokenizer(folder)
    if found.vocab_size > text.vocab_size or found.pad_id != text.pad_id:
        raise UserError(
            f"encoder: the tokenizer of {folder} has {found.vocab_size} ids and pads with {found.pad_id}, but its text "
            f"tower has {text.vocab_size} and {text.pad_id}"
        )
    return found


SIDES = {"img/": ImageTower, "txt/": TextTower}
