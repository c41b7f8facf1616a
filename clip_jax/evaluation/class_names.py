"""Class names given by a user, matched with the classes that a source names.

If the source names its classes, given names are matched by name, never by position. A name matches a class when both
are equal, else when their canonical names are (`clip_jax.data.class_names`), else when they differ in punctuation only,
else when one of them is among the other's comma-separated synonyms ("tench, Tinca tinca"). Each match must be the only
one of its kind. WordNet ids of ImageNet's 1,000 classes match the names of `class_names.json`.
"""

import functools
import json
import re
from collections import Counter

from etils import epath

from clip_jax.data.class_names import canonical_name
from clip_jax.data.records import check_labels
from clip_jax.errors import UserError
from clip_jax.evaluation.prompts import load_class_names

_LISTED = 5  # names that a message lists


@functools.cache
def imagenet_names():
    """Returns `{WordNet id: name}` of ImageNet's 1,000 classes."""
    ids = json.loads((epath.Path(__file__).parent / "imagenet_ids.json").read_text())
    return dict(zip(ids, load_class_names("imagenet"), strict=True))


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
    pairs = given if isinstance(given, dict) else _matches(classes, given)
    left_out = [name for name in classes if name not in pairs]
    unused = sorted(set(pairs) - set(classes)) if pairs is given else _unused(given, pairs)
    if left_out or unused:
        raise _mismatch(source, given, left_out, unused, task)
    return [pairs[name] for name in classes]


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
    ids = imagenet_names() if all(re.fullmatch(r"n\d{8}", name) for name in source.class_names) else {}
    if unknown := [name for name in source.class_names if ids and name not in ids]:
        raise UserError(
            f"{task}: the classes of {source.name} include WordNet ids outside of ImageNet's 1,000 classes: "
            f"{listed(unknown)}; give class_names as pairs of class and name"
        )
    return [ids.get(name, name).replace("_", " ") for name in source.class_names]


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


def _matches(classes, given):
    """Returns `{class: given name}` of the classes that match exactly one given name."""
    if given == list(imagenet_names().values()) and set(classes) <= set(imagenet_names()):
        return {name: imagenet_names()[name] for name in classes}
    return match_classes(classes, given)


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
    if set(source.class_names) <= set(imagenet_names()):
        parts.append("without class_names these WordNet ids get their ImageNet names")
    else:
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
