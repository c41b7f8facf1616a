"""DeCLIP (Li et al. 2022): CLIP with supervision within each modality, from more views and from nearest neighbours.

    python -m clip_jax.train --config=configs/declip.py --workdir=runs/declip

Variants, after a colon; fields of the section declip: clip_jax/methods/declip.py
  (none)   configs/clip.py:emoji's model, data and optimizer, made for 2 CPU cores, in half of its steps: one has two passes of each tower
           and 2.6 times CLIP's FLOPs (benchmarks/methods.py). README.md gives its result
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  small_paper small_slip small_defilip
           other sums of terms on the embedded pictures
  b32 rn50 the released recipe on YFCC15M: 32 epochs of batch 4096. Give the data: --config.data=/data/yfcc15m/{00000..01538}.tar
           Expected ImageNet zero-shot top-1: B/32 43.2, RN50 44.4 % (CLIP, same recipe: 32.8, 37.2). Not run
  b32_paper b32_slip b32_defilip
           other sums of terms by the same recipe. Expected: SLIP 34.3, DeFILIP 45.0 %. Not run
           paper: the weights of the paper as secondary notes give them, the means over further pairs of views an assumption
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.declip import TERMS, Options
from clip_jax.models.towers import use_size

WEIGHTS = {
    "paper": dict(clip=0.4, multi_view=0.2, nn=0.2, simsiam=0.2, mlm=0.2),
    "slip": dict.fromkeys(TERMS, 0.0) | dict(clip=1.0, simclr=1.0),
    "defilip": dict(filip=0.2),  # beside the released weights
}
PUBLISHED = {"b32": "ViT-B/32", "rn50": "RN50"}
VARIANTS = ["smoke", *(f"small_{name}" for name in WEIGHTS), *PUBLISHED, *(f"b32_{name}" for name in WEIGHTS)]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/declip.py has no variant", variant, VARIANTS)
    size, _, weights = variant.partition("_")
    clip = f"{pathlib.Path(__file__).with_name('clip.py')}:{'smoke' if variant == 'smoke' else 'emoji'}"
    c = (published(PUBLISHED[size]) if size in PUBLISHED else config.load(clip)).unlock()
    c.method = "declip"
    c.declip = ConfigDict(dataclasses.asdict(Options(**WEIGHTS.get(weights, {}))))
    if size not in PUBLISHED:
        if variant != "smoke":
            c.train.steps //= 2  # not much more than CLIP's FLOPs
        c.declip.update(
            dict(head_width=256, predictor_width=64, queue_size=64 * c.data.batch_size, wait_for_queue=True)
        )  # 32 steps
    return c.lock()


def published(size):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.model.text.proj_bias = "clip_bpe?mask=true", True
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.data.augment = (
        "rrc(0.2, 1.0)",
        "jitter(0.4, 0.4, 0.4, 0.1, p=0.8)",
        "gray(0.2)",
        "blur(0.1, 2.0, p=0.5)",
        "flip",
    )  # MoCo v2
    c.data.batch_size, c.data.workers, c.train.steps = 4096, 8, 128_000
    c.optim.update(dict(lr=1e-3, warmup_steps=2500, eps=1e-8, weight_decay=0.1))
    if size.startswith("ViT"):
        c.optim.freeze = ("^img/patch/",)  # at its random values, as in MoCo v3
    c.eval.transform, c.eval.tasks = ("resize(256)", "center_crop"), ()
    return c
