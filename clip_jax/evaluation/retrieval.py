"""Image-text retrieval in both directions between the images of a source and all their captions.

Metrics; `<name>` is the option `name`:

  <name>/image_to_text_R@1, R@5, R@10: share of images with one of their captions among the K most similar texts.
  <name>/text_to_image_R@1, R@5, R@10: share of captions with their image among the K most similar images.
  <name>/loss: cross-entropy (InfoNCE) of the images and their first captions at the model's scale, mean of both
    directions, in equal blocks of at most 256 pairs. It is comparable between steps and runs on the same data, not with
    a training loss of other batches or of another kind. Absent where the model has no scale.
  <name>/images, texts, skipped: numbers of images, captions and unusable records.

Artefacts: "retrieval", "similarity", "alignment" (methods that compare patches with words) and "map",
named `<name>`.
"""

import dataclasses

import numpy as np

from clip_jax.data.templates import usable_texts
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import embed, open_source
from clip_jax.evaluation.report.embedding_map import make_map
from clip_jax.evaluation.report.figures import Retrieval, add_similarity
from clip_jax.evaluation.report.headline import RECALL_MEANING, recall_table
from clip_jax.evaluation.results import EvalResult, by_name, named

_LOSS_PAIRS = 256

_LOSS_MEANING = f"""<p class="notes"><b>Loss</b>: the contrastive loss (InfoNCE) of these pairs at the model's
scale, in blocks of at most {_LOSS_PAIRS} pairs. Compare it between steps and runs on the same data alone.</p>"""


def run(model, source, split="", name="retrieval", image="", text="", limit=None):
    """Runs the task on a source string.

    Args:
      source: a source with captions (docs/data.md).
      split: its split; by default "test", or the only one.
      name: prefix of the metrics.
      image: record field of the image.
      text: record field of the captions.
      limit: at most this many images, evenly spaced, with all their captions.
    """
    return retrieval_task(model, open_source(source, split, image=image, text=text), name=name, limit=limit)


def retrieval_task(model, source, *, name="retrieval", limit=None, batch_size=256):
    """Runs the task on an opened source; for the arguments see `run`.

    An image without a caption is a candidate for the captions of others. An image is skipped when it has captions and
    none of them is usable.

    Raises UserError when no image is usable or there is no usable caption.
    """
    from clip_jax.evaluation.recall import model_recall

    embedded, captions = _with_captions(embed(model, [source], batch_size, limit))
    if not captions:
        raise UserError(f"{name}: {source.name} has no captions")
    text_ids, texts = np.asarray([image for image, _ in captions], np.int32), [text for _, text in captions]
    image_ids = np.arange(len(embedded.records), dtype=np.int32)
    z_text = np.asarray(model.embed_text(texts))
    found = model_recall(model, embedded.z, z_text, image_ids, text_ids)
    captioned, first = np.unique(text_ids, return_index=True)  # the first caption of every image
    loss = pair_loss(model, embedded.z[captioned], z_text[first])
    metrics = found.metrics | loss | {"images": len(image_ids), "texts": len(texts), "skipped": embedded.skipped}
    result = EvalResult(named(name, metrics)).credit(__name__)
    for key, hits in found.hits.items():
        result.keep(f"{name}/{key}", hits, captioned if key.startswith("image") else text_ids)
    result.artefacts["retrieval"][name] = Retrieval(
        texts, image_ids, text_ids, found.image_to_text, found.text_to_image, embedded.images
    )
    pairs, rows = embedded.select(captioned), np.arange(len(first))
    pair_texts, z_first = [texts[i] for i in first], z_text[first]
    add_similarity(result, name, model, pairs, rows, pair_texts, z_first, pair_texts)
    result.artefacts["map"][name] = make_map(pairs, rows, pair_texts, z_first, [""] * len(first))
    return result


def pair_loss(model, z_image, z_text):
    """Returns `{"loss": InfoNCE of n pairs}`, natural logarithm; {} for a model without `scale` or a single pair.

    Args:
      model: has `similarity` and `scale`, and may have `text_similarity`.
      z_image, z_text: `[n, ...]`, the embeddings of pairs.
    """
    if getattr(model, "scale", None) is None or len(z_image) < 2:
        return {}
    total = 0.0
    for rows in np.array_split(np.arange(len(z_image)), -(-len(z_image) // _LOSS_PAIRS)):
        images, texts = z_image[rows], z_text[rows]
        of_images = np.asarray(model.similarity(images, texts), np.float64)
        of_texts = model.text_similarity(texts, images) if hasattr(model, "text_similarity") else of_images.T
        for scores in (of_images, np.asarray(of_texts, np.float64)):
            logits = model.scale * scores
            top = logits.max(1, keepdims=True)
            total += (np.log(np.exp(logits - top).sum(1)) + top[:, 0] - np.diag(logits)).sum() / 2
    return {"loss": total / len(z_image)}


def _with_captions(embedded):
    """Returns the images without those that have captions of which none is usable, and pairs (image, caption).

    The images that are left out are counted in `skipped`.
    """
    texts = [usable_texts(record["texts"], strict=False) for record in embedded.records]
    kept = np.flatnonzero([bool(own) or not _has_text(r) for own, r in zip(texts, embedded.records, strict=True)])
    captions = [(image, text) for image, row in enumerate(kept.tolist()) for text in texts[row]]
    left = embedded.select(kept)
    return dataclasses.replace(left, skipped=left.skipped + len(texts) - len(kept)), captions


def _has_text(record):
    """Returns whether a caption field is filled."""
    return "caption_error" in record or any(text.strip() for text in record["texts"])


def sources(options):
    """Returns the `(source, split)` that a run with these options opens."""
    return [(options["source"], options["split"])]


def metric_names(options):
    """Returns the names of the metrics that a run with these options computes."""
    keys = (f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
    return [f"{options['name']}/{key}" for key in (*keys, "loss", "images", "texts", "skipped")]


def headline(metrics):
    """Returns the numbers for the top of the report as HTML."""
    results = by_name(metrics)
    loss = _LOSS_MEANING if any("loss" in m for m in results.values()) else ""
    return f"<h3>Retrieval</h3>{recall_table(results)}{RECALL_MEANING}{loss}"
