"""A sample of a source in a few lines, by which a user finds a wrong column before the first step."""

import time
from collections import Counter

import numpy as np

from clip_jax.data import decode
from clip_jax.data.blocks import blocks_of, is_sequential, read_block
from clip_jax.data.records import BadRecord, image_key

#: Records of a sample, the blocks they come from where single records cost a request, and the seconds they may take.
RECORDS, SECONDS = 512, 3.0
BLOCKS = 4
_SHOWN = 3  # examples
_LONGEST = 100  # characters of a caption that are shown


def describe(source, views, tokenizer, records=RECORDS, seconds=SECONDS):
    """Yields the lines about a sample of a source.

    The sample is evenly spaced, the same in every run. It is smaller where reading takes longer than allowed.

    Args:
      source: a `clip_jax.data.records.Source`.
      views: the views of the method; those with captions tell how many of them are cut off.
      tokenizer: a `clip_jax.data.tokenizers.TextInput`.
      records: int, at most this many records are read.
      seconds: float, reading ends after this time.
    """
    view = next((view for view in views if hasattr(view, "caption") and hasattr(view, "context")), None)
    room = _room(view, tokenizer)
    seen, bad = Counter(), Counter()
    shown = []
    read = captions = longer = 0
    for record in _sample(source, records, seconds):
        read += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            caption = view.caption(record, None) if view else ""
            image = decode.load(decode.open_image(record["image"])) if "image" in record else None
        except BadRecord as error:
            bad[error.args[0]] += 1
            continue
        captions += len(record.get("texts") or ())
        longer += room is not None and len(tokenizer.encode(caption[: 100 * view.context])) > room
        if image is not None:
            seen[image_key(record["image"])] += 1
            shown.append((image.size, caption))
    used = read - bad.total()
    parts = [f"captions per record: {captions / max(used, 1):.3g}"]
    if room is not None:
        parts.append(f"longer than {view.context} tokens and cut off: {longer / max(used, 1):.0%}")
    parts.append(f"exact duplicates of pictures: {seen.total() - len(seen)}")
    reasons = f" ({', '.join(f'{reason}: {count}' for reason, count in bad.most_common(5))})" if bad else ""
    yield f"sample of {read:,} of {len(source):,} records: {', '.join(parts)}, unusable: {bad.total()}{reasons}"
    for place in sorted({i * len(shown) // _SHOWN for i in range(_SHOWN)}) if shown else ():
        (width, height), caption = shown[place]
        text = " ".join(caption.split()).encode("utf-8", "replace").decode()
        text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
        yield f"  {width} x {height}" + (f": {text}" if text else "")


def _room(view, tokenizer):
    """Returns the number of a caption's tokens that a view keeps; None where captions have no tokens."""
    if view is None or not hasattr(tokenizer, "encode"):
        return None
    return view.context - (tokenizer.sot_id is not None) - bool(tokenizer.options.get("eot"))


def _sample(source, records, seconds):
    """Yields records of each part of a source, or their BadRecord, until the part's share of the time is over."""
    parts = getattr(source, "sources", [source])
    for part in parts:
        end = time.monotonic() + seconds / len(parts)
        for some, index in _places(part, min(-(-records // len(parts)), len(part))):
            try:
                yield some[index]
            except BadRecord as error:
                yield error
            if time.monotonic() > end:
                break


def _places(source, count):
    """Yields `(sequence, index in it)` of a sample, in an order whose beginning is a sample too."""
    if not is_sequential(source):
        places = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
        yield from ((source, index) for index in np.random.default_rng(0).permutation(places).tolist())
        return
    sizes = blocks_of(source)
    chosen = np.unique(np.linspace(0, len(sizes) - 1, BLOCKS).round().astype(np.int64)).tolist()
    for number in chosen:
        some = read_block(source, number)
        yield from ((some, index) for index in range(min(int(sizes[number]), -(-count // len(chosen)))))
