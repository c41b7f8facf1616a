import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BadRecord


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 2], -1).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(form):
    image = decode.decode_image(encode(Image.fromarray(gradient()), form))
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - gradient()).mean() < 12  # GIF has 256 colours


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated(form, keep):
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)), form)
    with pytest.raises(BadRecord, match="corrupt image"):
        decode.decode_image(data[: int(keep * len(data))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (None, "empty image"),
        ("http://x/1.jpg", "image is not bytes"),
        (5, "image is not bytes"),
        ([1, 2], "image is not bytes"),
        (b"not an image", "corrupt image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "corrupt image"),
        (bytes(1000), "corrupt image"),
    ],
)
def test_unusable_bytes(data, reason):
    with pytest.raises(BadRecord, match=reason):
        decode.decode_image(data)


def test_flipped_bits_in_the_middle():
    data = bytearray(encode(Image.fromarray(gradient(200, 200))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadRecord, match="corrupt image"):
        decode.decode_image(bytes(data))


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(40000, 25000), (10000, 10000), (2**30, 1)])
def test_too_many_pixels_is_known_from_the_header(width, height):
    # There is no pixel data at all behind this header: had it been decoded, it would be "corrupt image".
    data = png_header(width, height) + struct.pack(">I", 100) + b"IDAT" + bytes(100)
    with pytest.raises(BadRecord, match="image too large"):
        decode.decode_image(data)


def test_max_pixels_is_an_argument():
    data = encode(Image.fromarray(gradient()))
    assert decode.decode_image(data, max_pixels=48 * 64).shape == (48, 64, 3)
    with pytest.raises(BadRecord, match="image too large"):
        decode.decode_image(data, max_pixels=48 * 64 - 1)


def test_one_pixel():
    np.testing.assert_array_equal(decode.decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))), [[[1, 2, 3]]])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form):
    values = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    image = decode.decode_image(encode(Image.fromarray(values), form))
    np.testing.assert_array_equal(image, np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, -1))


def test_float_grey_is_scaled():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(
        decode.decode_image(encode(Image.fromarray(values), "TIFF"))[..., 0].ravel(), np.arange(256)
    )


def test_grey_and_one_bit():
    grey = Image.fromarray(gradient()[..., 0])
    np.testing.assert_array_equal(decode.decode_image(encode(grey)), gradient()[..., :1].repeat(3, -1))
    assert set(np.unique(decode.decode_image(encode(grey.convert("1"))))) == {0, 255}


def test_cmyk():
    image = Image.fromarray(gradient()).convert("CMYK")
    assert image.mode == "CMYK"
    decoded = decode.decode_image(encode(image, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - np.asarray(image.convert("RGB"))).mean() < 5


def test_palette_with_transparency():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    image.paste(1, (0, 0, 4, 8))
    decoded = decode.decode_image(encode(image, transparency=0), background=(10, 20, 30))
    np.testing.assert_array_equal(decoded[0, 0], (0, 255, 0))
    np.testing.assert_array_equal(decoded[0, 7], (10, 20, 30))
    np.testing.assert_array_equal(decode.decode_image(encode(image))[0, 7], (255, 0, 0))


def test_rgba_is_composited():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1] = (200, 100, 0, 255), (200, 100, 0, 128)
    decoded = decode.decode_image(encode(Image.fromarray(rgba)), background=(0, 0, 255))
    np.testing.assert_array_equal(decoded[0, 0], (200, 100, 0))
    np.testing.assert_allclose(decoded[0, 1], (100, 50, 127), atol=1)
    np.testing.assert_array_equal(decoded[1, 1], (0, 0, 255))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_gives_the_first_frame(form):
    frames = [Image.new("RGB", (9, 9), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_allclose(decode.decode_image(data)[4, 4], (255, 0, 0), atol=3)


@pytest.mark.parametrize("size", [(64, 48), (640, 480)])  # decoded at once, and large enough to be decoded late
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, size):
    pixels = gradient(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode.decode_image(encode(Image.fromarray(pixels), "JPEG", quality=95, exif=exif)).astype(int)
    by_hand = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    expected = by_hand[orientation](pixels)
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_matter():
    data = encode(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode.decode_image(data).shape == (48, 64, 3)


def raw_exif(entries):
    """Returns EXIF data of `(tag, type, count, four bytes)`, valid or not."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


TAGS = (0x010F, 0x0128, 0x011A, 0x8769, 0x8825, 0x9286, 0xEA1C, 0x014A, 0xA420)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(TAGS), st.integers(0, 14), st.integers(0, 9), st.binary(min_size=4, max_size=4))
def test_the_orientation_holds_whatever_other_tags_say(tag, kind, count, value):
    pixels = gradient(40, 60)
    data = encode(
        Image.fromarray(pixels),
        "JPEG",
        quality=95,
        exif=raw_exif([(0x0112, 3, 1, b"\x06\0\0\0"), (tag, kind, count, value)]),
    )
    turned = pixels.transpose(1, 0, 2)[:, ::-1]
    assert np.abs(decode.decode_image(data).astype(int) - turned).mean() < 4


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(number):
    exif = Image.Exif()
    exif[0x0112] = number
    assert decode.decode_image(encode(Image.fromarray(gradient()), "JPEG", exif=exif)).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC image"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF image"),
        (b"\xff\x0a\xfa\x1f\x01" + bytes(99), "JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL image"),
        (b"<!DOCTYPE html><html><body>Not Found", "HTML page, not an image"),
        (b"\xef\xbb\xbf\n <HTML lang=en>", "HTML page, not an image"),
        (b"<?xml version='1.0'?><!DOCTYPE html PUBLIC ''><html>", "HTML page, not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG image"),
        (b"<?xml version='1.0'?>\n<!-- Inkscape -->\n<svg/>", "SVG image"),
        (b"\0\0\0\x20ftypisom", "corrupt image"),
        (b"<", "corrupt image"),
    ],
)
def test_files_that_pillow_does_not_read_are_named(data, reason):
    with pytest.raises(BadRecord) as error:
        decode.decode_image(data)
    assert error.value.args == (reason,)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_bad_record(data):
    with pytest.raises(BadRecord):
        decode.decode_image(data)


def test_blocks_of_grey_values_have_one_scale(monkeypatch):
    monkeypatch.setattr(decode, "_VALUES_AT_ONCE", 100)
    values = np.arange(32 * 32, dtype=np.int32).reshape(32, 32) * 1000  # up to 1,023,000: scaled by the greatest
    expected = np.rint(values * (255 / values.max())).astype(np.uint8)
    np.testing.assert_array_equal(decode.decode_image(encode(Image.fromarray(values), "TIFF"))[..., 0], expected)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    decoded = decode.decode_image(array)
    assert decoded.shape == (5, 7, 3)
    if shape != (5, 7, 4):
        np.testing.assert_array_equal(decoded, np.broadcast_to(array.reshape(5, 7, -1), (5, 7, 3)))


@pytest.mark.parametrize(
    "array", [np.zeros((5, 7), np.float32), np.zeros((5, 7, 2), np.uint8), np.zeros((0, 7, 3), np.uint8)]
)
def test_unsupported_arrays(array):
    with pytest.raises(BadRecord, match="unsupported array"):
        decode.decode_image(array)


def photo(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )


@pytest.mark.parametrize(("size", "scale"), [(301, 1), (300, 2), (150, 4), (75, 8), (10, 8)])
def test_shrink_on_load_keeps_twice_the_side(size, scale):
    data, box = encode(photo(1200, 1600), "JPEG", quality=95), (100, 0, 1300, 1200)
    image, small_box = decode.shrink_on_load(decode.open_image(data), box, size)
    assert image.size == (1600 // scale, 1200 // scale)
    np.testing.assert_allclose(small_box, np.array(box) / scale)
    exact = np.asarray(decode.load(decode.open_image(data)).resize((size, size), Image.BICUBIC, box)).astype(int)
    got = np.asarray(image.resize((size, size), Image.BICUBIC, small_box)).astype(int)
    assert np.abs(exact - got).mean() < 1.5


def test_shrink_on_load_of_a_broken_file():
    data = encode(photo(1200, 1600), "JPEG")
    with pytest.raises(BadRecord, match="corrupt image"):
        decode.shrink_on_load(decode.open_image(data[: len(data) // 2]), (0, 0, 1200, 1200), 50)
