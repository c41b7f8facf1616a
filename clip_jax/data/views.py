"""Views: what a method asks of the data for each example, and the function that makes an example of a record.

A view is a frozen dataclass with

    name, shape, dtype              the key, shape and dtype of its array in an example
    view(record, rng, tokenizer)    returns that array; raises BadRecord when it cannot use the record
    fields                          optional: `{record field: what names it}` of the fields that the view names

`rng` is a `np.random.Generator` in training and None in evaluation, where nothing is random.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image

from clip_jax.data import augment, decode, text_augment, token_augment
from clip_jax.data.records import BadRecord, label_tuple
from clip_jax.data.templates import (
    class_name,
    fields_of,
    fill_template,
    parse_template,
    pick,
    rewrites_of,
    usable_rewrite,
    usable_texts,
)
from clip_jax.errors import UserError


def _as_tuple(value):
    """Returns a tuple of strings; configurations carry lists, and one string counts as a list of one."""
    return (value,) if isinstance(value, str) else tuple(value)


@dataclasses.dataclass(frozen=True)
class ImageView:
    """An image, uint8 `[size, size, 3]`.

    Attributes:
      name: str, the key of the array.
      size: int, side in pixels.
      augment: operations of `clip_jax.data.augment`, such as `("rrc(0.5, 1.0)", "flip")`. The default is CLIP's
        evaluation crop.
    """

    name: str = "image"
    size: int = 224
    augment: tuple[str, ...] = ("resize", "center_crop")

    def __post_init__(self):
        object.__setattr__(self, "augment", _as_tuple(self.augment))
        augment.parse(self.augment, self.size)  # raises UserError for a mistake

    @property
    def shape(self):
        return (self.size, self.size, 3)

    dtype = np.dtype(np.uint8)

    @property
    def is_random(self):
        """Whether some operation draws random numbers."""
        return any(augment.parse(self.augment, self.size).random)

    def __call__(self, record, rng, tokenizer=None):
        if record.get("image") is None:
            raise BadRecord("no image")
        return np.asarray(augment.parse(self.augment, self.size)(decode.open_image(record["image"]), rng))


@dataclasses.dataclass(frozen=True)
class TextView:
    """A caption of a record as token ids, int32 `[context]`.

    In training the caption is made in four steps:

    1. A template is drawn and filled in, or one of the record's captions is drawn.
    2. With probability `rewrite_prob` a rewrite replaces it.
    3. Words are deleted with probability `word_dropout`.
    4. `augment` changes its words or its token ids.

    In evaluation it is the first usable caption or template, with whole lists in order, and steps 2 to 4 are skipped.

    Attributes:
      name: str, the key of the array.
      context: int, length of the sequence in tokens, special tokens included.
      templates: strings with record fields in braces, such as `("{name}", "{name}: {tags}")`. One is drawn among those
        whose fields are all non-empty. A field that holds a list gives a random subset in random order, joined by
        commas. Without templates the record's `texts` are the captions.
      word_dropout: float in [0, 1], the probability that a word is deleted. One word always stays (random deletion,
        Wei & Zou 2019).
      augment: operations such as `("eda",)` or `("tokens(0.2)",)`; see `clip_jax.data.text_augment` and
        `clip_jax.data.token_augment`. Operations on the caption run before those on its ids.
      class_templates: templates for records with a label, instead of `templates` (UniCL, Yang et al. 2022).
        `{class_name}` is the name of the class without commas, or one of its names when it has several.
      rewrites: record fields with rewrites of the caption, each a str or a list of str (LaCLIP, Fan et al. 2023). One
        is drawn among all of them. A rewrite shorter than two words is replaced by the caption. Class names have no
        rewrites.
      rewrite_prob: float in [0, 1], or -1 to give each rewrite the probability of each caption: with M rewrites of one
        caption, a rewrite is used with probability M / (M + 1).
    """

    name: str = "text"
    context: int = 77
    templates: tuple[str, ...] = ()
    word_dropout: float = 0.0
    augment: tuple[str, ...] = ()
    class_templates: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    rewrite_prob: float = -1.0

    def __post_init__(self):
        for field in ("templates", "augment", "class_templates", "rewrites"):
            object.__setattr__(self, field, _as_tuple(getattr(self, field)))
        if not (self.rewrite_prob == -1 or 0 <= self.rewrite_prob <= 1):
            raise UserError(f"data.rewrite_prob={self.rewrite_prob}: must be between 0 and 1, or -1")
        _parse_augment(self.augment)  # raises UserError for a mistake
        for template in self.templates + self.class_templates:
            parse_template(template)

    @property
    def shape(self):
        return (self.context,)

    dtype = np.dtype(np.int32)

    @property
    def fields(self):
        """The record fields that the view names: `{field: what names it}`."""
        return dict.fromkeys(fields_of(self.templates), "a template") | dict.fromkeys(self.rewrites, "data.rewrites")

    def caption(self, record, rng):
        """Returns the caption before word dropout and augmentation, a str; raises BadRecord when none is usable."""
        return self._rewrite(record, rng) or self._own_caption(record, rng)

    def _rewrite(self, record, rng):
        """Returns a rewrite, or "" to use the record's own caption. Draws nothing when there is no choice."""
        if rng is None or not self.rewrite_prob or self._is_class(record):
            return ""
        rewrites = rewrites_of(record, self.rewrites)
        captions = 1 if self.templates else max(1, len(record.get("texts") or ()))
        prob = len(rewrites) / (len(rewrites) + captions) if self.rewrite_prob == -1 else self.rewrite_prob
        return usable_rewrite(pick(rewrites, rng)) if rewrites and rng.random() < prob else ""

    def _is_class(self, record):
        return bool(self.class_templates) and bool(label_tuple(record))

    def _own_caption(self, record, rng):
        if self._is_class(record):
            return fill_template(self.class_templates, record | {"class_name": class_name(record, rng)}, rng)
        if self.templates:
            return fill_template(self.templates, record, rng)
        return pick(usable_texts(record.get("texts"), error=record.get("caption_error", "empty caption")), rng)

    def __call__(self, record, rng, tokenizer):
        return self._encode(self._drop_words(self.caption(record, rng), rng), self.augment, rng, tokenizer)

    def _drop_words(self, caption, rng):
        if self.word_dropout and rng is not None:
            words = caption.split()
            kept = rng.random(len(words)) >= self.word_dropout
            kept[rng.integers(len(words))] = True
            caption = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
        return caption

    def _encode(self, caption, spec, rng, tokenizer):
        """Returns the ids of a caption after the operations of `spec`, int32 `[context]`."""
        on_caption, on_ids = _parse_augment(spec) if rng is not None else ((), ())
        for operation in on_caption:
            caption = operation(caption, rng)
        if not on_ids:
            return tokenizer([caption], self.context)[0]
        # The rest of a longer caption is cut off anyway, and a broken record may hold megabytes.
        ids = tokenizer.encode(caption[: 100 * self.context])
        for operation in on_ids:
            ids = operation(ids, rng, tokenizer)
        return token_augment.pack(ids, tokenizer, self.context)


@dataclasses.dataclass(frozen=True)
class TextVariants(TextView):
    """One caption in several augmentations, token ids int32 `[len(variants), context]`.

    Attributes:
      variants: one `augment` per row; () leaves the caption as it is. The view's own `augment` is not used.
    """

    variants: tuple[tuple[str, ...], ...] = ((), ("eda",))

    def __post_init__(self):
        super().__post_init__()
        for spec in self.variants:
            _parse_augment(spec)

    @property
    def shape(self):
        return (len(self.variants), self.context)

    def __call__(self, record, rng, tokenizer):
        caption = self._drop_words(self.caption(record, rng), rng)
        return np.stack([self._encode(caption, spec, rng, tokenizer) for spec in self.variants])


@dataclasses.dataclass(frozen=True)
class RewritesView(TextView):
    """A caption and its first `count` rewrites, token ids int32 `[1 + count, context]` (LaCLIP-MT, Fan et al. 2023).

    The caption replaces a missing rewrite. When a record has several captions, one that is not blank is drawn;
    `rewrites` then holds the rewrites of all of them, in equal numbers and in the captions' order. `rewrite_prob` has
    no effect.

    Attributes:
      count: int, number of rewrites.
    """

    count: int = 4

    @property
    def shape(self):
        return (1 + self.count, self.context)

    def __call__(self, record, rng, tokenizer):
        rewrites = [] if self._is_class(record) else rewrites_of(record, self.rewrites)
        captions = record.get("texts") or ()
        if not self.templates and len(captions) > 1:
            usable = [i for i, text in enumerate(captions) if usable_texts([text], strict=False)] or [0]
            number = usable[0 if rng is None else int(rng.random() * len(usable))]
            share, record = len(rewrites) // len(captions), record | {"texts": [captions[number]]}
            rewrites = rewrites[number * share :][:share]
        caption = self._own_caption(record, rng)
        used = [usable_rewrite(text) or caption for text in rewrites[: self.count]]
        texts = [caption, *used, *[caption] * (self.count - len(used))]
        return np.stack([self._encode(self._drop_words(text, rng), self.augment, rng, tokenizer) for text in texts])


@dataclasses.dataclass(frozen=True)
class OptionalTextView(TextView):
    """As `TextView`, with ids of -1 for a record without usable text."""

    def __call__(self, record, rng, tokenizer):
        try:
            return super().__call__(record, rng, tokenizer)
        except BadRecord:
            return np.full(self.shape, -1, self.dtype)


@dataclasses.dataclass(frozen=True)
class RenderView(TextView):
    """A caption drawn as an image, uint8 `[context, context, 1]`; `context` is its side in pixels (CLIPPO).

    The tokenizer is a `clip_jax.data.tokenizers.font.Font`. For a pair of sentences the second one is drawn. The single
    channel is repeated on the device, which saves two thirds of the memory and transfer.
    """

    context: int = 224

    @property
    def shape(self):
        return (self.context, self.context, 1)

    dtype = np.dtype(np.uint8)

    def __call__(self, record, rng, tokenizer):
        if "sentences" not in record:
            return super().__call__(record, rng, tokenizer)
        return tokenizer(record["sentences"][1:], self.context)[0]


@dataclasses.dataclass(frozen=True)
class ImageOrTextView(ImageView):
    """As `ImageView`; for a pair of sentences the first one, drawn as an image (CLIPPO).

    The tokenizer is a `clip_jax.data.tokenizers.font.Font`.
    """

    def __call__(self, record, rng, tokenizer=None):
        if "sentences" not in record:
            return super().__call__(record, rng)
        return np.broadcast_to(tokenizer(record["sentences"][:1], self.size)[0], self.shape)


PIXEL_FEATURES = 8 * 8 * 3  # features of a region that are its pixels


@dataclasses.dataclass(frozen=True)
class RegionView:
    """Regions of the whole image, float32 `[count, width]`: the features of each, then its box (PyramidCLIP).

    Boxes are x1, y1, x2, y2, clipped to the image and divided by its width and height. Rows of zeros stand for missing
    regions, in the record and in the array: an image may have fewer regions, or no field.

    Attributes:
      name: str, the key of the array.
      count: int, number of regions.
      width: int, features of a region plus 4 for its box.
      features: str, a record field `[n, width - 4]`, or "pixels" for the image's own pixels: 8 x 8 RGB values of each
        region, scaled to [-1, 1].
      boxes: str, a record field `[n, 4]`, boxes in pixels, the most important first.
    """

    name: str = "regions"
    count: int = 10
    width: int = 2052
    features: str = "regions"
    boxes: str = "boxes"

    dtype = np.dtype(np.float32)

    def __post_init__(self):
        if self.features == "pixels" and self.width != PIXEL_FEATURES + 4:
            needed = f"{PIXEL_FEATURES} features, and with their box {PIXEL_FEATURES + 4}"
            raise UserError(f"regions of pixels have {needed}, not {self.width}")

    @property
    def shape(self):
        return (self.count, self.width)

    @property
    def fields(self):
        """The record fields that the view names: `{field: what names it}`."""
        return dict.fromkeys({self.boxes, self.features} - {"pixels"}, f"the view {self.name!r}")

    def __call__(self, record, rng, tokenizer=None):
        """Raises BadRecord for a box outside of the image, and UserError for fields of another shape."""
        rows, given = np.zeros(self.shape, np.float32), _read_rows(record, self.boxes, 4)
        is_region = given[: self.count].any(1)
        if not is_region.any():
            return rows
        image = decode.open_image(record["image"])
        boxes = _clip_boxes(given, image.size)[: is_region.sum()]
        if self.features == "pixels":
            image = decode.flatten(decode.load(image))
            crops = [decode.resize(image, (8, 8), Image.Resampling.BOX, tuple(box)) for box in boxes.tolist()]
            features = np.stack([np.asarray(crop, np.float32).reshape(-1) for crop in crops]) / 127.5 - 1
        else:
            features = _read_rows(record, self.features, self.width - 4)[: self.count]
            if len(features) < len(is_region):
                raise BadRecord("fewer features than regions")
            features = features[: len(is_region)][is_region]
        rows[: len(boxes)] = np.concatenate([features, boxes / (image.size * 2)], axis=1)
        return rows


def read_boxes(record, field, size):
    """Returns the boxes of a record, float32 `[n, 4]`, without rows of zeros and clipped to the image.

    Args:
      record: dict.
      field: str, the record field with boxes x1, y1, x2, y2 in pixels.
      size: width and height of the image in pixels.

    Raises BadRecord for a box outside of the image, and UserError for a field of another shape.
    """
    return _clip_boxes(_read_rows(record, field, 4), size)


def _clip_boxes(rows, size):
    boxes = np.clip(rows[rows.any(1)], 0, np.array(size * 2, np.float32))
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise BadRecord("region outside of its image")
    return boxes


def _read_rows(record, field, width):
    try:
        values = np.asarray(record[field] if record.get(field) is not None else (), np.float32)
    except (TypeError, ValueError):
        raise UserError(f"regions: the field {field!r} does not hold lists of {width} numbers each") from None
    if values.size and (values.ndim != 2 or values.shape[1] != width):
        raise UserError(
            f"regions: the field {field!r} holds an array {list(values.shape)}, but [regions, {width}] is needed"
        )
    return values.reshape(-1, width)


# The operations of `TextView.augment`: `f(caption, rng, **arguments)` returns a caption, and
# `f(ids, rng, tokenizer, **arguments)` returns ids without special tokens.
_ON_CAPTION = {"eda": text_augment.eda}
_ON_IDS = {"tokens": token_augment.tokens}


@functools.lru_cache(maxsize=256)
def _parse_augment(spec):
    """Returns the operations on the caption and those on its ids; raises UserError."""
    on_caption, on_ids = [], []
    for text in spec:
        function, kwargs, _ = augment.bind(text, _ON_CAPTION | _ON_IDS, ("caption", "ids", "rng", "tokenizer"))
        operation = functools.partial(function, **kwargs)
        if function in _ON_IDS.values():
            on_ids.append(operation)
            continue
        try:
            operation("a dog", np.random.default_rng(0))
        except (TypeError, ValueError) as error:
            raise UserError(f"augment: {text!r}: {error}") from None
        on_caption.append(operation)
    return tuple(on_caption), tuple(on_ids)


def make_example(record, example_id, views, tokenizer, rng=None):
    """Returns the example of a record.

    Args:
      record: dict, see `clip_jax.data.records`.
      example_id: int, the index of the record in its source.
      views: list of views; they draw from `rng` in this order.
      tokenizer: a `clip_jax.data.tokenizers.TextInput`.
      rng: `np.random.Generator`, or None in evaluation.

    Returns:
      `{view.name: array}`, with an int64 scalar `example_id` and, where the record has them, int32 scalars `label`,
      `source_id` and `text_pair`. Several labels of one image are left out.

    Raises BadRecord when a view cannot use the record.
    """
    if sum(isinstance(view, ImageView) for view in views) > 1 and record.get("image") is not None:
        record = record | {"image": decode.load(decode.open_image(record["image"]))}  # decoded once for all views
    example = {view.name: view(record, rng, tokenizer) for view in views}
    example["example_id"] = np.int64(example_id)
    for key in ("label", "source_id", "text_pair"):
        if record.get(key) is not None and not isinstance(record[key], tuple):
            example[key] = np.int32(record[key])
    return example
