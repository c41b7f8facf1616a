"""RA-CLIP (Xie et al. 2023): pictures that look up similar pairs.

    python -m clip_jax.train --config=configs/raclip.py --workdir=runs/raclip
    python -m clip_jax.train --config=configs/raclip.py --workdir=runs/raclip --config.raclip.encoder=runs/clip   # neighbours by a CLIP
    ... --config.raclip.encoder=efficientnet_lite0   # by a network trained with ImageNet's classes: not from scratch any more
    python -m clip_jax.evaluate --checkpoint=runs/raclip --config.raclip.use_bank=false                           # without retrieval

Variants, after a colon:
  (none)  small, on the embedded emoji pictures, for 2 CPU cores; a tenth of them is the reference set, neighbours are found by pixels
  smoke   the same in a few steps, under a minute with compilation; the result is near chance
  b32     ViT-B/32 on YFCC15M, a tenth held out, 32 epochs. Give both parts and an encoder (the paper's is a ViT trained by DINO):
          --config.data='/data/yfcc/{0000..1506}.tar?part=record:!1/10'
          --config.raclip.reference='/data/yfcc/{0000..1506}.tar?part=record:1/10' --config.raclip.encoder=runs/slip
          The paper's ImageNet zero-shot top-1: 53.5 % (from a survey's table), CLIP's on the same data: 32.8 %
          Batch and optimizer are ALIP's and CLIP's, an assumption: the paper's are not known
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.raclip import Options


def get_config(variant=""):
    if variant not in ("", "smoke", "b32"):
        raise config.unknown("configs/raclip.py has no variant", variant, ["smoke", "b32"])
    c = config.load(f"{pathlib.Path(__file__).with_name('clip.py')}:{variant or 'emoji'}").unlock()
    c.method, c.raclip = "raclip", ConfigDict(dataclasses.asdict(Options()))
    if variant == "b32":
        c.data.batch_size, c.optim.lr = 4096, 1e-3
        c.train.steps = 32 * 13_600_000 // c.data.batch_size
        c.raclip.bank_size = 1_600_000  # for clip_jax.compile; training counts them
    else:
        c.data.source, c.raclip.reference = "emoji?part=record:!1/10", "emoji?part=record:1/10"
        c.raclip.update(dict(k=8, heads=4, out_init="zeros"))
    return c.lock()
