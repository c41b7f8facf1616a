"""The members of a tar archive, read from its headers: ustar, long names of GNU tar, and pax paths and sizes."""

import re
import zlib
from typing import NamedTuple

from clip_jax.data.files import is_hidden

CUT = "truncated shard"
TAIL = "unreadable data after the end of an archive"
NO_DATA = -1  # size of a member that is a link
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_FILES, _LINKS = b"0\x007", b"12"  # types of headers
_NO_CONTENT = b"123456"  # types without data behind the header
_PIECE = 2**20  # bytes that are read at once to pass zeros
_PAX = re.compile(rb"(\d+) ([^=]+)=")


class Member(NamedTuple):
    """A file or link of an archive.

    Attributes:
      archive: int, number of the archive; several may be joined in one file.
      folder, name: str, the path before and after its last slash.
      offset, size: ints, the data's place in bytes; the size is NO_DATA for a link.
      head: int, offset of the member's first header.
    """

    archive: int
    folder: str
    name: str
    offset: int
    size: int
    head: int


class _Damaged(Exception):
    """A header is cut off or not one."""


def read_members(get, start, size, wanted):
    """Returns the members of a shard from an offset on, and the reason why it is damaged or None.

    Args:
      get: a function of (offset, n), which returns the n bytes at an offset, fewer at the end.
      start: int, the offset of a header.
      size: int, the offset at which the data ends.
      wanted: a function of a file name; members for which it is false are left out, and hidden ones.
    """
    members, archive = [], 0
    while True:
        position = start
        try:
            while (block := get(position, _BLOCK)) != _ZEROS:
                head = position
                path, kind, length, position = _read_header(get, position, block)
                end = position + (0 if kind in _NO_CONTENT else -(-length // _BLOCK) * _BLOCK)
                if kind in _FILES or kind in _LINKS:
                    length = NO_DATA if kind in _LINKS else length
                    if position + length > size:
                        raise _Damaged
                    folder, _, name = path.rpartition("/")
                    if wanted(name) and not is_hidden(path):
                        members.append(Member(archive, folder, name, position, length, head))
                position = end
        except _Damaged:
            return members, TAIL if archive and not _is_header(get(start, _BLOCK)) else CUT
        if (start := _skip_zeros(get, position)) is None:
            return members, None
        archive += 1


def _read_header(get, position, block):
    """Returns the (path, type, size, offset of the data) of the member at a position.

    Extended headers before it give a long path or size. Raises _Damaged.

    Args:
      get: as of `read_members`.
      position: int, the offset of the header.
      block: the 512 bytes there.
    """
    path = size = None
    while True:
        if not _is_header(block):
            raise _Damaged
        kind, length = block[156:157], _number(block[124:136])
        position += _BLOCK
        if kind not in b"LKxXg":
            break
        data = get(position, length)
        if len(data) < length:
            raise _Damaged
        if kind == b"L":
            path = _text(data)
        elif kind in b"xX":
            found = _pax(data)
            path = _decode(found[b"path"]).rstrip("/") if b"path" in found else path
            size = _number(found[b"size"]) if b"size" in found else size
        position += -(-length // _BLOCK) * _BLOCK
        block = get(position, _BLOCK)
    if path is None:
        path = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            path = f"{_text(block[345:500])}/{path}"
    if kind == b"S":  # sparse files of GNU tar are not read; their maps may fill further blocks
        more = block[482]
        while more:
            more = (get(position, _BLOCK) + b"\0" * _BLOCK)[504]
            position += _BLOCK
    if kind == b"\0" and path.endswith("/"):  # a folder, in the oldest archives
        kind = b"5"
    return path, kind, length if size is None else size, position


def _is_header(block):
    """Returns whether 512 bytes are a header: whether they have the sum that stands in them."""
    if len(block) < _BLOCK:
        return False
    try:
        wanted = _number(block[148:156])
    except _Damaged:
        return False
    plain = block[:148] + b" " * 8 + block[156:]
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521, at a tenth of the time of `sum`.
    if (zlib.adler32(plain) & 0xFFFF) == (1 + wanted) % 65521:
        return True
    return wanted == sum(plain) - 256 * sum(byte > 127 for byte in plain)  # some old programs add signed bytes


def _number(field):
    """Returns the number in a field of a header, octal or base 256; raises _Damaged."""
    if field[:1] in (b"\x80", b"\xff"):
        value = int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    else:
        try:
            value = int(field.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            raise _Damaged from None
    if value < 0:
        raise _Damaged
    return value


def _pax(data):
    """Returns the records of an extended header, `{keyword: value}` in bytes; raises _Damaged."""
    found, position = {}, 0
    while match := _PAX.match(data, position):
        end = position + int(match[1])
        if int(match[1]) == 0 or end > len(data):
            raise _Damaged
        found[match[2]] = data[match.end() : end - 1]
        position = end
    if b"size" in found:
        try:
            found[b"size"] = b"%o" % int(found[b"size"])
        except ValueError:
            raise _Damaged from None
    return found


def _text(field):
    return _decode(field.partition(b"\0")[0])


def _decode(data):
    return data.decode("utf-8", "surrogateescape")


def _skip_zeros(get, position):
    """Returns the offset of the first block from a position on that is not all zeros, or None at the end."""
    while block := get(position, _PIECE):
        if kept := block.lstrip(b"\0"):
            return position + (len(block) - len(kept)) // _BLOCK * _BLOCK
        position += len(block)
    return None
