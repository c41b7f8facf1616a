"""What turns texts into model input."""

import abc
import functools
import hashlib
import json
import string
from typing import ClassVar

import numpy as np
from etils import epath

from clip_jax.errors import UserError

VOCAB_FOLDER = epath.Path(__file__).parents[1] / "vocab"


METADATA_FILE = "clip_jax_tokenizer.json"


_CACHED_TEXTS = 16_384  # encoded texts kept per process


_MAX_CHARS = 100_000  # far beyond any context; keeps one broken record from stalling the loader


class TextInput(abc.ABC):
    """What turns texts into a model's input, and is kept with its weights. Picklable; `==` and `hash` go by `fingerprint()`.

    Attributes:
        vocab_size: number of ids; every id is in [0, vocab_size).
        pad_id, eot_id: int. `eot_id` is defined even when `eot=False`.
        sot_id: int, or None when no SOT is prepended.
        mask_id: int, or None when the vocabulary has no mask token.
    """

    kind: ClassVar[str]
    file: ClassVar[str]  # name of the data inside a saved folder

    vocab_size: int
    pad_id: int
    eot_id: int
    sot_id: int | None
    mask_id: int | None

    def __init__(self, data, **options):
        """Args: data: content of the vocabulary file; options: the complete settings, which `save` and `fingerprint` record."""
        self.data, self.options = data, options

    @abc.abstractmethod
    def __call__(self, texts, context):
        """The model's input [len(texts), ...]; `context` is its size: tokens in a sequence, pixels of a side."""

    def fingerprint(self):
        """Hex digest of kind, settings and vocabulary: equal exactly when two tokenizers give the same ids."""
        settings = json.dumps([self.kind, self.options], sort_keys=True).encode()
        return hashlib.sha256(settings + b"\0" + self.data).hexdigest()

    def save(self, folder):
        """Writes the vocabulary and `clip_jax_tokenizer.json` into `folder` (made if absent); `make_tokenizer(folder)` reads them."""
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
    """Common part of all tokenizers. `special_ids` never stand for text: a masked language model neither selects nor draws them."""

    special_ids: frozenset[int]

    def __init__(self, data, **options):
        super().__init__(data, **options)
        self._cache = {}

    # --- what a kind of tokenizer defines ---

    @abc.abstractmethod
    def _encode(self, text):
        """Ids of `text` without special tokens."""

    @abc.abstractmethod
    def decode(self, ids):
        """Text of `ids`; special tokens (SOT, EOT, PAD, mask) are left out."""

    # --- what they share ---

    def encode(self, text):
        """Ids of `text` without special tokens and without truncation."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._encode(
                text.encode("utf-8", "replace").decode()
            )  # lone surrogates, as broken JSON escapes give them, become "?"
            if len(self._cache) >= _CACHED_TEXTS:
                self._cache.clear()
            if len(text) <= 1000:
                self._cache[text] = ids
        return list(ids)

    def __call__(self, texts, context):
        """Encodes `texts` into int32 [len(texts), context]: SOT and EOT added, truncated with EOT kept last, padded.

        Raises UserError if `context` leaves no room for text.
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
            ids = start + self.encode(text[:_MAX_CHARS])[:room] + end
            row[: len(ids)] = ids
        return out

    def lengths(self, ids):
        """Number of tokens before the padding, EOT included: ids int [..., context] -> int32 [...]."""
        ids = np.asarray(ids)
        if not self.options["eot"]:
            return (ids != (self.eot_id if self.options["pad_with_eot"] else self.pad_id)).sum(-1, dtype=np.int32)
        is_eot = ids == self.eot_id
        return np.where(is_eot.any(-1), is_eot.argmax(-1) + 1, ids.shape[-1]).astype(np.int32)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text, keep=""):
    """Text in the canonical form of SigLIP's evaluation: `_` becomes a space, no punctuation, lower case, single spaces.

    Args:
        keep: a string that stays as it is, "{}" in templates and "," in class names.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    return " ".join(keep.join(part.translate(_PUNCTUATION) for part in parts).lower().split())
