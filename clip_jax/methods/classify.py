"""Fine-tuning on labels: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).

A linear head on the unit image embedding starts as the zero-shot classifier of the text tower (section 2): its column
of a class is the normalised mean of the unit embeddings of the class's prompts, times exp(logit_scale), and its bias is
0. The image tower and the head are trained with cross entropy. The text tower stays in the checkpoint, frozen, so that
retrieval and other class names still work. `clip_jax.tools.interpolate` mixes the weights of the beginning and the end.
The linear classifier of the paper is this method with `optim.freeze=("^img/",)`; images are then those of evaluation.

    logits = z W + b,   W = exp(s) [w_1 ... w_C],   w_c = normalize(mean_t normalize(text(t(c))))

As in the code of the authors all of the head is trained, its bias too. They drop the text tower from the fine-tuned
model. Where the scale of the weights is SigLIP's, the same classifier is used without SigLIP's bias, which is the same
for all classes.

Steps follow from `classify.epochs`, unless `train.steps` is set. A warm-up that is longer than half of them is cut to a
tenth; the authors' data sets are larger.
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax import config as config_lib
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import names_of
from clip_jax.evaluation.classifier import make_classifier
from clip_jax.evaluation.prompts import load_templates
from clip_jax.methods.interface import exp_logit_scale, read_options, two_tower_method
from clip_jax.models.common import fold_in_ids
from clip_jax.models.two_tower import TwoTower

#: Parameters that the loss does not train.
FROZEN = ("^txt/", "^logit_")
_TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.classify`. Raises UserError for invalid values.

    Attributes:
      names: names of the classes for the prompts: "imagenet" or a file, as `classes` of the task `zeroshot`; empty:
        those of the data.
      templates: prompts of the first head: the name of a set, or a file (`clip_jax.evaluation.prompts`).
      label_smoothing: share of the target that is spread over all classes.
      epochs: passes over the data; counts where `train.steps` has its default.
      classes: the names by label; set by the data.
    """

    names: str = ""
    templates: str = "clip_80"
    label_smoothing: float = 0.0
    epochs: int = 10
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        load_templates(self.templates)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"classify.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        if self.epochs < 1:
            raise UserError(f"classify.epochs={self.epochs}: must be at least 1")


def resolve(config, source):
    """Returns a copy of the configuration with the classes of the data, the steps, and what is frozen.

    Raises UserError for data without labels or without names of its classes.
    """
    options = read_options(config, "classify", Options)
    if getattr(source, "multi_label", False) or (source.class_names is None and not options.names):
        problem = "several labels of one image" if getattr(source, "multi_label", False) else "no names of classes"
        hint = "give a folder with a sub-folder for each class, or SOURCE?label=FIELD with a field that names the class"
        raise UserError(f"method='classify' needs one label of each image: {source.name} has {problem}; {hint}")
    config = config.copy_and_resolve_references().unlock()
    config.classify.classes = tuple(names_of(source, options.names or None, "classify"))
    config.optim.freeze += tuple(pattern for pattern in FROZEN if pattern not in config.optim.freeze)
    if "^img/" in config.optim.freeze and set(config.data.augment) <= {*config_lib.base().data.augment, "drop_alpha"}:
        config.data.augment = config.eval.transform
    if config.train.steps == config_lib.base().train.steps:
        config.train.steps = options.epochs * math.ceil(len(source) / config.data.batch_size)
    if config.optim.warmup_steps > config.train.steps / 2:
        config.optim.warmup_steps = config.train.steps // 10
    return config.lock()


def make(config):
    """Returns the method of a configuration with the classes of the data; raises UserError for invalid values."""
    options, towers = read_options(config, "classify", Options), TwoTower(config.model)
    if not options.classes:
        raise UserError("classify.classes=(): the data names no classes")
    base = two_tower_method(config, ("logit_scale",), None, scale=exp_logit_scale)
    width = (config.model.embed_dim, len(options.classes))

    def init(rng, batch):
        text = jnp.zeros((len(batch["image"]), config.model.text.context), jnp.int32)
        params, extra = base.init(rng, batch | {"text": text})
        head = {"kernel": jnp.zeros(width, jnp.float32), "bias": jnp.zeros(width[1:], jnp.float32)}
        return params | {"head": head}, extra

    def encode(params, extra, batch, rng, train):
        keys = fold_in_ids(rng, batch["example_id"])
        z, _, extra = towers.encode_image(params, extra, batch["image"], train, keys)
        return {"image": z}, extra

    def loss(params, extra, features, batch, rng):
        logits = class_logits(params, features["image"])
        label = batch.get("label", jnp.zeros(len(logits), jnp.int32))  # a compilation ahead of time has no data
        target = optax.smooth_labels(jax.nn.one_hot(label, width[1]), options.label_smoothing)
        known = label >= 0  # -1 is no label
        count = jnp.maximum(known.sum(), 1)
        value = jnp.where(known, optax.softmax_cross_entropy(logits, target), 0).sum() / count
        right = jnp.where(known, logits.argmax(1) == label, False).sum() / count
        return value, {"class_acc": right}

    def start(params, extra, tokenizer, mesh):
        embed = _embedder(base, config, params, extra, tokenizer, mesh)
        classifier = make_classifier(types.SimpleNamespace(embed_text=embed), options.classes, options.templates)
        head = {"kernel": np.exp(np.asarray(params["logit_scale"])) * classifier.embeddings.T}
        return params | {"head": head | {"bias": np.zeros(width[1:], np.float32)}}

    views = (ImageView("image", config.model.image.size, config.data.augment),)
    fields = dict(views=views, init=init, encode=encode, loss=loss, start=start, class_logits=class_logits)
    return dataclasses.replace(base, **fields)


def class_logits(params, z):
    """Returns the logits of the classes, float32 `[n, C]`, of unit image embeddings `z` `[n, E]`."""
    return jnp.matmul(z, params["head"]["kernel"], precision="highest") + params["head"]["bias"]


def _embedder(method, config, params, extra, tokenizer, mesh):
    """Returns the function texts -> float32 `[n, E]` of the text tower of `params`."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    embed, rows = jax.jit(method.embed_text, out_shardings=whole), -(-_TEXTS_AT_ONCE // parts) * parts

    def embed_all(texts):
        found = []
        for start in range(0, len(texts), rows):
            some = texts[start : start + rows]
            ids = np.asarray(tokenizer(some + [""] * (rows - len(some)), config.model.text.context))
            found.append(np.asarray(embed(params, extra, ids))[: len(some)])
        return np.concatenate(found)

    return embed_all
