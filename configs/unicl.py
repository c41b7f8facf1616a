"""UniCL (Yang et al. 2022): images with classes and images with captions in one space.

    python -m clip_jax.train --config=configs/unicl.py --workdir=runs/unicl

Variants, after a colon; clip_jax/methods/unicl.py documents the section unicl:
  (none)   model and optimizer of configs/clip.py on the embedded emoji images. Half of the concepts have their subgroup
           (99 classes), half have captions, in equal parts of a batch; the numbers in --config.data set other shares
  labels   only the half with classes
  captions only the half with captions, which is CLIP
  small    for your own data, as configs/clip.py:small.
           Records with a class read its name, the others their captions
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b16      the paper's recipe: 32 epochs of batch 4,096, equal parts of ImageNet-21k and YFCC14M. Give data:
           --config.data="tfds:imagenet21k*1 + /data/yfcc14m/{00000..01400}.tar*1"
           Published ImageNet zero-shot top-1: Swin-T 40.5, Swin-B 44.3 %; YFCC14M alone, Swin-T: 30.1 %. Not run here
           Difference from the paper: the image tower is ViT-B/16, as there is no Swin here. Batch size, equal parts and
           random crops as the only augmentation are from memory (docs/recipes/unicl.md)
"""

import math

from clip_jax import config
from clip_jax.evaluation.prompts import load_templates
from clip_jax.methods.unicl import Options
from clip_jax.models.towers import use_size

CLASSES, CAPTIONS = "emoji?part=concept:1/2&label=subgroup", "emoji?part=concept:2/2"
SOURCES = {"": f"{CLASSES}*1 + {CAPTIONS}*1", "labels": CLASSES, "captions": CAPTIONS}
SOURCES |= {"smoke": SOURCES[""], "small": ""}
VARIANTS = ["labels", "captions", "smoke", "small", "b16"]
EPOCH = 2 * 14_000_000  # as many captions as classes


def get_config(variant=""):
    if variant == "b16":
        c, templates = published(), [t.replace("{}", "{class_name}") for t in ("{}.", *load_templates("clip_80"))]
    elif variant in SOURCES:
        c = config.sibling(__file__, f"clip.py:{variant if variant in ('smoke', 'small') else 'emoji'}")
        c.data.source, templates = SOURCES[variant], ["{class_name}"]
    else:
        raise config.unknown("configs/unicl.py has no variant", variant, VARIANTS)
    return config.set_method(c, "unicl", Options(tuple(templates)))


def published():
    c = config.base()
    use_size(c.model, "ViT-B/16")
    c.model.logit_scale_init, c.model.logit_scale_max = 1.0, math.inf  # the scale starts at e and has no bound
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.model.text.ln_eps, c.model.text.weight_init = 1e-12, "unicl"
    c.tokenizer, c.data.augment = "clip_bpe", ("rrc(0.08, 1.0)",)
    c.data.batch_size, c.data.workers = 4096, 8
    c.train.steps, c.optim.warmup_steps = 32 * EPOCH // c.data.batch_size, 5 * EPOCH // c.data.batch_size
    scale = c.data.batch_size / 512
    c.optim.update(dict(lr=5e-4 * scale, warmup_from=5e-7 * scale, lr_end=0.01, decay_from_start=True))
    c.optim.update(dict(b2=0.999, eps=1e-8, weight_decay=0.1, no_decay=("/bias$", "/scale$", "^logit_")))
    c.optim.grad_clip_norm = 5.0
    c.eval.transform, c.eval.tasks = ("resize(256)", "center_crop"), ()
    return c
