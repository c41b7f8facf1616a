"""ZeroVL (Cui et al. 2022): one source a batch, mixup of images or texts, token augmentation, full-batch negatives.

    python -m clip_jax.train --config=configs/zerovl.py --workdir=runs/zerovl

Variants, after a colon; clip_jax/methods/zerovl.py documents the section zerovl:
  (none)   model, data and optimizer of configs/clip.py:emoji; the vendors of the embedded emoji images are the sources.
           README.md gives its result
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b16 b16_1024
           the paper's recipe: ViT-B/16 and BERT, 20 epochs of 14.2 M pairs, batch 16,384 or 1,024, encoded in parts of
           1,024. Give the image tower (big_vision's ViT on ImageNet-21k), BERT's vocabulary and the data, with sources
           weighted by size or otherwise: --config.init_from=/data/B_16.npz --config.tokenizer=wordpiece:/data/vocab.txt
           --config.data="/data/cc3m/*.tar*size + /data/cc12m/*.tar*size + /data/sbu/*.tar*size + /data/vg/*.tar*size"
           Published RSUM of COCO and Flickr30k: 425.0, 536.2; a plain baseline's: 363.5, 476.8. Not run here
           Differences from the paper: BERT starts from random weights, as init_from cannot load it together with a ViT;
           images are normalised for that ViT; the learning rate ends at 0, not at a tenth
"""

from clip_jax import config
from clip_jax.methods.zerovl import Options

BATCHES = {"b16": 16384, "b16_1024": 1024}


def get_config(variant=""):
    if variant in BATCHES:
        c, options = published(BATCHES[variant]), Options(temperature=0.02)
    elif variant in ("", "smoke"):
        c, options = config.sibling(__file__, f"clip.py:{variant or 'emoji'}"), Options()
        c.data.source = "emoji?by=vendor"
    else:
        raise config.unknown("configs/zerovl.py has no variant", variant, ["smoke", *BATCHES])
    c.data.sampling = "one_source"
    return config.set_method(c, "zerovl", options)


def published(batch_size):
    c = config.base()
    tower = dict(width=768, depth=12, heads=12, mlp_dim=3072)
    c.model.image.update(dict(tower, patch=16, ln_pre=False, patch_bias=True, act="gelu_tanh", ln_eps=1e-6))
    c.model.text = dict(tower, kind="bert", context=25, act="gelu", pad_id=0, proj_bias=False, vocab_size=0, eot_id=-1)
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)  # the image tower's own
    c.tokenizer = "wordpiece:vocab.txt"
    c.init_from, c.init_from_params = "B_16.npz", ("^img/(?!proj)",)
    c.data.augment, c.eval.transform = ("rrc(0.6, 1.0)", "autoaugment"), ("squash(256)", "center_crop")
    c.data.batch_size, c.data.workers = batch_size, 8
    c.micro_batches = batch_size // 1024
    c.train.steps = 20 * 14_200_000 // batch_size
    c.optim.update(dict(lr=1e-4, b2=0.98, eps=1e-6, weight_decay=1e-3, no_decay=(), warmup_steps=c.train.steps // 40))
    c.eval.tasks = ()
    return c
