"""ZeroVL (Cui et al. 2022): batches from one source each, mixup of images or texts, token augmentation, full-batch negatives in parts.

    python -m clip_jax.train --config=configs/zerovl.py --workdir=runs/zerovl

Variants, after a colon; fields of the section zerovl: clip_jax/methods/zerovl.py
  (none)   configs/clip.py:emoji's model, data and optimizer; the vendors of the embedded emoji pictures are the sources.
           README.md gives its result
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  b16      the paper's recipe, ViT-B/16 and BERT, 20 epochs of 14.2 M pairs in batches of 16,384; b16_1024: in batches of 1,024. Give
           the image tower, a ViT of big_vision on ImageNet-21k, BERT's vocabulary and the data, the sources by size or other weights:
           --config.init_from=/data/B_16.npz --config.tokenizer=wordpiece:/data/vocab.txt
           --config.data="/data/cc3m/*.tar*size + /data/cc12m/*.tar*size + /data/sbu/*.tar*size + /data/vg/*.tar*size"
           Published RSUM of COCO and Flickr30k: 425.0 and 536.2; of the plain baseline on these data 363.5 and 476.8. Not run here
           Other than the paper's: BERT starts from random weights, which init_from cannot give together with a ViT's; pictures are
           normalised as that ViT's; the learning rate ends at 0, not at a tenth
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.zerovl import Options

BATCHES = {"b16": 16384, "b16_1024": 1024}


def get_config(variant=""):
    if variant in BATCHES:
        c, options = published(BATCHES[variant]).unlock(), Options(temperature=0.02)
    elif variant in ("", "smoke"):
        c, options = (
            config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant or 'emoji'}").unlock(),
            Options(),
        )
        c.data.source = "emoji?by=vendor"
    else:
        raise config.unknown("configs/zerovl.py has no variant", variant, ["smoke", *BATCHES])
    c.method, c.zerovl = "zerovl", ConfigDict(dataclasses.asdict(options))
    c.data.sampling = "one_source"
    return c.lock()


def published(batch_size):
    c = config.base()
    tower = dict(width=768, depth=12, heads=12, mlp_dim=3072)
    c.model.image.update(dict(tower, patch=16, ln_pre=False, patch_bias=True, act="gelu_tanh", ln_eps=1e-6))
    c.model.text = dict(tower, kind="bert", context=25, act="gelu", pad_id=0, proj_bias=False, vocab_size=0, eot_id=-1)
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)  # the image tower's own
    c.tokenizer = "wordpiece:vocab.txt"
    c.init_from, c.init_from_params = "B_16.npz", ("^img/(?!proj)",)
    c.data.augment, c.eval.transform = ("rrc(0.6, 1.0)", "autoaugment"), ("squash(256)", "center_crop")
    c.data.batch_size, c.micro_batches, c.data.workers = batch_size, batch_size // 1024, 8
    c.train.steps = 20 * 14_200_000 // batch_size
    c.optim.update(dict(lr=1e-4, b2=0.98, eps=1e-6, weight_decay=1e-3, no_decay=(), warmup_steps=c.train.steps // 40))
    c.eval.tasks = ()
    return c
