"""Samples of tar shards in img2dataset's layout (000.jpg, 000.txt, 000.json, ...): which members are one sample.

The rules are those of docs/data.md. The index reader (`webdataset`) and the block reader (`tar`) share them.
"""

import io
import json
import re

import numpy as np

from clip_jax.data.files import IMAGE_EXTENSIONS, NPZ_ERRORS, PLUGIN_EXTENSIONS
from clip_jax.data.records import BadRecord, plain
from clip_jax.data.sources.tar_members import CUT, NO_DATA, TAIL, read_members

# The members of a sample, by the ending of their name.
SLOTS = (
    {extension[1:] for extension in (*IMAGE_EXTENSIONS, *PLUGIN_EXTENSIONS)},
    {"txt", "text", "caption"},
    {"json"},
    {"cls"},
)
IMAGE, TXT, JSON, CLS = range(len(SLOTS))
_ARRAYS = "npz"
_OTHERS = {*SLOTS[TXT], *SLOTS[JSON], *SLOTS[CLS], _ARRAYS}  # last endings of further members, such as `a.syn.json`
_UNREADABLE = "unreadable shard"
_NO_IMAGE = "sample without image"
APART = "members of a sample are apart"
_DOUBLE = "two members of one kind in a sample"
_DOTS = "sample name that continues another one after a dot"
_LINK = "link to another member or file"
REASONS = (CUT, _UNREADABLE, TAIL, _NO_IMAGE, APART, _DOUBLE, _DOTS, _LINK)
_LINE_END = re.compile(r"\r\n?|\n")  # alone: str.splitlines also splits at U+2028, U+0085 and others


class Sample:
    """Adjacent members of one name.

    Attributes:
      key: (archive, folder, name up to the ending).
      slots: `{slot: [Member, ...]}`.
      others: `{ending: Member}` of further members, such as `syn.json` and `npz`.
      first, last: the first and the last member.
    """

    __slots__ = ("first", "key", "last", "others", "slots")

    def __init__(self, key, first):
        self.key, self.first = key, first
        self.slots, self.others = {}, {}
        self.last = first

    @property
    def start(self):
        """The offset of the first member's header."""
        return self.first.head

    @property
    def end(self):
        """The offset after the last member's data, filled up to 512 bytes."""
        return self.last.offset + -(-max(self.last.size, 0) // 512) * 512

    @property
    def spans(self):
        """The (offset, size) of the member of each slot, None for none."""
        return [self.slots[slot][0][3:5] if slot in self.slots else None for slot in range(len(SLOTS))]

    def kinds(self):
        """Returns the set of what the sample has, slots and endings."""
        return self.slots.keys() | self.others.keys()


def read_samples(get, start, size, broken):
    """Returns the whole samples of a shard; counts the others.

    Args:
      get, start, size: as of `read_members`.
      broken: Counter of `{reason: count}`.

    Returns: list of `Sample`, and the list of the members.
    """
    members, damage = read_members(get, start, size, is_known)
    samples = _group(members, broken)
    if damage:
        broken[damage if samples or damage == TAIL else _UNREADABLE] = 1
    # The last sample may lack members that lay behind the cut.
    if damage == CUT and samples:
        others = [sample.kinds() for sample in samples[:-1]]
        if not samples[-1].kinds() >= (set().union(*others) if others else {IMAGE, TXT}):
            samples.pop()
    return _whole(samples, broken), members


def samples_among(members, broken):
    """Returns the whole samples of a list of members; counts the others in `broken`."""
    return _whole(_group(members, broken), broken)


def is_known(name):
    """Returns whether members with a file name are looked at, by its ending."""
    return _ending(name) in _KNOWN


_KNOWN = set().union(*SLOTS) | _OTHERS
_SLOT = {ending: slot for slot, endings in enumerate(SLOTS) for ending in endings}


def _ending(name):
    return name.rpartition(".")[2].lower() if "." in name else ""


def _group(members, broken):
    """Returns the `Sample` of adjacent members with the same key.

    The key of `a.seg.png` is `a`, up to the first dot, as in the webdataset package. There it is the member `seg.png`
    of the sample `a`. Where no sample `a` exists, as in `shot v1.2.png`, the dot belongs to the key. Members that are
    no image may be fields of the sample `a` next to them.
    """
    plain_keys = set()
    if any(member.name.count(".") > 1 for member in members):
        plain_keys = {
            (archive, folder, name.partition(".")[0])
            for archive, folder, name, *_ in members
            if name.count(".") == 1 and _ending(name) in _SLOT
        }
    samples, dotted = [], {}
    waiting = []  # further members before the sample that they may belong to
    for member in members:
        archive, folder, name, *_ = member
        stem, _, ending = name.rpartition(".")
        key, slot = (archive, folder, stem), _SLOT.get(ending.lower())
        first = (archive, folder, stem.partition(".")[0]) if "." in stem else None
        is_dotted = first in plain_keys
        if is_dotted and slot is not None:
            dotted.setdefault(key, set()).add(slot)
        if is_dotted or slot is None:
            owner = first if is_dotted else key
            if slot == IMAGE or member.size == NO_DATA:
                continue
            if samples and samples[-1].key == owner:
                _add_other(samples[-1], member)
            else:
                waiting = [(key, other) for key, other in waiting if key == owner] + [(owner, member)]
            continue
        if not samples or samples[-1].key != key:
            samples.append(Sample(key, member))
            before = [other for owner, other in waiting if owner == key]
            for other in before:
                _add_other(samples[-1], other)
            samples[-1].first = before[0] if before else member
            samples[-1].last = member
        waiting.clear()
        samples[-1].slots.setdefault(slot, []).append(member)
        samples[-1].last = member
    # `a.v2.png` with a caption `a.v2.txt` looks like a sample of its own beside `a.png`.
    broken[_DOTS] += sum(IMAGE in slots and len(slots) > 1 for slots in dotted.values())
    return samples


def _add_other(sample, member):
    """Adds a further member to a sample, under the part of its name behind the key."""
    sample.others[member.name[len(sample.key[2]) + 1 :].lower()] = member
    sample.last = member


def _whole(samples, broken):
    """Returns the samples that are whole; counts the others.

    Samples of the same name are kept where each of them has all members.
    """
    same_key = {}
    for sample in samples:
        same_key.setdefault(sample.key, []).append(sample.slots)
    apart = set()
    for key, parts in same_key.items():
        if len(parts) > 1 and not all(IMAGE in part and part.keys() == parts[0].keys() for part in parts):
            apart.add(key)
    broken[APART] += len(apart)
    whole = []
    for sample in samples:
        if sample.key in apart:
            continue
        if problem := _problem(sample.slots):
            broken[problem] += 1
        else:
            whole.append(sample)
    return whole


def _problem(slots):
    """Returns the reason why a sample with these members is left out, or None."""
    if IMAGE not in slots:
        return _NO_IMAGE
    reason = None
    for members in slots.values():
        if len(members) > 1:
            return _DOUBLE
        if members[0].size == NO_DATA:
            reason = _LINK
    return reason


def raw_record(image, txt, meta, cls, others=(), lines=False):
    """Returns the raw record of a sample: the JSON's fields, those of others, `image`, and `txt` and `cls` if any.

    A field of `a.json` has precedence over one of the same name in another member.

    Args:
      image, txt, meta, cls: bytes of the members, or None.
      others: `{ending: bytes}`. An object in `X.json` and the arrays of `npz` are fields; another value of `X.json`
        and a text are fields under the whole ending.
      lines: bool, whether each line of `txt` is a caption.

    Raises BadRecord for a damaged JSON or npz.
    """
    record = dict(_read_json(meta, dict)) if meta is not None else {}
    for ending, data in dict(others).items():
        if ending.endswith("json"):
            value = _read_json(data)
            found = value if isinstance(value, dict) else {ending: value}
        elif ending.endswith(_ARRAYS):
            found = _read_arrays(data)
        else:
            found = {ending: data.strip()}
        record = found | record
    record["image"] = image
    if txt is not None:
        record["txt"] = lines_of(plain(txt)) if lines else txt
    if cls is not None:
        record["cls"] = cls.strip()
    return record


def lines_of(text):
    """Returns the lines of a text that are not blank."""
    return [line for line in _LINE_END.split(text) if line.strip()]


def _read_json(data, kind=lambda value: value):
    try:
        return kind(json.loads(data))
    except (ValueError, TypeError, RecursionError):
        raise BadRecord("malformed json") from None


def _read_arrays(data):
    """Returns `{name: array}` of an npz archive; raises BadRecord for a damaged one, and one of Python objects."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except NPZ_ERRORS:
        raise BadRecord("malformed npz") from None
