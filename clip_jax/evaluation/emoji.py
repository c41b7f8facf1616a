"""The protocol of the embedded emoji set: {seen, unseen concepts} x {seen, unseen vendor} (docs/evaluation.md).

Metrics, shares in [0, 1], are named `<prefix>/<cell>/...`. `<prefix>` is "emoji", or "emoji_val", "emoji_test" for
those subsets of the unseen concepts, followed by the language of the names unless it is English: "emoji_ko",
"emoji_val_ko". `<cell>` is {seen,unseen}_concept_{seen,unseen}_vendor.

  top1, top5: 1-of-N over all concepts of the cell's side; N is the number of all seen, or all unseen, concepts.
  top1_without_flags_clocks_keycaps, top5_...: the same N classes, fewer images.
  top1_without_compositions, top5_...: further without man or woman x role and families.
  chance_top1, chance_top5, classes, images, images_without_flags_clocks_keycaps, images_without_compositions.
  pixel_1nn_top1, pixel_1nn_top5, and the same with _without_...: the nearest training image at 16 x 16 pixels. Only for
    seen concepts, as there is no training image of an unseen one. A training image is not its own neighbour.
  image_to_text_R@1, R@5, R@10, text_to_image_R@...: only for unseen concepts, the cell's images against their names.

`<prefix>/skipped` counts unusable records. A model that was trained on the embedded emoji has seen the images of
seen_concept_seen_vendor, so that cell measures its memory. `<prefix>/trained_on_emoji` is 1 for such a model and 0 for
another one, by the names in its `data.source`: copies of the images are not known. It is missing where the training
data is not known.

Artefacts: "classification", and for unseen concepts "retrieval", "similarity" and "alignment" (methods that compare
patches with words), named `<prefix>/<cell>`; "map" named `<prefix>/unseen_concept`, the images of all vendors together.
"""

import functools
import re

import numpy as np

from clip_jax.data.decode import decode_image
from clip_jax.data.sources import make_source
from clip_jax.data.sources.spec import parse
from clip_jax.errors import UserError, did_you_mean
from clip_jax.evaluation.embed import all_images, embed, join, read
from clip_jax.evaluation.prompts import class_prompts, load_templates
from clip_jax.evaluation.report.embedding_map import make_map
from clip_jax.evaluation.report.figures import Retrieval, add_similarity
from clip_jax.evaluation.report.galleries import Classification
from clip_jax.evaluation.report.headline import RECALL_MEANING, recall_table, sampling_error
from clip_jax.evaluation.report.page import escaped, number, percent, table
from clip_jax.evaluation.results import EvalResult, by_name

CELLS = [("seen", "seen"), ("seen", "unseen"), ("unseen", "seen"), ("unseen", "unseen")]  # (concept, vendor)
_PREFIX = re.compile(r"emoji(?:_(val|test))?(?:_([\w-]+))?")
_MEANINGS = {
    ("seen", "seen"): "The model was trained on these images: the number shows what it memorised, not what it learnt.",
    ("seen", "unseen"): "Known things in a new drawing style. Vendors draw much alike, so nearest pixels do well, too.",
    ("unseen", "seen"): "Things that never occurred in training, drawn in known styles.",
    ("unseen", "unseen"): "Neither the thing nor the drawing style occurred in training: the most informative number.",
}
_NOT_TRAINED = "The model's data.source does not name the emoji set: “seen” and “unseen” are only names of its parts."
_NOTES = """<ul class="notes">
<li><b>Top-1</b>: the share of images whose right name is the most similar of all the names. <b>Top-5</b>: it is among
the five most similar.</li>
<li><b>Chance</b>: what a random choice of names would reach.</li>
<li><b>Nearest in pixels</b>: the name of the training image that looks most alike at 16 × 16 pixels (never the image
itself). It needs no learning, and cannot know an unseen concept.</li>
<li><b>±</b>: the 95 % sampling error of top-1 for this number of independent images. Several vendors' images of one
thing are not fully independent.</li></ul>"""
_KINDS = {
    "": "all images",
    "_without_flags_clocks_keycaps": "without flags, clock faces, keycaps",
    "_without_compositions": "also without man or woman + role, families",
}
_KINDS_NOTE = """<p>Some unseen names are composed of parts that training has seen (“flag: …”, clock faces, “woman” +
occupation). These are the same numbers without such images; all names stay to choose from.</p>"""


def run(model, subset="all", templates=("{}",), language="en"):
    """Runs the task on the embedded set.

    Args:
      subset: of the unseen concepts: "all", or "val" and "test", which are cheaper and leave out the seen cells.
      templates: prompts (`prompts.load_templates`); retrieval uses only the first one.
      language: of the names, such as "ko".
    """
    return emoji_task(model, subset, language, templates=templates)


def emoji_task(
    model,
    subset="all",
    language="en",
    *,
    templates=("{}",),
    canonical=False,
    seen_images=2048,
    batch_size=256,
    open_split=None,
):
    """Runs the task on opened splits.

    Args:
      canonical: bring prompts to SigLIP's canonical form.
      seen_images: size of the evenly spaced sample of training images for the cell seen_concept_seen_vendor; None: all.
      batch_size: images per batch.
      open_split: split name -> source with the fields of the emoji set; by default the embedded set's own splits.

    For the other arguments see `run`. Raises UserError for an unknown subset or language.
    """
    from clip_jax.evaluation.classifier import make_classifier
    from clip_jax.evaluation.recall import model_recall

    open_split = open_split or functools.partial(make_source, "emoji")
    prefix, parts = _prefix(subset, language), ("val", "test") if subset == "all" else (subset,)
    field = "name" if language == "en" else "name_" + language.replace("-", "_")
    result = EvalResult({})
    unseen = {
        v: embed(model, [open_split(f"{part}_{v}_vendor") for part in parts], batch_size) for v in ("seen", "unseen")
    }
    both = join(*unseen.values())
    _check_language(both.records, field, language)
    names = sorted({record[field] for record in both.records})
    classifier = make_classifier(model, names, templates, canonical=canonical)
    prompts = class_prompts(names, load_templates(templates)[:1], canonical)
    z_text = np.asarray(model.embed_text(prompts))
    for vendor, embedded in unseen.items():
        cell = f"{prefix}/unseen_concept_{vendor}_vendor"
        labels = _add_cell(result, cell, classifier, names, field, embedded)
        present = np.unique(labels)
        found = model_recall(model, embedded.z, z_text[present], labels, present)
        result.metrics |= {f"{cell}/{key}": value for key, value in found.metrics.items()}
        texts, best = [names[i] for i in present], (found.image_to_text, found.text_to_image)
        result.artefacts["retrieval"][cell] = Retrieval(texts, labels, present, *best, embedded.images)
        add_similarity(result, cell, model, embedded, labels, names, z_text, prompts)
    groups, labels = [record["group"] for record in both.records], _labels(both.records, names, field)
    result.artefacts["map"][f"{prefix}/unseen_concept"] = make_map(both, labels, names, z_text, groups)
    skipped = both.skipped

    if subset == "all":
        train, other = open_split("train"), open_split("train_unseen_vendor")
        seen = {"seen": embed(model, [train], batch_size, seen_images), "unseen": embed(model, [other], batch_size)}
        make = functools.partial(make_classifier, model, templates=templates, canonical=canonical)
        _add_seen_cells(result, prefix, make, field, train, seen)
        skipped += seen["seen"].skipped + seen["unseen"].skipped
    result.metrics[f"{prefix}/skipped"] = float(skipped)
    if (source := trained_on(model)) is not None:
        result.metrics[f"{prefix}/trained_on_emoji"] = float(any(p.base in ("emoji", "scenes") for p in parse(source)))
    return result.credit(__name__)


def trained_on(model):
    """Returns the source string of a model's training data, None where it is not known."""
    return getattr(getattr(getattr(model, "config", None), "data", None), "source", "").strip() or None


def _prefix(subset, language):
    """Returns the prefix of the metrics; raises UserError for an unknown subset."""
    if subset not in ("all", "val", "test"):
        raise UserError(f"emoji: subset={subset!r}; allowed: all, val, test")
    prefix = "emoji" if subset == "all" else f"emoji_{subset}"
    return prefix if language == "en" else f"{prefix}_{language}"


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    prefix, names = _prefix(options["subset"], options["language"]), []
    for concept, vendor in CELLS if options["subset"] == "all" else CELLS[2:]:
        tops = [f"top{k}{kind}" for kind in _KINDS for k in (1, 5)]
        keys = [*tops, "chance_top1", "chance_top5", "classes", *(f"images{kind}" for kind in _KINDS)]
        if concept == "seen":
            keys += [f"pixel_1nn_{key}" for key in tops]
        else:
            keys += [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        names += [f"{prefix}/{concept}_concept_{vendor}_vendor/{key}" for key in keys]
    return [*names, f"{prefix}/skipped", f"{prefix}/trained_on_emoji"]


def _check_language(records, field, language):
    if missing := [record for record in records if field not in record]:
        known = sorted(key.removeprefix("name_").replace("_", "-") for key in missing[0] if key.startswith("name_"))
        allowed = f"{did_you_mean(language, known)}; allowed: {', '.join(known) or 'en'}"
        raise UserError(f"emoji: language={language!r}: no such names{allowed}")


def _labels(records, names, field):
    label = {name: i for i, name in enumerate(names)}
    return np.asarray([label[record[field]] for record in records], np.int32)


def _add_cell(result, cell, classifier, names, field, embedded):
    """Adds the classification of a cell to `result`; returns the labels, int32 `[n]`. `field` holds a record's name."""
    from clip_jax.evaluation.baselines import chance
    from clip_jax.evaluation.classifier import hits

    labels = _labels(embedded.records, names, field)
    top, scores = classifier.top(embedded.z)
    vendors = [record["vendor"] for record in embedded.records]
    result.artefacts["classification"][cell] = Classification(names, labels, top, scores, embedded.images, vendors)
    kept = _kept(embedded.records)
    for kind, keep in kept.items():
        concepts = embedded.select(keep).concepts
        for k in (1, 5):
            result.keep(f"{cell}/top{k}{kind}", hits(top[keep], labels[keep], k), concepts)
    metrics = _accuracies(top, labels, kept) | {
        "chance_top1": chance(len(names), 1),
        "chance_top5": chance(len(names), 5),
        "classes": len(names),
        **{f"images{kind}": keep.sum() for kind, keep in kept.items()},
    }
    result.metrics |= {f"{cell}/{key}": float(value) for key, value in metrics.items()}
    return labels


def _add_seen_cells(result, prefix, make, field, train, seen):
    """Adds the cells of seen concepts and their pixel baseline to `result`.

    Args:
      make: names -> `Classifier`.
      train: source of the training images.
      seen: vendor -> `Embedded`.
    """
    from clip_jax.evaluation.baselines import nearest_classes

    references, records, rows = _pixels(all_images([train]))
    names = sorted({record[field] for record in records + seen["unseen"].records})
    classifier = make(names)
    reference_labels = _labels(records, names, field)
    reference_of = {int(row): i for i, row in enumerate(rows)}
    for vendor, embedded in seen.items():
        cell = f"{prefix}/seen_concept_{vendor}_vendor"
        labels = _add_cell(result, cell, classifier, names, field, embedded)
        queries, _, _ = _pixels(embedded.images)
        itself = [reference_of[int(i)] for _, i in embedded.images.where] if vendor == "seen" else None
        top = nearest_classes(references, reference_labels, queries, len(names), leave_out=itself)
        pixel = _accuracies(top, labels, _kept(embedded.records))
        result.metrics |= {f"{cell}/pixel_1nn_{key}": value for key, value in pixel.items()}


def _pixels(images):
    """Returns pixel features float32 `[n, F]` of the usable images, their records, and their indices in the source."""
    from clip_jax.evaluation.baselines import pixel_features

    features = []
    rows, records = [], []
    for batch_rows, batch_records, batch in read(images, lambda record: decode_image(record["image"]), 256):
        if batch:
            features.append(pixel_features(batch))
        rows += batch_rows
        records += batch_records
    return np.concatenate(features), records, images.where[rows, 1]


def _accuracies(top, labels, kept):
    from clip_jax.evaluation.classifier import accuracy

    metrics = {}
    for kind, keep in kept.items():
        for k in (1, 5):
            metrics[f"top{k}{kind}"] = accuracy(top[keep], labels[keep], k)
    return metrics


def _kept(records):
    """Returns `{kind: bool [records]}`: the records that each of `_KINDS` counts."""
    left_out = dict(zip(_KINDS, (lambda record: False, _is_sign, _is_composition), strict=True))
    return {kind: np.asarray([not test(record) for record in records], bool) for kind, test in left_out.items()}


def _is_sign(record):
    """Returns whether it is a flag, clock face or keycap: symbols composed of parts that recur in others."""
    is_clock = record["subgroup"] == "time" and re.search(r"o.clock$|-thirty$", record["name"])
    return record["group"] == "flags" or record["subgroup"] == "keycap" or bool(is_clock)


def _is_composition(record):
    """Returns whether it is a sign, man or woman x role, or a family."""
    words = re.findall(r"\w+", record["name"])
    is_gendered = len(words) > 1 and bool({"man", "woman", "men", "women"} & set(words))
    is_family = record["subgroup"] == "family" or words[0] == "family"
    return _is_sign(record) or is_family or (record["subgroup"].startswith("person") and is_gendered)


# --- the terminal and the report ---


def summary(metrics):
    """Yields a table with a row for each cell."""
    for prefix, cells in _cells_by_prefix(metrics).items():
        yield (
            f"{prefix} zero-shot      top-1   top-5   chance  pixel 1-NN   R@10 i2t/t2i"
            "   top-1 without compositions   pictures x classes"
        )
        for (concept, vendor), m in cells.items():
            pixel = f"{m['pixel_1nn_top1']:8.1%}" if "pixel_1nn_top1" in m else "       -"
            recalls = [f"{m[f'{d}_R@10']:.1%}" for d in ("image_to_text", "text_to_image") if f"{d}_R@10" in m]
            yield (
                f"  {concept + ' concept,':16}{vendor + ' vendor':14}{m['top1']:6.1%}  {m['top5']:6.1%}"
                f"  {m['chance_top1']:6.2%}  {pixel}   {' / '.join(recalls) or '-':>13}"
                f"   {m['top1_without_compositions']:8.1%}   {m['images']:.0f} x {m['classes']:.0f}"
            )
        if not metrics.get(f"{prefix}/trained_on_emoji", 1):
            yield "  (data.source does not name the emoji set: only copies in it show the model these pictures)"
        elif ("seen", "seen") in cells:
            yield "  (the pictures of seen concepts from seen vendors were trained on)"


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    results, blocks = by_name(metrics), []
    for prefix, cells in _cells_by_prefix(metrics).items():
        subset, language = _PREFIX.fullmatch(prefix).groups()
        concepts = {"val": " (validation concepts)", "test": " (test concepts)", None: ""}[subset]
        title = f"Naming emoji{concepts}" + (f", names in {escaped(language)}" if language else "")
        blocks.append(f"<h3>{title}</h3>{_headline(cells, results.get(prefix, {}))}")
    return "".join(blocks)


def panel(name):
    """Returns `(place, title)` of a cell, the most telling cell first; None for other names."""
    match = re.fullmatch(r"(.+)/(seen|unseen)_concept(?:_(seen|unseen)_vendor)?", name)
    prefix = match and _PREFIX.fullmatch(match[1])
    if not prefix:
        return None
    place = len(CELLS) - CELLS.index(match.groups()[1:]) if match[3] else 0
    subset = {"val": " (validation)", "test": " (test)", None: ""}[prefix[1]]
    return place, name if prefix[2] else f"{_title(match[2], match[3])}{subset}"


def _cells_by_prefix(metrics):
    """Returns `{prefix: {(concept, vendor): metrics of the cell}}`."""
    results = by_name(metrics)
    found = {}
    for prefix in dict.fromkeys(name.partition("/")[0] for name in results):
        for concept, vendor in CELLS:
            if "top1" in results.get(name := f"{prefix}/{concept}_concept_{vendor}_vendor", {}):
                found.setdefault(prefix, {})[concept, vendor] = results[name]
    return found


def _title(concept, vendor=None):
    vendors = {"seen": ", seen vendors", "unseen": ", unseen vendor", None: ""}[vendor]
    return f"{concept.capitalize()} concepts{vendors}"


def _headline(cells, about):
    """Returns the numbers of a subset as HTML; `about` are the metrics that are of no cell."""
    skipped, is_trained = about.get("skipped", 0), about.get("trained_on_emoji", 1)
    cards = "".join(_card(cell, m, _MEANINGS[cell] if is_trained else _NOT_TRAINED) for cell, m in cells.items())
    left_out = f"<p>{number(skipped)} unusable records were left out.</p>" if skipped else ""
    rows = [[_title(*cell), *(_accuracy_without(m, kind) for kind in _KINDS)] for cell, m in cells.items()]
    kinds = table(["top-1 / top-5", *_KINDS.values()], rows, "wide")
    blocks = [f'<div class="cells">{cards}</div>', _NOTES, left_out]
    blocks += ["<h3>Without compositions</h3>", _KINDS_NOTE, kinds]
    if recalls := {_title(*cell): m for cell, m in cells.items() if "image_to_text_R@1" in m}:
        blocks += ["<h3>Retrieval among unseen concepts</h3>", recall_table(recalls), RECALL_MEANING]
    return "".join(blocks)


def _card(cell, m, meaning):
    rows = [
        (title, percent(m.get(f"{key}top1")), percent(m.get(f"{key}top5")))
        for title, key in (("model", ""), ("chance", "chance_"), ("nearest in pixels", "pixel_1nn_"))
    ]
    size = f"{number(m.get('images'))} images, {number(m.get('classes'))} names to choose from{sampling_error(m)}"
    return (
        f'<div class="cell"><h4>{_title(*cell)}</h4><p>{meaning}</p>{table(["", "top-1", "top-5"], rows)}'
        f'<p class="small">{size}</p></div>'
    )


def _accuracy_without(m, kind):
    count, pixel = m.get(f"images{kind}"), m.get(f"pixel_1nn_top1{kind}")
    if not count or f"top1{kind}" not in m:
        return "–"
    against = "" if pixel is None else f", pixels {percent(pixel)}"
    shares = f"<b>{percent(m[f'top1{kind}'])}</b> / {percent(m.get(f'top5{kind}'))}"
    return f'{shares}<span class="small">{number(count)} images{against}</span>'
