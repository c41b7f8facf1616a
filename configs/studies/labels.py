"""Labels and captions: half of the concepts have their subgroup's name alone, the other half captions.

    python -m clip_jax.study --config=configs/studies/labels.py --workdir=runs/labels

Claim of UniCL: one loss in which all pictures of a class are positives uses both kinds of data better than cross
entropy on labels, and better than CLIP with the labels as captions.

A label is put into one of five sentences. With a single one all texts of a class are equal, and then UniCL's loss is
CLIP's: a text is as similar to each picture of its class as the class's other texts are, so that the mean over the
positives changes nothing.

Cross entropy sees the labelled half alone and learns no names: its zero-shot accuracy is that of chance. Nearest
neighbours compare all three: the subgroup of pictures of unseen concepts, by the votes of 20 training pictures.
"""

from embedded_rows import CONFIGS, LR, METRICS, make_study

from clip_jax.study import Row

STUDIES = ("",)
LABELLED = "emoji?label=subgroup"
SENTENCES = ("{class_name}", *(f"{words} {{class_name}}" for words in ("a picture of", "an icon of", "a drawing of")))
SENTENCES += ("{class_name}, a small picture",)


def get_study(variant=""):
    votes = f"knn(train={LABELLED!r}, train_split='train', test={LABELLED!r}, test_split='{{}}_seen_vendor', k=20"
    sentences = (f"unicl.class_templates={SENTENCES!r}",)
    rows = (
        Row("CLIP, labels as captions", f"{CONFIGS / 'unicl.py'}", (*sentences, "unicl.pairs_only=True"), tune=LR),
        Row("UniCL", f"{CONFIGS / 'unicl.py'}", sentences, tune=LR),
        Row("cross entropy on the labels", f"{CONFIGS / 'classify.py:emoji'}", tune=LR),
    )
    return make_study(
        "Labels and captions",
        rows,
        "Half of the concepts have labels alone, the other half captions: who uses both?",
        "UniCL uses labels and captions better than CLIP with labels as captions, and than cross entropy.",
        metrics={"subgroup by neighbours": "knn/top1"} | METRICS,
        tasks=("emoji(subset='test')", "emoji()", votes.format("test") + ")"),
        tune_tasks=("emoji(subset='val')", votes.format("val") + ")"),
        tune_metric="knn/top1",
    )
