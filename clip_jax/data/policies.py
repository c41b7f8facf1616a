"""The distortions of AutoAugment and RandAugment, and the tables that choose among them."""

from PIL import Image, ImageEnhance, ImageOps


def distort(image, name, level, sign, fill):
    """Applies an operation of the policies at strength `level` in [0, 1]; `sign` is 1 or -1."""
    turn = sign * level
    match name:
        case "identity":
            return image
        case "shear_x":
            return _affine(image, (1, 0.3 * turn, 0, 0, 1, 0), fill)
        case "shear_y":
            return _affine(image, (1, 0, 0, 0.3 * turn, 1, 0), fill)
        case "translate_x":
            return _affine(image, (1, 0, 150 / 331 * turn * image.width, 0, 1, 0), fill)
        case "translate_y":
            return _affine(image, (1, 0, 0, 0, 1, 150 / 331 * turn * image.height), fill)
        case "rotate":
            return image.rotate(30 * turn, fillcolor=fill)
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1 + 0.9 * turn)
        case "color":
            return ImageEnhance.Color(image).enhance(1 + 0.9 * turn)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(1 + 0.9 * turn)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1 + 0.9 * turn)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(4 * level))
        case "solarize":
            return ImageOps.solarize(image, 256 * (1 - level))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
    raise ValueError(f"unknown distortion {name!r}")


def _affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


RANDAUGMENT = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)


def _policy(table):
    """Returns a table of lines with two operations each, written name:probability:level with a level in 0..9."""
    lines = [[part.split(":") for part in line.split()] for line in table.strip().splitlines()]
    return tuple(tuple((name, float(p), int(level)) for name, p, level in line) for line in lines)


AUTOAUGMENT = _policy("""
posterize:0.4:8  rotate:0.6:9
solarize:0.6:5   autocontrast:0.6:0
equalize:0.8:0   equalize:0.6:0
posterize:0.6:7  posterize:0.6:6
equalize:0.4:0   solarize:0.2:4
equalize:0.4:0   rotate:0.8:8
solarize:0.6:3   equalize:0.6:0
posterize:0.8:5  equalize:1.0:0
rotate:0.2:3     solarize:0.6:8
equalize:0.6:0   posterize:0.4:6
rotate:0.8:8     color:0.4:0
rotate:0.4:9     equalize:0.6:0
equalize:0.0:0   equalize:0.8:0
invert:0.6:0     equalize:1.0:0
color:0.6:4      contrast:1.0:8
rotate:0.8:8     color:1.0:2
color:0.8:8      solarize:0.8:7
sharpness:0.4:7  invert:0.6:0
shear_x:0.6:5    equalize:1.0:0
color:0.4:0      equalize:0.6:0
equalize:0.4:0   solarize:0.2:4
solarize:0.6:5   autocontrast:0.6:0
invert:0.6:0     equalize:1.0:0
color:0.6:4      contrast:1.0:8
equalize:0.8:0   equalize:0.6:0
""")
