"""Wrong pairs: the captions of 0, 30 and 60 % of the pictures are exchanged. Who loses least?

    python -m clip_jax.study --config=configs/studies/noise.py --workdir=runs/noise

Claims: OTTER's soft targets and ALIP's weights are made for captions that do not fit; label smoothing trusts no pair
wholly; ALIGN relies on simple filters and on scale; DataComp keeps the pairs with the highest CLIP score.

`SOURCE?exchange=0.3` makes the wrong pairs. Values are tried at 30 % and hold at all levels. ALIGN's rules see single
texts and pictures, not whether they fit. The CLIP-score filter keeps half of the pairs by the CLIP that was trained on
the same noise, with seed 0; its compute is not counted. ALIP's synthetic captions come from a CLIP that saw right pairs
alone, and they stay with their pictures: this row knows what no other knows.
"""

from embedded_rows import ALIGN_FILTER, make_row, make_study

STUDIES = ("",)
LEVELS = (0, 30, 60)
SCORE_FILTER = ("clip_jax.tools.clip_score", "--checkpoint={after}", "--keep=0.5")


def get_study(variant=""):
    return make_study(
        "Wrong captions",
        [row for level in LEVELS for row in rows(level)],
        "The captions of 0, 30 and 60 % of the pictures are exchanged: who loses least?",
        "OTTER, ALIP and label smoothing suffer less from wrong pairs than CLIP; filters remove them.",
        x="exchanged captions, %",
    )


def rows(level):
    """Yields the rows of a share of wrong pairs in percent; CLIP is the first."""
    noise = f"?exchange={level / 100:g}" if level else ""

    def make(method, name, overrides=(), **fields):
        tuned = {} if level == 30 else {"tuned_as": f"{name}, 30 %", "tune": ()}
        return make_row(method, f"{name}, {level} %", overrides, line=name, x=level, **fields | tuned)

    def filtered(name, command, **fields):
        index = (*command, f"--source=emoji{noise}")
        return make("CLIP", name, (f"data.source=emoji{noise}{{index}}",), index=index, **fields)

    source = f"data.source=emoji{noise}"
    yield make("CLIP", "CLIP", (source,))
    # OTTER's row LS. Its loss sums both directions, CLIP's is their mean: the bound of the gradient's norm doubles too.
    smoothing = dict(tune=("otter.label_smoothing", (0.05, 0.1, 0.2)))
    infonce = ("otter.alpha=1.0", "otter.warmup_steps=0", "optim.grad_clip_norm=2.0")
    yield make("OTTER", "label smoothing", (source, *infonce), **smoothing)
    yield make("OTTER", "OTTER", (source,))
    synthetic = f"{noise}:synthetic" if noise else ""
    yield make("ALIP", "ALIP", (f"data.source=emoji?columns=emoji_captions{synthetic}",))
    yield filtered("ALIGN's filter", ALIGN_FILTER)
    yield filtered("CLIP-score filter", SCORE_FILTER, after=f"CLIP, {level} %")
