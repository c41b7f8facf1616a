import io
import pickle

import numpy as np
import pytest
from conftest import golden_files
from PIL import Image

from clip_jax.data import augment, decode, policies
from clip_jax.data.records import BadRecord
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError


def make_image(width=64, height=48):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)


def run(spec, size, image=None, seed=0):
    return np.asarray(augment.parse(tuple(spec), size)(image or make_image(), np.random.default_rng(seed)))


@pytest.mark.parametrize("path", golden_files("preprocess_clip_eval*.npz"))
def test_golden_clip_evaluation(path):
    golden, compared = np.load(path), 0
    for key in golden.files:
        kind, number = key.rsplit("_", 1)
        if kind.startswith(("clip_eval", "siglip_squash")):
            size = int(kind.split("_")[-1])
            spec, mean, std = (
                (("resize", "center_crop"), augment.CLIP_MEAN, augment.CLIP_STD)
                if kind.startswith("clip")
                else (("squash",), (0.5,) * 3, (0.5,) * 3)
            )
            image = augment.parse(spec, size)(decode.open_image(golden[f"png_{number}"].tobytes()), None)
            got = augment.normalize(np.asarray(image), mean, std).transpose(2, 0, 1)
            np.testing.assert_allclose(got, golden[key], atol=1e-5)
            compared += 1
    assert compared
    for number in range(len([key for key in golden.files if key.startswith("png")])):
        np.testing.assert_array_equal(decode.decode_image(golden[f"png_{number}"].tobytes()), golden[f"rgb_{number}"])


@pytest.mark.parametrize("path", golden_files("preprocess_bv_squash*.npz"))
def test_golden_big_vision_squash(path):
    golden, compared = np.load(path), 0
    for key in golden.files:
        if key.startswith("squash"):
            _, size, number = key.split("_")
            pipeline = augment.parse(("squash(interpolation='bilinear', antialias=False)",), int(size))
            image = pipeline(Image.fromarray(golden[f"rgb_{number}"]), None)
            difference = np.abs(augment.normalize(np.asarray(image), (0.5,) * 3, (0.5,) * 3) - golden[key])
            assert difference.max() < 0.0079 and (difference > 1e-5).mean() < 0.005
            compared += 1
    assert compared


WHOLE = [
    "rrc",
    "rrc(0.5, 1.0, ratio=(0.8, 1.25), interpolation='bilinear')",
    "squash",
    "squash(interpolation='bilinear', antialias=False)",
    "pad",
    "pad(color=(1, 2, 3))",
    "center_crop",
    "random_crop",
]
AFTER_CROP = [
    "flip",
    "flip(p=1)",
    "jitter",
    "jitter(0.4, 0.4, 0.4, 0.1, p=0.8)",
    "jitter(0.0, 0.0, 0.0, 0.5)",
    "gray(1.0)",
    "blur",
    "blur(1.0, 1.0, p=1)",
    "solarize(1.0, 100)",
    "autoaugment",
    "randaugment",
    "randaugment(3, 15, fill=(0, 0, 0))",
]
CHAINS = [
    ("resize", "center_crop"),
    ("resize(40)", "random_crop"),
    ("squash(50)", "random_crop", "flip"),
    ("background((1,2,3))", "rrc"),
    ("random_background", "rrc"),
]


@pytest.mark.parametrize("spec", [(text,) for text in WHOLE] + [("rrc", text) for text in AFTER_CROP] + CHAINS)
@pytest.mark.parametrize("shape", [(64, 48), (1, 1), (7, 300)])
def test_every_operation_gives_the_size_and_follows_the_generator(spec, shape):
    image = make_image(*shape)
    results = [run(spec, 32, image, seed) for seed in (3, 3, 4)]
    assert results[0].shape == (32, 32, 3) and results[0].dtype == np.uint8
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize(
    "text",
    [
        "rrc(0.1, 0.5)",
        "random_crop",
        "flip",
        "jitter",
        "gray(0.5)",
        "blur",
        "solarize(0.5)",
        "autoaugment",
        "randaugment",
    ],
)
def test_random_operations_vary_with_the_seed(text):
    spec = (text,) if text[:2] == "rr" or "crop" in text else ("squash", text)
    assert len({run(spec, 32, seed=seed).tobytes() for seed in range(30)}) > 1


def test_rrc_follows_its_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([augment._random_box((400, 300), rng, 0.2, 0.6, (0.75, 4 / 3)) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / 120000, width / height
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 400).all() and (boxes[:, 3] <= 300).all()
    assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61 and abs(area.mean() - 0.4) < 0.01
    assert 0.74 < aspect.min() < 0.77 and 1.30 < aspect.max() < 1.35 and abs(np.log(aspect).mean()) < 0.02
    slack = boxes[:, 0] / np.maximum(400 - width, 1)
    assert abs(slack.mean() - 0.5) < 0.02 and slack.min() < 0.01 and slack.max() > 0.99


def test_rrc_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert augment._random_box((1000, 10), rng, 1.0, 1.0, (0.75, 4 / 3)) == (493, 0, 506, 10)
    assert augment._random_box((10, 1000), rng, 1.0, 1.0, (0.75, 4 / 3)) == (0, 493, 10, 506)


def test_rrc_is_crop_and_resize():
    image = make_image(200, 150)
    box = augment._random_box(image.size, np.random.default_rng(5), 0.3, 0.9, (3 / 4, 4 / 3))
    expected = np.asarray(image.crop(box).resize((32, 32), Image.BICUBIC)).astype(int)
    got = run(("rrc(0.3, 0.9)",), 32, image, seed=5)
    assert np.abs(expected - got)[2:-2, 2:-2].max() <= 1  # at its border the one pass sees the pixels outside the box


def test_flip_mirrors():
    np.testing.assert_array_equal(run(("squash", "flip(1)"), 32), run(("squash",), 32)[:, ::-1])


def test_jitter_without_strength_changes_nothing():
    np.testing.assert_array_equal(run(("squash", "jitter(0, 0, 0, 0)"), 32), run(("squash",), 32))


def test_brightness_jitter_scales():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    values = [int(run(("squash", "jitter(0.5, 0, 0, 0)"), 8, image, seed)[0, 0, 0]) for seed in range(300)]
    assert 50 <= min(values) < 54 and 146 < max(values) <= 150


def test_hue_shift_turns_the_colour_wheel():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    np.testing.assert_allclose(np.asarray(augment._shift_hue(red, 1 / 3))[0, 0], (0, 255, 0), atol=6)
    np.testing.assert_allclose(np.asarray(augment._shift_hue(red, -1 / 3))[0, 0], (0, 0, 255), atol=6)


def test_gray_and_solarize():
    grey = run(("squash", "gray(1)"), 16)
    assert (grey == grey[..., :1]).all()
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    values = np.arange(256)
    np.testing.assert_array_equal(
        run(("squash", "solarize(1)"), 16, image)[..., 0].ravel(), np.where(values < 128, values, 255 - values)
    )


def test_backgrounds():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (run(("squash",), 8, image) == 255).all()
    assert (run(("background((1, 2, 3))", "squash"), 8, image) == (1, 2, 3)).all()
    colors = {tuple(run(("random_background", "squash"), 8, image, seed)[0, 0].tolist()) for seed in range(20)}
    assert len(colors) == 20


def test_policies_have_their_tables():
    assert len(policies.AUTOAUGMENT) == 25 and all(len(pair) == 2 for pair in policies.AUTOAUGMENT)
    names = {name for pair in policies.AUTOAUGMENT for name, _, _ in pair} | set(policies.RANDAUGMENT)
    for name in names:
        for level in (0, 0.5, 1):
            assert policies.distort(make_image(), name, level, -1, (0, 0, 0)).size == (64, 48)
    for name in names - {
        "identity",
        "autocontrast",
        "equalize",
        "invert",
        "posterize",
    }:  # at level 0 these change nothing
        np.testing.assert_array_equal(
            np.asarray(policies.distort(make_image(), name, 0, 1, (0, 0, 0))), np.asarray(make_image()), err_msg=name
        )
    for name in names - {"identity", "autocontrast"}:
        assert (
            np.asarray(policies.distort(make_image(), name, 0.9, 1, (0, 0, 0))) != np.asarray(make_image())
        ).any(), name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("rrcc",), r"unknown operation 'rrcc' \(did you mean 'rrc'"),
        (("rrc", "flop"), "did you mean 'flip'"),
        (("rrc(",), "cannot read 'rrc\\('"),
        (("__import__('os').system('true')",), "cannot read"),
        (("rrc(min_area=open('x'))",), "cannot read"),
        (("[1]",), "cannot read"),
        (("rrc(0.9, 1.0, (0.5, 2), 32, 'bicubic', 7, True)",), "does not fit rrc"),
        (("rrc(0.9, min_area=0.5)",), "does not fit"),
        (("rrc(area=0.5)",), "does not fit"),
        (("rrc(0.9, 0.5)",), "0 < min <= max <= 1"),
        (("rrc(interpolation='cubic')",), "bicubic"),
        (("rrc", "flip(2)"), "not a probability"),
        (("rrc", "jitter(hue=0.7)"), "hue <= 0.5"),
        (("rrc", "jitter('a')"), "jitter"),
        (("rrc", "randaugment(magnitude=31)"), "magnitude"),
        (("rrc", "solarize(threshold='x', p=0.01)"), "solarize"),
        (("resize",), "gives 38x32 pixels from a 48x40 image, the view needs 32x32"),
        ((), "gives 48x40"),
        (("center_crop(16)",), "gives 16x16"),
    ],
)
def test_mistakes_are_one_clear_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        augment.parse(spec, 32)
    assert "\n" not in str(error.value)


def test_pipelines_can_be_sent_to_workers():
    pipeline = augment.parse(("rrc", "flip", "jitter"), 32)
    again = pickle.loads(pickle.dumps(pipeline))
    expected, got = (np.asarray(p(make_image(), np.random.default_rng(1))) for p in (pipeline, again))
    np.testing.assert_array_equal(expected, got)


def test_bicubic_without_antialiasing():
    """By a fine grid: a cubic through equal pixels, the weights of Keys' kernel, and taps outside of the image."""
    flat = np.full((9, 5, 3), 77, np.uint8)
    assert (np.asarray(augment.squash(Image.fromarray(flat), 4, "bicubic", antialias=False)) == 77).all()
    row = np.array([0, 100, 200, 100, 0, 40, 80, 20], np.float64)
    image = Image.fromarray(np.tile(row.astype(np.uint8)[None, :, None], (8, 1, 3)))
    found = np.asarray(augment.squash(image, 4, "bicubic", antialias=False))[0, :, 0]
    inner = [-1 / 16, 9 / 16, 9 / 16, -1 / 16]  # halfway between two pixels
    wanted = [row[0:3] @ (np.array(inner[1:]) / sum(inner[1:])), row[1:5] @ inner, row[3:7] @ inner]
    wanted.append(row[5:8] @ (np.array(inner[:3]) / sum(inner[:3])))
    np.testing.assert_allclose(found, np.clip(np.round(wanted), 0, 255), atol=1)


def test_a_random_crop_without_antialiasing_is_the_crop_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    options = dict(size=16, interpolation="bilinear", antialias=False)
    found = augment.rrc(image, np.random.default_rng(3), 0.3, 0.9, **options)
    box = augment._random_box(image.size, np.random.default_rng(3), 0.3, 0.9, (3 / 4, 4 / 3))
    wanted = augment.squash(image.crop(box), 16, "bilinear", antialias=False)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("operations", [("rrc(0.5, 1.0, antialias=False)",), ("drop_alpha", "rrc(0.9, 1.0)"), ("rrc",)])
def test_a_truncated_jpeg_is_a_bad_record(operations):
    """A large JPEG is read no sooner than an operation asks for its pixels."""
    image, file = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8), io.BytesIO()
    Image.fromarray(image).save(file, "jpeg")
    view = ImageView("image", 16, operations)
    record = {"image": file.getvalue()[: file.tell() // 2]}
    with pytest.raises(BadRecord, match="corrupt image"):
        view(record, np.random.default_rng(0), None)
