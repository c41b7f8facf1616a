"""Class names of several sources: their canonical form, and the union of the classes."""

import itertools
import re
import unicodedata

# Quotes, and full stops outside of numbers.
_MARKS = re.compile(r"""['"‘’“”]|(?<![0-9])\.|\.(?![0-9])""")


def canonical_name(name):
    """Returns the form in which class names are compared: without regard to case, "_", "-", spaces, quotes, full stops.

    "Fire_Truck" gives "fire truck", and "St. Bernard" gives "st bernard". Full stops inside numbers stay.
    """
    text = unicodedata.normalize("NFKC", name)
    return (_separated(_MARKS.sub("", text)) or _separated(text)).casefold()


def _separated(text):
    return re.sub(r"[\s_-]+", " ", text).strip()


def join_classes(lists):
    """Returns the union of classes, where classes of different lists with the same canonical name are one class.

    A list may tell apart names that have the same canonical name. Then every list's names of this form are compared as
    they are written.

    Args:
      lists: for each source, its class names, a list of strings.

    Returns: `(classes, labels, ambiguous)`.
      classes: the class names; a class has the name of the first list with it.
      labels: for each list and each of its names the index in `classes`, lists of int.
      ambiguous: triples (number of the list, name, names that other lists tell apart) for each name that may be any of
        several classes.
    """
    forms = {name: canonical_name(name) for name in set(itertools.chain.from_iterable(lists))}
    told_apart = {}  # canonical name -> the spellings that one list tells apart
    for names in lists:
        of_form = {}
        for name in dict.fromkeys(names):
            of_form.setdefault(forms[name], []).append(name)
        for form, spellings in of_form.items():
            if len(spellings) > 1:
                told_apart.setdefault(form, {}).update(dict.fromkeys(spellings))
    classes, labels = [], []
    index = {}
    for names in lists:
        labels.append([])
        for name in names:
            key = (forms[name], name if forms[name] in told_apart else "")
            if key not in index:
                index[key] = len(classes)
                classes.append(name)
            labels[-1].append(index[key])
    ambiguous = [
        (number, name, list(told_apart[forms[name]]))
        for number, names in enumerate(lists)
        for name in names
        if name not in told_apart.get(forms[name], {name})
    ]
    return classes, labels, ambiguous
