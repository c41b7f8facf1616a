"""A trained model in use: embeddings of images and texts, and zero-shot classification.

    model = clip_jax.load("runs/clip")
    z_image = model.embed_image([PIL.Image.open("cat.jpg")])
    z_text = model.embed_text(["a photo of a cat", "a photo of a dog"])
    probabilities = model.classify(images, ["cat", "dog"], templates=("a photo of a {}.",))

`clip_jax.load` is `load`, and `clip_jax.Model` is `Model`.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np
import PIL.Image
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax import config as config_lib
from clip_jax.data.views import TextView
from clip_jax.errors import UserError
from clip_jax.evaluation.classifier import class_scores
from clip_jax.evaluation.topk import transposed
from clip_jax.methods import stored
from clip_jax.methods.interface import make_method
from clip_jax.runtime import faults, sharding

_ENCODED = bytes | bytearray | memoryview
_IMAGE_TYPES = "PIL images, uint8 arrays or encoded bytes"


class Model:
    """A method with its parameters, jitted and sharded over the devices of a mesh.

    With several hosts, every host must make every call with the same arguments and gets the same result.

    Attributes:
      config: the configuration of the training run.
      method: the `Method`.
      params, extra: the parameters and the method's state without a gradient.
      tokenizer: the tokenizer; None embeds images only.
      image_view: the method's evaluation view, which prepares images.
      mesh: the mesh.
      process_shard: `(index, count)`: this process prepares shard `index` of `count` (`embed_image_share`).
      step, ema: the step of the checkpoint, or None, and whether `params` are the moving average of the weights.
    """

    def __init__(self, config, method, params, extra, tokenizer, mesh=None):
        self.config, self.method = config, method
        self.params, self.extra = params, extra
        self.tokenizer = tokenizer
        self.step, self.ema = None, False
        self.image_view = method.eval_view
        contexts = [view.context for view in method.views if isinstance(view, TextView)]
        self._context = contexts[0] if contexts else config.model.text.context
        self.mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
        self.process_shard = sharding.process_shard(self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        self._image = jax.jit(method.embed_image, out_shardings=whole)
        self._features = jax.jit(method.image_features, out_shardings=whole) if method.image_features else None
        self._text = jax.jit(method.embed_text, out_shardings=whole)
        self._patches = method.patch_similarity and jax.jit(method.patch_similarity, out_shardings=whole)
        self._similarity = jax.jit(method.similarity)
        self._class_logits = method.class_logits and jax.jit(method.class_logits)
        self._text_similarity = jax.jit(method.text_similarity or functools.partial(transposed, method.similarity))

    @property
    def scale(self):
        """The factor of the similarities in the softmax of the loss (`Method.scale`), a float."""
        return float(self.method.scale(self.params))

    def facts(self):
        """Returns what a report says of the model: "step", "ema", and the number of "parameters"."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return {"step": self.step, "ema": self.ema, "parameters": parameters}

    def embed_image(self, images, batch_size=None):
        """Returns unit rows, float32 `[n, E]`; a method that compares tokens returns `[n, P, E]`.

        Args:
          images: uint8 `[n, size, size, 3]` in the model's size, or a list of PIL images, uint8 arrays or encoded
            bytes. A single image counts as a list of one: a PIL image, bytes, or uint8 `[h, w]`, `[h, w, 1]`,
            `[h, w, 3]` or `[h, w, 4]`.
          batch_size: the images of a batch, at most; None: `eval.batch_size`.

        Raises BadRecord for an image that does not decode, TypeError for anything that is not an image, and UserError
        for weights that give no finite numbers.
        """
        return _finite(self._embed(self._image, self._prepared(images), batch_size))

    def image_features(self, images, batch_size=None):
        """Returns the features before the joint projection, float32 `[n, D]`, not normalised (`Method.image_features`).

        Args:
          images, batch_size: as for `embed_image`.

        Raises UserError for a method that has none, else as `embed_image` does.
        """
        return _finite(self._embed(self._image_features(), self._prepared(images), batch_size))

    def embed_image_share(self, images):
        """Returns unit rows, float32 `[count * n, E]`, of the images of all processes, in the order of their shards.

        Args:
          images: uint8 `[n, size, size, 3]`, the images of this process. n is the same on every process.
        """
        return self._share(self._image, images)

    def image_features_share(self, images):
        """Returns the `image_features` `[count * n, D]` of the images of all processes, as `embed_image_share` does."""
        return self._share(self._image_features(), images)

    def _image_features(self):
        if self._features is None:
            raise UserError(f"method={self.config.method!r} has no image_features; features='embedding' needs none")
        return self._features

    def _prepared(self, images):
        """Returns images as the model reads them, uint8 `[n, size, size, 3]`."""
        images, size = _images(images), self.image_view.size
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
            return images
        if not len(images):
            return np.zeros((0, size, size, 3), np.uint8)
        return np.stack([self.image_view({"image": image}, None) for image in images])

    def _share(self, function, images):
        count = self.process_shard[1]
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] // count
        padded = _padded(images, -(-len(images) // parts) * parts)
        with jax.set_mesh(self.mesh), faults.stage("evaluation"):
            z = np.asarray(function(self.params, self.extra, sharding.to_global({"image": padded}, self.mesh)["image"]))
        return _finite(z.reshape(count, len(padded), *z.shape[1:])[:, : len(images)].reshape(-1, *z.shape[1:]))

    def embed_text(self, texts, batch_size=None):
        """Returns unit rows, float32 `[n, E]`; a method that compares tokens returns `[n, L, E]`, zeros for padding.

        Args:
          texts: a list of n strings. A single string counts as a list of one.
          batch_size: the texts of a batch, at most; None: `eval.batch_size`.

        Raises UserError when the model has no tokenizer or its weights give no finite numbers, and TypeError for
        anything but strings.
        """
        texts = _strings(texts, "texts")
        return _finite(self._embed(self._text, texts, batch_size, self.token_ids))

    def token_ids(self, texts):
        """Returns what the text tower reads of n strings, int32 `[n, L]`; for CLIPPO the rendered images.

        Raises UserError when the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("these weights came without a tokenizer: give one, clip_jax.load(path, tokenizer=...)")
        return self.tokenizer(list(texts), self._context)

    def similarity(self, z_image, z_text):
        """Returns the similarity of image `[n, ...]` and text `[m, ...]` embeddings, float32 `[n, m]`.

        Images are the queries.
        """
        return np.asarray(self._similarity(z_image, z_text))

    def text_similarity(self, z_text, z_image):
        """Returns the similarity of text `[m, ...]` and image `[n, ...]` embeddings, float32 `[m, n]`.

        Texts are the queries. The result is the transpose of `similarity` unless the method defines its own.
        """
        return np.asarray(self._text_similarity(z_text, z_image))

    @property
    def patch_similarity(self):
        """The function `(images, texts, batch_size=None)` below; None where the method has no `patch_similarity`.

        It returns how similar each patch of an image is to each token of its own text, float32 `[n, P, L]`, -inf for
        padding.

        Args:
          images: uint8 `[n, size, size, 3]` in the model's size.
          texts: a list of n strings.
          batch_size: the pairs of a batch, at most; None: `eval.batch_size`.

        Raises UserError when the model has no tokenizer or its weights give no finite numbers.
        """
        return self._patch_similarity if self._patches else None

    def _patch_similarity(self, images, texts, batch_size=None):
        pairs = list(zip(images, texts, strict=True))

        def arrays(part):
            return np.stack([image for image, _ in part]), self.token_ids([text for _, text in part])

        similarity = self._embed(self._patches, pairs, batch_size, arrays)
        _finite(np.where(np.isneginf(similarity), 0, similarity))  # padding is no fault of the weights
        return similarity

    @property
    def class_names(self):
        """The names of the classes that the model was trained to tell apart, a tuple; empty for most methods."""
        return self.config.classify.classes if self._class_logits else ()

    def class_logits(self, z_image):
        """Returns the logits of `class_names`, float32 `[n, classes]`, of image embeddings `[n, E]`; UserError without.

        `clip_jax/methods/classify.py` trains such classes.
        """
        if not self._class_logits:
            raise UserError(f"method={self.config.method!r} was not trained on classes: give class names")
        return np.asarray(self._class_logits(self.params, z_image))

    def classify(self, images, class_names=None, templates=("{}",)):
        """Returns class probabilities, float32 `[n, classes]`: softmax of `Method.scale` times similarities.

        Args:
          images: as for `embed_image`.
          class_names: a list of strings. A single string counts as a list of one. None: the classes of `class_names`,
            by the classifier that was trained on them.
          templates: prompts with `{}` for the class name. Their embeddings are averaged; a method that compares tokens
            averages their scores.

        Raises TypeError for class names that are no strings; images and templates as `embed_image` and
        `clip_jax.evaluation.prompts.load_templates`.
        """
        if class_names is None:
            return np.asarray(jax.nn.softmax(self.class_logits(self.embed_image(images)), axis=1))
        class_names = _strings(class_names, "class_names")
        scores = class_scores(self, self.embed_image(images), class_names, templates)
        return np.asarray(jax.nn.softmax(self.method.scale(self.params) * scores, axis=1))

    def _embed(self, function, inputs, batch_size, prepare=lambda part: part):
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        # Small inputs are padded to a power of two, so that only a few batch shapes are compiled.
        batch = min(batch_size or self.config.eval.batch_size, 1 << max(len(inputs) - 1, 0).bit_length())
        batch = -(-batch // parts) * parts
        layout, rows = sharding.batch_sharding(self.mesh), []
        with jax.set_mesh(self.mesh), faults.stage("evaluation"):
            for start in range(0, max(len(inputs), 1), batch):
                arrays = [_padded(x, batch) for x in jax.tree.leaves(prepare(inputs[start : start + batch]))]
                on_devices = [jax.make_array_from_callback(x.shape, layout, x.__getitem__) for x in arrays]
                rows.append(function(self.params, self.extra, *on_devices))
            return np.concatenate([np.asarray(r) for r in rows])[: len(inputs)]


def _strings(values, what):
    """Returns strings as a list; one string becomes a list of one. Raises TypeError, which names `what`."""
    if isinstance(values, str):
        return [values]
    if isinstance(values, bytes | dict | set | frozenset) or not isinstance(values, Iterable):
        raise TypeError(f"{what}: a list of strings or one string is needed, not {type(values).__name__}")
    values = list(values)
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{what}: entry {number} is {type(value).__name__}; strings are needed")
    return values


def _images(images):
    """Returns uint8 `[n, h, w, channels]` as it is, and all else as a list of images; one image becomes a list of one.

    Raises TypeError for anything that is not an image.
    """
    if isinstance(images, np.ndarray):
        is_one = images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
        if images.dtype == np.uint8 and (is_one or images.ndim == 4):
            return images[None] if is_one else images
        if images.dtype != object:
            given = f"{images.dtype}{list(images.shape)}"
            raise TypeError(f"images: an array is uint8 [n, h, w, 3], or [h, w, 3] for one image, not {given}")
    if isinstance(images, _ENCODED | PIL.Image.Image):
        return [images]
    if isinstance(images, str | dict | set | frozenset) or not isinstance(images, Iterable):
        raise TypeError(f"images: {_IMAGE_TYPES} are needed, one or a list of them, not {type(images).__name__}")
    images = list(images)
    for number, image in enumerate(images):
        if not isinstance(image, _ENCODED | np.ndarray | PIL.Image.Image):
            raise TypeError(f"images: entry {number} is {type(image).__name__}; {_IMAGE_TYPES} are needed")
    return images


def _finite(z):
    """Returns embeddings; raises UserError when they hold NaN, by which every comparison would name the first entry."""
    if bad := int((~np.isfinite(z)).any(axis=tuple(range(1, z.ndim))).sum()):
        raise UserError(f"{bad} of {len(z)} embeddings are not finite numbers: the training of these weights diverged")
    return z


def _padded(rows, length):
    return np.concatenate([rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)])


def load(path, which="latest", ema=None, mesh=None, overrides=(), **options):
    """Returns the `Model` of a checkpoint, or of weights of OpenAI's CLIP, open_clip, Hugging Face or big_vision.

    Args:
      path: a work folder, its `checkpoints` folder, or the folder of one step; or a third-party weight file or folder.
      which: `"latest"`, `"best"`, or a step of a run.
      ema: True loads the moving average of a run's weights; None follows `eval.ema` of its configuration.
      mesh: the mesh; None: all devices, with the parameters replicated.
      overrides: changes of the stored configuration, `["eval.batch_size=64", ...]`. They must not change the shapes of
        the weights.
      options: for third-party weights, those of `clip_jax.interop.load.load`: `act`, `heads`, `size`, `tokenizer`,
        `alpha`.

    Raises UserError when the checkpoint or file is missing or cannot be read.
    """
    from clip_jax.interop import load as interop
    from clip_jax.interop.towers.files import is_foreign

    if is_foreign(path):
        if which != "latest" or ema:
            raise UserError(
                f"{str(path)!r} is no run of clip_jax and has only one state of its weights: leave out which and ema"
            )
        if overrides:
            raise UserError(f"{str(path)!r} is no checkpoint of clip_jax and has no configuration to change")
        imported = interop.load(path, mesh=mesh, **options)
        if interop.is_image_tower(imported.config):
            raise UserError(f"{str(path)!r} holds an image tower alone, which embeds no texts: use it in init_from")
        method = make_method(imported.config)
        return Model(imported.config, method, imported.params, imported.extra, imported.tokenizer, mesh)
    if options:
        raise UserError(f"{str(path)!r} is a checkpoint of clip_jax, which takes no {', '.join(options)}")
    mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
    found = stored.load(path, which, ema, mesh, overrides)
    model = Model(*found[:5], mesh)
    model.step, model.ema = found.step, found.ema
    return model
