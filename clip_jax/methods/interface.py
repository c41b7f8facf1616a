"""The interface of a method: a frozen dataclass of pure functions, built by `make(config)` in the method's module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import config as config_lib
from clip_jax import plugins
from clip_jax.data.views import ImageView, TextView
from clip_jax.errors import UserError
from clip_jax.models import towers
from clip_jax.models.two_tower import TwoTower


@dataclasses.dataclass(frozen=True)
class Method:
    """A pretraining method as pure functions.

    In the signatures below, `batch` is a dict of arrays `[B, ...]` with one entry per view and `example_id`, uint32
    `[B, 2]`: the low and the high half of ids of 64 bits. It also has `label`, `source_id` and `text_pair`, int32
    `[B]`, where the data has them.

    Attributes:
      views: the views that training reads of each example (`clip_jax.data.views`).
      eval_view: the image view of evaluation and search.
      init: `(rng, batch) -> (params, extra)`. `extra` holds everything that has no gradient: teachers, queues,
        statistics. Where a run starts from other weights, `extra["teacher"]`, a dict like a part of `params`, becomes a
        copy of this part.
      encode: `(params, extra, batch, rng, train) -> (features, extra)`, per example; the engine may call it on
        micro-batches. An example's randomness must be folded from `rng` and its `example_id`
        (`clip_jax.models.common.fold_in_ids`), so that a second pass replays it. In training `extra` marks the frozen
        modules (`clip_jax.models.common.mark_frozen`), also in `heads` and `loss`.
      loss: `(params, extra, features, batch, rng) -> (loss, metrics)` over the global batch; float32 scalars.
      embed_image: `(params, extra, images uint8 [b, h, w, 3]) -> float32 [b, E]`, unit rows. A method that compares
        tokens returns `[b, P, E]`.
      embed_text: `(params, extra, ids int32 [b, n]) -> float32 [b, E]`, unit rows. A method that compares tokens
        returns `[b, n, E]`, with zeros for padding.
      image_features: `(params, extra, images uint8 [b, h, w, 3]) -> float32 [b, D]`, not normalised: the features
        before the joint projection, which linear probes read. None: the method has none. `two_tower_method` sets
        `TwoTower.image_features`.
      scale: `params -> float32 scalar`, the factor of the similarities in the softmax of the loss. Classification uses
        the same factor.
      heads: `(params, extra, features, batch, rng) -> (features, extra)` between `encode` and `loss`, on the global
        batch. Heads with BatchNorm belong here because they change `extra`.
      prepare: `(batch, rng) -> batch`, work on the whole batch on the device before encoding (mixup, masks).
      update: `(params, extra, features, step) -> extra` after the optimizer step, without a gradient. The features are
        those that `heads` returned.
      constrain: `params -> params` after the optimizer step: the projection onto the allowed set, such as the clamp of
        the logit scale.
      init_from_data: `(extra, source, mesh) -> extra`, once, at the start of a run: fills the parts of `extra` that
        come from data or from other weights. It returns NumPy arrays or arrays on the mesh.
      start: `(params, extra, tokenizer, mesh) -> params`, once, at the start of a run, after `init_from`: computes
        parameters from others, such as a classifier from a text tower. It returns NumPy arrays or arrays on the mesh.
      class_logits: `(params, unit image embeddings [n, E]) -> float32 [n, C]`, the logits of the classes in
        `config.classify.classes`, where the method trains a classifier; else None.
      similarity: `(image embeddings [n, ...], text embeddings [m, ...]) -> float32 [n, m]`; images are the queries.
      text_similarity: `(text embeddings [m, ...], image embeddings [n, ...]) -> float32 [m, n]`; texts are the queries.
        None: the transpose of `similarity`. Where embeddings are not single vectors, search also compares images with
        images and texts with texts by these two functions.
      patch_similarity: `(params, extra, images uint8 [b, h, w, 3], ids int32 [b, n]) -> float32 [b, P, n]`: how similar
        each patch of an image is to each token of its own text, -inf for padding. The P patches are a square grid, row
        by row. The report draws them. None: the report compares the embeddings where these are tokens.
      sharding_rules: how the arrays of `extra` are sharded: pairs `(regular expression, mesh axis of each dimension)`,
        matched before the general rules of `clip_jax.runtime.sharding`.
    """

    views: tuple[Any, ...]
    eval_view: Any
    init: Callable
    encode: Callable
    loss: Callable
    embed_image: Callable
    embed_text: Callable
    scale: Callable
    image_features: Callable | None = None
    heads: Callable = lambda params, extra, features, batch, rng: (features, extra)
    prepare: Callable = lambda batch, rng: batch
    update: Callable = lambda params, extra, features, step: extra
    constrain: Callable = lambda params: params
    init_from_data: Callable = lambda extra, source, mesh: extra
    start: Callable = lambda params, extra, tokenizer, mesh: params
    class_logits: Callable | None = None
    similarity: Callable = lambda z_image, z_text: jnp.matmul(z_image, z_text.T)
    text_similarity: Callable | None = None
    patch_similarity: Callable | None = None
    sharding_rules: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def batch_spec(self, size, sharding=None):
        """Returns `{name: jax.ShapeDtypeStruct}` of a batch of `size` examples: every view and `example_id`."""
        shapes = {view.name: ((size, *view.shape), view.dtype) for view in self.views} | {
            "example_id": ((size, 2), "uint32")
        }
        return {name: jax.ShapeDtypeStruct(*spec, sharding=sharding) for name, spec in shapes.items()}


def read_options(config, name, kind):
    """Returns the section `config.<name>` as the dataclass `kind`, which checks its values.

    Raises UserError for a field that `kind` lacks.
    """
    given = dict(config.get(name, {}))
    for field in sorted(given.keys() - {f.name for f in dataclasses.fields(kind)}):
        raise UserError(f"{name}.{field} is no field of method={name!r}")
    towers.check_types(kind, given, name)
    return kind(**given)


def text_view(config, name="text", kind=TextView, **fields):
    """Returns the text view that `config.data` describes.

    Args:
      config: the configuration.
      name: the view's name in the batch.
      kind: the class of the view, `TextView` or a subclass.
      fields: fields of the view whose values replace those of the configuration.
    """
    data = config.data
    given = dict(templates=data.templates, word_dropout=data.word_dropout)
    # Configurations of older checkpoints lack these two fields.
    given |= {field: data[field] for field in ("rewrites", "rewrite_prob") if field in data}
    context = {} if "context" in fields else dict(context=config.model.text.context)
    return kind(name, **context | given | fields)


def exp_logit_scale(params):
    """Returns `exp(logit_scale)`, the `Method.scale` of a scale that is learned in log space."""
    return jnp.exp(params["logit_scale"])


def two_tower_method(config, scalars, loss, **fields):
    """Returns a method that encodes one image and one text with the two towers of `config.model`.

    Args:
      config: the configuration.
      scalars: names of scalar parameters. Each starts at `config.model.<name>_init`.
      loss: `Method.loss`; `features` holds the unit rows `image` and `text`, float32 `[B, E]`.
      fields: further fields of `Method`; `scale` is required.

    Raises UserError for invalid towers.
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
        image_features=towers.image_features,
        **fields,
    )


def make_method(config):
    """Returns the method that `config.method` names: a module of `clip_jax.methods` or an import path.

    Raises UserError when the module is missing or has no function `make(config)`.
    """
    return _module(config).make(config)


def init_shapes(config):
    """Returns `(params, extra)` of the method of a configuration as shapes, without touching a device.

    Raises UserError as `make_method` does.
    """
    config = config.copy_and_resolve_references()
    config.model.dtype = "float32"  # in which attention does not ask for the kind of the devices
    method = make_method(config)
    return jax.eval_shape(method.init, jax.eval_shape(jax.random.key, 0), method.batch_spec(2))


def resolve(config, tokenizer, source=None):
    """Returns a copy of the configuration with the fields that follow from the tokenizer and from the data.

    In this order:
      1. `model.text` gets the tokenizer's vocabulary size and end-of-text id (`clip_jax.config.resolve`).
      2. The fields of `TOKENIZER_FIELDS = {section: (field, ...)}` in the method's module get the tokenizer's values.
         A field is `mask_id` or `special_ids`. A tokenizer without a mask token gets the id after its vocabulary.
      3. `resolve(config, source)` of the method's module, if it has one, takes its own fields from the data.

    A text without an end may not reach a tower that looks for it, nor a method whose module has a function
    `reads_end(config)` that says so: they would take its first token for all of it.

    Args:
      config: the configuration.
      tokenizer: the tokenizer.
      source: the training data; None skips the third part.

    Raises UserError when the configuration contradicts the tokenizer, or for invalid data.
    """
    module, config = _module(config), config_lib.resolve(config, tokenizer)
    mask_id = tokenizer.vocab_size if tokenizer.mask_id is None else tokenizer.mask_id
    values = dict(mask_id=mask_id, special_ids=tuple(sorted(getattr(tokenizer, "special_ids", ()))))
    for section, fields in getattr(module, "TOKENIZER_FIELDS", {}).items():
        if section in config:
            config[section].update({field: values[field] for field in fields if field in config[section]})
    if not getattr(tokenizer, "options", {}).get("eot", True) and (
        towers.reads_end(config.model.get("text", {})) or getattr(module, "reads_end", lambda config: False)(config)
    ):
        raise UserError(
            f"tokenizer={config.tokenizer!r}: with eot=false a text may have no end, and the model looks for it; "
            "leave eot=false out"
        )
    if source is None or not hasattr(module, "resolve"):
        return config
    return module.resolve(config, source)


def _module(config):
    try:
        return plugins.load(config.method, "clip_jax.methods", "make")
    except UserError as error:
        raise UserError(f"method={error}") from None
