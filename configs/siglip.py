"""SigLIP (Zhai et al. 2023).

    python -m clip_jax.train --config=configs/siglip.py --workdir=runs/siglip

Variants, after a colon:
  (none)   model, data and optimizer of configs/clip.py:emoji with the sigmoid loss, sized for 2 CPU cores
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  finetune configs/clip.py:finetune for weights of SigLIP, with its loss
  b16_224 l16_256 so400m_14_224 siglip2_b16_256
           the published models. Give data and tokenizer: --config.data=/data/pairs/{00000..41407}.tar
           --config.tokenizer="sentencepiece:/data/c4_en.model?lower=true&pad_with_eot=true" (siglip2: Gemma's)
           Expected ImageNet zero-shot top-1 (WebLI): 76.0, 80.4, 82.0; SigLIP 2: 79.1 %, with a decoder and
           self-distillation that are missing here
           Assumption: SigLIP trains as long as SigLIP 2, 40 G examples with 20,000 warm-up steps
"""

import math

from clip_jax import config
from clip_jax.models.towers import use_size

PUBLISHED = {"b16_224": "SigLIP-B/16-224", "l16_256": "SigLIP-L/16-256", "so400m_14_224": "SigLIP-So400m/14-224"}
PUBLISHED |= {"siglip2_b16_256": "SigLIP2-B/16-256"}
VARIANTS = ["smoke", "small", "finetune", *PUBLISHED]


def get_config(variant=""):
    if variant in PUBLISHED:
        c = published(PUBLISHED[variant])
    elif variant in ("", "smoke", "small", "finetune"):
        c = config.sibling(__file__, f"clip.py:{variant or 'emoji'}")
    else:
        raise config.unknown("configs/siglip.py has no variant", variant, VARIANTS)
    c.method, c.model.logit_scale_max = "siglip", math.inf  # no bound
    return c


def published(size):
    c = config.base()
    use_size(c.model, size)
    c.model.logit_scale_init = math.log(10)
    c.model.image_mean = c.model.image_std = (0.5, 0.5, 0.5)
    vocabulary = "gemma" if size.startswith("SigLIP2") else "c4_en"
    c.tokenizer = f"sentencepiece:{vocabulary}.model?lower=true&pad_with_eot=true"
    c.data.augment = c.eval.transform = ("squash(interpolation='bilinear', antialias=False)",)
    c.data.batch_size, c.data.workers = 32768, 8
    c.train.steps = 40_000_000_000 // c.data.batch_size
    c.optim.update(dict(lr=1e-3, b2=0.95, eps=1e-8, warmup_steps=20_000, warmup_from=0.0, grad_clip_norm=1.0))
    # Kernels only. big_vision's 1e-4 is not multiplied by the learning rate, this 0.1 is.
    c.optim.weight_decay, c.optim.no_decay = 0.1, (r"(?<!/kernel)$",)
    if c.model.embed_dim > 768:
        c.model.remat, c.model.scan = "full", True
    c.eval.tasks = ()
    return c
