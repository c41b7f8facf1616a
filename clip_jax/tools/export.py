"""Exports a checkpoint for open_clip or Hugging Face transformers.

    python -m clip_jax.tools.export --checkpoint=runs/clip --to=open_clip --out=export/open_clip
    python -m clip_jax.tools.export --checkpoint=runs/clip --to=hf --out=export/hf

FOLDER gets the weights in float32, the configuration, the preprocessing and the tokenizer. Load it with

    open_clip.create_model_and_transforms("local-dir:FOLDER")             --to=open_clip
    transformers.CLIPModel.from_pretrained("FOLDER") and AutoProcessor    --to=hf; SiglipModel and AlignModel likewise

A model that the target cannot express is refused with a line that names the field. docs/checkpoints.md lists what fits.
"""

from clip_jax import inference
from clip_jax.interop import export
from clip_jax.runtime import command


def main(argv=None):
    """Runs the command; returns the exit status: 0, or 2 after a one-line error."""
    parser = command.make_parser("clip_jax.tools.export", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="work folder, checkpoint or third-party weights"
    )
    parser.add_argument("--which", default="latest", help="latest, best, or a step (default: %(default)s)")
    parser.add_argument("--to", required=True, choices=export.TARGETS, help="the program that will load the model")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--without-tokenizer", action="store_true", help="do not write the tokenizer")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args))


def _run(args):
    export.check_out(args.out)
    model = inference.load(args.checkpoint, args.which)
    print("\n".join(export.export(model, args.to, args.out, tokenizer=not args.without_tokenizer)))


if __name__ == "__main__":
    command.script(main)
