"""Synthetic captions of the pictures of a data set (ALIP: Yang et al. 2023), as columns beside it.

    python -m clip_jax.tools.caption --source=/data/pairs.tar --captioner=transformers:Salesforce/blip-image-captioning-base --out=out.jsonl
    python -m clip_jax.tools.caption --source=emoji --captioner=retrieval:runs/clip --out=emoji_captions.jsonl

A captioner is one of

    transformers:MODEL      an image-to-text model of Hugging Face's transformers, a name or a folder, such as BLIP or GIT; that package and
                            torch have to be installed
    retrieval:CHECKPOINT    the best of a bank of texts for the picture by a model that `clip_jax.load` loads. The bank is a .txt file of a
                            text a line, or a data set, of which it has the captions or the texts of one field, each once

OUT has one line a record with the field `synthetic`, a text, or with --top=K a list of K texts, the best first. It is empty, and counted,
for a picture that cannot be read. The same command goes on where it stopped.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, Record, records
from clip_jax.data.sources import make_source
from clip_jax.data.views import rewrites_of
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.language_models import import_transformers
from clip_jax.tools.rewrite import listed, one_line, write_texts
from clip_jax.tools.source_arguments import open_source, source_parser

#: `(pictures, records) -> captions`, of each picture a text or a list of texts.
Captioner = Callable[[Sequence[Image.Image], Sequence[Record]], Sequence[str | list[str]]]


def read_bank(spec, field="", split="train"):
    """The different texts of a .txt file, or of a source: its captions or those of one field. Raises UserError when there are none."""
    if spec.endswith(".txt"):
        try:
            texts = Path(spec).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--bank={spec}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from None
    else:
        texts = [
            text
            for _, r in records(make_source(spec, split))
            if not isinstance(r, BadRecord)
            for text in _texts(r, field)
        ]
    if bank := list(dict.fromkeys(filter(None, map(one_line, texts)))):
        return bank
    raise UserError(f"--bank={spec}: no text in it" + (f" in a field {field!r}" if field else ""))


def _texts(record, field):
    return rewrites_of(record, [field or "texts"])


class Retrieval:
    """The best texts of a bank by a model.

    Args:
      model: a `clip_jax.inference.Model`.
      bank: different texts.
      top: so many for each picture; 1: a text, more: a list of texts.
      own: the texts of a record that are left out of its own, as a function of it; None: none are.
    """

    def __init__(self, model, bank, top=1, own=None):
        if not 1 <= top <= len(bank):
            raise UserError(f"--top={top}: must be from 1 to {len(bank)}, the number of texts in the bank")
        self._model, self._bank, self._top, self._own = model, list(bank), top, own
        self._embedded = model.embed_text(self._bank)

    def __call__(self, pictures, of):
        from clip_jax.evaluation.topk import top_k

        own = [{one_line(text) for text in self._own(record)} if self._own else set() for record in of]
        z = self._model.embed_image(list(pictures))
        best, _ = top_k(z, self._embedded, self._top + max(map(len, own)), self._model.similarity)
        found = [
            [self._bank[i] for i in row if self._bank[i] not in left_out]
            for row, left_out in zip(best, own, strict=True)
        ]
        return [texts[: self._top] if self._top > 1 else "".join(texts[:1]) for texts in found]


class Transformers:
    """An image-to-text model of Hugging Face's transformers, decoded greedily; `prompt`: what a caption begins with."""

    def __init__(self, name, prompt="", max_tokens=77):
        self._torch, transformers = import_transformers(f"--captioner=transformers:{name}")
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(name)
            self._model = transformers.AutoModelForImageTextToText.from_pretrained(name).eval()
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--captioner=transformers:{name}: {str(error).splitlines()[0]}") from None
        if self._torch.cuda.is_available():
            self._model.to("cuda")
        self._prompt, self._max_tokens = prompt, max_tokens

    def __call__(self, pictures, of):
        texts = {"text": [self._prompt] * len(pictures)} if self._prompt else {}
        inputs = self._processor(images=list(pictures), return_tensors="pt", **texts).to(self._model.device)
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        return self._processor.batch_decode(ids, skip_special_tokens=True)


def make_captioner(spec, bank, top=1, own=None, prompt=""):
    """The captioner of a command line; raises UserError for one that is not there. `bank` is called where a bank is needed."""
    kind, _, name = spec.partition(":")
    if kind == "transformers" and name:
        return Transformers(name, prompt)
    if kind == "retrieval" and name:
        texts = bank()
        from clip_jax.inference import load

        return Retrieval(load(name), texts, top, own)
    raise UserError(f"--captioner={spec}: allowed are transformers:MODEL and retrieval:CHECKPOINT")


def run(source, out, captioner, *, about, batch=256, log=print):
    """Writes the column `synthetic` of a source, or the rest of it; returns the reasons of what is empty with their numbers.

    about: what made the captions, for the header. Raises UserError as `write_texts` does, and when a whole batch has no caption.
    """
    failures = Counter()

    def make(chunk):
        pictures, reasons, captions = {}, Counter(), {}
        for i, record in chunk:
            try:
                if record is None or record.get("image") is None:
                    raise BadRecord("no picture" if record else "unreadable record")
                pictures[i] = decode.load(decode.flatten(decode.open_image(record["image"])))
            except BadRecord as bad:
                reasons[bad.args[0]] += 1
        if pictures:
            of = [record for i, record in chunk if i in pictures]
            captions = dict(zip(pictures, map(_clean, captioner(list(pictures.values()), of)), strict=True))
            reasons["no text for a picture"] += sum(not caption for caption in captions.values())
        failures.update(+reasons)
        if not any(captions.values()):
            raise UserError(f"none of {len(chunk):,} records in a row has a caption ({listed(+reasons)})")
        return [{"synthetic": captions.get(i, "")} for i, _ in chunk]

    write_texts(source, out, about, batch, make, lambda line: log(f"{line}, {failures.total():,} captions are empty"))
    return failures


def _clean(caption):
    """On one line each; empty ones of a list are left out."""
    return one_line(caption) if isinstance(caption, str) else [text for text in map(one_line, caption) if text]


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.caption", __doc__, ("image", "text"))
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the columns")
    parser.add_argument("--captioner", required=True, help="transformers:MODEL | retrieval:CHECKPOINT")
    parser.add_argument("--prompt", default="", help="what captions begin with, for transformers")
    parser.add_argument(
        "--bank", default="", help="texts for retrieval: FILE.txt, or any source (default: that of the pictures)"
    )
    parser.add_argument(
        "--bank-field", default="", help="field of the bank's records that holds the texts (default: their captions)"
    )
    parser.add_argument("--bank-split", default="train", help="(default: train)")
    parser.add_argument("--top", type=int, default=1, help="so many texts of the bank for each picture (default: 1)")
    parser.add_argument(
        "--exclude-own", action="store_true", help="of the bank not those texts that the record has itself"
    )
    parser.add_argument("--batch", type=int, default=256, help="records at a time (default: 256)")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    source = open_source(args)
    bank = functools.partial(read_bank, args.bank or args.source, args.bank_field, args.bank_split)
    own = (lambda record: [*_texts(record, ""), *_texts(record, args.bank_field)]) if args.exclude_own else None
    captioner = make_captioner(args.captioner, bank, args.top, own, args.prompt)
    names = ("captioner", "prompt", "bank", "bank_field", "bank_split", "top", "exclude_own")
    failures = run(source, args.out, captioner, about={name: getattr(args, name) for name in names}, batch=args.batch)
    print(
        f"{args.out}: {len(source):,} records; of the captions made now {failures.total():,} are empty. {listed(failures)}"
    )


if __name__ == "__main__":
    sys.exit(main())
