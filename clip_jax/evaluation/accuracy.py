"""Classification by the classes that a model was trained on (`clip_jax/methods/classify.py`).

The metrics are those of the task `zeroshot` under the option `name`: top1, top5, mean_per_class, chance_top1,
chance_top5, majority_top1, images, classes, skipped.

Classes of the source are matched with those of the model by name. A source with a part of the classes is evaluated
among that part, as Wortsman et al. (2022) evaluate on ImageNet-A and ImageNet-R.

Artefacts: "classification" and "confusion" named `<name>`.
"""

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import listed, match_classes, names_of
from clip_jax.evaluation.embed import embed, labels_of, open_source
from clip_jax.evaluation.report.confusion import Confusion
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.report.headline import accuracy_table
from clip_jax.evaluation.results import EvalResult, by_name, named
from clip_jax.evaluation.zeroshot import COLUMNS, accuracies

_MEANING = """<p class="notes"><b>Top-1</b>: the share of images whose right class has the highest score of the trained
classifier. <b>Mean per class</b>: top-1 of each class, averaged. <b>Chance</b>: a random choice. <b>Most
frequent class</b>: the accuracy of always answering the most frequent class. <b>±</b>: the 95 % sampling error for this
number of images.</p>"""


def run(model, source, split="", classes=None, name="accuracy", label="", image="", limit=None):
    """Runs the task on a source string.

    Args:
      source: a labelled source (docs/data.md).
      split: its split; by default "test", or the only one.
      classes: names of its classes, as for the task `zeroshot`; by default its own.
      name: prefix of the metrics.
      label: record field of the label.
      image: record field of the image.
      limit: at most this many images, evenly spaced.
    """
    data = open_source(source, split, image=image, label=label)
    return accuracy_task(model, data, classes, name=name, limit=limit)


def accuracy_task(model, source, class_names=None, *, name="accuracy", limit=None, batch_size=256):
    """Runs the task on an opened source; the arguments are those of `run`.

    Raises UserError for a model that was not trained on classes, classes that it does not have, records without a
    label, several labels of one image, and when no image is usable.
    """
    import jax

    if not getattr(model, "class_names", ()):
        raise UserError(f"{name}: the model was not trained on classes; zeroshot(source=...) takes any class names")
    chosen = _chosen(model, source, class_names, name)
    names = [model.class_names[i] for i in chosen]
    embedded = embed(model, [source], batch_size, limit)
    labels = labels_of(embedded, source, name, len(names))
    scores, top = jax.lax.top_k(model.class_logits(embedded.z)[:, chosen], min(5, len(names)))
    scores, top = np.asarray(scores), np.asarray(top)
    metrics = accuracies(top, labels, len(names))
    metrics |= {"images": len(labels), "classes": len(names), "skipped": embedded.skipped}
    result = EvalResult(named(name, metrics)).credit(__name__)
    groups = [names[i] for i in labels]
    result.artefacts["confusion"][name] = Confusion(names, labels, top[:, 0])
    result.artefacts["classification"][name] = Classification(names, labels, top, scores, embedded.images, groups)
    return result


def _chosen(model, source, class_names, task):
    """Returns the model's class of each class of a source, int `[classes]`; raises UserError for one it lacks."""
    names, known = names_of(source, class_names, task), list(model.class_names)
    if names == known:
        return np.arange(len(known))
    pairs = match_classes(names, known)
    if missing := [name for name in names if name not in pairs]:
        raise UserError(
            f"{task}: the model was trained on {len(known)} classes ({listed(known)}), not on {listed(missing)} of "
            f"{source.name}"
        )
    return np.asarray([known.index(pairs[name]) for name in names])


def sources(options):
    """Returns the `(source, split)` that a run with these options opens."""
    return [(options["source"], options["split"])]


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    return [f"{options['name']}/{key}" for key in (*COLUMNS, "images", "classes", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    return f"<h3>Classification</h3>{accuracy_table(by_name(metrics), COLUMNS)}{_MEANING}"
