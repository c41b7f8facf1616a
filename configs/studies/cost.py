"""Cost: accuracy against the time and the memory of a training.

    python -m clip_jax.study --config=configs/studies/cost.py --workdir=runs/cost

Claims: FLIP drops half or three quarters of the patches and reaches CLIP's accuracy in less time and memory. LiT trains
a text tower to a locked picture tower: a step costs less, and the accuracy is higher.

All rows have the same examples. The figure has the minutes of training; the table also has FLOPs and the compiler's
estimate of the memory. FLIP has a tower of 64 patches; without dropping it is the control of the other two. LiT's
picture tower is that of CLIP's first seed, whose time is not counted.
"""

from embedded_rows import CONFIGS, SCALE, TEMPLATES, make_row, make_study

from clip_jax.study import Row

STUDIES = ("",)


def get_study(variant=""):
    drops = [(0, 0.0), (50, 0.5), (75, 0.75)]
    lit = ("data.source=emoji", f"data.templates={TEMPLATES!r}", "init_from={after}")
    rows = [
        make_row("CLIP", line=""),
        *(
            make_row("FLIP", f"FLIP, {percent} % dropped", (f"model.image.patch_drop={share}",), tune=SCALE)
            for percent, share in drops
        ),
        Row("LiT", f"{CONFIGS / 'lit.py'}", lit, tune=SCALE, after="CLIP"),
    ]
    return make_study(
        "Accuracy against cost",
        rows,
        "What do fewer patches and a locked tower save, and what do they cost in accuracy?",
        "FLIP reaches CLIP's accuracy in less time; LiT is better at less cost.",
        x="minutes",
        equal_compute=False,
    )
