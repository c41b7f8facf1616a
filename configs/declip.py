"""DeCLIP (Li et al. 2022): CLIP with supervision within each modality, from more views and from nearest neighbours.

    python -m clip_jax.train --config=configs/declip.py --workdir=runs/declip

Variants, after a colon; clip_jax/methods/declip.py documents the section declip, docs/recipes/declip.md every constant:
  (none)   model, data and optimizer of configs/clip.py:emoji, sized for 2 CPU cores, for half of its steps: a step runs
           each tower twice and costs 2.6 times CLIP's FLOPs (benchmarks/methods.py). docs/results.md gives its result
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  small_paper small_slip small_defilip other sums of loss terms, on emoji
  b32 rn50 the released recipe on YFCC15M: 32 epochs of batch 4096. --config.data=/data/yfcc15m/{00000..01538}.tar
           YFCC15M is DeCLIP's list of 15,388,848 pairs (docs/dataset_prepare.md of Sense-GVT/DeCLIP links it).
           Expected ImageNet zero-shot top-1: B/32 43.2, RN50 44.4 %. Not run
  b32_clip b32_slip b32_defilip
           the same repository's recipes of CLIP, SLIP and DeFILIP. Expected: 32.8, 34.3, 45.0 %. Not run
  b32_long_queue
           b32 with a queue that spans 256 steps, as that of each device of the released run
  b32_paper
           the paper's weights as secondary sources give them. Assumption: means over the further pairs of views
"""

from clip_jax import config
from clip_jax.methods.declip import TERMS, Options
from clip_jax.models.towers import use_size

MOCO_V2 = (
    "rrc(0.2, 1.0, interpolation='bilinear')", "jitter(0.4, 0.4, 0.4, 0.1, p=0.8)", "gray(0.2)",
    "blur(0.1, 2.0, p=0.5)", "flip",
)  # fmt: skip
NONE = dict.fromkeys(TERMS, 0.0)
OPTIONS = {
    "paper": dict(clip=0.4, multi_view=0.2, nn=0.2, simsiam=0.2, mlm=0.2),
    "clip": NONE | dict(clip=1.0),
    "slip": NONE | dict(clip=1.0, simclr=1.0, simclr_augment=MOCO_V2),
    "defilip": dict(filip=0.2),  # in addition to the released weights
    "long_queue": dict(queue_size=256 * 2 * 4096),
}
PUBLISHED = {"b32": "ViT-B/32", "rn50": "RN50"}
SMALL = [f"small_{name}" for name in ("paper", "slip", "defilip")]
VARIANTS = ["smoke", "small", *SMALL, *PUBLISHED, *(f"b32_{name}" for name in OPTIONS)]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/declip.py has no variant", variant, VARIANTS)
    size, _, name = variant.partition("_")
    options = Options(**OPTIONS.get(name, {}))
    if size in PUBLISHED:
        c = config.set_method(published(PUBLISHED[size], name), "declip", options)
    else:
        c = config.sibling(__file__, f"clip.py:{variant if variant in ('smoke', 'small') else 'emoji'}")
        config.set_method(c, "declip", options)
        c.declip.update(dict(head_width=256, predictor_width=64, simclr_width=256, filip_width=128))
        c.declip.update(dict(wait_for_queue=True, queue_size=64 * c.data.batch_size))  # 32 steps of two views
        c.declip.simclr_augment = ()  # the embedded images' own
        if variant not in ("smoke", "small"):
            c.train.steps //= 2  # not much more than CLIP's FLOPs
    if name == "defilip":
        c.model.image.token_norm = False
    return c


def published(size, name):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.model.text.proj_bias = "clip_bpe?mask=true", True
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.data.augment = ("rrc(0.5, 1.0, interpolation='bilinear')",) if name in ("clip", "slip") else MOCO_V2
    c.data.batch_size, c.data.workers = 4096, 8
    c.train.steps = 128_000
    # The released warm-up of 2,500 iterations, counted from 1, reaches the peak in its last one.
    c.optim.update(dict(lr=1e-3, warmup_from=1e-4, warmup_steps=2499, eps=1e-8, weight_decay=0.1))
    c.optim.no_decay = ("/bias$", "/scale$", "^logit_")
    if name == "slip":
        c.optim.lr, c.optim.weight_decay, c.model.logit_scale_max = 5e-4, 0.5, 6.0  # the loss bounds no scale
    if size.startswith("ViT"):
        c.optim.freeze = ("^img/patch/",)  # stays at its random values, as in MoCo v3
        c.model.image.weight_init = "declip"
    c.eval.transform, c.eval.tasks = ("resize(256, 'bilinear')", "center_crop"), ()
    return c
