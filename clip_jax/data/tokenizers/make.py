"""Makes a tokenizer from a string: SentencePiece (the default), CLIP BPE, BERT WordPiece, or the font of CLIPPO.

    tokenizer = make_tokenizer("sentencepiece")               # the small model in the package
    ids = tokenizer(["a red apple", "octopus"], context=16)   # int32 [2, 16]
    tokenizer.save("runs/clip/tokenizer")
    make_tokenizer("runs/clip/tokenizer")                     # the same tokenizer

The string is a spec, a folder that `save` wrote, or a SentencePiece file whose name ends in .model:

    SPEC   = KIND [":" PATH] ["?" OPTION {"&" OPTION}]
    OPTION = KEY "=" VALUE

KIND and PATH are one of

    sentencepiece                 the model in the package: 4k unigram pieces with byte fallback, lower-casing
    sentencepiece:/path/spm.model any SentencePiece model (c4_en, mC4, Gemma); lower=true if it does not lower-case
    clip_bpe                      the vocabulary of OpenAI CLIP, 49,408 ids; options specials, mask, clean
    wordpiece:/path/vocab.txt     uncased BERT; option lower
                                  Hugging Face's tokenizer.json serves both, in place of the vocabulary
    siglip:/path/spiece.model     SigLIP's SentencePiece model or tokenizer.json, padded with EOT; option clean
    unifont[:/path/unifont.hex]   the font that draws texts as images (CLIPPO); options lower, monospace

The class of a kind documents its options. Every sequence is `[SOT] text [EOT] padding`, truncated so that EOT stays
last. Options of the tokenizers, with their defaults:

    sot            prepends SOT: false (clip_bpe and wordpiece: true)
    eot            appends EOT: true
    pad_with_eot   pads with EOT instead of PAD, "sticky EOT": false (siglip: true)

CLIP pads with 0, which is also the id of "!". `ids == pad_id` therefore does not find padding: use `Tokenizer.lengths`.
"""

import functools
import inspect
import json

from etils import epath

from clip_jax.data.tokenizers.base import METADATA_FILE, VOCAB_FOLDER
from clip_jax.data.tokenizers.clip_bpe import ClipBpeTokenizer
from clip_jax.data.tokenizers.font import Font
from clip_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, SiglipTokenizer
from clip_jax.data.tokenizers.wordpiece import WordPieceTokenizer
from clip_jax.errors import UserError

# The class of each kind, and its vocabulary in the package.
_KINDS = {
    "sentencepiece": (SentencePieceTokenizer, VOCAB_FOLDER / "emoji_4k.model"),
    "siglip": (SiglipTokenizer, None),
    "clip_bpe": (ClipBpeTokenizer, VOCAB_FOLDER / "bpe_simple_vocab_16e6.txt.gz"),
    "wordpiece": (WordPieceTokenizer, None),
    "unifont": (Font, VOCAB_FOLDER / "unifont-15.0.01.hex.gz"),
}


def make_tokenizer(spec):
    """Returns the tokenizer of a spec, or the one that was saved in a folder.

    Args:
      spec: str, such as "clip_bpe?specials=openai"; the grammar is in the docstring of this module.

    Returns:
      A `Tokenizer`, or a `Font` for the kind unifont.

    Raises UserError when the kind, an option or its value is unknown, or a file is missing or in another format.
    """
    name, _, options = str(spec).partition("?")
    kind, _, path = name.partition(":")
    if kind not in _KINDS and name.endswith(".model") and epath.Path(name).is_file():
        return make_tokenizer(f"sentencepiece:{spec}")
    if kind not in _KINDS:
        return _load(epath.Path(spec))
    cls, shipped = _KINDS[kind]
    file = epath.Path(path) if path else shipped
    if file is None:
        raise UserError(f"tokenizer {spec!r} needs the path of its vocabulary: '{kind}:/path/{cls.file}'")
    return _make(cls, file, _parse_options(cls, options, spec))


def _load(folder):
    if not (folder / METADATA_FILE).exists():
        kinds = ", ".join(_KINDS)
        raise UserError(
            f"tokenizer {str(folder)!r} is neither a kind ({kinds}) nor a folder that holds {METADATA_FILE}"
        )
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text())
        cls = _KINDS[metadata["kind"]][0]
        tokenizer = _make(cls, folder / metadata["file"], metadata["options"])
        saved = metadata["fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise UserError(
            f"{folder / METADATA_FILE} is damaged, or from a newer version ({type(e).__name__}: {e})"
        ) from e
    if tokenizer.fingerprint() != saved:
        raise UserError(
            f"{folder}: {cls.file} or its settings have changed since they were saved (fingerprint differs)"
        )
    return tokenizer


def _make(cls, file, options):
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"tokenizer {cls.kind}: cannot read {file} ({e.strerror or e})") from e
    if file.suffix == ".json" and cls in (ClipBpeTokenizer, WordPieceTokenizer):
        data = _vocabulary(cls, data, file)
    try:
        return _of_vocabulary(cls, data, tuple(options.items()))
    except UserError as e:
        raise UserError(f"tokenizer {cls.kind}: {file}: {e}") from e


@functools.lru_cache(8)
def _of_vocabulary(cls, data, options):
    return cls(data, **dict(options))


def _vocabulary(cls, data, file):
    """Returns the vocabulary file of a class from the bytes of Hugging Face's `tokenizer.json`."""
    try:
        model = json.loads(data)["model"]
        if cls is WordPieceTokenizer:
            return "\n".join(sorted(model["vocab"], key=model["vocab"].get)).encode()
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a Hugging Face tokenizer ({type(error).__name__}: {error})") from None
    return "\n".join(["#version: 0.2", *merges]).encode()


def _parse_options(cls, text, spec):
    """Returns the options of a spec as keyword arguments of its class."""
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
