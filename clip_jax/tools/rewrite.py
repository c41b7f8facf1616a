"""Rewrites of every caption of a data set by a language model (LaCLIP: Fan et al. 2023), as columns beside it.

    python -m clip_jax.tools.rewrite --source=/data/cc3m/{00000..00331}.tar --llm=http://localhost:8000/v1#llama-7b --out=cc3m_rewrites.jsonl
    python -m clip_jax.train --config=configs/laclip.py:cc3m --config.data="/data/cc3m/{00000..00331}.tar?columns=cc3m_rewrites.jsonl"

Of each caption M rewrites, one for each family of demonstrations, which the language model is to go on from:

    write image captions differently,

    {source} => {target}

    {source} => {target}

    {source} => {target}

    {caption} =>

Three demonstrations are drawn for each prompt. The families are called as in the paper and all are our own: chatgpt and bard rephrase, the
latter at more length, human is in shorthand, and those of coco are two captions of one picture. Everything drawn follows from (seed,
family, record). A line break in a caption is a space in the prompt, and "=>" is "->". Of an answer the first line counts; an empty or
overlong one, or one with "=>" in it, is a failure: the rewrite is empty, is counted, and the caption itself is trained on.

OUT has one line a record with the field `rewrites`, the rewrites of its first caption in the order of the families, then those of its
second, and a check of the captions. The same command goes on where it stopped.
"""

import functools
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip_jax.data.records import BadRecord, records
from clip_jax.data.sources.columns import TextWriter
from clip_jax.data.views import rewrites_of
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.language_models import KINDS, NoAnswer, Request, Sampling, make_language_model
from clip_jax.tools.source_arguments import open_source, source_parser

FAMILIES = ("chatgpt", "bard", "coco", "human")
DEMONSTRATIONS = Path(__file__).parent / "rewrite_demonstrations.json"
_SHOTS, _MAX_WORDS = 3, 77
_NO_CAPTION = "an answer that is no caption"

Demonstrations = Mapping[str, Sequence[Sequence[str]]]
LanguageModel = Callable[[Sequence[Request]], list[str | NoAnswer]]


@functools.cache
def read_demonstrations(path=""):
    """By family `{"pairs": [[source, target], ...]}` or `{"sets": [captions of one picture, ...]}`; by default those of the package.

    Raises UserError for a file that cannot be read or has fewer than three of a family.
    """
    file = Path(path) if path else DEMONSTRATIONS
    try:
        families = json.loads(file.read_text())
        for family, bank in families.items():
            ((kind, rows),) = bank.items()
            sizes = {"pairs": range(2, 3), "sets": range(2, 1000)}[kind]
            if len(rows) < _SHOTS or not all(
                len(row) in sizes and all(isinstance(text, str) for text in row) for row in rows
            ):
                raise UserError(
                    f"demonstrations {file}: {family} needs {_SHOTS} or more {kind} of two texts or, in sets, more"
                )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'demonstrations {file}: not JSON of {{family: {{"pairs" or "sets": [[text, ...], ...]}}}} ({error})'
        ) from None
    return families


def make_prompt(caption, demonstrations, rng):
    """The prompt for one caption: an instruction, three demonstrations and the caption, on nine lines."""
    if "pairs" in demonstrations:
        shots = rng.sample(demonstrations["pairs"], _SHOTS)
    else:
        shots = [rng.sample(captions, 2) for captions in rng.sample(demonstrations["sets"], _SHOTS)]
    lines = [f"{source} => {target}" for source, target in shots]
    return "\n\n".join(["write image captions differently,", *lines, f"{one_line(caption)} =>"])


def one_line(caption):
    """The caption as it stands in a prompt: on one line, without the arrow that splits prompts, and UTF-8."""
    return " ".join(caption.replace("=>", "->").encode("utf-8", "replace").decode().split())


def parse(answer):
    """The rewrite in an answer; empty when there is none."""
    text = " ".join(answer.strip().partition("\n")[0].strip().strip('"').split())
    return "" if "=>" in text or len(text.split()) > _MAX_WORDS else text


def rewrite(
    captions,
    family,
    llm,
    seed=0,
    *,
    numbers=(),
    words=(),
    demonstrations=None,
    failures=None,
):
    """One rewrite of each caption, in order, by the demonstrations of a family; empty where there is none.

    Args:
      llm: as `clip_jax.tools.language_models.make_language_model` gives it.
      numbers: what stands for a caption in its randomness; by default its place in the list.
      words: of each caption what is known beside it.
      demonstrations: by default those of the family that come with the package.
      failures: the reasons for empty ones are counted in it.
    """
    bank = demonstrations or read_demonstrations()[family]
    numbers, words = numbers or range(len(captions)), words or [()] * len(captions)
    requests = {}
    for place, (number, caption, known) in enumerate(zip(numbers, captions, words, strict=True)):
        rng = random.Random(f"{seed} {family} {number}")  # the same on every machine
        if text := one_line(caption):
            requests[place] = Request(make_prompt(caption, bank, rng), text, family, tuple(known), rng.getrandbits(31))
    answers = dict(zip(requests, llm(list(requests.values())), strict=True)) if requests else {}
    failures, found = Counter() if failures is None else failures, []
    for place in range(len(captions)):
        answer = answers.get(place, NoAnswer("empty caption"))
        found.append("" if isinstance(answer, NoAnswer) else parse(answer))
        if not found[-1]:
            failures[answer.args[0] if isinstance(answer, NoAnswer) else _NO_CAPTION] += 1
    return found


def words_of(record, fields):
    """The different words of some fields of a record, each a text or a list of texts; those that begin with a letter."""
    texts = [one_line(text) for text in rewrites_of(record, fields)]
    return list(dict.fromkeys(text for text in texts if text[:1].isalpha()))


def run(
    source,
    out,
    llm,
    *,
    name,
    families=FAMILIES,
    seed=0,
    batch=64,
    words=("tags", "keywords"),
    demonstrations="",
    about=(),
    log=print,
):
    """Writes the columns of a source, or the rest of them, and returns the reasons of what is empty with their numbers.

    name: of the language model, for the header. words: fields of a record that say more of it.

    Raises UserError for wrong arguments and when a whole batch has no rewrite: an endpoint that is gone or answers nonsense.
    """
    banks = read_demonstrations(demonstrations)
    if unknown := [family for family in families if family not in banks]:
        raise UserError(f"--families: {unknown[0]!r} is none of {', '.join(banks)}")
    failures = Counter()

    def make(chunk):
        captions = [
            (i, k, text, words_of(record, words))
            for i, record in chunk
            if record
            for k, text in enumerate(record["texts"])
        ]
        reasons, found = Counter(), {i: [] for i, _ in chunk}
        for family in families:
            texts = rewrite(
                [text for _, _, text, _ in captions], family, llm, seed, numbers=[f"{i} {k}" for i, k, _, _ in captions],
                words=[known for *_, known in captions], demonstrations=banks[family], failures=reasons,
            )  # fmt: skip
            for (i, *_), text in zip(captions, texts, strict=True):
                found[i].append(text)
        failures.update(
            +(reasons + Counter({"unreadable record": len(families) * sum(record is None for _, record in chunk)}))
        )
        asked = len(captions) * len(families) - reasons.pop("empty caption", 0)
        if asked and reasons.total() == asked and (asked >= 16 or _NO_CAPTION not in reasons):
            raise UserError(
                f"--llm={name}: none of {asked} prompts in a row was answered by a caption ({listed(reasons)})"
            )
        counts = [len(record["texts"]) if record else 0 for _, record in chunk]
        return [
            {"rewrites": [t for k in range(n) for t in found[i][k::n]]} for (i, _), n in zip(chunk, counts, strict=True)
        ]

    about = {
        "llm": name,
        "families": list(families),
        "demonstrations": demonstrations,
        "seed": seed,
        "words": list(words),
        **dict(about),
    }
    write_texts(source, out, about, batch, make, lambda line: log(f"{line}, {failures.total():,} rewrites are empty"))
    return failures


def write_texts(source, out, about, batch, make, log=print):
    """Writes text columns of a source, or the rest of them, in batches of records.

    make: `list[(index, record, or None where it cannot be read)] -> list[{field: value}]`. A batch is made as a whole again where only its
    end is missing, as some models draw for a batch as a whole. Raises UserError as `make` and `TextWriter` do.
    """
    if batch < 1:
        raise UserError(f"--batch={batch}: must be at least 1")
    last = time.monotonic()
    with TextWriter(out, source, about) as writer:
        rows = (
            (i, None if isinstance(r, BadRecord) else r) for i, r in records(source, writer.done - writer.done % batch)
        )
        while chunk := list(itertools.islice(rows, batch)):
            try:
                made = make(chunk)
            except UserError as error:
                rest = f"{out} has {writer.done:,} of {len(source):,} records, and the same command goes on from there"
                raise UserError(f"{error}; {rest}") from None
            for (i, record), values in zip(chunk, made, strict=True):
                if i >= writer.done:
                    writer.write(record, values)
            if time.monotonic() - last > 30:
                last = time.monotonic()
                log(f"{writer.done:,} of {len(source):,} records")


def listed(reasons):
    """Reasons and their numbers, the most frequent first."""
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.rewrite", __doc__, ("text",))
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the columns")
    parser.add_argument("--llm", required=True, help=" | ".join(KINDS))
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="whose demonstrations, one rewrite each (default: all four)"
    )
    parser.add_argument("--demonstrations", default="", metavar="FILE.json", help="of your own")
    parser.add_argument(
        "--words", default="tags,keywords", help="fields that say more, for --llm=offline (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="records at a time (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for an answer over http (default: %(default)s)"
    )
    for field, value in vars(Sampling()).items():
        parser.add_argument(
            "--" + field.replace("_", "-"), type=type(value), default=value, help="(default: %(default)s)"
        )
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens)
    llm = make_language_model(args.llm, sampling, args.timeout)
    source = open_source(args)
    failures = run(
        source, args.out, llm, name=args.llm, families=args.families.split(","), seed=args.seed, batch=args.batch,
        words=args.words.split(","), demonstrations=args.demonstrations, about=vars(sampling) if args.llm != "offline" else {},
    )  # fmt: skip
    print(
        f"{args.out}: {len(source):,} records; of the rewrites made now {failures.total():,} are empty. {listed(failures)}"
    )


if __name__ == "__main__":
    sys.exit(main())
