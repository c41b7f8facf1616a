"""Views: what a method asks of the data for each example, and the function that makes an example out of a record."""

import dataclasses
import functools
import string

import numpy as np
from PIL import Image

from clip_jax.data import augment, decode, text_augment, token_augment
from clip_jax.data.records import BadRecord
from clip_jax.errors import UserError

#: Operations of `TextView.augment`: on the caption, `f(caption, rng, **arguments)`, and on its ids, `f(ids, rng, tokenizer, **arguments)`;
#: these are without start, end and padding.
_ON_CAPTION = {"eda": text_augment.eda}
_ON_IDS = {"tokens": token_augment.tokens}
PIXEL_FEATURES = 8 * 8 * 3  # of a region


@dataclasses.dataclass(frozen=True)
class ImageView:
    """An image as uint8 [size,size,3]; `augment` is in the language of `augment.py`. The default is CLIP's evaluation crop."""

    name: str = "image"
    size: int = 224
    augment: tuple[str, ...] = ("resize", "center_crop")

    def __post_init__(self):
        object.__setattr__(self, "augment", tuple(self.augment))  # configs carry lists
        augment.parse(self.augment, self.size)  # fails early

    @property
    def shape(self):
        """Of the array that the view gives; uint8 (`dtype`)."""
        return (self.size, self.size, 3)

    dtype = np.dtype(np.uint8)

    @property
    def is_random(self):
        return any(augment.parse(self.augment, self.size).random)

    def __call__(self, record, rng, tokenizer=None):
        if record.get("image") is None:
            raise BadRecord("no image")
        return np.asarray(augment.parse(self.augment, self.size)(decode.open_image(record["image"]), rng))


@dataclasses.dataclass(frozen=True)
class TextView:
    """Token ids int32 [context] of one caption.

    Without templates it is one of the record's captions, drawn anew each epoch. Templates are strings with fields of the record in
    braces, such as ("{name}", "{name}: {tags}"): one is drawn among those whose fields are all filled, and of a field that is a list a
    random subset in random order, joined by commas. In evaluation (rng None) it is the first usable one, lists whole and in order.
    In training each word is left out with the chance `word_dropout`, but never all of them (random deletion, Wei & Zou 2019), and then
    `augment` changes the caption or its ids: names of operations, such as ("eda",), of which those on the caption go first.
    Records with a label have `class_templates`, if there are any, in the place of `templates`: {class_name} is the class's name, without
    commas, or one of its names.
    In training the caption may give way to a rewrite of it (LaCLIP: Fan et al. 2023): `rewrites` names fields of the record, each a text
    or a list of them, of which one is drawn with the chance `rewrite_prob`; with -1 each is as likely as each of the record's captions,
    M of M + 1 times. Of a rewrite that was drawn and has fewer than two words the caption takes the place. Class names have no rewrites.
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
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not (self.rewrite_prob == -1 or 0 <= self.rewrite_prob <= 1):
            raise UserError(f"data.rewrite_prob={self.rewrite_prob}: must be between 0 and 1, or -1")
        _parse_augment(self.augment)  # fails early
        for template in self.templates + self.class_templates:
            _parse_template(template)

    @property
    def shape(self):
        """Of the array that the view gives; int32 (`dtype`)."""
        return (self.context,)

    dtype = np.dtype(np.int32)

    @property
    def fields(self):
        """The record fields that are read by their name, and what names them."""
        return dict.fromkeys(_fields(self.templates), "a template") | dict.fromkeys(self.rewrites, "data.rewrites")

    def caption(self, record, rng):
        """The caption as text; raises BadRecord when no usable one is there."""
        return self._rewrite(record, rng) or self._own_caption(record, rng)

    def _rewrite(self, record, rng):
        """A rewrite, or an empty text: the record's own caption is wanted. Nothing is drawn where there is no choice."""
        if rng is None or not self.rewrite_prob or self._is_class(record):
            return ""
        pool = rewrites_of(record, self.rewrites)
        own = 1 if self.templates else max(1, len(record.get("texts") or ()))
        chance = len(pool) / (len(pool) + own) if self.rewrite_prob == -1 else self.rewrite_prob
        return usable_rewrite(_pick(pool, rng)) if pool and rng.random() < chance else ""

    def _is_class(self, record):
        return bool(self.class_templates) and record.get("label", -1) >= 0

    def _own_caption(self, record, rng):
        templates = self.templates
        if self._is_class(record):
            templates, record = self.class_templates, record | {"class_name": _class_name(record, rng)}
        if not templates:
            return _pick(_usable(record.get("texts") or ()), rng)
        values = {field: _usable(_as_texts(record.get(field)), strict=False) for field in _fields(templates)}
        templates = [t for t in map(_parse_template, templates) if all(values[field] for _, field in t if field)]
        parts = [literal + (_join(values[field], rng) if field else "") for literal, field in _pick(templates, rng)]
        return _usable(["".join(parts)])[0]

    def __call__(self, record, rng, tokenizer):
        return self._augmented(self._words(record, rng), self.augment, rng, tokenizer)

    def _words(self, record, rng):
        """The caption after word dropout."""
        return self._dropped(self.caption(record, rng), rng)

    def _dropped(self, caption, rng):
        if self.word_dropout and rng is not None:
            words = caption.split()
            kept = rng.random(len(words)) >= self.word_dropout
            kept[rng.integers(len(words))] = True
            caption = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
        return caption

    def _augmented(self, caption, spec, rng, tokenizer):
        on_caption, on_ids = _parse_augment(spec) if rng is not None else ((), ())
        for operation in on_caption:
            caption = operation(caption, rng)
        if not on_ids:
            return tokenizer([caption], self.context)[0]
        ids = tokenizer.encode(
            caption[: 100 * self.context]
        )  # more cannot matter, and a broken record may have megabytes
        for operation in on_ids:
            ids = operation(ids, rng, tokenizer)
        return token_augment.pack(ids, tokenizer, self.context)


@dataclasses.dataclass(frozen=True)
class TextVariants(TextView):
    """One caption in several forms, token ids int32 [len(variants), context]: an augmentation for each, () for the caption as it is."""

    variants: tuple[tuple[str, ...], ...] = ((), ("eda",))

    def __post_init__(self):
        super().__post_init__()
        for spec in self.variants:
            _parse_augment(spec)

    @property
    def shape(self):
        return (len(self.variants), self.context)

    def __call__(self, record, rng, tokenizer):
        caption = self._words(record, rng)
        return np.stack([self._augmented(caption, spec, rng, tokenizer) for spec in self.variants])


@dataclasses.dataclass(frozen=True)
class RewritesView(TextView):
    """A caption and its first `count` rewrites, token ids int32 [1 + count, context] (LaCLIP-MT); the caption where one is missing.

    Of a record with several captions one is drawn, and `rewrites` holds those of all, one caption's after the other's. All are there at
    each visit: `rewrite_prob` plays no part.
    """

    count: int = 4

    @property
    def shape(self):
        return (1 + self.count, self.context)

    def __call__(self, record, rng, tokenizer):
        pool = [] if self._is_class(record) else rewrites_of(record, self.rewrites)
        captions = record.get("texts") or ()
        if not self.templates and len(captions) > 1:
            number = 0 if rng is None else int(rng.random() * len(captions))
            share, record = len(pool) // len(captions), record | {"texts": [captions[number]]}
            pool = pool[number * share :][:share]
        caption = self._own_caption(record, rng)
        found = [usable_rewrite(text) or caption for text in pool[: self.count]]
        texts = [caption, *found, *[caption] * (self.count - len(found))]
        return np.stack([self._augmented(self._dropped(text, rng), self.augment, rng, tokenizer) for text in texts])


@dataclasses.dataclass(frozen=True)
class OptionalTextView(TextView):
    """As `TextView`; ids of -1 where the record has no such text."""

    def __call__(self, record, rng, tokenizer):
        try:
            return super().__call__(record, rng, tokenizer)
        except BadRecord:
            return np.full(self.shape, -1, self.dtype)


@dataclasses.dataclass(frozen=True)
class RegionView:
    """Regions of the whole picture, float32 [count, width]: the features of each, then its box (PyramidCLIP).

    The record's field `boxes` has x1, y1, x2, y2 in pixels, [n, 4], the most important first; they are given as shares of the picture's
    width and height, cut at its edges. Its field `features` has [n, width - 4] numbers, or it is "pixels": the picture's own, 8 x 8 of
    each region, from -1 to 1. Rows of zeros are none, in the record as in what is given: a picture may have few regions, or no field.
    """

    name: str = "regions"
    count: int = 10
    width: int = 2052
    features: str = "regions"
    boxes: str = "boxes"

    dtype = np.dtype(np.float32)

    def __post_init__(self):
        if self.features == "pixels" and self.width != PIXEL_FEATURES + 4:
            raise UserError(
                f"regions of pixels have {PIXEL_FEATURES} features, and with their box {PIXEL_FEATURES + 4}, not {self.width}"
            )

    @property
    def shape(self):
        return (self.count, self.width)

    @property
    def fields(self):
        """As of `TextView`."""
        return dict.fromkeys({self.boxes, self.features} - {"pixels"}, f"the view {self.name!r}")

    def __call__(self, record, rng, tokenizer=None):
        """Raises BadRecord for a box that is nowhere in the picture, and UserError for arrays of another shape."""
        rows, given = np.zeros(self.shape, np.float32), _read_rows(record, self.boxes, 4)
        real = given[: self.count].any(1)
        if not real.any():
            return rows
        image = decode.open_image(record["image"])
        boxes = _cut_boxes(given, image.size)[: real.sum()]
        if self.features == "pixels":
            image = decode.flatten(decode.load(image))
            crops = [image.resize((8, 8), Image.Resampling.BOX, tuple(box)) for box in boxes.tolist()]
            features = np.stack([np.asarray(crop, np.float32).reshape(-1) for crop in crops]) / 127.5 - 1
        else:
            features = _read_rows(record, self.features, self.width - 4)[: self.count]
            if len(features) < len(real):
                raise BadRecord("fewer features than regions")
            features = features[: len(real)][real]
        rows[: len(boxes)] = np.concatenate([features, boxes / (image.size * 2)], axis=1)
        return rows


def read_boxes(record, field, size):
    """The boxes of a record, float32 [n, 4], without rows of zeros, cut at the edges of a picture of `size`, width and height.

    Raises BadRecord for one of which nothing is left, and UserError for an array of another shape.
    """
    return _cut_boxes(_read_rows(record, field, 4), size)


def _cut_boxes(rows, size):
    boxes = np.clip(rows[rows.any(1)], 0, np.array(size * 2, np.float32))
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise BadRecord("region outside of its picture")
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


@dataclasses.dataclass(frozen=True)
class RenderView(TextView):
    """A caption drawn as a picture, uint8 [context, context, 1]: `context` is in pixels, the tokenizer a `render.Font`.

    Of a pair of sentences (`sources.SentencePairSource`) it is the second one. One channel, which the device repeats: a third of the memory
    and of the transfer of three equal ones.
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
    """As `ImageView`; of a pair of sentences the first one, drawn by the tokenizer, a `render.Font`."""

    def __call__(self, record, rng, tokenizer=None):
        if "sentences" not in record:
            return super().__call__(record, rng)
        return np.broadcast_to(tokenizer(record["sentences"][:1], self.size)[0], self.shape)


@functools.lru_cache(maxsize=256)
def _parse_augment(spec):
    """The operations on the caption and those on its ids; raises UserError."""
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


@functools.lru_cache(maxsize=1024)
def _parse_template(template):
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}") from None
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion or "." in field or "[" in field):
            raise UserError(f"template {template!r}: fields are written {{name}}, with nothing after the name")
    if not any(field for _, field, _, _ in parts):
        raise UserError(f"template {template!r} names no field; write one in braces, such as {{name}}")
    return tuple((literal, field) for literal, field, _, _ in parts)


@functools.lru_cache(maxsize=1024)
def _fields(templates):
    return frozenset(field for template in templates for _, field in _parse_template(template) if field)


def _class_name(record, rng):
    """As UniCL writes it; raises BadRecord when the class has no name."""
    if not (names := _usable(_as_texts(record.get("class_name")), strict=False)):
        raise BadRecord("no class name")
    return " ".join(_pick(names, rng).replace(",", "").replace("+", " ").split())


def rewrites_of(record, fields):
    """All texts of some fields of a record, in order; a field is a text or a list of texts, or it is missing."""
    return [text for field in fields for text in _as_texts(record.get(field))]


def usable_rewrite(text):
    """The text if it has two words or more and is UTF-8, otherwise an empty one."""
    return text if len(text.split()) >= 2 and _usable([text], strict=False) else ""


def _as_texts(value):
    return [str(v) for v in value] if isinstance(value, list | tuple) else [] if value is None else [str(value)]


def _usable(texts, strict=True):
    """The texts that hold something and are UTF-8; raises BadRecord when there is none and `strict`."""
    reason, usable = "empty caption", []
    for text in texts:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                reason = "caption is not UTF-8"
                continue
        if text.strip():
            usable.append(text)
    if strict and not usable:
        raise BadRecord(reason)
    return usable


def _pick(choices, rng):
    if not choices:
        raise BadRecord("empty caption")
    return choices[0 if rng is None or len(choices) == 1 else int(rng.random() * len(choices))]


def _join(values, rng):
    if rng is not None and len(values) > 1:
        values = rng.permutation(values)[: 1 + int(rng.random() * len(values))].tolist()
    return ", ".join(values)


def make_example(record, example_id, views, tokenizer, rng=None):
    """One example: {view.name: array} and int32 scalars `example_id` and, where the record has them, `label`, `source_id`, `text_pair`.

    The views draw from `rng` in their order; None means evaluation. Raises BadRecord when a view cannot use the record.
    """
    if sum(isinstance(view, ImageView) for view in views) > 1 and record.get("image") is not None:
        record = record | {"image": decode.load(decode.open_image(record["image"]))}  # decode once for all
    example = {view.name: view(record, rng, tokenizer) for view in views}
    example["example_id"] = np.int32(example_id)
    for key in ("label", "source_id", "text_pair"):
        if key in record:
            example[key] = np.int32(record[key])
    return example
