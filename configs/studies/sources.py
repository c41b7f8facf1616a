"""Sources that look different: batches of all sources, or each of one (debiased sampling).

    python -m clip_jax.study --config=configs/studies/sources.py --workdir=runs/sources

Claim of ZeroVL: in a batch of several sources a model can tell wrong pairs by their source; batches of one source each
learn more.

The sources are five vendors of emoji and clip art, which have styles and captions of their own.
"""

from embedded_rows import TEMPLATES, make_row, make_study

STUDIES = ("",)
SOURCE = "emoji?by=vendor*3 + openclipart?without=emoji&has=keywords*1"


def get_study(variant=""):
    templates = (*TEMPLATES, "{caption}, {keywords}")
    data = f"data.source={SOURCE}", f"data.templates={templates!r}"
    rows = [
        make_row(method, f"{method}, {name}", (*data, f"data.sampling={sampling}"), line="")
        for method in ("CLIP", "ZeroVL")
        for name, sampling in (("mixed", "mixed"), ("debiased", "one_source"))
    ]
    return make_study(
        "Sources that look different",
        rows,
        "Does a batch from one source learn more than a mixed one?",
        "ZeroVL: debiased sampling raises accuracy on mixtures.",
    )
