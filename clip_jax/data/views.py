"""Views: what a method asks of the data for each example, and the function that makes an example out of a record."""

import dataclasses
import functools
import string
from collections.abc import Sequence

import numpy as np

from clip_jax.data import augment, decode, text_augment, token_augment
from clip_jax.data.sources import BadRecord, Record
from clip_jax.errors import UserError

#: Operations of `TextView.augment`: on the caption, `f(caption, rng, **arguments)`, and on its ids, `f(ids, rng, tokenizer, **arguments)`;
#: these are without start, end and padding.
_ON_CAPTION = {"eda": text_augment.eda}
_ON_IDS = {"tokens": token_augment.tokens}


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
    def shape(self) -> tuple[int, ...]:
        """Of the array that the view gives; uint8 (`dtype`)."""
        return (self.size, self.size, 3)

    dtype = np.dtype(np.uint8)

    @property
    def is_random(self) -> bool:
        return any(augment.parse(self.augment, self.size).random)

    def __call__(self, record: Record, rng: np.random.Generator | None, tokenizer=None) -> np.ndarray:
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
    """

    name: str = "text"
    context: int = 77
    templates: tuple[str, ...] = ()
    word_dropout: float = 0.0
    augment: tuple[str, ...] = ()
    class_templates: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("templates", "augment", "class_templates"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        _parse_augment(self.augment)  # fails early
        for template in self.templates + self.class_templates:
            _parse_template(template)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that the view gives; int32 (`dtype`)."""
        return (self.context,)

    dtype = np.dtype(np.int32)

    @property
    def fields(self) -> frozenset[str]:
        """The record fields that the templates name."""
        return _fields(self.templates)

    def caption(self, record: Record, rng: np.random.Generator | None) -> str:
        """The caption as text; raises BadRecord when no usable one is there."""
        templates = self.templates
        if self.class_templates and record.get("label", -1) >= 0:
            templates, record = self.class_templates, record | {"class_name": _class_name(record, rng)}
        if not templates:
            return _pick(_usable(record.get("texts") or ()), rng)
        values = {field: _usable(_as_texts(record.get(field)), strict=False) for field in _fields(templates)}
        templates = [t for t in map(_parse_template, templates) if all(values[field] for _, field in t if field)]
        parts = [literal + (_join(values[field], rng) if field else "") for literal, field in _pick(templates, rng)]
        return _usable(["".join(parts)])[0]

    def __call__(self, record: Record, rng: np.random.Generator | None, tokenizer) -> np.ndarray:
        return self._augmented(self._words(record, rng), self.augment, rng, tokenizer)

    def _words(self, record, rng) -> str:
        """The caption after word dropout."""
        caption = self.caption(record, rng)
        if self.word_dropout and rng is not None:
            words = caption.split()
            kept = rng.random(len(words)) >= self.word_dropout
            kept[rng.integers(len(words))] = True
            caption = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
        return caption

    def _augmented(self, caption: str, spec: tuple[str, ...], rng, tokenizer) -> np.ndarray:
        on_caption, on_ids = _parse_augment(spec) if rng is not None else ((), ())
        for operation in on_caption:
            caption = operation(caption, rng)
        if not on_ids:
            return tokenizer([caption], self.context)[0]
        ids = tokenizer.encode(caption[: 100 * self.context])  # more cannot matter, and a broken record may have megabytes
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
    def shape(self) -> tuple[int, ...]:
        return (len(self.variants), self.context)

    def __call__(self, record: Record, rng: np.random.Generator | None, tokenizer) -> np.ndarray:
        caption = self._words(record, rng)
        return np.stack([self._augmented(caption, spec, rng, tokenizer) for spec in self.variants])


@dataclasses.dataclass(frozen=True)
class RenderView(TextView):
    """A caption drawn as a picture, uint8 [context, context, 1]: `context` is in pixels, the tokenizer a `render.Font`.

    Of a pair of sentences (`sources.SentencePairSource`) it is the second one. One channel, which the device repeats: a third of the memory
    and of the transfer of three equal ones.
    """

    context: int = 224

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.context, self.context, 1)

    dtype = np.dtype(np.uint8)

    def __call__(self, record: Record, rng: np.random.Generator | None, tokenizer) -> np.ndarray:
        if "sentences" not in record:
            return super().__call__(record, rng, tokenizer)
        return tokenizer(record["sentences"][1:], self.context)[0]


@dataclasses.dataclass(frozen=True)
class ImageOrTextView(ImageView):
    """As `ImageView`; of a pair of sentences the first one, drawn by the tokenizer, a `render.Font`."""

    def __call__(self, record: Record, rng: np.random.Generator | None, tokenizer=None) -> np.ndarray:
        if "sentences" not in record:
            return super().__call__(record, rng)
        return np.broadcast_to(tokenizer(record["sentences"][:1], self.size)[0], self.shape)


@functools.lru_cache(maxsize=256)
def _parse_augment(spec: tuple[str, ...]) -> tuple[tuple, tuple]:
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
def _parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
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
def _fields(templates: tuple[str, ...]) -> frozenset[str]:
    return frozenset(field for template in templates for _, field in _parse_template(template) if field)


def _class_name(record: Record, rng: np.random.Generator | None) -> str:
    """As UniCL writes it; raises BadRecord when the class has no name."""
    if not (names := _usable(_as_texts(record.get("class_name")), strict=False)):
        raise BadRecord("no class name")
    return " ".join(_pick(names, rng).replace(",", "").replace("+", " ").split())


def _as_texts(value) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else [] if value is None else [str(value)]


def _usable(texts: Sequence[str], strict: bool = True) -> list[str]:
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


def _pick(choices: Sequence, rng: np.random.Generator | None):
    if not choices:
        raise BadRecord("empty caption")
    return choices[0 if rng is None or len(choices) == 1 else int(rng.random() * len(choices))]


def _join(values: list[str], rng: np.random.Generator | None) -> str:
    if rng is not None and len(values) > 1:
        values = rng.permutation(values)[: 1 + int(rng.random() * len(values))].tolist()
    return ", ".join(values)


def make_example(
    record: Record, example_id: int, views: Sequence[ImageView | TextView], tokenizer, rng: np.random.Generator | None = None
) -> dict[str, np.ndarray]:
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
