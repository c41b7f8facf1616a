"""OneR: Jang et al. 2023, "Unifying Vision-Language Representation Space with Single-Tower Transformer"
(arXiv 2211.11153).

One transformer and one head encode images, texts and both together. Training follows MoCo v3 with an image and its
caption as the two views: the student's embedding, through a predictor, is contrasted with the embeddings of an
exponential moving average teacher. F(Q|KV) is the embedding of Q with the keys and values of KV, F(I,T|I,T) that of
both together, and a bar marks the teacher.

    ITC   F(I) -> bar F(T)  and  F(T) -> bar F(I)
    XMC   the mean of F(I) and F(T)      -> the mean of bar F(I) and bar F(T)
    CIC   the mean of F(I|T) and F(T|I)  -> the same
    CMC   F(I,T|I,T)                     -> the same

CMC is trained together with masked modelling of images, of texts and of both. No code of the authors is known.
Everything that the published summaries leave open is a field of `Options` whose default is an assumption. Further
assumptions: a learned vector replaces a masked word; means are taken after the projector; keys come from the batch
alone, without a queue; the running statistics of BatchNorm come only from the passes of F(I) and F(T), which evaluation
uses. The teacher has no running statistics; its BatchNorm uses those of the batch, or the student's running statistics
if the head is frozen.
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
from clip_jax.models.common import fold_in_ids, l2_normalize, moving_average, shard_batch
from clip_jax.models.heads import MlpHead
from clip_jax.models.layers import float32_matmul
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
    """The section `config.oner`. A weight of 0 removes a term and the pass that only it needs.

    Attributes:
      itc, xmc, cic, cmc: weights of the contrastive terms.
      mim, mlm: weights of masked image and language modelling in the pass of each modality alone.
      joint_mim, joint_mlm: the same in the pass of both together.
      two_heads: a projector and a predictor for each modality (row 2 of the paper's table; ITC only).
      head_width: the width of the hidden layers of projector and predictor. Their output has `model.embed_dim`.
      predictor: False compares the output of the projector.
      joint_bn: BatchNorm uses the statistics of both modalities together. False uses those of each modality, which
        hides the gap between them.
      temperature: of the softmax. The loss is multiplied by twice this.
      mix: the `mean` of the projector's outputs, or `norm_mean`, the mean of their unit vectors.
      joint_cls: F(I,T|I,T) is the embedding of a single CLS token (`one`), as in the paper's figure, or the `mean` of
        the embeddings of two.
      cic_kv: F(I|T) attends to the states of the text under F(T|I) (`cross`) or under F(T|T) (`self`).
      type_embedding: a learned vector of the modality is added to all its tokens.
      image_mask, text_mask: shares of the patches and words that are masked in the student's inputs.
      joint_image_mask, joint_text_mask: the same in the pass of both together, drawn independently.
      word_masks: the share of the chosen words that is hidden and the share that becomes a random word. The rest stays.
      mim_target: the normalised `pixels` of the patch or the normalised last state of the `teacher`.
      mim_loss: `l1` or `l2`.
      teacher_augment: transforms of the teacher's image; empty: the student's image without masks.
      momentum, momentum_end: the teacher's momentum at the start and at the end, along half a cosine.
      embed: the embedding of evaluation: the state of `cls`, the output of the `projector` or of the `predictor`, or
        `query_key`, which compares the predictor's output of an image with the projector's output of a text, as
        training does.

    Raises UserError for invalid values.
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
    joint_cls: str = "one"
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
                "oner.two_heads=True has no head for a mean of both modalities: set oner.xmc, oner.cic, oner.cmc to 0"
            )
        if self.mim_target == "teacher" and self.teacher_augment and (self.mim or self.joint_mim):
            raise UserError(
                "oner.mim_target='teacher' needs oner.teacher_augment=(), so that both see the same patches"
            )
        if self.embed in ("predictor", "query_key") and not (self.predictor and self.itc):
            raise UserError(f"oner.embed={self.embed!r} needs oner.predictor=True, and oner.itc above 0 to train it")


CONTRASTIVE = ("itc", "xmc", "cic", "cmc")
MASKED = ("mim", "mlm", "joint_mim", "joint_mlm")


def reads_end(config):
    """Whether the method looks for the end of a text (`clip_jax.methods.interface.resolve`)."""
    return True


def make(config):
    """Returns the OneR method of a configuration; raises UserError for invalid options or an invalid tower."""
    oner = OneR(config)
    data, size = config.data, config.model.image.size
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
        image_features=oner.image_features,
        scale=oner.scale,
        patch_similarity=oner.patch_similarity if oner.has_joint else None,
    )


class OneR:
    """The functions of the method.

    Parameters: `tower`, `projector`, `predictor` and the linear decoders `mim` and `mlm`. Two heads add
    `projector_text` and `predictor_text`. `extra` holds `teacher`, the moving average of tower and projectors, and
    `batch_stats`.
    """

    def __init__(self, config):
        self.options = o = read_options(config, "oner", Options)
        model = config.model
        self.steps, self.eot_id = config.train.steps, model.text.eot_id
        self.has_joint = bool(o.cmc or o.joint_mim or o.joint_mlm)  # is there a pass of both together?
        self.joint_mode = "full" if o.joint_cls == "mean" else "full_one_cls"
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
        """Returns pairs of CLS states `[b, D]` of image and text, and sum and count `[b, 2]` of each masked modelling.

        The pairs are `student`, `teacher` and, where their terms have a weight, `cic` and `cmc`.
        """
        o = self.options
        images, ids = self._pixels(batch["image"]), shard_batch(batch["text"])
        real = real_tokens(ids, self.eot_id)
        clean = self._pixels(batch["teacher_image"]) if "teacher_image" in batch else images
        teacher = self._states(extra["teacher"], clean, ids, real, "block_diagonal")
        target = self._mim_target(images, teacher) if o.mim or o.joint_mim else None
        keys = fold_in_ids(rng, batch["example_id"])
        keys = [jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(keys) for k in range(2)]

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
            joint = student(self.joint_mode, masks)
            features["cmc"] = _cls(joint) if o.joint_cls == "mean" else _cls(joint)[:1] * 2
            found = self._masked_modelling(params, joint, masks, target, {"mim": o.joint_mim, "mlm": o.joint_mlm})
            features |= {f"joint_{name}": x for name, x in found.items()}
        return features, extra

    def heads(self, params, extra, features, batch, rng):
        """Adds `pairs`, the `(queries, keys)` of each contrastive term, and `projected`, F(I) and F(T); `[B, E]`."""
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
        o = self.options
        values, metrics = {}, {}
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
        """Moves the teacher for the next step.

        MoCo v3 does so at the start of that step, before it computes the keys, with the momentum of that step.
        """
        start, end = self.options.momentum, self.options.momentum_end
        m = end - (end - start) * (1 + jnp.cos(math.pi * (step + 1) / self.steps)) / 2
        student = {name: params[name] for name in extra["teacher"]}
        return extra | {"teacher": moving_average(extra["teacher"], student, m)}

    def embed_image(self, params, extra, images):
        return self._embed(params, extra, 0, self._states(params, self._pixels(images))["image"])

    def image_features(self, params, extra, images):
        """Returns the states of the CLS of images before the projector, float32 `[b, D]`, whatever `embed` is."""
        return self._states(params, self._pixels(images))["image"][:, 0].astype(jnp.float32)

    def embed_text(self, params, extra, ids):
        ids = shard_batch(ids)
        return self._embed(params, extra, 1, self._states(params, None, ids, real_tokens(ids, self.eot_id))["text"])

    def patch_similarity(self, params, extra, images, ids):
        """Returns the cosine of the last states of patches and words in F(I,T|I,T), `[b, P, n]`, -inf for padding.

        The picture of zero-shot localisation. Assumption: it compares the states of single words without the projector,
        which training applies to CLS tokens alone.
        """
        ids = shard_batch(ids)
        real = real_tokens(ids, self.eot_id)
        states = self._states(params, self._pixels(images), ids, real, self.joint_mode)
        patches, words = (l2_normalize(states[name][:, 1:].astype(jnp.float32)) for name in ("image", "text"))
        similarity = jnp.einsum("bpd,bnd->bpn", patches, words, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(real[:, None], similarity, -jnp.inf)

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
        """Returns the names of the heads of this kind for images and for texts."""
        return kind, kind + "_text" if self.options.two_heads else kind

    def _apply(self, kind, params, stats, inputs):
        """Returns `(outputs, batch statistics)` of the heads of this kind in training.

        Args:
          kind: `projector` or `predictor`.
          params: the parameters.
          stats: the batch statistics of all heads.
          inputs: a pair `[B, D]`, image and text.
        """
        if self.options.joint_bn and not self.options.two_heads:
            # Stacked along a new axis, not concatenated, so that every device keeps its own rows.
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
        """Returns the masked `patches`, bool `[b, n]` or None, and the result of `mask_words`.

        Without masked words, `words` is None and `ids` holds the words themselves.
        """
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
        """Returns the sum of the losses and the number of masked tokens, `[b, 2]`, for each term that has a weight."""
        found = {}
        if weights["mim"] and masks["patches"] is not None:
            x = states["image"][:, 1:]
            error = float32_matmul(x, params["mim"]["kernel"]) + params["mim"]["bias"] - target
            error = (jnp.abs(error) if self.options.mim_loss == "l1" else jnp.square(error)).mean(-1)
            found["mim"] = sum_and_count(error, masks["patches"])
        if weights["mlm"] and masks["words"] is not None:
            x = jnp.take_along_axis(states["text"][:, 1:], masks["positions"][..., None], axis=1)
            words = params["tower"]["txt"]["embed"]["embedding"]
            logits = float32_matmul(x, words.T) + params["mlm"]["bias"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, masks["targets"])
            found["mlm"] = sum_and_count(losses, masks["chosen"])
        return found


def contrast(queries, keys, temperature):
    """Returns MoCo v3's contrastive loss of each query against all keys of the batch. The keys have no gradient.

    Args:
      queries, keys: `[B, E]`, not normalised.
      temperature: of the softmax. The loss is multiplied by twice this.

    Returns:
      `(loss, accuracy)`, float32 scalars. The accuracy is the share of the queries whose own key scores highest.
    """
    loss, accuracy = contrastive.contrast(
        l2_normalize(queries), l2_normalize(jax.lax.stop_gradient(keys)), 1 / temperature
    )
    return 2 * temperature * loss, accuracy


def mix(image, text, how="mean"):
    """Returns the mean of two embeddings `[B, E]`, or with `norm_mean` that of their unit vectors."""
    if how == "norm_mean":
        image, text = l2_normalize(image), l2_normalize(text)
    return (image + text) / 2


def _cls(states):
    return states["image"][:, 0], states["text"][:, 0]
