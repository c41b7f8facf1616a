"""Pictures and texts as the libraries of foreign weights prepare them: transparency, crops, cleaning.

The fixtures hf_preprocessing.npz and hf_texts.json are the outputs of transformers 5.24.0: CLIPImageProcessorPil
(resize to 16 pixels, crop, no rescaling), CLIPTokenizer and SiglipTokenizer.canonicalize_text.
"""

import gzip
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import augment
from clip_jax.data.decode import open_image
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.sentencepiece import _CLEAN
from clip_jax.data.views import ImageView
from clip_jax.errors import UserError
from clip_jax.interop import tokenizer as tokenizer_files

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
OPEN_CLIP = ("resize", "center_crop", "drop_alpha")


def picture(width, height, channels=3, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def png(image, **options):
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def seen(data, *steps, size=16):
    return ImageView("image", size, steps)({"image": data}, None)


def test_crops_of_transformers():
    golden, steps = np.load(FIXTURES / "hf_preprocessing.npz"), ("resize", "center_crop(rounding='down')")
    even = 0
    for seed, (shape, crop) in enumerate(zip(golden["shapes"].tolist(), golden["crops"], strict=True)):
        np.testing.assert_array_equal(seen(png(picture(*shape, seed=seed)), *steps), crop)
        even += np.array_equal(seen(png(picture(*shape, seed=seed)), "resize", "center_crop"), crop)
    assert 0 < even < len(golden["crops"])  # the rounding of torchvision gives other pixels for some
    small = png(picture(9, 12, seed=7))
    np.testing.assert_array_equal(seen(small, "center_crop(rounding='down')"), golden["small"])
    transparent = seen(png(picture(41, 16, 4, 99)), *steps).astype(int)  # transformers puts it on white since 5.23
    assert np.abs(transparent - golden["alpha"]).max() <= 1


def opened(data):
    return Image.open(io.BytesIO(data))


def as_open_clip(data, size=16):
    """torchvision's Resize and CenterCrop on the picture as it is in the file, then `convert("RGB")`."""
    image = opened(data)
    short = min(image.size)
    if short != size:
        image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def transparent_pictures():
    rgba = picture(40, 23, 4, 1)
    clear = rgba.copy()
    clear.putalpha(0)
    indexed = picture(40, 23, 3, 2).quantize(8)
    grey = picture(40, 23, 3, 3).convert("L")
    return {
        "RGBA": png(rgba),
        "without a visible pixel": png(clear),
        "LA": png(Image.merge("LA", (grey, rgba.getchannel("A")))),
        "palette": png(indexed),
        "palette with a transparent colour": png(indexed, transparency=3),
        "black and white": png(grey.convert("1")),
        "grey with a transparent value": png(grey, transparency=grey.getpixel((0, 0))),
        "of the size already": png(picture(16, 16, 4, 4)),
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_transparency_is_left_out_as_pillow_does(kind):
    data = transparent_pictures()[kind]
    first = seen(data, "drop_alpha", "resize", "center_crop")
    rgb = np.asarray(opened(data).convert("RGB"))
    np.testing.assert_array_equal(first, seen(rgb, "resize", "center_crop"))
    if kind == "grey with a transparent value":  # there Pillow resizes grey values, here it resizes RGBA
        return
    np.testing.assert_array_equal(seen(data, *OPEN_CLIP), as_open_clip(data))


def test_white_stays_the_default():
    clear = transparent_pictures()["without a visible pixel"]
    assert (seen(clear, "resize", "center_crop") == 255).all()
    assert seen(clear, "drop_alpha", "resize", "center_crop").std() > 20  # the hidden colours
    assert (seen(clear, *OPEN_CLIP) == 0).all()  # their weight is 0 when Pillow resizes them
    opaque = png(picture(41, 23))
    np.testing.assert_array_equal(seen(opaque, *OPEN_CLIP), seen(opaque, "resize", "center_crop"))
    user = picture(20, 20).quantize(4)
    open_image(user)
    assert not any("clip_jax" in str(key) for key in user.info)


def test_what_may_come_before_drop_alpha():
    with pytest.raises(UserError, match="gray before drop_alpha; allowed before it are resize, squash"):
        augment.parse(("squash", "gray(1.0)", "drop_alpha"), 16)
    with pytest.raises(UserError, match="rounding 'up' is not one of even, down"):
        augment.parse(("center_crop(rounding='up')",), 16)


def test_texts_of_transformers():
    golden = json.loads((FIXTURES / "hf_texts.json").read_text())
    tokenizer = make_tokenizer("clip_bpe?clean=transformers&specials=openai")
    ours = {text: [tokenizer.sot_id, *tokenizer.encode(text), tokenizer.eot_id] for text in golden["clip"]}
    assert ours == golden["clip"]
    plain = make_tokenizer("clip_bpe")
    assert plain.encode("fish &amp; chips") == plain.encode("fish & chips") != tokenizer.encode("fish &amp; chips")
    assert {text: _CLEAN["transformers"](text) for text in golden["siglip"]} == golden["siglip"]
    assert _CLEAN["open_clip"]("“Curly” a_cat &amp; x") == "curly a cat x"
    assert "clean" not in plain.options  # fingerprints of earlier runs hold no such option
    with pytest.raises(UserError, match="clean='x' is unknown; allowed: open_clip, transformers"):
        make_tokenizer("clip_bpe?clean=x")


def test_the_library_of_the_weights_decides_on_the_cleaning(tmp_path):
    def cleaning(method, size, library):
        return make_tokenizer(tokenizer_files.find(tmp_path, method, size, library)).options.get("clean")

    assert cleaning("clip", 49408, "Hugging Face CLIPModel") == "transformers"
    assert cleaning("clip", 49408, "open_clip") is None
    merges = gzip.decompress(make_tokenizer("clip_bpe").data)
    model = make_tokenizer("sentencepiece")
    (tmp_path / "spiece.model").write_bytes(model.data)
    hf = "Hugging Face SiglipModel"
    assert (cleaning("siglip", 4096, hf), cleaning("siglip", 256_000, hf)) == ("transformers", "lower")
    assert (cleaning("siglip", 4096, "open_clip"), cleaning("siglip", 256_000, "open_clip")) == ("open_clip",) * 2
    assert cleaning("siglip", 4096, "big_vision") == "lower"
    (tmp_path / "merges.txt").write_bytes(b"\n".join(merges.split(b"\n")[:48895]))
    spec = "clip_bpe?clean=transformers&specials=openai"  # a run with this string may start from these weights
    assert tokenizer_files.find(tmp_path, "clip", 49408, "Hugging Face CLIPModel") == spec
