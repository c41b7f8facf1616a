"""The arguments that every command on a data source shares."""

import itertools

from clip_jax.data.sources import make_source
from clip_jax.errors import UserError
from clip_jax.runtime import command

FIELDS = ("image", "text", "label")


def source_parser(module, doc, fields):
    """Returns the parser of a command that reads a data source.

    It has `--source`, `--split` and one argument for each of `fields`.

    Args:
      module: the import path of the command's module.
      doc: its docstring, which is the help text.
      fields: some of `FIELDS`.
    """
    parser = command.make_parser(module, doc)
    parser.add_argument("--source", required=True, help="any source string of clip_jax.data.sources")
    add_fields(parser, fields)
    return parser


def add_fields(parser, fields=FIELDS):
    """Adds `--split` and one argument for each of `fields` to a parser."""
    parser.add_argument("--split", default="train", help="split of the source (default: train)")
    for name in fields:
        parser.add_argument(
            f"--{name}", help=f"record field of the {name}, when it has an unusual name; as in training"
        )


def open_source(args):
    """Returns the source that parsed arguments name; raises UserError as `make_source` does."""
    return make_source(args.source, args.split, **{name: getattr(args, name, None) for name in FIELDS})


def check_options(args, parser, choice, kinds):
    """Raises UserError for an option that the chosen kind does not use.

    Args:
      args: the parsed arguments.
      parser: their parser. An option with its default value is not given.
      choice: the argument that chooses, "KIND" or "KIND:...". An unknown kind is refused elsewhere.
      kinds: `{option: tuple of the kinds that use it}`.
    """
    chosen = getattr(args, choice)
    kind = chosen.partition(":")[0]
    for name, some in kinds.items():
        is_other = kind in itertools.chain(*kinds.values()) and kind not in some
        if is_other and getattr(args, name) != parser.get_default(name):
            wanted = " or ".join(f"--{choice}={other}" for other in some)
            raise UserError(f"--{name.replace('_', '-')} is for {wanted}, not --{choice}={chosen}")
