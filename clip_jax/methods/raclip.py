"""RA-CLIP: Xie et al. 2023, "RA-CLIP: Retrieval Augmented Contrastive Language-Image Pre-training".

A reconstruction: the authors released no code.

CLIP whose images look up pairs of a reference set that training never shows. A frozen encoder finds the K pairs whose
images are nearest. The retrieval augmentation module (`clip_jax/models/retrieval_augmentation.py`) adds what it reads
from their images and texts to the image's embedding, and the loss is CLIP's. The text tower is CLIP's, so zero-shot
classifiers are built as for CLIP. Every image retrieves, in evaluation too. `extra["bank"]` holds the features of the
reference set and `extra["encoder"]` the frozen weights, so a checkpoint has all that retrieval needs. The bank is
computed at the start of a run.

Assumptions, where the paper is silent: K, heads of width 64, no biases in the module, neighbours of the augmented image
(`retrieval="online"`; `"cached"` looks up each training record once, by its evaluation view). A neighbour that is the
image itself, with a cosine above `skip_above`, is ignored.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.data.records import BadRecord, image_key, records
from clip_jax.data.sources import configured_source
from clip_jax.errors import UserError
from clip_jax.losses.neighbors import take, top_k
from clip_jax.methods import clip
from clip_jax.methods.frozen_encoders import make_encoder, stored_config
from clip_jax.methods.interface import read_options
from clip_jax.models.common import BATCH_AXES, fold_in_ids, l2_normalize
from clip_jax.models.retrieval_augmentation import OUT_INITS, RetrievalAugmentation
from clip_jax.models.two_tower import TwoTower

#: The bank and the cached neighbours are split over the devices that share a batch.
SHARDING_RULES = ((r"/bank/(image|text)$", (BATCH_AXES, None)), (r"/neighbors$", (BATCH_AXES, None)))

#: Records of the training set and of the reference set that the check for an overlap compares, at most.
_CHECKED = 20_000, 100_000
#: Arrays are indexed by 32 bits on a device.
_MOST_CACHED = 2**31
#: Records of a block. The number of rows of the bank is a multiple of it, so that devices can share them.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.raclip`.

    Attributes:
      reference: the held-out pairs, a data set as in `data.source`. None of them may be in the training set.
      encoder: the frozen encoder: `pixels`, which needs no weights, `efficientnet_lite0` or `efficientnet_lite0:FILE`,
        which was trained on ImageNet's classes, or the work folder of a run; or `img=ENCODER, txt=ENCODER`, of which
        each is one of these or a tower of others, such as DINO's and a sentence transformer.
      k: the number of neighbours of an image.
      use_bank: False embeds every image as if it had no neighbours, to measure what retrieval adds.
      retrieval: `online` or `cached`.
      approximate: an approximate search, which is faster on a TPU and misses a few neighbours.
      heads, layers, bias, pre_ln, out_init: of the retrieval augmentation module. `out_init` is `xavier`, or `zeros` to
        start as CLIP.
      skip_above: a neighbour with a larger cosine is the image itself.
      bank_size, train_size: the number of records of the reference set and of the training set, filled in
        automatically.
      encoder_config: what a checkpoint keeps of the encoder besides its weights, filled in automatically.

    Raises UserError for invalid values.
    """

    reference: str = ""
    encoder: str = "pixels"
    k: int = 64
    use_bank: bool = True
    retrieval: str = "online"
    approximate: bool = False
    heads: int = 8
    layers: int = 1
    bias: bool = False
    pre_ln: bool = False
    out_init: str = "xavier"
    skip_above: float = 0.9999
    bank_size: int = 0
    train_size: int = 0
    encoder_config: str = ""

    def __post_init__(self):
        for name, low in (("k", 1), ("heads", 1), ("layers", 1), ("bank_size", 0)):
            if not getattr(self, name) >= low:
                raise UserError(f"raclip.{name}={getattr(self, name)}: must be at least {low}")
        for name, allowed in (("retrieval", ("online", "cached")), ("out_init", tuple(OUT_INITS))):
            if getattr(self, name) not in allowed:
                raise UserError(f"raclip.{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")


def resolve(config, source):
    """Returns a copy of the configuration with `bank_size`, `train_size` and `encoder_config`.

    Raises UserError for an invalid encoder and for a reference set that is missing, too small, or overlaps the training
    set.
    """
    o, data = read_options(config, "raclip", Options), config.data
    if not o.reference:
        raise UserError(
            "raclip.reference is empty: name the held-out pairs, such as 'DATA?part=record:1/10', and train on the rest"
        )
    if o.retrieval == "cached" and len(source) >= _MOST_CACHED:
        raise UserError(
            f"raclip.retrieval='cached' holds neighbours of fewer than {_MOST_CACHED:,} records, and data.source has "
            f"{len(source):,}; use retrieval='online'"
        )
    reference = configured_source(data, o.reference)
    if o.k > len(reference):
        raise UserError(f"raclip.k={o.k}, but raclip.reference={o.reference!r} has {len(reference):,} records")
    known = {_key(record): index for index, record in _spread(reference, _CHECKED[1])}
    for index, record in _spread(source, _CHECKED[0]):
        if (place := known.get(_key(record))) is not None:
            raise UserError(
                f"raclip.reference={o.reference!r} and data.source={data.source!r} overlap: record {place} of the one"
                f" is record {index} of the other, and an image would retrieve its own caption"
            )
    config = config.copy_and_resolve_references().unlock()
    config.raclip.update(bank_size=len(reference), train_size=len(source), encoder_config=stored_config(o.encoder))
    return config.lock()


def _spread(source, most):
    """Yields `(index, record)` of at most `most` readable records, evenly spaced."""
    for index in range(0, len(source), -(-len(source) // most)):
        try:
            yield index, source[index]
        except BadRecord:
            continue


def _key(record):
    return image_key(record.get("image")), tuple(record["texts"])


def make(config):
    """Returns the RA-CLIP method of a configuration; raises UserError for invalid options, towers or encoder."""
    raclip, base = RaClip(config), clip.make(config)
    fields = ("init", "encode", "embed_image", "init_from_data")
    return dataclasses.replace(
        base,
        sharding_rules=(*SHARDING_RULES, *raclip.encoder.sharding_rules),
        **{name: functools.partial(getattr(raclip, name), base) for name in fields},
    )


class RaClip:
    """The functions that differ from CLIP's. Their argument `base` is the method without retrieval.

    `ram` is the only parameter besides those of the towers and `logit_scale`. `extra` holds `bank`, `encoder` and, for
    cached neighbours, `neighbors`.
    """

    def __init__(self, config):
        self.config, self.options = config, read_options(config, "raclip", Options)
        o, model = self.options, config.model
        if not o.encoder_config:
            o = self.options = dataclasses.replace(o, encoder_config=stored_config(o.encoder))
        self.encoder, self.towers = make_encoder(o.encoder, o.encoder_config), TwoTower(model)
        if model.embed_dim % o.heads:
            raise UserError(f"model.embed_dim={model.embed_dim} is not divisible by raclip.heads={o.heads}")
        self.ram = RetrievalAugmentation(o.heads, o.layers, o.bias, o.pre_ln, o.out_init, jnp.dtype(model.dtype))

    def init(self, base, rng, batch):
        o, dims = self.options, {"image": self.encoder.image_dim, "text": self.encoder.text_dim}
        params, extra = base.init(rng, batch)
        z, images, texts = (
            jnp.zeros(shape)
            for shape in ((1, self.config.model.embed_dim), (1, 1, dims["image"]), (1, 1, dims["text"]))
        )
        params["ram"] = self.ram.init(jax.random.fold_in(rng, 1), z, images, texts, jnp.ones((1, 1), bool))["params"]
        # Without data, as in `clip_jax.compile`, the size of the bank is unknown. It needs at least k rows.
        rows = -(-max(o.bank_size, o.k) // _BLOCK) * _BLOCK
        bank = {name: jnp.zeros((rows, dim)) for name, dim in dims.items()} | {"count": jnp.zeros((), jnp.int32)}
        extra = extra | {"bank": bank, "encoder": self.encoder.variables()}
        if o.retrieval == "cached":
            extra["neighbors"] = jnp.zeros((o.train_size, o.k), jnp.int32)
        return params, extra

    def encode(self, base, params, extra, batch, rng, train):
        known = extra["neighbors"][batch["example_id"][:, 0]] if "neighbors" in extra else None
        keys = jax.vmap(lambda key: jax.random.split(key))(fold_in_ids(rng, batch["example_id"]))
        image, _, extra = self.towers.encode_image(params, extra, batch["image"], train, keys[:, 0], normalize=False)
        text, _, extra = self.towers.encode_text(params, extra, batch["text"], train, keys[:, 1])
        return {"image": self.augment(params, extra, batch["image"], image, known), "text": text}, extra

    def embed_image(self, base, params, extra, images):
        """Returns unit rows, float32 `[b, E]`."""
        return self.augment(params, extra, images, self.towers.encode_image(params, extra, images, normalize=False)[0])

    def augment(self, params, extra, images, z, neighbors=None):
        """Returns the unit rows of the augmented embeddings, float32 `[b, E]`.

        Args:
          params: the parameters.
          extra: the state with the bank.
          images: uint8 `[b, h, w, 3]`.
          z: embeddings of the images, `[b, E]`, not normalised.
          neighbors: int32 `[b, K]`, records of the reference set, -1 for none; None retrieves them.
        """
        if not self.options.use_bank:
            return l2_normalize(z)
        if neighbors is None:
            neighbors, mask = self.retrieve(extra["bank"], extra["encoder"], images)
        else:
            neighbors, mask = jnp.maximum(neighbors, 0), neighbors >= 0
        found = [take(extra["bank"][name], neighbors) for name in ("image", "text")]
        return l2_normalize(self.ram.apply({"params": params["ram"]}, z, *found, mask))

    def retrieve(self, bank, encoder, images):
        """Returns the nearest records of the reference set, `(numbers int32 [b, K], mask bool [b, K])`.

        The mask is False for missing neighbours and for the image itself.
        """
        o = self.options
        cosines, numbers = top_k(
            self.encoder.embed_image(encoder, images), bank["image"], o.k, bank["count"], o.approximate
        )
        return numbers, jnp.isfinite(cosines) & (cosines <= o.skip_above)

    def init_from_data(self, base, extra, source, mesh):
        """Returns `extra` with the features of the reference set, the encoder's weights and the cached neighbours.

        The features and the neighbours are NumPy arrays.
        """
        o, reference = self.options, configured_source(self.config.data, self.options.reference)
        weights, parts = self.encoder.load(mesh), {"image": [], "text": []}
        # Every host needs all results, so they are replicated.
        whole, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (BATCH_AXES,)))
        embed = jax.jit(self.encoder.embed_image, out_shardings=whole)
        for _, images, texts in self._blocks(base, reference):
            parts["image"].append(np.asarray(embed(weights, images))[: len(texts)])
            parts["text"].append(self.encoder.embed_text(texts))
        bank = {name: np.concatenate(rows) for name, rows in parts.items()}
        count, total = len(bank["image"]), len(extra["bank"]["image"])
        bank = {
            name: np.concatenate([rows, np.zeros((total - count, rows.shape[1]), rows.dtype)])
            for name, rows in bank.items()
        }
        extra = extra | {"bank": bank | {"count": np.int32(count)}, "encoder": weights}
        if o.retrieval == "cached":
            neighbors, retrieve = np.full((len(source), o.k), -1, np.int32), jax.jit(self.retrieve, out_shardings=whole)
            given = jax.device_put(bank, spread) | {"count": np.int32(count)}
            for places, images, texts in self._blocks(base, source):
                numbers, mask = (np.asarray(x)[: len(texts)] for x in retrieve(given, weights, images))
                neighbors[places] = np.where(mask, numbers, -1)
            extra["neighbors"] = neighbors
        return extra

    def _blocks(self, base, source):
        """Yields `(numbers of the records, images uint8 [256, size, size, 3], captions)` of all usable records.

        The images of the last block are padded with zeros.
        """

        def usable():
            for index, record in records(source):
                try:
                    if not isinstance(record, BadRecord):
                        yield index, base.eval_view(record, None), base.views[1].caption(record, None)
                except BadRecord:
                    continue

        rows = usable()
        while block := list(itertools.islice(rows, _BLOCK)):
            places, images, texts = zip(*block, strict=True)
            yield list(places), np.stack(images + (np.zeros_like(images[0]),) * (_BLOCK - len(images))), list(texts)
