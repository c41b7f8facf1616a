"""Text to token ids: SentencePiece (default), CLIP BPE and BERT WordPiece behind one interface; or, without tokens, to pictures.

    tokenizer = make_tokenizer("sentencepiece")                       # the small model that ships with the package
    ids = tokenizer(["a red apple", "octopus"], context=16)           # int32 [2, 16]
    tokenizer.save("runs/clip/tokenizer"); make_tokenizer("runs/clip/tokenizer")   # the same tokenizer again

A tokenizer is given by a spec, `kind[:path][?option=value&option=value]`, or by a folder that `save` wrote:

    sentencepiece                     the shipped model: 4k unigram pieces with byte fallback, lower-casing
    sentencepiece:/path/spm.model     any SentencePiece model; `?lower=true` where the model itself does not lower-case (c4_en, mC4, Gemma)
    clip_bpe                          the vocabulary of OpenAI CLIP, 49,408 ids
    wordpiece:/path/vocab.txt         uncased BERT
    siglip:/path/spiece.model         SigLIP's: a SentencePiece model or its tokenizer.json, without punctuation, padded with EOT
    unifont[:/path/unifont.hex]       no tokenizer: the font that draws texts as pictures, `clip_jax.data.render.Font` (CLIPPO)

Every sequence is `[SOT] text [EOT] padding...`, cut so that EOT stays last. Options of every kind:

    sot            prepend SOT (CLIP BPE: true, WordPiece [CLS]: true, SentencePiece: false)
    eot            append EOT (true; WordPiece [SEP]: true)
    pad_with_eot   pad with EOT instead of PAD, "sticky EOT" as in SigLIP (false)

Padding is never to be found by `ids == pad_id` (CLIP pads with 0, which is also the id of "!"): use `Tokenizer.lengths`.
"""

import abc
import functools
import gzip
import hashlib
import html
import inspect
import json
import string
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from etils import epath

from clip_jax.errors import UserError

VOCAB_FOLDER = epath.Path(__file__).parent / "vocab"
SHIPPED_SENTENCEPIECE = VOCAB_FOLDER / "emoji_4k.model"
SHIPPED_CLIP_BPE = VOCAB_FOLDER / "bpe_simple_vocab_16e6.txt.gz"
SHIPPED_UNIFONT = VOCAB_FOLDER / "unifont-15.0.01.hex.gz"
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

    def __init__(self, data: bytes, **options):
        """Args: data: content of the vocabulary file; options: the complete settings, which `save` and `fingerprint` record."""
        self.data, self.options = data, options

    @abc.abstractmethod
    def __call__(self, texts: Sequence[str], context: int) -> np.ndarray:
        """The model's input [len(texts), ...]; `context` is its size: tokens in a sequence, pixels of a side."""

    def fingerprint(self) -> str:
        """Hex digest of kind, settings and vocabulary: equal exactly when two tokenizers give the same ids."""
        settings = json.dumps([self.kind, self.options], sort_keys=True).encode()
        return hashlib.sha256(settings + b"\0" + self.data).hexdigest()

    def save(self, folder) -> None:
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

    def __init__(self, data: bytes, **options):
        super().__init__(data, **options)
        self._cache: dict[str, list[int]] = {}

    # --- what a kind of tokenizer defines ---

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens (SOT, EOT, PAD, mask) are left out."""

    # --- what they share ---

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens and without truncation."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._encode(text.encode("utf-8", "replace").decode())  # lone surrogates, as broken JSON escapes give them, become "?"
            if len(self._cache) >= _CACHED_TEXTS:
                self._cache.clear()
            if len(text) <= 1000:
                self._cache[text] = ids
        return list(ids)

    def __call__(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Encodes `texts` into int32 [len(texts), context]: SOT and EOT added, truncated with EOT kept last, padded.

        Raises UserError if `context` leaves no room for text.
        """
        if isinstance(texts, str):
            raise TypeError("a tokenizer takes a list of texts, not one string")
        start = [] if self.sot_id is None else [self.sot_id]
        end = [self.eot_id] if self.options["eot"] else []
        room = context - len(start) - len(end)
        if room < 1:
            raise UserError(f"context={context} leaves no room for text: at least {len(start) + len(end) + 1} is needed")
        out = np.full((len(texts), context), self.eot_id if self.options["pad_with_eot"] else self.pad_id, np.int32)
        for row, text in zip(out, texts, strict=True):
            ids = start + self.encode(text[:_MAX_CHARS])[:room] + end
            row[: len(ids)] = ids
        return out

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Number of tokens before the padding, EOT included: ids int [..., context] -> int32 [...]."""
        ids = np.asarray(ids)
        if not self.options["eot"]:
            return (ids != (self.eot_id if self.options["pad_with_eot"] else self.pad_id)).sum(-1, dtype=np.int32)
        is_eot = ids == self.eot_id
        return np.where(is_eot.any(-1), is_eot.argmax(-1) + 1, ids.shape[-1]).astype(np.int32)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str, keep: str = "") -> str:
    """Text in the canonical form of SigLIP's evaluation: `_` becomes a space, no punctuation, lower case, single spaces.

    Args:
        keep: a string that stays as it is, "{}" in templates and "," in class names.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    return " ".join(keep.join(part.translate(_PUNCTUATION) for part in parts).lower().split())


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; EOT is its `</s>`, SOT its `<s>`, PAD its `<pad>`, the mask its piece `<mask>` if it has one.

    A model without a padding piece pads with EOT. `lower=True` lower-cases before the model's own normalisation.
    """

    kind, file = "sentencepiece", "sentencepiece.model"

    def __init__(self, data: bytes, *, sot: bool = False, eot: bool = True, pad_with_eot: bool = False, lower: bool = False):
        import sentencepiece

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, lower=lower)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as e:
            raise UserError("the file is not a SentencePiece model") from e
        if self._model.eos_id() < 0:
            raise UserError("the SentencePiece model has no </s> piece, which is needed as end of text")
        if sot and self._model.bos_id() < 0:
            raise UserError("sot=true, but the SentencePiece model has no <s> piece")
        self.vocab_size = self._model.get_piece_size()
        self.eot_id = self._model.eos_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eot_id
        self.sot_id = self._model.bos_id() if sot else None
        mask = self._model.piece_to_id("<mask>")
        self.mask_id = mask if self._model.id_to_piece(mask) == "<mask>" else None
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self._model.is_control(i) or i == self.mask_id)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text.lower() if self.options["lower"] else text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids if int(i) not in self.special_ids])


class SiglipTokenizer(Tokenizer):
    """SigLIP's tokenizer as released: a SentencePiece model, or the `tokenizer.json` that Hugging Face made of one.

    Texts are padded with EOT ("sticky EOT": the last token, which is pooled, is always EOT).

    Args:
        clean: what is done to a text before: "canonical" (SigLIP in open_clip and transformers: lower case, no punctuation, single
            spaces) or "lower" (SigLIP and SigLIP 2 in big_vision).
    """

    kind, file = "siglip", "vocabulary"
    _EOT = ("</s>", "<eos>")

    def __init__(self, data: bytes, *, eot: bool = True, pad_with_eot: bool = True, clean: str = "canonical"):
        super().__init__(data, eot=eot, pad_with_eot=pad_with_eot, clean=clean)
        if clean not in ("canonical", "lower"):
            raise UserError(f"clean={clean!r} is unknown; allowed: canonical, lower")
        if data[:1] == b"{":
            from tokenizers import Tokenizer as HfTokenizer

            try:
                model = HfTokenizer.from_str(data.decode())
            except Exception as e:  # the library raises nothing more specific
                raise UserError(f"the file is not a tokenizer.json ({e})") from e
            ids = {piece: model.token_to_id(piece) for piece in (*self._EOT, "<pad>", "<unk>", "<bos>", "<s>", "<mask>")}
            eot_ids = [ids[piece] for piece in self._EOT if ids[piece] is not None]
            if not eot_ids:
                raise UserError(f"the tokenizer.json has none of the pieces {', '.join(self._EOT)}, one of which is needed as end of text")
            self.eot_id, self.vocab_size = eot_ids[0], model.get_vocab_size()
            self.special_ids = frozenset(i for i in ids.values() if i is not None and i != ids["<unk>"])
            self._ids, self._text = lambda text: model.encode(text, add_special_tokens=False).ids, model.decode
        else:
            model = SentencePieceTokenizer(data)
            self.eot_id, self.vocab_size, self.special_ids = model.eot_id, model.vocab_size, model.special_ids
            self._ids, self._text = model._encode, model.decode
        self.pad_id, self.sot_id, self.mask_id = self.eot_id, None, None

    def _encode(self, text: str) -> list[int]:
        return self._ids(canonicalize(text) if self.options["clean"] == "canonical" else text.lower())

    def decode(self, ids: Iterable[int]) -> str:
        return self._text([int(i) for i in ids if int(i) not in self.special_ids])


class ClipBpeTokenizer(Tokenizer):
    """Byte-level BPE of OpenAI CLIP: text is repaired (ftfy), HTML-unescaped twice, whitespace-collapsed and lower-cased; PAD is 0.

    Words are split by the Unicode tables of the `tokenizers` library, which know a few rare scripts (Tangut) later than others do.

    Args:
        specials: which literal strings in a text become the ids of SOT and EOT: "open_clip" (`<start_of_text>`, `<end_of_text>`),
            "openai" (`<|startoftext|>`, `<|endoftext|>`) or "none". Everything else is plain text.
        mask: adds a mask token as DeCLIP does, before SOT and EOT (49406, 49407, 49408), so that EOT stays the largest id.
    """

    kind, file = "clip_bpe", "bpe_simple_vocab_16e6.txt.gz"
    _SPECIALS = {"open_clip": ("<start_of_text>", "<end_of_text>"), "openai": ("<|startoftext|>", "<|endoftext|>"), "none": ()}
    _MERGES = 48_894

    def __init__(
        self,
        data: bytes,
        *,
        sot: bool = True,
        eot: bool = True,
        pad_with_eot: bool = False,
        specials: str = "open_clip",
        mask: bool = False,
    ):
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as HfTokenizer

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, specials=specials, mask=mask)
        if specials not in self._SPECIALS:
            raise UserError(f"specials={specials!r} is unknown; allowed: {', '.join(self._SPECIALS)}")
        try:
            lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode().split("\n")[1 : self._MERGES + 1]
            merges = [tuple(line.split(" ")) for line in lines]
            valid = len(merges) == self._MERGES and all(len(merge) == 2 for merge in merges)
        except (OSError, EOFError, UnicodeDecodeError):
            valid = False
        if not valid:
            raise UserError(f"the file is not CLIP's BPE vocabulary: a header and at least {self._MERGES} merges are expected")

        # Ids: the 256 bytes, printable ones first, each without and with the end-of-word mark; then the merges; then the special tokens.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of_char = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
        self._pieces = [*self._byte_of_char, *(c + "</w>" for c in self._byte_of_char), *("".join(merge) for merge in merges)]
        first = len(self._pieces) + mask
        self.mask_id = first - 1 if mask else None
        self.sot_id = first if sot else None
        self.eot_id = first + 1
        self.pad_id = 0
        self.vocab_size = first + 2
        self.special_ids = frozenset(range(len(self._pieces), self.vocab_size))  # without PAD, whose id 0 is also that of "!"

        self._literals = dict(zip(self._SPECIALS[specials], (first, first + 1), strict=False))
        # [sſ]: the published pattern ignores case, and ſ is a case variant of s that lower-casing keeps.
        words = [*self._literals, "'[sſ]", "'t", "'re", "'ve", "'m", "'ll", "'d", r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+"]
        pattern = "|".join(word.replace("|", r"\|") for word in words)
        self._words = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
        bytes_to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        vocab = {piece: i for i, piece in enumerate(self._pieces)}
        self._bpe = HfTokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([self._words, bytes_to_chars])

    def _encode(self, text: str) -> list[int]:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        if not any(literal in text for literal in self._literals):
            return self._bpe.encode(text).ids
        ids = []
        for word, _ in self._words.pre_tokenize_str(text):
            ids += [self._literals[word]] if word in self._literals else self._bpe.encode(word).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        if self.eot_id in ids:  # what follows is padding, and PAD would read as "!"
            ids = ids[: ids.index(self.eot_id)]
        words = "".join(self._pieces[i] for i in ids if i not in self.special_ids).replace("</w>", " ")
        raw = b"".join(b" " if c == " " else bytes([self._byte_of_char[c]]) for c in words)
        return raw.decode("utf-8", "replace").strip()


class WordPieceTokenizer(Tokenizer):
    """BERT WordPiece from a `vocab.txt`: SOT is [CLS], EOT is [SEP], PAD is [PAD], the mask is [MASK]. `lower` also strips accents."""

    kind, file = "wordpiece", "vocab.txt"

    def __init__(self, data: bytes, *, sot: bool = True, eot: bool = True, pad_with_eot: bool = False, lower: bool = True):
        from tokenizers import Tokenizer as HfTokenizer
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, lower=lower)
        try:
            pieces = data.decode().splitlines()
        except UnicodeDecodeError as e:
            raise UserError("the file is not a WordPiece vocabulary: UTF-8 text with one piece per line is expected") from e
        vocab = {piece.strip(): i for i, piece in enumerate(pieces)}
        if missing := [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if piece not in vocab]:
            raise UserError(f"the file is not a BERT vocabulary: {', '.join(missing)} missing among its {len(vocab)} pieces")
        self.vocab_size = len(pieces)
        self.pad_id = vocab["[PAD]"]
        self.sot_id = vocab["[CLS]"] if sot else None
        self.eot_id = vocab["[SEP]"]
        self.mask_id = vocab.get("[MASK]")
        self.special_ids = frozenset(vocab[p] for p in ("[PAD]", "[CLS]", "[SEP]", "[MASK]") if p in vocab)
        self._model = HfTokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._model.normalizer = normalizers.BertNormalizer(lowercase=lower)
        self._model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._model.decoder = decoders.WordPiece()

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids if int(i) not in self.special_ids])


@functools.cache
def _kinds() -> dict[str, tuple[type[TextInput], epath.Path | None]]:
    """Class and shipped file by kind."""
    from clip_jax.data.render import Font  # which is a TextInput itself

    return {
        "sentencepiece": (SentencePieceTokenizer, SHIPPED_SENTENCEPIECE),
        "siglip": (SiglipTokenizer, None),
        "clip_bpe": (ClipBpeTokenizer, SHIPPED_CLIP_BPE),
        "wordpiece": (WordPieceTokenizer, None),
        "unifont": (Font, SHIPPED_UNIFONT),
    }


def make_tokenizer(spec: str) -> TextInput:
    """Makes the tokenizer of `spec` (grammar in the module docstring), or reads the folder that `Tokenizer.save` wrote.

    Raises UserError if the kind, an option or its value is unknown, or a file is missing or of another format.
    """
    name, _, options = str(spec).partition("?")
    kind, _, path = name.partition(":")
    if kind not in _kinds():
        return _load(epath.Path(spec))
    cls, shipped = _kinds()[kind]
    file = epath.Path(path) if path else shipped
    if file is None:
        raise UserError(f"tokenizer {spec!r} needs the path of its vocabulary: '{kind}:/path/{cls.file}'")
    return _make(cls, file, _parse_options(cls, options, spec))


def _load(folder: epath.Path) -> TextInput:
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"tokenizer {str(folder)!r} is neither a kind ({', '.join(_kinds())}) nor a folder that holds {METADATA_FILE}")
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text())
        cls = _kinds()[metadata["kind"]][0]
        tokenizer = _make(cls, folder / metadata["file"], metadata["options"])
        saved = metadata["fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise UserError(f"{folder / METADATA_FILE} is damaged, or of a newer version ({type(e).__name__}: {e})") from e
    if tokenizer.fingerprint() != saved:
        raise UserError(f"{folder}: {cls.file} or its settings are not those that were saved (the fingerprint differs)")
    return tokenizer


def _make(cls: type[TextInput], file: epath.Path, options: dict) -> TextInput:
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"tokenizer {cls.kind}: cannot read {file} ({e.strerror or e})") from e
    try:
        return cls(data, **options)
    except UserError as e:
        raise UserError(f"tokenizer {cls.kind}: {file}: {e}") from e


def _parse_options(cls: type[TextInput], text: str, spec: str) -> dict:
    allowed = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "data"}
    options = {}
    for item in filter(None, text.split("&")):
        name, _, value = item.partition("=")
        if name not in allowed:
            raise UserError(f"tokenizer {spec!r}: unknown option {name!r}; allowed: {', '.join(allowed)}")
        if isinstance(allowed[name], bool):
            if value not in ("true", "false"):
                raise UserError(f"tokenizer {spec!r}: {name}={value!r}; allowed: true, false")
            options[name] = value == "true"
        else:
            options[name] = value
    return options
