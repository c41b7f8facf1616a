"""FLIP (Li et al. 2023): CLIP on a random half of each image's patches, so that a step costs half.

    python -m clip_jax.train --config=configs/flip.py --workdir=runs/flip

Variants, after a colon:
  (none)    a small ViT on the embedded emoji pictures, made for 2 CPU cores
  smoke     the same in a few steps, under a minute with compilation; the result is near chance
  b16 l16 h14
            the published recipe on LAION-400M: 12.8 G examples in batches of 65,536, half of the patches. Give data and vocabulary:
            --config.data=/data/laion400m/{00000..41407}.tar --config.tokenizer=wordpiece:/data/vocab.txt?sot=false
            Expected ImageNet zero-shot top-1, after the tuning: B/16 68.0, L/16 74.3, H/14 75.5 %
            Assumptions: Adam's epsilon; query, key and value are initialised like other kernels, not smaller
  b16_tune l16_tune h14_tune
            the unmasked tuning of runs/flip_b16 ... (--config.init_from=PATH): 128 M examples, all patches; data, vocabulary as above
            Assumption: its batch, 65,536 as before
"""

import pathlib

from clip_jax import config

SIZES = {  # image tower, text tower, embedding
    "b16": (
        dict(patch=16, width=768, depth=12, heads=12, mlp_dim=3072),
        dict(width=512, depth=12, heads=8, mlp_dim=2048),
        512,
    ),
    "l16": (
        dict(patch=16, width=1024, depth=24, heads=16, mlp_dim=4096),
        dict(width=768, depth=12, heads=12, mlp_dim=3072),
        768,
    ),
    "h14": (
        dict(patch=14, width=1280, depth=32, heads=16, mlp_dim=5120),
        dict(width=1024, depth=24, heads=16, mlp_dim=4096),
        1024,
    ),
}
EPOCH = 1_281_167  # FLIP counts in epochs of ImageNet
VARIANTS = ["smoke", *SIZES, *(f"{size}_tune" for size in SIZES)]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/flip.py has no variant", variant, VARIANTS)
    size, _, tune = variant.partition("_")
    c = (
        published(size, bool(tune))
        if size in SIZES
        else config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant or 'emoji'}")
    )
    c.model.image.update(
        dict(pool="mean_all", cls_token=True, ln_pre=False, posemb="sincos2d", patch_drop=0.0 if tune else 0.5)
    )
    c.model.image.update(dict(stem=(), patch_bias=True, act="gelu_tanh", ln_eps=1e-6, weight_init="xavier"))
    if size not in SIZES:
        c.model.image.update(dict(patch=4, depth=3))
    return c


def published(size, tune):
    c = config.base()
    image, text, c.model.embed_dim = SIZES[size]
    c.model.image.update(image)
    c.model.text.update(
        dict(text, context=32, pool="first", causal=False, act="gelu_tanh", ln_eps=1e-6, weight_init="xavier")
    )
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    c.tokenizer = "wordpiece:vocab.txt?sot=false"
    c.data.augment, c.data.workers = ("rrc(0.5, 1.0)", "flip"), 8
    c.data.batch_size = 65536
    epochs, warmup = (100, 20) if tune else (10_000, 200 if size == "h14" else 40)
    c.train.steps, c.optim.warmup_steps = epochs * EPOCH // c.data.batch_size, warmup * EPOCH // c.data.batch_size
    c.optim.update(dict(lr=(4e-8 if tune else 4e-6) * c.data.batch_size / 256, b2=0.95, eps=1e-8, weight_decay=0.2))
    if size != "b16":
        c.model.remat, c.model.scan = "full", True
    c.init_from = f"runs/flip_{size}" if tune else ""
    c.eval.tasks = ()
    return c
