"""Tar shards in img2dataset's layout, in blocks that are one range of bytes each; the format of `shards`.

The headers of a block are read in memory, so that no index is needed. The rules of `tar_samples` look at a whole
shard: at names that stand in several places of it. A block therefore ends where the rules, applied to the block alone,
would find other samples than in the whole shard. Such a sample, and one that the rules leave out of the shard, lies
between two blocks.
"""

import re
from collections import Counter

from clip_jax.data import remote
from clip_jax.data.blocks import Block
from clip_jax.data.records import plain
from clip_jax.data.sources.ranges import heads
from clip_jax.data.sources.tar_members import read_members
from clip_jax.data.sources.tar_samples import (
    APART,
    CLS,
    IMAGE,
    JSON,
    TXT,
    is_known,
    raw_record,
    read_samples,
    samples_among,
)

BYTES = True


def scan(path, length=512):
    """Returns the blocks of a shard and what is broken, `{reason: count}`.

    A local shard is read at its headers alone, a remote one from front to end.

    Args:
      path: of the shard.
      length: int, samples of a block.

    Returns: `(rows, broken)`; `rows` is a list of (start, end, samples) in bytes.
    """
    broken = Counter()
    samples, members, size = read_shard(path, broken)
    position = {member.head: number for number, member in enumerate(members)}
    pending = [samples[first : first + length] for first in range(0, len(samples), length)][::-1]
    rows = []
    while pending:
        part = pending.pop()
        among = members[position[part[0].first.head] : position[part[-1].last.head] + 1]
        found = samples_among(among, Counter())
        if [(sample.spans, sample.others) for sample in found] == [(sample.spans, sample.others) for sample in part]:
            rows.append((part[0].start, min(part[-1].end, size), len(part)))
        elif len(part) > 1:
            half = len(part) // 2
            pending += [part[half:], part[:half]]
        else:
            broken[APART] += 1
    return rows, +broken


def read_shard(path, broken):
    """Returns the whole samples, the members and the bytes of a shard; counts the others in the Counter `broken`."""
    with heads(path) as (get, size):
        return *read_samples(get, 0, size, broken), size


def read(path, start, end, lines=False):
    """Returns the raw records of a block, a sequence; raises EOFError where the shard is shorter.

    Args:
      path: of the shard.
      start, end: ints, the block's range of bytes.
      lines: bool, whether each line of a .txt member is a caption.
    """
    data = remote.read(path, start, end)
    if len(data) < end - start:
        raise EOFError
    return records_of(data, lines)


def records_of(data, lines=False):
    """Returns the raw records of a part of a shard that begins and ends at headers, as `read` does.

    Args:
      data: bytes of the part.
      lines: bool, whether each line of a .txt member is a caption.
    """
    view = memoryview(data)
    members, _ = read_members(lambda offset, n: data[offset : offset + n], 0, len(data), is_known)
    samples = samples_among(members, Counter())

    def content(member):
        return bytes(view[member.offset : member.offset + member.size])

    def record(index):
        sample = samples[index]
        image, txt, meta, cls = (
            content(sample.slots[slot][0]) if slot in sample.slots else None for slot in (IMAGE, TXT, JSON, CLS)
        )
        others = {ending: content(member) for ending, member in sample.others.items()}
        return raw_record(image, txt, meta, cls, others, lines)

    return Block(len(samples), record)


def preferred(fields):
    """Returns the image field and the label field: a sample's own members, not fields of its JSON.

    A .cls member with a word in it names the class, of which only a selection makes labels.
    """
    is_member = isinstance(fields.get("cls"), bytes)
    cls = plain(fields["cls"]) if is_member else ""
    is_name = re.search(r"[^\W\d_]{2}", cls) and cls.lower() != "nan"
    return {"image": "image", "label": "cls" if is_member and not is_name else None}


def captions(raw):
    """Returns the caption field of a record: `.txt` where it is there."""
    return ("txt",) if "txt" in raw else None
