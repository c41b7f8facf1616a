"""The batch: 32 to 1,024 pairs, with the same number of examples.

    python -m clip_jax.study --config=configs/studies/batch.py --workdir=runs/batch

Claim of SigLIP: the sigmoid loss needs no large batch; it is better than CLIP's softmax below some size, and equal in
large batches.

Every row reads 179,200 examples, 700 steps of 256. The learning rate is tried for each size.
"""

from embedded_rows import LR, make_row, make_study

STUDIES = ("",)
EXAMPLES = 700 * 256
SIZES = (32, 128, 256, 512, 1024)


def get_study(variant=""):
    return make_study(
        "Batch sizes",
        [make(method, size) for size in SIZES for method in ("CLIP", "SigLIP")],
        "32 to 1,024 pairs in a batch, the examples fixed: who needs large batches?",
        "SigLIP is better than CLIP in small batches and equal in large ones.",
        x="pairs in a batch",
        equal_compute=False,
    )


def make(method, size):
    """Returns the row of a method and a batch size, whose learning rates shrink with the root of a small size."""
    overrides = (f"data.batch_size={size}", f"train.steps={EXAMPLES // size}")
    rates = tuple(float(f"{rate * min(1, (size / 256) ** 0.5):.2g}") for rate in LR[1])
    return make_row(method, f"{method}, {size}", overrides, x=size, tune=(LR[0], rates))
