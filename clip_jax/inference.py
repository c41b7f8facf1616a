"""A trained model in use: embeddings of pictures and texts, and zero-shot classification.

model = clip_jax.load("runs/clip")
z_image = model.embed_image([PIL.Image.open("cat.jpg")])
z_text = model.embed_text(["a photo of a cat", "a photo of a dog"])
probabilities = model.classify(images, ["cat", "dog"], templates=("a photo of a {}.",))
"""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax import config as config_lib
from clip_jax.data.views import TextView
from clip_jax.errors import UserError
from clip_jax.evaluation.retrieval import transposed
from clip_jax.methods import stored
from clip_jax.methods.interface import make_method
from clip_jax.runtime import faults, sharding


class Model:
    """The towers of a method with their parameters, jitted and spread over the devices of a mesh.

    Attributes:
      config: the configuration it was trained with.
      method: its `Method`.
      tokenizer: its tokenizer.
      image_view: how pictures are prepared, the method's evaluation view.
      host_share: `(index, count)`, which of `count` shares of the pictures this host prepares, see `embed_image_share`.

    Of several hosts each has to make each call, with the same arguments, and gets the same result.
    """

    def __init__(self, config, method, params, extra, tokenizer, mesh=None):
        self.config, self.method, self.tokenizer = config, method, tokenizer
        self.params, self.extra = params, extra
        self.image_view = method.eval_view
        self._context = next(view.context for view in method.views if isinstance(view, TextView))
        self.mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
        self.process_shard = sharding.process_shard(self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        self._image = jax.jit(method.embed_image, out_shardings=whole)
        self._text = jax.jit(method.embed_text, out_shardings=whole)
        self._similarity = jax.jit(method.similarity)
        self._text_similarity = jax.jit(method.text_similarity or functools.partial(transposed, method.similarity))

    def embed_image(self, images, batch_size=None):
        """Unit rows, float32 `[n, E]`, of pictures; of a method that compares token by token `[n, P, E]`.

        `images`: uint8 `[n, size, size, 3]` of the model's size, or a list of PIL images, uint8 arrays or encoded bytes.

        Raises `BadRecord` for a picture that cannot be decoded.
        """
        size = self.image_view.size
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3)):
            images = (
                np.stack([self.image_view({"image": image}, None) for image in images])
                if len(images)
                else np.zeros((0, size, size, 3), np.uint8)
            )
        return self._embed(self._image, images, batch_size)

    def embed_image_share(self, images):
        """Unit rows, float32 `[count * n, E]`, of the shares `[n, size, size, 3]` that the hosts prepared, one after the other."""
        count = self.process_shard[1]
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] // count
        padded = _padded(images, -(-len(images) // parts) * parts)
        with jax.set_mesh(self.mesh), faults.stage("evaluation"):
            z = np.asarray(
                self._image(self.params, self.extra, sharding.to_global({"image": padded}, self.mesh)["image"])
            )
        return z.reshape(count, len(padded), *z.shape[1:])[:, : len(images)].reshape(-1, *z.shape[1:])

    def embed_text(self, texts, batch_size=None):
        """Unit rows, float32 `[n, E]`, of strings; of a method that compares token by token `[n, L, E]`, zeros for padding."""
        if self.tokenizer is None:
            raise UserError("these weights came without a tokenizer: give one, clip_jax.load(path, tokenizer=...)")
        return self._embed(self._text, list(texts), batch_size, lambda part: self.tokenizer(part, self._context))

    def similarity(self, z_image, z_text):
        """The method's similarity of image `[n, ...]` and text `[m, ...]` embeddings, float32 `[n, m]`: images are the queries."""
        return np.asarray(self._similarity(z_image, z_text))

    def text_similarity(self, z_text, z_image):
        """The same where texts are the queries, float32 `[m, n]`; the transpose, unless the method says otherwise (FILIP)."""
        return np.asarray(self._text_similarity(z_text, z_image))

    def classify(self, images, class_names, templates=("{}",)):
        """Zero-shot class probabilities, float32 `[n, classes]`: softmax of similarities times the logit scale.

        Args:
          images: as `embed_image` takes them.
          class_names: strings.
          templates: prompts with `{}` in the place of the class name; their embeddings are averaged, or scores, where they are several.
        """
        from clip_jax.evaluation.zeroshot import class_scores

        scores = class_scores(self, self.embed_image(images), class_names, templates)
        return np.asarray(jax.nn.softmax(self.method.scale(self.params) * scores, axis=1))

    def _embed(self, function, inputs, batch_size, prepare=lambda part: part):
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        # Few batch shapes, so that few are compiled: a power of two for little input.
        batch = min(batch_size or self.config.eval.batch_size, 1 << max(len(inputs) - 1, 0).bit_length())
        batch = -(-batch // parts) * parts
        layout, rows = sharding.batch_sharding(self.mesh), []
        with jax.set_mesh(self.mesh), faults.stage("evaluation"):
            for start in range(0, max(len(inputs), 1), batch):
                padded = _padded(prepare(inputs[start : start + batch]), batch)
                on_devices = jax.make_array_from_callback(padded.shape, layout, padded.__getitem__)
                rows.append(function(self.params, self.extra, on_devices))
            return np.concatenate([np.asarray(r) for r in rows])[: len(inputs)]


def _padded(rows, length):
    return np.concatenate([rows, np.zeros((length - len(rows), *rows.shape[1:]), rows.dtype)])


def load(path, which="latest", ema=None, mesh=None, overrides=(), **options):
    """The `Model` of a checkpoint, or of weights of OpenAI's CLIP, open_clip, Hugging Face or big_vision.

    Args:
      path: a work folder, its `checkpoints` folder, or the folder of one step; or a weight file or folder of others.
      which: `"latest"`, `"best"`, or a step.
      ema: take the moving average of the weights; by default what the configuration evaluates.
      mesh: a mesh to spread it over; by default all devices, parameters on each.
      overrides: fields of the stored configuration to change, `["raclip.use_bank=false", ...]`; none that the weights' shapes follow
        from.
      options: for weights of others, those of `clip_jax.interop.load.load`: `act`, `heads`, `size`, `tokenizer`.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    from clip_jax.interop import load as interop
    from clip_jax.interop.recognize import is_foreign

    if is_foreign(path):
        if overrides:
            raise UserError(f"{str(path)!r} is no checkpoint of clip_jax, and has no configuration to change")
        imported = interop.load(path, mesh=mesh, **options)
        if interop.is_image_tower(imported.config):
            raise UserError(
                f"{str(path)!r} holds an image tower alone, which embeds no texts: start a run from it (init_from)"
            )
        method = make_method(imported.config)
        return Model(imported.config, method, imported.params, imported.extra, imported.tokenizer, mesh)
    if options:
        raise UserError(f"{str(path)!r} is a checkpoint of clip_jax, which takes no {', '.join(options)}")
    mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
    return Model(*stored.load(path, which, ema, mesh, overrides), mesh)
