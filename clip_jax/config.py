"""The configuration: its defaults, how a command line changes it, what is checked, and how it is stored.

A file in `configs/` has `get_config(variant) -> ConfigDict`; it starts from `base` and changes what differs. Every
problem is a `UserError` with one line, raised before a device is touched.
"""

import ast
import importlib.util
import json
import os
import re

from ml_collections import ConfigDict

from clip_jax.errors import UserError, did_you_mean, unknown

OPTIMIZERS = ("adamw", "lamb", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "plain")
SAMPLINGS = ("mixed", "one_source")


def base():
    """Every field that a configuration has, with the defaults of CLIP; each field with its meaning."""
    c = ConfigDict()
    c.method = "clip"  # a module of clip_jax.methods, or the import path of your own
    c.micro_batches = 1  # encode the batch in so many parts: less memory, the same result (full-batch negatives), a third more compute
    c.seed = 0  # initialisation, order of the data, augmentation: everything random follows from it
    c.tokenizer = "sentencepiece"  # sentencepiece[:FILE] | clip_bpe[:FILE] | wordpiece:FILE | unifont[:FILE] | folder of a saved one
    c.init_from = ""  # start from these weights: a checkpoint, or weights of others (docs/checkpoints.md); a run that goes on ignores it
    c.init_from_params = ()  # of them only parameters whose path one of these regular expressions finds, e.g. ("^img/",); empty: all
    c.init_from_resize = False  # position embeddings of images are resized where they do not fit

    c.data = ConfigDict()
    c.data.source = "emoji"  # see docs/data.md; --config.data=PATH is short for --config.data.source=PATH
    c.data.split = "train"
    c.data.image = c.data.text = c.data.label = ""  # names of the fields; empty: found by themselves
    c.data.templates = ()  # captions made from fields of a record, e.g. ("{name}", "{tags}"); empty: the captions as they are
    c.data.word_dropout = 0.0  # each word of a caption is left out with this chance
    c.data.rewrites = ()  # fields that hold rewrites of the captions, of which training takes some in their place (docs/texts.md)
    c.data.rewrite_prob = -1.0  # the chance of a rewrite; -1: a caption and its rewrites are equally likely
    c.data.augment = ("rrc(0.9, 1.0)",)  # clip.md: random square crop; docs/data.md lists the transforms
    c.data.batch_size = 256  # global
    c.data.sampling = (
        "mixed"  # of a mixture: all sources in a batch | one_source: each batch from one of them (debiased sampling)
    )
    c.data.workers = 0  # processes that prepare examples, on each host; 0: threads of the main process
    c.data.threads = 2  # threads in each of them
    c.data.prefetch = 2  # batches ready ahead
    c.data.cache_mb = 512  # decoded small pictures kept in memory by each process, at most
    c.data.max_bad_share = 0.1  # stop when more than this share of the records is unusable

    c.model = ConfigDict()
    c.model.embed_dim = 512
    c.model.logit_scale_init = 2.6593  # ln(1 / 0.07)
    c.model.logit_scale_max = 4.6052  # ln 100
    c.model.logit_bias_init = -10.0  # siglip
    c.model.temperature_init = 1.0  # align, which divides by it
    c.model.dtype = "bfloat16"  # of matrix work; weights, norms, softmax and losses stay float32
    c.model.remat = (
        "none"  # recomputed in the backward pass: none | dots (all but matrix products) | full (whole blocks)
    )
    c.model.scan = False  # one compiled block run depth times, weights stacked: compiles in a fraction of the time
    c.model.attention = "auto"  # auto (fused by cuDNN on a GPU where it can be) | plain
    c.model.image_mean = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1]
    c.model.image_std = (0.26862954, 0.26130258, 0.27577711)
    # docs of the fields: clip_jax/models/vit.py and clip_jax/models/text.py; of another kind of tower: its module
    c.model.image = ConfigDict(
        dict(kind="vit", size=224, patch=32, width=768, depth=12, heads=12, mlp_dim=3072, pool="cls")
    )
    c.model.image.update(
        dict(cls_token=True, ln_pre=True, patch_bias=False, posemb="learn", act="quick_gelu", ln_eps=1e-5)
    )
    c.model.image.update(
        dict(weight_init="clip_image", stem=(), patch_drop=0.0, qk_norm=False, proj=True, proj_bias=False)
    )
    c.model.text = ConfigDict(
        dict(kind="transformer", context=77, width=512, depth=12, heads=8, mlp_dim=2048, pool="eot")
    )
    c.model.text.update(dict(causal=True, mask_padding=False, act="quick_gelu", ln_eps=1e-5, weight_init="clip_text"))
    c.model.text.update(dict(proj=True, proj_bias=False, vocab_size=0, eot_id=-1))  # taken from the tokenizer

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | lamb | adafactor | sgd
    c.optim.lr = 5e-4  # the peak
    c.optim.schedule = "cosine"  # after the warm-up: cosine | linear | rsqrt | constant
    c.optim.warmup_steps = 2000
    c.optim.b1 = 0.9  # also the momentum of sgd and adafactor
    c.optim.b2 = 0.98
    c.optim.eps = 1e-6
    c.optim.weight_decay = 0.2  # decoupled; multiplied by the learning rate
    c.optim.no_decay = (
        "/bias$",
        "/scale$",
        "^logit_",
        "/cls$",
        "/pos$",
    )  # not decayed: parameters whose path one of these finds
    c.optim.lr_mult = ()  # ((regular expression, factor), ...): the first that finds a parameter's path counts; 0 freezes
    c.optim.freeze = ()  # regular expressions; parameters found are not trained and cost no optimizer state
    c.optim.grad_clip_norm = 0.0  # global norm; 0: off
    c.optim.ema_decay = 0.0  # moving average of the weights; 0: off

    c.train = ConfigDict()
    c.train.steps = 1000
    c.train.log_steps = 50  # a progress line and metrics every so many steps, and the first one
    c.train.max_bad_steps = 20  # stop after so many steps in a row with a loss or gradient that is not finite
    c.train.stall_minutes = 20.0  # stop when data, a step, an evaluation or a checkpoint takes longer; 0: never

    c.checkpoint = ConfigDict()
    c.checkpoint.steps = 1000  # save every so many steps; 0: only by minutes and at the end
    c.checkpoint.minutes = 15.0  # and every so many minutes; 0: only by steps
    c.checkpoint.keep = 2  # the newest ones kept
    c.checkpoint.best = ""  # the metric by which one more is kept, the best; empty: none

    c.eval = ConfigDict()
    c.eval.steps = 0  # evaluate every so many steps; 0: only at the end
    c.eval.tasks = (
        "emoji",
    )  # at the end, docs/evaluation.md: emoji | zeroshot(...) | retrieval(...) | relations(...) | probe(...)
    c.eval.train_tasks = ()  # the ones that run every eval.steps
    c.eval.transform = ("resize", "center_crop")  # clip.md
    c.eval.batch_size = 256
    c.eval.ema = False  # evaluate the moving average of the weights
    c.eval.report = True  # write report.html after the last evaluation

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: what is left of the devices

    c.log = ConfigDict()
    c.log.tensorboard = True
    c.log.wandb = ""  # the project's name; empty: off
    return c.lock()


def load_module(spec):
    """`(module, variant)` of `"path/to/file.py[:variant]"`; raises UserError for a file that is missing."""
    path, _, variant = spec.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"--config={spec}: there is no file {path!r}")
    module_spec = importlib.util.spec_from_file_location("clip_jax_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module, variant


def load(spec, overrides=()):
    """The configuration of `"path/to/file.py[:variant]"` with overrides `["optim.lr=3e-4", ...]`.

    Raises UserError for a file that is missing or has no `get_config`, an unknown key, and a value of the wrong type.
    """
    module, variant = load_module(spec)
    if variant in getattr(module, "STUDIES", ()):
        raise UserError(f"--config={spec} is a study: python -m clip_jax.study --config={spec} --workdir=...")
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {module.__file__!r} has no function get_config(variant)")
    return override(module.get_config(variant), overrides)


def sibling(file, spec):
    """Returns the configuration `spec`, such as `"clip.py:emoji"`, from the folder of `file`.

    Args:
      file: the `__file__` of a configuration that starts from another one.
      spec: `FILE.py[:VARIANT]`, relative to that folder.
    """
    return load(os.path.join(os.path.dirname(os.path.abspath(file)), spec))


def override(config, overrides):
    """Sets fields of a configuration, `["optim.lr=3e-4", ...]`, and returns it; raises UserError as `load` does."""
    for text in overrides:
        key, _, value = text.partition("=")
        _override(config, key, value)
    return config


def parse_overrides(arguments):
    """`["optim.lr=3e-4", ...]` of arguments `--config.optim.lr=3e-4` or `--config.optim.lr 3e-4`; raises UserError for any other."""
    rest, overrides = list(arguments), []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            raise UserError(
                f"unknown argument {argument!r}; fields of the configuration are set by --config.FIELD=VALUE"
            )
        if "=" not in argument:
            if not rest:
                raise UserError(f"{argument!r} has no value")
            argument += "=" + rest.pop(0)
        overrides.append(argument.removeprefix("--config."))
    return overrides


def _keys(config, prefix=""):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _override(config, key, text):
    """Sets the field `key` ("optim.lr") of a configuration to `text`, read as the type that the field has."""
    *parents, name = key.split(".")
    section = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or name not in section:
        raise UserError(f"unknown config key {key!r}{did_you_mean(key, _keys(config))}")
    old = section[name]
    if isinstance(old, ConfigDict):
        values = _literal(text)
        if isinstance(values, dict):
            for k, v in values.items():
                _override(config, f"{key}.{k}", v if isinstance(v, str) else repr(v))
        elif "source" in old:
            old.source = text
        else:
            raise UserError(f"config key {key!r} is a section: give one of its fields ({', '.join(old)}), or a dict")
        return
    try:
        section[name] = _parse(text, old)
    except ValueError:
        raise UserError(f"config key {key!r} is of type {type(old).__name__}, got {text!r}") from None


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _parse(text, old):
    if isinstance(old, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError
        return text.lower() in ("true", "1")
    if isinstance(old, int):
        number = float(text)
        if number != int(number):
            raise ValueError
        return int(number)
    if isinstance(old, float):
        return float(text)
    if isinstance(old, tuple):
        value = _literal(text)
        if isinstance(value, list | tuple):
            return _tuples(value)
        # "rrc(0.9, 1.0),flip": split at the commas outside of brackets
        return tuple(part.strip() for part in re.split(r",(?![^()\[\]]*[)\]])", text) if part.strip())
    return text


def _tuples(value):
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value


def to_json(config):
    """The configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text):
    """The configuration that `to_json` stored."""
    return ConfigDict(_tuples(json.loads(text))).lock()


def resolve(config, tokenizer):
    """Returns a copy whose `model.text` has the tokenizer's `vocab_size` and `eot_id`.

    `clip_jax.methods.interface.resolve` calls this and fills in the fields of the method too. Raises UserError when the
    configuration gives other values.
    """
    config = config.copy_and_resolve_references()
    text = config.model.get("text", {})
    for field, value in (("vocab_size", tokenizer.vocab_size), ("eot_id", tokenizer.eot_id)):
        if field in text:
            if text[field] not in (0, -1, value):
                raise UserError(f"model.text.{field}={text[field]}, but the tokenizer {config.tokenizer!r} has {value}")
            text[field] = value
    return config.lock()


def validate(config):
    """Checks the values that no other part checks when it is built; raises UserError for the first that is wrong."""
    at_least_1 = (
        "micro_batches data.batch_size data.threads data.prefetch train.steps train.log_steps train.max_bad_steps checkpoint.keep"
        " eval.batch_size"
    )
    at_least_0 = (
        "train.stall_minutes checkpoint.steps checkpoint.minutes eval.steps optim.lr optim.warmup_steps optim.weight_decay"
        " optim.grad_clip_norm optim.eps data.workers data.cache_mb"
    )
    for key, low in [(key, 1) for key in at_least_1.split()] + [(key, 0) for key in at_least_0.split()]:
        value = _get(config, key)
        if not value >= low:
            raise UserError(f"{key}={value}: must be at least {low}")
    for key in ("optim.b1", "optim.b2", "optim.ema_decay", "data.max_bad_share", "data.word_dropout"):
        if not 0 <= _get(config, key) < 1:
            raise UserError(f"{key}={_get(config, key)}: must be at least 0 and below 1")
    choices = {"optim.name": OPTIMIZERS, "optim.schedule": SCHEDULES, "model.dtype": DTYPES, "model.remat": REMATS}
    for key, allowed in (choices | {"model.attention": ATTENTIONS, "data.sampling": SAMPLINGS}).items():
        if _get(config, key) not in allowed:
            raise unknown(key, _get(config, key), allowed)
    if config.optim.warmup_steps > config.train.steps:
        raise UserError(f"optim.warmup_steps={config.optim.warmup_steps} is more than train.steps={config.train.steps}")
    if (config.init_from_params or config.init_from_resize) and not config.init_from:
        raise UserError("init_from_params and init_from_resize need init_from")
    if config.eval.ema and not config.optim.ema_decay:
        raise UserError("eval.ema=True needs optim.ema_decay above 0")
    for entry in config.optim.lr_mult:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], int | float)):
            raise UserError(f"optim.lr_mult: {entry!r} is not allowed; it holds pairs (regular expression, factor)")
    patterns = {
        "optim.freeze": config.optim.freeze,
        "optim.no_decay": config.optim.no_decay,
        "optim.lr_mult": [p for p, _ in config.optim.lr_mult],
        "init_from_params": config.init_from_params,
    }
    for key, entry in ((key, entry) for key, entries in patterns.items() for entry in entries):
        try:
            re.compile(entry)
        except (re.error, TypeError):
            raise UserError(f"{key}: {entry!r} is not a regular expression") from None


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def differences(old, new, sections=None):
    """The fields in which two configurations differ, `[(key, old value, new value)]`; of some sections or fields only, if given.

    A field that one of them lacks, as it was added later, counts as its default.
    """
    base_, old, new = (
        {k: _get(c, k) for k in _keys(c) if not isinstance(_get(c, k), ConfigDict)} for c in (base(), old, new)
    )
    keys = [k for k in sorted(old | new) if sections is None or any(k == s or k.startswith(s + ".") for s in sections)]
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k, base_.get(k)) != new.get(k, base_.get(k))]
