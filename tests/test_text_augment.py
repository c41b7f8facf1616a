"""EDA of captions: its three operations, thesauri, and how text views use it."""

from collections import Counter

import numpy as np
import pytest

from clip_jax.data.records import BadRecord
from clip_jax.data.text_augment import eda, read_thesaurus
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.views import TextVariants, TextView
from clip_jax.errors import UserError

TOKENIZER = make_tokenizer("sentencepiece")
CAPTION = "a Happy, small dog with big ears on the red sofa"


def changed(caption, count=3000, **kwargs):
    rng = np.random.default_rng(0)
    return [eda(caption, rng, **kwargs) for _ in range(count)]


def test_one_of_three_operations_with_equal_chances():
    words, kinds = CAPTION.split(), Counter()
    for text in changed(CAPTION, deletion=0.5):
        new = text.split(" ")
        if sorted(new) == sorted(words) and text != CAPTION:
            assert sum(a != b for a, b in zip(new, words, strict=True)) == 2
            kinds["swap"] += 1
        elif len(new) < len(words) and not Counter(new) - Counter(words):
            assert [w for w in words if w in new] == new or Counter(new) <= Counter(words)
            kinds["deletion"] += 1
        else:
            kinds["synonym"] += 1
    assert all(abs(kinds[kind] / 3000 - 1 / 3) < 0.03 for kind in ("swap", "deletion", "synonym")), kinds


def test_a_synonym_keeps_punctuation_and_the_other_words(tmp_path):
    (tmp_path / "t.txt").write_text("# mine\nhappy, glad\nHappy,merry\nred,crimson red\nalone\n")
    found = {text for text in changed(CAPTION, thesaurus=str(tmp_path / "t.txt"), swaps=0, deletion=0.0)}
    expected = {CAPTION.replace("Happy,", f"{word},") for word in ("glad", "merry")} | {
        CAPTION.replace("red", "crimson red"),
        CAPTION,
    }
    assert found == expected


def test_the_thesaurus_that_comes_along():
    synonyms = read_thesaurus()
    assert {"grinning", "grin", "smiling"} <= set(synonyms["smile"]) and "auto" in synonyms["car"]
    assert "the" not in synonyms and len(synonyms) > 50_000
    assert all(word not in others for word, others in synonyms.items())


@pytest.mark.parametrize("caption", ["dog", "xyzzy", "...", ""])
def test_short_captions(caption):
    """A single word has nothing to swap and is not deleted; what the thesaurus does not have has no synonym."""
    found = set(changed(caption, 300, deletion=1.0))
    assert caption in found
    assert found == {caption} if caption != "dog" else found - {"dog"} <= set(read_thesaurus()["dog"])


def test_a_caption_never_becomes_empty():
    assert all(changed("one two three", 500, deletion=1.0))


def test_the_same_generator_gives_the_same_words():
    assert changed(CAPTION, 20) == changed(CAPTION, 20)


def test_views_change_captions_in_training_only():
    view, record = TextView("text", 24, augment=("eda",)), {"texts": [CAPTION]}
    plain = TOKENIZER([CAPTION], 24)[0]
    np.testing.assert_array_equal(view(record, None, TOKENIZER), plain)
    rng = np.random.default_rng(0)
    found = {tuple(view(record, rng, TOKENIZER)) for _ in range(20)}
    assert len(found) > 5 and view.shape == (24,)


def test_both_forms_are_of_the_same_caption():
    """Captions and words left out are drawn once for all forms."""
    view = TextVariants("text", 24, templates=("{name}, {tags}", "{tags}"), word_dropout=0.3)
    plain = TextVariants("text", 24, templates=view.templates, word_dropout=0.3, variants=((), ()))
    record = {"name": "grinning face", "tags": ["happy", "joy", "smile", "teeth", "cheerful"]}
    assert view.shape == (2, 24) and plain.shape == (2, 24)
    rng, differ = np.random.default_rng(0), 0
    for _ in range(50):
        a, b = plain(record, rng, TOKENIZER)
        np.testing.assert_array_equal(a, b)
        a, b = (Counter(TOKENIZER.decode(ids).replace(",", "").split()) for ids in view(record, rng, TOKENIZER))
        assert (a - b).total() <= max(1, a.total() - 1)
        differ += a != b
    assert differ > 10
    with pytest.raises(BadRecord, match="empty caption"):
        view({"texts": [" "]}, rng, TOKENIZER)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("edda", r"unknown operation 'edda' \(did you mean 'eda'"),
        ("eda(3, 0.1, '', 5)", r"does not fit eda\(swaps, deletion, thesaurus\)"),
        (
            "eda(deletion=2)",
            r"augment: 'eda\(deletion=2\)': swaps must be a whole number >= 0, and deletion between 0 and 1",
        ),
        ("eda(swaps='x')", "swaps must be a whole number"),
        ("eda(thesaurus='/no/such/file')", "cannot read the thesaurus '/no/such/file'"),
    ],
)
def test_wrong_operations_are_one_line(spec, message):
    for view in (TextView, lambda *args, augment: TextVariants(*args, variants=(augment,))):
        with pytest.raises(UserError, match=message) as error:
            view("text", 12, augment=(spec,))
        assert "\n" not in str(error.value)


def test_a_file_that_is_no_thesaurus(tmp_path):
    (tmp_path / "words.txt").write_text("dog\ncat\n")
    with pytest.raises(UserError, match="has no line of two words"):
        read_thesaurus(str(tmp_path / "words.txt"))
    (tmp_path / "binary").write_bytes(b"\x1f\x8bxx")
    with pytest.raises(UserError, match="cannot read the thesaurus"):
        read_thesaurus(str(tmp_path / "binary"))
