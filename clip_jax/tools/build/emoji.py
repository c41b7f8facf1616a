"""Builds the embedded emoji set: the same concepts drawn by six vendors, with names, tags and keywords by people.

    python -m clip_jax.tools.build.emoji [--cache FOLDER] [--out FOLDER]

Needs `npm` to fetch the pinned packages that the cache folder lacks, Pillow and resvg-py. Equal versions of the
packages, Pillow and resvg-py give equal bytes.

A record is one image of a base concept (no skin-tone variants). Concepts are split 80/10/10 by a hash of their family
(`concept_family`), so gender variants, and flags of one design, are on the same side. Vendors are split by design
family; EmojiOne v2 is held out:

    split                  concepts      vendors
    train                  seen          seen
    train_unseen_vendor    seen          held out
    val_seen_vendor        validation    seen
    val_unseen_vendor      validation    held out
    test_seen_vendor       test          seen
    test_unseen_vendor     test          held out
"""

import hashlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.tools.build.iconify import slug, slugs, to_svg
from clip_jax.tools.build.images import render_svg, to_square, to_webp
from clip_jax.tools.build.packages import Package, fetch, npm, read_tar
from clip_jax.tools.build.tfds_writer import command, write_dataset

VERSION = "1.0.0"
SIZE = 64
OUT = Path(__file__).parents[2] / "data" / "embedded" / "emoji" / VERSION
UNSEEN_VENDOR = "emojione_v2"
SPLITS = (
    "train",
    "train_unseen_vendor",
    "val_seen_vendor",
    "val_unseen_vendor",
    "test_seen_vendor",
    "test_unseen_vendor",
)
LOCALES = "bn da de en en-gb es es-mx et fi fr hi hu it ja ko lt ms nb nl pl pt ru sv th uk vi zh zh-hant".split()

EMOJIBASE = npm("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
EMOJILIB = npm("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")


_VARIATION = {0xFE0E, 0xFE0F}
# Code points that mark a variant of a concept: skin tones, "facing right", female and male sign, and the joiner.
_VARIANT = {*range(0x1F3FB, 0x1F400), 0x27A1, 0x2640, 0x2642, 0x200D}
_ADULT, _CHILD = 0x1F9D1, 0x1F9D2
_HEART, _KISS = 0x2764, 0x1F48B
_HOLDING_HANDS = 0x1F91D
_NEUTRAL = {  # gendered code point -> code point of its gender-neutral concept
    0x1F468: _ADULT,  # man
    0x1F469: _ADULT,  # woman
    0x1F466: _CHILD,  # boy
    0x1F467: _CHILD,  # girl
    0x1F474: 0x1F9D3,  # old man
    0x1F475: 0x1F9D3,  # old woman
    0x1F478: 0x1FAC5,  # princess -> person with crown
    0x1F934: 0x1FAC5,  # prince
    0x1F930: 0x1FAC4,  # pregnant woman -> pregnant person
    0x1FAC3: 0x1FAC4,  # pregnant man
    0x1F483: 0x1F57A,  # woman dancing, man dancing
    0x1F936: 0x1F385,  # Mrs. Claus, Santa Claus
}
_COUPLES = {0x1F46B, 0x1F46C, 0x1F46D}  # woman and man, men, women holding hands
_COUPLE_WITH_HEART, _COUPLE_KISSING = 0x1F491, 0x1F48F
_FAMILY, _CHRISTMAS_TREE = 0x1F46A, 0x1F384
_FLAG_STARTS = {*range(0x1F1E6, 0x1F200), 0x1F3F3, 0x1F3F4}
_FLAG_TWINS = {  # territories that fly another country's flag: region -> region of the same image
    "AC": "SH", "BV": "NO", "CP": "FR", "DG": "IO", "EA": "ES", "HM": "AU", "MF": "FR", "SJ": "NO", "UM": "US",
}  # fmt: skip


def concept_family(hexcode):
    """Returns one hexcode for a concept and all its skin-tone and gender variants.

    The object identifies a role (`firefighter`, `woman firefighter` -> `1F9D1-1F692`). The first code point
    identifies any other sequence (`black cat` -> `1F408`, the cat). The whole sequence identifies a flag, except for
    territories that fly another country's flag.

    Args:
      hexcode: code points of an emoji in hexadecimal, joined by `-`, such as `1F469-200D-1F692`.
    """
    points = [p for p in (int(part, 16) for part in hexcode.split("-")) if p not in _VARIATION]
    first, rest = points[0], [p for p in points[1:] if p not in _VARIANT]
    if first in _FLAG_STARTS:
        if all(0x1F1E6 <= p < 0x1F200 for p in points):
            region = "".join(chr(p - 0x1F1E6 + ord("A")) for p in points)
            points = [ord(c) - ord("A") + 0x1F1E6 for c in _FLAG_TWINS.get(region, region)]
        return "-".join(f"{p:X}" for p in points)
    first, rest = _NEUTRAL.get(first, first), [_NEUTRAL.get(p, p) for p in rest]
    if first in _COUPLES:
        first, rest = _ADULT, [_HOLDING_HANDS]
    if first != _ADULT or not rest:
        family = [first]
    elif _KISS in rest:
        family = [_COUPLE_KISSING]
    elif _HEART in rest:
        family = [_COUPLE_WITH_HEART]
    elif rest[0] == _CHRISTMAS_TREE:
        family = [_NEUTRAL[0x1F936]]
    elif _HOLDING_HANDS in rest:
        family = [_ADULT, _HOLDING_HANDS]
    elif _ADULT in rest or _CHILD in rest:
        family = [_FAMILY]
    else:
        family = [_ADULT, rest[0]]
    return "-".join(f"{p:04X}" for p in family)


def concept_split(hexcode):
    """Returns `train` (80 %), `val` (10 %) or `test` (10 %) by the first 32 bits of SHA-256 of the family."""
    share = int(hashlib.sha256(concept_family(hexcode).encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def split_of(hexcode, vendor):
    """Returns the name of the split that holds this vendor's image of this concept."""
    part, unseen = concept_split(hexcode), vendor == UNSEEN_VENDOR
    if part == "train" and not unseen:
        return "train"
    return f"{part}_{'unseen' if unseen else 'seen'}_vendor"


@dataclass(frozen=True)
class Concept:
    """The texts that people wrote about one emoji.

    Attributes:
      hexcode: its code points in hexadecimal, joined by `-`.
      name: its CLDR short name in English.
      tags: its CLDR keywords, from emojibase.
      keywords: its keywords from emojilib; empty for a dozen concepts.
      group, subgroup: emojibase's.
      names: its CLDR short name in each of `LOCALES`.
    """

    hexcode: str
    name: str
    tags: list[str]
    keywords: list[str]
    group: str
    subgroup: str
    names: list[str]


def read_concepts(cache):
    """Returns the 1,923 base concepts in emojibase's order."""
    base = read_tar(fetch(EMOJIBASE, cache), lambda path: path.endswith(("/data.json", "/meta/groups.json")))
    base = {path.removeprefix("package/"): json.loads(data) for path, data in base.items()}
    lib = read_tar(fetch(EMOJILIB, cache), lambda path: path == "package/dist/emoji-en-US.json")
    lib = {plain(emoji): words for emoji, words in json.loads(lib["package/dist/emoji-en-US.json"]).items()}
    labels = {locale: {e["hexcode"]: e["label"] for e in base[f"{locale}/data.json"]} for locale in LOCALES}
    groups = base["meta/groups.json"]
    concepts = []
    for entry in base["en/data.json"]:
        if "group" not in entry:  # the 26 regional indicator letters
            continue
        hexcode, name = entry["hexcode"], entry["label"]
        concepts.append(
            Concept(
                hexcode,
                name,
                entry["tags"],
                _clean(lib.get(plain(entry["emoji"]), ()), plain(entry["emoji"]), name),
                groups["groups"][str(entry["group"])],
                groups["subgroups"][str(entry["subgroup"])],
                [labels[locale][hexcode] for locale in LOCALES],
            )
        )
    return concepts


def _clean(words, emoji, name):
    """Returns emojilib's keywords without underscores, no-break spaces, repetitions, the emoji itself and its name."""
    words = (" ".join(word.replace("_", " ").replace(emoji, " ").split()) for word in words)
    return [word for word in dict.fromkeys(words) if word and _letters(word) != _letters(name)]


def _letters(text):
    return slug(text).replace("-", "")


def plain(emoji):
    """Returns `emoji` without variation selectors, which the packages use inconsistently."""
    return "".join(c for c in emoji if ord(c) not in _VARIATION)


def plain_hexcode(hexcode):
    """Returns the hexcode in upper case without variation selectors."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0E", "FE0F"))


@dataclass(frozen=True)
class Vendor:
    """The author of a set of images.

    Attributes:
      name: the vendor's name in the records.
      package: the package that holds the images.
      read: function of the package's path and the concepts; yields concepts with functions that return a PIL image.
    """

    name: str
    package: Package
    read: Callable[[Path, list[Concept]], Iterator[tuple[Concept, Callable[[], Any]]]]


def image_files(folder):
    """Returns a reader of packages with one image file for each emoji, `<folder>/<hexcode>.<suffix>`."""

    def read(path, concepts):
        files = read_tar(path, lambda name: name.startswith(folder + "/"))
        files = {plain_hexcode(Path(name).stem): data for name, data in files.items()}
        for concept in concepts:
            if data := files.get(plain_hexcode(concept.hexcode)):
                yield concept, lambda data=data: _load(data)

    return read


def _load(data):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def iconify(path, concepts):
    """Reads an Iconify package: by code point when `chars.json` has any, otherwise by the slug of the CLDR name."""
    files = read_tar(path, lambda name: name in ("package/icons.json", "package/chars.json"))
    icons = json.loads(files["package/icons.json"])
    by_hexcode = {plain_hexcode(h): name for h, name in json.loads(files["package/chars.json"]).items()}
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    for concept in concepts:
        if by_hexcode:
            names = [by_hexcode.get(plain_hexcode(concept.hexcode))]
        else:
            names = slugs(concept.name)
        if name := next((name for name in names if name in known), None):
            yield concept, lambda name=name: _load(render_svg(to_svg(icons, name, SIZE)))


VENDORS = (
    Vendor(
        "noto",
        npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
        image_files("package/img/google/64"),
    ),
    Vendor(
        "noto_v1",
        npm("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        iconify,
    ),
    Vendor(
        "fluent_3d",
        npm("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
        image_files("package/assets"),
    ),
    Vendor(
        "fluent_flat",
        npm(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        iconify,
    ),
    Vendor(
        "twemoji",
        npm("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
        image_files("package/img/twitter/64"),
    ),
    Vendor(
        UNSEEN_VENDOR,
        npm("@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
        iconify,
    ),
)

# Images that show another concept in the pinned packages: (vendor, concept).
_WRONG_IMAGES = {("noto", "1F1E8-1F1F6")}  # the flag of Sark is that of Saudi Arabia


# Part of the built files: any change changes their bytes.
DESCRIPTION = """\
Emoji: 1,911 concepts drawn independently by six vendors, with English names and keywords written by people.
One record is one picture of one concept, 64 x 64 pixels, WebP with transparency. Concepts are split 80/10/10 by a \
hash of
their base code point, skin-tone and gender variants with their base; the vendor emojione_v2 is held out: train and
train_unseen_vendor hold the seen concepts, val_* and test_* the unseen ones. Names of the concepts in 28 languages \
lie beside
the records in names_i18n.json.xz. Read it with tfds.builder_from_directory(folder).as_data_source(split); tf.data does
not decode WebP, so give tfds.decode.SkipDecoding() for the image there."""
CITATION = """\
Pictures: Noto Emoji and Noto Emoji v1 (Google), Fluent Emoji (Microsoft), Twemoji (Twitter and contributors), \
EmojiOne 2 (Ranks.com).
Texts: Unicode CLDR through emojibase (Miles Johnson), emojilib (Mu-An Chiou)."""
LICENSE = """\
noto, noto_v1: Apache-2.0. fluent_3d, fluent_flat: MIT. twemoji, emojione_v2: CC-BY-4.0. All pictures were resized to \
64 pixels.
Texts: Unicode License v3 (CLDR), MIT (emojibase, emojilib). Authors and links: NOTICE."""


def records(concepts, cache):
    """Returns `{split: records}`, sorted by concept, then by vendor."""
    images = {v.name: {c.hexcode: image for c, image in v.read(fetch(v.package, cache), concepts)} for v in VENDORS}
    splits = {name: [] for name in SPLITS}
    for concept in concepts:
        for vendor in VENDORS:
            image = images[vendor.name].get(concept.hexcode)
            if image is None or (vendor.name, concept.hexcode) in _WRONG_IMAGES:
                continue
            splits[split_of(concept.hexcode, vendor.name)].append(
                {
                    "image": io.BytesIO(to_webp(to_square(image()), SIZE)),
                    "vendor": vendor.name,
                    "concept": concept.hexcode,
                    "name": concept.name,
                    "tags": concept.tags,
                    "keywords": concept.keywords,
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                }
            )
    return splits


def build(cache, out=OUT):
    """Builds the data set in the folder `out`; returns `{split: number of records}`."""
    import tensorflow_datasets as tfds

    concepts = read_concepts(cache)
    # In every record, 28 names would double the size of the set.
    names = {"locales": LOCALES, "names": {concept.hexcode: concept.names for concept in concepts}}
    names = json.dumps(names, ensure_ascii=False, separators=(",", ":")).encode()
    text = tfds.features.Text()
    return write_dataset(
        out,
        name="emoji",
        version=VERSION,
        features={
            "image": tfds.features.Image(shape=(SIZE, SIZE, 4)),
            "vendor": text,
            "concept": text,
            "name": text,
            "tags": tfds.features.Sequence(text),
            "keywords": tfds.features.Sequence(text),
            "group": text,
            "subgroup": text,
        },
        splits=records(concepts, cache),
        description=DESCRIPTION,
        homepage="https://unicode.org/emoji/",
        citation=CITATION,
        license_text=LICENSE,
        extra_files={"names_i18n.json.xz": lzma.compress(names, preset=9 | lzma.PRESET_EXTREME)},
    )


if __name__ == "__main__":
    command(__doc__, build, OUT)
