"""OneR (Jang et al. 2023): one transformer and one head for images, texts and image-text pairs.

    python -m clip_jax.train --config=configs/oner.py --workdir=runs/oner

Variants, after a colon; clip_jax/methods/oner.py documents the section oner, whose values are all assumptions:
  (none)   the last row of the paper's table, small, on the embedded emoji images, for 2 CPU cores
  smoke    a few steps of the default, accuracy near chance; small: for your own data, as configs/clip.py:small
  small_ROW  one of the rows below on the embedded images, as many steps as the default
  ablation   all rows, three seeds each:
           python -m clip_jax.study --config=configs/oner.py:ablation --workdir=runs/oner_ablation
  ROW      itc, itc_two_heads, itc_xmc, itc_xmc_cic, itc_cmc: ViT-B/16 on CC3M, 40 epochs. Data, BERT's vocabulary:
           --config.data=/data/cc3m/{00000..00331}.tar --config.tokenizer="wordpiece:/data/vocab.txt?sot=false"
           The paper's ImageNet zero-shot top-1 and top-5: PUBLISHED, below. Its optimizer, temperature, batch and masks
           are not published: these are MoCo v3's and assumptions
"""

from clip_jax import config
from clip_jax.methods.oner import Options
from clip_jax.study import Row, Study

NO_MASKS = dict.fromkeys(("cmc", "mim", "mlm", "joint_mim", "joint_mlm", "image_mask", "text_mask"), 0.0)
# With two heads only the predictors map one projector to the other, so evaluation needs them too.
ROWS = {"itc": NO_MASKS, "itc_two_heads": dict(NO_MASKS, two_heads=True, embed="query_key")}
ROWS |= {"itc_xmc": dict(NO_MASKS, xmc=1.0), "itc_xmc_cic": dict(NO_MASKS, xmc=1.0, cic=1.0), "itc_cmc": {}}
PUBLISHED = ((1.65, 5.25), (17.46, 35.32), (22.12, 42.12), (22.86, 42.88), (23.70, 43.15))  # top-1, top-5 in percent
VARIANTS, STUDIES = ["smoke", "small", *ROWS, *(f"small_{row}" for row in ROWS)], ("ablation",)


def get_study(variant):
    rows = [Row(row, f"{__file__}:small_{row}", published=shares) for row, shares in zip(ROWS, PUBLISHED, strict=True)]
    cells = [(concepts, k) for concepts in ("seen", "unseen") for k in (1, 5)]
    metrics = {f"top-{k}, {x} concepts": f"emoji/{x}_concept_unseen_vendor/top{k}" for x, k in cells}
    title, published = "OneR: the rows of its table", "ImageNet top-1 / top-5 after CC3M, published"
    curves = ("modality_gap", "loss_itc", "image_to_text_acc")
    readouts = {embed: (f"oner.embed={embed}",) for embed in ("projector", "query_key")}
    return Study(title, tuple(rows), metrics, published, curves, "emoji(subset='val')", readouts=readouts)


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/oner.py has no variant", variant, VARIANTS)
    c = published() if variant in ROWS else embedded(variant)
    c.model.image_mean, c.model.image_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
    c.optim.update(dict(b2=0.999, eps=1e-8, weight_decay=0.1))
    c.optim.no_decay += ("/type$", "/mask$")
    config.set_method(c, "oner", Options(**ROWS.get(variant.removeprefix("small_"), {})))
    if variant not in ROWS:
        resized = ("resize" if variant == "small" else "resize(36)", "center_crop")
        c.oner.update(dict(head_width=512, teacher_augment=resized, temperature=0.1, momentum=0.9))
        for name in ("mim", "mlm", "joint_mim", "joint_mlm"):
            c.oner[name] *= 0.1  # so that in few steps the words' cross-entropy does not outweigh the contrast
    return c


def published():
    c = config.base()
    c.model.image = dict(size=224, patch=16, stem=(), width=768, depth=12, heads=12, mlp_dim=3072, act="gelu")
    c.model.text = dict(context=39, vocab_size=0, eot_id=-1)  # 40 tokens with CLS; the tokenizer sets the other two
    c.model.embed_dim = 256
    c.data.update(dict(augment=("rrc(0.5, 1.0)", "flip"), batch_size=4096, workers=8))
    c.train.steps = 40 * 2_900_000 // c.data.batch_size
    c.optim.update(dict(lr=1.5e-4 * c.data.batch_size / 256, warmup_steps=c.train.steps // 10))
    c.tokenizer, c.eval.tasks = "wordpiece:vocab.txt?sot=false", ()
    return c


def embedded(variant):
    c = config.sibling(__file__, f"clip.py:{variant if variant in ('smoke', 'small') else 'emoji'}")
    c.model, tower = config.base().model, dict(size=32, stem=(32, 64, 128), width=128, depth=2, heads=2, mlp_dim=512)
    if variant == "small":
        tower = dict(size=128, stem=(), width=192, depth=4, heads=3, mlp_dim=768)
    c.model.image = dict(tower, patch=16, act="gelu_tanh")
    c.model.text = dict(context=32 if variant == "small" else 12, vocab_size=0, eot_id=-1)
    c.model.update(dict(embed_dim=128, dtype="float32", scan=variant == "smoke"))  # a scan compiles in half of the time
    c.optim.lr = min(2e-3, c.optim.lr)
    if variant not in ("smoke", "small"):
        c.train.steps, c.data.batch_size = 700, 128
    if variant.startswith("small_"):
        c.update(train=dict(log_steps=20), checkpoint=dict(steps=0), eval=dict(steps=0))
    return c
