"""Images of the embedded data sets: from SVG to PNG, and from any format to small WebP with transparency."""

import io

from clip_jax.errors import UserError


def render_svg(svg, side=None):
    """Returns an SVG as PNG bytes.

    Args:
      svg: the file's text.
      side: width in pixels; None: the SVG's own.

    Raises UserError when resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering SVG needs resvg-py: pip install resvg-py (part of the extra 'dev')") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True))


def to_square(image):
    """Returns a PIL image centred on a transparent square, whose side is the longer side of the image."""
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def to_webp(image, side):
    """Returns a PIL image as WebP bytes that decode to four channels.

    An image whose longer side has more than `side` pixels is shrunk to it.
    """
    from PIL import Image

    image = image.convert("RGBA")
    scale = side / max(image.size)
    if scale < 1:
        size = tuple(max(1, round(length * scale)) for length in image.size)
        # Premultiplied alpha keeps the colour of transparent pixels out of the edges.
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")
    alpha_quality = 30
    if image.getextrema()[3][0] == 255:
        # WebP drops an alpha channel that is opaque everywhere, but the data sets declare four channels.
        image.putpixel((0, 0), (*image.getpixel((0, 0))[:3], 254))
        alpha_quality = 100
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=60, alpha_quality=alpha_quality, method=6)
    return buffer.getvalue()
