"""Balances captions over a list of entries as MetaCLIP does (Xu et al. 2023, algorithm 1), and writes an index of them.

    python -m clip_jax.tools.balance --source='/data/pairs/{00000..41407}.tar' --entries=metadata.json \\
        --per-entry=20000 --out=runs/balanced
    python -m clip_jax.train --config=configs/clip.py:b16 \\
        --config.data='/data/pairs/{00000..41407}.tar?index=runs/balanced' ...

A caption that contains none of the entries is removed. An entry of n captions draws each of them with the probability
min(1, t / n), with t = --per-entry. A caption stays when one of its entries draws it, so that frequent entries keep
about t captions of their own and rare ones all. Draws depend on --seed, the record, the caption and the entry alone.

The matches stay in OUT/parts: the same command with another --per-entry or --seed does not read the source again.
"""

import functools
import json
from pathlib import Path

import numpy as np

from clip_jax.data.records import BadRecord, records
from clip_jax.data.sources.index import TEXTS
from clip_jax.errors import UserError
from clip_jax.runtime import command
from clip_jax.tools import examples
from clip_jax.tools.entries import Matcher, entries_key, read_entries
from clip_jax.tools.index_writer import IndexWriter, bits_of, cost, example_lines, headline, places
from clip_jax.tools.passes import Pass, pass_parser, run_command, share_of, show
from clip_jax.tools.source_arguments import open_source

_LISTED = 20  # entries in the report


def match(matcher, source, first, end):
    """Returns the entries in the captions of the records first..end-1.

    Returns: `captions`, uint8 `[records]`, the number of captions of each record, 64 at most, 0 where it is unreadable;
    `readable`, bool `[records]`; `matches`, uint32 `[captions]`, the number of entries in each caption; `entries`,
    uint32 `[matches]`, their numbers, of all captions one after the other.
    """
    captions, readable = np.zeros(end - first, np.uint8), np.zeros(end - first, bool)
    matches, entries = [], []
    for index, record in records(source, first, end):
        if isinstance(record, BadRecord):
            continue
        texts = record["texts"][:TEXTS]
        captions[index - first], readable[index - first] = len(texts), True
        for text in texts:
            found = matcher(text)
            matches.append(len(found))
            entries += found
    return {
        "captions": captions,
        "readable": readable,
        "matches": np.array(matches, np.uint32),
        "entries": np.array(entries, np.uint32),
    }


def drawn(part, first, probability, seed):
    """Returns which matches of a part are drawn, bool `[matches]`, and the caption of each, int64 `[matches]`.

    Args:
      part: the arrays of `match`.
      first: the first record of the part.
      probability: float64 `[entries]`.
      seed: int.
    """
    caption = np.repeat(np.arange(len(part["matches"])), part["matches"])
    owner, place = places(part["captions"])
    draw = examples.uniform(seed, first + owner[caption], place[caption], part["entries"])
    return draw < probability[part["entries"]], caption


def select(made, out, entries, per_entry, seed=0):
    """Writes the index of the balanced captions, and `entry_counts.json`.

    Args:
      made: the finished `Pass` of `match`.
      out: the folder.
      entries: the list of entries.
      per_entry: int, t.
      seed: int.

    Returns: the report. Raises UserError when no caption is kept.
    """
    counts, kept_counts = np.zeros(len(entries), np.int64), np.zeros(len(entries), np.int64)
    captions = matched = unreadable = 0
    for part in made:
        counts += np.bincount(part["entries"], minlength=len(entries))
        captions, matched = captions + len(part["matches"]), matched + int((part["matches"] > 0).sum())
        unreadable += int((~part["readable"]).sum())
    probability = np.minimum(1, per_entry / np.maximum(counts, 1))
    with IndexWriter(made.source, out, made.start) as writer:
        samples = {name: examples.Smallest() for name in ("Kept", "Not drawn", "No entry")}
        for number, part in enumerate(made):
            first, _ = made.bounds(number)
            is_drawn, caption = drawn(part, first, probability, seed)
            kept = np.bincount(caption[is_drawn], minlength=len(part["matches"])) > 0
            kept_counts += np.bincount(part["entries"][kept[caption]], minlength=len(entries))
            bits = bits_of(part["captions"], kept)
            rows = np.flatnonzero(bits)
            writer.add(first + rows, bits[rows])
            _sample(samples, part, first, kept)
        sections = {name: _examples(made, sample, entries, counts) for name, sample in samples.items()}
        told = _facts(entries, counts, kept_counts, per_entry)
        report = writer.finish(
            {
                "per_entry": per_entry,
                "seed": seed,
                "captions": captions,
                "captions_with_entries": matched,
                "unreadable_records": unreadable,
                **told,
                "examples": examples.without_images(sections),
            },
            describe,
        )
        _write_counts(out, entries, counts, kept_counts)
    examples.write_page(out, f"{made.source.name}: balanced captions", list(describe(report)), sections)
    return report


def _sample(samples, part, first, kept):
    """Adds the captions of a part to the samples; a row is a record, a caption, and the caption's first two matches."""
    owner, place = places(part["captions"])
    starts = np.cumsum(part["matches"], dtype=np.int64) - part["matches"]
    padded = np.concatenate([part["entries"].astype(np.int64), [-1]])
    first_match = np.where(part["matches"] > 0, padded[np.minimum(starts, len(padded) - 1)], -1)
    rows, keys = np.stack([first + owner, place, first_match], 1), examples.uniform(0, first + owner, place)
    chosen = {"Kept": kept, "Not drawn": ~kept & (part["matches"] > 0), "No entry": part["matches"] == 0}
    for name, which in chosen.items():
        samples[name].add(keys[which], rows[which])


def _examples(made, sample, entries, counts):
    found = []
    for record, caption, entry in sample.rows():
        note = f"{entries[entry]!r} in {counts[entry]:,}" if entry >= 0 else ""
        found.append(examples.shown(made.source, record, note, [caption]))
    return found


def _facts(entries, counts, kept, per_entry):
    """Returns what the report says of the entries."""
    head, total = counts > per_entry, max(int(counts.sum()), 1)
    order = np.argsort(-counts, kind="stable")[:_LISTED]
    return {
        "entries": len(entries),
        "entries_with_captions": int((counts > 0).sum()),
        "head_entries": int(head.sum()),
        "matches": int(counts.sum()),
        "head_share": float(counts[head].sum() / total),
        "tail_share": float(counts[~head].sum() / total),
        "head_share_kept": float(kept[head].sum() / max(int(kept.sum()), 1)),
        "most_frequent": [[entries[i], int(counts[i]), int(kept[i])] for i in order.tolist() if counts[i]],
    }


def _write_counts(out, entries, counts, kept):
    """Writes `entry_counts.json`: `[entry, captions, kept captions]` of each entry, the most frequent first."""
    order = np.argsort(-counts, kind="stable").tolist()
    rows = (json.dumps([entries[i], int(counts[i]), int(kept[i])], ensure_ascii=False) for i in order)
    (Path(out) / "entry_counts.json").write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def describe(report):
    """Yields the lines of a report, the dict that `select` returns."""
    yield headline(report)
    captions, matched = report["captions"], report["captions_with_entries"]
    share = matched / max(captions, 1)
    yield f"{matched:,} of {captions:,} captions ({share:.1%}) contain an entry; the others are removed"
    yield f"{report['entries_with_captions']:,} of {report['entries']:,} entries are in a caption"
    yield (
        f"head: {report['head_entries']:,} entries are in more than {report['per_entry']:,} captions; they have "
        f"{report['head_share']:.1%} of the {report['matches']:,} matches, {report['head_share_kept']:.1%} after it"
    )
    yield (
        f"tail: the others have {report['tail_share']:.1%} of the matches, {1 - report['head_share_kept']:.1%} after it"
    )
    yield f"unreadable records: {report['unreadable_records']:,}"
    yield cost(report)
    yield ""
    yield f"{'captions':>12}{'kept':>12}  most frequent entries"
    for entry, count, kept in report["most_frequent"]:
        yield f"{count:>12,}{kept:>12,}  {entry}"
    yield from example_lines({f"{heading.lower()}:": found for heading, found in report["examples"].items()})


def main(argv=None):
    """Runs the command; returns the exit status: 0, 2 after a one-line error, 130 after Ctrl-C."""
    parser = pass_parser("clip_jax.tools.balance", __doc__)
    add = parser.add_argument
    add("--entries", required=True, metavar="FILE", help="a .json list of texts, or a text file with one entry a line")
    add("--per-entry", type=int, default=20_000, metavar="T", help="captions of an entry that stay (default: 20000)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args, log=print):
    """Runs the command with parsed arguments; `log` is a function of a line. Raises UserError for wrong ones."""
    share = share_of(args.part)
    if args.per_entry < 1:
        raise UserError(f"--per-entry={args.per_entry}: must be at least 1")
    entries = read_entries(args.entries)
    matcher = Matcher(entries)
    if matcher.never:
        log(f"{len(matcher.never):,} entries are in no text by the rule of MetaCLIP, such as {matcher.never[0]!r}")
    source = open_source(args)
    made = Pass(source, args.out, "balance")
    made.begin({"list of entries": entries_key(entries)})
    made.run(functools.partial(match, matcher, source), share, log)
    if not share:
        show(describe(select(made, args.out, entries, args.per_entry, args.seed)), args, log)


if __name__ == "__main__":
    command.script(main)
