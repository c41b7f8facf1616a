"""Linear probe on the image embeddings of labelled sources.

Metrics; `<name>` is the option `name`:

  <name>/accuracy, val_accuracy: shares of test images and of validation images that the probe classifies correctly.
  <name>/l2: strength of the regularisation, chosen by `val_accuracy`.
  <name>/images, classes, skipped: numbers of test images, classes and unusable records.

Classes are those of the training source. Where the sources name their classes, labels are matched by name.
"""

import numpy as np

from clip_jax.data.records import check_labels
from clip_jax.data.sources.splits import evaluation_split
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import listed, match_classes
from clip_jax.evaluation.embed import embed, labels_of, open_source, unit_vectors
from clip_jax.evaluation.report.headline import accuracy_table
from clip_jax.evaluation.results import EvalResult, by_name, named

_COLUMNS = {"accuracy": "accuracy", "val_accuracy": "validation accuracy", "l2": "L2 strength"}
_MEANING = """<p class="notes"><b>Accuracy</b>: the share of test images that a linear classifier, trained on the frozen
image embeddings, gets right. The strength of its regularisation was chosen by <b>validation accuracy</b>. <b>±</b>: the
95 % sampling error for this number of images.</p>"""


def run(model, train, test, train_split="train", test_split="", name="probe", image="", label="", limit=None):
    """Runs the task on source strings.

    Args:
      train: labelled source of the training images (docs/data.md).
      test: labelled source of the test images.
      train_split: split of `train`.
      test_split: split of `test`; by default "test", or the only one.
      name: prefix of the metrics.
      image: record field of the image.
      label: record field of the label.
      limit: at most this many images of each source, evenly spaced.

    Raises UserError when `test` is the training set because no split is named and there is only one.
    """
    if test == train and not test_split and evaluation_split(test) == train_split:
        raise UserError(f"{name}: {test} has the split {train_split!r} alone, so the test set is the training set")
    fields = dict(image=image, label=label)
    sources = open_source(train, train_split, **fields), open_source(test, test_split, **fields)
    return probe_task(model, *sources, name=name, limit=limit)


def probe_task(model, train, test, *, val=None, name="probe", limit=None, batch_size=256):
    """Runs the task on opened sources.

    Args:
      val: source of the validation images; by default a fifth of the training images.

    For the other arguments see `run`. Raises UserError for records without a label, sources without a usable image, and
    classes of the test or validation images that the training images lack.
    """
    from clip_jax.evaluation.linear_probe import linear_probe

    sources = {"train": train, "val": val, "test": test}
    parts = {part: embed(model, [source], batch_size, limit) for part, source in sources.items() if source is not None}
    z = {part: unit_vectors(embedded.z) for part, embedded in parts.items()}
    labels = {part: labels_of(embedded, sources[part], name) for part, embedded in parts.items()}
    for part in list(parts)[1:]:
        labels[part] = _training_labels(labels[part], sources[part], labels["train"], train, name)
    probe = linear_probe(
        z["train"], labels["train"], z["test"], labels["test"], z_val=z.get("val"), labels_val=labels.get("val")
    )
    metrics = {
        "accuracy": probe.accuracy,
        "val_accuracy": probe.val_accuracy,
        "l2": probe.l2,
        "images": len(labels["test"]),
        "classes": max(int(part.max()) for part in labels.values()) + 1,
        "skipped": sum(embedded.skipped for embedded in parts.values()),
    }
    return EvalResult(named(name, metrics)).credit(__name__)


def _training_labels(labels, source, train_labels, train, task):
    """Returns the labels of a source as labels of the training source, int32 `[n]`; classes are matched by name."""
    check_labels(source)
    check_labels(train)
    if (source.class_names is None) != (train.class_names is None):
        named, other = (source, train) if train.class_names is None else (train, source)
        raise UserError(
            f"{task}: {named.name} names its classes ({listed(named.class_names)}) and {other.name} numbers them; "
            "both must do the same"
        )
    names = train.class_names
    if names is not None:
        known = match_classes(source.class_names, names)
        number = {name: i for i, name in enumerate(names)}
        table = np.asarray([number.get(known.get(name), -1) for name in source.class_names], np.int32)
    else:
        table = np.arange(labels.max() + 1, dtype=np.int32)
    if missing := [i for i in np.unique(labels).tolist() if table[i] not in train_labels]:
        classes = [source.class_names[i] for i in missing] if names is not None else missing
        raise UserError(f"{task}: {train.name} has no image of {source.name}'s classes {listed(classes)}")
    return table[labels]


def sources(options):
    """Returns each `(source, split)` that a run with these options opens."""
    return [(options["train"], options["train_split"]), (options["test"], options["test_split"])]


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    return [f"{options['name']}/{key}" for key in (*_COLUMNS, "images", "classes", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    return f"<h3>Linear probe</h3>{accuracy_table(by_name(metrics), _COLUMNS, numbers=('l2',))}{_MEANING}"
