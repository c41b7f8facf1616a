"""Finds the tokenizer of third-party weights by the files in their folder."""

import json
import pathlib

from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.interop.towers.files import read_json
from clip_jax.interop.towers.sentence import lower_cases

CLIP_VOCABULARY = 49408
GEMMA_VOCABULARY = 256_000
HF = "Hugging Face"
HF_CLIP = "clip_bpe?clean=transformers&specials=openai"


def find(folder, method, vocab_size, library=""):
    """Returns the spec of the tokenizer in a folder, otherwise of CLIP's or CLIPPO's own when it fits, otherwise None.

    Args:
      folder: the folder of the weights.
      method: the model's method.
      vocab_size: of the text tower, or None.
      library: the kind of weights, such as "open_clip" or "Hugging Face CLIPModel". Texts are cleaned as there.

    `clip_jax.data.tokenizers.make_tokenizer` takes the spec. Raises UserError for a damaged file.
    """
    folder = pathlib.Path(folder)
    if method == "clippo":
        return "unifont"
    if spec := _exported(folder):
        return spec
    if method == "siglip" and (library != "open_clip" or vocab_size != CLIP_VOCABULARY):
        return _siglip(folder, vocab_size, library)  # open_clip also trains CLIP's towers with the loss of SigLIP
    if method == "align":
        return _wordpiece(folder / "vocab.txt") if (folder / "vocab.txt").is_file() else _of_json(folder)
    spec = HF_CLIP if library.startswith(HF) else "clip_bpe"
    if (folder / "merges.txt").is_file():
        return _clip(folder / "merges.txt", spec)
    if (folder / "tokenizer.json").is_file():
        return _of_json(folder, spec)
    return spec if vocab_size == CLIP_VOCABULARY else None


def _clip(file, spec):
    """Returns the spec of CLIP's tokenizer of a file; `spec` itself, that of the package, where both agree."""
    of_file = f"clip_bpe:{file}{spec.removeprefix('clip_bpe')}"
    return spec if make_tokenizer(of_file)._pieces == make_tokenizer(spec)._pieces else of_file


def _wordpiece(file):
    return f"wordpiece:{file}{'' if lower_cases(file.parent) else '?lower=false'}"


def _exported(folder):
    """Returns the spec of a SentencePiece tokenizer that `clip_jax.interop.export` wrote, or None."""
    config, file = read_json(folder / "tokenizer_config.json") or {}, folder / "tokenizer.json"
    whole = read_json(file) if "clean" in config else None
    if whole is None:
        return None
    spec = f"siglip:{file}?clean={config['clean'] or 'none'}"  # earlier exports have "" for none
    try:
        pad, eot = config["pad_token"], config["eos_token"]
        has_sot = "SpecialToken" in whole["post_processor"]["single"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file}: not an exported tokenizer ({type(error).__name__}: {error})") from None
    if pad not in (eot, "<pad>"):
        raise UserError(f"{file}: only <pad> is known as padding, not {pad!r}: give the tokenizer, --tokenizer=SPEC")
    return spec + ("" if pad == eot else "&pad_with_eot=false") + ("&sot=true" if has_sot else "")


def _siglip(folder, vocab_size, library):
    """Returns the spec of SigLIP's tokenizer or None.

    SigLIP cleans a text to lower-case words without punctuation in open_clip and transformers, in open_clip SigLIP 2
    too. In big_vision both, and in transformers SigLIP 2, which has Gemma's vocabulary, only lower the case.
    """
    clean = "lower" if vocab_size == GEMMA_VOCABULARY else "canonical"
    if library == "open_clip":
        clean = "open_clip"
    elif library == "big_vision" or library.startswith(HF):
        clean = "lower" if library == "big_vision" or vocab_size == GEMMA_VOCABULARY else "transformers"
    for name in ("tokenizer.json", "spiece.model", "tokenizer.model"):
        if (folder / name).is_file():
            return f"siglip:{folder / name}?clean={clean}"
    return None


def _of_json(folder, spec="clip_bpe"):
    """Returns the spec of a `tokenizer.json`: CLIP's tokenizer with the options of `spec`, or BERT's.

    Returns None without the file, and for another kind of tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        kind = json.loads(file.read_text())["model"].get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a Hugging Face tokenizer ({type(error).__name__}: {error})") from None
    if kind not in ("BPE", "WordPiece"):
        return None
    return _wordpiece(file) if kind == "WordPiece" else _clip(file, spec)
