"""Our models for others: `python -m clip_jax.tools.export --checkpoint=runs/clip --to=open_clip|hf --out=FOLDER`.

`clip_jax.interop.export` says what is written.
"""

import sys

from clip_jax import inference
from clip_jax.interop import export
from clip_jax.runtime import command


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    parser = command.make_parser("clip_jax.tools.export", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="work folder, checkpoint, or weights of others"
    )
    parser.add_argument("--which", default="latest", help="latest, best, or a step (default: %(default)s)")
    parser.add_argument("--to", required=True, choices=export.TARGETS)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--without-tokenizer", action="store_true", help="leave the tokenizer out")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args))


def _run(args):
    export.check_out(args.out)
    model = inference.load(args.checkpoint, args.which)
    print("\n".join(export.export(model, args.to, args.out, tokenizer=not args.without_tokenizer)))


if __name__ == "__main__":
    sys.exit(main())
