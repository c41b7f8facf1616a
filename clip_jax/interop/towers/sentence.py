"""Reads what the folder of a sentence transformer says beside its weights: pooling, length and tokenizer."""

import json

from clip_jax.data.tokenizers.wordpiece import WordPieceTokenizer
from clip_jax.errors import UserError
from clip_jax.interop.towers.files import read_json

#: Modules of sentence-transformers that an embedding of unit length may have, by the last part of their type.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLS = {"mean": "mean", "mean_tokens": "mean", "cls": "first", "cls_token": "first"}


def pooling(folder):
    """Returns the pooling of a sentence transformer, `first` or `mean`.

    Raises UserError for a folder without `modules.json`, and for modules or a pooling that have no counterpart here.
    """
    file = folder / "modules.json"
    try:
        modules = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads(file.read_text())}
    except FileNotFoundError:
        raise UserError(f"{file} is missing, which says how a sentence transformer pools its tokens") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the modules of a sentence transformer ({type(error).__name__}: {error})"
        ) from None
    if "Pooling" not in modules or modules.keys() - set(_MODULES):
        raise UserError(f"{file}: its modules are {', '.join(modules)}: allowed are {', '.join(_MODULES)}")
    cfg = read_json(folder / modules["Pooling"] / "config.json") or {}
    modes = [cfg["pooling_mode"]] if "pooling_mode" in cfg else []
    modes += [name.removeprefix("pooling_mode_") for name, on in cfg.items() if name.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise UserError(f"{folder / modules['Pooling']}/config.json: pooling {modes}: allowed are {', '.join(_POOLS)}")
    return _POOLS[modes[0]]


def longest(folder, positions):
    """Returns the largest number of tokens of a text: that of the folder's files, at most `positions`."""
    cfg = (read_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    tokenizer = (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length")
    return int(min(cfg or tokenizer or positions, positions))


def lower_cases(folder):
    """Returns whether the WordPiece tokenizer of a folder lower-cases texts, which a cased one says in its files."""
    cfg = read_json(folder / "tokenizer_config.json") or {}
    normalizer = (read_json(folder / "tokenizer.json") or {}).get("normalizer")
    normalizer = normalizer if isinstance(normalizer, dict) else {}
    return cfg.get("do_lower_case") is not False and normalizer.get("lowercase") is not False


def tokenizer(folder):
    """Returns the WordPiece tokenizer of a folder with `tokenizer.json` or `vocab.txt`; raises UserError otherwise."""
    lower, whole = lower_cases(folder), read_json(folder / "tokenizer.json")
    if whole is None:
        if not (folder / "vocab.txt").is_file():
            raise UserError(f"{folder}: the folder of a text tower needs tokenizer.json or vocab.txt")
        return WordPieceTokenizer((folder / "vocab.txt").read_bytes(), lower=lower)
    try:
        model, vocab = whole["model"], whole["model"]["vocab"]
        if model["type"] != "WordPiece":
            raise UserError(f"{folder / 'tokenizer.json'}: a {model['type']} tokenizer: only WordPiece is allowed")
        return WordPieceTokenizer("\n".join(sorted(vocab, key=vocab.get)).encode(), lower=lower)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'tokenizer.json'}: no tokenizer ({type(error).__name__}: {error})") from None
