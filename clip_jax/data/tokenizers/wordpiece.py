"""The WordPiece tokenizer of BERT and MPNet."""

import re

from clip_jax.data.tokenizers.base import Tokenizer
from clip_jax.errors import UserError


class WordPieceTokenizer(Tokenizer):
    """The WordPiece of BERT: SOT is [CLS], EOT is [SEP], PAD is [PAD], and the mask token is [MASK].

    A vocabulary that begins with <s>, <pad> and </s> is MPNet's: these are SOT, PAD and EOT, and the mask token is
    <mask>.

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
            # Not splitlines: U+2028 is a piece of Chinese vocabularies.
            pieces = re.sub(r"\r\n?", "\n", data.decode()).removesuffix("\n").split("\n")
        except UnicodeDecodeError as e:
            raise UserError(
                "the file is not a WordPiece vocabulary: UTF-8 text with one piece per line is expected"
            ) from e
        vocab = {piece.strip(" \t"): i for i, piece in enumerate(pieces)}
        mpnet = [piece.strip(" \t") for piece in pieces[:3]] == ["<s>", "<pad>", "</s>"]
        names = ("<pad>", "<s>", "</s>", "<mask>") if mpnet else ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
        if missing := [piece for piece in (*names[:3], "[UNK]") if piece not in vocab]:
            raise UserError(
                f"the file is not a BERT vocabulary: {', '.join(missing)} missing among its {len(vocab)} pieces"
            )
        self.vocab_size = len(pieces)
        self.pad_id, self.eot_id = vocab[names[0]], vocab[names[2]]
        self.sot_id = vocab[names[1]] if sot else None
        self.mask_id = vocab.get(names[3])
        self.special_ids = frozenset(vocab[name] for name in names if name in vocab)
        self._model = HfTokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
        self._model.normalizer = normalizers.BertNormalizer(lowercase=lower)
        self._model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._model.decoder = decoders.WordPiece()

    def _encode(self, text):
        return self._model.encode(text).ids

    def decode(self, ids):
        return self._model.decode([int(i) for i in ids if int(i) not in self.special_ids])
