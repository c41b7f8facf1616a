"""RA-CLIP (Xie et al. 2023): an image looks up similar pairs in a reference set.

    python -m clip_jax.train --config=configs/raclip.py --workdir=runs/raclip

Neighbours by a CLIP, or by a network trained on ImageNet's classes, so that training is no longer from scratch:
    ... --config.raclip.encoder=runs/clip
    ... --config.raclip.encoder=efficientnet_lite0
Evaluation without retrieval augmentation:
    python -m clip_jax.evaluate --checkpoint=runs/raclip --config.raclip.use_bank=false

Variants, after a colon; clip_jax/methods/raclip.py documents the section raclip:
  (none)   small, on the embedded emoji, for 2 CPU cores. A tenth of them is the reference set, searched by pixels
  small    for your own data, as configs/clip.py:small. A tenth of it is the reference set
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b32      ViT-B/32 on YFCC15M, a tenth held out, 32 epochs. Give both parts and the frozen encoders (the paper's:
           DINO's ViT and a sentence transformer; which ones is an assumption):
           --config.data='/data/yfcc/{0000..1506}.tar?part=record:!1/10'
           --config.raclip.reference='/data/yfcc/{0000..1506}.tar?part=record:1/10'
           --config.raclip.encoder="img=/data/dino_vitbase16.pth, txt=/data/all-mpnet-base-v2"
           The paper's ImageNet zero-shot top-1: 53.5 % (from a survey's table); CLIP's on the same data: 32.8 %
           Assumption: batch size and optimizer are ALIP's and CLIP's; the paper's are not known
           Table: docs/recipes/raclip.md
"""

from clip_jax import config
from clip_jax.methods.raclip import Options

VARIANTS = ["smoke", "small", "b32"]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/raclip.py has no variant", variant, VARIANTS)
    c = config.sibling(__file__, f"clip.py:{variant or 'emoji'}")
    if variant == "b32":
        c.data.batch_size, c.optim.lr = 4096, 1e-3
        c.train.steps = 32 * 13_600_000 // c.data.batch_size
        options = Options(bank_size=1_600_000)  # for clip_jax.compile; training counts the records
    elif variant == "small":
        c.small.apart = "raclip.reference"
        options = Options(k=4, heads=3, out_init="zeros")
    else:
        c.data.source = "emoji?part=record:!1/10"
        options = Options(reference="emoji?part=record:1/10", k=8, heads=4, out_init="zeros")
    return config.set_method(c, "raclip", options)
