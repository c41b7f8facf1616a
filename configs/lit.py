"""LiT (Zhai et al. 2022): a text tower learns to match a locked image tower.

    python -m clip_jax.train --config=configs/clip.py --workdir=runs/clip  # trains the image tower that is then locked
    python -m clip_jax.train --config=configs/lit.py --workdir=runs/lit

Variants, after a colon:
  (none)   a new text tower for the image tower of runs/clip; --config.init_from=PATH: of another run of configs/clip.py
  small    for your own data, as configs/clip.py:small.
           --config.init_from=runs/mine: the image tower of a run of configs/clip.py:small, or of other data's
  smoke    a few steps, under a minute with compilation, with a random image tower
  b16 l16  the published models' sizes and text tower (BERT), 60,000 steps. Give data, vocabulary and towers:
           --config.data=/data/pairs/{00000..12287}.tar --config.tokenizer=wordpiece:/data/vocab.txt?eot=false
           --config.init_from="img=/data/B_16.npz, txt=/data/bert-base-uncased" (a ViT of big_vision on ImageNet-21k,
           class token, no head; Hugging Face's BertModel)
           Expected ImageNet zero-shot top-1 (CC12M, YFCC100M): B/16 with BERT-base 73.9, L/16 with BERT-large 75.7 %
           The locked tower runs as in evaluation: running statistics, no dropout, no patch dropout
           Assumptions: batch size, warm-up, and the steps of L/16
"""

import math

from clip_jax import config
from clip_jax.models.towers import TEXT_TOWERS, all_fields

# The image tower and the text tower have the same size.
VARIANTS = ["smoke", "small", "b16", "l16"]
SIZES = {
    "b16": dict(width=768, depth=12, heads=12, mlp_dim=3072),
    "l16": dict(width=1024, depth=24, heads=16, mlp_dim=4096),
}


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/lit.py has no variant", variant, VARIANTS)
    c = published(SIZES[variant]) if variant in SIZES else embedded(variant)
    c.optim.freeze = ("^img/",)
    return c.lock()


def published(tower):
    c = config.base()
    c.model.embed_dim = tower["width"]  # the image's embedding is the class token, not projected
    c.model.logit_scale_init, c.model.logit_scale_max = math.log(10), math.inf
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)
    c.model.image.update(dict(tower, patch=16, ln_pre=False, patch_bias=True, act="gelu_tanh", ln_eps=1e-6, proj=False))
    text = dict(tower, kind="bert", context=16, act="gelu", pad_id=0, proj_bias=True, vocab_size=0, eot_id=-1)
    c.model.text = all_fields(TEXT_TOWERS, text)
    c.tokenizer = "wordpiece:vocab.txt?eot=false"
    c.init_from, c.init_from_params = "img=B_16.npz, txt=bert-base-uncased", ("^img/", "^txt/(?!proj)")
    c.data.augment = ("squash(256, 'bilinear', antialias=False)", "random_crop")
    c.eval.transform, c.eval.tasks = ("squash(256, 'bilinear', antialias=False)", "center_crop"), ()
    c.data.batch_size, c.data.workers = 16384, 8
    c.train.steps = 60_000
    c.optim.update(dict(name="adafactor", lr=1e-3, warmup_steps=10_000, warmup_from=0.0, grad_clip_norm=1.0))
    c.optim.weight_decay = 0.1  # times the learning rate: the paper's 1e-4 a step
    c.optim.no_decay = (r"(?<!/kernel)$",)
    return c


def embedded(variant):
    c = config.sibling(__file__, f"clip.py:{variant}")
    if variant == "small":
        c.small.needs = ("init_from", "python -m clip_jax.train --config=configs/clip.py:small --config.data=DATA ...")
    elif variant != "smoke":
        c.init_from, c.init_from_params = "runs/clip", ("^img/",)
    return c
