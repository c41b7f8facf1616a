"""FILIP (Yao et al. 2022): images and texts compared token by token.

    python -m clip_jax.train --config=configs/filip.py --workdir=runs/filip

Variants, after a colon; fields of the section filip: clip_jax/methods/filip.py
  (none)   configs/clip.py:emoji's model, data and optimizer, made for 2 CPU cores
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  scenes   configs/clip.py:scenes: scenes of two emoji with captions that say how they lie, and the test of relations and attributes
  paper25 repo16
           the default with token_select, among 16 patches and 12 words
  b32_yfcc b32 l14
           the paper's recipe, 30 epochs: ViT-B/32 on 26 M pairs of YFCC100M in batches of 8,192; ViT-B/32 and L/14 on 340 M pairs in
           batches of 40,960 and 30,720. Captions are drawn among the texts of a record: back-translations are further texts
           Give the data: --config.data=/data/pairs/{00000..02599}.tar
           Expected ImageNet zero-shot top-1: 37.8, 68.8, 77.1 % with prompts of its own. Not run here; recipe from secondary notes.
           Assumptions: crops of 0.2 to 1 of the area before AutoAugment, the neighbours of a device in token_select
  b32_repo the recipe of Sense-GVT/DeCLIP on YFCC15M, 32 epochs of batch 4096, that of configs/declip.py:b32 with half its learning
           rate. Give the data: --config.data=/data/yfcc15m/{00000..01538}.tar. Expected 39.5 % (CLIP, same recipe: 32.8). Not run here
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.filip import Options
from clip_jax.models.towers import use_size

# size of the towers, pairs of an epoch, batch size, learning rate at batch 512, weight decay
PUBLISHED = {
    "b32_yfcc": ("ViT-B/32", 26_000_000, 8192, 6e-3, 3e-2),
    "b32": ("ViT-B/32", 340_000_000, 40_960, 2e-3, 3e-3),
    "l14": ("ViT-L/14", 340_000_000, 30_720, 1.5e-3, 3e-3),
}
VARIANTS = ["smoke", "scenes", "paper25", "repo16", *PUBLISHED, "b32_repo"]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/filip.py has no variant", variant, VARIANTS)
    options = Options(token_select="paper25") if variant in PUBLISHED else Options()
    folder = pathlib.Path(__file__).parent
    if variant in PUBLISHED:
        c = published(*PUBLISHED[variant]).unlock()
    elif variant == "b32_repo":
        c = config.load(f"{folder}/declip.py:b32").unlock()
        del c.declip
        c.model.embed_dim, c.model.image.proj_bias, c.optim.lr, c.optim.weight_decay = 256, True, 5e-4, 0.5
        # Of 15 % of the tokens 80 % become a mask, 10 % random ones, 10 % stay.
        options = Options(token_select="repo16", text_augment=("tokens(0.135, 0.8888889, 0.1111111)",))
    else:
        c = config.load(f"{folder}/clip.py:{variant if variant in ('smoke', 'scenes') else 'emoji'}").unlock()
        options = Options(token_select="none" if variant in ("", "smoke", "scenes") else variant)
    c.method, c.filip = "filip", ConfigDict(dataclasses.asdict(options))
    return c.lock()


def published(size, pairs, batch_size, lr, weight_decay):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.model.embed_dim = "clip_bpe", 256
    c.data.augment = ("rrc(0.2, 1.0)", "autoaugment")
    c.data.batch_size, c.data.workers, c.train.steps = batch_size, 8, 30 * pairs // batch_size
    c.optim.update(
        dict(
            name="lamb",
            lr=lr * (batch_size / 512) ** 0.5,
            b2=0.999,
            eps=1e-4,
            weight_decay=weight_decay,
            warmup_steps=3000,
        )
    )
    c.optim.no_decay += ("/embedding$",)
    if size == "ViT-L/14":
        c.model.remat = "full"
    c.eval.tasks = ()
    return c
