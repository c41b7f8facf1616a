"""Linear probe on the image features of labelled sources, by CLIP's protocol (`clip_jax.evaluation.linear_probe`).

Metrics; `<name>` is the option `name`:

  <name>/accuracy, val_accuracy: shares of test images and of validation images that the probe classifies correctly.
  <name>/l2: lambda, the strength of the regularisation, chosen by `val_accuracy`.
  <name>/majority_accuracy: the share of test images of the most frequent training class, which a constant answer gets.
  <name>/images, classes, skipped: numbers of test images, classes and unusable records.

Artefact: "confusion", named `<name>`.

Classes are those of the training source. Where the sources name their classes, labels are matched by name.

The features are those before the joint projection, not normalised (`Method.image_features`), as CLIP probes its ViTs
(Radford et al. 2021, appendix A.3). The example in CLIP's repository probes the output of the projection, not
normalised. `features="embedding"` are the unit vectors that the model compares with texts; CLIP probes no such.
"""

from clip_jax.evaluation import train_test
from clip_jax.evaluation.report.confusion import Confusion
from clip_jax.evaluation.report.headline import accuracy_table
from clip_jax.evaluation.results import EvalResult, by_name, named

_COLUMNS = {
    "accuracy": "accuracy",
    "val_accuracy": "validation accuracy",
    "majority_accuracy": "most frequent class",
    "l2": "L2 strength λ",
}
_MEANING = """<p class="notes"><b>Accuracy</b>: the share of test images that a linear classifier, trained on the frozen
image features, gets right. The strength λ of its regularisation was chosen by <b>validation accuracy</b>. <b>Most
frequent class</b>: the accuracy of always answering the most frequent class of the training images. <b>±</b>: the 95 %
sampling error for this number of images.</p>"""


def run(
    model,
    train,
    test,
    train_split="train",
    test_split="",
    val_split="",
    features="before_projection",
    name="probe",
    image="",
    label="",
    limit=None,
):
    """Runs the task on source strings.

    Args:
      train: labelled source of the training images (docs/data.md).
      test: labelled source of the test images.
      train_split: split of `train`.
      test_split: split of `test`; by default "test", or the only one.
      val_split: split of `train` with the validation images; by default they are a fifth of the training images.
      features: "before_projection" or "embedding".
      name: prefix of the metrics.
      image: record field of the image.
      label: record field of the label.
      limit: at most this many images of each source, evenly spaced.

    Raises UserError as `train_test.parts_of` and `probe_task` do.
    """
    sets = dict(train=train, test=test, train_split=train_split, test_split=test_split, val_split=val_split, name=name)
    return probe_task(
        model, **train_test.open_sources(sets, image=image, label=label), features=features, name=name, limit=limit
    )


def probe_task(model, train, test, *, val=None, features="before_projection", name="probe", limit=None, batch_size=256):
    """Runs the task on opened sources.

    Args:
      val: source of the validation images; by default a fifth of the training images.
      batch_size: images per batch.

    For the other arguments see `run`. Raises UserError as `train_test.embed_labelled` does.
    """
    from clip_jax.evaluation.baselines import majority
    from clip_jax.evaluation.linear_probe import linear_probe

    sources = {"train": train, "val": val, "test": test}
    sources = {part: source for part, source in sources.items() if source is not None}
    x, labels, names, skipped, _ = train_test.embed_labelled(model, sources, features, name, limit, batch_size)
    probe = linear_probe(
        x["train"], labels["train"], x["test"], labels["test"], x_val=x.get("val"), labels_val=labels.get("val")
    )
    metrics = {
        "accuracy": probe.accuracy,
        "val_accuracy": probe.val_accuracy,
        "l2": probe.l2,
        "majority_accuracy": majority(labels["test"], labels["train"]),
        "images": len(labels["test"]),
        "classes": labels["train"].max() + 1,
        "skipped": skipped,
    }
    result = EvalResult(named(name, metrics)).credit(__name__)
    result.artefacts["confusion"][name] = Confusion(names, labels["test"], probe.predictions)
    return result


def sources(options):
    """Returns each `(source, split)` that a run with these options opens; raises UserError for wrong options."""
    train_test.check_features(options["features"], options["name"])
    return list(train_test.parts_of(options).values())


check_source = train_test.check_source


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    return [f"{options['name']}/{key}" for key in (*_COLUMNS, "images", "classes", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    return f"<h3>Linear probe</h3>{accuracy_table(by_name(metrics), _COLUMNS, numbers=('l2',))}{_MEANING}"
