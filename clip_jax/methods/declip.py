"""DeCLIP: Li et al. 2022, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training
Paradigm".

CLIP with more supervision from the same pairs: two views of an image and two of its caption. The second text view is an
EDA of the caption (`clip_jax/data/text_augment.py`), the first is masked for language modelling. With embeddings u1, u2
and v1, v2:

    clip        InfoNCE of u1 and v1, the mean of both directions
    multi_view  the mean of InfoNCE over the three other pairs of views
    nn          InfoNCE of each image view with the nearest neighbour of each text view in a first-in-first-out queue of
                earlier captions, from image to text, the mean over the pairs of views
    simsiam     SimSiam (Chen & He 2021) on the two views of the image
    mlm         BERT's masked language modelling (Devlin et al. 2019) of the caption, in the pass that embeds it

The default weights are those of the released code, with 0.4 on the mean of all four pairs. configs/declip.py has the
paper's, taken from secondary descriptions. SLIP (Mu et al. 2022) is CLIP on one view of the image and the term simclr,
SimCLR (Chen et al. 2020), on two others: an MLP on the image tower's feature before its projection. DeFILIP (Cui et
al. 2022) adds the term filip: FILIP's loss on 16 selected tokens of the first view and the masked caption, each mapped
to `filip_width` numbers. Its scale has no bound.

Deviations from the released code:
  - BatchNorm uses the statistics of the global batch, and in a ResNet those of both views together.
  - One queue serves all devices, wraps around and is saved with the state.
  - Random words are never special tokens, so the end of a text stays in place.
  - Without a masked word the loss is 0, not NaN.
  - Of several captions of a picture one is drawn, as in all methods. The released code takes the first.

The queue spans `queue_size / (2 * batch size)` steps. Each of the 32 devices of the released run had its own 65,536
captions, which is 256 steps; here 2,097,152 captions span as many. DeFILIP ignores padding, unlike the released code.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from clip_jax.data.views import ImageView, TextVariants
from clip_jax.errors import UserError
from clip_jax.losses.contrastive import compared, filip, paired_keys, similarities, views_infonce
from clip_jax.losses.neighbors import enqueue, nearest, new_queue
from clip_jax.losses.pairwise import EXCLUDED, Tile, pairwise
from clip_jax.methods.interface import Method, read_options, text_view
from clip_jax.models.common import BATCH_AXES, fold_in_ids, l2_normalize, shard_batch, stack_views, unstack_views
from clip_jax.models.heads import MlpHead
from clip_jax.models.layers import Dense, float32_matmul
from clip_jax.models.masking import mask_tokens, mean_of_chosen, sum_and_count
from clip_jax.models.one_tower import real_tokens
from clip_jax.models.two_tower import TwoTower

#: Fields of the configuration that get the tokenizer's values (`clip_jax.methods.interface.resolve`).
TOKENIZER_FIELDS = {"declip": ("mask_id", "special_ids")}
IMAGES = ("image", "image_2", "image_3")
TERMS = ("clip", "multi_view", "nn", "simsiam", "mlm", "simclr", "filip")


def reads_end(config):
    """Whether a term looks for the end of a text (`clip_jax.methods.interface.resolve`)."""
    return bool(config.declip.mlm or config.declip.filip)


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.declip`. A weight of 0 removes a term and the views and parameters that only it needs.

    Attributes:
      clip, multi_view, nn, simsiam, mlm, simclr, filip: weights of the terms.
      head_width: the width of all three layers of SimSiam's projector.
      predictor_width: the width of the predictor's hidden layer.
      temperature: of simclr.
      simclr_width, simclr_dim: widths of the hidden layers and of the output of its head.
      simclr_augment: image transforms of its two views; empty: `data.augment`.
      filip_width: the size of the token vectors of filip.
      queue_size: the number of captions in the queue of nn.
      wait_for_queue: nn counts only after the queue's first, random rows have been replaced.
      skip_same_neighbor: two captions with the same nearest neighbour are not negatives of each other in nn.
      text_mask: the probability that a token of a caption is chosen for mlm.
      word_masks: the share of the chosen tokens that is masked and the share that becomes a random word. The rest
        stays.
      contrast_on_masked: the masked caption is the one that is embedded. False embeds the unmasked caption in another
        pass.
      logit_scale_clamp: bounds of the logarithm of the scale after each step. The loss bounds it by
        `model.logit_scale_max`.
      mask_id, special_ids: the tokenizer's, filled in automatically. Without a mask token the mask is the id after the
        vocabulary.

    Raises UserError for invalid values.
    """

    clip: float = 0.1
    multi_view: float = 0.3
    nn: float = 0.2
    simsiam: float = 0.2
    mlm: float = 0.2
    simclr: float = 0.0
    filip: float = 0.0
    head_width: int = 1024
    predictor_width: int = 512
    temperature: float = 0.1
    simclr_width: int = 4096
    simclr_dim: int = 256
    simclr_augment: tuple[str, ...] = ()
    filip_width: int = 256
    queue_size: int = 65536
    wait_for_queue: bool = False
    skip_same_neighbor: bool = False
    text_mask: float = 0.15
    word_masks: tuple[float, float] = (0.8, 0.1)
    contrast_on_masked: bool = True
    logit_scale_clamp: tuple[float, float] = (3.0, 6.0)
    mask_id: int = -1
    special_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for term in TERMS:
            if not getattr(self, term) >= 0:
                raise UserError(f"declip.{term}={getattr(self, term)}: must be at least 0")
        for name in ("head_width", "predictor_width", "queue_size", "simclr_width", "simclr_dim", "filip_width"):
            if not getattr(self, name) >= 1:
                raise UserError(f"declip.{name}={getattr(self, name)}: must be at least 1")
        if not self.temperature > 0:
            raise UserError(f"declip.temperature={self.temperature}: must be above 0")
        if not 0 < self.text_mask < 1:
            raise UserError(
                f"declip.text_mask={self.text_mask}: must be between 0 and 1; declip.mlm=0 leaves masking out"
            )
        if len(self.word_masks) != 2 or not 0 <= min(self.word_masks) <= sum(self.word_masks) <= 1:
            raise UserError(f"declip.word_masks={self.word_masks}: two shares are needed, together at most 1")
        if len(self.logit_scale_clamp) != 2 or self.logit_scale_clamp[0] > self.logit_scale_clamp[1]:
            raise UserError(f"declip.logit_scale_clamp={self.logit_scale_clamp}: the least and the greatest are needed")


def make(config):
    """Returns the DeCLIP method of a configuration; raises UserError for invalid options or towers."""
    declip = DeCLIP(config)
    model, data = config.model, config.data
    more = (declip.options.simclr and declip.options.simclr_augment) or data.augment
    augments = zip(IMAGES[: declip.image_views], (data.augment, more, more), strict=False)
    images = [ImageView(name, model.image.size, augment) for name, augment in augments]
    variants = ((), ("eda",))[: declip.text_views]
    return Method(
        views=(*images, text_view(config, kind=TextVariants, variants=variants)),
        eval_view=ImageView("image", model.image.size, config.eval.transform),
        init=declip.init,
        encode=declip.encode,
        heads=declip.heads,
        loss=declip.loss,
        update=declip.update,
        constrain=declip.constrain,
        embed_image=declip.towers.embed_image,
        embed_text=declip.towers.embed_text,
        image_features=declip.towers.image_features,
        scale=declip.scale,
        sharding_rules=((r"/queue/rows$", (BATCH_AXES, None)),),
    )


class DeCLIP:
    """The functions of the method. `batch["text"]` holds the text views of a caption, int32 `[b, 1 or 2, n]`.

    Parameters besides those of the towers and `logit_scale`: `projector`, `predictor`, `simclr`, `mlm` and `filip`.
    `extra` holds `queue` and the `batch_stats` of the heads. simclr has the last two views of the image, and the first
    two belong to the other terms.
    """

    def __init__(self, config):
        self.options = o = read_options(config, "declip", Options)
        model = config.model.copy_and_resolve_references()
        if o.simclr and not model.image.get("token_norm", True):
            raise UserError(
                "declip.simclr needs model.image.token_norm=True: its head takes the feature after the last layer norm"
            )
        self.vocab_size = model.text.vocab_size  # the tokenizer's
        if o.mlm:
            model.text.vocab_size = max(self.vocab_size, o.mask_id + 1)
        self.text, self.embed_dim = model.text, model.embed_dim
        self.scale_init, self.scale_max = model.logit_scale_init, math.exp(model.logit_scale_max)
        self.towers = TwoTower(model, tokens=bool(o.mlm or o.filip or o.simclr))
        self.own_views = 1 + bool(o.multi_view or o.nn or o.simsiam)
        self.image_views = 3 if o.simclr else self.own_views
        self.text_views = 1 + bool(o.multi_view or o.nn)
        dtype = jnp.dtype(model.dtype)
        self.modules = {}
        if o.simclr:
            widths = o.simclr_width, o.simclr_width, o.simclr_dim
            self.modules["simclr"] = MlpHead(widths, bias=True, last_norm="none", dtype=dtype)
        if o.simsiam:
            self.modules["projector"] = MlpHead((o.head_width,) * 3, bias=True, last_norm="affine", dtype=dtype)
            self.modules["predictor"] = MlpHead(
                (o.predictor_width, o.head_width), bias=True, last_norm="none", dtype=dtype
            )
        self.mlm = Dense(model.text.vocab_size, dtype=dtype)
        self.to_token = Dense(o.filip_width, dtype=dtype)

    def init(self, rng, batch):
        o = self.options
        rng, rng_queue, rng_mlm, *rngs = jax.random.split(rng, 8)
        batch = batch | {"text": batch["text"][:, 0]}
        params, extra = self.towers.init(rng, batch)
        params["logit_scale"] = jnp.asarray(self.scale_init, jnp.float32)
        stats = dict(extra.get("batch_stats", {}))
        found, tokens, _ = jax.eval_shape(lambda: self.towers.encode_image(params, extra, batch["image"]))
        feature = jax.eval_shape(self.feature, found, tokens).shape[-1] if o.simclr else 0
        for name, width in (("projector", self.embed_dim), ("predictor", o.head_width), ("simclr", feature)):
            if name in self.modules:
                variables = self.modules[name].init(rngs.pop(), jnp.zeros((2, width)))
                params[name], stats[name] = variables["params"], variables["batch_stats"]
        if o.mlm:
            params["mlm"] = self.mlm.init(rng_mlm, jnp.zeros((1, self.text.width)))["params"]
        if o.filip:
            widths = {"img": tokens.shape[-1], "txt": self.text.width}
            params["filip"] = {
                name: self.to_token.init(rngs.pop(), jnp.zeros((1, width)))["params"] for name, width in widths.items()
            }
            params["logit_scale_tokens"] = jnp.asarray(self.scale_init, jnp.float32)
        if o.nn:
            extra = extra | {"queue": new_queue(rng_queue, o.queue_size, self.embed_dim)}
        return params, extra | ({"batch_stats": stats} if stats else {})

    def encode(self, params, extra, batch, rng, train):
        """Returns `image` (not normalised) and `text` (unit rows), float32 `[b, v, E]`, and the sums of `mlm`.

        SLIP adds `feature`, `[b, 2, D]`, the two views of simclr before the projection. DeFILIP adds the unit vectors
        of the tokens, `tokens_img` and `tokens_txt`, and `real`, bool `[b, n]`.
        """
        o, of_texts = self.options, 1 + max(2, self.image_views)  # the first key of the texts
        keys = jax.vmap(lambda key: jax.random.split(key, of_texts + 3))(fold_in_ids(rng, batch["example_id"]))
        ids = shard_batch(batch["text"])
        real, texts = real_tokens(ids[:, 0], self.text.eot_id), [*jnp.moveaxis(ids, 1, 0)]
        masked = 0  # the form of the caption whose words are masked
        if o.mlm:
            masks = mask_tokens(
                keys[:, 0], texts[0], real, o.text_mask, o.word_masks, self.vocab_size, o.special_ids, o.mask_id
            )
            masked = 0 if o.contrast_on_masked else len(texts)
            texts[masked : masked + 1] = [masks["ids"]]
        # One pass encodes all views. The views of an example are adjacent, so that every device keeps its own rows.
        x, image_keys = stack_views([batch[name] for name in IMAGES[: self.image_views]], keys[:, 1:of_texts])
        image, tokens, extra = self.towers.encode_image(params, extra, x, train, image_keys, normalize=False)
        x, text_keys = stack_views(texts, keys[:, of_texts:])
        text, words, extra = self.towers.encode_text(params, extra, x, train, text_keys)
        features = {
            "image": unstack_views(image, len(ids))[:, : self.own_views],
            "text": unstack_views(text, len(ids))[:, : self.text_views],
        }
        if o.simclr:
            features["feature"] = unstack_views(self.feature(image, tokens), len(ids))[:, 1:]
        if o.mlm:
            features["mlm"] = self.masked_modelling(params, unstack_views(words, len(ids))[:, masked], masks)
        if o.filip:
            patches = tokens[:, int(getattr(self.towers.image, "cls_token", False)) :]
            given = {"img": unstack_views(patches, len(ids))[:, 0], "txt": unstack_views(words, len(ids))[:, 0]}
            features |= {
                f"tokens_{k}": compared(l2_normalize(self.to_token.apply({"params": params["filip"][k]}, x)), x.dtype)
                for k, x in given.items()
            }
            features["real"] = real
        return features, extra

    def feature(self, embedding, tokens):
        """Returns the image tower's feature before its projection, `[b, D]`.

        For towers whose pooling is the projection itself, such as ResNets', it is the embedding.
        """
        tower = self.towers.image
        pool, extra = getattr(tower, "pool", ""), int(getattr(tower, "cls_token", False))
        pools = {"cls": slice(0, 1), "gap": slice(extra, None), "mean_all": slice(None)}
        return tokens[:, pools[pool]].mean(1) if pool in pools else embedding

    def masked_modelling(self, params, words, masks):
        """Returns `sum_and_count` of the losses of the chosen words.

        Args:
          params: the parameters.
          words: states of the text tower, `[b, n, D]`.
          masks: the result of `mask_tokens`.
        """
        x = jnp.take_along_axis(words, masks["positions"][..., None], axis=1)
        logits = float32_matmul(x, params["mlm"]["kernel"]) + params["mlm"]["bias"]
        return sum_and_count(optax.softmax_cross_entropy_with_integer_labels(logits, masks["targets"]), masks["chosen"])

    def heads(self, params, extra, features, batch, rng):
        """Adds `projected`, `predicted` and `contrasted`, float32 `[B, 2, width]`, by statistics of each view."""
        stats = extra.get("batch_stats", {})
        chain = (("projector", "image", "projected"), ("predictor", "projected", "predicted"))
        for name, given, result in (*chain, ("simclr", "feature", "contrasted")):
            if name in self.modules:
                views = []
                for view in jnp.moveaxis(features[given], 1, 0):
                    variables = {"params": params[name], "batch_stats": stats[name]}
                    y, new = self.modules[name].apply(variables, shard_batch(view), train=True, mutable=["batch_stats"])
                    views, stats = [*views, y], stats | {name: new["batch_stats"]}
                features = features | {result: jnp.stack(views, axis=1)}
        return features, extra | ({"batch_stats": stats} if stats else {})

    def loss(self, params, extra, features, batch, rng):
        o, values = self.options, {}
        scale = self.scale(params)
        images, texts = ([*jnp.moveaxis(l2_normalize(features[name]), 1, 0)] for name in ("image", "text"))
        seen = 2 if o.multi_view else 1
        (values["clip"], *others), metrics = views_infonce(images[:seen], texts[:seen], scale)
        if o.multi_view:
            values["multi_view"] = sum(others) / len(others)
        if o.nn:
            rows, numbers = zip(*(nearest(v, extra["queue"]["rows"]) for v in texts), strict=True)
            found, _ = views_infonce(images, rows, scale, numbers if o.skip_same_neighbor else None, both=False)
            values["nn"] = sum(found) / len(found)
            if o.wait_for_queue:
                values["nn"] *= extra["queue"]["filled"] == o.queue_size
        if o.simsiam:
            z, p = jax.lax.stop_gradient(l2_normalize(features["projected"])), l2_normalize(features["predicted"])
            values["simsiam"] = -jnp.sum(p * z[:, ::-1], axis=-1).mean()
        if o.mlm:
            values["mlm"] = mean_of_chosen(features["mlm"])
        if o.simclr:
            values["simclr"] = nt_xent(features["contrasted"], o.temperature)
        if o.filip:
            given = features["tokens_img"], features["tokens_txt"], features["real"]
            values["filip"] = filip(*given, jnp.exp(params["logit_scale_tokens"]), paired_keys(*given))[0]
        metrics |= {f"loss_{term}": x for term, x in values.items()} | {"logit_scale": scale}
        return sum(getattr(o, term) * x for term, x in values.items()), metrics

    def scale(self, params):
        """Returns the factor of the similarities, `exp(logit_scale)`, at most `exp(model.logit_scale_max)`.

        The gradient passes through the bound, as in the released code, which changes the parameter itself.
        """
        scale = jnp.exp(params["logit_scale"])
        return scale + jax.lax.stop_gradient(jnp.minimum(scale, self.scale_max) - scale)

    def update(self, params, extra, features, step):
        """Enqueues the captions for the next step, the second text view first."""
        for k in (1, 0) if "queue" in extra else ():
            extra = extra | {"queue": enqueue(extra["queue"], features["text"][:, k])}
        return extra

    def constrain(self, params):
        return params | {"logit_scale": jnp.clip(params["logit_scale"], *self.options.logit_scale_clamp)}


def nt_xent(views, temperature):
    """Returns SimCLR's loss (Chen et al. 2020, equation 1), float32 scalar.

    Args:
      views: `[B, 2, D]`. The positive of a view is the other view of its example, among all 2 B - 1 other views.
      temperature: divides the cosines.
    """
    z = l2_normalize(views)
    positive = jnp.repeat(jnp.sum(z[:, 0] * z[:, 1], axis=1), 2) / temperature
    z = z.reshape(-1, z.shape[-1])
    negatives = pairwise(_views_tile, jnp.float32(temperature), z, z)
    return jnp.mean(jnp.logaddexp(negatives.row_lse, positive) - positive)


def _views_tile(temperature, z, others, i, j):
    return Tile(row_lse=jnp.where(i // 2 == j // 2, EXCLUDED, similarities(z, others) / temperature))
