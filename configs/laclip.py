"""LaCLIP (Fan et al. 2023): CLIP on captions and their rewrites by a language model.

    python -m clip_jax.train --config=configs/laclip.py --workdir=runs/laclip

Variants, after a colon; clip_jax/methods/laclip.py documents the section laclip:
  (none)   model, data and optimizer of configs/clip.py:emoji. The package has four rewrites of each emoji's name, made
           without a language model: python -m clip_jax.tools.rewrite --source=emoji --llm=offline
           --out=emoji_rewrites.jsonl && xz -9e emoji_rewrites.jsonl
  mt       LaCLIP-MT: the batch holds all five texts of an image
  slip     LaSLIP: configs/declip.py:small_slip on the same texts
  small    for your own data, as configs/clip.py:small. Rewrites of its captions:
           python -m clip_jax.tools.rewrite --source=pairs.tsv --llm=offline --out=rewrites.jsonl, then
           --config.data="pairs.tsv?columns=rewrites.jsonl"
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  cc3m cc12m redcaps
           the paper's recipe, ViT-B/16: 40, 35, 30 epochs of batch 8,192. Give data with rewrites (docs/texts.md):
           --config.data="/data/cc12m/{00000..01242}.tar?columns=cc12m_rewrites.jsonl"
           Published ImageNet zero-shot top-1: 21.5, 48.4, 46.2 % (CLIP: 15.8, 40.2, 42.9). Not run here
  laion_b32 laion_b16 laion_l14
           LAION-400M, 32 epochs of batch 32,768. Published: 64.4, 69.3, 74.5 % (CLIP: 62.0, 67.0, 71.8). Not run here
           Assumption: CC12M's learning rate and weight decay hold for CC3M and RedCaps. Table: docs/recipes/laclip.md
"""

from clip_jax import config
from clip_jax.methods.laclip import Options
from clip_jax.models.towers import use_size

# Pairs, epochs
PAIRS = {"cc3m": (2_900_000, 40), "cc12m": (11_000_000, 35), "redcaps": (12_000_000, 30), "laion": (400_000_000, 32)}
LAION = {"b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14"}
SMALL = ("", "smoke", "small", "mt", "slip")
PUBLISHED = ("cc3m", "cc12m", "redcaps", *(f"laion_{size}" for size in LAION))
VARIANTS = [*SMALL[1:], *PUBLISHED]


def get_config(variant=""):
    if variant in PUBLISHED:
        c = published(*variant.partition("_")[::2])
    elif variant not in SMALL:
        raise config.unknown("configs/laclip.py has no variant", variant, VARIANTS)
    else:
        plain = f"clip.py:{variant if variant in ('smoke', 'small') else 'emoji'}"
        base = "declip.py:small_slip" if variant == "slip" else plain
        c = config.sibling(__file__, base)
        c.data.source = "" if variant == "small" else "emoji?columns=emoji_rewrites"
        if variant == "small":
            command = "python -m clip_jax.tools.rewrite --source=DATA --llm=offline --out=rewrites.jsonl"
            c.small.needs = ("rewrites", f"{command}, then --config.data='DATA?columns=rewrites.jsonl'")
    c.data.rewrites = ("rewrites",)
    return c if variant == "slip" else config.set_method(c, "laclip", Options(multi_text=variant == "mt"))


def published(data, size):
    c, (pairs, epochs) = config.base(), PAIRS[data]
    use_size(c.model, LAION[size] if data == "laion" else "ViT-B/16")
    c.tokenizer, c.data.augment = "clip_bpe", ("rrc(0.5, 1.0, interpolation='bilinear')",)
    c.optim.update(dict(lr=5e-4, eps=1e-8))
    if data == "laion":
        c.data.batch_size, c.data.augment = 32768, ("rrc(0.5, 1.0)",)
        c.model.image.act = c.model.text.act = "quick_gelu" if size == "l14" else "gelu"  # open_clip's
    else:
        c.data.batch_size, c.eval.transform = 8192, ("resize(interpolation='bilinear')", "center_crop")
        c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
        # The code decays all matrices, the class token and the positions among them.
        no_decay = ("/bias$", "/scale$", "^logit_")
        c.optim.update(dict(lr=1e-3, weight_decay=0.5, no_decay=no_decay, warmup_from=1e-6, lr_end=0.01))
        c.model.image.update(dict(act="gelu", ln_pre=False, patch_bias=True, ln_eps=1e-6, qk_norm=True))
        c.model.image.weight_init = "timm_qk_norm"
    epoch = pairs // c.data.batch_size
    c.train.steps, c.optim.warmup_steps = epochs * epoch, epoch
    c.data.workers, c.eval.tasks = 8, ()
    return c
