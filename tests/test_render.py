"""Texts drawn as images: the published renderer's images, the font file, views that draw, pairs of sentences."""

import gzip
import io
import json
import logging
import pickle
import re

import numpy as np
import pytest
from conftest import golden_files
from PIL import Image

from clip_jax.data.loader import Loader
from clip_jax.data.sources import MemorySource, make_source
from clip_jax.data.sources.mixture import MixtureSource
from clip_jax.data.sources.sentences import split_sentences
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.font import Font
from clip_jax.data.views import ImageOrTextView, ImageView, RenderView, make_example
from clip_jax.errors import UserError


@pytest.fixture(scope="module")
def font():
    return make_tokenizer("unifont")


def hex_of(path):
    """The two golden fonts, of plane 0 and above, one after the other."""
    names = ("clippo_glyphs_unifont-15.0.01_subset.hex", "clippo_glyphs_synthetic_upper.hex")
    return [(path.parent / name).read_bytes() for name in names]


@pytest.mark.parametrize("path", golden_files("clippo_render.npz"))
def test_golden_images_of_the_published_renderer(path):
    golden = np.load(path)
    texts, data = json.loads(golden["texts_utf8"].tobytes()), b"".join(hex_of(path))
    compared = set()
    for name in (name for name in golden.files if name.startswith("images_")):
        size, *options = name.removeprefix("images_").split("_")
        draw = Font(data, lower="nolower" not in options, monospace="monospace" in options)
        np.testing.assert_array_equal(draw(texts[: len(golden[name])], int(size))[..., 0], golden[name])
        compared.add(bool(options))
    assert compared == {False, True}


@pytest.mark.parametrize("path", golden_files("clippo_render.npz"))
def test_the_shipped_font_draws_the_golden_images_too(path, font):
    golden = np.load(path)
    texts = json.loads(golden["texts_utf8"].tobytes())
    in_plane_0 = [max(map(ord, text)) < 2**16 for text in texts]
    name = next(name for name in golden.files if re.fullmatch(r"images_\d+", name))
    size = golden[name].shape[1]
    images = font([text for text, use in zip(texts, in_plane_0, strict=True) if use], size)
    np.testing.assert_array_equal(images[..., 0], golden[name][in_plane_0])


def ink_columns(image):
    return np.flatnonzero((image[..., 0] == 0).any(0))


def test_an_image_is_background_and_ink_alone(font):
    images = font(["", " ", "a cat, 고양이"], 224)
    assert images.shape == (3, 224, 224, 1) and images.dtype == np.uint8
    assert (images[:2] == 127).all() and set(np.unique(images[2])) == {0, 127}
    assert font([], 64).shape == (0, 64, 64, 1)


def test_a_space_is_four_pixels_wide(font):
    np.testing.assert_array_equal(ink_columns(font(["  x"], 64)[0]), ink_columns(font(["x"], 64)[0]) + 8)


def test_ascii_letters_alone_are_lower_cased(font):
    (upper, lower, upper_accent, lower_accent), shown = (
        font(["A cat", "a CAT", "É", "é"], 64),
        make_tokenizer("unifont?lower=false"),
    )
    np.testing.assert_array_equal(upper, lower)
    assert (upper_accent != lower_accent).any()
    assert (shown(["A"], 64) != shown(["a"], 64)).any()


def test_long_texts_end_with_the_last_row(font):
    """Every row holds glyphs, none reaches beyond the image's right edge, and excess text changes nothing."""
    long = font(["w" * 767, "w" * 5000], 64)
    np.testing.assert_array_equal(long[0], long[1])
    rows = long[0, ..., 0].reshape(4, 16, 64)
    assert (rows == 0).any((1, 2)).all() and (rows[..., 0] == 127).all(), (
        "each row begins with its first glyph's gap of one pixel"
    )
    narrow, wide = font(["." * 768 + "w"], 224), font(["." * 768], 224)
    np.testing.assert_array_equal(narrow, wide)


def test_gzipped_and_joined_font_files(font):
    low, high = b"0041:" + b"00FF" * 8 + b"\n", b"01F431:" + b"0FF0" * 16 + b"\n"
    plain = Font(low + high, lower=False)
    joined = Font(gzip.compress(low) + gzip.compress(high), lower=False)
    np.testing.assert_array_equal(plain(["A🐱A"], 64), joined(["A🐱A"], 64))
    assert (plain(["A🐱"], 64) != plain(["A"], 64)).any()


def test_a_character_without_a_glyph_is_a_gap_and_one_warning(caplog):
    font = Font(b"0078:" + b"10" * 16)
    with caplog.at_level(logging.WARNING):
        images = font(["x🚀x", "x x", "🚀", "\udc80x"], 64)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[2] == 127).all() and (images[3] == 0).any()
    assert len(caplog.records) == 1 and "no glyph for '🚀' (U+1F680)" in caplog.text


@pytest.mark.parametrize(
    "data, message",
    [
        (b"0041:00\n", "line 1 is not a code point"),
        (b"0041:" + b"0" * 32 + b"\n\nabc\n", "line 3 .* .hex font: b'abc'"),
        (b"0041:" + b"g" * 32, "line 1"),
        (b"\x89PNG", "line 1"),
        (gzip.compress(b"0041:" + b"0" * 32, mtime=0)[:-9], "not a whole gzip file"),
        (b"", "no glyphs"),
    ],
)
def test_files_that_are_no_font(data, message, tmp_path):
    (tmp_path / "font.hex").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        make_tokenizer(f"unifont:{tmp_path}/font.hex")
    assert "font.hex" in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_hold_no_whole_rows(font):
    for size in (16, 40):
        with pytest.raises(UserError, match=f"with {size} pixels a side: a multiple of 16 from 32 on"):
            font(["x"], size)


def test_a_font_is_saved_and_sent_to_workers_as_a_tokenizer_is(font, tmp_path):
    spaced = make_tokenizer("unifont?monospace=true")
    spaced.save(tmp_path)
    again = make_tokenizer(str(tmp_path))
    assert again == spaced == pickle.loads(pickle.dumps(spaced)) and again != font
    np.testing.assert_array_equal(again(["문어"], 64), spaced(["문어"], 64))


# Views


IMAGE = np.full((20, 20, 3), 90, np.uint8)
VIEWS = (ImageOrTextView("image", 32, ("squash",)), RenderView("text", 32, ("{name}",)))


def test_a_caption_is_drawn_like_any_text(font):
    example = make_example({"image": IMAGE, "name": "a cat", "texts": []}, 3, VIEWS, font)
    assert {key: (value.shape, value.dtype) for key, value in example.items()} == {
        "image": ((32, 32, 3), np.uint8),
        "text": ((32, 32, 1), np.uint8),
        "example_id": ((), np.int64),
    }
    assert (example["image"] == 90).all()
    np.testing.assert_array_equal(example["text"], font(["a cat"], 32)[0])
    assert VIEWS[1].shape == (32, 32, 1) and VIEWS[1].dtype == np.uint8


def test_words_are_dropped_before_drawing(font):
    view = RenderView("text", 64, word_dropout=0.5)
    drawn = {view({"texts": ["a bc"]}, np.random.default_rng(seed), font).tobytes() for seed in range(30)}
    assert drawn == {font([text], 64).tobytes() for text in ("a bc", "a", "bc")}


def test_both_sentences_of_a_pair_are_drawn(font):
    example = make_example({"sentences": ["One.", "Two."], "texts": [], "text_pair": 1}, 0, VIEWS, font)
    np.testing.assert_array_equal(example["image"], np.repeat(font(["One."], 32)[0], 3, axis=2))
    np.testing.assert_array_equal(example["text"], font(["Two."], 32)[0])
    assert example["text_pair"] == 1


# Pairs of sentences


def test_where_sentences_end():
    assert split_sentences('Hello  there. "Is it you?" Yes!\nIt is 3.5 m (or so) long... and e.g. this. End') == [
        "Hello there.",
        '"Is it you?"',
        "Yes!",
        "It is 3.5 m (or so) long... and e.g. this.",
        "End",
    ]
    assert split_sentences("日本語です。猫です！「はい。」そう。") == [
        "日本語です。",
        "猫です！",
        "「はい。」",
        "そう。",
    ]
    assert split_sentences(" \n ") == []


def write_documents(folder):
    (folder / "a.txt").write_text("One. Two.\nThree\nis long.\n\nA heading\n\n문어다. 게다.\n")
    rows = [json.dumps({"text": "Five. Six!"}), "not JSON", json.dumps({"url": "x"}), json.dumps({"text": "Alone."})]
    (folder / "b.jsonl").write_text("\n".join(rows))


def test_pairs_of_consecutive_sentences(tmp_path):
    write_documents(tmp_path)
    source = pickle.loads(pickle.dumps(make_source(f"text:{tmp_path}/*")))
    pairs = [source[i]["sentences"] for i in range(len(source))]
    assert pairs == [["One.", "Two."], ["Two.", "Three is long."], ["문어다.", "게다."], ["Five.", "Six!"]]
    assert source[0]["text_pair"] == 1


def test_a_long_text_without_paragraphs_is_cut_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Sentence {i}.\n" for i in range(9000)))
    source = make_source(f"text:{tmp_path}/a.txt")
    assert 9000 - 4 <= len(source) < 9000 - 1
    assert source[len(source) - 1]["sentences"] == ["Sentence 8998.", "Sentence 8999."]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "Only one sentence", "no document with two sentences$"),
        ("a.jsonl", '{"content": "One. Two."}', "no document with two sentences in a field 'text'"),
        ("b.txt", "", "a.txt: no such file"),
    ],
)
def test_texts_without_pairs(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_source(f"text:{tmp_path}/{name.replace('b', 'a')}")


def mixture(folder):
    write_documents(folder)
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    images = MemorySource([{"image": buffer.getvalue(), "name": f"image {i}"} for i in range(10)])
    return MixtureSource([images, make_source(f"text:{folder}/*")], [3, 1])


def test_pairs_are_mixed_in_at_their_share_whatever_the_step_to_start_at(tmp_path, font):
    source = mixture(tmp_path)
    loader = Loader(source, VIEWS, font, batch_size=16, seed=1)
    batches = [next(loader) for _ in range(3)]
    for batch in batches:
        is_pair = batch["text_pair"] == 1
        assert is_pair.sum() == 4 and batch["text_pair"].dtype == np.int32
        np.testing.assert_array_equal(batch["source_id"], batch["text_pair"])
        assert (batch["image"][~is_pair] == 90).all()
        assert set(np.unique(batch["image"][is_pair])) == {0, 127}
    later = next(Loader(source, VIEWS, font, batch_size=16, seed=1, start_step=2))
    for key, value in batches[2].items():
        np.testing.assert_array_equal(later[key], value, err_msg=key)


def test_pairs_are_no_images(tmp_path, font):
    with pytest.raises(UserError, match="no usable record among 4 tried .no image: 4"):
        Loader(
            make_source(f"text:{write_documents(tmp_path) or tmp_path}/*"),
            [ImageView("image", 32)],
            font,
            batch_size=2,
            seed=0,
        )
