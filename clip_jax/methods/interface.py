"""What a method is to the rest of the program: a frozen dataclass of pure functions, made by `make(config)` of its module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import plugins
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError
from clip_jax.models.two_tower import TwoTower


@dataclasses.dataclass(frozen=True)
class Method:
    """The functions of a method. `batch` is a dict of arrays `[B, ...]`, one entry per view, plus `example_id` int32 `[B]`.

    Attributes:
      views: what the method asks of the data in training (`clip_jax.data.views`).
      eval_view: the image view of evaluation and search.
      init: `(rng, batch) -> (params, extra)`; `extra` is everything without a gradient (teachers, queues, statistics).
      encode: `(params, extra, batch, rng, train) -> (features, extra)`, per example: may be called on micro-batches.
        Randomness of an example must be folded from `rng` and its `example_id`, so that a second pass replays it.
      loss: `(params, extra, features, batch, rng) -> (loss, metrics)` over the global batch; float32 scalars.
      embed_image: `(params, extra, images uint8 [b, h, w, 3]) -> float32 [b, E]`, unit rows; of each token `[b, P, E]`.
      embed_text: `(params, extra, ids int32 [b, n]) -> float32 [b, E]`, unit rows; of each token `[b, n, E]`, zeros for padding.
      heads: `(params, extra, features, batch, rng) -> (features, extra)`: what between `encode` and `loss` needs the global
        batch and changes `extra`: heads with BatchNorm.
      prepare: `(batch, rng) -> batch`: work on the whole batch on the device before encoding (mixup, masks).
      update: `(params, extra, features, step) -> extra` after the optimizer's step, without gradient; the features of `heads`.
      constrain: `params -> params` after the optimizer's step: projection onto the allowed set (the logit scale's clamp).
      init_from_data: `(extra, source, mesh) -> extra`, once, when a run starts: what of `extra` comes from data or other weights, as arrays of
        NumPy or on the mesh.
      similarity: `(image embeddings [n, ...], text embeddings [m, ...]) -> float32 [n, m]`: images are the queries.
      text_similarity: `(text embeddings [m, ...], image embeddings [n, ...]) -> float32 [m, n]`: texts are; None: the transpose.
        Where embeddings are not single vectors, search compares like with like by these two as well.
    """

    views: tuple[Any, ...]
    eval_view: Any
    init: Callable
    encode: Callable
    loss: Callable
    embed_image: Callable
    embed_text: Callable
    heads: Callable = lambda params, extra, features, batch, rng: (features, extra)
    prepare: Callable = lambda batch, rng: batch
    update: Callable = lambda params, extra, features, step: extra
    constrain: Callable = lambda params: params
    init_from_data: Callable = lambda extra, source, mesh: extra
    similarity: Callable = lambda z_image, z_text: jnp.matmul(z_image, z_text.T)
    text_similarity: Callable | None = None

    def batch_spec(self, size, sharding=None):
        """Shapes of a batch of `size` examples: `{name: jax.ShapeDtypeStruct}` of every view and of `example_id`."""
        shapes = {view.name: ((size, *view.shape), view.dtype) for view in self.views} | {
            "example_id": ((size,), "int32")
        }
        return {name: jax.ShapeDtypeStruct(*spec, sharding=sharding) for name, spec in shapes.items()}


def read_options(config, name, kind):
    """The section `config.<name>` as a dataclass of the class `kind`, which checks its values; UserError for a field it has not."""
    given = dict(config.get(name, {}))
    for field in sorted(given.keys() - {f.name for f in dataclasses.fields(kind)}):
        raise UserError(f"{name}.{field} is no field of method={name!r}")
    return kind(**given)


def text_view(config, name="text", kind=TextView, **fields):
    """The view of texts as the section `config.data` has it, of a kind of `TextView`; `fields`: of its fields other values."""
    data = config.data
    given = dict(templates=data.templates, word_dropout=data.word_dropout)
    given |= {
        field: data[field] for field in ("rewrites", "rewrite_prob") if field in data
    }  # older checkpoints have none
    context = {} if "context" in fields else dict(context=config.model.text.context)
    return kind(name, **context | given | fields)


def two_tower_method(config, scalars, loss, **fields):
    """A method whose encoding is that of the two towers of `config.model`, of an image and a text, and no more.

    Args:
      config: the configuration.
      scalars: names of scalar parameters, which start at `config.model.<name>_init`.
      loss: as of `Method`; `features` are the unit rows `image` and `text`, float32 `[B, E]`.
      fields: more fields of `Method`.

    Raises UserError for towers that cannot be built.
    """
    model, towers = config.model, TwoTower(config.model)

    def init(rng, batch):
        params, extra = towers.init(rng, batch)
        return params | {name: jnp.asarray(model[f"{name}_init"], jnp.float32) for name in scalars}, extra

    return Method(
        views=(ImageView("image", model.image.size, config.data.augment), text_view(config)),
        eval_view=ImageView("image", model.image.size, config.eval.transform),
        init=init,
        encode=towers.encode,
        loss=loss,
        embed_image=towers.embed_image,
        embed_text=towers.embed_text,
        **fields,
    )


def make_method(config):
    """The method that `config.method` names: a module of `clip_jax.methods`, or the import path of a user's module.

    Raises UserError when there is no such module or it has no function `make(config)`.
    """
    return _module(config).make(config)


def resolve(config, source):
    """The configuration with what its method fills in of the data: `resolve(config, source)` of the method's module, if it has one."""
    return getattr(_module(config), "resolve", lambda config, source: config)(config, source)


def _module(config):
    try:
        return plugins.load(config.method, "clip_jax.methods", "make")
    except UserError as error:
        raise UserError(f"method={error}") from None
