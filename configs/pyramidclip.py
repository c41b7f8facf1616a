"""PyramidCLIP (Gao et al. 2022): crops, regions, summaries, captions and tags aligned with each other at three levels.

    python -m clip_jax.train --config=configs/pyramidclip.py --workdir=runs/pyramidclip

Variants, after a colon; fields of the section pyramidclip: clip_jax/methods/pyramidclip.py
  (none)   emoji pictures and scenes of them: data, optimizer and steps of configs/clip.py:scenes, made for 2 CPU cores. Regions of scenes
           are their objects by their pixels, no detector is needed; emoji have none. Towers: those of clip.py:scenes but for a class token
           and the LeFF of the first block. A step takes two passes of the image tower and three of the other. Unlike the paper's: of texts
           the mean over words, not the maximum; the crossing terms, which say nothing of places, weigh a tenth in all, not two thirds;
           local crops lose nothing that a caption places; a batch is of emoji or of scenes. Otherwise it did not learn in so few steps
           which object is where
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  b32 b16 rn50
           the released models on YFCC15M in DeCLIP's version, 32 epochs of batch 4,096. Give the data with a detector's regions
           (docs/regions.md), summaries in the field summary and tags in the field tags:
           --config.data='/data/yfcc15m/{00000..01538}.tar?columns=yfcc15m_regions?columns=yfcc15m_summaries.jsonl'
           Published ImageNet zero-shot top-1: B/32 46.0, B/16 50.7, RN50 47.8 % (CLIP: 32.8, 40.7, 37.2). Not run here
           Assumptions: batch, optimizer and schedule, which secondary notes give from memory; crops without further augmentation
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.data.views import PIXEL_FEATURES
from clip_jax.methods.pyramidclip import Options
from clip_jax.models.pyramid import PyramidViT
from clip_jax.models.towers import all_fields, use_size

PUBLISHED = {"b32": "PyramidCLIP-B/32", "b16": "PyramidCLIP-B/16", "rn50": "PyramidCLIP-RN50"}


def get_config(variant=""):
    if variant in PUBLISHED:
        c, options = published(PUBLISHED[variant]).unlock(), Options()
    elif variant not in ("", "smoke"):
        raise config.unknown("configs/pyramidclip.py has no variant", variant, ["smoke", *PUBLISHED])
    else:
        c = config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:scenes").unlock()
        options = small(c, variant == "smoke")
    c.method, c.pyramidclip = "pyramidclip", ConfigDict(dataclasses.asdict(options))
    return c.lock()


def small(c, smoke):
    fields = {name: value for name, value in c.model.image.items() if name in PyramidViT.__dataclass_fields__}
    c.model.image = all_fields(
        {"pyramid_vit": PyramidViT}, fields | dict(kind="pyramid_vit", front=1, region_dim=PIXEL_FEATURES + 4)
    )
    c.data.sampling = "one_source"
    if smoke:
        c.train.steps, c.train.log_steps, c.optim.warmup_steps, c.eval.steps, c.data.batch_size = 6, 2, 2, 0, 32
    options = dict(features="pixels", regions=4, local_augment=tuple(c.data.augment), summary=("{summary}", "{name}"))
    return Options(cross_global=0.05, cross_local=0.05, **options)


def published(size):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.data.augment = "clip_bpe", ("rrc(0.9, 1.0)",)
    c.data.batch_size, c.data.workers, c.train.steps = 4096, 8, 32 * 15_061_515 // 4096
    c.optim.update(dict(lr=5e-4, weight_decay=0.2, warmup_steps=2000))
    if size != "PyramidCLIP-RN50":
        c.optim.freeze = ("^img/patch/",)  # at its random values, as in MoCo v3
    c.eval.tasks = ()
    return c
