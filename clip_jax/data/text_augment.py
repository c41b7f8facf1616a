"""Augments captions: Easy Data Augmentation (EDA, Wei & Zou 2019), the text augmentation of DeCLIP (Li et al. 2022)."""

import functools
import gzip
import re

from etils import epath

from clip_jax.errors import UserError

THESAURUS = epath.Path(__file__).parent / "vocab" / "wordnet_synonyms.txt.gz"


def eda(caption, rng, swaps=1, deletion=0.1, thesaurus=""):
    """Returns a caption after one of three operations with equal probability: synonym replacement, swaps, deletion.

    The operations and numbers are DeCLIP's, which has no random insertion. A caption that the operation cannot change
    stays as it is: a single word under swaps and deletion, or words without synonyms under replacement.

    Args:
      caption: str.
      rng: `np.random.Generator`.
      swaps: int, how often two words are exchanged.
      deletion: float, the probability that a word is deleted; one word always stays.
      thesaurus: str, a file for `read_thesaurus`; empty for WordNet's synonyms, which are in the package.

    Raises ValueError for numbers out of range, and UserError as `read_thesaurus` does.
    """
    if not (isinstance(swaps, int) and swaps >= 0 and 0 <= deletion <= 1):
        raise ValueError("swaps must be a whole number >= 0, and deletion between 0 and 1")
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
    """Returns a list of words in which a random one that has synonyms is replaced by one of them.

    Punctuation around the word stays.

    Args:
      words: list of str.
      rng: `np.random.Generator`.
      synonyms: `{word: tuple of str}`, in lower case, as `read_thesaurus` returns it.
    """
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
    """Returns `{word: synonyms}`, a tuple of the words of all its sets, in lower case.

    Args:
      path: str, a file of UTF-8 text, gzipped or not. Each line is a set of synonyms separated by commas; lines that
        begin with # are skipped. Empty for WordNet's synonyms.

    Raises UserError when the file cannot be read or no line has two words.
    """
    file = epath.Path(path) if path else THESAURUS
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the thesaurus {str(file)!r} ({reason})") from None
    found = {}
    for line in text.splitlines():
        words = [] if line.startswith("#") else [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in words:
            found.setdefault(word, {}).update(dict.fromkeys(words))
    synonyms = {word: tuple(other for other in others if other != word) for word, others in found.items()}
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise UserError(f"the thesaurus {str(file)!r} has no line of two words separated by a comma")
    return synonyms
