"""LiT (Zhai et al. 2022): the image tower is locked, a text tower learns to match it.

    python -m clip_jax.train --config=configs/clip.py --workdir=runs/clip      # trains the image tower that is locked
    python -m clip_jax.train --config=configs/lit.py --workdir=runs/lit

Variants, after a colon:
  (none)   a new text tower to the image tower of runs/clip (--config.init_from=PATH: of another run of configs/clip.py)
  smoke    the same in a few steps, under a minute with compilation, to a tower with random weights
  b16 l16  the published models' sizes and text tower (BERT) on 4 G examples. Give data, vocabulary and image tower:
           --config.data=/data/pairs/{00000..12287}.tar --config.tokenizer=wordpiece:/data/vocab.txt?eot=false
           --config.init_from=/data/B_16.npz (a ViT of big_vision on ImageNet-21k, class token, no head)
           Expected ImageNet zero-shot top-1 on CC12M and YFCC100M: 73.9 (B/16 with BERT-base), 75.7 % (L/16 with BERT-large)
           Batch, examples and warm-up are an assumption: what the public models were trained with is not published in full
"""

import math
import pathlib

from clip_jax import config

SIZES = {
    "b16": (dict(width=768, depth=12, heads=12, mlp_dim=3072), dict(width=768, depth=12, heads=12, mlp_dim=3072)),
    "l16": (dict(width=1024, depth=24, heads=16, mlp_dim=4096), dict(width=1024, depth=24, heads=16, mlp_dim=4096)),
}


def get_config(variant=""):
    if variant not in ("", "smoke", *SIZES):
        raise config.unknown("configs/lit.py has no variant", variant, ["smoke", *SIZES])
    c = published(*SIZES[variant]) if variant in SIZES else embedded(variant)
    c.optim.freeze = ("^img/",)
    return c.lock()


def published(image, text):
    c = config.base()
    c.model.embed_dim = image["width"]  # the image's embedding is the class token as it is
    c.model.logit_scale_init, c.model.logit_scale_max = math.log(10), math.inf
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)
    c.model.image.update(dict(image, patch=16, ln_pre=False, patch_bias=True, act="gelu_tanh", ln_eps=1e-6, proj=False))
    c.model.text = dict(text, kind="bert", context=16, act="gelu", pad_id=0, proj_bias=True, vocab_size=0, eot_id=-1)
    c.tokenizer = "wordpiece:vocab.txt?eot=false"
    c.init_from, c.init_from_params = "B_16.npz", ("^img/",)
    c.data.augment = ("squash",)
    c.eval.transform = ("resize(256)", "center_crop")
    c.data.batch_size, c.data.workers, c.train.steps = 16384, 8, 4_000_000_000 // 16384
    c.optim.update(dict(name="adafactor", lr=1e-3, warmup_steps=10_000, grad_clip_norm=1.0))
    c.optim.weight_decay, c.optim.no_decay = (
        0.1,
        (r"(?<!/kernel)$",),
    )  # times the learning rate: the paper's 1e-4 a step
    c.eval.tasks = ()
    return c


def embedded(variant):
    c = config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant}")
    if variant != "smoke":
        c.init_from, c.init_from_params = "runs/clip", ("^img/",)
    return c
