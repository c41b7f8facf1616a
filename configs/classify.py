"""Fine-tuning on labels (WiSE-FT: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").

    python -m clip_jax.train --config=configs/classify.py --workdir=runs/pets --config.init_from=downloads/ViT-B-32.pt \
        --config.data=/data/pets --config.eval.tasks="accuracy(source='/data/pets')"

Variants, after a colon; clip_jax/methods/classify.py documents the section classify:
  (none)   image tower and linear head, which starts as the zero-shot classifier: 10 epochs of batch 512
  probe    the head alone, on images as in evaluation
  emoji    no fine-tuning: from random weights, the towers and the training of configs/clip.py:emoji on the subgroups of
           half of the embedded concepts; a row of configs/studies/labels.py

For the first two give weights and labelled data; sizes, tokenizer and preprocessing follow from the weights
(docs/finetuning.md).
Learning rate, batch, epochs and templates are those of the authors' command, gradient norm and optimizer those of their
code, warm-up and weight decay the paper's. The learning rate of the probe is an assumption: their code's default.
"""

from clip_jax import config, from_weights
from clip_jax.methods.classify import Options

VARIANTS = ["probe", "emoji"]


def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise config.unknown("configs/classify.py has no variant", variant, VARIANTS)
    if variant == "emoji":
        c = config.set_method(config.sibling(__file__, "clip.py:emoji"), "classify", Options(templates="simple"))
        c.data.source, c.eval.tasks, c.eval.train_tasks = "emoji?part=concept:1/2&label=subgroup", (), ()
        return c
    c = config.set_method(from_weights.base(), "classify", Options())
    c.init_from_params = ("^img/", "^txt/", "^logit_scale$")
    c.train.steps = config.base().train.steps  # the epochs count
    c.optim.update(dict(lr=3e-5, grad_clip_norm=1.0))
    if variant == "probe":
        c.optim.freeze, c.optim.lr = ("^img/",), 1e-3
    return c
