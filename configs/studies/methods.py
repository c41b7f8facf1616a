"""All methods side by side: who is best with the same compute on the same pairs?

    python -m clip_jax.study --config=configs/studies/methods.py --workdir=runs/methods

Claim: each paper reports a higher zero-shot accuracy than CLIP on the same pairs; ALIGN and FLIP claim it at a larger
scale, SigLIP for small batches, CLIPPO and OneR claim to be near CLIP with one tower.

Each row gets the FLOPs of CLIP's steps. FLIP, ALIGN, CLIPPO and OneR have towers of their own. UniCL's classes are the
names. RA-CLIP uses a tenth of the pictures as its reference set. ALIP's synthetic captions come from a CLIP that was
trained on these pairs. PyramidCLIP needs regions: it trains on emoji and on composed scenes, at 64 pixels, so that it
gets few steps.
"""

from embedded_rows import METHODS, make_row, make_study

STUDIES = ("",)


def get_study(variant=""):
    return make_study(
        "Methods at equal compute",
        [make_row(method, line="") for method in METHODS],
        "Who is best with the same compute on the same pairs?",
        "Each paper reports a higher zero-shot accuracy than CLIP, or CLIP's accuracy with one tower.",
    )
