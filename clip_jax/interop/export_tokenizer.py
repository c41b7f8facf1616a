"""Writes tokenizers as files that open_clip and transformers read."""

import json
import string

from clip_jax.data import tokenizers
from clip_jax.data.tokenizers.sentencepiece import read_json
from clip_jax.errors import UserError

#: Special tokens by their names in transformers.
_BERT = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
_CLIP = dict(
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
)


def for_open_clip(tokenizer, context, text_cfg):
    """Returns `{file name: content}` for an open_clip folder; adds the needed fields to its section `text_cfg`."""
    if tokenizer == tokenizers.make_tokenizer("clip_bpe"):
        return {}  # it is built into open_clip
    text_cfg["hf_tokenizer_name"] = "local"  # open_clip reads the files of a local folder, whatever this name is
    return for_hf(tokenizer, context)


def for_hf(tokenizer, context):
    """Returns `{file name: content}` for `AutoTokenizer.from_pretrained`.

    Args:
      tokenizer: a `clip_jax.data.tokenizers.Tokenizer`.
      context: tokens in a sequence.

    Raises UserError for a tokenizer that transformers cannot express.
    """
    make = {
        "clip_bpe": _clip_bpe,
        "wordpiece": _wordpiece,
        "sentencepiece": _sentencepiece,
        "siglip": _sentencepiece,
    }.get(tokenizer.kind)
    if make is None:
        raise UserError(
            f"transformers cannot express a tokenizer {tokenizer.kind!r}: export without it (--without-tokenizer)"
        )
    files, config = make(tokenizer)
    config |= dict(
        model_max_length=context, padding_side="right", truncation_side="right", clean_up_tokenization_spaces=False
    )
    return files | {"tokenizer_config.json": config}


def _require(tokenizer, **options):
    for name, value in options.items():
        if tokenizer.options[name] != value:
            raise UserError(
                f"transformers cannot express a tokenizer {tokenizer.kind!r} with {name}={tokenizer.options[name]}: "
                "export without it (--without-tokenizer)"
            )


def _clip_bpe(tokenizer):
    _require(tokenizer, sot=True, eot=True, mask=False)  # tokens after EOT have no effect, so padding may differ
    vocab = {piece: i for i, piece in enumerate(tokenizer._pieces)}
    vocab |= {_CLIP["bos_token"]: len(vocab), _CLIP["eos_token"]: len(vocab) + 1}
    merges = json.loads(tokenizer._bpe.to_str())["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    files = {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *lines, ""]).encode()}
    return files, dict(_CLIP, tokenizer_class="CLIPTokenizer")


def _wordpiece(tokenizer):
    from tokenizers import Tokenizer, processors

    _require(tokenizer, sot=True, eot=True, pad_with_eot=False)
    model = Tokenizer.from_str(tokenizer._model.to_str())
    ids = [("[CLS]", tokenizer.sot_id), ("[SEP]", tokenizer.eot_id)]
    model.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    special = {name: piece for name, piece in _BERT.items() if piece != "[MASK]" or tokenizer.mask_id is not None}
    files = {"vocab.txt": tokenizer.data, "tokenizer.json": json.loads(model.to_str())}
    return files, dict(special, tokenizer_class="BertTokenizer", do_lower_case=tokenizer.options["lower"])


def _sentencepiece(tokenizer):
    """Returns the files of a unigram SentencePiece or SigLIP tokenizer; the cleaning of texts is its normalizer.

    The field `clean` names the cleaning for `clip_jax.interop.tokenizer`. No other program writes or reads it.
    """
    from tokenizers import Regex, normalizers, processors

    sot = tokenizer.options.get("sot", False)
    _require(tokenizer, eot=True)
    model = read_json(tokenizer.data) if tokenizer.data[:1] == b"{" else unigram(tokenizer.data)
    clean = tokenizer.options.get("clean", "lower" if tokenizer.options.get("lower") else "none")
    steps = [] if clean == "none" else [normalizers.Lowercase()]
    if clean in ("canonical", "open_clip", "transformers"):
        steps = [
            normalizers.Replace("_", "" if clean == "transformers" else " "),
            normalizers.Replace(Regex("[" + "".join("\\" + c for c in string.punctuation) + "]"), ""),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    model.normalizer = normalizers.Sequence([*steps, *([model.normalizer] if model.normalizer else [])])
    eot, pad = (model.id_to_token(i) for i in (tokenizer.eot_id, tokenizer.pad_id))
    start = model.id_to_token(tokenizer.sot_id) if sot else ""
    ids = [(eot, tokenizer.eot_id)] + ([(start, tokenizer.sot_id)] if sot else [])
    model.post_processor = processors.TemplateProcessing(f"{start} $A {eot}".strip(), special_tokens=ids)
    special = dict(eos_token=eot, pad_token=eot if tokenizer.options["pad_with_eot"] else pad)
    return {"tokenizer.json": json.loads(model.to_str())}, special | dict(
        tokenizer_class="PreTrainedTokenizerFast", clean=clean
    )


def unigram(data):
    """Returns the `tokenizers.Tokenizer` of a SentencePiece model, without special tokens around a text.

    Args:
      data: the content of the model file, bytes.

    Raises UserError for a model that is not unigram.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = pb.ModelProto.FromString(data)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != spec.UNIGRAM:
        raise UserError(
            "only unigram SentencePiece models can be exported: export without the tokenizer (--without-tokenizer)"
        )
    model = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces], spec.unk_id, spec.byte_fallback))
    steps = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    model.normalizer = normalizers.Sequence(steps)
    model.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if normal.add_dummy_prefix else "never", split=False
    )
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    model.add_special_tokens(
        [AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type == p.CONTROL]
    )
    return model
