"""OneR (Jang et al. 2023): one transformer and one head for images, texts and both.

    python -m clip_jax.train --config=configs/oner.py --workdir=runs/oner

Variants, after a colon; fields of the section oner, all of them assumptions: clip_jax/methods/oner.py
  (none)   the last row of the paper's table, small, on the embedded emoji pictures, for 2 CPU cores
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  small_ROW  one of the rows below on the embedded pictures, as long as the default
  ablation   python -m clip_jax.study --config=configs/oner.py:ablation --workdir=runs/oner_ablation: all of them, three seeds each
  ROW      itc, itc_two_heads, itc_xmc, itc_xmc_cic, itc_cmc: ViT-B/16 on CC3M, 40 epochs. Give data and BERT's vocabulary:
           --config.data=/data/cc3m/{00000..00331}.tar --config.tokenizer="wordpiece:/data/vocab.txt?sot=false"
           The paper's ImageNet zero-shot top-1: 1.65, 17.46, 22.12, 22.86, 23.70 %, top-5: 5.25, 35.32, 42.12, 42.88, 43.15 %
           Its optimizer, temperature, batch and masks are not published: these are MoCo v3's and assumptions
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.oner import Options
from clip_jax.study import Row, Study

PLAIN = dict(
    cmc=0.0, mim=0.0, mlm=0.0, joint_mim=0.0, joint_mlm=0.0, image_mask=0.0, text_mask=0.0
)  # nothing is masked
# Of two heads the projectors meet only by way of the predictors, so that evaluation has to go the same way.
ROWS = {"itc": PLAIN, "itc_two_heads": dict(PLAIN, two_heads=True, embed="query_key"), "itc_xmc": dict(PLAIN, xmc=1.0)}
ROWS |= {"itc_xmc_cic": dict(PLAIN, xmc=1.0, cic=1.0), "itc_cmc": {}}
PUBLISHED = (
    (1.65, 5.25),
    (17.46, 35.32),
    (22.12, 42.12),
    (22.86, 42.88),
    (23.70, 43.15),
)  # ImageNet zero-shot top-1, top-5
STUDIES = ("ablation",)


def get_study(variant):
    rows = [
        Row(row, f"{__file__}:small_{row}", published=figures) for row, figures in zip(ROWS, PUBLISHED, strict=True)
    ]
    cells = {
        "seen concepts": "emoji/seen_concept_unseen_vendor",
        "unseen concepts": "emoji/unseen_concept_unseen_vendor",
    }
    metrics = {
        f"{k}, {cell}": f"{name}/{metric}"
        for cell, name in cells.items()
        for k, metric in (("top-1", "top1"), ("top-5", "top5"))
    }
    return Study(
        "OneR: the rows of its table", tuple(rows), metrics, "ImageNet top-1 / top-5 after CC3M, published",
        curves=("modality_gap", "loss_itc", "image_to_text_acc"), map_task="emoji(subset='val')",
        readouts={embed: (f"oner.embed={embed}",) for embed in ("projector", "query_key")},
    )  # fmt: skip


def get_config(variant=""):
    row = variant.removeprefix("small_")
    if row not in ("", "smoke", *ROWS):
        raise config.unknown(
            "configs/oner.py has no variant", variant, ["smoke", *ROWS, *(f"small_{row}" for row in ROWS)]
        )
    c = config.base().unlock()
    c.method = "oner"
    c.oner = ConfigDict(dataclasses.asdict(Options(**ROWS.get(row, {}))))
    c.model.image = ConfigDict(
        dict(size=224, patch=16, stem=(), width=768, depth=12, heads=12, mlp_dim=3072, act="gelu")
    )
    c.model.text = ConfigDict(
        dict(context=39, vocab_size=0, eot_id=-1)
    )  # the last two: from the tokenizer; with CLS 40 tokens
    c.model.embed_dim = 256
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.data.augment, c.data.batch_size, c.data.workers = ("rrc(0.5, 1.0)", "flip"), 4096, 8
    c.train.steps = 40 * 2_900_000 // c.data.batch_size
    c.optim.update(
        dict(
            lr=1.5e-4 * c.data.batch_size / 256, b2=0.999, eps=1e-8, weight_decay=0.1, warmup_steps=c.train.steps // 10
        )
    )
    c.optim.no_decay += ("/type$", "/mask$")
    c.tokenizer, c.eval.tasks = "wordpiece:vocab.txt?sot=false", ()
    return (c if variant in ROWS else embedded(c, variant)).lock()


def embedded(c, variant):
    c.tokenizer, c.data.workers, c.data.batch_size, c.eval.tasks = "sentencepiece", 0, 128, ("emoji",)
    c.data.templates, c.data.word_dropout = ("{name}, {tags}", "{name}, {tags}", "{name}"), 0.2
    c.data.augment = ("random_background(0.5)", "rrc(0.5, 1.0)", "flip", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.image.update(dict(size=32, stem=(32, 64, 128), width=128, depth=2, heads=2, mlp_dim=512, act="gelu_tanh"))
    c.model.text.context, c.model.embed_dim, c.model.dtype = 12, 128, "float32"
    c.oner.update(dict(head_width=512, teacher_augment=("resize(36)", "center_crop"), temperature=0.1, momentum=0.9))
    for name in ("mim", "mlm", "joint_mim", "joint_mlm"):
        c.oner[name] *= 0.1  # so that in few steps words' cross-entropy does not outweigh the contrast
    c.optim.update(dict(lr=2e-3, warmup_steps=50, grad_clip_norm=1.0))
    c.eval.transform = ("resize(36)", "center_crop")
    c.train.steps, c.checkpoint.steps, c.eval.steps, c.eval.train_tasks = 700, 350, 350, ("emoji(subset='val')",)
    if variant.startswith("small_"):
        c.train.log_steps, c.checkpoint.steps, c.eval.steps = 20, 0, 0
    if variant == "smoke":
        c.model.scan = True  # compiles in half the time
        c.train.steps, c.train.log_steps, c.optim.warmup_steps, c.eval.steps, c.data.batch_size = 10, 2, 2, 0, 64
    return c
