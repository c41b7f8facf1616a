"""Checks of a configuration's values, and the nearest field for a name that is none."""

import math
import re

from clip_jax import optim_checks
from clip_jax.errors import Problems, UserError, did_you_mean, unknown

DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "plain")
ORDERS = ("auto", "records", "blocks")
SAMPLINGS = ("mixed", "one_source")
CHOICES = {"model.dtype": DTYPES, "model.remat": REMATS, "model.attention": ATTENTIONS}
CHOICES |= {"data.sampling": SAMPLINGS, "data.order": ORDERS}
_LOWEST = {
    1: "micro_batches data.batch_size data.threads data.prefetch train.steps train.log_steps train.max_bad_steps"
    " checkpoint.keep eval.batch_size data.window",
    0: "train.stall_minutes checkpoint.steps checkpoint.minutes eval.steps data.workers data.cache_mb data.lanes"
    " profile.port",
}
#: Usual names of other trainers and the fields that stand for them.
_USUAL = {
    "optim.lr": "learning_rate learningrate lrate peak_lr base_lr max_lr",
    "optim.weight_decay": "wd decay",
    "optim.warmup_steps": "warmup num_warmup_steps",
    "optim.name": "optimizer opt",
    "optim.grad_clip_norm": "grad_clip clip_grad max_grad_norm clip_norm",
    "optim.ema_decay": "ema",
    "optim.schedule": "lr_scheduler scheduler lr_schedule",
    "data.batch_size": "batch bs batchsize global_batch_size per_device_train_batch_size train_batch_size",
    "data.source": "data dataset data_dir data_path train_data datasets",
    "data.text": "caption captions csv_caption_key caption_column text_column",
    "data.image": "csv_img_key image_column img",
    "data.workers": "num_workers",
    "model.image.size": "image_size img_size resolution force_image_size",
    "model.image.patch": "patch_size",
    "model.text.context": "context_length context_len seq_len max_length text_length",
    "model.dtype": "precision amp fp16 bf16",
    "model.remat": "grad_checkpointing gradient_checkpointing checkpointing",
    "model.logit_scale_init": "temperature logit_scale",
    "micro_batches": "accum_freq gradient_accumulation_steps grad_accum accum",
    "train.steps": "steps max_steps num_steps epochs num_epochs num_train_steps num_train_epochs",
    "train.log_steps": "log_every log_every_n_steps logging_steps",
    "checkpoint.steps": "save_steps save_every save_frequency",
    "eval.steps": "eval_every val_frequency",
    "eval.tasks": "val_data imagenet_val zeroshot",
    "init_from": "pretrained checkpoint finetune",
    "log.wandb": "wandb report_to",
}
#: Those whose values mean something else than the field's.
_OTHER_VALUES = "epochs num_epochs num_train_epochs precision amp fp16 bf16 temperature grad_checkpointing".split()
_FIELD_OF = {name: field for field, names in _USUAL.items() for name in names.split()}


def nearest_field(key, fields):
    """Returns the end of a message, " (did you mean 'optim.lr'?)", for a key that is no field; empty when none is near.

    Args:
      key: what the user wrote, such as "learning_rate" or "optim.learning_rate".
      fields: the fields of the configuration, such as "optim.lr".
    """
    field = _nearest(key, fields)
    return f" (did you mean {field!r}?)" if field else did_you_mean(key, fields)


def _nearest(key, fields):
    name = key.replace("-", "_").lower()
    last = name.rpartition(".")[2]
    field = name if name in fields else _FIELD_OF.get(last)
    if field is None or field not in fields:
        field = next((f for f in fields if f.rpartition(".")[2] == last), None)
    return field


def unknown_argument(argument, fields):
    """Returns the message for an argument of a command that is no flag of it, with the field it may stand for.

    Args:
      argument: the argument, such as "--lr=1".
      fields: the fields of a configuration.
    """
    name, _, value = argument.lstrip("-").partition("=")
    key = name.partition(".")[2] or name if name.startswith("con") else name
    field = _nearest(key, fields)
    if argument.startswith("--") and field:
        value = value if value and key.replace("-", "_") not in _OTHER_VALUES else "..."
        return f"unknown argument {argument!r}: write --config.{field}={value}"
    hint = did_you_mean(key, [f"--config.{f}" for f in fields])
    return f"unknown argument {argument!r}{hint}; set fields of the configuration with --config.FIELD=VALUE"


def check(config):
    """Checks the values that no other part of the program checks. Raises one UserError for all wrong values."""
    problems = Problems()
    for low, key in ((low, key) for low, keys in _LOWEST.items() for key in keys.split()):
        problems.check(_check_lowest, key, _get(config, key), low)
    for key in ("data.max_bad_share", "data.word_dropout", "data.holdout"):
        if not 0 <= _get(config, key) < 1:
            problems.add(f"{key}={_get(config, key)}: must be at least 0 and below 1")
    if not math.isfinite(config.model.logit_scale_init):
        problems.add(f"model.logit_scale_init={config.model.logit_scale_init}: must be finite")
    problems.check(optim_checks.check, config.optim, config.train.steps)
    for key, allowed in CHOICES.items():
        if _get(config, key) not in allowed:
            problems.add(str(unknown(key, _get(config, key), allowed)))
    if config.optim.grad_dtype not in ("float32", config.model.dtype):
        problems.add(
            f"optim.grad_dtype={config.optim.grad_dtype!r}: must be 'float32' or model.dtype={config.model.dtype!r}"
        )
    options = (config.init_from_params, config.init_from_resize, config.init_from_allow)
    if any(options) and not (config.init_from or config.init_from_model):
        problems.add("init_from_params, init_from_resize and init_from_allow need init_from")
    if config.eval.ema and not config.optim.ema_decay:
        problems.add("eval.ema=True needs optim.ema_decay above 0")
    problems.check(_check_patterns, config)
    problems.end()


def _check_lowest(key, value, low):
    if not low <= value < math.inf:  # also for NaN
        raise UserError(f"{key}={value}: must be at least {low}" + " and finite" * (value == math.inf))


def _check_patterns(config):
    patterns = {key: _get(config, key) for key in ("optim.freeze", "optim.no_decay", "init_from_params")}
    patterns["optim.lr_mult"] = [next(iter(entry), None) for entry in config.optim.lr_mult]
    for key, entry in ((key, entry) for key, entries in patterns.items() for entry in entries):
        try:
            re.compile(entry)
        except (re.error, TypeError):
            raise UserError(f"{key}: {entry!r} is not a regular expression") from None


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config
