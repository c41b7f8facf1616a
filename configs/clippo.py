"""CLIPPO (Tschannen et al. 2023): one tower, which reads texts as images drawn with a font; no tokenizer.

    python -m clip_jax.train --config=configs/clippo.py --workdir=runs/clippo

Variants, after a colon:
  (none)   a small model on the embedded emoji, named in 28 languages, evaluated in English and Korean; for 2 CPU cores
           docs/results.md gives its accuracy with --config.train.steps=2400; all 3,000 steps were not run
  small    for your own data, as configs/clip.py:small, at 128 pixels
  smoke    a few steps of the default; accuracy near chance
  b16 l16  the paper's recipe (docs/recipes/clippo.md), 100,000 steps of batch 10,240 without augmentation. Data:
           --config.data=/data/pairs/{00000..41407}.tar; for a quarter of text pairs, over 333,000 steps:
           --config.data="/data/pairs/*.tar*3 + text:/data/c4/*.jsonl*1"
           The published font is unifont_9.0.06 (--config.tokenizer=unifont:FILE)
           Published ImageNet zero-shot top-1: LAION-400M, B/16 53.6 %; YFCC, 250,000 steps: 43.4 %, from ImageNet-21k's
           weights 47.4 %, and 44.8 % with a quarter of text pairs, which lower it
"""

from clip_jax import config, small

SIZES = {
    "b16": dict(width=768, depth=12, heads=12, mlp_dim=3072),
    "l16": dict(width=1024, depth=24, heads=16, mlp_dim=4096),
}
VARIANTS = ["smoke", "small", *SIZES]
LANGUAGES = "bn da de en en_gb es es_mx et fi fr hi hu it ja ko lt ms nb nl pl pt ru sv th uk vi zh zh_hant".split()


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/clippo.py has no variant", variant, VARIANTS)
    c = small.base(sizes=(128,)) if variant == "small" else config.base()
    c.method, c.tokenizer = "clippo", "unifont"  # the font takes the tokenizer's place; unifont:FILE names another one
    with c.unlocked():
        del c.model.text
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)  # to [-1, 1]
    c.model.logit_scale_init, c.model.logit_scale_max = 2.3026, float("inf")  # ln 10; no bound
    c.model.image.update(dict(patch=16, pool="map", cls_token=False, ln_pre=False, patch_bias=True, proj_bias=True))
    c.model.image.update(dict(act="gelu_tanh", ln_eps=1e-6, weight_init="xavier"))
    if variant in SIZES:
        return published(c, SIZES[variant])
    if variant == "small":
        return c
    embedded(c)
    if variant == "smoke":
        c.train.update(dict(steps=10, log_steps=2))
        c.optim.warmup_steps, c.eval.steps = 2, 0
        c.data.batch_size, c.eval.tasks = 64, c.eval.train_tasks
    return c


def published(c, size):
    c.model.image.update(size)
    c.model.embed_dim = 768
    c.data.augment = c.eval.transform = ("squash(interpolation='bilinear', antialias=False)",)
    c.data.batch_size, c.data.workers = 10240, 8
    c.train.steps, c.eval.tasks = 100_000, ()
    c.optim.update(dict(name="adafactor", lr=1e-3, schedule="rsqrt", timescale=10_000, cooldown_steps=10_000))
    c.optim.update(dict(warmup_steps=10_000, warmup_from=0.0, grad_clip_norm=1.0))
    c.optim.weight_decay = 0.1  # times the learning rate: big_vision's 1e-4, which it does not multiply
    c.optim.no_decay = ("^(?!.*/kernel$)",)
    return c


def embedded(c):
    names = tuple(f"{{name_{language}}}" for language in LANGUAGES)
    # Of 168 captions, English has 102, Korean 41, each other language one, or two if it is listed in two variants.
    c.data.templates = ("{name}",) * 100 + ("{name_ko}",) * 40 + names
    c.data.augment = ("random_background(0.5)", "rrc(0.5, 1.0)", "flip", "jitter(0.2, 0.2, 0.2, 0.0)")
    c.data.batch_size = 128
    c.model.embed_dim, c.model.dtype = 128, "float32"
    # Four rows of about eight letters, in the paper's patches: a stem of convolutions learned more slowly here.
    c.model.image.update(dict(width=128, heads=2, mlp_dim=512, size=64, depth=3))
    # Without a warm-up, or at a higher learning rate, all embeddings collapse to one and the loss stays at ln(batch).
    c.optim.update(dict(lr=1e-3, warmup_steps=100, b2=0.999, eps=1e-8, weight_decay=0.1, grad_clip_norm=1.0))
    c.train.steps = 3000
    c.eval.transform = ("resize(72)", "center_crop")  # training's random crops enlarge the images
    c.checkpoint.steps = c.eval.steps = 1000
    c.eval.train_tasks = ("emoji(subset='val')", "emoji(subset='val', language='ko')")
    c.eval.tasks = ("emoji", "emoji(language='ko')")
    return c
