"""PyramidCLIP (Gao et al. 2022): crops, regions, summaries, captions and tags, aligned with each other at three levels.

    python -m clip_jax.train --config=configs/pyramidclip.py --workdir=runs/pyramidclip

Variants, after a colon; clip_jax/methods/pyramidclip.py documents the section pyramidclip:
  (none)   emoji and scenes of emoji: data, optimizer and steps of configs/clip.py:scenes, for 2 CPU cores. Regions of a
           scene are its objects, described by their pixels, without a detector; emoji have no regions. The towers are
           clip.py:scenes' with a class token and, in the first block, LeFF. A step runs the image tower twice and the
           text tower three times.
           Differences from the paper, without which so few steps do not teach which object is where: a text is the mean
           over its words, not the maximum; the crossing terms, which ignore places, weigh a tenth in all, not two
           thirds; local crops keep all that a caption places; a batch holds either emoji or scenes
  small    for your own data, as configs/clip.py:small, with regions. Captions stand for summaries and tags, unless
           --config.pyramidclip.summary={summary} and .tags={tags} name fields
           python -m clip_jax.tools.regions --source=pairs.tsv --grid=2 --encoder=runs/mine --out=regions, then
           --config.data="pairs.tsv?columns=regions"
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b32 b16 rn50
           the released models on DeCLIP's YFCC15M, 32 epochs of batch 4,096. Give data with a detector's regions
           (docs/regions.md), summaries in the field summary, tags in the field tags:
           --config.data='/data/yfcc15m/{00000..01538}.tar?columns=yfcc15m_regions?columns=yfcc15m_summaries.jsonl'
           Published ImageNet zero-shot top-1: B/32 46.0, B/16 50.7, RN50 47.8 % (CLIP: 32.8, 40.7, 37.2). Not run here
           Assumptions: batch size, optimizer and schedule, from secondary notes; crops are the only augmentation
           Table: docs/recipes/pyramidclip.md
"""

from clip_jax import config
from clip_jax.data.views import PIXEL_FEATURES
from clip_jax.methods.pyramidclip import Options
from clip_jax.models.pyramid import PyramidViT
from clip_jax.models.towers import all_fields, use_size

VARIANTS = ["smoke", "small", "b32", "b16", "rn50"]
PUBLISHED = {"b32": "PyramidCLIP-B/32", "b16": "PyramidCLIP-B/16", "rn50": "PyramidCLIP-RN50"}


def get_config(variant=""):
    if variant in PUBLISHED:
        return config.set_method(published(PUBLISHED[variant]), "pyramidclip", Options())
    if variant not in ("", "smoke", "small"):
        raise config.unknown("configs/pyramidclip.py has no variant", variant, VARIANTS)
    c = config.sibling(__file__, "clip.py:small" if variant == "small" else "clip.py:scenes")
    tower = {name: value for name, value in c.model.image.items() if name in PyramidViT.__dataclass_fields__}
    tower |= dict(kind="pyramid_vit", front=1, region_dim=PIXEL_FEATURES + 4)
    c.model.image = all_fields({"pyramid_vit": PyramidViT}, tower)
    c.data.sampling = "mixed" if variant == "small" else "one_source"
    if variant == "smoke":
        c.update(train=dict(steps=6, log_steps=2), optim=dict(warmup_steps=2))
        c.data.batch_size, c.eval.steps = 32, 0
    if variant == "small":
        command = "python -m clip_jax.tools.regions --source=DATA --grid=2 --encoder=RUN --out=regions"
        c.small.needs = ("boxes", f"{command}, then --config.data='DATA?columns=regions'")
    options = dict(features="pixels", regions=4, local_augment=tuple(c.data.augment), summary=("{summary}", "{name}"))
    options |= dict(summary=("{texts}",), tags=("{texts}",)) if variant == "small" else {}
    return config.set_method(c, "pyramidclip", Options(cross_global=0.05, cross_local=0.05, **options))


def published(size):
    c = config.base()
    use_size(c.model, size)
    c.tokenizer, c.data.augment = "clip_bpe", ("rrc(0.9, 1.0)",)
    c.data.batch_size, c.data.workers = 4096, 8
    c.train.steps = 32 * 15_061_515 // c.data.batch_size
    c.optim.update(dict(lr=5e-4, weight_decay=0.2, warmup_steps=2000))
    if size != "PyramidCLIP-RN50":
        c.optim.freeze = ("^img/patch/",)  # stays at its random values, as in MoCo v3
    c.eval.tasks = ()
    return c
