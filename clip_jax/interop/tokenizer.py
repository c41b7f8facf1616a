"""Finds the tokenizer of third-party weights by the files in their folder."""

import json
import pathlib

from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.clip_bpe import ClipBpeTokenizer
from clip_jax.data.tokenizers.wordpiece import WordPieceTokenizer
from clip_jax.errors import UserError

CLIP_VOCABULARY = 49408
GEMMA_VOCABULARY = 256_000
HF = "Hugging Face"
HF_CLIP = "clip_bpe?clean=transformers&specials=openai"


def find(folder, method, vocab_size, library=""):
    """Returns the tokenizer in a folder, otherwise CLIP's or CLIPPO's own when it fits, otherwise None.

    Args:
      folder: the folder of the weights.
      method: the model's method.
      vocab_size: of the text tower, or None.
      library: the kind of weights, such as "open_clip" or "Hugging Face CLIPModel". Texts are cleaned as there.

    Raises UserError for a damaged file.
    """
    folder = pathlib.Path(folder)
    if method == "clippo":
        return make_tokenizer("unifont")
    if method == "siglip":
        return _siglip(folder, vocab_size, library)
    if method == "align":
        return (
            _of_json(folder)
            if not (folder / "vocab.txt").is_file()
            else make_tokenizer(f"wordpiece:{folder / 'vocab.txt'}")
        )
    spec = HF_CLIP if library.startswith(HF) else "clip_bpe"
    if (folder / "merges.txt").is_file():
        return _clip((folder / "merges.txt").read_bytes(), spec, folder / "merges.txt")
    if (folder / "tokenizer.json").is_file():
        return _of_json(folder, spec)
    return make_tokenizer(spec) if vocab_size == CLIP_VOCABULARY else None


def spec_of(tokenizer):
    """Returns the string that makes a tokenizer, or its kind where the string would need a file."""
    specs = ("clip_bpe", HF_CLIP) if tokenizer.kind == "clip_bpe" else ()
    return next((spec for spec in specs if tokenizer == make_tokenizer(spec)), tokenizer.kind)


def _clip(data, spec, file):
    """Returns CLIP's tokenizer of a list of merges with the options of `spec`; that of the package where both agree."""
    published = make_tokenizer(spec)
    try:
        tokenizer = ClipBpeTokenizer(data, **published.options)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return published if tokenizer._pieces == published._pieces else tokenizer


def _siglip(folder, vocab_size, library):
    """Returns SigLIP's tokenizer or None.

    SigLIP cleans a text to lower-case words without punctuation in open_clip and transformers, in open_clip SigLIP 2
    too. In big_vision both, and in transformers SigLIP 2, which has Gemma's vocabulary, only lower the case. Files
    of `clip_jax.interop.export` name the cleaning.
    """
    config, clean = folder / "tokenizer_config.json", "lower" if vocab_size == GEMMA_VOCABULARY else "canonical"
    if library == "open_clip":
        clean = "open_clip"
    elif library == "big_vision" or library.startswith(HF):
        clean = "lower" if library == "big_vision" or vocab_size == GEMMA_VOCABULARY else "transformers"
    if config.is_file():
        try:
            clean = json.loads(config.read_text()).get("clean") or clean
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config}: not a tokenizer configuration ({type(error).__name__}: {error})") from None
    for name in ("tokenizer.json", "spiece.model", "tokenizer.model"):
        if (folder / name).is_file():
            return make_tokenizer(f"siglip:{folder / name}?clean={clean}")
    return None


def _of_json(folder, spec="clip_bpe"):
    """Returns CLIP's tokenizer with the options of `spec`, or BERT's, from a `tokenizer.json`, or None."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        model = json.loads(file.read_text())["model"]
        if model.get("type", "BPE") == "WordPiece":
            vocab = sorted(model["vocab"], key=model["vocab"].get)
            return WordPieceTokenizer("\n".join(vocab).encode())
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a Hugging Face tokenizer ({type(error).__name__}: {error})") from None
    return _clip("\n".join(["#version: 0.2", *merges]).encode(), spec, file)
