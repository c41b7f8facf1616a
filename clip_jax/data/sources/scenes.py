"""Scenes: two to four emoji images on one canvas, with known boxes and a caption that describes their positions.

    scenes                                              64 x 64 pixels, 20,000 records in a split
    scenes?objects=2-3&size=96&records=50000            number of objects, side in pixels, records in a split
    scenes?groups=animals-nature,food-drink,objects     the emoji groups that the objects come from
    scenes?concepts=40                                  only 40 concepts of these groups: their pairs recur more often
    scenes?pairs=48                                     the first two objects of training are only 48 pairs of concepts
    scenes?told=reading                                 the object named first is to the left of the second or above it

Record i of a split is a pure function of i: it is composed when it is read. The splits are `train`, `val` and `test`.
Objects of `train` are concepts of the emoji set's own `train`. The records of `val` and `test` are of three kinds, a
third each; the field `held_out` names the kind:

    ""              objects and pairs of objects as in training
    "object"        one of the first two objects is a concept of the emoji set's own `val` or `test`
    "combination"   the first two objects are known, but training never shows them together

The objects lie on neighbouring cells of a 2 x 2 grid, so "to the left of" and the other relations are unambiguous. In a
third of the scenes each object has a frame of its own colour, in a third the sizes differ, and the caption says so.
"""

import dataclasses
import functools
import itertools
import re
import zlib

import numpy as np
from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BaseSource, records
from clip_jax.data.sources.tfds import embedded
from clip_jax.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test")
COLORS = {
    "red": (214, 40, 40), "orange": (245, 130, 20), "yellow": (240, 205, 20), "green": (40, 150, 60),
    "blue": (40, 90, 215), "purple": (130, 50, 170), "pink": (245, 130, 180), "black": (20, 20, 20),
}  # fmt: skip
#: Side of an object as a share of its cell, by its size; "" is an object whose size the caption does not mention.
SIDES = {"": 0.75, "big": 0.94, "small": 0.47}
HELD_OUT = ("", "object", "combination")
TOLD = ("any", "reading")
_RING = ((0, 0), (1, 0), (1, 1), (0, 1))  # the cells (column, row) in cyclic order: adjacent entries are neighbours
_RELATIONS = {(-1, 0): "to the left of", (1, 0): "to the right of", (0, -1): "above", (0, 1): "below"}
_CLAUSES = ((0, 1), (2, 1), (3, 2))  # (object, reference object) of each clause of the caption
_PAIRS_PER_HELD_OUT = 20  # one in 20 pairs of objects is held out for val, another one in 20 for test
_MIN_CONCEPTS = 24  # with fewer, no further object may be allowed together with those of a scene
_CACHE_BYTES = 2**26  # of resized images
_GROUPS = ("animals-nature", "food-drink")
_EXAMPLE = "scenes?objects=2-3&size=96&records=50000&groups=food-drink,objects"


@dataclasses.dataclass(frozen=True)
class _Object:
    """An object of a scene.

    Attributes:
      name: str, the concept.
      size: str, "big", "small" or "".
      color: str, the colour of its frame, "" for none.
    """

    name: str
    size: str = ""
    color: str = ""

    @property
    def tag(self):
        """The name with its attribute: "small cat", "red-framed cat" or "cat"."""
        return " ".join(filter(None, (self.size, self.color and f"{self.color}-framed", self.name)))

    @property
    def phrase(self):
        """The noun phrase of the caption: "a small cat", "a cat in a red frame" or "a cat"."""
        frame = f" in {_with_article(self.color)} frame" if self.color else ""
        return _with_article(" ".join(filter(None, (self.size, self.name)))) + frame


class SceneSource(BaseSource):
    """Composed scenes; `make_source("scenes")` makes one.

    A record has
      image: uint8 `[size, size, 3]`.
      texts: a list of one str, the full caption.
      caption: str, the same caption, for templates.
      summary: str, the objects by name, without attributes and positions.
      objects: list of str, their names; the first two are those of `relation`.
      tags: list of str, attribute and name of each object.
      boxes: float32 `[n, 4]`, x1, y1, x2, y2 in pixels, frames included.
      relation: str, the position of the first object relative to the second: "to the left of", "to the right of",
        "above" or "below".
      wrong_objects: str, the caption with the first two objects exchanged.
      wrong_attributes: str, the caption with their attributes exchanged; "" when they have none.
      held_out: str, "", "object" or "combination"; see the docstring of this module.

    Args:
      split: str, one of `SPLITS`.
      objects: (smallest, largest) number of objects, within 2 to 4.
      size: int, side of the canvas in pixels, at least 32.
      records: int, records in the split.
      groups: emoji groups that the objects come from.
      concepts: int, number of concepts; None for all.
      pairs: int, number of pairs of concepts that training shows; None for all.
      told: str, "any", or "reading" to name first the object that comes first in reading order.
      name: str, for messages.

    Raises UserError for a wrong value, and for groups that leave too few objects.
    """

    def __init__(
        self,
        split="train",
        *,
        objects=(2, 4),
        size=64,
        records=20_000,
        groups=_GROUPS,
        concepts=None,
        pairs=None,
        told="any",
        name="scenes",
    ):
        super().__init__(name)
        if split not in SPLITS:
            raise UserError(f"{name}: no split {split!r}{did_you_mean(split, SPLITS)}; splits: {', '.join(SPLITS)}")
        if not 2 <= objects[0] <= objects[1] <= 4:
            raise UserError(f"{name}: objects={objects[0]}-{objects[1]}: at least 2 and at most 4 fit on a canvas")
        if size < 32 or records < 1:
            raise UserError(f"{name}: size={size} must be at least 32 pixels, and records={records} at least 1")
        if told not in TOLD:
            raise UserError(f"{name}: told={told}{did_you_mean(told, TOLD)} must be one of: {', '.join(TOLD)}")
        self._split, self._size = split, size
        self._counts, self._records = objects, records
        self._told = told
        self._images = _read_concepts(tuple(groups), "train", name)
        self._names, known = list(self._images), len(self._images)
        if known < _MIN_CONCEPTS or concepts is not None and not _MIN_CONCEPTS <= concepts <= known:
            given = "" if concepts is None else f"concepts={concepts}: "
            raise UserError(
                f"{name}: {given}groups={','.join(groups)} have {known} objects with a short name; at least "
                f"{_MIN_CONCEPTS} are needed"
            )
        if concepts is not None:
            self._names = _evenly_spaced(self._names, concepts)
        self._train_pairs = []  # the pairs that training shows; empty for all
        if pairs is not None:
            allowed = self._pairs_of("train")
            if not 1 <= pairs <= len(allowed):
                raise UserError(
                    f"{name}: pairs={pairs}: training has {len(allowed)} pairs of {len(self._names)} objects"
                )
            self._train_pairs = _evenly_spaced(allowed, pairs)
        self._new_images, self._new_pairs = {}, []  # what training never shows
        if split != "train":
            self._new_images = _read_concepts(tuple(groups), f"{split}_seen_vendor", name)
            self._new_pairs = self._pairs_of(split)
            if not self._new_images or not self._new_pairs:
                raise UserError(
                    f"{name}: groups={','.join(groups)} hold out no objects for {split!r}, or no pairs of objects"
                )
        self._resized = {}

    def _pairs_of(self, split):
        return [pair for pair in itertools.combinations(self._names, 2) if _split_of_pair(*pair) == split]

    def __len__(self):
        return self._records

    def __getstate__(self):
        return self.__dict__ | {"_resized": {}}

    def __getitem__(self, index):
        rng = np.random.default_rng((SPLITS.index(self._split), int(index)))
        held_out = "" if self._split == "train" else str(rng.choice(HELD_OUT))
        objects = self._add_attributes(self._draw_names(held_out, rng), rng)
        image, boxes, cells = self._compose(objects, rng)
        relations = [
            _RELATIONS[cells[i][0] - cells[k][0], cells[i][1] - cells[k][1]] for i, k in _CLAUSES[: len(objects) - 1]
        ]
        first, second, *rest = objects
        names = [_with_article(obj.name) for obj in objects]
        caption = _caption(objects, relations)
        swapped = [dataclasses.replace(a, size=b.size, color=b.color) for a, b in ((first, second), (second, first))]
        return {
            "image": image,
            "texts": [caption],
            "caption": caption,
            "summary": f"{', '.join(names[:-1])} and {names[-1]}",
            "objects": [obj.name for obj in objects],
            "tags": [obj.tag for obj in objects],
            "boxes": boxes,
            "relation": relations[0],
            "wrong_objects": _caption([second, first, *rest], relations),
            "wrong_attributes": _caption([*swapped, *rest], relations) if swapped[0] != first else "",
            "held_out": held_out,
        }

    def _draw_names(self, held_out, rng):
        """Returns the names of the objects in order; training may show every pair of them except a held-out one."""
        count = int(rng.integers(self._counts[0], self._counts[1] + 1))
        pairs = self._new_pairs if held_out == "combination" else [] if held_out else self._train_pairs
        if pairs:
            names = list(pairs[rng.integers(len(pairs))])
        else:
            pool = list(self._new_images) if held_out else self._names
            names = [pool[rng.integers(len(pool))]]
        while len(names) < count:
            name = self._names[rng.integers(len(self._names))]
            if name not in names and all(_split_of_pair(name, other) == "train" for other in names):
                names.append(name)
        if (held_out or pairs) and rng.random() < 0.5:
            names[:2] = names[1::-1]
        return names

    def _add_attributes(self, names, rng):
        """Returns the objects without attributes, with different colours, or with sizes, the first two different."""
        kind = rng.integers(3)
        if kind == 0:
            return [_Object(name) for name in names]
        if kind == 1:
            colors = rng.permutation(list(COLORS)).tolist()
            return [_Object(name, color=color) for name, color in zip(names, colors, strict=False)]
        sizes = rng.permutation(["big", "small"]).tolist() + rng.choice(["big", "small"], 2).tolist()
        return [_Object(name, size=size) for name, size in zip(names, sizes, strict=False)]

    def _compose(self, objects, rng):
        """Returns the image uint8 `[size, size, 3]`, the boxes float32 `[n, 4]`, and the cell of each object."""
        start, step = int(rng.integers(4)), int(rng.choice((1, 3)))
        cell = self._size / 2
        background = (255, 255, 255) if rng.random() < 0.5 else tuple(rng.integers(215, 256, 3).tolist())
        canvas = Image.new("RGB", (self._size, self._size), background)
        if self._told == "reading" and _RING[start] > _RING[(start + step) % 4]:
            start, step = start + step, -step  # exchanges the cells of the first two objects
        boxes, cells = [], [_RING[(start + step * i) % 4] for i in range(len(objects))]
        for obj, (column, row) in zip(objects, cells, strict=True):
            border = max(2, round(cell / 12)) if obj.color else 0
            side = round(SIDES[obj.size] * cell)
            # Only the middle half of the free room is used: the offset of neighbours along the other axis stays far
            # below their offset along their own.
            corner = np.array((column, row)) * cell + (cell - side) * rng.uniform(0.25, 0.75, 2)
            x, y = corner.round().astype(int).tolist()
            if border:
                canvas.paste(COLORS[obj.color], (x, y, x + side, y + side))
                canvas.paste(background, (x + border, y + border, x + side - border, y + side - border))
            image = self._image(obj.name, int(rng.integers(2**31)), side - 2 * border)
            canvas.paste(image, (x + border, y + border), image)
            boxes.append((x, y, x + side, y + side))
        return np.asarray(canvas), np.array(boxes, np.float32), cells

    def _image(self, name, draw, side):
        """Returns one of a concept's images, chosen by the number `draw`: RGBA, `side` pixels wide and high."""
        images = self._images.get(name) or self._new_images[name]
        key = name, draw % len(images), side
        if (image := self._resized.get(key)) is None:
            image = decode.open_image(images[key[1]]).convert("RGBA").resize((side, side), Image.Resampling.BOX)
            if 4 * side**2 * len(self._resized) < _CACHE_BYTES:
                self._resized[key] = image
        return image


def make_scenes(options, split, name):
    """Returns the source of options as text, `{"objects": "2-3", "size": "96"}`; raises UserError for wrong ones."""
    number = (r"\d+", lambda m: int(m[0]))
    readers = {
        "objects": (r"(\d)(?:-(\d))?", lambda m: (int(m[1]), int(m[2] or m[1]))),
        "size": number,
        "records": number,
        "groups": (r".+", lambda m: m[0].split(",")),
        "concepts": number,
        "pairs": number,
        "told": (r"\w+", lambda m: m[0]),
    }
    given = {}
    for key, text in options.items():
        if key not in readers:
            hint = did_you_mean(key, readers)
            raise UserError(f"{name}: unknown option {key!r}{hint}; options: {', '.join(readers)}")
        pattern, read = readers[key]
        if not (match := re.fullmatch(pattern, text)):
            raise UserError(f"{name}: cannot read {key}={text}; options are written as in {_EXAMPLE}")
        given[key] = read(match)
    return SceneSource(split, **given, name=name)


def _evenly_spaced(items, count):
    return [items[i * len(items) // count] for i in range(count)]


@functools.cache
def _read_concepts(groups, split, name):
    """Returns `{name: list of encoded images}` of the concepts of some groups in a split of the emoji set.

    Only concepts whose name is a short noun are used. Raises UserError for an unknown group.
    """
    found, known = {}, set()
    for _, record in records(embedded("emoji", split)):
        known.add(record["group"])
        if record["group"] in groups and re.fullmatch(r"[A-Za-z]+([ -][A-Za-z]+){0,2}", record["name"]):
            found.setdefault(record["name"], []).append(record["image"])
    for group in groups:
        if group not in known:
            hint = did_you_mean(group, known)
            raise UserError(f"{name}: no group {group!r}{hint}; groups: {', '.join(sorted(known))}")
    return dict(sorted(found.items()))


def _split_of_pair(a, b):
    """Returns the split whose scenes may show two objects together; their order does not matter."""
    number = zlib.crc32("|".join(sorted((a, b))).encode()) % _PAIRS_PER_HELD_OUT
    return {0: "val", 1: "test"}.get(number, "train")


def _with_article(noun):
    """Returns a noun with its article: "a cat", "an apple", "a unicorn", "grapes"."""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "os")):
        return noun
    return f"{'an' if re.match('(?!ewe)[aeio]|u(?!ni)|hour', noun.lower()) else 'a'} {noun}"


def _caption(objects, relations):
    """Returns a caption: "a small cat to the left of a big apple, big grapes below the apple"."""
    return ", ".join(
        f"{objects[i].phrase} {relation} {objects[k].phrase if i == 0 else f'the {objects[k].name}'}"
        for (i, k), relation in zip(_CLAUSES, relations, strict=False)
    )
