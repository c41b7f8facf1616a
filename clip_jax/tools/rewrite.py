"""Rewrites every caption of a data set with a language model (LaCLIP: Fan et al. 2023) and writes them as a column.

    python -m clip_jax.tools.rewrite --source=/data/cc3m/{00000..00331}.tar \\
        --llm=http://localhost:8000/v1#llama-7b --out=cc3m_rewrites.jsonl
    python -m clip_jax.train --config=configs/laclip.py:cc3m \\
        --config.data="/data/cc3m/{00000..00331}.tar?columns=cc3m_rewrites.jsonl"

Each caption gets one rewrite for each family of demonstrations. The language model completes the last line of the
prompt

    write image captions differently,

    {source} => {target}

    {source} => {target}

    {source} => {target}

    {caption} =>

Three demonstrations are drawn for each prompt. The families have the paper's names, but their texts were written for
this package. `chatgpt` and `bard` rephrase, `bard` at more length; `human` is terse; a demonstration of `coco` is two
captions of one image. All random choices follow from (seed, family, record). In the prompt, a line break in a caption
becomes a space and "=>" becomes "->".

The first line of an answer is the rewrite. An answer is a failure when this line is empty, has more than 77 words or
contains "=>". Then the rewrite is empty and is counted, and training uses the caption instead.

OUT has one line for each record, with a checksum of its captions. Its field `rewrites` lists the rewrites of the first
caption in the order of the families, then those of the second caption, and so on. An interrupted run resumes with the
same command.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip_jax.data.views import rewrites_of
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools.language_models import KINDS, NoAnswer, Request, Sampling, make_language_model
from clip_jax.tools.source_arguments import check_options, open_source, source_parser
from clip_jax.tools.text_columns import format_reasons, one_line, write_texts

FAMILIES = ("chatgpt", "bard", "coco", "human")
DEMONSTRATIONS = Path(__file__).parent / "rewrite_demonstrations.json"
_SHOTS, _MAX_WORDS = 3, 77
_NO_CAPTION = "an answer that is no caption"
_SAMPLING = {
    "temperature": "sampling temperature; 0: greedy",
    "top_p": "nucleus sampling: probability mass of the tokens to sample from",
    "max_tokens": "longest answer in tokens",
}
#: The kinds of language model that each option is for.
_OPTIONS = {"words": ("offline",), "timeout": ("http", "https")}
_OPTIONS |= dict.fromkeys(_SAMPLING, ("http", "https", "transformers"))

Demonstrations = Mapping[str, Sequence[Sequence[str]]]
LanguageModel = Callable[[Sequence[Request]], list[str | NoAnswer]]


@functools.cache
def read_demonstrations(path=""):
    """Returns the demonstrations of each family.

    Args:
      path: a JSON file; "": the file of the package.

    Returns:
      `{family: {"pairs": [[source, target], ...]}}` or `{family: {"sets": [captions of one image, ...]}}`.

    Raises UserError for an unreadable file and for one with fewer than three demonstrations of a family.
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
                allowed = "2 texts each" if kind == "pairs" else "2 to 999 texts each"
                raise UserError(f"demonstrations {file}: {family} needs at least {_SHOTS} {kind} of {allowed}")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'demonstrations {file}: not JSON of {{family: {{"pairs" or "sets": [[text, ...], ...]}}}} ({error})'
        ) from None
    return families


def make_prompt(caption, demonstrations, rng):
    """Returns the prompt for one caption: an instruction, three demonstrations and the caption, on nine lines.

    Args:
      caption: the caption.
      demonstrations: those of one family, see `read_demonstrations`.
      rng: a `random.Random`.
    """
    if "pairs" in demonstrations:
        shots = rng.sample(demonstrations["pairs"], _SHOTS)
    else:
        shots = [rng.sample(captions, 2) for captions in rng.sample(demonstrations["sets"], _SHOTS)]
    lines = [f"{source} => {target}" for source, target in shots]
    return "\n\n".join(["write image captions differently,", *lines, f"{one_line(caption)} =>"])


def parse(answer):
    """Returns the rewrite in an answer, or an empty text when there is none."""
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
    """Returns one rewrite of each caption, in order; a failed one is empty.

    Args:
      captions: texts.
      family: whose demonstrations are used.
      llm: a function as `clip_jax.tools.language_models.make_language_model` returns.
      seed: of all random choices.
      numbers: a value for each caption that its random choices follow from; by default its position in the list.
      words: for each caption, the words that the record holds besides it.
      demonstrations: by default the package's for this family.
      failures: a Counter to which the reasons for empty rewrites are added.
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
    """Returns the distinct values of some fields that begin with a letter; each item of a list is one value."""
    texts = [one_line(text) for text in rewrites_of(record, fields, strict=False)]
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
    """Writes the column `rewrites` of a source; resumes an unfinished file.

    Args:
      source: the records.
      out: the file, `NAME.jsonl`, or a folder of parts, `NAME.parquet`.
      llm: a function as `clip_jax.tools.language_models.make_language_model` returns.
      name: the language model's name, for the header.
      families: families of demonstrations; one rewrite each.
      seed: of all random choices.
      batch: records in a batch.
      words: record fields with further words on the image.
      demonstrations: a JSON file, see `read_demonstrations`.
      about: pairs or a dict of further facts for the header.
      log: takes a line of progress.

    Returns:
      A Counter of the reasons for empty rewrites.

    Raises UserError for invalid arguments, and when a whole batch has no rewrite: the endpoint is gone or answers
    nonsense.
    """
    banks = read_demonstrations(demonstrations)
    if unknown := [family for family in families if family not in banks]:
        raise UserError(f"--families: {unknown[0]!r} is unknown; allowed: {', '.join(banks)}")
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
                [text for _, _, text, _ in captions], family, llm, seed,
                numbers=[f"{i} {k}" for i, k, _, _ in captions], words=[known for *_, known in captions],
                demonstrations=banks[family], failures=reasons,
            )  # fmt: skip
            for (i, *_), text in zip(captions, texts, strict=True):
                found[i].append(text)
        failures.update(
            +(reasons + Counter({"unreadable record": len(families) * sum(record is None for _, record in chunk)}))
        )
        asked = len(captions) * len(families) - reasons.pop("empty caption", 0)
        if asked and reasons.total() == asked and (asked >= 16 or _NO_CAPTION not in reasons):
            raise UserError(
                f"--llm={name}: none of {asked} prompts in a row was answered by a caption ({format_reasons(reasons)})"
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


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.rewrite", __doc__, ("text",))
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the column to write, .jsonl or .parquet")
    parser.add_argument("--llm", required=True, help=" | ".join(KINDS))
    parser.add_argument(
        "--families",
        default=",".join(FAMILIES),
        help="families of demonstrations, one rewrite each (default: all four)",
    )
    parser.add_argument(
        "--demonstrations",
        default="",
        metavar="FILE.json",
        help='your own demonstrations, {family: {"pairs" or "sets": [[text, ...], ...]}}',
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="records in a batch (default: %(default)s)")
    parser.add_argument(
        "--words",
        default="tags,keywords",
        help="record fields with further words, for --llm=offline (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for an HTTP answer (default: %(default)s)"
    )
    for field, value in vars(Sampling()).items():
        parser.add_argument(
            "--" + field.replace("_", "-"),
            type=type(value),
            default=value,
            help=f"{_SAMPLING[field]} (default: %(default)s)",
        )
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args, parser))


def _main(args, parser):
    check_options(args, parser, "llm", _OPTIONS)
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens)
    llm = make_language_model(args.llm, sampling, args.timeout)
    source = open_source(args)
    about = vars(sampling) if args.llm != "offline" else {}
    failures = run(
        source, args.out, llm, name=args.llm, families=args.families.split(","), seed=args.seed, batch=args.batch,
        words=args.words.split(","), demonstrations=args.demonstrations, about=about,
    )  # fmt: skip
    print(
        f"{args.out}: {len(source):,} records; {failures.total():,} rewrites of this run are empty. "
        f"{format_reasons(failures)}"
    )


if __name__ == "__main__":
    command.script(main)
