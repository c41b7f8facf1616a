"""Image augmentation: operations on PIL images with an explicit random generator, and the strings that name them.

An augmentation is a tuple of strings, such as `("rrc(0.9, 1.0)", "flip", "jitter(0.4, 0.4, 0.4, 0.1, p=0.8)")`. Each is
the name of an operation below and its arguments as Python literals. `size` is in pixels, by default the view's size;
`p` is the probability that an operation is applied.

An operation is `f(image, **arguments)`, or `f(image, rng, **arguments)` when it is random, and returns an image.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from clip_jax.data import decode, policies
from clip_jax.errors import UserError, did_you_mean
from clip_jax.plugins import parse_call

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAX_ASPECT = 16  # of the result of `resize`
_OPERATIONS = {}


def _operation(function):
    """Registers an operation under the name of its function."""
    _OPERATIONS[function.__name__] = function
    return function


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A parsed augmentation: `pipeline(image, rng)` returns an "RGB" image of the view's size.

    Attributes:
      steps: operations with their arguments bound.
      random: for each step, whether it draws random numbers.
    """

    steps: tuple[Callable, ...]
    random: tuple[bool, ...]

    def __call__(self, image, rng):
        """Applies the steps to an image from `decode.open_image`; `rng` may be None when no step is random."""
        transparent = next((i for i, step in enumerate(self.steps) if step.func is drop_alpha), 0)  # steps that see it
        is_indexed = bool(transparent) and decode.is_indexed(image)
        for number, (step, is_random) in enumerate(zip(self.steps, self.random, strict=True)):
            if number < transparent:
                image = decode.load(image)
                if is_indexed and step.func in (resize, squash):
                    step = functools.partial(step, interpolation="nearest")
            elif step.func not in _TRANSPARENCY:
                image = decode.flatten(image)
            image = step(image, rng) if is_random else step(image)
        return decode.flatten(image)


@functools.lru_cache(maxsize=256)
def parse(spec, size):
    """Returns the `Pipeline` of an augmentation.

    Args:
      spec: tuple of str.
      size: int, side of the view in pixels.

    Raises UserError for an operation that cannot run, and for a pipeline that ends at another size.
    """
    steps, random = [], []
    for text in spec:
        function, kwargs, settable = bind(text, _OPERATIONS, ("image", "rng"))
        is_random = "rng" in inspect.signature(function).parameters
        if "size" in settable:
            kwargs.setdefault("size", size)
        steps.append(functools.partial(function, **kwargs))
        random.append(is_random)
        _try(steps[-1], is_random, text)
    functions = [step.func for step in steps]
    first = functions[: functions.index(drop_alpha)] if drop_alpha in functions else []
    if wrong := [function.__name__ for function in first if function not in _BEFORE_DROP_ALPHA]:
        allowed = ", ".join(function.__name__ for function in _BEFORE_DROP_ALPHA)
        raise UserError(f"augment: {list(spec)}: {wrong[0]} before drop_alpha; allowed before it are {allowed}")
    pipeline = Pipeline(tuple(steps), tuple(random))
    result = pipeline(Image.new("RGB", (48, 40)), np.random.default_rng(0)).size
    if result != (size, size):
        raise UserError(
            f"augment: {list(spec)} gives {result[0]}x{result[1]} pixels from a 48x40 image, the view needs "
            f"{size}x{size}; end it with rrc, squash, center_crop, random_crop or pad"
        )
    return pipeline


def bind(text, operations, given):
    """Reads the call of an operation.

    Args:
      text: str, such as "flip" or "rrc(0.5, 1.0)".
      operations: `{name: function}`.
      given: names of the parameters that the pipeline passes, which the text cannot set.

    Returns:
      `(function, kwargs, settable)`: its arguments by name, and the names of all parameters that may be set.

    Raises UserError for an unknown operation and for unknown arguments.
    """
    name, args, kwargs = parse_call(text, "augment")
    if name not in operations:
        hint = did_you_mean(name, operations)
        raise UserError(f"augment: unknown operation {name!r}{hint}; known: {', '.join(sorted(operations))}")
    settable = [parameter for parameter in inspect.signature(operations[name]).parameters if parameter not in given]
    if len(args) > len(settable) or not set(kwargs) <= set(settable) or set(settable[: len(args)]) & set(kwargs):
        raise UserError(f"augment: {text!r} does not fit {name}({', '.join(settable)})")
    return operations[name], dict(zip(settable, args, strict=False)) | kwargs, settable  # args may be fewer


def _try(step, is_random, text):
    """Runs a step once on a small image, applied whatever its probability; raises UserError for a wrong argument."""

    class Heads(np.random.Generator):
        def random(self, *args, **kwargs):
            return 0.0 if not args and not kwargs else super().random(*args, **kwargs)

    try:
        image = Image.new("RGB", (48, 40))
        step(image, Heads(np.random.PCG64(0))) if is_random else step(image)
    except Exception as error:
        raise UserError(f"augment: {text!r}: {error}") from None


def _heads(rng, p):
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} is not a probability")
    return rng.random() < p


def _filter(name):
    if name not in _FILTERS:
        raise ValueError(f"interpolation {name!r} is not one of {', '.join(_FILTERS)}")
    return _FILTERS[name]


# Geometry


@_operation
def rrc(
    image, rng, min_area=0.08, max_area=1.0, ratio=(3 / 4, 4 / 3), size=None, interpolation="bicubic", antialias=True
):
    """Random resized crop with torchvision's distribution.

    Draws up to ten boxes with a random share of the image's area and a random aspect ratio; when none fits, takes the
    centre. `antialias` is that of `squash`.
    """
    box = _random_box(image.size, rng, min_area, max_area, ratio)
    if not antialias:
        return _resize_plainly(decode.flatten(decode.load(image).crop(box)), size, interpolation)
    image, box = decode.shrink_on_load(image, box, size)
    return decode.resize(decode.flatten(image), (size, size), _filter(interpolation), box)


def _random_box(image_size, rng, min_area, max_area, ratio):
    if not 0 < min_area <= max_area <= 1:
        raise ValueError(f"areas {min_area}, {max_area} are not shares 0 < min <= max <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio {ratio} is not 0 < min <= max")
    width, height = image_size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area, aspect, x, y = rng.random(4).tolist()
        area = (min_area + (max_area - min_area) * area) * width * height
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@_operation
def resize(image, size=None, interpolation="bicubic"):
    """Resizes the short side to `size` and keeps the aspect ratio.

    An image whose long side exceeds 16 times its short side gives its central part, 16 * size pixels long. So memory
    does not depend on the image's shape. `center_crop` takes the same pixels as it would from the whole image.
    """
    width, height = image.size
    if width <= height:
        shape = (size, max(size, int(size * height / width)))
    else:
        shape = (max(size, int(size * width / height)), size)
    if shape == image.size:
        return image
    if max(shape) > _MAX_ASPECT * size:
        return _resize_centre(image, shape, size, _filter(interpolation))
    return image.resize(shape, _filter(interpolation))


def _resize_centre(image, shape, size, resample):
    """Returns the central part, `_MAX_ASPECT` * size pixels long, of the image resized to `shape`."""
    axis = 0 if shape[0] > shape[1] else 1
    length, target = image.size[axis], shape[axis]
    # A multiple of 4 pixels is left out, so `center_crop` rounds as it does for the whole image.
    kept = _MAX_ASPECT * size + (target - _MAX_ASPECT * size) % 4
    scale = length / target
    start, stop = (target - kept) // 2 * scale, (target + kept) // 2 * scale
    margin = math.ceil(3 * max(scale, 1)) + 1  # the widest filter reaches 3 pixels to each side
    low, high = max(0, math.floor(start) - margin), min(length, math.ceil(stop) + margin)
    part, box = [0, 0, *image.size], [0, 0, *image.size]
    part[axis], part[axis + 2] = low, high
    box[axis], box[axis + 2] = start - low, min(stop, high) - low
    return image.crop(tuple(part)).resize((kept, size) if axis == 0 else (size, kept), resample, tuple(box))


@_operation
def squash(image, size=None, interpolation="bicubic", antialias=True):
    """Resizes to size x size and ignores the aspect ratio.

    antialias=False, for bilinear and bicubic, is `tf.image.resize`: big_vision's published models and coyo-align have
    bilinear, FLIP has bicubic.
    """
    if antialias:
        return decode.resize(image, (size, size), _filter(interpolation))
    return _resize_plainly(image, size, interpolation)


def _resize_plainly(image, size, interpolation):
    """`tf.image.resize` to size x size without antialiasing."""
    kernels = {"bilinear": _bilinear, "bicubic": _bicubic}
    if interpolation not in kernels:
        raise ValueError("antialias=False needs interpolation='bilinear' or 'bicubic'")
    return Image.fromarray(kernels[interpolation](np.asarray(image), size))


def _bilinear(image_HWC, size):
    """Bilinear resize with half-pixel centres and no antialiasing, truncated to uint8 `[size, size, channels]`."""

    def taps(length):
        centre = np.maximum(
            (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5), 0
        )
        low = np.floor(centre).astype(np.int64)
        return np.minimum(low, length - 1), np.minimum(low + 1, length - 1), centre - low

    (y0, y1, fy), (x0, x1, fx) = taps(image_HWC.shape[0]), taps(image_HWC.shape[1])

    def pixels(y, x):
        return image_HWC[y[:, None], x].astype(np.float32)  # only these, as the image may be far larger

    fx = fx[None, :, None]
    top = pixels(y0, x0) + (pixels(y0, x1) - pixels(y0, x0)) * fx
    bottom = pixels(y1, x0) + (pixels(y1, x1) - pixels(y1, x0)) * fx
    return (top + (bottom - top) * fy[:, None, None]).astype(np.uint8)


def _bicubic(image_HWC, size):
    """Bicubic resize (Keys 1981, a = -1/2) with half-pixel centres and no antialiasing, uint8 `[size, size, channels]`.

    Taps outside of the image have no weight, as in TensorFlow. The result is rounded and clipped, which FLIP's is not.
    """

    def taps(length):
        centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5)
        places = np.floor(centre).astype(np.int64)[:, None] + np.arange(-1, 3)
        d = np.abs(centre[:, None] - places)
        weights = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
        weights *= (places >= 0) & (places < length)
        return np.clip(places, 0, length - 1), (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    (y, wy), (x, wx) = taps(image_HWC.shape[0]), taps(image_HWC.shape[1])
    pixels = image_HWC[y.reshape(-1, 1), x.reshape(1, -1)].astype(np.float32).reshape(size, 4, size, 4, -1)
    return np.clip(np.einsum("iajbc,ia,jb->ijc", pixels, wy, wx).round(), 0, 255).astype(np.uint8)


@_operation
def center_crop(image, size=None, rounding="even"):
    """Crops the central size x size pixels; a smaller image gets a black border.

    `rounding` is that of half of an odd margin: "even", to the nearest even number, as in torchvision and open_clip, or
    "down", as in Hugging Face transformers.
    """
    if rounding not in ("even", "down"):
        raise ValueError(f"rounding {rounding!r} is not one of even, down")
    margins = (image.width - size, image.height - size)
    return _crop(image, size, *(margin // 2 if rounding == "down" else round(margin / 2) for margin in margins))


@_operation
def random_crop(image, rng, size=None):
    """Crops size x size pixels at a random place; a smaller image gets a black border."""
    draws = rng.random(2).tolist()
    left, top = (
        int(draw * (side - size + 1)) if side > size else round((side - size) / 2)
        for draw, side in zip(draws, image.size, strict=True)
    )
    return _crop(image, size, left, top)


def _crop(image, size, left, top):
    return image.crop((left, top, left + size, top + size))


@_operation
def pad(image, size=None, color=(255, 255, 255), interpolation="bicubic"):
    """Resizes the long side to `size`, the short side to at least 1 pixel, and centres it on a square of `color`."""
    width, height = image.size
    shape = [max(1, round(side / max(width, height) * size)) for side in image.size]
    canvas = Image.new(image.mode, (size, size), tuple(color))
    resized = decode.resize(image, tuple(shape), _filter(interpolation))
    canvas.paste(resized, (round((size - shape[0]) / 2), round((size - shape[1]) / 2)))
    return canvas


@_operation
def flip(image, rng, p=0.5):
    """Mirrors the image horizontally."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _heads(rng, p) else image


# Transparency. `background` and `random_background` come first: all other operations put the image on white.


@_operation
def background(image, color):
    """Puts transparent pixels on a colour (red, green, blue), 0 to 255 each."""
    return decode.flatten(image, color)


@_operation
def random_background(image, rng, p=1.0):
    """Puts transparent pixels on a random colour with probability p, else on white."""
    color = rng.integers(0, 256, 3).tolist()
    return decode.flatten(image, tuple(color) if _heads(rng, p) else decode.WHITE)


@_operation
def drop_alpha(image):
    """Leaves transparency out, so that the colours under it show, as Pillow's `convert("RGB")` does.

    First, it is what big_vision and transformers before 5.23 do. After `resize` and crops it is what OpenAI's CLIP and
    open_clip do: Pillow resizes a transparent image with its colours weighted by alpha, and one with a palette by the
    nearest pixel.
    """
    return decode.load(image).convert("RGB")


_TRANSPARENCY = (rrc, background, random_background, drop_alpha)  # these read pixels or transparency as they need
_BEFORE_DROP_ALPHA = (resize, squash, center_crop, random_crop, flip)


# Colour


@_operation
def jitter(image, rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=1.0):
    """Colour jitter in random order, with torchvision's strengths.

    A strength s gives a factor in [1 - s, 1 + s]; `hue` gives a shift in [-hue, hue] of a full turn.
    """
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        raise ValueError("strengths are >= 0, and hue <= 0.5")
    if not _heads(rng, p):
        return image
    draws = rng.random(4).tolist()
    for i in rng.permutation(4).tolist():
        strength = (brightness, contrast, saturation, hue)[i]
        if strength and i == 3:
            image = _shift_hue(image, strength * (2 * draws[i] - 1))
        elif strength:
            low = max(0.0, 1 - strength)
            image = _ENHANCERS[i](image).enhance(low + (1 + strength - low) * draws[i])
    return image


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _shift_hue(image, turns):
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turns * 255) % 256
    return Image.merge("HSV", (hue.point([(i + shift) % 256 for i in range(256)]), saturation, value)).convert("RGB")


@_operation
def gray(image, rng, p=0.2):
    """Converts to grey values."""
    return image.convert("L").convert("RGB") if _heads(rng, p) else image


@_operation
def blur(image, rng, min_sigma=0.1, max_sigma=2.0, p=0.5):
    """Gaussian blur; its standard deviation in pixels is uniform in [min_sigma, max_sigma]."""
    if not 0 <= min_sigma <= max_sigma:
        raise ValueError(f"sigmas {min_sigma}, {max_sigma} are not 0 <= min <= max")
    if not _heads(rng, p):
        return image
    return image.filter(ImageFilter.GaussianBlur(min_sigma + (max_sigma - min_sigma) * rng.random()))


@_operation
def solarize(image, rng, p=0.2, threshold=128):
    """Inverts all values of at least `threshold`."""
    return ImageOps.solarize(image, threshold) if _heads(rng, p) else image


# Learned and random policies


@_operation
def autoaugment(image, rng, fill=(128, 128, 128)):
    """AutoAugment with the ImageNet policy (Cubuk et al. 2019): one of 25 pairs of operations with probabilities."""
    for name, p, level in policies.AUTOAUGMENT[rng.integers(len(policies.AUTOAUGMENT))]:
        if _heads(rng, p):
            image = policies.distort(image, name, level / 9, 1 if rng.random() < 0.5 else -1, tuple(fill))
    return image


@_operation
def randaugment(image, rng, n=2, magnitude=9, fill=(128, 128, 128)):
    """RandAugment (Cubuk et al. 2020): n operations drawn with replacement, at strength magnitude / 30."""
    if not (n >= 0 and 0 <= magnitude <= 30):
        raise ValueError(f"n={n}, magnitude={magnitude} are not n >= 0, 0 <= magnitude <= 30")
    for i in rng.integers(len(policies.RANDAUGMENT), size=n).tolist():
        image = policies.distort(
            image, policies.RANDAUGMENT[i], magnitude / 30, 1 if rng.random() < 0.5 else -1, tuple(fill)
        )
    return image


def normalize(image, mean=CLIP_MEAN, std=CLIP_STD):
    """Returns (image / 255 - mean) / std, uint8 `[..., 3]` -> float32; a model does the same on the device."""
    return (image.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
