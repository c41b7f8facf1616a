"""Class names given by a user, matched with the classes that a source names.

If the source names its classes, given names are matched by name, never by position. A name matches a class when both
are equal, else when their canonical names are (`clip_jax.data.class_names`), else when they differ in punctuation only,
else when one of them is among the other's comma-separated synonyms ("tench, Tinca tinca"). Each match must be the only
one of its kind.

`"imagenet"`, the names of `class_names.json`, suits all of ImageNet's classes and any part of them. A source names them
all in one of three ways: by WordNet id, by number from 0 to 999 in the order of the ids, or by name. A name may also be
one of the class's words in WordNet (`imagenet_ids.json`).
"""

import difflib
import functools
import json
import re
from collections import Counter

from etils import epath

from clip_jax.data.class_names import canonical_name
from clip_jax.data.records import LABEL_TEXT, check_labels
from clip_jax.errors import UserError
from clip_jax.evaluation.prompts import load_class_names

_LISTED = 5  # names that a message lists


@functools.cache
def _imagenet_words():
    """Returns `{WordNet id: its words in WordNet, separated by commas}` of ImageNet's 1,000 classes."""
    return json.loads((epath.Path(__file__).parent / "imagenet_ids.json").read_text())


@functools.cache
def imagenet_names():
    """Returns `{WordNet id: name}` of ImageNet's 1,000 classes."""
    return dict(zip(_imagenet_words(), load_class_names("imagenet"), strict=True))


def names_of(source, given, task):
    """Returns the names of a source's classes as prompts use them, by label, a list of strings.

    Args:
      source: a data source.
      given: a dict `{class of the source: name}`; or what `prompts.load_class_names` takes, a file with lines
        "class<TAB>name" included; or None for the source's own names, with "_" read as a space.
      task: the task's name, for messages.

    Raises UserError when the source names no classes and none are given, when the given names do not match the
    source's classes one to one, and for names that are not UTF-8.
    """
    check_labels(source)
    names = _names_of(source, given, task)
    if unreadable := [name for name in names if name.encode("utf-8", "replace").decode() != name]:
        raise UserError(f"{task}: class names of {source.name} are not UTF-8: {listed(unreadable)}")
    return names


def _names_of(source, given, task):
    classes = source.class_names
    if given is None:
        if classes is None:
            raise UserError(f"{task}: {source.name} does not name its classes; give class_names")
        return _own_names(source, task)
    given = _pairs(given) or load_class_names(given)
    if classes is None:
        return _by_number(source, given, task) if isinstance(given, dict) else given
    if given == list(classes):
        return given
    if given == list(imagenet_names().values()):
        return _imagenet_of(source, task)
    if isinstance(given, list) and len(given) == len(imagenet_names()) and all(map(_is_id, classes)):
        return _imagenet_of(source, task, given)  # the 1,000 names in another language or wording
    pairs = given if isinstance(given, dict) else match_classes(classes, given) or _numbered(classes, given)
    left_out = [name for name in classes if name not in pairs]
    unused = sorted(set(pairs) - set(classes)) if pairs is given else _unused(given, pairs)
    if left_out or unused:
        raise _mismatch(source, given, left_out, unused, task)
    return [pairs[name] for name in classes]


def label_hint(record):
    """Returns the end of a message for a record without a label: which of its fields may name its class, or ""."""
    names = ("label", LABEL_TEXT, "cls", "class_name", "class", "category", "target", "breed", "species")
    found = next((name for name in names if isinstance(record.get(name), str) and record[name].strip()), "")
    field = "label" if found == LABEL_TEXT else found
    return f"; its field {field!r} holds text: set label={field!r}" if found else ""


def match_classes(names, among):
    """Returns `{name: the class in `among` of that name}` for the names that match exactly one class."""
    if list(names) == list(among) and len(set(names)) == len(names):
        return dict(zip(names, among, strict=True))
    found = {}
    for forms in (_exact, _canonical, _bare_form, _synonyms):
        taken = set(found.values())
        ours = _by_form([name for name in names if name not in found], forms)
        theirs = _by_form([name for name in among if name not in taken], forms)
        pairs = {
            (group[0], theirs[form][0]) for form, group in ours.items() if len(group) == len(theirs.get(form, ())) == 1
        }
        counts = Counter(name for pair in pairs for name in (("ours", pair[0]), ("theirs", pair[1])))
        found |= {name: other for name, other in pairs if counts["ours", name] == counts["theirs", other] == 1}
    return found


def listed(names):
    """Returns the first few names, quoted, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name) for name in names[:_LISTED]) + more


def _own_names(source, task):
    classes = source.class_names
    if all(map(_is_id, classes)):
        return _imagenet_of(source, task)
    if len(classes) > 10 and all(name.isdecimal() for name in classes):  # up to 10 they may be digits, as in MNIST
        raise UserError(
            f"{task}: the classes of {source.name} are {len(classes)} numbers, such as {classes[0]!r}, which are no "
            "names; set classes='imagenet' for ImageNet's, or a file or list with a name for each number"
        )
    return [name.replace("_", " ") for name in classes]


def _is_id(name):
    return re.fullmatch(r"n\d{8}", name) is not None


def _imagenet_of(source, task, given=None):
    """Returns ImageNet's names of a source's classes; raises UserError that lists the classes without one.

    `given` are other names for the 1,000 classes, in the order of the ids.
    """
    classes, names = list(source.class_names), imagenet_names()
    names = dict(zip(names, given, strict=True)) if given else names
    ids = _imagenet_ids(classes)
    if unknown := [name for name, wnid in zip(classes, ids, strict=True) if wnid is None]:
        what, hint = "names that are none of", _near(unknown[0], names.values())
        if all(map(_is_id, unknown)):
            what, hint = "WordNet ids outside of", ""
        elif any(map(_is_id, classes)):
            hint = "; name all classes in one way: by WordNet id, by number or by name"
        raise UserError(
            f"{task}: the classes of {source.name} include {what} ImageNet's 1,000 classes: {listed(unknown)}{hint}; "
            "leave these classes out, or give classes as pairs, {class: name}"
        )
    return [names[wnid] for wnid in ids]


def _near(name, known):
    """Returns the end of a message with the known name that is nearly equal; empty where there is none."""
    found = difflib.get_close_matches(name.replace("_", " "), list(known), 1, 0.75)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _imagenet_ids(classes):
    """Returns the WordNet id of each class, None for one that is not ImageNet's."""
    words = _imagenet_words()
    order = list(words)
    if any(map(_is_id, classes)):
        return [name if name in words else None for name in classes]
    if all(re.fullmatch(r"\d{1,4}", name) for name in classes):
        numbers = list(map(int, classes))
        return [order[i] if i < len(order) and numbers.count(i) == 1 else None for i in numbers]
    by_name = _unique(imagenet_names())
    found = {name: by_name[known] for name, known in match_classes(classes, list(by_name)).items()}
    by_words = _unique({wnid: text for wnid, text in words.items() if wnid not in found.values()})
    left = [name for name in classes if name not in found]
    found |= {name: by_words[text] for name, text in match_classes(left, list(by_words)).items()}
    ids = [found.get(name) for name in classes]
    # The list of all classes in their order, in which WordNet's name "crane" occurs twice.
    if len(ids) == len(order) and all(wnid in (None, known) for wnid, known in zip(ids, order, strict=True)):
        return order if ids.count(None) <= 10 else ids
    return ids


def _unique(texts):
    """Returns `{text: key}` of a dict, without the texts that several keys have."""
    counts = Counter(texts.values())
    return {text: key for key, text in texts.items() if counts[text] == 1}


def _numbered(classes, given):
    """Returns `{class: given name}` where the classes are the numbers of the names, 0 to n - 1; else {}."""
    if not all(re.fullmatch(r"\d+", name) for name in classes):
        return {}
    numbers = {name: int(name) for name in classes}
    return {n: given[i] for n, i in numbers.items()} if sorted(numbers.values()) == list(range(len(given))) else {}


def _pairs(given):
    """Returns `{class: name}` of a dict or of a file with lines "class<TAB>name"; None for any other form of names."""
    if isinstance(given, dict):
        pairs = {str(key): load_class_names([name])[0] for key, name in given.items()}
        if len(pairs) < len(given):
            raise UserError(f"class_names={given!r}: several names for one class")
        return pairs
    if not isinstance(given, str) or given == "imagenet":
        return None
    lines = load_class_names(given)
    tabs = ["\t" in line for line in lines]
    if not any(tabs):
        return None
    if not all(tabs):
        line = lines[tabs.index(False)]
        raise UserError(
            f"class_names={given!r}: the line {line!r} has no tab, but other lines are pairs class<TAB>name"
        )
    pairs = [[part.strip() for part in line.split("\t", 1)] for line in lines]
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise UserError(f"class_names={given!r}: several names for {listed(repeated)}")
    return dict(pairs)


def _by_number(source, pairs, task):
    """Returns the names of numbered classes."""
    labels = [str(label) for label in range(len(pairs))]
    if set(pairs) != set(labels):
        raise UserError(
            f"{task}: {source.name} does not name its classes, so class_names must be pairs of the labels "
            f"0..{len(pairs) - 1} and names; got {listed(pairs)}"
        )
    return [pairs[label] for label in labels]


def _unused(given, pairs):
    """Returns the given names that no class has, each as often as it is left over."""
    return list((Counter(given) - Counter(pairs.values())).elements())


def _mismatch(source, given, left_out, unused, task):
    names = given.values() if isinstance(given, dict) else given
    parts = [
        f"{task}: class_names and the classes of {source.name} differ",
        f"{len(given)} names are given ({listed(names)}) for {len(source.class_names)} classes "
        f"({listed(source.class_names)})",
    ]
    if left_out:
        parts.append(f"without a name: {listed(left_out)}")
    if unused:
        parts.append(f"without a class: {listed(dict.fromkeys(unused))}")
    parts.append("give pairs: a dict {class: name}, or a file with lines class<TAB>name")
    return UserError("; ".join(parts))


def _by_form(names, forms):
    """Returns `{form: names that have it}`."""
    found = {}
    for name in names:
        for form in forms(name):
            found.setdefault(form, []).append(name)
    return found


def _bare(name):
    return re.sub(r"\W", "", canonical_name(name)) or canonical_name(name)


def _exact(name):
    return {name}


def _canonical(name):
    return {canonical_name(name)}


def _bare_form(name):
    return {_bare(name)}


def _synonyms(name):
    return {canonical_name(part) for part in (name, *name.split(",")) if part.strip()}
