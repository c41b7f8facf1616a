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
    unifont[:/path/unifont.hex]       no tokenizer: the font that draws texts as pictures, `clip_jax.data.font.Font` (CLIPPO)

Every sequence is `[SOT] text [EOT] padding...`, cut so that EOT stays last. Options of every kind:

    sot            prepend SOT (CLIP BPE: true, WordPiece [CLS]: true, SentencePiece: false)
    eot            append EOT (true; WordPiece [SEP]: true)
    pad_with_eot   pad with EOT instead of PAD, "sticky EOT" as in SigLIP (false)

Padding is never to be found by `ids == pad_id` (CLIP pads with 0, which is also the id of "!"): use `Tokenizer.lengths`.
"""

import inspect
import json

from etils import epath

from clip_jax.data.tokenizers.base import METADATA_FILE, VOCAB_FOLDER
from clip_jax.data.tokenizers.clip_bpe import ClipBpeTokenizer
from clip_jax.data.tokenizers.font import Font
from clip_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, SiglipTokenizer
from clip_jax.data.tokenizers.wordpiece import WordPieceTokenizer
from clip_jax.errors import UserError

#: Class and shipped file by kind.
_KINDS = {
    "sentencepiece": (SentencePieceTokenizer, VOCAB_FOLDER / "emoji_4k.model"),
    "siglip": (SiglipTokenizer, None),
    "clip_bpe": (ClipBpeTokenizer, VOCAB_FOLDER / "bpe_simple_vocab_16e6.txt.gz"),
    "wordpiece": (WordPieceTokenizer, None),
    "unifont": (Font, VOCAB_FOLDER / "unifont-15.0.01.hex.gz"),
}


def make_tokenizer(spec):
    """Makes the tokenizer of `spec` (grammar in the module docstring), or reads the folder that `Tokenizer.save` wrote.

    Raises UserError if the kind, an option or its value is unknown, or a file is missing or of another format.
    """
    name, _, options = str(spec).partition("?")
    kind, _, path = name.partition(":")
    if kind not in _KINDS:
        return _load(epath.Path(spec))
    cls, shipped = _KINDS[kind]
    file = epath.Path(path) if path else shipped
    if file is None:
        raise UserError(f"tokenizer {spec!r} needs the path of its vocabulary: '{kind}:/path/{cls.file}'")
    return _make(cls, file, _parse_options(cls, options, spec))


def _load(folder):
    if not (folder / METADATA_FILE).exists():
        raise UserError(
            f"tokenizer {str(folder)!r} is neither a kind ({', '.join(_KINDS)}) nor a folder that holds {METADATA_FILE}"
        )
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text())
        cls = _KINDS[metadata["kind"]][0]
        tokenizer = _make(cls, folder / metadata["file"], metadata["options"])
        saved = metadata["fingerprint"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise UserError(f"{folder / METADATA_FILE} is damaged, or of a newer version ({type(e).__name__}: {e})") from e
    if tokenizer.fingerprint() != saved:
        raise UserError(f"{folder}: {cls.file} or its settings are not those that were saved (the fingerprint differs)")
    return tokenizer


def _make(cls, file, options):
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"tokenizer {cls.kind}: cannot read {file} ({e.strerror or e})") from e
    try:
        return cls(data, **options)
    except UserError as e:
        raise UserError(f"tokenizer {cls.kind}: {file}: {e}") from e


def _parse_options(cls, text, spec):
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
