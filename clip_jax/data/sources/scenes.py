"""Scenes: two to four emoji pictures on one canvas, with known boxes, and a caption that says what is where.

    scenes                                              64 x 64 pixels, 20,000 records a split
    scenes?objects=2-3&size=96&records=50000            numbers of objects, side in pixels, nominal length
    scenes?groups=animals-nature,food-drink,objects     the emoji groups that the objects come from
    scenes?concepts=40                                  only so many things of these groups: their pairs come back more often
    scenes?told=reading                                 as one reads: the object named first is to the left of the second, or above it

Record i of a split is a pure function of i: it is composed when it is read. Splits are `train`, `val` and `test`. Objects of `train` are
concepts of the emoji set's own `train`. A third of the records of `val` and `test` has objects and pairs of objects as in
training (`held_out` ""); a third an object among the first two that training has never shown, a concept of the emoji set's own split
("object"); in a third the first two objects are both known, but never together in a scene of training ("combination").

The objects lie on neighbouring cells of a 2 x 2 grid, so that "to the left of" and its like are never in doubt. In a third of the scenes
each object has a frame in a colour of its own, in a third the sizes differ, and the caption says so.
"""

import dataclasses
import functools
import itertools
import re
import zlib

import numpy as np
from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BaseSource
from clip_jax.data.sources.tfds import embedded
from clip_jax.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test")
COLORS = {
    "red": (214, 40, 40), "orange": (245, 130, 20), "yellow": (240, 205, 20), "green": (40, 150, 60),
    "blue": (40, 90, 215), "purple": (130, 50, 170), "pink": (245, 130, 180), "black": (20, 20, 20),
}  # fmt: skip
#: Side of an object as a share of its cell; "" is that of objects whose size is not spoken of.
SIDES = {"": 0.75, "big": 0.94, "small": 0.47}
HELD_OUT = ("", "object", "combination")
TOLD = ("any", "reading")
_RING = ((0, 0), (1, 0), (1, 1), (0, 1))  # cells (column, row) in an order in which neighbours are neighbours
_RELATIONS = {(-1, 0): "to the left of", (1, 0): "to the right of", (0, -1): "above", (0, 1): "below"}
_CLAUSES = ((0, 1), (2, 1), (3, 2))  # which object is placed by which
_PAIRS_OF_SPLIT = 20  # one in so many pairs of objects is kept for val, and as many for test
_FEWEST = 24  # objects: of fewer there may be none that goes with those of a scene
_CACHE_BYTES = 2**26  # of resized pictures
_GROUPS = ("animals-nature", "food-drink")
_EXAMPLE = "scenes?objects=2-3&size=96&records=50000&groups=food-drink,objects"


@dataclasses.dataclass(frozen=True)
class _Thing:
    """An object of a scene: its name, its size and the colour of its frame as words, "" for none."""

    name: str
    size: str = ""
    color: str = ""

    @property
    def tag(self):
        """ "small cat", "red-framed cat" or "cat"."""
        return " ".join(filter(None, (self.size, self.color and f"{self.color}-framed", self.name)))

    @property
    def phrase(self):
        return f"{_with_article(' '.join(filter(None, (self.size, self.name))))}{self.color and f' in {_with_article(self.color)} frame'}"


class SceneSource(BaseSource):
    """Composed scenes; `make_source("scenes")` makes one.

    A record has, beside `image` (uint8 [size, size, 3]) and `texts` (the full caption alone):
      caption       the same, for templates
      summary       the objects by name, without attributes and places
      objects       their names; the first two are those of `relation`
      tags          "attribute object" of each
      boxes         float32 [n, 4], x1, y1, x2, y2 in pixels, frames included
      relation      where the first object is, seen from the second: "to the left of", "to the right of", "above" or "below"
      wrong_objects      the caption with the first two objects in each other's place
      wrong_attributes   the caption with their attributes exchanged, "" where they have none
      held_out      "", "object" or "combination", see the module

    Raises UserError for a split that is not there, and for groups that leave no objects.
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
            raise UserError(f"{name}: size={size} must be at least 32, and records={records} at least 1")
        if told not in TOLD:
            raise UserError(f"{name}: told={told}{did_you_mean(told, TOLD)} is one of: {', '.join(TOLD)}")
        self._split, self._objects, self._size, self._records, self._told = split, objects, size, records, told
        self._known, self._new, self._pairs, self._shown = _concepts(tuple(groups), "train", name), {}, [], []
        self._names, known = list(self._known), len(self._known)
        if known < _FEWEST or concepts is not None and not _FEWEST <= concepts <= known:
            given = "" if concepts is None else f"concepts={concepts}: "
            raise UserError(
                f"{name}: {given}groups={','.join(groups)} have {known} objects with a short name; at least {_FEWEST} are needed"
            )
        if concepts is not None:
            self._names = _evenly(self._names, concepts)
        if pairs is not None:
            every = self._pairs_of("train")
            if not 1 <= pairs <= len(every):
                raise UserError(f"{name}: pairs={pairs}: training has {len(every)} pairs of {len(self._names)} objects")
            self._shown = _evenly(every, pairs)
        if split != "train":
            self._new = _concepts(tuple(groups), f"{split}_seen_vendor", name)
            self._pairs = self._pairs_of(split)
            if not self._new or not self._pairs:
                raise UserError(
                    f"{name}: groups={','.join(groups)} hold out no objects for {split!r}, or no pairs of objects"
                )
        self._pictures = {}

    def _pairs_of(self, split):
        return [pair for pair in itertools.combinations(self._names, 2) if _role(*pair) == split]

    def __len__(self):
        return self._records

    def __getstate__(self):
        return self.__dict__ | {"_pictures": {}}

    def __getitem__(self, index):
        rng = np.random.default_rng((SPLITS.index(self._split), int(index)))
        held_out = "" if self._split == "train" else str(rng.choice(HELD_OUT))
        things = self._attributes(self._draw_names(held_out, rng), rng)
        image, boxes, cells = self._compose(things, rng)
        relations = [
            _RELATIONS[cells[i][0] - cells[k][0], cells[i][1] - cells[k][1]] for i, k in _CLAUSES[: len(things) - 1]
        ]
        first, second, *rest = things
        names = [_with_article(thing.name) for thing in things]
        caption = _caption(things, relations)
        swapped = [dataclasses.replace(a, size=b.size, color=b.color) for a, b in ((first, second), (second, first))]
        return {
            "image": image,
            "texts": [caption],
            "caption": caption,
            "summary": f"{', '.join(names[:-1])} and {names[-1]}",
            "objects": [thing.name for thing in things],
            "tags": [thing.tag for thing in things],
            "boxes": boxes,
            "relation": relations[0],
            "wrong_objects": _caption([second, first, *rest], relations),
            "wrong_attributes": _caption([*swapped, *rest], relations) if swapped[0] != first else "",
            "held_out": held_out,
        }

    def _draw_names(self, held_out, rng):
        """Names of the objects in their order; every pair but the one that is asked for is one that training may show."""
        count = int(rng.integers(self._objects[0], self._objects[1] + 1))
        pairs = self._pairs if held_out == "combination" else [] if held_out else self._shown
        if pairs:
            names = list(pairs[rng.integers(len(pairs))])
        else:
            pool = list(self._new) if held_out else self._names
            names = [pool[rng.integers(len(pool))]]
        while len(names) < count:
            name = self._names[rng.integers(len(self._names))]
            if name not in names and all(_role(name, other) == "train" for other in names):
                names.append(name)
        if (held_out or pairs) and rng.random() < 0.5:
            names[:2] = names[1::-1]
        return names

    def _attributes(self, names, rng):
        """Sizes, of which the first two differ, or colours, all different, or neither."""
        kind = rng.integers(3)
        if kind == 0:
            return [_Thing(name) for name in names]
        if kind == 1:
            return [
                _Thing(name, color=color)
                for name, color in zip(names, rng.permutation(list(COLORS)).tolist(), strict=False)
            ]
        sizes = rng.permutation(["big", "small"]).tolist() + rng.choice(["big", "small"], 2).tolist()
        return [_Thing(name, size=size) for name, size in zip(names, sizes, strict=False)]

    def _compose(self, things, rng):
        """(the picture, the boxes, the cell of each object)."""
        start, step, cell = int(rng.integers(4)), int(rng.choice((1, 3))), self._size / 2
        background = (255, 255, 255) if rng.random() < 0.5 else tuple(rng.integers(215, 256, 3).tolist())
        canvas = Image.new("RGB", (self._size, self._size), background)
        if self._told == "reading" and _RING[start] > _RING[(start + step) % 4]:
            start, step = start + step, -step  # the first two change places
        boxes, cells = [], [_RING[(start + step * i) % 4] for i in range(len(things))]
        for thing, (column, row) in zip(things, cells, strict=True):
            border = max(2, round(cell / 12)) if thing.color else 0
            side = round(SIDES[thing.size] * cell)
            # The middle half of the room, so that along the other axis neighbours differ by far less than along theirs.
            x, y = (
                ((np.array((column, row)) * cell) + (cell - side) * rng.uniform(0.25, 0.75, 2))
                .round()
                .astype(int)
                .tolist()
            )
            if border:
                canvas.paste(COLORS[thing.color], (x, y, x + side, y + side))
                canvas.paste(background, (x + border, y + border, x + side - border, y + side - border))
            picture = self._picture(thing.name, int(rng.integers(2**31)), side - 2 * border)
            canvas.paste(picture, (x + border, y + border), picture)
            boxes.append((x, y, x + side, y + side))
        return np.asarray(canvas), np.array(boxes, np.float32), cells

    def _picture(self, name, draw, side):
        """One of the pictures of a concept, RGBA, `side` pixels wide and high."""
        images = self._known.get(name) or self._new[name]
        key = name, draw % len(images), side
        if (picture := self._pictures.get(key)) is None:
            picture = decode.open_image(images[key[1]]).convert("RGBA").resize((side, side), Image.Resampling.BOX)
            if 4 * side**2 * len(self._pictures) < _CACHE_BYTES:
                self._pictures[key] = picture
        return picture


def make_scenes(options, split, name):
    """The source of options as text, `{"objects": "2-3", "size": "96"}`; raises UserError for wrong ones."""
    readers = {
        "objects": (r"(\d)(?:-(\d))?", lambda m: (int(m[1]), int(m[2] or m[1]))),
        "size": (r"\d+", lambda m: int(m[0])),
        "records": (r"\d+", lambda m: int(m[0])),
        "groups": (r".+", lambda m: m[0].split(",")),
        "concepts": (r"\d+", lambda m: int(m[0])),
        "pairs": (r"\d+", lambda m: int(m[0])),
        "told": (r"\w+", lambda m: m[0]),
    }
    given = {}
    for key, text in options.items():
        if key not in readers:
            raise UserError(
                f"{name}: unknown option {key!r}{did_you_mean(key, readers)}; options: {', '.join(readers)}"
            )
        pattern, read = readers[key]
        if not (match := re.fullmatch(pattern, text)):
            raise UserError(f"{name}: cannot read {key}={text}; options are written as in {_EXAMPLE}")
        given[key] = read(match)
    return SceneSource(split, **given, name=name)


def _evenly(items, count):
    """`count` of them, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)]


@functools.cache
def _concepts(groups, split, name):
    """The encoded pictures of every concept of some groups whose name is a short noun, by name, of a split of the emoji set."""
    emoji, found, known = embedded("emoji", split), {}, set()
    for index in range(len(emoji)):
        record = emoji[index]
        known.add(record["group"])
        if record["group"] in groups and re.fullmatch(r"[A-Za-z]+([ -][A-Za-z]+){0,2}", record["name"]):
            found.setdefault(record["name"], []).append(record["image"])
    for group in groups:
        if group not in known:
            raise UserError(
                f"{name}: no group {group!r}{did_you_mean(group, known)}; groups: {', '.join(sorted(known))}"
            )
    return dict(sorted(found.items()))


def _role(a, b):
    """The split to which scenes with both of these objects belong; the order of the two does not matter."""
    kept_for = zlib.crc32("|".join(sorted((a, b))).encode()) % _PAIRS_OF_SPLIT
    return {0: "val", 1: "test"}.get(kept_for, "train")


def _with_article(noun):
    """ "a cat", "an apple", "a unicorn", "grapes"."""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "os")):
        return noun
    return f"{'an' if re.match('(?!ewe)[aeio]|u(?!ni)|hour', noun.lower()) else 'a'} {noun}"


def _caption(things, relations):
    """ "a small cat to the left of a big apple, big grapes below the apple"."""
    return ", ".join(
        f"{things[i].phrase} {relation} {things[k].phrase if i == 0 else f'the {things[k].name}'}"
        for (i, k), relation in zip(_CLAUSES, relations, strict=False)
    )
