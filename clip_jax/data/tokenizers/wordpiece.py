"""The WordPiece tokenizer of BERT."""

from clip_jax.data.tokenizers.base import Tokenizer
from clip_jax.errors import UserError


class WordPieceTokenizer(Tokenizer):
    """The WordPiece of BERT: SOT is [CLS], EOT is [SEP], PAD is [PAD], and the mask token is [MASK].

    Args:
      data: bytes, the content of vocab.txt, one piece per line.
      sot: bool, whether SOT is prepended.
      eot: bool, whether EOT is appended.
      pad_with_eot: bool, whether EOT is the padding instead of PAD.
      lower: bool, whether a text is lower-cased and its accents are stripped.

    Raises UserError for a file that is not a BERT vocabulary.
    """

    kind, file = "wordpiece", "vocab.txt"

    def __init__(self, data, *, sot=True, eot=True, pad_with_eot=False, lower=True):
        from tokenizers import Tokenizer as HfTokenizer
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, lower=lower)
        try:
            pieces = data.decode().splitlines()
        except UnicodeDecodeError as e:
            raise UserError(
                "the file is not a WordPiece vocabulary: UTF-8 text with one piece per line is expected"
            ) from e
        vocab = {piece.strip(): i for i, piece in enumerate(pieces)}
        if missing := [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if piece not in vocab]:
            raise UserError(
                f"the file is not a BERT vocabulary: {', '.join(missing)} missing among its {len(vocab)} pieces"
            )
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

    def _encode(self, text):
        return self._model.encode(text).ids

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids if int(i) not in self.special_ids])
