"""What the commands on a data source share: the arguments that name it, and how it is opened."""

from clip_jax.data.sources import make_source
from clip_jax.runtime import command


def source_parser(module, doc, fields):
    """The parser of `python -m MODULE` with `--source`, `--split` and an argument for each of the fields `image`, `text` and `label`."""
    parser = command.make_parser(module, doc)
    parser.add_argument("--source", required=True, help="any source of clip_jax.data.sources")
    parser.add_argument("--split", default="train", help="split of the source (default: train)")
    for name in fields:
        parser.add_argument(f"--{name}", help=f"field of the {name}, where its name is unusual; as in training")
    return parser


def open_source(args):
    """The source that the arguments name; raises UserError as `make_source` does."""
    return make_source(
        args.source, args.split, **{name: getattr(args, name, None) for name in ("image", "text", "label")}
    )
