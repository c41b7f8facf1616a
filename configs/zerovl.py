"""ZeroVL (Cui et al. 2022): one source a batch, mixup of images or texts, token augmentation, full-batch negatives.

    python -m clip_jax.train --config=configs/zerovl.py --workdir=runs/zerovl

Variants, after a colon; clip_jax/methods/zerovl.py documents the section zerovl:
  (none)   model, data and optimizer of configs/clip.py:emoji; the vendors of the embedded emoji images are the sources.
           docs/results.md has it
  small    for your own data, as configs/clip.py:small. A mixture, one source a batch: --config.data.sampling=one_source
  smoke    a few steps of the default, under a minute with compilation; accuracy near chance
  b16 b16_1024
           the paper's recipe: ViT-B/16 and BERT, 20 epochs of 14.2 M pairs, batch 16,384 or 1,024, encoded in parts of
           1,024. Give the towers (timm's vit_base_patch16_224_in21k, BERT), the vocabulary and the data, with sources
           weighted by size or otherwise:
           --config.init_from="img=/data/vit_base_patch16_224_in21k.safetensors, txt=/data/bert-base-uncased"
           --config.tokenizer=wordpiece:/data/bert-base-uncased/vocab.txt
           --config.data="/data/cc3m/*.tar*size + /data/cc12m/*.tar*size + /data/sbu/*.tar*size + /data/vg/*.tar*size"
           Published RSUM of COCO and Flickr30k: 425.0, 536.2; a plain baseline's: 363.5, 476.8. Not run here
           As in the released code, images are normalised by ImageNet's mean and deviation, not by those of that ViT
"""

from clip_jax import config
from clip_jax.methods.zerovl import Options
from clip_jax.models.towers import IMAGE_TOWERS, TEXT_TOWERS, all_fields

BATCHES = {"b16": 16384, "b16_1024": 1024}
VARIANTS = ["smoke", "small", *BATCHES]


def get_config(variant=""):
    if variant in BATCHES:
        c, options = published(BATCHES[variant]), Options(temperature=0.02)
    elif variant in ("", "smoke", "small"):
        c, options = config.sibling(__file__, f"clip.py:{variant or 'emoji'}"), Options()
        c.data.source = "" if variant == "small" else "emoji?by=vendor"
    else:
        raise config.unknown("configs/zerovl.py has no variant", variant, VARIANTS)
    c.data.sampling = "mixed" if variant == "small" else "one_source"
    return config.set_method(c, "zerovl", options)


def published(batch_size):
    c = config.base()
    tower = dict(width=768, depth=12, heads=12, mlp_dim=3072)
    image = dict(kind="vit", size=224, patch=16, ln_pre=False, patch_bias=True, act="gelu", ln_eps=1e-6)
    c.model.image = all_fields(IMAGE_TOWERS, tower | image)
    text = dict(kind="bert", context=25, act="gelu", pad_id=0, proj_bias=False, vocab_size=0, eot_id=-1)
    c.model.text = all_fields(TEXT_TOWERS, tower | text | dict(dropout=0.1, attention_dropout=0.1))
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.tokenizer = "wordpiece:vocab.txt"
    c.init_from = "img=vit_base_patch16_224_in21k.safetensors, txt=bert-base-uncased"
    c.init_from_params = ("^img/(?!proj)", "^txt/(?!proj)")
    c.init_from_allow = ("model.image_mean", "model.image_std")
    c.data.augment = ("rrc(0.6, 1.0, interpolation='bilinear')", "autoaugment")
    c.eval.transform = ("squash(256, 'bilinear')", "center_crop")
    c.data.batch_size, c.data.workers = batch_size, 8
    c.micro_batches = batch_size // 1024
    c.train.steps = 20 * 14_200_000 // batch_size
    c.optim.update(dict(lr=1e-4, warmup_from=0.0, warmup_steps=c.train.steps // 40, lr_end=0.1))
    c.optim.update(dict(b2=0.98, eps=1e-6, weight_decay=1e-3, no_decay=()))
    c.eval.tasks = ()
    return c
