"""The memory of a view does not depend on the shape of its image, and ordinary images keep their pixels bit for bit."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clip_jax.data import augment, decode
from clip_jax.data.views import ImageView, RegionView
from clip_jax.tools.filter_tables import image_hash

SIZE, SIDE = 24, 40  # of the views, and of the largest image that an operation below makes
#: Pixels of an intermediate image at most, in multiples of the view's, unless it is smaller than the given image.
ROOM = 18
GEOMETRY = [
    ("resize", "center_crop"),
    ("resize", "random_crop"),
    ("resize(40)", "flip", "center_crop"),
    ("rrc",),
    ("rrc(0.9, 1.0, ratio=(1e-6, 1e6))",),
    ("squash",),
    ("squash(interpolation='bilinear', antialias=False)",),
    ("squash(interpolation='nearest')",),
    ("pad",),
    ("center_crop",),
    ("random_crop",),
]
COLOURS = ["flip(1)", "jitter", "gray(1)", "blur(p=1)", "solarize(1)", "autoaugment", "randaugment"]
PIPELINES = GEOMETRY + [(text, "resize", "center_crop") for text in COLOURS]


@pytest.fixture
def largest(monkeypatch):
    """A list of the pixels of every image that a resize makes, the one between its two passes included."""
    pixels, resize = [], Image.Image.resize

    def recorded(image, size, resample=None, box=None, reducing_gap=None):
        left, top, right, bottom = box or (0, 0, *image.size)
        is_copied = (right - left, left) == (size[0], 0) and size[0] == image.width
        pixels.append(size[0] * size[1])
        pixels.append(0 if is_copied or resample == Image.Resampling.NEAREST else size[0] * int(bottom - top))
        assert max(pixels[-2:]) <= max(ROOM * SIDE**2, image.width * image.height), (image.size, size, box)
        return resize(image, size, resample, box, reducing_gap)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    return pixels


def gradient(width, height):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def narrow(length, width, is_tall):
    return (width, length) if is_tall else (length, width)


@pytest.mark.parametrize("spec", PIPELINES, ids=" ".join)
def test_no_transform_makes_an_image_far_larger_than_the_view(spec, largest):
    pipeline = augment.parse(spec, SIZE)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.integers(0, 17), st.integers(1, 3), st.booleans(), st.integers(0, 3))
    def check(exponent, width, is_tall, seed):
        largest.clear()
        result = pipeline(Image.new("RGB", narrow(2**exponent, width, is_tall), (9, 8, 7)), np.random.default_rng(seed))
        assert result.size == (SIZE, SIZE)

    check()


@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("spec", [("resize", "center_crop"), ("squash",), ("pad",), ("rrc(1.0, 1.0, (1e-9, 1e9))",)])
def test_an_image_of_one_pixel_by_the_limit(spec, is_tall, largest):
    image = Image.new("RGB", narrow(decode.MAX_PIXELS, 1, is_tall), (200, 100, 50))
    result = np.asarray(augment.parse(spec, SIZE)(image, np.random.default_rng(0)))
    inside = result[SIZE // 2, SIZE // 2]  # padding is white, and the one pixel of the image in the middle
    np.testing.assert_array_equal(inside, (200, 100, 50))


def test_a_narrow_file_passes_every_view(largest):
    buffer = io.BytesIO()
    Image.new("RGB", (1, 60_000), (1, 2, 3)).save(buffer, "PNG")
    image = ImageView(size=SIDE)({"image": buffer.getvalue()}, None)
    np.testing.assert_array_equal(image, np.broadcast_to((1, 2, 3), (SIDE, SIDE, 3)).astype(np.uint8))
    record = {"image": buffer.getvalue(), "boxes": np.array([[0, 0, 1, 60_000]], np.float32)}
    assert RegionView(count=1, width=196, features="pixels")(record, None).shape == (1, 196)
    assert len(image_hash(buffer.getvalue())) == 16


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(150, 700), st.booleans(), st.sampled_from(["bilinear", "bicubic", "lanczos"]))
def test_the_central_crop_of_a_narrow_image_is_that_of_the_whole(width, length, is_tall, name):
    image = gradient(*narrow(length, width, is_tall))
    short, long = min(image.size), max(image.size)
    shape = narrow(max(SIZE, int(SIZE * long / short)), SIZE, is_tall)
    whole = image.resize(shape, augment._FILTERS[name])
    left, top = round((shape[0] - SIZE) / 2), round((shape[1] - SIZE) / 2)
    expected = np.asarray(whole.crop((left, top, left + SIZE, top + SIZE))).astype(int)
    got = np.asarray(augment.parse((f"resize(interpolation={name!r})", "center_crop"), SIZE)(image, None))
    assert np.abs(got - expected).max() <= 2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from([8, 24, 40]))
def test_ordinary_images_keep_their_pixels(width, height, size):
    image, bicubic = gradient(width, height), Image.Resampling.BICUBIC

    def same(spec, expected):
        got = augment.parse(spec, size)(image, np.random.default_rng(1))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected), err_msg=str(spec))

    if max(width, height) <= 16 * min(width, height):
        short, long = min(width, height), max(width, height)
        shape = narrow(max(size, int(size * long / short)), size, height >= width)
        left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        same(("resize", "center_crop"), image.resize(shape, bicubic).crop((left, top, left + size, top + size)))
        same(("squash",), image.resize((size, size), bicubic))
        box = augment._random_box(image.size, np.random.default_rng(1), 0.08, 1.0, (3 / 4, 4 / 3))
        same(("rrc",), image.resize((size, size), bicubic, box))
    if min(round(width / height * size), round(height / width * size)) > 0:
        same(("pad(color=(1, 2, 3))",), ImageOps.pad(image, (size, size), bicubic, (1, 2, 3)))


def test_a_narrow_image_is_not_lost_in_its_padding():
    padded = np.asarray(augment.parse(("pad",), SIZE)(Image.new("RGB", (1, 500), (0, 0, 0)), None))
    assert (padded == 0).all(-1).sum() == SIZE
