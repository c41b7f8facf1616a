"""Makes a synthetic caption for every image of a data set (ALIP: Yang et al. 2023) and writes them as a column.

    python -m clip_jax.tools.caption --source=/data/pairs.tar \\
        --captioner=transformers:Salesforce/blip-image-captioning-base --out=out.jsonl
    python -m clip_jax.tools.caption --source=emoji --captioner=retrieval:runs/clip --out=emoji_captions.jsonl

A captioner is one of

    transformers:MODEL      an image-to-text model of Hugging Face transformers, such as BLIP or GIT. MODEL is a name
                            or a folder. Needs transformers and torch.
    retrieval:CHECKPOINT    the text of a bank that best fits the image. CHECKPOINT is anything that `clip_jax.load`
                            loads. The bank is a .txt file with one text a line, or a data source: then it consists of
                            the distinct captions, or the distinct texts of one field.

OUT has one line for each record. Its field `synthetic` is a text or, with --top=K, a list of K texts, best first. An
unreadable image gets an empty text and is counted. An interrupted run resumes with the same command. Retrieval resumes
with the same weights and the same texts alone; files of earlier versions do not tell these, and resume with any.

Train with the column by --config.data="SOURCE?columns=OUT".
"""

import functools
import hashlib
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
from clip_jax.tools.source_arguments import check_options, open_source, source_parser
from clip_jax.tools.text_columns import format_reasons, one_line, write_texts

#: `(images, records) -> captions`; the caption of an image is a text or a list of texts.
Captioner = Callable[[Sequence[Image.Image], Sequence[Record]], Sequence[str | list[str]]]
#: The kind of captioner that each option is for.
_OPTIONS = {"prompt": ("transformers",)}
_OPTIONS |= dict.fromkeys(("bank", "bank_field", "bank_split", "top", "exclude_own"), ("retrieval",))


def read_bank(spec, field="", split="train"):
    """Returns the distinct texts of a bank, in order.

    Args:
      spec: a .txt file, or the string of a data source.
      field: the record field that holds the texts; "": the captions.
      split: the split of the data source.

    Raises UserError when the file cannot be read or there is no text.
    """
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
    raise UserError(f"--bank={spec}: it has no text" + (f" in the field {field!r}" if field else ""))


def _texts(record, field):
    return rewrites_of(record, [field or "texts"], strict=False)


class Retrieval:
    """Retrieves captions from a bank of texts by a model's similarity.

    Args:
      model: a `clip_jax.inference.Model`.
      bank: distinct texts.
      top: captions for each image; 1 gives a text, more give a list of texts.
      own: function of a record that returns the texts which are excluded for it; None excludes nothing.

    Raises UserError when `top` is not between 1 and the size of the bank.
    """

    def __init__(self, model, bank, top=1, own=None):
        if not 1 <= top <= len(bank):
            raise UserError(f"--top={top}: must be from 1 to {len(bank)}, the number of texts in the bank")
        self._model, self._bank = model, list(bank)
        self._top, self._own = top, own
        self._embedded = model.embed_text(self._bank)

    @property
    def key(self):
        """What decides the captions, `{word: hash}`."""
        from clip_jax.search_index import model_key

        bank = hashlib.blake2b("\n".join(self._bank).encode(), digest_size=16).hexdigest()
        return {"model": model_key(self._model), "texts": bank}

    def __call__(self, images, of):
        from clip_jax.evaluation.topk import top_k

        own = [{one_line(text) for text in self._own(record)} if self._own else set() for record in of]
        z = self._model.embed_image(list(images))
        # Each excluded text can take at most one of the places.
        best, _ = top_k(z, self._embedded, self._top + max(map(len, own)), self._model.similarity)
        found = [
            [self._bank[i] for i in row if self._bank[i] not in excluded]
            for row, excluded in zip(best, own, strict=True)
        ]
        return [texts[: self._top] if self._top > 1 else "".join(texts[:1]) for texts in found]


class Transformers:
    """An image-to-text model of Hugging Face transformers with greedy decoding.

    Args:
      name: the model's name or folder.
      prompt: the text that every caption begins with.
      max_tokens: the longest caption, in tokens.

    Raises UserError when transformers or torch is not installed or the model cannot be loaded.
    """

    key = {}

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

    def __call__(self, images, of):
        texts = {"text": [self._prompt] * len(images)} if self._prompt else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **texts).to(self._model.device)
        with self._torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        return self._processor.batch_decode(ids, skip_special_tokens=True)


def make_captioner(spec, bank, top=1, own=None, prompt=""):
    """Returns the `Captioner` of a command line.

    Args:
      spec: `transformers:MODEL` or `retrieval:CHECKPOINT`.
      bank: function without arguments that returns the bank; called for retrieval only.
      top, own: see `Retrieval`.
      prompt: see `Transformers`.

    Raises UserError for an unknown captioner and when loading fails.
    """
    kind, _, name = spec.partition(":")
    if kind == "transformers" and name:
        return Transformers(name, prompt)
    if kind == "retrieval" and name:
        texts = bank()
        from clip_jax.inference import load

        return Retrieval(load(name), texts, top, own)
    raise UserError(f"--captioner={spec}: allowed are transformers:MODEL and retrieval:CHECKPOINT")


def run(source, out, captioner, *, about, batch=256, log=print):
    """Writes the column `synthetic` of a source; resumes an unfinished file.

    Args:
      source: the records.
      out: the file, `NAME.jsonl`, or a folder of parts, `NAME.parquet`.
      captioner: a `Captioner`.
      about: what makes the captions, for the header.
      batch: records in a batch.
      log: takes a line of progress.

    Returns:
      A Counter of the reasons for empty captions.

    Raises UserError as `write_texts` does, and when no record of a whole batch, or of the source, has a caption.
    """
    failures = Counter()

    def make(chunk):
        images, captions = {}, {}
        reasons = Counter()
        for i, record in chunk:
            try:
                if record is None or record.get("image") is None:
                    raise BadRecord("no image" if record else "unreadable record")
                images[i] = decode.load(decode.flatten(decode.open_image(record["image"])))
            except BadRecord as bad:
                reasons[bad.args[0]] += 1
        if images:
            of = [record for i, record in chunk if i in images]
            captions = dict(zip(images, map(_clean, captioner(list(images.values()), of)), strict=True))
            reasons["no text for an image"] += sum(not caption for caption in captions.values())
        failures.update(+reasons)
        # The last batch may be a single bad record.
        if not any(captions.values()) and (len(chunk) == batch or len(source) < batch):
            raise UserError(f"none of {len(chunk):,} records in a row has a caption ({format_reasons(+reasons)})")
        return [{"synthetic": captions.get(i, "")} for i, _ in chunk]

    write_texts(source, out, about, batch, make, lambda line: log(f"{line}, {failures.total():,} captions are empty"))
    return failures


def _clean(caption):
    """Returns a caption, or a list of captions without the empty ones, each on one line."""
    return one_line(caption) if isinstance(caption, str) else [text for text in map(one_line, caption) if text]


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.caption", __doc__, ("image", "text"))
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the column to write, .jsonl or .parquet")
    parser.add_argument("--captioner", required=True, help="transformers:MODEL | retrieval:CHECKPOINT")
    parser.add_argument("--prompt", default="", help="transformers: the text that every caption begins with")
    parser.add_argument(
        "--bank", default="", help="retrieval: FILE.txt or any source string (default: the source of the images)"
    )
    parser.add_argument(
        "--bank-field", default="", help="retrieval: record field of the bank's texts (default: the captions)"
    )
    parser.add_argument("--bank-split", default="train", help="retrieval: split of the bank (default: train)")
    parser.add_argument("--top", type=int, default=1, help="retrieval: captions for each image (default: 1)")
    parser.add_argument(
        "--exclude-own", action="store_true", help="retrieval: a record never gets a text that it already has"
    )
    parser.add_argument("--batch", type=int, default=256, help="records in a batch (default: 256)")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args, parser))


def _main(args, parser):
    check_options(args, parser, "captioner", _OPTIONS)
    source = open_source(args)
    bank = functools.partial(read_bank, args.bank or args.source, args.bank_field, args.bank_split)
    own = (lambda record: [*_texts(record, ""), *_texts(record, args.bank_field)]) if args.exclude_own else None
    captioner = make_captioner(args.captioner, bank, args.top, own, args.prompt)
    about = {name: getattr(args, name) for name in ("captioner", *_OPTIONS)} | captioner.key
    failures = run(source, args.out, captioner, about=about, batch=args.batch)
    print(
        f"{args.out}: {len(source):,} records; {failures.total():,} captions of this run are empty. "
        f"{format_reasons(failures)}"
    )


if __name__ == "__main__":
    command.script(main)
