"""OneR: Jang et al. 2023, "Unifying Vision-Language Representation Space with Single-Tower Transformer" (arXiv 2211.11153).

One transformer and one head for images, texts and both at once, trained as MoCo v3 trains with a picture and its caption for the two
views: the student's embedding, through a predictor, is to find the embedding of an exponential-moving-average teacher. F(Q|KV) is the
embedding of Q with the keys and values of KV; F(I,T|I,T) that of both together; a bar is the teacher.

    ITC   F(I) -> bar F(T)  and  F(T) -> bar F(I)
    XMC   the mean of F(I) and F(T)      -> the mean of bar F(I) and bar F(T)
    CIC   the mean of F(I|T) and F(T|I)  -> the same
    CMC   F(I,T|I,T)                     -> the same

CMC is trained with masked modelling of images, texts and both. No code of the authors is known. All that the published summaries leave
open is a field of `Options`, and its default an assumption, as are the learned vector in a masked word's place, the means after the
projector, keys from the batch alone (no queue), and running statistics of BatchNorm from the passes of F(I) and F(T) only, the ones that
evaluation uses. The teacher has no statistics of its own: its BatchNorm takes those of the batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.data.views import ImageView
from clip_jax.errors import UserError
from clip_jax.losses import contrastive
from clip_jax.methods.interface import Method, read_options, text_view
from clip_jax.models.common import l2_normalize, shard_batch
from clip_jax.models.heads import MlpHead
from clip_jax.models.masking import mask_patches, mask_words, mean_of_chosen, sum_and_count
from clip_jax.models.one_tower import one_tower, patch_pixels, real_tokens

CHOICES = {
    "mix": ("mean", "norm_mean"),
    "joint_cls": ("mean", "one"),
    "cic_kv": ("cross", "self"),
    "mim_target": ("pixels", "teacher"),
    "mim_loss": ("l1", "l2"),
    "embed": ("cls", "projector", "predictor", "query_key"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.oner`. A weight of 0 leaves a term out, and the pass that it alone needs. Raises UserError for wrong values.

    Attributes:
      itc, xmc, cic, cmc: weights of the contrastive terms.
      mim, mlm: weights of masked image and language modelling in the pass of each modality alone.
      joint_mim, joint_mlm: the same in the pass of both together.
      two_heads: projector and predictor of each modality's own (row 2 of the paper's table; ITC only).
      head_width: of the hidden layers of projector and predictor; their output is `model.embed_dim`.
      predictor: False: the projector's output is compared.
      joint_bn: BatchNorm by the statistics of both modalities together; False: of each apart, which hides the gap between them.
      temperature: of the contrast, whose loss is multiplied by twice this.
      mix: `mean` of the projector's outputs, or `norm_mean`, of their unit vectors.
      joint_cls: F(I,T|I,T) is the `mean` of the two CLS tokens' embeddings, or that of `one` CLS token alone.
      cic_kv: F(I|T) attends to the states that the text has under F(T|I) (`cross`), or under F(T|T) (`self`).
      type_embedding: a learned vector of the modality on all its tokens.
      image_mask, text_mask: shares of the patches and words that are masked in the student's inputs.
      joint_image_mask, joint_text_mask: the same in the pass of both, drawn apart.
      word_masks: of the chosen words, the share that is hidden and the share that becomes a random word; the rest stay.
      mim_target: normalised `pixels` of the patch, or the `teacher`'s last state, normalised.
      mim_loss: `l1` or `l2`.
      teacher_augment: transforms of the teacher's picture; empty: the student's picture, without masks.
      momentum, momentum_end: of the teacher, from the one to the other along half a cosine.
      embed: what evaluation compares: the state of `cls`, the output of the `projector` or of the `predictor`, or as training does
        (`query_key`) the predictor's of a picture with the projector's of a text.
    """

    itc: float = 1.0
    xmc: float = 0.0
    cic: float = 0.0
    cmc: float = 1.0
    mim: float = 1.0
    mlm: float = 1.0
    joint_mim: float = 1.0
    joint_mlm: float = 1.0
    two_heads: bool = False
    head_width: int = 4096
    predictor: bool = True
    joint_bn: bool = True
    temperature: float = 0.2
    mix: str = "mean"
    joint_cls: str = "mean"
    cic_kv: str = "cross"
    type_embedding: bool = True
    image_mask: float = 0.4
    text_mask: float = 0.15
    joint_image_mask: float = 0.4
    joint_text_mask: float = 0.15
    word_masks: tuple[float, float] = (0.8, 0.1)
    mim_target: str = "pixels"
    mim_loss: str = "l1"
    teacher_augment: tuple[str, ...] = ("resize", "center_crop")
    momentum: float = 0.99
    momentum_end: float = 1.0
    embed: str = "projector"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"oner.{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        for name in ("image_mask", "text_mask", "joint_image_mask", "joint_text_mask", "momentum", "momentum_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"oner.{name}={getattr(self, name)}: must be between 0 and 1")
        for term, mask in zip(MASKED, ("image_mask", "text_mask", "joint_image_mask", "joint_text_mask"), strict=True):
            if getattr(self, term) and not getattr(self, mask):
                raise UserError(f"oner.{term}={getattr(self, term)} has nothing to model with oner.{mask}=0")
        for term in (*CONTRASTIVE, *MASKED):
            if not getattr(self, term) >= 0:
                raise UserError(f"oner.{term}={getattr(self, term)}: must be at least 0")
        if not self.temperature > 0:
            raise UserError(f"oner.temperature={self.temperature}: must be above 0")
        if self.two_heads and (self.xmc or self.cic or self.cmc):
            raise UserError(
                "oner.two_heads=True has no head for a mean of both modalities: set oner.xmc, oner.cic and oner.cmc to 0"
            )
        if self.mim_target == "teacher" and self.teacher_augment and (self.mim or self.joint_mim):
            raise UserError(
                "oner.mim_target='teacher' needs oner.teacher_augment=(), the student's picture: else the patches are not the same"
            )
        if self.embed in ("predictor", "query_key") and not (self.predictor and self.itc):
            raise UserError(
                f"oner.embed={self.embed!r} needs oner.predictor=True and oner.itc above 0, which trains it on each modality"
            )


CONTRASTIVE = ("itc", "xmc", "cic", "cmc")
MASKED = ("mim", "mlm", "joint_mim", "joint_mlm")


def make(config):
    """The OneR method of a configuration; raises UserError for options or a tower that cannot be."""
    oner, data, size = OneR(config), config.data, config.model.image.size
    views = [
        ImageView("image", size, data.augment),
        text_view(config),
    ]
    if oner.options.teacher_augment:
        views.append(ImageView("teacher_image", size, oner.options.teacher_augment))
    return Method(
        views=tuple(views),
        eval_view=ImageView("image", size, config.eval.transform),
        init=oner.init,
        encode=oner.encode,
        heads=oner.heads,
        loss=oner.loss,
        update=oner.update,
        embed_image=oner.embed_image,
        embed_text=oner.embed_text,
        scale=oner.scale,
    )


class OneR:
    """The functions of the method.

    Parameters: `tower`, `projector`, `predictor`, with two heads `projector_text` and `predictor_text`, and the linear
    decoders `mim` and `mlm`. `extra`: `teacher`, the moving average of tower and projectors, and `batch_stats`.
    """

    def __init__(self, config):
        self.options = o = read_options(config, "oner", Options)
        model = config.model
        self.steps, self.eot_id = config.train.steps, model.text.eot_id
        self.has_joint = bool(o.cmc or o.joint_mim or o.joint_mlm)  # the pass of both together
        self.tower = one_tower(model, type_embedding=o.type_embedding)
        dtype = jnp.dtype(model.dtype)
        self.head_modules = {"projector": MlpHead((o.head_width, o.head_width, model.embed_dim), dtype=dtype)}
        if o.predictor:
            self.head_modules["predictor"] = MlpHead((o.head_width, model.embed_dim), dtype=dtype)
        self.mean, self.std = (np.asarray(x, np.float32) * 255 for x in (model.image_mean, model.image_std))

    def init(self, rng, batch):
        o, size = self.options, self.tower.size
        rng_tower, rng_mim, *rngs = jax.random.split(rng, 2 + 2 * len(self.head_modules))
        ids, n = batch["text"], (size // self.tower.patch_size) ** 2
        shares = [(o.image_mask, o.text_mask), (o.joint_image_mask, o.joint_text_mask)][: 1 + self.has_joint]
        shapes = [(len(ids), n), ids.shape]
        hidden = [jnp.zeros(shape, bool) if any(share) else None for shape, *share in zip(shapes, *shares, strict=True)]
        images = batch["image"].astype(jnp.float32)
        params = {"tower": self.tower.init(rng_tower, images, ids, ids == ids, "block_diagonal", *hidden)["params"]}
        stats, suffixes = {}, ("", "_text") if o.two_heads else ("",)
        width = self.tower.width
        for kind, module in self.head_modules.items():
            for suffix in suffixes:
                variables = module.init(rngs.pop(), jnp.zeros((2, width)))
                params[kind + suffix], stats[kind + suffix] = variables["params"], variables["batch_stats"]
            width = module.widths[-1]
        teacher = {name: x for name, x in params.items() if name.startswith(("tower", "projector"))}
        if o.mim or o.joint_mim:
            width = 3 * self.tower.patch_size**2 if o.mim_target == "pixels" else self.tower.width
            kernel = jax.nn.initializers.lecun_normal()(rng_mim, (self.tower.width, width))
            params["mim"] = {"kernel": kernel, "bias": jnp.zeros(width)}
        if o.mlm or o.joint_mlm:
            params["mlm"] = {"bias": jnp.zeros(self.tower.vocab_size)}
        return params, {"teacher": teacher, "batch_stats": stats}

    def encode(self, params, extra, batch, rng, train):
        """CLS states `[b, D]` of student and teacher, a pair for image and text, and of each masked modelling `[b, 2]`: sum, count."""
        o = self.options
        images, ids = self._pixels(batch["image"]), shard_batch(batch["text"])
        real = real_tokens(ids, self.eot_id)
        clean = self._pixels(batch["teacher_image"]) if "teacher_image" in batch else images
        teacher = self._states(extra["teacher"], clean, ids, real, "block_diagonal")
        target = self._mim_target(images, teacher) if o.mim or o.joint_mim else None
        keys = [
            jax.vmap(lambda i, k=k: jax.random.fold_in(jax.random.fold_in(rng, i), k))(batch["example_id"])
            for k in range(2)
        ]

        def student(mode, masks):
            return self._states(params, images, masks["ids"], real, mode, masks["patches"], masks["words"])

        masks = self._masks(keys[0], ids, real, o.image_mask * train, o.text_mask * train)
        alone = student("block_diagonal", masks)
        features = {"student": _cls(alone), "teacher": jax.lax.stop_gradient(_cls(teacher))}
        features |= self._masked_modelling(params, alone, masks, target, {"mim": o.mim, "mlm": o.mlm})
        if o.cic:
            features["cic"] = _cls(student("off_diagonal" if o.cic_kv == "cross" else "off_diagonal_self", masks))
        if self.has_joint:
            masks = self._masks(keys[1], ids, real, o.joint_image_mask * train, o.joint_text_mask * train)
            joint = student("full" if o.joint_cls == "mean" else "full_one_cls", masks)
            features["cmc"] = _cls(joint) if o.joint_cls == "mean" else _cls(joint)[:1] * 2
            found = self._masked_modelling(params, joint, masks, target, {"mim": o.joint_mim, "mlm": o.joint_mlm})
            features |= {f"joint_{name}": x for name, x in found.items()}
        return features, extra

    def heads(self, params, extra, features, batch, rng):
        """Adds `pairs`, for each contrastive term its `(queries, keys)`, and `projected`, F(I) and F(T); float32 `[B, E]`."""
        o = self.options
        projected, stats = self._apply("projector", params, extra["batch_stats"], features["student"])
        keys = jax.lax.stop_gradient(
            self._apply("projector", extra["teacher"], extra["batch_stats"], features["teacher"])[0]
        )
        pairs = {}
        if o.itc:
            predicted, stats = self._apply("predictor", params, stats, projected) if o.predictor else (projected, stats)
            pairs["itc"] = [(predicted[0], keys[1]), (predicted[1], keys[0])]
        for term in CONTRASTIVE[1:]:
            if getattr(o, term):
                both = projected if term == "xmc" else self._apply("projector", params, stats, features[term])[0]
                query = mix(*both, o.mix)
                if o.predictor:
                    query = self._run("predictor", params, stats, query)[0]
                pairs[term] = [(query, mix(*keys, o.mix))]
        return features | {"pairs": pairs, "projected": projected}, extra | {"batch_stats": stats}

    def loss(self, params, extra, features, batch, rng):
        o, values, metrics = self.options, {}, {}
        for term, pairs in features["pairs"].items():
            found = [contrast(query, key, o.temperature) for query, key in pairs]
            values[term] = sum(value for value, _ in found)
            if term == "itc":
                metrics |= dict(
                    zip(("image_to_text_acc", "text_to_image_acc"), (accuracy for _, accuracy in found), strict=True)
                )
        for term in MASKED:
            if term in features:
                values[term] = mean_of_chosen(features[term])
        means = [l2_normalize(x).mean(0) for x in features["projected"]]
        metrics |= {"modality_gap": jnp.linalg.norm(means[0] - means[1])} | {
            f"loss_{term}": x for term, x in values.items()
        }
        return sum(getattr(o, term) * x for term, x in values.items()), metrics

    def scale(self, params):
        """Returns the factor of the similarities, one over the temperature, which is constant."""
        return jnp.float32(1 / self.options.temperature)

    def update(self, params, extra, features, step):
        """The teacher that the next step meets: MoCo v3 moves it, by the momentum of that step, before the keys are computed."""
        start, end = self.options.momentum, self.options.momentum_end
        m = end - (end - start) * (1 + jnp.cos(math.pi * (step + 1) / self.steps)) / 2
        student = {name: params[name] for name in extra["teacher"]}
        return extra | {"teacher": jax.tree.map(lambda t, p: m * t + (1 - m) * p, extra["teacher"], student)}

    def embed_image(self, params, extra, images):
        return self._embed(params, extra, 0, self._states(params, self._pixels(images))["image"])

    def embed_text(self, params, extra, ids):
        ids = shard_batch(ids)
        return self._embed(params, extra, 1, self._states(params, None, ids, real_tokens(ids, self.eot_id))["text"])

    def _embed(self, params, extra, modality, states):
        x, both = states[:, 0], ("projector", "predictor")
        kinds = {"cls": (), "projector": both[:1], "predictor": both, "query_key": both[: 2 - modality]}
        for kind in kinds[self.options.embed]:
            name = self._names(kind)[modality]
            x = self.head_modules[kind].apply({"params": params[name], "batch_stats": extra["batch_stats"][name]}, x)
        return l2_normalize(x)

    def _pixels(self, images):
        return (shard_batch(images).astype(jnp.float32) - self.mean) / self.std

    def _states(self, params, *inputs):
        return self.tower.apply({"params": params["tower"]}, *inputs)

    def _names(self, kind):
        """Of the heads of this kind for images and for texts."""
        return kind, kind + "_text" if self.options.two_heads else kind

    def _apply(self, kind, params, stats, inputs):
        """`(outputs, batch statistics)` of the heads of this kind in training, for a pair of inputs `[B, D]`, image and text."""
        if self.options.joint_bn and not self.options.two_heads:
            # Side by side and not one after the other, so that every device keeps its own rows.
            y, stats = self._run(kind, params, stats, jnp.stack(inputs, axis=1))
            return (y[:, 0], y[:, 1]), stats
        outputs = []
        for name, x in zip(self._names(kind), inputs, strict=True):
            y, stats = self._run(name, params, stats, x)
            outputs.append(y)
        return tuple(outputs), stats

    def _run(self, name, params, stats, x):
        module, variables = (
            self.head_modules[name.removesuffix("_text")],
            {"params": params[name], "batch_stats": stats[name]},
        )
        y, new = module.apply(variables, shard_batch(x), train=True, mutable=["batch_stats"])
        return y, stats | {name: new["batch_stats"]}

    def _masks(self, keys, ids, real, image_share, text_share):
        """The hidden `patches`, bool `[b, n]`, or None, and what `mask_words` gives; without it `words` (None) and `ids`."""
        masks = dict(patches=None, words=None, ids=ids)
        if image_share:
            masks["patches"] = mask_patches(keys, (self.tower.size // self.tower.patch_size) ** 2, image_share)
        if text_share:
            masks |= mask_words(keys, ids, real, text_share, self.options.word_masks, self.tower.vocab_size)
        return masks

    def _mim_target(self, images, teacher):
        pixels = self.options.mim_target == "pixels"
        x = patch_pixels(images, self.tower.patch_size) if pixels else teacher["image"][:, 1:].astype(jnp.float32)
        return jax.lax.stop_gradient(jax.nn.standardize(x, epsilon=1e-6))

    def _masked_modelling(self, params, states, masks, target, weights):
        """`[b, 2]` for each term that has a weight: the sum of the losses of masked tokens, and their number."""
        found = {}
        if weights["mim"] and masks["patches"] is not None:
            x = states["image"][:, 1:]
            error = (x @ params["mim"]["kernel"].astype(x.dtype)).astype(jnp.float32) + params["mim"]["bias"] - target
            error = (jnp.abs(error) if self.options.mim_loss == "l1" else jnp.square(error)).mean(-1)
            found["mim"] = sum_and_count(error, masks["patches"])
        if weights["mlm"] and masks["words"] is not None:
            x = jnp.take_along_axis(states["text"][:, 1:], masks["positions"][..., None], axis=1)
            words = params["tower"]["txt"]["embed"]["embedding"].astype(x.dtype)
            logits = (x @ words.T).astype(jnp.float32) + params["mlm"]["bias"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, masks["targets"])
            found["mlm"] = sum_and_count(losses, masks["chosen"])
        return found


def contrast(queries, keys, temperature):
    """MoCo v3's contrast: each query is to find its own key among those of the batch. No gradient reaches the keys.

    Args:
      queries, keys: `[B, E]`, of any length.
      temperature: of the softmax; the loss is multiplied by twice this.

    Returns:
      `(loss, share of the queries whose key beats all others)`, float32 scalars.
    """
    loss, accuracy = contrastive.contrast(
        l2_normalize(queries), l2_normalize(jax.lax.stop_gradient(keys)), 1 / temperature
    )
    return 2 * temperature * loss, accuracy


def mix(image, text, how="mean"):
    """The mean of two embeddings `[B, E]`, or with `norm_mean` of their unit vectors."""
    if how == "norm_mean":
        image, text = l2_normalize(image), l2_normalize(text)
    return (image + text) / 2


def _cls(states):
    return states["image"][:, 0], states["text"][:, 0]
