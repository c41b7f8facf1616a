"""Trains a SentencePiece tokenizer on the texts of any data source.

    python -m clip_jax.tools.train_tokenizer --source=pairs.tsv --out=tokenizer
    python -m clip_jax.train --config=configs/clip.py:small --config.tokenizer=tokenizer --config.data=pairs.tsv ...

OUT is a folder, or a single model file if its name ends in .model, for --config.tokenizer=sentencepiece:OUT. Texts that
have too few pieces for the vocabulary make a smaller one, and a line says so.

The pieces are unigram pieces with byte fallback, so no text is ever unknown. The model itself applies NFKC and case
folding. The control symbols are `<pad>` 0, `</s>` 1 (end of text), `<unk>` 2, `<s>` 3 and `<mask>` 4; a caption that
spells one of them does not get its id.

This command made `data/vocab/emoji_4k.model`, which ships with the package:

    python -m clip_jax.tools.train_tokenizer --source=emoji --out=clip_jax/data/vocab/emoji_4k.model \\
        --vocab-size=4096 --fields='name*12,tags*4,keywords*4' --character-coverage=0.995 \\
        --add-texts clip_jax/data/embedded/emoji/1.0.0/names_i18n.json.xz

Its weights favour English. The names in 28 languages are there so that Latin and Cyrillic names are not spelled in
bytes.
"""

import gzip
import io
import itertools
import json
import lzma
import re

from etils import epath

from clip_jax.data.records import BadRecord, records
from clip_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.source_arguments import open_source, source_parser


def train(texts, vocab_size, *, character_coverage=0.9995, reduce=False):
    """Returns a trained SentencePiece unigram model, serialised. Equal texts in equal order give the same model.

    Args:
      texts: training texts; a text counts as often as it occurs. A line break counts as a space, an empty text is
        skipped.
      vocab_size: number of ids, including 5 control symbols and 256 bytes.
      character_coverage: share of all characters that get their own pieces; the others are spelled in bytes.
      reduce: bool, whether texts that are too few for `vocab_size` make the largest model that they allow.

    Raises UserError when there is no text, or when `vocab_size` is too large or too small for the texts.
    """
    import sentencepiece

    lines = (" ".join(text.split()) for text in texts)
    lines = [line.encode("utf-8", "replace").decode() for line in lines if line]
    if not lines:
        raise UserError("no text to train the tokenizer on")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out,
            model_type="unigram", vocab_size=vocab_size, byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf", character_coverage=character_coverage,
            pad_id=0, eos_id=1, unk_id=2, bos_id=3, control_symbols=["<mask>"],
            input_sentence_size=2_000_000, shuffle_input_sentence=True, train_extremely_large_corpus=False,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as e:
        reason, most = " ".join(str(e).split()), re.search(r"value <= (\d+)", str(e))
        if most and reduce:
            return train(lines, int(most[1]), character_coverage=character_coverage)
        if most:
            reason = f"at most {most[1]} is possible"
        elif least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(e)):
            reason = f"at least {least[1]} is needed"
        raise UserError(f"vocab_size={vocab_size} does not fit the {len(lines)} training texts: {reason}") from e
    return out.getvalue()


def source_texts(source, fields="texts"):
    """Yields all texts of a source's records; unusable records are skipped.

    Args:
      source: a source of `clip_jax.data.sources`.
      fields: record fields with optional weights, "texts,name*3,tags". A field is a str, or a list or dict of them.
        Each of its texts counts as often as its weight says.

    Raises UserError when `fields` is malformed or no record has one of the fields.
    """
    weights = {}
    for item in fields.split(","):
        name, star, weight = item.strip().partition("*")
        if not name or (star and not (weight.isdigit() and int(weight) > 0)):
            raise UserError(f"--fields={fields!r}: {item!r} must have the form name or name*weight")
        weights[name] = int(weight or 1)
    seen = set()
    for _, record in records(source):
        if isinstance(record, BadRecord):
            continue
        for name, weight in weights.items():
            if name in record:
                seen.add(name)
                for text in _strings(record[name]):
                    yield from [text] * weight
    if missing := [name for name in weights if name not in seen]:
        raise UserError(f"--fields: no record of the source has {', '.join(map(repr, missing))}")


def file_texts(path):
    """Yields the lines of a text file, or all strings of a JSON file; `.gz` and `.xz` are unpacked.

    Raises UserError when the file cannot be read.
    """
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(epath.Path(path).suffix, bytes)
    try:
        text = unpack(epath.Path(path).read_bytes()).decode("utf-8", "replace")
        is_json = ".json" in epath.Path(path).suffixes
        yield from _strings(json.loads(text)) if is_json else text.splitlines()
    except (OSError, EOFError, lzma.LZMAError, json.JSONDecodeError) as e:
        raise UserError(f"--add-texts={path}: cannot be read ({' '.join(str(e).split())})") from e


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.train_tokenizer", __doc__, ())
    add = parser.add_argument
    add("--fields", default="texts", help="record fields with weights, 'texts,name*3' (default: the captions)")
    add(
        "--add-texts",
        nargs="*",
        default=[],
        help="more texts: files with one text a line, or JSON; .gz and .xz are unpacked",
    )
    add(
        "--out",
        required=True,
        help="folder to write, for --config.tokenizer=FOLDER; or a model file my.model, for sentencepiece:my.model",
    )
    add(
        "--vocab-size",
        type=int,
        default=4096,
        help="number of ids, including 5 control symbols and 256 bytes (default: 4096)",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters with their own pieces (default: 0.9995)",
    )
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    source = open_source(args)
    texts = itertools.chain(source_texts(source, args.fields), *map(file_texts, args.add_texts))
    model = train(texts, args.vocab_size, character_coverage=args.character_coverage, reduce=True)
    out, tokenizer = epath.Path(args.out), SentencePieceTokenizer(model)
    try:
        if out.suffix == ".model":
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(model)
        else:
            tokenizer.save(out)
    except OSError as error:
        raise UserError(f"--out={args.out}: cannot be written ({error.strerror or error})") from error
    size = tokenizer.vocab_size
    if size < args.vocab_size:
        print(f"the texts have pieces for {size} ids at most, so the vocabulary is that, not {args.vocab_size}")
    spec = f"sentencepiece:{args.out}" if out.suffix == ".model" else args.out
    print(f"{args.out}: {size} ids, {len(model) / 1e3:.0f} kB, from {len(source)} records of {args.source}")
    print(f"use it: --config.tokenizer={spec}")


if __name__ == "__main__":
    command.script(main)
