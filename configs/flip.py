"""FLIP (Li et al. 2023): CLIP on a random half of each image's patches, which halves the cost of a step.

    python -m clip_jax.train --config=configs/flip.py --workdir=runs/flip

Variants, after a colon:
  (none)   a small ViT on the embedded emoji images, sized for 2 CPU cores
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b16 l16 h14
           the published recipe (docs/recipes/flip.md): 12.8 G examples of LAION-400M, half of the patches. Data, words:
           --config.data=/data/laion400m/{00000..41407}.tar
           --config.tokenizer="wordpiece:/data/vocab.txt?sot=false&eot=false"
           Expected ImageNet zero-shot top-1, after the tuning: B/16 68.0, L/16 74.3, H/14 75.5 %
           Assumption: Adam's epsilon
  b16_tune l16_tune h14_tune
           the unmasked tuning of runs/flip_b16, ... (--config.init_from=PATH): 128 M examples, all patches; data and
           vocabulary as above. Assumption: its batch size is 65,536 as well
"""

from clip_jax import config

# Width, depth, heads, MLP width of the image tower and of the text tower, patch size
SIZES = {
    "b16": ((768, 12, 12, 3072), (512, 12, 8, 2048), 16),
    "l16": ((1024, 24, 16, 4096), (768, 12, 12, 3072), 16),
    "h14": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 14),
}
EPOCH = 1_281_167  # FLIP counts in epochs of ImageNet
VARIANTS = ["smoke", "small", *SIZES, *(f"{size}_tune" for size in SIZES)]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/flip.py has no variant", variant, VARIANTS)
    size, _, tune = variant.partition("_")
    if size in SIZES:
        c = published(size, bool(tune))
    else:
        c = config.sibling(__file__, f"clip.py:{variant or 'emoji'}")
        if variant == "small":  # with CLIP's towers, so that a run can be exported
            c.model.image.patch_drop = 0.5
            return c
        c.model.image.update(dict(patch=4, depth=3))
    c.model.image.update(dict(stem=(), pool="mean_all", cls_token=True, ln_pre=False, posemb="sincos2d_moco"))
    c.model.image.update(dict(patch_bias=True, act="gelu_tanh", ln_eps=1e-6, weight_init="flip"))
    c.model.image.patch_drop = 0.0 if tune else 0.5
    return c


def published(size, tune):
    c = config.base()
    names = ("width", "depth", "heads", "mlp_dim")
    image, text, patch = SIZES[size]
    c.model.image.update(dict(zip(names, image, strict=True), patch=patch))
    c.model.text.update(dict(zip(names, text, strict=True), context=32, pool="first", causal=False))
    c.model.text.update(dict(act="gelu_tanh", ln_eps=1e-6, weight_init="flip"))
    c.model.embed_dim = c.model.text.width
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.tokenizer = "wordpiece:vocab.txt?sot=false&eot=false"
    c.data.augment = ("rrc(0.5, 1.0, antialias=False)", "flip")
    c.data.batch_size, c.data.workers = 65536, 8
    epochs, warmup = (100, 20) if tune else (10_000, 200 if size == "h14" else 40)
    c.train.steps, c.optim.warmup_steps = epochs * EPOCH // c.data.batch_size, warmup * EPOCH // c.data.batch_size
    c.optim.update(dict(lr=(4e-8 if tune else 4e-6) * c.data.batch_size / 256, warmup_from=0.0, b2=0.95, eps=1e-8))
    c.optim.update(dict(weight_decay=0.2, no_decay=("/bias$", "/scale$", "/pos$")))
    if size != "b16":
        c.model.remat, c.model.scan = "full", True
    c.init_from = f"runs/flip_{size}" if tune else ""
    c.eval.tasks = ()
    return c
