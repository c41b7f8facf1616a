"""Draws texts as images with GNU Unifont, the input of CLIPPO (Tschannen et al. 2023, section 3.1).

    font = make_tokenizer("unifont")                   # the font in the package: Unifont 15.0.01, plane 0
    images = font(["octopus", "문어"], 64)              # uint8 [2, 64, 64, 1]: background 127, ink 0

Given the same font, the images equal those of the published code (big_vision, `render_unifont`) bit for bit. The
published checkpoints were trained with Unifont 9.0.06, `unifont.hex` and `unifont_upper.hex` (unifoundry.com). Letters
of scripts that join or stack are drawn one by one.
"""

import gzip
import logging
import re

import numpy as np

from clip_jax.data.tokenizers.base import TextInput
from clip_jax.errors import UserError

BACKGROUND, INK = 127, 0
ROW = 16  # pixels: the height of a glyph, and its largest width
MAX_CHARS = 768  # code points of a text that are drawn

logger = logging.getLogger(__name__)


class Font(TextInput):
    """A bitmap font in the .hex format; replaces a tokenizer.

    Glyphs are trimmed to a gap of one pixel on the left and a width of at least 4 pixels. Rows break between any two
    characters, and rows below the image are left out. A character without a glyph is a gap of 4 pixels; a warning names
    the first one.

    Args:
      data: bytes, plain or gzipped: lines of code point, colon, and 32 (8 x 16 pixels) or 64 (16 x 16 pixels)
        hexadecimal digits. Several files joined by `cat` are one font.
      lower: bool, whether A to Z are drawn as a to z; other letters keep their case.
      monospace: bool, whether glyphs are not trimmed.

    Raises UserError for a line in another format.
    """

    kind, file = "unifont", "unifont.hex.gz"
    vocab_size = 0  # it has no ids
    pad_id = eot_id = -1
    sot_id = mask_id = None

    def __init__(self, data, *, lower=True, monospace=False):
        super().__init__(data, lower=lower, monospace=monospace)
        codes, ink = _parse(data)
        columns = np.packbits(ink.transpose(0, 2, 1), axis=2).view(np.uint16)[..., 0]  # [glyphs, 16], 16 pixels each
        is_blank = ~columns.any(1)
        first = np.maximum((columns > 0).argmax(1) - 1, 0)
        end = np.minimum(np.maximum(ROW - (columns > 0)[:, ::-1].argmax(1), first + 4), ROW)
        first, end = np.where(is_blank, 0, first), np.where(is_blank, 4, end)
        if monospace:
            first, end = np.zeros_like(first), np.full_like(end, ROW)
        self._width = end - first
        self._start = ROW * np.arange(len(codes)) + first
        self._columns = columns.reshape(-1)
        # The glyph of each code point. 0, a blank, stands for a missing glyph and all code points beyond the last.
        self._glyph = np.zeros(max(codes.max(), 127) + 2, np.int32)
        self._glyph[codes[1:]] = np.arange(1, len(codes))
        if lower:
            self._glyph[ord("A") : ord("Z") + 1] = self._glyph[ord("a") : ord("z") + 1]
        self._warned = False

    def __call__(self, texts, context):
        """Returns the drawn texts, uint8 `[len(texts), context, context, 1]`.

        Args:
          texts: list of str.
          context: int, side of the images in pixels, a multiple of 16 of at least 32.

        Raises UserError for another `context`.
        """
        if isinstance(texts, str):
            raise TypeError("a font takes a list of texts, not one string")
        if context < 2 * ROW or context % ROW:
            raise UserError(
                f"images of text with {context} pixels a side: a multiple of {ROW} from {2 * ROW} on is needed"
            )
        images = np.full((len(texts), context, context, 1), BACKGROUND, np.uint8)
        for image, text in zip(images, texts, strict=True):
            rows = self._rows(text[:MAX_CHARS], context)
            bits = np.unpackbits(rows.view(np.uint8).reshape(-1, context, 2), axis=2)  # [rows, columns, 16]
            lines = image[: ROW * len(rows)].reshape(-1, ROW, context)
            np.multiply(bits.transpose(0, 2, 1) ^ 1, BACKGROUND, out=lines)
        return images

    def _rows(self, text, size):
        """Returns the rows that hold glyphs, uint16 `[rows, size]`: each number is a column of 16 pixels."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        if not len(codes):
            return np.zeros((0, size), np.uint16)
        glyphs = self._glyph.take(codes, mode="clip")
        if not self._warned and not glyphs.all():
            self._warned, missing = True, text[int((glyphs == 0).argmax())]
            message = "the font has no glyph for %r (U+%04X); characters without a glyph are drawn as gaps"
            logger.warning(message, missing, ord(missing))
        widths = self._width[glyphs]
        ends = widths.cumsum()
        row_of = ends // (size - widths.max())
        count = min(row_of[-1] + 1, size // ROW)
        breaks = np.searchsorted(row_of, np.arange(count + 1))  # first glyph of each row
        begins = np.concatenate([[0], ends])
        edges = begins[breaks]  # first column of each row
        kept = slice(0, breaks[-1])
        source = np.repeat(self._start[glyphs[kept]] - begins[:-1][kept], widths[kept])
        source += np.arange(len(source))
        columns = self._columns[source]
        rows = np.zeros((count, size), np.uint16)
        for row, start, end in zip(rows, edges, edges[1:], strict=False):
            row[: end - start] = columns[start:end]
        return rows


def _parse(data):
    """Returns the code points, int64 `[glyphs]`, and the ink, uint8 0 or 1 `[glyphs, 16, 16]`, of a .hex file.

    The first glyph is a blank with code point -1.
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise UserError(f"the file is not a whole gzip file ({error})") from None
    codes, digits = {32: [-1], 64: []}, {32: [b"0" * 32], 64: []}
    for number, line in enumerate(data.splitlines(), 1):
        code, _, bits = line.strip().partition(b":")
        if len(bits) not in digits or not re.fullmatch(rb"[0-9A-Fa-f]{4,6}:[0-9A-Fa-f]+", line.strip()):
            if not line.strip():
                continue
            raise UserError(
                f"line {number} is not a code point, a colon and 32 or 64 hex digits, as in a .hex font: {line[:80]!r}"
            )
        codes[len(bits)].append(int(code, 16))
        digits[len(bits)].append(bits)
    if len(codes[32]) + len(codes[64]) == 1:
        raise UserError("the file has no glyphs")
    narrow, wide = (
        np.frombuffer(bytes.fromhex(b"".join(digits[n]).decode()), np.uint8).reshape(-1, ROW, n // 32) for n in (32, 64)
    )
    ink = np.unpackbits(np.concatenate([np.pad(narrow, ((0, 0), (0, 0), (0, 1))), wide]), axis=2)
    return np.asarray(codes[32] + codes[64]), ink
