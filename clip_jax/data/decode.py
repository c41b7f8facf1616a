"""Decodes bytes and arrays to upright 8-bit RGB images with Pillow. An unusable image raises `BadRecord`."""

import io

import numpy as np
from PIL import Image, ImageFile, ImageOps

from clip_jax.data.records import BadRecord

MAX_PIXELS = 2**26  # 67 million pixels, 200 MB decoded
SMALL_PIXELS = 256 * 256  # an image up to this size is decoded whole, and the loader may keep it in memory
WHITE = (255, 255, 255)
_EXIF_ORIENTATION = 0x0112
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


def open_image(data, max_pixels=MAX_PIXELS):
    """Opens an image as an upright PIL image.

    The pixels of a large JPEG are not read yet, so that `shrink_on_load` can decode it at a reduced scale; `load` reads
    them. An animation gives its first frame.

    Args:
      data: encoded bytes, a uint8 array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]`, or a PIL image.
      max_pixels: int, the largest number of pixels. The header is checked, before pixels are decoded.

    Returns:
      A PIL image in mode "RGB", or "RGBA" when some pixel is transparent.

    Raises BadRecord for an image that is missing, corrupt, truncated or too large.
    """
    if type(data) is Image.Image and data.mode in ("RGB", "RGBA"):  # decoded before
        return data
    image = _from_array(data) if isinstance(data, np.ndarray) else data
    if not isinstance(image, Image.Image):
        if not data:
            raise BadRecord("empty image")
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadRecord("image too large") from None
        except Exception:  # Pillow's plugins raise almost any class on a broken file
            raise BadRecord("corrupt image") from None
        image.decodermaxblock = len(data)  # one block: the decoder never has to stop and resume
    if image.width * image.height > max_pixels:
        raise BadRecord("image too large")
    if image.width * image.height == 0:
        raise BadRecord("corrupt image")
    is_rgb_jpeg = image.format == "JPEG" and image.mode == "RGB"
    if is_rgb_jpeg and image.width * image.height > SMALL_PIXELS and _orientation(image) == 1:
        return image
    return _to_rgb(load(image))


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


def _orientation(image):
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # broken EXIF does not make the image unusable
        return 1


def _to_rgb(image):
    try:
        if _orientation(image) in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8bit(image)
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            return image if image.getextrema()[3][0] < 255 else image.convert("RGB")
        return image.convert("RGB")
    except Exception:
        raise BadRecord("corrupt image") from None


def _to_8bit(image):
    """Scales 16-bit, 32-bit and float grey values; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        top = 1.0 if values.max() <= 1 else 255.0
    else:
        top = 65535.0 if values.max() <= 65535 else float(values.max())
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))
