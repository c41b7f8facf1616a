"""What the tasks share that learn from labelled training images and are tested on others."""

import numpy as np

from clip_jax.data.records import check_labels, fingerprint
from clip_jax.data.sources.splits import evaluation_split
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import listed, match_classes
from clip_jax.evaluation.embed import embed, labels_of, open_source, unit_vectors

#: The option `features` of a task: the function of a model that computes them.
FEATURES = {"before_projection": "image_features", "embedding": "embed_image"}


def check_features(features, task):
    """Raises UserError, which names the task, unless `features` is a key of `FEATURES`."""
    if features not in tuple(FEATURES):
        raise UserError(f"{task}: features={features!r}: allowed are {', '.join(FEATURES)}")


def parts_of(options):
    """Returns `{part: (source string, split)}`: "train", "val" if the options have a `val_split`, and "test".

    Args:
      options: `train`, `test`, `train_split`, `test_split` and `name` of a task, with or without `val_split`. An empty
        `test_split` is "test", or the only one.

    Raises UserError when the test set is the training set and no split of it is named, and when the validation set is
    the training set or the test set.
    """
    found = {"train": (options["train"], options["train_split"])}
    if options.get("val_split"):
        found["val"] = (options["train"], options["val_split"])
    found["test"] = (options["test"], options["test_split"] or evaluation_split(options["test"]))
    if not options["test_split"] and found["test"] == found["train"]:
        raise _same_data(options)
    for part, meaning in (("train", "training"), ("test", "test")):
        if found.get("val") == found[part]:
            given = f"{options['name']}: val_split={options['val_split']!r}"
            raise UserError(f"{given}: the validation set is the {meaning} set")
    return found


def _same_data(options):
    test, split = options["test"], evaluation_split(options["test"])
    return UserError(
        f"{options['name']}: the test set, {test} with the split {split!r}, is the training set; give other data, "
        "or name a split of it, test_split=..."
    )


def check_source(source, options):
    """Raises UserError when an opened source has several labels of one image, or labels that may mean several classes.

    `options` are those of a task, whose name the message gives.
    """
    check_labels(source, options["name"])


def open_sources(options, **fields):
    """Returns `{part: opened source}` of `parts_of`; raises UserError as it does, also for equal data under two names.

    Args:
      options: as for `parts_of`.
      fields: names of record fields (`embed.open_source`).
    """
    opened = {part: open_source(*which, **fields) for part, which in parts_of(options).items()}
    if not options["test_split"] and fingerprint(opened["train"]) == fingerprint(opened["test"]):
        raise _same_data(options)
    return opened


def embed_labelled(model, sources, features, task, limit=None, batch_size=256):
    """Returns `(features, labels, class names, skipped, concepts)` of labelled sources.

    Args:
      model: as `clip_jax.evaluation.embed` describes it.
      sources: `{part: opened source}`. The first part is the training set, whose classes count.
      features: a key of `FEATURES`. An embedding of several vectors counts as their normalised mean.
      task: the task, for messages.
      limit: at most this many images of each source, evenly spaced.
      batch_size: images per batch.

    Returns: float32 `[n, D]` and int32 `[n]` of each part, a name of each class, which is its number in the source
    where that names none, the number of unusable records, and `Embedded.concepts` of each part. Classes are counted
    from 0, in the order of the training set's, those alone that have training images. Embeddings are unit rows;
    features before the projection are not normalised.

    Raises UserError for another `features`, a model without them, records without a label or with several, sources
    without a usable image, and classes that the training images lack.
    """
    check_features(features, task)
    for source in sources.values():
        check_labels(source, task)
    if not hasattr(model, FEATURES[features]):
        raise UserError(f"{task}: the model has no {FEATURES[features]}; features='embedding' needs none")
    parts = {part: embed(model, [source], batch_size, limit, FEATURES[features]) for part, source in sources.items()}
    x = {part: unit_vectors(e.z) if features == "embedding" else e.z for part, e in parts.items()}
    labels = {part: labels_of(embedded, sources[part], task) for part, embedded in parts.items()}
    train, *others = sources
    for part in others:
        labels[part] = _training_labels(labels[part], sources[part], labels[train], sources[train], task)
    classes = np.unique(labels[train])  # the numbers of a source may leave out any
    labels = {part: np.searchsorted(classes, numbers).astype(np.int32) for part, numbers in labels.items()}
    named = sources[train].class_names
    names = [str(i) if named is None else named[i] for i in classes]
    skipped, concepts = sum(e.skipped for e in parts.values()), {part: e.concepts for part, e in parts.items()}
    return x, labels, names, skipped, concepts


def _training_labels(labels, source, train_labels, train, task):
    """Returns the labels of a source as labels of the training source, int32 `[n]`; classes are matched by name."""
    if (source.class_names is None) != (train.class_names is None):
        named, other = (source, train) if train.class_names is None else (train, source)
        raise UserError(
            f"{task}: {named.name} names its classes ({listed(named.class_names)}) and {other.name} numbers them; "
            "both must do the same"
        )
    names = train.class_names
    found = labels
    if names is not None and list(names) != list(source.class_names):
        known = match_classes(source.class_names, names)
        number = {name: i for i, name in enumerate(names)}
        found = np.asarray([number.get(known.get(name), -1) for name in source.class_names], np.int32)[labels]
    if missing := np.unique(labels[~np.isin(found, train_labels)]).tolist():
        classes = [source.class_names[i] for i in missing] if names is not None else missing
        raise UserError(f"{task}: {train.name} has no image of {source.name}'s classes {listed(classes)}")
    return found
