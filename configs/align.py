"""ALIGN (Jia et al. 2021): CLIP's loss on noisy alt-texts; an EfficientNet and BERT are trained from scratch.

    python -m clip_jax.train --config=configs/align.py --workdir=runs/align

Variants, after a colon:
  (none)   a small EfficientNet and BERT on the embedded emoji images, sized for 2 CPU cores
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b3 b7    coyo-align's recipes: CC3M, COYO-700M
  l2       the paper's recipe: 1.8 G alt-texts
           These three need BERT's uncased vocabulary and data with the index of the pairs that pass the noise filters
           (docs/filtering.md):
           --config.tokenizer=wordpiece:/data/vocab.txt --config.data='/data/pairs/{00000..41407}.tar?index=/data/kept'
           Published on ImageNet: L2 76.4 % zero-shot top-1; coyo-align by the task knn(..., k=1): B3 46.2, B7 68.6 %
"""

from clip_jax import config
from clip_jax.models.towers import use_size

# Size, batch size, steps, warm-up steps, learning rate: coyo-align (b3, b7), Jia et al. 2021, section 5 (l2)
PUBLISHED = {
    "b3": ("ALIGN-B3-mini", 16384, 100_000, 10_000, 5e-3),
    "b7": ("ALIGN-B7-base", 65536, 300_000, 40_000, 2e-3),
    "l2": ("ALIGN-L2-large", 16384, 1_200_000, 10_000, 1e-3),
}


VARIANTS = ["smoke", "small", *PUBLISHED]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/align.py has no variant", variant, VARIANTS)
    c = published(*PUBLISHED[variant]) if variant in PUBLISHED else embedded(variant)
    c.method = "align"
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)  # to [-1, 1]
    c.optim.update(dict(name="lamb", schedule="linear", weight_decay=1e-5, no_decay=("_bn/",), grad_clip_norm=0.0))
    c.optim.update(dict(b2=0.999, eps=1e-6))  # assumption: the defaults of LAMB in tensorflow-addons
    return c


def published(size, batch_size, steps, warmup_steps, lr):
    c = config.base()
    use_size(c.model, size)
    c.model.image.bn_group = 16  # the paper's examples per core, coyo-align's virtual batch
    c.model.remat, c.model.scan = "full", True  # compiles one block of each stage
    c.tokenizer = "wordpiece:vocab.txt"
    squash = "squash(346, 'bilinear', antialias=False)"
    c.data.augment, c.eval.transform = (squash, "random_crop", "flip"), (squash, "center_crop")
    c.eval.tasks = ()
    c.data.batch_size, c.data.workers = batch_size, 8
    c.train.steps = steps
    c.optim.update(dict(lr=lr, warmup_steps=warmup_steps, warmup_from=0.0))
    return c


def embedded(variant):
    c = config.sibling(__file__, f"clip.py:{variant or 'emoji'}")
    c.tokenizer = "sentencepiece?sot=true"  # BERT embeds a text by its first token
    stages = ((24, 1, 3, 2, 1), (48, 2, 3, 2, 4), (96, 2, 3, 1, 4))
    size, text = 32, dict(kind="bert", context=16, positions=16, width=128, depth=1, heads=2, mlp_dim=512)
    if variant == "small":
        stages = ((16, 1, 3, 1, 1), (24, 2, 3, 2, 4), (48, 2, 5, 2, 4), (96, 2, 3, 2, 4), (192, 2, 5, 2, 4))
        size, text = 128, text | dict(context=32, positions=77, width=192, depth=2, heads=3, mlp_dim=768)
    c.model.image = dict(kind="efficientnet", size=size, stages=stages, stochastic_depth=0.1)
    if variant == "small":
        # AlignModel's of transformers, so that a run can be exported.
        c.model.image.update(dict(padding="even", proj=False, stochastic_depth=0.2))
    c.model.text = dict(text, vocab_size=0, eot_id=-1)  # the tokenizer sets both
    c.model.temperature_init = 0.05
    c.optim.lr_mult = (("^temperature$", 0.1),)  # LAMB's steps are proportional to a tensor's norm
    c.optim.lr = 1e-2
    if variant == "":
        c.train.steps = 900
        c.checkpoint.steps = c.eval.steps = 300
    return c
