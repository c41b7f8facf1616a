"""The interface of tokenizers: `TextInput`, of which the font is one, and `Tokenizer`, which gives token ids."""

import abc
import functools
import hashlib
import html
import json
import string
from typing import ClassVar

import numpy as np
from etils import epath

from clip_jax.errors import UserError

VOCAB_FOLDER = epath.Path(__file__).parents[1] / "vocab"
METADATA_FILE = "clip_jax_tokenizer.json"


class TextInput(abc.ABC):
    """Turns texts into the input of a model; saved with its weights.

    It is picklable. `==` and `hash` compare `fingerprint()`.

    Args:
      data: bytes, the content of the vocabulary file.
      **options: all settings; `save` and `fingerprint` record them.

    Attributes:
      kind: str, the name of the kind in `make_tokenizer`.
      file: str, the name of the vocabulary file in a saved folder.
      vocab_size: int, the number of ids; every id is in [0, vocab_size). 0 for a font, which has none.
      pad_id: int, the id of padding; with `pad_with_eot` it is not used.
      eot_id: int, the id of end of text, also when `eot=False`.
      sot_id: int, the id of start of text, or None when none is prepended.
      mask_id: int, the id of the mask token, or None when the vocabulary has none.
    """

    kind: ClassVar[str]
    file: ClassVar[str]

    vocab_size: int
    pad_id: int
    eot_id: int
    sot_id: int | None
    mask_id: int | None

    def __init__(self, data, **options):
        self.data, self.options = data, options

    @abc.abstractmethod
    def __call__(self, texts, context):
        """Returns the model's input, `[len(texts), ...]`.

        Args:
          texts: list of str.
          context: int, the length of a sequence in tokens, or the side of an image in pixels.
        """

    def fingerprint(self):
        """Returns a hex digest of kind, settings and vocabulary; equal digests mean equal ids."""
        settings = json.dumps([self.kind, self.options], sort_keys=True).encode()
        return hashlib.sha256(settings + b"\0" + self.data).hexdigest()

    def save(self, folder):
        """Writes the vocabulary and `clip_jax_tokenizer.json` into a folder, which `make_tokenizer(folder)` reads.

        Args:
          folder: the folder, created if missing.
        """
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file).write_bytes(self.data)
        metadata = {
            "kind": self.kind,
            "file": self.file,
            "options": self.options,
            "fingerprint": self.fingerprint(),
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "eot_id": self.eot_id,
            "sot_id": self.sot_id,
            "mask_id": self.mask_id,
        }
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=1) + "\n")

    def __reduce__(self):
        return functools.partial(type(self), **self.options), (self.data,)

    def __eq__(self, other):
        return isinstance(other, TextInput) and self.fingerprint() == other.fingerprint()

    def __hash__(self):
        return hash(self.fingerprint())

    def __repr__(self):
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, {options}, fingerprint={self.fingerprint()[:12]})"


class Tokenizer(TextInput):
    """What all tokenizers share: special tokens, truncation, padding, and a cache of encoded texts.

    Attributes:
      special_ids: frozenset of int, the ids that never stand for text. A masked language model neither selects nor
        draws them.
    """

    special_ids: frozenset[int]

    _CACHED_TEXTS = 16_384  # encoded texts kept per process
    _MAX_CHARS = 100_000  # far beyond any context; a broken record must not stall the loader

    def __init__(self, data, **options):
        super().__init__(data, **options)
        self._cache = {}

    @abc.abstractmethod
    def _encode(self, text):
        """Returns the ids of a text without special tokens, a list of int."""

    @abc.abstractmethod
    def decode(self, ids):
        """Returns the text of a sequence of ids; special tokens (SOT, EOT, PAD, mask) are left out."""

    def encode(self, text):
        """Returns the ids of a text, a list of int, without special tokens and without truncation."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._encode(text.encode("utf-8", "replace").decode())  # lone surrogates of broken JSON become "?"
            if len(self._cache) >= self._CACHED_TEXTS:
                self._cache.clear()
            if len(text) <= 1000:
                self._cache[text] = ids
        return list(ids)

    def __call__(self, texts, context):
        """Returns the ids of texts with SOT and EOT, truncated so that EOT stays last, and padded.

        Args:
          texts: list of str.
          context: int, the length of a sequence in tokens.

        Returns:
          int32 `[len(texts), context]`.

        Raises UserError when `context` leaves no room for text.
        """
        if isinstance(texts, str):
            raise TypeError("a tokenizer takes a list of texts, not one string")
        start = [] if self.sot_id is None else [self.sot_id]
        end = [self.eot_id] if self.options["eot"] else []
        room = context - len(start) - len(end)
        if room < 1:
            raise UserError(
                f"context={context} leaves no room for text: at least {len(start) + len(end) + 1} is needed"
            )
        out = np.full((len(texts), context), self.eot_id if self.options["pad_with_eot"] else self.pad_id, np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = start + self.encode(text[: self._MAX_CHARS])[:room] + end
            row[: len(ids)] = ids
        return out

    def lengths(self, ids):
        """Returns the number of tokens before the padding, EOT included: int `[..., context]` -> int32 `[...]`."""
        ids = np.asarray(ids)
        if not self.options["eot"]:
            return (ids != (self.eot_id if self.options["pad_with_eot"] else self.pad_id)).sum(-1, dtype=np.int32)
        is_eot = ids == self.eot_id
        return np.where(is_eot.any(-1), is_eot.argmax(-1) + 1, ids.shape[-1]).astype(np.int32)


def repaired(text):
    """Returns a text with its broken characters repaired (ftfy) and HTML entities replaced, as OpenAI's CLIP does."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text, keep=""):
    """Returns a text in the canonical form of SigLIP (Zhai et al. 2023).

    `_` becomes a space, punctuation is removed, letters become lower case, and runs of white space become one space.

    Args:
      text: str.
      keep: str that stays as it is, "{}" in templates and "," in class names.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    return " ".join(keep.join(part.translate(_PUNCTUATION) for part in parts).lower().split())
