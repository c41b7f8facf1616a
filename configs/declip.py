"""DeCLIP (Li et al. 2022): CLIP with supervision within each modality, from more views and from nearest neighbours.

    python -m clip_jax.train --config=configs/declip.py --workdir=runs/declip

Variants, after a colon; clip_jax/methods/declip.py documents the section declip:
  (none)   model, data and optimizer of configs/clip.py:emoji, sized for 2 CPU cores, for half of its steps: a step runs
           each tower twice and costs 2.6 times CLIP's FLOPs (benchmarks/methods.py). README.md gives its result
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  small_paper small_slip small_defilip
           other sums of loss terms on the embedded images
  b32 rn50 the released recipe on YFCC15M: 32 epochs of batch 4096. --config.data=/data/yfcc15m/{00000..01538}.tar
           Expected ImageNet zero-shot top-1: B/32 43.2, RN50 44.4 % (CLIP, same recipe: 32.8, 37.2). Not run
  b32_paper b32_slip b32_defilip
           other sums of loss terms by the same recipe. Expected: SLIP 34.3, DeFILIP 45.0 %. Not run
           paper: the paper's weights as secondary sources give them. Assumption: means over the further pairs of views
"""

from clip_jax import config
from clip_jax.methods.declip import TERMS, Options
from clip_jax.models.towers import use_size

WEIGHTS = {
    "paper": dict(clip=0.4, multi_view=0.2, nn=0.2, simsiam=0.2, mlm=0.2),
    "slip": dict.fromkeys(TERMS, 0.0) | dict(clip=1.0, simclr=1.0),
    "defilip": dict(filip=0.2),  # in addition to the released weights
}
PUBLISHED = {"b32": "ViT-B/32", "rn50": "RN50"}
VARIANTS = ["smoke", *(f"small_{name}" for name in WEIGHTS), *PUBLISHED, *(f"b32_{name}" for name in WEIGHTS)]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/declip.py has no variant", variant, VARIANTS)
    size, _, weights = variant.partition("_")
    options = Options(**WEIGHTS.get(weights, {}))
    if size in PUBLISHED:
        return config.set_method(published(PUBLISHED[size]), "declip", options)
    c = config.sibling(__file__, "clip.py:smoke" if variant == "smoke" else "clip.py:emoji")
    config.set_method(c, "declip", options)
    c.declip.update(dict(head_width=256, predictor_width=64, wait_for_queue=True))
    c.declip.queue_size = 64 * c.data.batch_size  # 32 steps of two views
    if variant != "smoke":
        c.train.steps //= 2  # not much more than CLIP's FLOPs
    return c


def published(size):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.model.text.proj_bias = "clip_bpe?mask=true", True
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    moco_v2 = "rrc(0.2, 1.0)", "jitter(0.4, 0.4, 0.4, 0.1, p=0.8)", "gray(0.2)", "blur(0.1, 2.0, p=0.5)", "flip"
    c.data.augment = moco_v2
    c.data.batch_size, c.data.workers = 4096, 8
    c.train.steps = 128_000
    c.optim.update(dict(lr=1e-3, warmup_steps=2500, eps=1e-8, weight_decay=0.1))
    if size.startswith("ViT"):
        c.optim.freeze = ("^img/patch/",)  # stays at its random values, as in MoCo v3
    c.eval.transform, c.eval.tasks = ("resize(256)", "center_crop"), ()
    return c
