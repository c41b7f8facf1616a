"""ALIP (Yang et al. 2023): CLIP on a raw and a synthetic caption, weighted by how well they and the picture agree.

    python -m clip_jax.train --config=configs/alip.py --workdir=runs/alip

Variants, after a colon; fields of the section alip: clip_jax/methods/alip.py
  (none)   configs/clip.py:emoji's model, data and optimizer; the synthetic captions of the emoji come with the package: the name that a
           model of configs/clip.py:emoji finds best for a picture among all of the training set, its own or that of something alike, by
           python -m clip_jax.tools.caption --source=emoji --captioner=retrieval:runs/clip --out=emoji_captions.jsonl
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  b32      the released recipe on YFCC15M: 32 epochs of batch 4,096. Give the data with captions, whose field is synthetic (docs/texts.md):
           --config.data="/data/yfcc15m/{00000..01538}.tar?columns=yfcc15m_captions.jsonl"
           Published ImageNet zero-shot top-1: 40.3 % (CLIP: 32.8). Not run here
           Other than the released run's: the learning rate rises linearly from 0, not along a cosine from a 25th, and ends at 0; beta1 is
           constant, whereas torch's OneCycleLR, which they use with its defaults, moves it from 0.95 to 0.85 and back
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.alip import Options
from clip_jax.models.towers import use_size


def get_config(variant=""):
    if variant not in ("", "smoke", "b32"):
        raise config.unknown("configs/alip.py has no variant", variant, ["smoke", "b32"])
    if variant == "b32":
        c, options = published().unlock(), Options()
    else:
        c = config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant or 'emoji'}").unlock()
        c.data.source, options = (
            "emoji?columns=emoji_captions",
            Options(momentum=0.9),
        )  # the averages settle in some 30 steps, not 300
    c.method, c.alip = "alip", ConfigDict(dataclasses.asdict(options))
    return c.lock()


def published():
    c = config.base()
    use_size(c.model, "ViT-B/32")
    for tower in (c.model.image, c.model.text):
        tower.act = "gelu"
    c.tokenizer, c.data.workers, c.data.batch_size = "clip_bpe", 8, 4096
    c.data.augment = ("rrc(0.7, 1.0, ratio=(0.8, 1.25), interpolation='bilinear')", "flip")
    c.train.steps = 117_696
    c.optim.update(
        dict(
            lr=1e-3,
            warmup_steps=c.train.steps // 10,
            b1=0.9,
            b2=0.98,
            weight_decay=0.2,
            no_decay=(),
            grad_clip_norm=1.0,
        )
    )
    c.model.remat = "full"
    c.eval.tasks = ()
    return c
