"""What the studies on the embedded images share: the rules of docs/results.md, and the rows of the methods.

The towers, data, augmentation and optimizer of a row are those of `configs/clip.py:emoji`, but for what its method is.
Each row tries three values of one hyper-parameter that its paper names.
"""

import pathlib

from clip_jax.study import Row, Study

CONFIGS = pathlib.Path(__file__).parents[1]
TEMPLATES = ("{name}, {tags}", "{name}, {tags}", "{name}")  # those of configs/clip.py:emoji
KIND = "top1_without_compositions"
LR = ("optim.lr", (7.5e-4, 1.5e-3, 3e-3))
SCALE = ("model.logit_scale_init", (2.7, 3.4, 4.1))

# Method: configuration, overrides, the values that are tried
METHODS = {
    "CLIP": ("clip.py:emoji", (), SCALE),
    "SigLIP": ("siglip.py", (), ("model.logit_bias_init", (-10.0, -5.0, 0.0))),
    "FLIP": ("flip.py", (), ("model.image.patch_drop", (0.25, 0.5, 0.75))),
    "ALIGN": ("align.py", (), ("optim.lr", (5e-3, 1e-2, 2e-2))),
    "CLIPPO": (
        "clippo.py",
        (f"data.templates={TEMPLATES!r}", "data.batch_size=256"),
        ("optim.lr", (5e-4, 1e-3, 2e-3)),
    ),
    "OneR": ("oner.py", ("data.batch_size=256",), ("oner.temperature", (0.05, 0.1, 0.2))),
    # The neighbours wait until the queue is full, 16 steps instead of the configuration's 32.
    "DeCLIP": ("declip.py", ("declip.queue_size=8192",), ("declip.nn", (0.1, 0.2, 0.4))),
    "SLIP": ("declip.py:small_slip", (), ("declip.simclr", (0.5, 1.0, 2.0))),
    "DeFILIP": ("declip.py:small_defilip", ("declip.queue_size=8192",), ("declip.filip", (0.1, 0.2, 0.4))),
    # The configuration warms the distillation up over half of its own 1,400 steps.
    "OTTER": ("otter.py", ("otter.warmup_steps=50",), ("otter.alpha", (0.25, 0.5, 0.75))),
    "ZeroVL": ("zerovl.py", (), ("zerovl.mix_alpha", (0.1, 0.2, 0.4))),
    # Names are the classes, so that the pictures of one name, by several vendors, are positives of each other.
    "UniCL": ("unicl.py", ("data.source=emoji?label=name", f"unicl.class_templates={TEMPLATES!r}"), SCALE),
    "FILIP": ("filip.py", (), SCALE),
    "LaCLIP": ("laclip.py", (), ("data.rewrite_prob", (0.25, 0.5, 0.75))),
    "ALIP": ("alip.py", (), ("alip.gamma_pair", (1.0, 2.0, 4.0))),
    "RA-CLIP": ("raclip.py", (), ("raclip.k", (4, 8, 16))),
    "PyramidCLIP": ("pyramidclip.py", (), ("pyramidclip.softening", (0.1, 0.2, 0.3))),
}


def unseen(prefix, kind=KIND):
    """Returns the metric of the unseen concepts of both kinds of vendors together, such as those of "emoji_val"."""
    return tuple(f"{prefix}/unseen_concept_{vendor}_vendor/{kind}" for vendor in ("seen", "unseen"))


METRICS = {
    "unseen concepts without compositions": unseen("emoji_test"),
    "unseen concepts": unseen("emoji_test", "top1"),
    "seen concepts, unseen vendor": "emoji/seen_concept_unseen_vendor/top1",
}
ALIGN_FILTER = ("clip_jax.tools.filter", "--min-side=31", "--min-words=1")  # but for `--source`
# Trainings are shorter than those of the configurations, those of costly methods most. So all have fewer steps to warm
# up, and the learning rate that tuning chose for CLIP at this length.
OVERRIDES = ("train.steps=700", "optim.lr=1.5e-3", "optim.warmup_steps=30")
OVERRIDES += ("checkpoint.steps=0", "eval.steps=0", "eval.report=false")


def make_study(title, rows, question, claim, **fields):
    """Returns a study by the common rules; `fields` are those of `Study` that differ."""
    common = dict(
        metrics=METRICS,
        tasks=("emoji(subset='test')", "emoji()"),
        tune_tasks=("emoji(subset='val')",),
        tune_metric=unseen("emoji_val"),
        equal_compute=True,
    )
    fields["overrides"] = OVERRIDES + fields.get("overrides", ())
    return Study(title, tuple(rows), question=question, claim=claim, **common | fields)


def make_row(method, name="", overrides=(), **fields):
    """Returns the row of a method of `METHODS`.

    Args:
      method: the method.
      name: of the row; by default the method.
      overrides: changes after those of the method.
      fields: further fields of `Row`. With `tuned_as` the row tries no values of its own.
    """
    config, own, tune = METHODS[method]
    fields = {"tune": () if fields.get("tuned_as") else tune, "line": method} | fields
    return Row(name or method, f"{CONFIGS / config}", (*own, *overrides), **fields)
