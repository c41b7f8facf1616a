"""Evaluation tasks: a model and sources of pictures in, a flat dict of metrics and the raw material of a report out.

    result = emoji_task(model)
    result.metrics["emoji/unseen_concept_unseen_vendor/top1"]
    result = merge_results([result, zeroshot_task(model, make_source("/data/pets"), templates="pets", name="pets")])

A model is anything with `embed_image(uint8 [n, size, size, 3])` and `embed_text(list[str])` that return float32 [n, ...], with
`similarity(image embeddings, text embeddings) -> [n, m]`, and with `image_view`; `clip_jax.inference.Model` is one. It may have
`text_similarity(text embeddings, image embeddings) -> [m, n]`, where that is not the transpose. On several hosts it also has `host_share`
and `embed_image_share`: each host reads and decodes its share of the pictures, and all have the same result.

Metrics (shares in [0, 1]; `<name>` is the argument `name` of a task; all keys are there after the task, unless a condition is named)

    zeroshot_task    <name>/top1, top5, mean_per_class (top-1 averaged over the classes that have pictures), chance_top1, chance_top5,
                     images, classes, skipped (unusable records)
    retrieval_task   <name>/image_to_text_R@1, R@5, R@10, text_to_image_R@1, R@5, R@10, images, texts, skipped
    probe_task       <name>/accuracy, val_accuracy, l2 (the chosen strength), images, classes, skipped
    relations_task   <name>/relations, attributes: the right caption scores higher than that with two objects, or attributes, exchanged
                     (chance: 0.5); images, images_attributes (that have the second); of a source with a field "held_out" each of these
                     for its parts: relations_seen (where it is empty), relations_object, images_combination, ...;
                     image_to_text_R@1, R@5, R@10, text_to_image_R@1, ... among the right captions; skipped (or nothing to compare)
    emoji_task       emoji/<cell>/..., or emoji_val/<cell>/... and emoji_test/<cell>/... for those subsets of the unseen concepts, where
                     <cell> = {seen,unseen}_concept_{seen,unseen}_vendor (names in Korean: emoji_ko, emoji_val_ko, ...), and for each cell
        top1, top5                                   1-of-N over all concepts of the cell's side: N = all seen, or all unseen, concepts
        top1_without_flags_clocks_keycaps, top5_...  the same N classes, fewer pictures
        top1_without_compositions, top5_...          further without man/woman x role and families
        chance_top1, chance_top5, classes, images, images_without_flags_clocks_keycaps, images_without_compositions
        pixel_1nn_top1, pixel_1nn_top5 and the same with _without_...: nearest training picture at 16 x 16 pixels. Seen concepts only: it
                                                     knows no picture of an unseen one. A training picture is not its own neighbour.
        image_to_text_R@1, R@5, R@10, text_to_image_R@...   unseen concepts only: the cell's pictures against the names of those pictures
      and emoji/skipped. The pictures of seen_concept_seen_vendor are pictures that the model was trained on: that cell measures memory.

Artefacts: `EvalResult.artefacts` has six dicts, each from a name (a task's `name`, or "emoji/<cell>") to a dataclass below

    "classification"   Classification: labels, top predictions and their scores, class names, pictures
    "retrieval"        Retrieval: the best texts of every picture and the best pictures of every text
    "similarity"       SimilarityMatrix: at most 48 pictures and their texts, with the similarity of every pair
    "alignment"        alignment.Alignment: which patch answers which word; only of methods with an embedding for each token
    "relations"        CaptionPairs: a right and a wrong caption of every picture
    "map"              EmbeddingMap: at most 2,000 pictures and their texts with their embeddings, for a 2-D map of both modalities;
                       that of emoji_task is "emoji/unseen_concept", the pictures of all vendors together

Pictures are not held: `Pictures` reads a record again when it is asked for one (`pictures[i]["image"]` is what the source gives).
"""

import functools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from clip_jax.data.decode import decode_image
from clip_jax.data.records import BadRecord, Record
from clip_jax.data.sources import make_source
from clip_jax.errors import UserError, did_you_mean
from clip_jax.evaluation import alignment, baselines, zeroshot
from clip_jax.evaluation.probe import linear_probe
from clip_jax.evaluation.prompts import class_prompts, load_class_names, load_templates, resolve_duplicates
from clip_jax.evaluation.retrieval import recall
from clip_jax.runtime import hosts

KINDS = ("classification", "relations", "retrieval", "similarity", "alignment", "map")
_MATRIX, _MAP = 48, 2000  # pictures in a similarity matrix, in a map
_PAIRS = 16  # pictures compared at once with a caption each


class Pictures(Sequence):
    """Records read on demand: item i is the record (a dict with "image") of the i-th picture; `where[i]` = (number of source, index)."""

    def __init__(self, sources, where):
        self.sources, self.where = list(sources), np.asarray(where, np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        number, index = self.where[i]
        return self.sources[number][int(index)]

    def select(self, rows):
        """The pictures of `rows` (indices or a bool mask)."""
        return Pictures(self.sources, self.where[rows])


@dataclass
class Classification:
    """Zero-shot classification of N pictures among C classes."""

    class_names: list[str]  # C
    labels: np.ndarray  # int32 [N], index into class_names
    top: np.ndarray  # int32 [N, min(5, C)], predicted classes, best first
    scores: np.ndarray  # float32 like top: similarity, without the logit scale
    pictures: Pictures  # N
    group: list[str]  # N: what pictures may be coloured or filtered by (emoji: the vendor; else the class name)


@dataclass
class CaptionPairs:
    """A right and a wrong caption for each of N pictures."""

    right: list[str]  # N
    wrong: list[str]  # N
    scores: np.ndarray  # float32 [N, 2]: similarity of the picture and the right, the wrong caption
    pictures: Pictures  # N
    group: list[str]  # N: what pictures may be filtered by (scenes: what was held out of training)


@dataclass
class Retrieval:
    """Retrieval among N pictures and M texts; a picture and a text belong together when their ids are equal."""

    texts: list[str]  # M
    image_ids: np.ndarray  # int32 [N]
    text_ids: np.ndarray  # int32 [M]
    image_to_text: np.ndarray  # int32 [N, min(10, M)], best texts of every picture
    text_to_image: np.ndarray  # int32 [M, min(10, N)], best pictures of every text
    pictures: Pictures  # N


@dataclass
class SimilarityMatrix:
    """Similarity of n pictures (rows) and n texts (columns); text i belongs to picture i."""

    values: np.ndarray  # float32 [n, n]
    texts: list[str]
    pictures: Pictures


@dataclass
class EmbeddingMap:
    """Embeddings of n pictures and m texts in the common space, unit rows."""

    images: np.ndarray  # float32 [n, E]
    texts_embedded: np.ndarray  # float32 [m, E]
    texts: list[str]  # m
    text_of_image: np.ndarray  # int32 [n], index into texts
    group: list[
        str
    ]  # n: what points may be coloured by (emoji: the CLDR group, "animals-nature"; else class name or "")
    pictures: Pictures  # n


@dataclass
class EvalResult:
    """What a task gives: `metrics` name -> float, `artefacts` as the module's docstring lists them."""

    metrics: dict[str, float]
    artefacts: dict[str, dict] = field(default_factory=lambda: {kind: {} for kind in KINDS})


def merge_results(results):
    """One result with the metrics and artefacts of all; of two with the same name the later one stays."""
    merged = EvalResult({})
    for result in results:
        merged.metrics |= result.metrics
        for kind, items in result.artefacts.items():
            merged.artefacts.setdefault(kind, {}).update(items)
    return merged


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
    batch_size=256,
):
    """Zero-shot classification of a labelled source.

    Args:
        class_names: by label, as `prompts.load_class_names` takes them; by default the source's own, with "_" read as a space.
        templates: as `prompts.load_templates` takes them.
        duplicates: "error", "merge" or "keep", see `prompts.resolve_duplicates`.
        canonical: bring prompts to SigLIP's canonical form.
        average: over a class's prompts: "embeddings" or "scores", see `zeroshot.make_classifier`.
        limit: at most so many pictures, evenly spaced.

    Raises UserError for missing or duplicate class names, records without a label, labels without a name, and no usable picture.
    """
    if class_names is None:
        if source.class_names is None:
            raise UserError(f"{name}: {source.name} does not name its classes; give class_names")
        class_names = [class_name.replace("_", " ") for class_name in source.class_names]
    class_names, class_of_label = resolve_duplicates(load_class_names(class_names), duplicates)
    classifier = zeroshot.make_classifier(model, class_names, templates, canonical=canonical, average=average)
    embedded = _embed(model, [source], batch_size, limit)
    labels = np.asarray(class_of_label, np.int32)[_labels(embedded, source, name, len(class_of_label))]
    top, scores = classifier.top(embedded.z)
    metrics = {
        "top1": zeroshot.accuracy(top, labels, 1),
        "top5": zeroshot.accuracy(top, labels, 5),
        "mean_per_class": np.nanmean(zeroshot.per_class_accuracy(top, labels, len(class_names))),
        "chance_top1": baselines.chance(len(class_names), 1),
        "chance_top5": baselines.chance(len(class_names), 5),
        "images": len(labels),
        "classes": len(class_names),
        "skipped": embedded.skipped,
    }
    result = EvalResult({f"{name}/{key}": float(value) for key, value in metrics.items()})
    groups = [class_names[i] for i in labels]
    result.artefacts["classification"][name] = Classification(
        class_names, labels, top, scores, embedded.pictures, groups
    )
    prompts = class_prompts(class_names, load_templates(templates)[:1], canonical)
    z_text = np.asarray(model.embed_text(prompts))
    _add_pairs(result, name, model, embedded, labels, class_names, z_text, prompts)
    result.artefacts["map"][name] = _embedding_map(embedded, labels, class_names, z_text, groups)
    return result


def retrieval_task(model, source, *, name="retrieval", limit=None, batch_size=256):
    """Retrieval in both directions between the pictures of a source and all their captions.

    Args:
        limit: at most so many pictures, evenly spaced, with all their captions.

    Raises UserError when no picture is usable or there is no caption.
    """
    embedded = _embed(model, [source], batch_size, limit)
    captions = [
        (image, text) for image, record in enumerate(embedded.records) for text in record["texts"] if text.strip()
    ]
    if not captions:
        raise UserError(f"{name}: {source.name} has no captions")
    text_ids, texts = np.asarray([image for image, _ in captions], np.int32), [text for _, text in captions]
    image_ids = np.arange(len(embedded.records), dtype=np.int32)
    z_text = np.asarray(model.embed_text(texts))
    found = recall(embedded.z, z_text, image_ids, text_ids, **_similarities(model))
    metrics = found.metrics | {"images": len(image_ids), "texts": len(texts), "skipped": embedded.skipped}
    result = EvalResult({f"{name}/{key}": float(value) for key, value in metrics.items()})
    result.artefacts["retrieval"][name] = Retrieval(
        texts, image_ids, text_ids, found.image_to_text, found.text_to_image, embedded.pictures
    )
    captioned, first = np.unique(text_ids, return_index=True)  # of every picture its first caption
    pairs, pair_texts, z_first = embedded.select(captioned), [texts[i] for i in first], z_text[first]
    _add_pairs(result, name, model, pairs, np.arange(len(first)), pair_texts, z_first, pair_texts)
    result.artefacts["map"][name] = _embedding_map(pairs, np.arange(len(first)), pair_texts, z_first, [""] * len(first))
    return result


def relations_task(model, source, *, name="scenes", limit=1500, batch_size=256):
    """Relations and attributes: is the right caption more similar to a picture than one of the same words that is wrong?

    Records have `wrong_objects`, their first caption with two objects in each other's place, and may have `wrong_attributes`, the same with
    the attributes of two objects exchanged; empty where there is none. A tie counts as half.

    Args:
        limit: at most so many pictures, evenly spaced.

    Raises UserError when no picture is usable, or no record has a caption and `wrong_objects`.
    """
    embedded = _embed(model, [source], batch_size, limit)
    usable = [
        row
        for row, record in enumerate(embedded.records)
        if _first_text(record, "texts") and _first_text(record, "wrong_objects")
    ]
    if not usable:
        raise UserError(
            f"{name}: {source.name} has no records with a caption and `wrong_objects`, that caption with two objects exchanged"
        )
    skipped = embedded.skipped + len(embedded.records) - len(usable)
    embedded = embedded.select(np.asarray(usable))
    right = [_first_text(record, "texts") for record in embedded.records]
    z_right, parts = np.asarray(model.embed_text(right)), [record.get("held_out") for record in embedded.records]
    scores = _paired_similarity(model, embedded.z, z_right)
    result = EvalResult({})
    for test, wrong_field, count in (
        ("relations", "wrong_objects", "images"),
        ("attributes", "wrong_attributes", "images_attributes"),
    ):
        wrong = [_first_text(record, wrong_field) for record in embedded.records]
        if not len(rows := np.flatnonzero([bool(text) for text in wrong])):
            continue
        z_wrong = np.asarray(model.embed_text([wrong[i] for i in rows]))
        pairs = np.stack([scores[rows], _paired_similarity(model, embedded.z[rows], z_wrong)], 1)
        correct = (pairs[:, 0] > pairs[:, 1]) + (pairs[:, 0] == pairs[:, 1]) / 2
        of_row = np.asarray(["" if parts[i] is None else str(parts[i]) or "seen" for i in rows])
        for part in ["", *sorted(set(of_row) - {""}, key=lambda part: (part != "seen", part))]:
            of_part, end = correct[of_row == part] if part else correct, part and f"_{part}"
            result.metrics |= {
                f"{name}/{test}{end}": float(of_part.mean()),
                f"{name}/{count}{end}": float(len(of_part)),
            }
        result.artefacts["relations"][f"{name}/{test}"] = CaptionPairs(
            [right[i] for i in rows], [wrong[i] for i in rows], pairs, embedded.pictures.select(rows), of_row.tolist()
        )
    texts, first, ids = np.unique(right, return_index=True, return_inverse=True)
    result.metrics |= {
        f"{name}/{k}": v for k, v in recall(embedded.z, z_right, ids, ids, **_similarities(model)).metrics.items()
    }
    result.metrics[f"{name}/skipped"] = float(skipped)
    _add_pairs(result, name, model, embedded, ids, texts.tolist(), z_right[first], texts.tolist())
    return result


def _first_text(record, field):
    """The text of a field, the first one of a list; empty where there is none."""
    value = record.get(field) or ""
    return str(value if isinstance(value, str) else next(iter(value), "")).strip()


def _paired_similarity(model, z_image, z_text):
    """The similarity of each image with the text of the same row, float32 [n].

    A model compares sets with sets, so this is the diagonal of small blocks: little beside the embedding, and no more than a block is held.
    """
    n = len(z_image)
    blocks = np.resize(
        np.arange(n), (-(-n // _PAIRS), _PAIRS)
    )  # of one shape, which compiles once: the last begins again
    return np.concatenate(
        [np.diagonal(np.asarray(model.similarity(z_image[b], z_text[b]), np.float32)) for b in blocks]
    )[:n]


def probe_task(
    model,
    train,
    test,
    *,
    val=None,
    name="probe",
    limit=None,
    batch_size=256,
):
    """Linear probe on the image embeddings of labelled sources, see `probe.linear_probe`; its strength is chosen on `val`.

    Args:
        val: by default a fifth of the training pictures.
        limit: at most so many pictures of each source, evenly spaced.

    Raises UserError for records without a label and sources without a usable picture.
    """
    sources = {"train": train, "val": val, "test": test}
    parts = {part: _embed(model, [source], batch_size, limit) for part, source in sources.items() if source is not None}
    z = {part: _vectors(embedded.z) for part, embedded in parts.items()}
    labels = {part: _labels(embedded, sources[part], name) for part, embedded in parts.items()}
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
    return EvalResult({f"{name}/{key}": float(value) for key, value in metrics.items()})


def emoji_task(
    model,
    subset="all",
    language="en",
    *,
    templates=("{}",),
    canonical=False,
    seen_pictures=2048,
    batch_size=256,
    open_split=None,
):
    """The embedded emoji set's own protocol: {seen, unseen concept} x {seen, unseen vendor}, classes being the concepts' CLDR names.

    Args:
        subset: of the unseen concepts: "all", or cheaper "val" (to choose a checkpoint by) and "test", which leave out the seen cells.
        language: of the names, a locale of the set such as "ko"; metrics of any but "en" are called emoji_ko/..., emoji_val_ko/...
        templates: prompts; retrieval uses the first one alone.
        canonical: bring prompts to SigLIP's canonical form.
        seen_pictures: size of the evenly spaced sample of training pictures for the cell seen_concept_seen_vendor; None takes all.
        open_split: split name -> Source with the fields of the emoji set; by default the embedded set's own splits.
    """
    open_split = open_split or functools.partial(make_source, "emoji")
    if subset not in ("all", "val", "test"):
        raise UserError(f"emoji: subset={subset!r}; allowed: all, val, test")
    prefix, parts = ("emoji", ("val", "test")) if subset == "all" else (f"emoji_{subset}", (subset,))
    field = "name"
    if language != "en":
        prefix, field = f"{prefix}_{language}", "name_" + language.replace("-", "_")
    result = EvalResult({})
    unseen = {
        v: _embed(model, [open_split(f"{part}_{v}_vendor") for part in parts], batch_size) for v in ("seen", "unseen")
    }
    records = [record for embedded in unseen.values() for record in embedded.records]
    if missing := [record for record in records if field not in record]:
        known = sorted(key.removeprefix("name_").replace("_", "-") for key in missing[0] if key.startswith("name_"))
        raise UserError(
            f"emoji: language={language!r}: no such names{did_you_mean(language, known)}; allowed: {', '.join(known) or 'en'}"
        )
    names = sorted({record[field] for record in records})
    classifier = zeroshot.make_classifier(model, names, templates, canonical=canonical)
    prompts = class_prompts(names, load_templates(templates)[:1], canonical)
    z_text = np.asarray(model.embed_text(prompts))
    for vendor, embedded in unseen.items():
        cell = f"{prefix}/unseen_concept_{vendor}_vendor"
        labels = _add_emoji_cell(result, cell, classifier, names, field, embedded)
        present = np.unique(labels)
        texts = [names[i] for i in present]
        found = recall(embedded.z, z_text[present], labels, present, **_similarities(model))
        result.metrics |= {f"{cell}/{key}": value for key, value in found.metrics.items()}
        result.artefacts["retrieval"][cell] = Retrieval(
            texts, labels, present, found.image_to_text, found.text_to_image, embedded.pictures
        )
        _add_pairs(result, cell, model, embedded, labels, names, z_text, prompts)
    both = _join(*unseen.values())
    groups = [record["group"] for record in both.records]
    both_labels = _emoji_labels(both.records, names, field)
    result.artefacts["map"][f"{prefix}/unseen_concept"] = _embedding_map(both, both_labels, names, z_text, groups)
    skipped = both.skipped

    if subset == "all":
        train, other = open_split("train"), open_split("train_unseen_vendor")
        seen = {"seen": _embed(model, [train], batch_size, seen_pictures), "unseen": _embed(model, [other], batch_size)}
        skipped += seen["seen"].skipped + seen["unseen"].skipped
        references, records, rows = _pixels(Pictures([train], _everything([train])))
        names = sorted({record[field] for record in records + seen["unseen"].records})
        classifier = zeroshot.make_classifier(model, names, templates, canonical=canonical)
        reference_labels = _emoji_labels(records, names, field)
        reference_of = {int(row): i for i, row in enumerate(rows)}
        for vendor, embedded in seen.items():
            cell = f"{prefix}/seen_concept_{vendor}_vendor"
            labels = _add_emoji_cell(result, cell, classifier, names, field, embedded)
            queries, _, _ = _pixels(embedded.pictures)
            itself = [reference_of[int(i)] for _, i in embedded.pictures.where] if vendor == "seen" else None
            top = baselines.nearest_classes(references, reference_labels, queries, len(names), leave_out=itself)
            pixel = _emoji_accuracies(top, labels, embedded.records)
            result.metrics |= {f"{cell}/pixel_1nn_{key}": value for key, value in pixel.items()}
    result.metrics[f"{prefix}/skipped"] = float(skipped)
    return result


def _is_sign(record):
    """Flags, clock faces and keycaps: symbols whose parts recur in every one of their kind."""
    is_clock = record["subgroup"] == "time" and re.search(r"o.clock$|-thirty$", record["name"])
    return record["group"] == "flags" or record["subgroup"] == "keycap" or bool(is_clock)


def _is_composition(record):
    """The signs, man or woman x role, and families."""
    words = re.findall(r"\w+", record["name"])
    is_gendered = len(words) > 1 and bool({"man", "woman", "men", "women"} & set(words))
    is_family = record["subgroup"] == "family" or words[0] == "family"
    return _is_sign(record) or is_family or (record["subgroup"].startswith("person") and is_gendered)


def _emoji_accuracies(top, labels, records):
    metrics = {}
    for suffix, left_out in (
        ("", None),
        ("_without_flags_clocks_keycaps", _is_sign),
        ("_without_compositions", _is_composition),
    ):
        keep = np.asarray([left_out is None or not left_out(record) for record in records], bool)
        for k in (1, 5):
            metrics[f"top{k}{suffix}"] = zeroshot.accuracy(top[keep], labels[keep], k)
    return metrics


def _emoji_labels(records, names, field):
    label = {name: i for i, name in enumerate(names)}
    return np.asarray([label[record[field]] for record in records], np.int32)


def _add_emoji_cell(result, cell, classifier, names, field, embedded):
    """Adds the classification of a cell to `result`; returns the labels int32 [n]. field: of the records, with their name."""
    labels = _emoji_labels(embedded.records, names, field)
    top, scores = classifier.top(embedded.z)
    vendors = [record["vendor"] for record in embedded.records]
    result.artefacts["classification"][cell] = Classification(names, labels, top, scores, embedded.pictures, vendors)
    metrics = _emoji_accuracies(top, labels, embedded.records) | {
        "chance_top1": baselines.chance(len(names), 1),
        "chance_top5": baselines.chance(len(names), 5),
        "classes": len(names),
        "images": len(labels),
        "images_without_flags_clocks_keycaps": sum(not _is_sign(record) for record in embedded.records),
        "images_without_compositions": sum(not _is_composition(record) for record in embedded.records),
    }
    result.metrics |= {f"{cell}/{key}": float(value) for key, value in metrics.items()}
    return labels


# --- what the tasks share: reading, embedding, and the raw material of the report ---


@dataclass
class _Embedded:
    z: np.ndarray  # float32 [n, ...]
    records: list[Record]  # n, without the pictures
    pictures: Pictures  # n
    skipped: int

    def select(self, rows):
        return _Embedded(self.z[rows], [self.records[i] for i in rows], self.pictures.select(rows), self.skipped)


def _join(a, b):
    where = np.concatenate([a.pictures.where, b.pictures.where + [len(a.pictures.sources), 0]])
    pictures = Pictures(a.pictures.sources + b.pictures.sources, where)
    return _Embedded(np.concatenate([a.z, b.z]), a.records + b.records, pictures, a.skipped + b.skipped)


def _everything(sources):
    return np.asarray([(number, i) for number, source in enumerate(sources) for i in range(len(source))]).reshape(-1, 2)


def _evenly(n, limit):
    """At most `limit` of the indices below n, evenly spaced."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def _read(pictures, render, batch_size, share=None):
    """Yields (rows, records without pictures, rendered pictures) of the usable ones of every `batch_size` rows, in order; reads the next
    batch meanwhile. share: rows, by default all."""
    share = range(len(pictures)) if share is None else share

    def read(row):
        try:
            record = pictures[row]
            return row, {key: value for key, value in record.items() if key != "image"}, render(record)
        except BadRecord:
            return None

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        pending = [pool.submit(read, row) for row in share[:batch_size]]
        for start in range(batch_size, len(share) + batch_size, batch_size):
            done = pending
            pending = [pool.submit(read, row) for row in share[start : start + batch_size]]
            batch = [item for item in (future.result() for future in done) if item is not None]
            yield tuple(list(part) for part in zip(*batch, strict=True)) if batch else ([], [], [])


def _embed(model, sources, batch_size, limit=None):
    """Embeds the pictures of the sources, in order. Raises UserError if none is usable."""
    where = _everything(sources)
    pictures = Pictures(sources, where[_evenly(len(where), limit)])
    shared = len(pictures) and getattr(model, "host_share", (0, 1))[1] > 1
    z, rows, records = (_embed_share if shared else _embed_all)(model, pictures, batch_size)
    if not rows:
        raise UserError(
            f"{' + '.join(source.name for source in sources)}: no usable picture among {len(pictures)} records"
        )
    return _Embedded(np.concatenate(z), records, pictures.select(rows), len(pictures) - len(rows))


def _embed_all(model, pictures, batch_size):
    """Embeddings (in parts), rows and records of the usable pictures."""
    z, rows, records = [], [], []
    for batch_rows, batch_records, images in _read(pictures, lambda record: model.image_view(record, None), batch_size):
        if images:
            z.append(np.asarray(model.embed_image(np.stack(images)), np.float32))
        rows += batch_rows
        records += batch_records
    return z, rows, records


def _embed_share(model, pictures, batch_size):
    """The same where every host reads only its share: all take part in equally many batches, and tell each other the records."""
    index, count = model.process_shard
    length, size = -(-len(pictures) // count), -(-batch_size // count)
    share = range(len(pictures))[index * length : (index + 1) * length]
    batches = _read(pictures, lambda record: model.image_view(record, None), size, share)
    z, rows, records = [], [], []
    for _ in range(0, length, size):
        batch_rows, batch_records, images = next(batches, ([], [], []))
        blank = np.zeros((size - len(images), model.image_view.size, model.image_view.size, 3), np.uint8)
        z_batch = model.embed_image_share(np.concatenate([np.stack(images), blank]) if images else blank)
        z.append(z_batch.reshape(count, size, *z_batch.shape[1:]))
        rows.append(batch_rows + [-1] * len(blank))
        records += batch_records
    shares = dict(
        hosts.gather((index, (np.concatenate(rows), records)))
    )  # hosts of one tensor-parallel group have the same share
    rows = np.concatenate([shares[i][0] for i in range(count)])
    z = np.stack(z, axis=1).reshape(len(rows), *z[0].shape[2:])
    return [z[rows >= 0]], rows[rows >= 0].tolist(), [record for i in range(count) for record in shares[i][1]]


def _pixels(pictures):
    """Pixel features float32 [n, F] of the usable pictures, their records, and their indices in their source, int [n]."""
    features, rows, records = [], [], []
    for batch_rows, batch_records, images in _read(pictures, lambda record: decode_image(record["image"]), 256):
        if images:
            features.append(baselines.pixel_features(images))
        rows += batch_rows
        records += batch_records
    return np.concatenate(features), records, pictures.where[rows, 1]


def _labels(embedded, source, task, classes=None):
    if any("label" not in record for record in embedded.records):
        raise UserError(f"{task}: {source.name} has records without a label")
    labels = np.asarray([record["label"] for record in embedded.records], np.int32)
    if labels.min() < 0 or (classes is not None and labels.max() >= classes):
        raise UserError(
            f"{task}: {source.name} has labels {labels.min()}..{labels.max()}, but there are names for 0..{(classes or 1) - 1}"
        )
    return labels


def _vectors(z):
    """One unit vector per example: float32 [n, E] from [n, ..., E] (the mean, where a method gives several; zeros are padding)."""
    return zeroshot.normalize(z.reshape(len(z), -1, z.shape[-1]).mean(1))


def _similarities(model):
    return {"similarity": model.similarity, "text_similarity": getattr(model, "text_similarity", None)}


def _add_pairs(
    result,
    name,
    model,
    embedded,
    text_of_image,
    texts,
    z_text,
    prompts,
):
    """Adds "similarity" and "alignment" of at most 48 pictures with different texts.

    text_of_image: int [n], index into texts. prompts: what is embedded for the texts.
    """
    text_of_image = np.asarray(text_of_image)
    _, rows = np.unique(text_of_image, return_index=True)
    rows = rows[_evenly(len(rows), _MATRIX)]
    columns = text_of_image[rows]
    z, pictures = embedded.z[rows], embedded.pictures.select(rows)
    values = np.asarray(model.similarity(z, z_text[columns]), np.float32)
    result.artefacts["similarity"][name] = SimilarityMatrix(values, [texts[i] for i in columns], pictures)
    if (found := alignment.align(model, z, z_text[columns], [prompts[i] for i in columns], pictures)) is not None:
        result.artefacts["alignment"][name] = found


def _embedding_map(embedded, text_of_image, texts, z_text, groups):
    """Of at most 2,000 pictures and their texts."""
    rows = _evenly(len(embedded.records), _MAP)
    columns, text_of_row = np.unique(np.asarray(text_of_image)[rows], return_inverse=True)
    return EmbeddingMap(
        _vectors(embedded.z[rows]),
        _vectors(z_text[columns]),
        [texts[i] for i in columns],
        text_of_row.astype(np.int32),
        [groups[i] for i in rows],
        embedded.pictures.select(rows),
    )
