"""OTTER (Wu et al. 2022): soft targets from optimal transport between the embeddings of a moving-average teacher.

    python -m clip_jax.train --config=configs/otter.py --workdir=runs/otter

Variants, after a colon; clip_jax/methods/otter.py documents the section otter:
  (none)   model, data and optimizer of configs/clip.py:emoji, sized for 2 CPU cores; docs/results.md gives its result
           Not in the paper, whose towers are pretrained: a warm-up of the distillation, as a teacher from scratch knows
           nothing at first
  small    for your own data, as configs/clip.py:small
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  small_infonce small_ls small_kd
           the other rows of the paper's table on the embedded images; small_kd has the same warm-up
  otter infonce ls kd
           the published runs on CC3M: 10 epochs. Give data, and the towers: timm's ResNet-50, and DeCLUTR-sci-base, a
           BERT, with its vocabulary:
           --config.data=/data/cc3m/{00000..00331}.tar --config.tokenizer=wordpiece:/data/declutr-sci-base/vocab.txt
           --config.init_from="img=/data/resnet50, txt=/data/declutr-sci-base"
           Expected flat-hit F@1 (zeroshot(..., flat_hit=1), docs/evaluation.md) on Google Open Images and ImageNet-10K:
           OTTER 29.1, 12.0; InfoNCE 26.8, 10.9; LS 26.3, 10.1; KD 26.7, 10.0 %. Not run. Assumption: LS's 0.1
"""

from clip_jax import config
from clip_jax.methods.otter import Options
from clip_jax.models.towers import IMAGE_TOWERS, TEXT_TOWERS, all_fields

ROWS = {"otter": {}, "infonce": dict(alpha=1.0), "ls": dict(alpha=1.0, label_smoothing=0.1)}
ROWS |= {"kd": dict(iterations=0, entropy=0.01, remove_diag=False)}
SMALL = [f"small_{row}" for row in ROWS if row != "otter"]
VARIANTS = ["smoke", "small", *SMALL, *ROWS]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/otter.py has no variant", variant, VARIANTS)
    options = Options(**ROWS.get(variant.removeprefix("small_"), {}))
    if variant in ROWS:
        return config.set_method(published(), "otter", options)
    clip = config.sibling(__file__, f"clip.py:{variant if variant in ('smoke', 'small') else 'emoji'}")
    c = config.set_method(clip, "otter", options)
    c.otter.decay, c.otter.keys_stopgrad = 0.99, False  # from scratch every gradient helps
    c.otter.warmup_steps = 150 if variant == "small" else c.train.steps // 2
    return c


def published():
    c = config.base()
    c.model.image = all_fields(IMAGE_TOWERS, dict(kind="plain_resnet", size=224, proj=True))
    bert = dict(kind="bert", context=60, width=768, depth=12, heads=12, mlp_dim=3072, pool="mean", proj=False)
    dropout = dict(dropout=0.1, attention_dropout=0.1)
    c.model.text = all_fields(TEXT_TOWERS, dict(bert, **dropout, vocab_size=0, eot_id=-1))
    c.init_from, c.init_from_params = "img=resnet50, txt=declutr-sci-base", ("^img/(?!proj)", "^txt/")
    c.init_from_allow = ("model.image_mean", "model.image_std")
    c.model.embed_dim, c.model.logit_scale_init = 768, 3.9
    c.tokenizer = "wordpiece:vocab.txt"
    c.data.augment = ("resize(256)", "random_crop")
    c.data.batch_size, c.data.workers = 512, 8
    epoch = 2_910_000 // c.data.batch_size
    c.train.steps = 10 * epoch
    c.optim.update(dict(name="sgd", lr=3e-3, b1=0.9, weight_decay=0.0, warmup_steps=0, lr_hold_steps=epoch))
    c.eval.transform, c.eval.tasks = ("resize(256)", "center_crop"), ()
    return c
