"""Class names and prompt templates of zero-shot classification.

A template contains one `{}` for the class name; CLIP_benchmark's `{c}` is the same. `templates.json` holds the named
sets: "clip_80" and "clip_7" (CLIP's ensembles for ImageNet), "simple", "emoji", and CLIP's sets for other data sets
under the data set's name ("cifar10", "food101", "pets", ...). `class_names.json` holds the 1,000 names for ImageNet in
the order of the WordNet ids.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable
from numbers import Integral

from etils import epath

from clip_jax.data.tokenizers.base import canonicalize
from clip_jax.errors import UserError, unknown

_FOLDER = epath.Path(__file__).parent


@functools.cache
def _data(file):
    return json.loads((_FOLDER / file).read_text())


def template_sets():
    """Returns the names that `load_templates` knows."""
    data = _data("templates.json")
    return [*data["templates"], *data["aliases"]]


def load_templates(spec):
    """Returns templates, a tuple of strings.

    Args:
      spec: the name of a set, the path of a text file with one template per line, a JSON file (`_json`), or a list of
        templates.

    Raises UserError for an unknown name, an empty file or list, and a template that is not text with exactly one `{}`.
    """
    if isinstance(spec, str):
        data = _data("templates.json")
        name = data["aliases"].get(spec, spec)
        if name in data["templates"]:
            return tuple(data["templates"][name])
        templates = _lines(
            spec, f"templates={spec!r} is neither a set ({', '.join(template_sets())}) nor a readable text file"
        )
    else:
        templates = _listed(spec, "templates", str)
    if not templates:
        raise UserError(f"templates={spec!r}: at least one is needed")
    templates = tuple(template.replace("{c}", "{}") for template in templates)
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"template {template!r}: exactly one {{}} is needed, for the class name")
    return templates


def load_class_names(spec):
    """Returns class names by label, a list of strings.

    Args:
      spec: "imagenet", the path of a text file with one name per line, a JSON file (`_json`), or a list of names; an
        integer is its digits. A text file may also hold pairs "class<TAB>name", which
        `clip_jax.evaluation.class_names` reads.

    Raises UserError for an unknown name, an unreadable file, an empty list, an empty name and names that are no text.
    """
    if isinstance(spec, str):
        known = _data("class_names.json")
        if spec in known:
            return list(known[spec])
        names = _lines(
            spec, f"class_names={spec!r} is neither a list ({', '.join(known)}) nor a readable text file", blank=True
        )
    else:
        names = [str(name) for name in _listed(spec, "class_names", str | Integral)]
    if not names:
        raise UserError("class_names: at least one is needed")
    if any(not name.strip() for name in names):
        raise UserError(f"class_names: the name of class {[not name.strip() for name in names].index(True)} is empty")
    return names


def _listed(values, what, kinds):
    """Returns values of some types as a list; raises UserError for another value, and for a set, which has no order."""
    if isinstance(values, bytes | dict | set | frozenset) or not isinstance(values, Iterable):
        raise UserError(f"{what}={values!r}: a list is needed, or a string that names a set or a file")
    values = list(values)
    for value in values:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{what}: {value!r} in the list is {type(value).__name__}, not text")
    return values


def _json(path, name):
    """Returns the list of a JSON file: the file's own, or that under a key, as in CLIP_benchmark's `{data set: [...]}`.

    Args:
      path: the file.
      name: the key; "" where the file holds a list, or an object with one key.
    """
    try:
        content = json.loads(epath.Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if isinstance(content, dict) and not name and len(content) == 1:
        (content,) = content.values()
    elif isinstance(content, dict) and name not in content:
        if name:
            raise unknown(f"{path}: no list", name, content)
        raise UserError(f"{path} holds several lists; write {path}:NAME with one of {', '.join(content)}")
    elif isinstance(content, dict):
        content = content[name]
    elif name:
        raise UserError(f"{path} holds no names of lists, so {path}:{name} names none; write {path}")
    if not isinstance(content, list):
        raise UserError(f"{path}: a list of texts is needed, not {type(content).__name__}")
    return _listed(content, path, str)


def _lines(path, error, blank=False):
    """Returns the stripped lines of a file; blank ones are left out, or with `blank` only those at its end."""
    if match := re.fullmatch(r"(.+\.json)(?::(.*))?", path):
        return _json(match[1], match[2] or "")
    try:
        text = epath.Path(path).read_text().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError):
        raise UserError(error) from None
    return [line.strip() for line in text.rstrip().splitlines() if blank or line.strip()]


def resolve_duplicates(names, duplicates="error", forms=None):
    """Returns class names and, for each of the given labels, its class.

    Args:
      names: class names by label.
      duplicates: how classes with equal names are treated. "error" raises UserError that lists them. "merge" makes them
        one class. "keep" leaves them apart; the lower label wins among equal scores, so the later class is never
        predicted. Published ImageNet figures are computed this way: its shipped names hold "missile" and "sunglasses"
        twice, and "error" keeps these two pairs where all names are ImageNet's.
      forms: what the model sees of each name, hashable. Names of equal form are equal. By default the names themselves.
    """
    if duplicates not in ("error", "merge", "keep"):
        raise UserError(f"duplicates={duplicates!r}; allowed: error, merge, keep")
    if duplicates == "keep":
        return list(names), list(range(len(names)))
    forms, by_form = forms or names, {}
    for name, form in zip(names, forms, strict=True):
        by_form.setdefault(form, []).append(name)
    repeated = [group for group in by_form.values() if len(group) > 1]
    if duplicates == "error" and not Counter(names) - Counter(_data("class_names.json")["imagenet"]):
        if repeated and all(len(set(group)) == 1 for group in repeated):
            return list(names), list(range(len(names)))
    if repeated and duplicates == "error":
        some = ", ".join(" = ".join(map(repr, dict.fromkeys(group))) for group in repeated[:5])
        some += f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise UserError(
            f"class_names: several classes have the name {some}, as the model reads it; rename them, or set duplicates "
            "to merge or keep"
        )
    index = {form: i for i, form in enumerate(by_form)}
    return [group[0] for group in by_form.values()], [index[form] for form in forms]


def class_prompts(class_names, templates, canonical=False):
    """Returns the prompts of all classes, `classes * templates` strings; those of the first class come first.

    Args:
      class_names: by label; one string counts as a list of one.
      templates: strings with one `{}` each, or one such string.
      canonical: bring templates and names to SigLIP's canonical form first.
    """
    class_names = [class_names] if isinstance(class_names, str) else class_names
    templates = [templates] if isinstance(templates, str) else templates
    if canonical:
        templates = [canonicalize(template, "{}") for template in templates]
        class_names = [canonicalize(name, ",") for name in class_names]
    return [template.replace("{}", name) for name in class_names for template in templates]
