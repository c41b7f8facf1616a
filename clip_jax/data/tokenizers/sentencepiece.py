"""SentencePiece tokenizers, SigLIP's among them."""

from clip_jax.data.tokenizers.base import Tokenizer, canonicalize, repaired
from clip_jax.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    EOT is its piece `</s>`, SOT `<s>`, PAD `<pad>`, and the mask token `<mask>` if it exists. A model without `<pad>`
    pads with EOT.

    Args:
      data: bytes, the serialised model.
      sot: bool, whether SOT is prepended.
      eot: bool, whether EOT is appended.
      pad_with_eot: bool, whether EOT is the padding instead of PAD.
      lower: bool, whether a text is lower-cased before the model's own normalisation.

    Raises UserError for another file, and for a model without a piece that is needed.
    """

    kind, file = "sentencepiece", "sentencepiece.model"

    def __init__(self, data, *, sot=False, eot=True, pad_with_eot=False, lower=False):
        import sentencepiece

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, lower=lower)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as e:
            raise UserError("the file is not a SentencePiece model") from e
        if self._model.eos_id() < 0:
            raise UserError("the SentencePiece model has no piece </s>, which is needed as end of text")
        if sot and self._model.bos_id() < 0:
            raise UserError("sot=true, but the SentencePiece model has no <s> piece")
        self.vocab_size = self._model.get_piece_size()
        self.eot_id = self._model.eos_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eot_id
        self.sot_id = self._model.bos_id() if sot else None
        mask = self._model.piece_to_id("<mask>")
        self.mask_id = mask if self._model.id_to_piece(mask) == "<mask>" else None
        ids = range(self.vocab_size)
        self.special_ids = frozenset(i for i in ids if self._model.is_control(i) or i == self.mask_id)

    def _encode(self, text):
        return self._model.encode(text.lower() if self.options["lower"] else text)

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids if int(i) not in self.special_ids])


_CLEAN = {
    "canonical": canonicalize,
    "open_clip": lambda text: canonicalize(repaired(text)),
    "transformers": lambda text: canonicalize(text.lower().replace("_", "")),
    "lower": str.lower,
    "none": str,
}


def read_json(data):
    """Returns the `tokenizers.Tokenizer` of a `tokenizer.json`, bytes, without the padding and truncation stored in it.

    Raises UserError for another file.
    """
    from tokenizers import Tokenizer as HfTokenizer

    try:
        model = HfTokenizer.from_str(data.decode())
    except Exception as e:  # the library raises nothing more specific
        raise UserError(f"the file is not a tokenizer.json ({e})") from e
    model.no_padding()
    model.no_truncation()
    return model


class SiglipTokenizer(Tokenizer):
    """SigLIP's tokenizer as released: a SentencePiece model, or the tokenizer.json that Hugging Face made of one.

    Texts are padded with EOT ("sticky EOT"), so the last token, which is pooled, is always EOT. SOT and PAD, for an
    exported tokenizer of another model, are `<s>` or `<bos>` and `<pad>`. A vocabulary without `<pad>` pads with EOT.

    Args:
      data: bytes, the file.
      eot: bool, whether EOT is appended.
      pad_with_eot: bool, whether EOT is the padding instead of PAD.
      clean: str, the preprocessing of a text: "canonical" (`canonicalize`), "open_clip" (repaired as CLIP's texts, then
        `canonicalize`), "transformers" (`canonicalize`, but "_" is removed as other punctuation is), "lower"
        (lower-casing; SigLIP and SigLIP 2 in big_vision, SigLIP 2 in transformers) or "none".
      sot: bool, whether SOT is prepended.

    Raises UserError for another file, one without a piece that is needed, and an unknown `clean`.
    """

    kind, file = "siglip", "vocabulary"
    _EOT, _SOT = ("</s>", "<eos>"), ("<s>", "<bos>")

    def __init__(self, data, *, eot=True, pad_with_eot=True, clean="canonical", sot=False):
        super().__init__(data, eot=eot, pad_with_eot=pad_with_eot, clean=clean)
        if sot:
            self.options["sot"] = sot  # not otherwise: fingerprints of earlier runs lack it
        if clean not in _CLEAN:
            raise UserError(f"clean={clean!r} is unknown; allowed: {', '.join(_CLEAN)}")
        if data[:1] == b"{":
            model = read_json(data)
            pieces = (*self._EOT, *self._SOT, "<pad>", "<unk>", "<mask>")
            ids = {piece: model.token_to_id(piece) for piece in pieces}

            def first(pieces, what):
                found = [ids[piece] for piece in pieces if ids[piece] is not None]
                if not found:
                    raise UserError(f"the tokenizer.json needs one of the pieces {', '.join(pieces)} as {what} of text")
                return found[0]

            self.eot_id, self.vocab_size = first(self._EOT, "end"), model.get_vocab_size()
            self.sot_id = first(self._SOT, "start") if sot else None
            self.pad_id = self.eot_id if ids["<pad>"] is None else ids["<pad>"]
            self.special_ids = frozenset(i for i in ids.values() if i is not None and i != ids["<unk>"])
            self._ids, self._text = lambda text: model.encode(text, add_special_tokens=False).ids, model.decode
        else:
            model = SentencePieceTokenizer(data, sot=sot)
            self.eot_id, self.vocab_size = model.eot_id, model.vocab_size
            self.sot_id, self.pad_id = model.sot_id, model.pad_id
            self.special_ids = model.special_ids
            self._ids, self._text = model._encode, model.decode
        self.mask_id = None

    def _encode(self, text):
        return self._ids(_CLEAN[self.options["clean"]](text))

    def decode(self, ids):
        return self._text([int(i) for i in ids if int(i) not in self.special_ids])
