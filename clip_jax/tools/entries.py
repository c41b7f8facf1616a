"""Which entries of a list a text contains, by MetaCLIP's rule (Xu et al. 2023, section 3.2, and its released code).

A text and an entry are put between spaces, and in the text each of , . ; : ? ! ` is put between spaces too, while tabs
and line ends become spaces. An entry is in the text when it is a substring. Case counts.

An entry thus begins and ends at spaces, so that a table of the entries finds all of them by their runs of words.
"""

import hashlib
import json

from clip_jax.errors import UserError

_SPACED = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"} | {blank: " " for blank in "\t\n\r"})


def spaced(text):
    """Returns a text between spaces, with its punctuation between spaces."""
    return f" {text} ".translate(_SPACED)


def read_entries(path):
    """Returns the distinct entries of a file in order, a list of str: a JSON list of texts, or a text file with lines.

    Raises UserError when it cannot be read, or holds no entry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file) if str(path).endswith(".json") else file.read().split("\n")
    except OSError as error:
        raise UserError(f"--entries={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--entries={path} cannot be read: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"--entries={path}: must be a JSON list of texts, or a text file with one entry a line")
    entries = list(dict.fromkeys(filter(None, (entry.strip() for entry in entries))))
    if not entries:
        raise UserError(f"--entries={path} holds no entry")
    return entries


def entries_key(entries):
    """Returns a hash of entries and their order, a hex digest."""
    return hashlib.blake2b("\n".join(entries).encode(), digest_size=16).hexdigest()


class Matcher:
    """Finds the entries that a text contains.

    Args:
      entries: distinct texts.

    Attributes:
      never: the entries that no text can contain, such as "St. Louis", whose full stop a text has between spaces.
    """

    def __init__(self, entries):
        self._numbers = {entry: number for number, entry in enumerate(entries)}
        self.never = [entry for entry in entries if f" {entry} " not in spaced(entry)]
        lengths = {}  # of the entries that begin with a word, in words
        for entry in entries:
            words = entry.split(" ")
            lengths.setdefault(words[0], set()).add(len(words))
        self._lengths = {word: tuple(sorted(found)) for word, found in lengths.items()}

    def __call__(self, text):
        """Returns the numbers of the entries in a text, a sorted list of int."""
        words, found = spaced(text).split(" ")[1:-1], set()
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                number = self._numbers.get(" ".join(words[start : start + length]))
                if number is not None:
                    found.add(number)
        return sorted(found)
