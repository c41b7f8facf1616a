"""The byte-level BPE tokenizer of OpenAI CLIP."""

import gzip

from clip_jax.data.tokenizers.base import Tokenizer, repaired
from clip_jax.errors import UserError


class ClipBpeTokenizer(Tokenizer):
    """The byte-level BPE of OpenAI CLIP.

    PAD is 0, which is also the id of "!". Words are split by the Unicode tables of the `tokenizers` library, which
    learn a few rare scripts (Tangut) later than others.

    Args:
      data: bytes, the list of merges, gzipped or not.
      sot: bool, whether SOT is prepended.
      eot: bool, whether EOT is appended.
      pad_with_eot: bool, whether EOT is the padding instead of PAD.
      specials: str, the literal strings that become the ids of SOT and EOT: "open_clip" (`<start_of_text>`,
        `<end_of_text>`), "openai" (`<|startoftext|>`, `<|endoftext|>`) or "none". Everything else is plain text.
      clean: str, the cleaning of a text. "open_clip", as in OpenAI's CLIP too: it is repaired with ftfy, HTML-unescaped
        twice, and lower-cased; runs of white space become one space. "transformers": NFC, white space, lower case.
      mask: bool, whether a mask token is added as in DeCLIP, before SOT and EOT (49406, 49407, 49408), so that EOT
        stays the largest id.

    Raises UserError for another vocabulary and for unknown `specials` or `clean`.
    """

    kind, file = "clip_bpe", "bpe_simple_vocab_16e6.txt.gz"
    _SPECIALS = {
        "open_clip": ("<start_of_text>", "<end_of_text>"),
        "openai": ("<|startoftext|>", "<|endoftext|>"),
        "none": (),
    }
    _MERGES = 48_894

    def __init__(
        self, data, *, sot=True, eot=True, pad_with_eot=False, specials="open_clip", mask=False, clean="open_clip"
    ):
        from tokenizers import Regex, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as HfTokenizer

        super().__init__(data, sot=sot, eot=eot, pad_with_eot=pad_with_eot, specials=specials, mask=mask)
        if clean != "open_clip":
            self.options["clean"] = clean  # not otherwise: fingerprints of earlier runs lack it
        if clean not in ("open_clip", "transformers"):
            raise UserError(f"clean={clean!r} is unknown; allowed: open_clip, transformers")
        if specials not in self._SPECIALS:
            raise UserError(f"specials={specials!r} is unknown; allowed: {', '.join(self._SPECIALS)}")
        try:
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
            merges = [tuple(line.split(" ")) for line in text.split("\n")[1 : self._MERGES + 1]]
            valid = len(merges) == self._MERGES and all(len(merge) == 2 for merge in merges)
        except (OSError, EOFError, UnicodeDecodeError):
            valid = False
        if not valid:
            raise UserError(
                f"the file is not CLIP's BPE vocabulary: a header and at least {self._MERGES} merges are expected"
            )

        # Ids: the 256 bytes, printable ones first, without and then with the end-of-word mark; the merges; the special
        # tokens.
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of_char = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
        self._pieces = [
            *self._byte_of_char,
            *(c + "</w>" for c in self._byte_of_char),
            *("".join(merge) for merge in merges),
        ]
        first = len(self._pieces) + mask
        self.mask_id = first - 1 if mask else None
        self.sot_id = first if sot else None
        self.eot_id = first + 1
        self.pad_id = 0
        self.vocab_size = first + 2
        self.special_ids = frozenset(range(len(self._pieces), self.vocab_size))  # without PAD, which is also "!"

        self._literals = dict(zip(self._SPECIALS[specials], (first, first + 1), strict=False))
        # [sſ]: the pattern of OpenAI and open_clip ignores case, and ſ is a case variant of s that lower-casing keeps.
        words = [
            *self._literals,
            "'[sſ]" if clean == "open_clip" else "'s",
            "'t",
            "'re",
            "'ve",
            "'m",
            "'ll",
            "'d",
            r"\p{L}+",
            r"\p{N}",
            r"[^\s\p{L}\p{N}]+",
        ]
        pattern = "|".join(word.replace("|", r"\|") for word in words)
        self._words = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
        bytes_to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        vocab = {piece: i for i, piece in enumerate(self._pieces)}
        self._bpe = HfTokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        self._normalizer = normalizers.Sequence(steps) if clean == "transformers" else None
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([self._words, bytes_to_chars])

    def _encode(self, text):
        text = self._normalizer.normalize_str(text) if self._normalizer else " ".join(repaired(text).split()).lower()
        if not any(literal in text for literal in self._literals):
            return self._bpe.encode(text).ids
        ids = []
        for word, _ in self._words.pre_tokenize_str(text):
            ids += [self._literals[word]] if word in self._literals else self._bpe.encode(word).ids
        return ids

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.eot_id in ids:  # the rest is padding, which would be decoded as "!"
            ids = ids[: ids.index(self.eot_id)]
        words = "".join(self._pieces[i] for i in ids if i not in self.special_ids).replace("</w>", " ")
        raw = b"".join(b" " if c == " " else bytes([self._byte_of_char[c]]) for c in words)
        return raw.decode("utf-8", "replace").strip()
