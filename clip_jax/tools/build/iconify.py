"""Iconify packages of emoji: the names of their icons, and the SVG of an icon."""

import re
import unicodedata

from clip_jax.errors import UserError

# CLDR renamed these after the packages with slugs were made: slug of the present name -> slug of the former name.
_FORMER_SLUGS = {
    "a-button-blood-type": "a-button",
    "ab-button-blood-type": "ab-button",
    "b-button-blood-type": "b-button",
    "o-button-blood-type": "o-button",
    "robot": "robot-face",
    "grinning-cat": "grinning-cat-face",
    "grinning-cat-with-smiling-eyes": "grinning-cat-face-with-smiling-eyes",
    "cat-with-tears-of-joy": "cat-face-with-tears-of-joy",
    "smiling-cat-with-heart-eyes": "smiling-cat-face-with-heart-eyes",
    "cat-with-wry-smile": "cat-face-with-wry-smile",
    "kissing-cat": "kissing-cat-face-with-closed-eyes",
    "weary-cat": "weary-cat-face",
    "crying-cat": "crying-cat-face",
    "pouting-cat": "pouting-cat-face",
    "heart-exclamation": "heavy-heart-exclamation",
    "smiling-face-with-open-hands": "hugging-face",
    "enraged-face": "pouting-face",
    "bullseye": "direct-hit",
    "red-question-mark": "question-mark",
    "red-exclamation-mark": "exclamation-mark",
    "person-blond-hair": "blond-haired-person",
    "person-with-skullcap": "man-with-chinese-cap",
    "person-in-suit-levitating": "man-in-business-suit-levitating",
    "women-holding-hands": "two-women-holding-hands",
    "men-holding-hands": "two-men-holding-hands",
    "woman-and-man-holding-hands": "man-and-woman-holding-hands",
    "flag-north-macedonia": "flag-for-macedonia",
    "flag-eswatini": "flag-for-swaziland",
    "flag-turkiye": "flag-for-turkey",
    "flag-myanmar-burma": "flag-for-myanmar",
    "flag-macao-sar-china": "flag-for-macau-sar-china",
    "flag-cocos-keeling-islands": "flag-for-cocos-islands",
}

# Names whose slug is the name of another emoji in those packages.
_OWN_SLUGS = {
    "keycap: #": ["keycap-pound"],
    "keycap: *": ["keycap-asterisk"],
    "UP! button": ["up-exclamation-button", "up-text-button"],
    "cricket": [],  # the insect; the packages use `cricket` for the game
}


def slug(text):
    """Returns `text` in ASCII lower case with `-` between words: `flag: Côte d’Ivoire` -> `flag-cote-divoire`."""
    text = unicodedata.normalize("NFKD", text.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.]", "", text)).strip("-")


def slugs(name):
    """Returns the slugs under which an Iconify package may hold the emoji of a CLDR name, most specific first."""
    if name in _OWN_SLUGS:
        return _OWN_SLUGS[name]
    found = [slug(name)]
    if name.startswith("flag: "):
        found.append(f"flag-for-{slug(name.removeprefix('flag: '))}")
    if found[0] in _FORMER_SLUGS:
        found.append(_FORMER_SLUGS[found[0]])
    return found


def to_svg(icons, name, side):
    """Returns the SVG of one icon.

    Args:
      icons: the content of an Iconify `icons.json`.
      name: of the icon or of an alias.
      side: width and height of the SVG in pixels.

    Raises UserError for an alias with a field other than `hFlip`.
    """
    flip = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        if extra := alias.keys() - {"parent", "hFlip"}:
            raise UserError(f"icon {name!r} of {icons['prefix']!r}: alias field {sorted(extra)[0]!r} is not supported")
        flip ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
