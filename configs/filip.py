"""FILIP (Yao et al. 2022): images and texts compared token by token.

    python -m clip_jax.train --config=configs/filip.py --workdir=runs/filip

Variants, after a colon; clip_jax/methods/filip.py documents the section filip:
  (none)   model, data and optimizer of configs/clip.py:emoji, sized for 2 CPU cores
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  scenes   configs/clip.py:scenes: scenes of two emoji, captions that say how they lie, test of relations and attributes
  paper25 repo16
           the default with token_select, among 16 patches and 12 words
  b32_yfcc b32 l14
           the paper's recipe (docs/recipes/filip.md), 30 epochs: B/32 on 26 M pairs of YFCC100M; B/32 and L/14 on 340 M
           pairs. Each step draws one of a record's texts; back-translations are further texts. Give data:
           --config.data=/data/pairs/{00000..02599}.tar
           Expected ImageNet zero-shot top-1: 37.8, 68.8, 77.1 % with FILIP's own prompts. Not run here. From secondary
           sources. Assumptions: crops of 0.2 to 1 of the area before AutoAugment; pytorch-lamb's rule; in token_select
           the neighbours of a sample
  b32_repo the recipe of Sense-GVT/DeCLIP on YFCC15M: configs/declip.py:b32 (32 epochs of batch 4096) with half of its
           learning rate. Give data: --config.data=/data/yfcc15m/{00000..01538}.tar
           Expected 39.5 % (CLIP, same recipe: 32.8). Not run here
"""

import math

from clip_jax import config
from clip_jax.methods.filip import Options
from clip_jax.models.towers import use_size

# Size of the towers, pairs of an epoch, batch size, learning rate at batch 512, weight decay
PUBLISHED = {
    "b32_yfcc": ("ViT-B/32", 26_000_000, 8192, 6e-3, 3e-2),
    "b32": ("ViT-B/32", 340_000_000, 40_960, 2e-3, 3e-3),
    "l14": ("ViT-L/14", 340_000_000, 30_720, 1.5e-3, 3e-3),
}
VARIANTS = ["smoke", "small", "scenes", "paper25", "repo16", *PUBLISHED, "b32_repo"]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/filip.py has no variant", variant, VARIANTS)
    if variant in PUBLISHED:
        c, options = published(*PUBLISHED[variant]), Options(token_select="paper25")
    elif variant == "b32_repo":
        c = config.sibling(__file__, "declip.py:b32")
        with c.unlocked():
            del c.declip
        c.model.embed_dim, c.model.image.proj_bias, c.model.image.token_norm = 256, True, False
        c.optim.lr, c.optim.weight_decay, c.model.logit_scale_max = 5e-4, 0.5, math.inf
        # 15 % of the tokens are chosen: 80 % of them become a mask, 10 % a random token, 10 % stay.
        options = Options(token_select="repo16", text_augment=("tokens(0.135, 0.8888889, 0.1111111)",))
    else:
        c = config.sibling(__file__, f"clip.py:{variant if variant in ('smoke', 'small', 'scenes') else 'emoji'}")
        options = Options(token_select=variant if variant in ("paper25", "repo16") else "none")
    return config.set_method(c, "filip", options)


def published(size, pairs, batch_size, lr, weight_decay):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.model.embed_dim = "clip_bpe", 256
    c.data.augment = ("rrc(0.2, 1.0)", "autoaugment")
    c.data.batch_size, c.data.workers = batch_size, 8
    c.train.steps = 30 * pairs // batch_size
    c.optim.update(dict(name="lamb", lr=lr * (batch_size / 512) ** 0.5, warmup_steps=3000))
    c.optim.update(dict(b2=0.999, eps=1e-4, weight_decay=weight_decay, lamb_adapt_all=True, lamb_max_norm=10.0))
    c.optim.update(dict(lamb_bias_correction=False, lamb_fuse_qkv=True))
    c.optim.no_decay += ("/embedding$",)
    if size == "ViT-L/14":
        c.model.remat, c.model.scan = "full", True
    c.eval.tasks = ()
    return c
