"""Zero-shot classification of a labelled source.

Metrics, shares in [0, 1]; `<name>` is the option `name`:

  <name>/top1, top5: the right class is the most similar one, or among the five most similar ones.
  <name>/mean_per_class: top-1 averaged over the classes that have images.
  <name>/chance_top1, chance_top5: what a random choice reaches.
  <name>/majority_top1: the share of the most frequent class, which a constant answer reaches.
  <name>/F@K, chance_F@K: with the option `flat_hit`, for each of its K, in place of all metrics above: the flat hit at
    K, the share of images of which at least one label is among the K most similar classes (OTTER, Wu et al. 2022). It
    is the top-K accuracy where each image has one label.
  <name>/images, classes, skipped: numbers of images, classes and unusable records.

Artefacts: "classification", "confusion" (without `flat_hit`), "similarity", "alignment" (methods that compare patches
with words) and "map", named `<name>`.
"""

import numpy as np

from clip_jax.data.records import hash64
from clip_jax.errors import UserError
from clip_jax.evaluation.class_names import names_of
from clip_jax.evaluation.embed import embed, label_sets, labels_of, open_source
from clip_jax.evaluation.prompts import class_prompts, load_templates, resolve_duplicates
from clip_jax.evaluation.report.confusion import Confusion
from clip_jax.evaluation.report.embedding_map import make_map
from clip_jax.evaluation.report.figures import add_similarity
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.report.headline import accuracy_table
from clip_jax.evaluation.results import EvalResult, by_name, named

COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "chance_top1": "chance top-1",
    "chance_top5": "chance top-5",
    "majority_top1": "most frequent class",
}
_MEANING = """<p class="notes"><b>Top-1</b>: the share of images whose right class name is the most similar of all.
<b>Top-5</b>: it is among the five most similar. <b>Mean per class</b>: top-1 of each class, averaged, so that every
class counts alike. <b>F@K</b>: the share of images of which at least one label is among the K most similar.
<b>Chance</b>: a random choice. <b>Most frequent class</b>: the accuracy of always answering the most frequent class.
<b>±</b>: the 95 % sampling error for this number of images.</p>"""


def run(
    model,
    source,
    split="",
    classes=None,
    templates="simple",
    name="zeroshot",
    duplicates="error",
    canonical=False,
    label="",
    image="",
    limit=None,
    flat_hit=(),
):
    """Runs the task on a source string.

    Args:
      source: a labelled source (docs/data.md).
      split: its split; by default "test", or the only one.
      classes: class names: "imagenet", a file with one name per line, or a list; they are matched with the classes that
        the source names, and stand by label where it names none. Or pairs of the source's class and its name: a dict,
        or a file with lines "class<TAB>name". By default the source's own names.
      templates: prompts: the name of a set, a file, or a list (`prompts.load_templates`).
      name: prefix of the metrics.
      duplicates: "error", "merge" or "keep" (`prompts.resolve_duplicates`).
      canonical: bring prompts to SigLIP's canonical form.
      label: record field of the label.
      image: record field of the image.
      limit: at most this many images, evenly spaced.
      flat_hit: the K of F@K, an integer or several, such as (1, 5, 10). Empty: the accuracies, for which every image
        has one label.
    """
    data = open_source(source, split, image=image, label=label)
    options = dict(name=name, duplicates=duplicates, canonical=canonical, limit=limit, flat_hit=flat_hit)
    return zeroshot_task(model, data, classes, templates, **options)


def zeroshot_task(
    model,
    source,
    class_names=None,
    templates=("{}",),
    *,
    name="zeroshot",
    duplicates="error",
    canonical=False,
    average=None,
    limit=None,
    flat_hit=(),
    batch_size=256,
):
    """Runs the task on an opened source.

    Args:
      class_names: as `classes` of `run` (`class_names.names_of`).
      average: over a class's prompts: "embeddings" or "scores" (`classifier.make_classifier`).
      batch_size: images per batch.

    For the other arguments see `run`.

    Raises UserError for class names that are missing, duplicate or differ from the source's classes, records without a
    label, several labels of one image without `flat_hit`, labels without a name, and when no image is usable.
    """
    from clip_jax.evaluation.classifier import make_classifier

    flat_hit = _check_labels(source, flat_hit, name)
    class_names = names_of(source, class_names, name)
    forms = _forms(model, class_names, templates, canonical) if duplicates != "keep" else None
    class_names, class_of_label = resolve_duplicates(class_names, duplicates, forms)
    classifier = make_classifier(model, class_names, templates, canonical=canonical, average=average)
    embedded = embed(model, [source], batch_size, limit)
    read_labels = label_sets if flat_hit else labels_of
    sets = read_labels(embedded, source, name, len(class_of_label)).reshape(len(embedded.z), -1)
    sets = np.where(sets >= 0, np.asarray(class_of_label, np.int32)[sets], -1)
    labels = sets[:, 0]  # the only ones, or the first ones, by which the figures are sorted
    top, scores = classifier.top(embedded.z, max((5, *flat_hit)))
    metrics = _flat_hits(top, sets, len(class_names), flat_hit) or accuracies(top, labels, len(class_names))
    metrics |= {"images": len(labels), "classes": len(class_names), "skipped": embedded.skipped}
    result = EvalResult(named(name, metrics)).credit(__name__)
    if not flat_hit:
        from clip_jax.evaluation.classifier import hits

        for k in (1, 5):
            result.keep(f"{name}/top{k}", hits(top, labels, k), embedded.concepts)
    groups = [class_names[i] for i in labels]
    shown = (labels if sets.shape[1] == 1 else sets), top[:, :5], scores[:, :5]
    if not flat_hit:
        result.artefacts["confusion"][name] = Confusion(class_names, labels, top[:, 0])
    result.artefacts["classification"][name] = Classification(class_names, *shown, embedded.images, groups)
    prompts = class_prompts(class_names, load_templates(templates)[:1], canonical)
    z_text = np.asarray(model.embed_text(prompts))
    add_similarity(result, name, model, embedded, labels, class_names, z_text, prompts)
    result.artefacts["map"][name] = make_map(embedded, labels, class_names, z_text, groups)
    return result


def _check_values(flat_hit, task):
    """Returns the values of `flat_hit` as a tuple; raises UserError for a value that is no positive integer."""
    values = flat_hit if isinstance(flat_hit, list | tuple) else (flat_hit,)
    if not all(type(k) is int and k >= 1 for k in values):
        raise UserError(f"{task}: flat_hit={flat_hit!r}; allowed: integers from 1 on, such as (1, 5, 10)")
    return tuple(dict.fromkeys(values))


def _check_labels(source, flat_hit, task):
    """Returns the values of `flat_hit` as a tuple; raises UserError where they or the source's labels do not fit."""
    values = _check_values(flat_hit, task)
    if not values and getattr(source, "multi_label", False):
        raise UserError(
            f"{task}: {source.name} has several labels of one image, but top-1 accuracy needs one label; for the flat "
            "hit at K, which takes several, set flat_hit=(1, 5, 10)"
        )
    return values


def accuracies(top, labels, classes):
    """Returns the metrics of images with one label each; `top` int `[n, K]`, `labels` int `[n]`."""
    from clip_jax.evaluation.baselines import chance, majority
    from clip_jax.evaluation.classifier import accuracy, per_class_accuracy

    return {
        "top1": accuracy(top, labels, 1),
        "top5": accuracy(top, labels, 5),
        "mean_per_class": np.nanmean(per_class_accuracy(top, labels, classes)),
        "chance_top1": chance(classes, 1),
        "chance_top5": chance(classes, 5),
        "majority_top1": majority(labels, labels),
    }


def _flat_hits(top, sets, classes, flat_hit):
    """Returns the metrics of images with sets of labels; `top` int `[n, K]`, `sets` int `[n, L]`, -1 for padding."""
    from clip_jax.evaluation.baselines import chance
    from clip_jax.evaluation.classifier import flat_hit_at

    found = {f"F@{k}": flat_hit_at(top, sets, k) for k in flat_hit}
    sizes = [len(set(labels) - {-1}) for labels in sets.tolist()]
    return found | {f"chance_F@{k}": np.mean([chance(classes, k, size) for size in sizes]) for k in flat_hit}


def _forms(model, class_names, templates, canonical):
    """Returns what the model reads of each class name: its first prompt, or the token ids of that."""
    prompts = class_prompts(class_names, load_templates(templates)[:1], canonical)
    if not hasattr(model, "token_ids"):
        return prompts
    blocks = (model.token_ids(prompts[start : start + 256]) for start in range(0, len(prompts), 256))
    return [hash64(np.asarray(row).tobytes()) for block in blocks for row in block]


def sources(options):
    """Returns the `(source, split)` that a run with these options opens; raises UserError for wrong options."""
    load_templates(options["templates"])
    resolve_duplicates([], options["duplicates"])
    return [(options["source"], options["split"])]


def check_source(source, options):
    """Raises UserError when an opened source does not fit the class names, or its labels not `flat_hit`."""
    _check_labels(source, options["flat_hit"], options["name"])
    names_of(source, options["classes"], options["name"])


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    values = _check_values(options["flat_hit"], options["name"])
    keys = [f"{prefix}F@{k}" for k in values for prefix in ("", "chance_")] or COLUMNS
    return [f"{options['name']}/{key}" for key in (*keys, "images", "classes", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    with_columns = {}
    for name, m in by_name(metrics).items():
        columns = {k: k.replace("chance_", "chance ") for k in m if "F@" in k} or COLUMNS
        with_columns.setdefault(tuple(columns.items()), {})[name] = m
    tables = "".join(accuracy_table(results, dict(columns)) for columns, results in with_columns.items())
    return f"<h3>Zero-shot classification</h3>{tables}{_MEANING}"
