"""Decodes bytes and arrays to upright 8-bit RGB images with Pillow. An unusable image raises `BadRecord`."""

import io

import numpy as np
from PIL import Image, ImageFile

from clip_jax.data.records import BadRecord

MAX_PIXELS = 2**26  # 67 million pixels, 200 MB decoded
SMALL_PIXELS = 256 * 256  # an image up to this size is decoded whole, and the loader may keep it in memory
WHITE = (255, 255, 255)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_INDEXED = "clip_jax.indexed"  # key of an image's `info`
_ROOM = 16  # `resize` makes no image with more pixels than the given image, or this multiple of the result
_LONGEST = 2**19  # pixels of a side that `resize` filters; a longer side is averaged first
_VALUES_AT_ONCE = 2**20  # grey values that are scaled to 8 bits in one go, 8 MB each in float64


def open_image(data, max_pixels=MAX_PIXELS):
    """Opens an image as an upright PIL image.

    The pixels of a large JPEG are not read yet, so that `shrink_on_load` can decode it at a reduced scale; `load` reads
    them. An animation gives its first frame.

    Args:
      data: encoded bytes, a uint8 array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]`, or a PIL image.
      max_pixels: int, the largest number of pixels. The header is checked, before pixels are decoded.

    Returns:
      A PIL image in mode "RGB", or "RGBA" when some pixel is transparent.

    Raises BadRecord for an image that is missing, corrupt, truncated or too large, and for a format that Pillow does
    not read; the reason names HEIC, AVIF, JPEG XL, SVG and HTML.
    """
    if type(data) is Image.Image and data.mode in ("RGB", "RGBA"):  # decoded before
        return data
    image = _from_array(data) if isinstance(data, np.ndarray) else data
    if not isinstance(image, Image.Image):
        if not data:
            raise BadRecord("empty image")
        if not isinstance(data, bytes | bytearray | memoryview):  # a field of text or numbers was named as the image
            raise BadRecord("image is not bytes")
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadRecord("image too large") from None
        except Exception:  # Pillow's plugins raise almost any class on a broken file
            raise BadRecord(_unreadable(data)) from None
        image.decodermaxblock = len(data)  # one block: the decoder never has to stop and resume
    if image.width * image.height > max_pixels:
        raise BadRecord("image too large")
    if image.width * image.height == 0:
        raise BadRecord("corrupt image")
    is_rgb_jpeg = image.format == "JPEG" and image.mode == "RGB"
    if is_rgb_jpeg and image.width * image.height > SMALL_PIXELS and _orientation(image) == 1:
        return image
    return _to_rgb(load(image))


def is_indexed(image):
    """Returns whether an image that `open_image` returned had a palette, or black and white pixels alone."""
    return _INDEXED in image.info


def load(image):
    """Reads the pixels of an image that `open_image` returned; raises BadRecord when they are corrupt."""
    try:
        image.load()
    except Exception:
        raise BadRecord("corrupt image") from None
    return image


def shrink_on_load(image, box, size):
    """Reads the pixels for a crop that is resized afterwards.

    An unread JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where the sides of the crop stay at least twice `size`.
    This saves most of the decoding, and the final resize still averages over pixels.

    Args:
      image: a PIL image that `open_image` returned.
      box: left, top, right, bottom of the crop in pixels.
      size: int, side of the resized crop in pixels.

    Returns:
      `(image, box)`: the image with its pixels read, and the box in its pixels.
    """
    left, top, right, bottom = box
    room = min(right - left, bottom - top) / (2 * size)
    if room >= 2 and isinstance(image, ImageFile.ImageFile) and image.format == "JPEG":
        width, height = image.size
        scale = 8 if room >= 8 else 4 if room >= 4 else 2
        image.draft(image.mode, (width // scale, height // scale))
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, right * x, bottom * y)
    return load(image), box


def resize(image, size, resample=Image.Resampling.BICUBIC, box=None):
    """Returns an image resized to `size`, as `PIL.Image.Image.resize` does, in memory bounded by both images.

    Pillow resizes the width before the height. For a narrow image of 1 x 60,000 pixels, the image between these passes
    would have the new width and the old height. Where it is far larger than both images, the height is resized first.

    Args:
      image: a PIL image with its pixels read.
      size: `(width, height)` in pixels.
      resample: a `PIL.Image.Resampling`.
      box: left, top, right, bottom of the part to resize, in pixels; None: the whole image.
    """
    factors = [max(1, side // _LONGEST) for side in image.size]
    if max(factors) > 1 and resample != Image.Resampling.NEAREST:
        box = tuple(edge / factor for edge, factor in zip(box or (0, 0, *image.size), factors * 2, strict=True))
        image = image.reduce(tuple(factors))
    left, top, right, bottom = box or (0, 0, *image.size)
    between = size[0] * (bottom - top)
    if between > max(_ROOM * size[0] * size[1], image.width * image.height):
        image = image.resize((image.width, size[1]), resample, (0, top, image.width, bottom))
        box = (left, 0, right, size[1])
    return image.resize(size, resample, box)


def flatten(image, background=WHITE):
    """Returns an "RGBA" image on a background colour (red, green, blue), or an "RGB" image with its pixels read."""
    if image.mode == "RGB":
        return load(image)
    canvas = Image.new("RGB", image.size, tuple(background))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def decode_image(data, background=WHITE, max_pixels=MAX_PIXELS):
    """Returns an image as uint8 `[h, w, 3]`, transparent pixels on `background`; input and errors as `open_image`."""
    return np.asarray(flatten(open_image(data, max_pixels), background))


def _from_array(array):
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise BadRecord(f"unsupported array {array.dtype}{list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


def _unreadable(data):
    """Returns the reason why Pillow does not open some bytes, from their first bytes."""
    start = bytes(data[:1024])
    if start[4:8] == b"ftyp":
        if start[8:12] in (b"avif", b"avis"):
            return "AVIF image"
        if start[8:12] in _HEIC_BRANDS:
            return "HEIC image"
    if start.startswith(b"\xff\x0a") or start.startswith(b"\0\0\0\x0cJXL \r\n\x87\n"):
        return "JPEG XL image"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML page, not an image"
    if text.startswith((b"<?xml", b"<!--", b"<!doctype", b"<svg")):
        if b"<svg" in text:
            return "SVG image"
        if b"<html" in text:
            return "HTML page, not an image"
    return "corrupt image"


def _orientation(image):
    """Returns the number of the EXIF orientation; 1, which is upright, for a missing, broken or unknown one."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # broken EXIF does not make the image unusable
        return 1


def _to_rgb(image):
    try:
        if (orientation := _orientation(image)) != 1:
            # Not by ImageOps.exif_transpose: it also writes the EXIF data anew, which fails for many real files.
            image = image.transpose(_UPRIGHT[orientation])
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8bit(image)
        indexed = {_INDEXED: True} if image.mode in ("P", "1") else {}
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            image = image if image.getextrema()[3][0] < 255 else image.convert("RGB")
        else:
            image = image.convert("RGB")
        image.info |= indexed
        return image
    except Exception:
        raise BadRecord("corrupt image") from None


def _to_8bit(image):
    """Scales 16-bit, 32-bit and float grey values; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image)
    highest = float(values.max())
    top = (1.0 if highest <= 1 else 255.0) if image.mode == "F" else max(65535.0, highest)
    scaled = np.empty(values.shape, np.uint8)
    flat, out = values.reshape(-1), scaled.reshape(-1)
    for start in range(0, len(flat), _VALUES_AT_ONCE):
        block = slice(start, start + _VALUES_AT_ONCE)
        out[block] = np.clip(np.rint(flat[block].astype(np.float64) * (255 / top)), 0, 255)
    return Image.fromarray(scaled)
