"""CLIP (Radford et al. 2021).

    python -m clip_jax.train --config=configs/clip.py --workdir=runs/clip

Variants, after a colon:
  (none)   a small model on the embedded pictures, made for 2 CPU cores; README.md gives its result. Three of four pictures are emoji, one
           is clip art with its authors' keywords, but for what they name that the emoji set holds out
  emoji    the same on emoji alone, the control of the other methods' configurations
  smoke    emoji in a few steps, under a minute with compilation; the result is near chance
  scenes   the control of configs/filip.py:scenes: two of three pictures are scenes of two emoji, with captions that say how they lie
  b32 b16 l14 l14_336 rn50 rn101 rn50x4
           the paper's recipe on 400 M pairs: 32 epochs of batch 32,768. Give the data: --config.data=/data/pairs/{00000..41407}.tar
           Expected ImageNet zero-shot top-1 (OpenAI's data): B/32 63.3, B/16 68.3, L/14 75.5, L/14@336 76.6, RN50 59.8, RN101 62.3 %
  h14      open_clip's H/14: 32 G samples of LAION-2B in batches of 79,104; expected 78.0 %. Its learning rate is an assumption
"""

from clip_jax import config
from clip_jax.models.towers import use_size

# Learning rates: Radford et al. 2021, table 20 (l14_336: one more epoch of l14 at the higher resolution)
PUBLISHED = {
    "b32": ("ViT-B/32", 5e-4),
    "b16": ("ViT-B/16", 5e-4),
    "l14": ("ViT-L/14", 4e-4),
    "l14_336": ("ViT-L/14@336", 2e-5),
}
PUBLISHED |= {"h14": ("ViT-H/14", 5e-4), "rn50": ("RN50", 5e-4), "rn101": ("RN101", 5e-4), "rn50x4": ("RN50x4", 5e-4)}


def get_config(variant=""):
    if variant in PUBLISHED:
        return published(*PUBLISHED[variant])
    c = embedded()
    if variant == "":
        c.data.source, c.train.steps = "emoji*3 + openclipart?without=emoji&has=keywords*1", 1250
        c.data.templates += ("{caption}, {keywords}",)  # only clip art has captions, only emoji names
    elif variant == "scenes":
        scenes(c)
    elif variant == "smoke":
        c.train.steps, c.train.log_steps, c.optim.warmup_steps, c.eval.steps, c.data.batch_size = 10, 2, 2, 0, 64
    elif variant != "emoji":
        raise config.unknown("configs/clip.py has no variant", variant, ["emoji", "smoke", "scenes", *PUBLISHED])
    return c


def published(size, lr):
    c = config.base()
    c.tokenizer, c.eval.tasks = "clip_bpe", ()
    use_size(c.model, size)
    samples, c.data.batch_size = (32_000_000_000, 79104) if size == "ViT-H/14" else (32 * 400_000_000, 32768)
    c.train.steps, c.data.workers, c.optim.lr = samples // c.data.batch_size // (32 if "@336" in size else 1), 8, lr
    if size.startswith(("ViT-L", "ViT-H")):  # L/14 fits 256 chips of 16 GB: docs/scaling.md
        c.model.remat, c.model.scan = "full", True
    c.optim.update(dict(b2=0.999, eps=1e-8) if size.startswith("RN") else {})
    return c


def embedded():
    c = config.base()
    c.data.templates = ("{name}, {tags}", "{name}, {tags}", "{name}")  # tags: a random part of them, in random order
    c.data.word_dropout = 0.2  # a word of a name is learned apart from the others: unseen names are made of seen words
    c.data.augment = ("random_background(0.5)", "rrc(0.5, 1.0)", "flip", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.embed_dim, c.model.dtype = 128, "float32"
    c.model.logit_scale_init = 3.4  # 30: these pictures are easier to tell apart than the paper's
    tower = dict(width=128, heads=2, mlp_dim=512, act="gelu_tanh")
    c.model.image.update(dict(tower, size=32, stem=(32, 64, 128), depth=2, pool="gap", cls_token=False, ln_pre=False))
    c.model.text.update(dict(tower, context=12, depth=1, pool="mean", causal=False, mask_padding=True))
    c.optim.update(dict(lr=3e-3, warmup_steps=50, weight_decay=0.1, grad_clip_norm=1.0))
    c.train.steps, c.checkpoint.steps, c.eval.steps = 1400, 350, 350
    c.eval.transform = ("resize(36)", "center_crop")  # random crops have shown training the pictures enlarged
    c.eval.train_tasks = ("emoji(subset='val')",)
    return c


def scenes(c):
    # Few pairs come back in a batch; told in any order, "a above b" would be "b below a", which takes far longer to learn.
    objects = "scenes?objects=2&concepts=24&pairs=48&told=reading"
    templates = (*c.data.templates, "{caption}")  # only scenes have captions, only emoji names
    c.data.update(dict(source=f"emoji*1 + {objects}*2", batch_size=128, templates=templates, word_dropout=0.0))
    # No flip, and hardly a crop: left stays left, and all that a caption names stays in the picture.
    c.data.augment = ("random_background(0.5)", "rrc(0.85, 1.0, (0.9, 1.11))", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.model.image.update(dict(size=64, stem=(24, 48, 96, 128)))  # 16 patches, 4 for the cell of each object
    c.model.text.context, c.train.steps, c.checkpoint.steps = 28, 800, 400  # 28: the longest caption
    c.eval.update(
        dict(steps=400, transform=("resize", "center_crop"), tasks=("emoji()", f"relations(source='{objects}')"))
    )
    c.eval.train_tasks += (f"relations(source='{objects}', split='val', name='scenes_val', limit=600)",)
