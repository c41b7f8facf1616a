"""OTTER (Wu et al. 2022): soft targets from optimal transport between the images and texts of a batch, as a moving average sees them.

    python -m clip_jax.train --config=configs/otter.py --workdir=runs/otter

Variants, after a colon; fields of the section otter: clip_jax/methods/otter.py
  (none)   configs/clip.py:emoji's model, data and optimizer, made for 2 CPU cores. Not in the paper, whose towers are pretrained: a warm-up
           of the distillation, as from scratch the teacher knows nothing at first. README.md gives its result
  smoke    the same in a few steps, under a minute with compilation; the result is near chance
  small_infonce small_ls small_kd
           the other rows of the paper's table on the embedded pictures; small_kd with the same warm-up
  otter infonce ls kd
           the published runs on CC3M: 10 epochs. Give data, SciBERT's vocabulary and weights: --config.data=/data/cc3m/{00000..00331}.tar
           --config.tokenizer=wordpiece:/data/vocab.txt --config.init_from=PATH
           Expected flat-hit F@1 on Google Open Images and ImageNet-10K: OTTER 29.1, 12.0; InfoNCE 26.8, 10.9; LS 26.3, 10.1; KD 26.7,
           10.0 %, from towers that were pretrained (ResNet-50 on ImageNet, DeCLUTR on papers), and not to be reached without. Not run.
           Differences: the ResNet-50 is CLIP's, BERT embeds a text by [CLS] and not by the mean; LS's 0.1 is an assumption
"""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from clip_jax import config
from clip_jax.methods.otter import Options
from clip_jax.models.towers import TEXT_TOWERS, all_fields, use_size

ROWS = {"otter": {}, "infonce": dict(alpha=1.0), "ls": dict(alpha=1.0, label_smoothing=0.1)}
ROWS |= {"kd": dict(iterations=0, entropy=0.01, remove_diag=False)}
SMALL = [f"small_{row}" for row in ROWS if row != "otter"]


def get_config(variant=""):
    if variant not in ("", "smoke", *SMALL, *ROWS):
        raise config.unknown("configs/otter.py has no variant", variant, ["smoke", *SMALL, *ROWS])
    clip = f"{pathlib.Path(__file__).with_name('clip.py')}:{'smoke' if variant == 'smoke' else 'emoji'}"
    c = (published() if variant in ROWS else config.load(clip)).unlock()
    c.method = "otter"
    c.otter = ConfigDict(dataclasses.asdict(Options(**ROWS.get(variant.removeprefix("small_"), {}))))
    if variant in ROWS:
        c.model.logit_scale_init = 3.9
    else:
        c.otter.decay, c.otter.keys_stopgrad = 0.99, False  # from scratch every gradient helps
        c.otter.warmup_steps = c.train.steps // 2
    return c.lock()


def published():
    c = config.base()
    use_size(c.model, "RN50")
    text = dict(
        kind="bert", context=60, width=768, depth=12, heads=12, mlp_dim=3072, dropout=0.1, vocab_size=0, eot_id=-1
    )
    c.model.embed_dim, c.model.text = 768, ConfigDict(all_fields(TEXT_TOWERS, text))
    c.tokenizer = "wordpiece:vocab.txt"
    c.data.augment, c.data.batch_size, c.data.workers = ("resize(256)", "random_crop"), 512, 8
    c.train.steps = 10 * 2_910_000 // c.data.batch_size
    c.optim.update(dict(name="sgd", lr=3e-3, b1=0.9, weight_decay=0.0, warmup_steps=0))
    c.eval.tasks = ()
    return c
