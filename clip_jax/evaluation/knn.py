"""Classification of images by the labels of their nearest training images.

Metrics; `<name>` is the option `name`:

  <name>/top1: the share of test images whose class has the most votes of the k nearest training images.
  <name>/top5: the share of those whose class is among the five with the most votes; a class without a vote is not.
  <name>/majority_top1: the share of test images of the most frequent training class, which a constant answer gets.
  <name>/images, classes, skipped: numbers of test images, classes and unusable records.

Artefact: "confusion", named `<name>`.

Neighbours are those with the highest cosine. A neighbour votes with the weight `exp(cosine / temperature)`, and with
weight 1 where `temperature` is 0. Among classes with equal votes that of the nearer neighbour comes first, and among
equal cosines the training image with the lower number.

  k=20, temperature=0.07   the defaults, those of DINO (Caron et al. 2021; facebookresearch/dino, eval_knn.py), which
                           follows Wu et al. 2018
  k=1                      coyo-align (kakaobrain/coyo-align, evaluate/eval_knn.py): the label of the nearest image. The
                           column ImageNet of its table, ALIGN's B3 and B7 among others, is this accuracy of the
                           validation images

DINO compares the features of its backbone, coyo-align the embeddings: `features`, as in `clip_jax.evaluation.probe`.
"""

import numpy as np

from clip_jax.errors import UserError
from clip_jax.evaluation import train_test
from clip_jax.evaluation.embed import normalize
from clip_jax.evaluation.report.confusion import Confusion
from clip_jax.evaluation.report.headline import accuracy_table
from clip_jax.evaluation.results import EvalResult, by_name, named

_COLUMNS = {"top1": "top-1", "top5": "top-5", "majority_top1": "most frequent class"}
_MEANING = """<p class="notes"><b>Top-1</b>: the share of test images whose class has the most votes of the most similar
training images. <b>Top-5</b>: it is among the five classes with the most votes. <b>Most frequent class</b>:
the top-1 of always answering the most frequent class of the training images. <b>±</b>: the 95 % sampling error for
this number of images.</p>"""
_PAIRS_AT_ONCE = 2**24  # of neighbours of one image


def run(
    model,
    train,
    test,
    train_split="train",
    test_split="",
    k=20,
    temperature=0.07,
    features="embedding",
    name="knn",
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
      k: how many neighbours vote; at most all training images do.
      temperature: divides the cosines; 0: all votes count alike.
      features: "embedding" or "before_projection".
      name: prefix of the metrics.
      image: record field of the image.
      label: record field of the label.
      limit: at most this many images of each source, evenly spaced.

    Raises UserError as `train_test.parts_of` and `knn_task` do.
    """
    sets = dict(train=train, test=test, train_split=train_split, test_split=test_split, name=name)
    opened = train_test.open_sources(sets, image=image, label=label)
    return knn_task(model, **opened, k=k, temperature=temperature, features=features, name=name, limit=limit)


def knn_task(
    model, train, test, *, k=20, temperature=0.07, features="embedding", name="knn", limit=None, batch_size=256
):
    """Runs the task on opened sources.

    Args:
      batch_size: images per batch.

    For the other arguments see `run`. Raises UserError for another `k` or `temperature`, and as
    `train_test.embed_labelled` does.
    """
    from clip_jax.evaluation.baselines import majority

    _check(k, temperature, name)
    opened = {"train": train, "test": test}
    x, labels, names, skipped, concepts = train_test.embed_labelled(model, opened, features, name, limit, batch_size)
    top = classes_by_votes(x["train"], labels["train"], x["test"], k, temperature)
    hits = top[:, :5] == labels["test"][:, None]
    metrics = {
        "top1": hits[:, 0].mean(),
        "top5": hits.any(1).mean(),
        "majority_top1": majority(labels["test"], labels["train"]),
        "images": len(labels["test"]),
        "classes": labels["train"].max() + 1,
        "skipped": skipped,
    }
    result = EvalResult(named(name, metrics)).credit(__name__)
    result.keep(f"{name}/top1", hits[:, 0], concepts["test"])
    result.artefacts["confusion"][name] = Confusion(names, labels["test"], top[:, 0])
    return result


def classes_by_votes(x_train, labels_train, x_test, k, temperature):
    """Returns the classes of the k nearest training examples by their votes, best first, int32 `[n, k]`.

    A class stands once in a row; -1 fills the rest of the row.

    Args:
      x_train, x_test: features, float `[m, D]` and `[n, D]`.
      labels_train: int `[m]`.
      k: at most m; a larger k is cut to m.
      temperature: divides the cosines; 0: all votes count alike.
    """
    from clip_jax.evaluation.topk import top_k

    neighbours, cosines = top_k(normalize(x_test), normalize(x_train), k)
    labels, k = np.asarray(labels_train, np.int32)[neighbours], neighbours.shape[1]
    # Relative to the nearest neighbour, so that no temperature overflows.
    relative = (cosines - cosines[:, :1]).astype(np.float64)
    weights = np.exp(relative / temperature) if temperature else np.ones_like(relative)
    rows = max(_PAIRS_AT_ONCE // k**2, 1)
    return np.concatenate([_by_votes(labels[i : i + rows], weights[i : i + rows]) for i in range(0, len(labels), rows)])


def _by_votes(labels, weights):
    """Returns each label of a row once, by the sum of its weights, then by its first place; -1 fills the row."""
    same = labels[:, :, None] == labels[:, None, :]
    # A running sum adds in the order of the neighbours, so classes with equal weights have equal votes.
    votes = np.cumsum(same * weights[:, None, :], axis=2)[:, :, -1]
    first = ~np.tril(same, -1).any(2)
    order = np.argsort(np.where(first, -votes, 1.0), axis=1, kind="stable")
    return np.where(np.take_along_axis(first, order, 1), np.take_along_axis(labels, order, 1), -1).astype(np.int32)


def _check(k, temperature, task):
    if not (type(k) is int and k >= 1):
        raise UserError(f"{task}: k={k!r}: must be a whole number of at least 1")
    if not (isinstance(temperature, int | float) and temperature >= 0):
        raise UserError(f"{task}: temperature={temperature!r}: must be a number of at least 0")


def sources(options):
    """Returns each `(source, split)` that a run with these options opens; raises UserError for wrong options."""
    _check(options["k"], options["temperature"], options["name"])
    train_test.check_features(options["features"], options["name"])
    return list(train_test.parts_of(options).values())


check_source = train_test.check_source


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    return [f"{options['name']}/{key}" for key in (*_COLUMNS, "images", "classes", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    return f"<h3>Nearest neighbours</h3>{accuracy_table(by_name(metrics), _COLUMNS)}{_MEANING}"
