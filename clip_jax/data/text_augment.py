"""Augmentation of captions: Easy Data Augmentation (Wei & Zou 2019), the text view of DeCLIP (Li et al. 2022)."""

import functools
import gzip
import re

from etils import epath

from clip_jax.errors import UserError

THESAURUS = epath.Path(__file__).parent / "vocab" / "wordnet_synonyms.txt.gz"


def eda(caption, rng, swaps=1, deletion=0.1, thesaurus=""):
    """One of three changes, drawn with equal chances: a synonym for a word, words swapped, words deleted.

    These are DeCLIP's operations and numbers; it has no random insertion. A caption that an operation cannot change, such as one of a
    single word under the latter two or of words that the thesaurus does not have under the first, stays as it is.

    Args:
        swaps: how often two words change places.
        deletion: the chance of each word to be deleted; one always stays.
        thesaurus: a file as `read_thesaurus` takes it; empty: WordNet's synonyms, which come with the package.

    Raises ValueError for numbers out of range, and UserError as `read_thesaurus` does.
    """
    if not (isinstance(swaps, int) and swaps >= 0 and 0 <= deletion <= 1):
        raise ValueError("swaps must be a whole number from 0 on, deletion between 0 and 1")
    synonyms = read_thesaurus(thesaurus)
    words, operation = caption.split(), int(rng.random() * 3)
    if operation == 0:
        words = replace_word(words, rng, synonyms)
    elif len(words) > 1 and operation == 1:
        for _ in range(swaps):
            i, j = rng.choice(len(words), 2, replace=False)
            words[i], words[j] = words[j], words[i]
    elif len(words) > 1:
        kept = rng.random(len(words)) >= deletion
        if not kept.any():
            kept[rng.integers(len(words))] = True
        words = [word for word, keep in zip(words, kept, strict=True) if keep]
    return " ".join(words)


def replace_word(words, rng, synonyms):
    """A synonym, of all that its meanings have, in the place of one of the words that have any; punctuation around it stays."""
    parts = [re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL).groups() for word in words]
    known = [i for i, (_, word, _) in enumerate(parts) if word.lower() in synonyms]
    if known:
        i = known[rng.integers(len(known))]
        before, word, after = parts[i]
        choices = synonyms[word.lower()]
        words = [*words[:i], before + choices[rng.integers(len(choices))] + after, *words[i + 1 :]]
    return words


@functools.lru_cache(maxsize=8)
def read_thesaurus(path=""):
    """word -> synonyms. The file: UTF-8 text, gzipped or not, one set of synonyms per line, split by commas; lines with # are skipped.

    Raises UserError when it cannot be read or no line has two words.
    """
    file = epath.Path(path) if path else THESAURUS
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the thesaurus {str(file)!r} ({getattr(error, 'strerror', None) or error})"
        ) from None
    found = {}
    for line in text.splitlines():
        words = [] if line.startswith("#") else [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in words:
            found.setdefault(word, {}).update(dict.fromkeys(words))
    synonyms = {word: tuple(other for other in others if other != word) for word, others in found.items()}
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise UserError(f"the thesaurus {str(file)!r} has no line of two words split by a comma")
    return synonyms
