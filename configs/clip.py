"""CLIP (Radford et al. 2021).

    python -m clip_jax.train --config=configs/clip.py --workdir=runs/clip

Variants, after a colon:
  (none)   a small model on emoji and clip art (no held-out concept in it) for 2 CPU cores; result in docs/results.md
  small    for your own data on one small machine (clip_jax/small.py): --config.data=pairs.tsv, or a folder of images
  finetune tunes weights of a run or of others on your data: --config.init_from=PATH --config.data=PATH
  emoji    the same on emoji alone: the control of the other methods' configurations
  smoke    a few steps on emoji, under a minute with compilation; accuracy near chance
  scenes   the control of configs/filip.py:scenes; two of three images show two emoji, and the caption says how they lie
  b32 b16 l14 rn50 rn101 rn50x4
           the paper's recipe (docs/recipes/clip.md): 32 epochs of 400 M pairs. --config.data=/data/pairs/*.tar
           Expected ImageNet zero-shot top-1 on OpenAI's data, RN50x4 excepted: 63.3, 68.3, 75.5, 59.8, 62.3 %
  l14_336  one more epoch of a finished l14 run at 336 pixels: --config.init_from=runs/clip_l14. Expected 76.6 %
  h14      open_clip's H/14 on LAION-2B; expected 78.0 %. Assumption: its learning rate
"""

from clip_jax import config, from_weights, small
from clip_jax.models.towers import use_size

SIZES = {"b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14", "l14_336": "ViT-L/14@336", "h14": "ViT-H/14"}
SIZES |= {"rn50": "RN50", "rn101": "RN101", "rn50x4": "RN50x4"}
VARIANTS = ["small", "finetune", "emoji", "smoke", "scenes", *SIZES]


def get_config(variant=""):
    bases = {"finetune": from_weights.base, "small": small.base}
    c = published(SIZES[variant]) if variant in SIZES else bases.get(variant, embedded)()
    if variant == "":
        c.data.source, c.train.steps = "emoji*3 + openclipart?without=emoji&has=keywords*1", 1250
        c.data.templates += ("{caption}, {keywords}",)  # only clip art has captions, only emoji have names
    elif variant == "scenes":
        scenes(c)
    elif variant == "smoke":
        c.data.batch_size, c.eval.steps = 64, 0
        c.update(train=dict(steps=10, log_steps=2), optim=dict(warmup_steps=2))
    elif variant not in VARIANTS:
        raise config.unknown("configs/clip.py has no variant", variant, VARIANTS)
    return c


def published(size):
    c = config.base()
    use_size(c.model, size)
    samples, c.data.batch_size = (32_000_000_000, 79104) if size == "ViT-H/14" else (32 * 400_000_000, 32768)
    c.train.steps = samples // c.data.batch_size // (32 if "@336" in size else 1)
    c.init_from, c.init_from_resize = ("runs/clip_l14", True) if "@336" in size else ("", False)
    c.model.update(dict(remat="full", scan=True) if size.startswith(("ViT-L", "ViT-H")) else {})  # docs/scaling.md
    c.optim.update(dict(b2=0.999, eps=1e-8) if size.startswith("RN") else {})
    c.optim.lr, c.eval.tasks = {"ViT-L/14": 4e-4, "ViT-L/14@336": 2e-5}.get(size, 5e-4), ()
    c.tokenizer, c.data.workers = "clip_bpe", 8
    return c


def embedded():
    c = config.base()  # tags: a random subset in random order; word dropout: unseen names consist of seen words
    c.data.templates, c.data.word_dropout = ("{name}, {tags}", "{name}, {tags}", "{name}"), 0.2
    c.data.augment = ("random_background(0.5)", "rrc(0.5, 1.0)", "flip", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.update(dict(embed_dim=128, dtype="float32", logit_scale_init=3.4))  # ln 30: an easier task than the paper's
    tower = dict(width=128, heads=2, mlp_dim=512, act="gelu_tanh")
    c.model.image.update(dict(tower, size=32, stem=(32, 64, 128), depth=2, pool="gap", cls_token=False, ln_pre=False))
    c.model.text.update(dict(tower, context=12, depth=1, pool="mean", causal=False, mask_padding=True))
    c.optim.update(dict(lr=3e-3, warmup_steps=50, weight_decay=0.1, grad_clip_norm=1.0))
    c.update(train=dict(steps=1400), checkpoint=dict(steps=350), eval=dict(steps=350))
    c.eval.train_tasks, c.eval.transform = ("emoji(subset='val')",), ("resize(36)", "center_crop")  # crops enlarge
    return c


def scenes(c):
    # With few pairs a batch repeats some. In reading order "a above b" is never "b below a", which learns far slower.
    objects = "scenes?objects=2&concepts=24&pairs=48&told=reading"
    templates = (*c.data.templates, "{caption}")  # only scenes have captions, only emoji have names
    c.data.update(dict(source=f"emoji*1 + {objects}*2", batch_size=128, templates=templates, word_dropout=0.0))
    # No flip and hardly a crop: left stays left, and the image keeps all that its caption names.
    c.data.augment = ("random_background(0.5)", "rrc(0.85, 1.0, (0.9, 1.11))", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.update(image=dict(size=64, stem=(24, 48, 96, 128)), text=dict(context=28))  # 4 patches for an object
    c.update(train=dict(steps=800), checkpoint=dict(steps=400), eval=dict(steps=400))
    c.eval.tasks, c.eval.transform = ("emoji()", f"relations(source='{objects}')"), ("resize", "center_crop")
    c.eval.train_tasks += (f"relations(source='{objects}', split='val', name='scenes_val', limit=600)",)
