"""Computes features of image regions with a frozen encoder and writes them as columns of a data set (PyramidCLIP).

    python -m clip_jax.tools.regions --source='/data/pairs/{00000..00331}.tar' --encoder=runs/clip --out=pairs_regions
    python -m clip_jax.tools.regions --source=emoji --grid=3 --encoder=runs/clip --out=emoji_regions

The boxes come from a record field that a detector has filled: x1, y1, x2, y2 in pixels, `[regions, 4]`, most important
first. With --grid=N they are the whole image and its N x N equal parts instead.

OUT is a folder with two fields, as arrays, or where its name ends in .parquet as Parquet files:

    regions    float16 [COUNT, features]
    boxes      float32 [COUNT, 4]

Rows of zeros fill both where an image has fewer regions. An unreadable image, or one that has a box entirely
outside of it, has no regions and is counted.
"""

import itertools
from collections import Counter

import numpy as np

from clip_jax.data import decode
from clip_jax.data.records import BadRecord, records
from clip_jax.data.sources.columns import array_writer
from clip_jax.data.views import read_boxes
from clip_jax.errors import UserError, did_you_mean
from clip_jax.runtime import command
from clip_jax.tools.source_arguments import open_source, source_parser
from clip_jax.tools.text_columns import format_reasons

_PROBED = 64  # the field of boxes must be in one of the first records


def grid_boxes(width, height, side):
    """Returns the boxes float32 `[1 + side * side, 4]` of the whole image and its equal parts, row by row.

    Args:
      width, height: of the image, in pixels.
      side: parts in a row and in a column.
    """
    cells = [(x, y, x + 1, y + 1) for y in range(side) for x in range(side)]
    return np.array([(0, 0, side, side), *cells], np.float32) * np.array([width, height] * 2, np.float32) / side


def run(
    source, out, encoder, weights, *, boxes="boxes", grid=0, count=10, batch=256,
    about=None, log=print,
):  # fmt: skip
    """Writes the columns `regions` and `boxes` of a source.

    Args:
      source: the records.
      out: the folder.
      encoder: an encoder of `clip_jax.methods.frozen_encoders`.
      weights: its weights.
      boxes: the record field of the boxes.
      grid: parts of an image in a row and in a column; 0: the boxes of the record.
      count: at most this many regions of an image.
      batch: regions that are embedded at a time.
      about: what makes the columns, for the header.
      log: takes a line of progress, every 10,000 records.

    Returns:
      A Counter of the reasons for images without regions.

    Raises UserError when no record has the field of boxes, and when no image has a region.
    """
    import jax

    embed = jax.jit(encoder.embed_image)
    failures, queue = Counter(), []
    if not grid:
        _check_field(source, boxes)
    shapes = {"regions": ((count, encoder.image_dim), np.float16), "boxes": ((count, 4), np.float32)}
    with array_writer(out, source, shapes, about or {}) as arrays:

        def flush():
            if queue:
                places, crops = zip(*queue, strict=True)
                # Batches of one shape compile once.
                crops = np.stack(crops + (np.zeros_like(crops[0]),) * (batch - len(crops)))
                arrays["regions"][tuple(np.transpose(places))] = np.asarray(embed(weights, crops))[: len(places)]
                queue.clear()

        for index, record in records(source):
            try:
                found, crops = _crops(record, boxes, grid, count, encoder.size)
            except BadRecord as bad:
                failures[bad.args[0]] += 1
                continue
            arrays["boxes"][index, : len(found)] = found
            for number, crop in enumerate(crops):
                queue.append(((index, number), crop))
                if len(queue) == batch:
                    flush()
            if (index + 1) % 10_000 == 0:
                log(f"{index + 1:,} of {len(source):,} records")
        flush()
        if failures.total() == len(source):
            raise UserError(f"{source.name}: no image has a region ({format_reasons(failures)})")
    return failures


def _check_field(source, boxes):
    known = set()
    for _, record in itertools.islice(records(source), _PROBED):
        known |= set() if isinstance(record, BadRecord) else record.keys()
    if boxes not in known:
        raise UserError(
            f"{source.name}: no record has the field {boxes!r} of --boxes{did_you_mean(boxes, known)}; "
            f"fields: {', '.join(sorted(known))}; --grid=3 needs none"
        )


def _crops(record, field, grid, count, size):
    """Returns the boxes of a record and their crops, uint8 `[size, size, 3]`; raises BadRecord."""
    if isinstance(record, BadRecord):
        raise record
    image = decode.flatten(decode.load(decode.open_image(record.get("image"))))
    found = (grid_boxes(*image.size, grid) if grid else read_boxes(record, field, image.size))[:count]
    if not len(found):
        raise BadRecord("no regions")
    return found, [np.asarray(decode.resize(image, (size, size), box=tuple(box))) for box in found.tolist()]


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = source_parser("clip_jax.tools.regions", __doc__, ("image", "text"))
    parser.add_argument(
        "--encoder", required=True, help="pixels, efficientnet_lite0 or a work folder, see docs/retrieval.md"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the columns")
    parser.add_argument("--boxes", default="boxes", help="record field of the boxes (default: boxes)")
    parser.add_argument(
        "--grid", type=int, default=0, metavar="N", help="the whole image and its N x N parts instead of boxes"
    )
    parser.add_argument(
        "--count", type=int, default=10, help="at most this many regions of an image (default: 10, the paper's)"
    )
    parser.add_argument("--batch", type=int, default=256, help="regions in a batch (default: 256)")
    args = parser.parse_args(argv)
    return command.run(lambda: _main(args))


def _main(args):
    if min(args.count, args.batch) < 1 or args.grid < 0:
        raise UserError(
            f"--count={args.count} and --batch={args.batch} must be at least 1, --grid={args.grid} at least 0"
        )
    source = open_source(args)
    from clip_jax import config
    from clip_jax.methods import frozen_encoders as frozen
    from clip_jax.runtime.sharding import make_mesh

    encoder = frozen.make_encoder(args.encoder, frozen.stored_config(args.encoder))
    weights = encoder.load(make_mesh(config.base().mesh))
    options = {name: getattr(args, name) for name in ("boxes", "grid", "count")}
    failures = run(
        source, args.out, encoder, weights, batch=args.batch, about={"encoder": args.encoder, **options}, **options
    )
    print(f"{args.out}: {len(source):,} records, {failures.total():,} without regions. {format_reasons(failures)}")


if __name__ == "__main__":
    command.script(main)
