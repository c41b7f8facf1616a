"""The caption of a record: templates over its fields, rewrites, and the choice among usable texts.

In the functions below `rng` is a `np.random.Generator` in training and None in evaluation, where nothing is random.
"""

import functools
import string

from clip_jax.data.records import BadRecord, plain, read_texts
from clip_jax.errors import UserError


@functools.lru_cache(maxsize=1024)
def parse_template(template):
    """Returns a template as pairs (literal text, field after it or None); raises UserError."""
    if not isinstance(template, str):
        raise UserError(f"template {template!r} is {type(template).__name__}, not text")
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
def fields_of(templates):
    """Returns the record fields that a tuple of templates names, a frozenset."""
    return frozenset(field for template in templates for _, field in parse_template(template) if field)


def fill_template(templates, record, rng):
    """Returns a caption from one of the templates whose fields the record has, drawn at random; raises BadRecord.

    A field that holds a list gives a random subset in random order, joined by commas.

    Args:
      templates: tuple of str.
      record: dict.
      rng: a generator, or None for the first such template and whole lists.
    """
    values = {field: usable_texts(record.get(field), strict=False) for field in fields_of(templates)}
    filled = [t for t in map(parse_template, templates) if all(values[field] for _, field in t if field)]
    if not filled and not all(read_texts(record.get(field))[1] for field in values):
        raise BadRecord("caption is not text")
    parts = [literal + (_join(values[field], rng) if field else "") for literal, field in pick(filled, rng)]
    return usable_texts(["".join(parts)])[0]


def class_name(record, rng):
    """Returns the class name as UniCL writes it; raises BadRecord when the class has no name."""
    if not (names := usable_texts(record.get("class_name"), strict=False)):
        raise BadRecord("no class name")
    return " ".join(pick(names, rng).replace(",", "").replace("+", " ").split())


def rewrites_of(record, fields, strict=True):
    """Returns all texts of some fields of a record in order; a field is a str, a list of str, or missing.

    A missing text in a list is "", so that the others keep their places. If `strict`, a value that is not text raises
    BadRecord; otherwise it is "" as well.
    """
    found = []
    for field in fields:
        value = plain(record.get(field))
        for item in value if isinstance(value, list) else [value]:
            texts, is_text = read_texts([item])
            if strict and not is_text:
                raise BadRecord("rewrite is not text")
            found += texts if texts or not isinstance(value, list) else [""]
    return found


def usable_rewrite(text):
    """Returns the text if it has at least two words and is UTF-8, else ""."""
    return text if len(text.split()) >= 2 and usable_texts([text], strict=False) else ""


def usable_texts(value, strict=True, error="empty caption"):
    """Returns the texts of a caption field that are UTF-8 and not blank.

    Args:
      value: a str or a list of str; see `clip_jax.data.records.read_texts`.
      strict: whether a field without such a text raises BadRecord.
      error: the reason when nothing else is wrong.
    """
    (texts, is_text), usable = read_texts(value), []
    reason = error if is_text else "caption is not text"
    for text in texts:
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


def pick(choices, rng):
    """Returns a random choice, the first one without `rng`; raises BadRecord when there is none."""
    if not choices:
        raise BadRecord("empty caption")
    return choices[0 if rng is None or len(choices) == 1 else int(rng.random() * len(choices))]


def _join(values, rng):
    """Returns a random subset of the values in random order, joined by commas; all of them without `rng`."""
    if rng is not None and len(values) > 1:
        values = rng.permutation(values)[: 1 + int(rng.random() * len(values))].tolist()
    return ", ".join(values)
