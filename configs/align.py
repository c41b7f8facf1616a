"""ALIGN (Jia et al. 2021): CLIP's loss on noisy alt-texts, an EfficientNet and BERT trained from scratch.

    python -m clip_jax.train --config=configs/align.py --workdir=runs/align

Variants, after a colon:
  (none)   a small EfficientNet and BERT on the embedded emoji pictures, made for 2 CPU cores
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  b3 b7    coyo-align's recipes: CC3M, COYO-700M. l2: the paper's, on 1.8 G alt-texts
           Give BERT's uncased vocabulary and the data, with the index of what the noise filters keep (docs/filtering.md):
           --config.tokenizer=wordpiece:/data/vocab.txt --config.data='/data/pairs/{00000..41407}.tar?index=/data/kept'
           Expected on ImageNet: L2 76.4 % zero-shot top-1; B7 69.3 % and B3 48.9 % by nearest neighbours
"""

import pathlib

from clip_jax import config
from clip_jax.models.towers import use_size

# Size, batch, steps, warm-up, learning rate. Jia et al. 2021, section 5 (l2); coyo-align (b3, b7)
PUBLISHED = {
    "b3": ("ALIGN-B3-mini", 16384, 100_000, 10_000, 5e-3),
    "b7": ("ALIGN-B7-base", 65536, 300_000, 40_000, 2e-3),
    "l2": ("ALIGN-L2-large", 16384, 1_200_000, 10_000, 1e-3),
}


def get_config(variant=""):
    if variant not in ("", "smoke", *PUBLISHED):
        raise config.unknown("configs/align.py has no variant", variant, ["smoke", *PUBLISHED])
    c = published(*PUBLISHED[variant]) if variant in PUBLISHED else embedded(variant)
    c.method = "align"
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)  # to [-1, 1]
    c.optim.update(dict(name="lamb", schedule="linear", weight_decay=1e-5, no_decay=("_bn/",), grad_clip_norm=0.0))
    c.optim.b2, c.optim.eps = 0.999, 1e-6  # assumption: the defaults of LAMB in tensorflow-addons
    return c


def published(size, batch_size, steps, warmup_steps, lr):
    c = config.base()
    use_size(c.model, size)
    c.model.image.bn_group = 16  # the paper's examples per core, coyo-align's virtual batch
    c.model.remat, c.model.scan = "full", True  # one block of each stage is compiled
    c.tokenizer = "wordpiece:vocab.txt"
    c.data.augment = ("squash(346, 'bilinear')", "random_crop", "flip")
    c.eval.transform = ("squash(346, 'bilinear')", "center_crop")
    c.data.batch_size, c.data.workers, c.train.steps = batch_size, 8, steps
    c.optim.lr, c.optim.warmup_steps, c.eval.tasks = lr, warmup_steps, ()
    return c


def embedded(variant):
    c = config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant or 'emoji'}")
    c.tokenizer = "sentencepiece?sot=true"  # BERT embeds a text by its first token
    c.model.image = dict(
        kind="efficientnet",
        size=32,
        stages=((24, 1, 3, 2, 1), (48, 2, 3, 2, 4), (96, 2, 3, 1, 4)),
        stochastic_depth=0.1,
    )
    c.model.text = dict(
        kind="bert", context=16, positions=16, width=128, depth=1, heads=2, mlp_dim=512, vocab_size=0, eot_id=-1
    )
    c.model.temperature_init, c.optim.lr_mult = (
        0.05,
        (("^temperature$", 0.1),),
    )  # LAMB's steps are relative to a tensor's norm
    c.optim.lr = 1e-2
    if variant != "smoke":
        c.train.steps, c.checkpoint.steps, c.eval.steps = 900, 300, 300
    return c
