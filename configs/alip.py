"""ALIP (Yang et al. 2023): CLIP on a raw and a synthetic caption, weighted by how well both and the image agree.

    python -m clip_jax.train --config=configs/alip.py --workdir=runs/alip

Variants, after a colon; clip_jax/methods/alip.py documents the section alip:
  (none)   model, data and optimizer of configs/clip.py:emoji. The package has the synthetic captions: the name
           in the training set that a model of configs/clip.py:emoji ranks first for an image, its own or a similar one:
           python -m clip_jax.tools.caption --source=emoji --captioner=retrieval:runs/clip --out=emoji_captions.jsonl
  small    for your own data, as configs/clip.py:small. Synthetic captions, by a model that was trained on it:
           python -m clip_jax.tools.caption --source=pairs.tsv --captioner=retrieval:runs/mine --out=captions.jsonl,
           then --config.data="pairs.tsv?columns=captions.jsonl"
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b32      the released recipe on YFCC15M: 32 epochs of batch 4,096. Give data whose field synthetic holds captions
           (docs/texts.md): --config.data="/data/yfcc15m/{00000..01538}.tar?columns=yfcc15m_captions.jsonl"
           Published ImageNet zero-shot top-1: 40.3 % (CLIP: 32.8). Not run here
           docs/recipes/alip.md lists the constants, which are those of the released run
"""

from clip_jax import config
from clip_jax.methods.alip import Options
from clip_jax.models.towers import use_size

VARIANTS = ["smoke", "small", "b32"]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/alip.py has no variant", variant, VARIANTS)
    if variant == "b32":
        return config.set_method(published(), "alip", Options())
    c = config.sibling(__file__, f"clip.py:{variant or 'emoji'}")
    c.data.source = "" if variant == "small" else "emoji?columns=emoji_captions"
    if variant == "small":
        command = "python -m clip_jax.tools.caption --source=DATA --captioner=retrieval:RUN --out=captions.jsonl"
        c.small.needs = ("synthetic", f"{command}, then --config.data='DATA?columns=captions.jsonl'")
    return config.set_method(c, "alip", Options(momentum=0.9))  # the averages settle in some 30 steps, not 300


def published():
    c = config.base()
    use_size(c.model, "ViT-B/32")
    c.model.image.act = c.model.text.act = "gelu"
    c.model.remat = "full"
    c.tokenizer = "clip_bpe"
    c.data.batch_size, c.data.workers = 4096, 8
    c.data.augment = ("rrc(0.7, 1.0, ratio=(0.8, 1.25), interpolation='bilinear')", "flip")
    c.train.steps = 117_696
    # OneCycleLR with PyTorch's defaults, which also moves b1.
    c.optim.update(dict(schedule="onecycle", lr=1e-3, warmup_steps=c.train.steps // 10, b1_cycle=(0.95, 0.85)))
    c.optim.update(dict(b2=0.98, eps=1e-8, weight_decay=0.2, no_decay=(), grad_clip_norm=1.0))
    c.eval.tasks, c.eval.transform = (), ("resize(256, interpolation='bilinear')", "center_crop")
    return c
