"""OneR (Jang et al. 2023): one transformer and one head for images, texts and both.

    python -m clip_jax.train --config=configs/oner.py --workdir=runs/oner

Variants, after a colon; fields of the section oner, all of them assumptions: clip_jax/methods/oner.py
  (none)   the last row of the paper's table, small, on the embedded emoji pictures, for 2 CPU cores
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  small_ROW  one of the rows below on the embedded pictures
  ROW      itc, itc_two_heads, itc_xmc, itc_xmc_cic, itc_cmc: ViT-B/16 on CC3M, 40 epochs. Give data and BERT's vocabulary:
           --config.data=/data/cc3m/{00000..00331}.tar --config.tokenizer="wordpiece:/data/vocab.txt?sot=false"
           The paper's ImageNet zero-shot top-1: 1.65, 17.46, 22.12, 22.86, 23.70 %, top-5: 5.25, 35.32, 42.12, 42.88, 43.15 %
           Its optimizer, temperature, batch and masks are not published: these are MoCo v3's and assumptions
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.oner import Options

PLAIN = dict(cmc=0.0, mim=0.0, mlm=0.0, joint_mim=0.0, joint_mlm=0.0, image_mask=0.0, text_mask=0.0)  # nothing is masked
ROWS = {"itc": PLAIN, "itc_two_heads": dict(PLAIN, two_heads=True), "itc_xmc": dict(PLAIN, xmc=1.0)}
ROWS |= {"itc_xmc_cic": dict(PLAIN, xmc=1.0, cic=1.0), "itc_cmc": {}}


def get_config(variant=""):
    row = variant.removeprefix("small_")
    if row not in ("", "smoke", *ROWS):
        raise config.unknown("configs/oner.py has no variant", variant, ["smoke", *ROWS, *(f"small_{row}" for row in ROWS)])
    c = config.base().unlock()
    c.method = "oner"
    c.oner = ConfigDict(dataclasses.asdict(Options(**ROWS.get(row, {}))))
    c.model.image = ConfigDict(dict(size=224, patch=16, stem=(), width=768, depth=12, heads=12, mlp_dim=3072, act="gelu"))
    c.model.text = ConfigDict(dict(context=39, vocab_size=0, eot_id=-1))  # the last two: from the tokenizer; with CLS 40 tokens
    c.model.embed_dim = 256
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.data.augment, c.data.batch_size, c.data.workers = ("rrc(0.5, 1.0)", "flip"), 4096, 8
    c.train.steps = 40 * 2_900_000 // c.data.batch_size
    c.optim.update(dict(lr=1.5e-4 * c.data.batch_size / 256, b2=0.999, eps=1e-8, weight_decay=0.1, warmup_steps=c.train.steps // 10))
    c.optim.no_decay += ("/type$", "/mask$")
    c.tokenizer, c.eval.tasks = "wordpiece:vocab.txt?sot=false", ()
    return (c if variant in ROWS else embedded(c, variant)).lock()


def embedded(c, variant):
    c.tokenizer, c.data.workers, c.data.batch_size, c.eval.tasks = "sentencepiece", 0, 256, ("emoji",)
    c.data.templates, c.data.word_dropout = ("{name}, {tags}", "{name}, {tags}", "{name}"), 0.2
    c.data.augment = ("random_background(0.5)", "rrc(0.5, 1.0)", "flip", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.image.update(dict(size=32, stem=(32, 64, 128), width=128, depth=2, heads=2, mlp_dim=512, act="gelu_tanh"))
    c.model.text.context, c.model.embed_dim, c.model.dtype = 12, 128, "float32"
    c.oner.update(dict(head_width=512, teacher_augment=("resize(36)", "center_crop"), temperature=0.1, momentum=0.9))
    c.oner.predictor = False  # with one F(I) finds bar F(T) by way of the predictor, and F(I) and F(T) themselves stay apart
    c.optim.update(dict(lr=2e-3, warmup_steps=50, grad_clip_norm=1.0))
    c.train.steps, c.eval.transform = 600, ("resize(36)", "center_crop")
    c.checkpoint.steps, c.eval.steps, c.eval.train_tasks = 200, 200, ("emoji(subset='val')",)
    if variant == "smoke":
        c.model.scan = True  # compiles in half the time
        c.train.steps, c.train.log_steps, c.optim.warmup_steps, c.eval.steps, c.data.batch_size = 10, 2, 2, 0, 64
    return c
