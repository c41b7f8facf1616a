"""Fewer pairs: 1/8, 1/4, 1/2 and all of the pictures with the same steps. Who needs less?

    python -m clip_jax.study --config=configs/studies/few_pairs.py --workdir=runs/few_pairs

Claims: DeCLIP and SLIP need fewer pairs because they also learn from pictures and texts alone, OTTER is data-efficient,
LaCLIP's rewrites make more of each caption, RA-CLIP looks similar pairs up.

The steps of a row do not depend on the number of pictures; rows of one method have the FLOPs of CLIP. A smaller share
is a part of every larger one. Values are tried at a quarter of the pictures. RA-CLIP's reference set is a tenth of its
share.
"""

from embedded_rows import make_row, make_study

STUDIES = ("",)
SHARES = (12.5, 25, 50, 100)
SOURCES = {"LaCLIP": "emoji?columns=emoji_rewrites"}
ROWS = ("CLIP", "DeCLIP", "SLIP", "OTTER", "LaCLIP", "RA-CLIP")


def get_study(variant=""):
    return make_study(
        "Fewer pairs",
        [make(method, share) for share in SHARES for method in ROWS],
        "1/8, 1/4, 1/2 and all of the pictures with the same steps: who needs less?",
        "DeCLIP, SLIP, OTTER, LaCLIP and RA-CLIP need fewer pairs than CLIP for the same accuracy.",
        x="pictures, %",
    )


def make(method, share):
    """Returns the row of a method with a share of the pictures in percent."""
    source = SOURCES.get(method, "emoji") + (f"?holdout={share / 100:g}:few" if share < 100 else "")
    overrides = [f"data.source={source}"]
    if method == "RA-CLIP":
        overrides = [f"data.source={source}?part=record:!1/10", f"raclip.reference={source}?part=record:1/10"]
    tuned = {} if share == 25 else {"tuned_as": f"{method}, 25 %"}
    return make_row(method, f"{method}, {share:g} %", overrides, x=share, **tuned)
