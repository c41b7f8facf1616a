"""The configuration: its defaults, overrides from the command line, checks, and storage.

A file in `configs/` defines `get_config(variant) -> ConfigDict`. It starts from `base` and sets the fields that differ.
Every mistake is a `UserError` of one line, raised before a device is touched.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import sys

from ml_collections import ConfigDict

from clip_jax import config_checks, config_files, own_data
from clip_jax.config_checks import DTYPES
from clip_jax.errors import Problems, UserError
from clip_jax.errors import unknown as unknown

_COLOURS = ("image_mean", "image_std")
_TEXTS = set(  # fields that hold tuples of str
    "augment templates rewrites transform tasks train_tasks init_from_params init_from_allow freeze no_decay".split()
)


def base():
    """Returns the configuration with every field at its default, which is CLIP's. Every field has a comment."""
    c = ConfigDict()
    c.method = "clip"  # a module of clip_jax.methods, or the import path of your own module
    # Encodes the batch in this many parts: less memory, the same result, a third more compute. In a tower with batch
    # norm (resnet, plain_resnet, efficientnet, pyramid_vit, pyramid_resnet) each part has its own statistics, so that
    # the result differs, unless model.image.bn_group is set: parts hold whole groups.
    c.micro_batches = 1
    c.seed = 0  # all randomness follows from it: initialisation, order of the data, augmentation
    # sentencepiece[:FILE] | clip_bpe[:FILE] | wordpiece:FILE | unifont[:FILE] | the folder of a saved tokenizer
    c.tokenizer = "sentencepiece"
    c.init_from = ""  # weights to start from, or "img=PATH, txt=PATH" (docs/checkpoints.md); a resumed run ignores it
    c.init_from_params = ()  # only parameters whose path matches one of these regular expressions, e.g. ("^img/",)
    c.init_from_allow = ()  # fields that may contradict these weights, e.g. ("model.image_mean", "model.image_std")
    c.init_from_model = False  # takes method, towers, tokenizer, preprocessing from init_from (docs/finetuning.md)
    c.init_from_resize = False  # resizes position embeddings when their shape differs
    c.data, c.model = _data(), _model()
    c.optim, c.train = _optim(), _train()
    c.checkpoint, c.eval = _checkpoint(), _eval()
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices on each mesh axis; -1: all remaining devices
    c.log = ConfigDict(dict(tensorboard=True))  # writes TensorBoard files to the work folder
    c.log.wandb = ""  # project name on Weights & Biases; empty: off
    # Folder or bucket of compiled steps, which hosts and later starts share; workdir: in the work folder; empty: none.
    c.compile = ConfigDict(dict(cache="workdir"))
    c.profile = ConfigDict()
    c.profile.steps = ""  # steps of which a trace for xprof is written to the work folder, such as "100-110"
    c.profile.port = 0  # port on which xprof may ask a running process for a trace; 0: none
    return c.lock()


def _data():
    c = ConfigDict()
    c.source = "emoji"  # see docs/data.md; --config.data=PATH is short for --config.data.source=PATH
    c.split = "train"  # split of the source
    c.holdout = 0.0  # share of the records that is kept out of training, by a hash of their images (docs/data.md)
    c.image = c.text = c.label = ""  # names of the record's fields; empty: found automatically
    c.templates = ()  # captions built from a record's fields, e.g. ("{name}", "{tags}"); empty: captions as they are
    c.word_dropout = 0.0  # each word of a caption is left out with this probability; one random word always stays
    c.rewrites = ()  # fields that hold rewrites, which training draws instead of the caption (docs/texts.md)
    c.rewrite_prob = -1.0  # probability of a rewrite; -1: a caption and each of its rewrites are equally likely
    c.augment = ("rrc(0.9, 1.0)",)  # image transforms (docs/data.md); the default is CLIP's random square crop
    c.batch_size = 256  # global batch size
    c.sampling = "mixed"  # mixed: each batch draws from all sources | one_source: from one (debiased sampling)
    c.order = "auto"  # records: from anywhere | blocks: in a row, shuffled in two levels | auto: docs/data.md
    c.lanes = 0  # order by blocks: places at which the data is read; 0: by the batch size
    c.window = 8  # order by blocks: records of a lane are shuffled within this many blocks
    c.workers = 0  # processes per host that prepare examples; 0: threads of the main process
    c.threads = 2  # threads in each of these processes
    c.prefetch = 2  # batches ready ahead
    c.cache_mb = 512  # at most this many MiB of small decoded images stay in memory, in each process
    c.max_bad_share = 0.1  # the run stops when a larger share of the records is unusable
    return c


def _model():
    c = ConfigDict()
    c.embed_dim = 512  # size of the joint embedding
    c.logit_scale_init = 2.6593  # ln(1 / 0.07)
    c.logit_scale_max = 4.6052  # ln 100
    c.logit_bias_init = -10.0  # SigLIP's bias
    c.temperature_init = 1.0  # ALIGN's temperature, which divides the similarities
    c.dtype = "bfloat16"  # of matrix products; weights, norms, softmax and losses stay float32
    c.remat = "none"  # recomputed in the backward pass: none | dots (all but linear layers) | full (whole blocks)
    c.scan = False  # runs one compiled block depth times on stacked weights: compiles in a fraction of the time
    c.attention = "auto"  # auto: fused where possible, on TPUs and by cuDNN on GPUs | plain
    c.image_mean = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1], by colour channel
    c.image_std = (0.26862954, 0.26130258, 0.27577711)  # likewise
    # clip_jax/models/vit.py and clip_jax/models/text.py explain the fields of the towers; other kinds: their module.
    c.image = ConfigDict(dict(kind="vit", size=224, patch=32, width=768, depth=12, heads=12, mlp_dim=3072, pool="cls"))
    c.image.update(dict(cls_token=True, ln_pre=True, patch_bias=False, posemb="learn", act="quick_gelu", ln_eps=1e-5))
    c.image.update(dict(weight_init="clip_image", stem=(), patch_drop=0.0, qk_norm=False, token_norm=True))
    c.image.update(dict(registers=0, layer_scale=0.0))
    c.image.update(dict(proj=True, proj_bias=False))
    c.text = ConfigDict(dict(kind="transformer", context=77, width=512, depth=12, heads=8, mlp_dim=2048, pool="eot"))
    c.text.update(dict(causal=True, mask_padding=False, act="quick_gelu", ln_eps=1e-5, weight_init="clip_text"))
    c.text.update(dict(proj=True, proj_bias=False, vocab_size=0, eot_id=-1))  # the last two: set by the tokenizer
    return c


def _optim():
    c = ConfigDict()
    c.name = "adamw"  # adamw | lamb | adafactor | sgd
    c.lr = 5e-4  # peak learning rate
    c.schedule = "cosine"  # cosine | linear | rsqrt | constant | onecycle (clip_jax/training/schedules.py)
    c.lr_end = 0.0  # share of the peak at which cosine and linear end
    c.decay_from_start = False  # cosine and linear fall from the first step, behind the warm-up, as in timm
    c.lr_hold_steps = 0  # cosine, linear and rsqrt change only every N steps, such as an epoch's; 0: every step
    c.timescale = 0  # rsqrt: lr / sqrt(1 + steps since the warm-up / timescale); 0: the steps of the warm-up
    c.cooldown_steps = 0  # in the last steps the learning rate falls linearly to 0
    c.warmup_steps = 2000  # steps of linear warm-up
    c.warmup_from = -1.0  # learning rate of the first step of the warm-up; -1: lr / warmup_steps
    c.b1 = 0.9  # also the momentum of sgd and adafactor
    c.b1_cycle = ()  # (0.95, 0.85): b1 of adamw or lamb moves from the first to the second and back, as in OneCycleLR
    c.b2 = 0.98  # decay of the second moment
    c.eps = 1e-6  # added to the denominator of adamw and lamb
    c.weight_decay = 0.2  # decoupled; multiplied by the learning rate
    # Parameters whose path matches one of these regular expressions are not decayed.
    c.no_decay = ("/bias$", "/scale$", "^logit_", "/cls$", "/pos$")
    c.lr_mult = ()  # ((regular expression, factor), ...): the first match of a parameter's path counts; 0 freezes
    c.freeze = ()  # regular expressions; matching parameters are not trained and cost no optimizer state
    c.lamb_adapt_all = False  # False: parameters that are not decayed have the trust ratio 1 (TensorFlow Addons)
    c.lamb_max_norm = 0.0  # upper limit of a parameter's norm in the ratio, 10 in pytorch-lamb; 0: none
    c.lamb_bias_correction = True  # of the moments; pytorch-lamb has none
    c.lamb_fuse_qkv = False  # one ratio for query, key and value together, as PyTorch's fused parameter has
    c.grad_clip_norm = 0.0  # global norm of the gradients; 0: off
    c.ema_decay = 0.0  # moving average of the weights; 0: off
    # Dtype in which gradients of kernels are summed over devices: float32 | bfloat16, with half the traffic. A step
    # takes the kernels in this dtype too: OTTER's teacher averages them, method='classify' has one as its head.
    c.grad_dtype = "float32"
    return c


def _train():
    c = ConfigDict()
    c.steps = 1000  # steps of the whole run
    c.log_steps = 50  # steps between two progress lines; the first and the last step always have one
    c.max_bad_steps = 20  # the run stops after this many consecutive steps with a non-finite loss or gradient
    c.xla_flags = True  # compiles the step with the chip's options in clip_jax/runtime/xla_flags.py
    c.stall_minutes = 20.0  # the run stops when data, a step, an evaluation or a checkpoint takes longer; 0: never
    return c


def _checkpoint():
    c = ConfigDict()
    c.steps = 1000  # steps between two saves; 0: only by minutes and at the end
    c.minutes = 15.0  # minutes between two saves; 0: only by steps
    c.keep = 2  # newest checkpoints that are kept
    c.best = ""  # metric by which the best checkpoint is kept too; "-name": lower is better; empty: none
    return c


def _eval():
    c = ConfigDict()
    c.steps = 0  # steps between two evaluations; 0: only at the end
    # At the end: emoji | zeroshot(...) | retrieval(...) | relations(...) | probe(...) | knn(...), docs/evaluation.md
    c.tasks = ("emoji",)
    c.train_tasks = ()  # tasks that run every eval.steps steps
    c.transform = ("resize", "center_crop")  # image transforms of evaluation, CLIP's
    c.batch_size = 256  # global batch size of embedding
    c.ema = False  # evaluates the moving average of the weights
    c.report = True  # writes report.html after the last evaluation
    return c


def load_module(spec):
    """Returns `(module, variant)` of `"FILE.py[:variant]"` (`config_files.find`); its folder joins the import path."""
    path, _, variant = spec.partition(":")
    path = config_files.find(path)
    module_spec = importlib.util.spec_from_file_location("clip_jax_config", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.path += {os.path.dirname(os.path.abspath(path))} - {*sys.path}
    module_spec.loader.exec_module(module)
    return module, variant


def load(spec, overrides=()):
    """Returns the configuration of `"path/to/file.py[:variant]"` with overrides `["optim.lr=3e-4", ...]`.

    Raises UserError for a missing file, a file without `get_config`, an unknown key, or a value of the wrong type.
    """
    module, variant = load_module(spec)
    if variant in getattr(module, "STUDIES", ()):
        raise UserError(f"--config={spec} is a study: python -m clip_jax.study --config={spec} --workdir=...")
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {module.__file__!r} has no function get_config(variant)")
    return own_data.adapt(override(module.get_config(variant), overrides), overrides)


def sibling(file, spec):
    """Returns the configuration `spec`, such as `"clip.py:emoji"`, from the folder of `file`.

    Args:
      file: the `__file__` of a configuration that starts from another one.
      spec: `FILE.py[:VARIANT]`, relative to that folder.
    """
    return load(os.path.join(os.path.dirname(os.path.abspath(file)), spec))


def set_method(config, name, options):
    """Sets the method of a configuration, and returns the configuration.

    Args:
      config: the configuration.
      name: the method, and the name of the section that holds its options.
      options: a dataclass; its fields become the section.
    """
    with config.unlocked():
        config.method, config[name] = name, ConfigDict(dataclasses.asdict(options))
    return config


def override(config, overrides):
    """Sets fields of a configuration in place, `["optim.lr=3e-4", ...]`, and returns it.

    Raises one UserError for all wrong overrides, like `load`.
    """
    problems = Problems()
    for text in overrides:
        key, _, value = text.partition("=")
        problems.check(_override, config, key, value)
    problems.end()
    return config


def parse_overrides(arguments):
    """Returns `["optim.lr=3e-4", ...]` for the arguments `--config.optim.lr=3e-4` or `--config.optim.lr 3e-4`.

    Raises one UserError for all other arguments.
    """
    rest, overrides = list(arguments), []
    problems = Problems()
    while rest:
        argument = rest.pop(0)
        if "=" not in argument and argument.startswith("--") and rest and not rest[0].startswith("--"):
            argument += "=" + rest.pop(0)
        if not argument.startswith("--config."):
            problems.add(config_checks.unknown_argument(argument, list(_keys(base()))))
        elif "=" not in argument:
            problems.add(f"{argument!r} has no value")
        else:
            overrides.append(argument.removeprefix("--config."))
    problems.end()
    return overrides


def _keys(config, prefix=""):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def _override(config, key, text):
    """Sets the field `key`, such as "optim.lr", of a configuration to `text`, converted to the type of the field."""
    *parents, name = key.split(".")
    section = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or name not in section:
        raise UserError(f"unknown config key {key!r}{config_checks.nearest_field(key, list(_keys(config)))}")
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
        # "rrc(0.9, 1.0),flip" is split at the commas outside of brackets.
        return tuple(part.strip() for part in re.split(r",(?![^()\[\]]*[)\]])", text) if part.strip())
    return text


def _tuples(value):
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value


def to_json(config):
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text):
    """Returns the configuration that `to_json` stored; fields that were added later have their defaults.

    Raises UserError, in one line, for a missing section and for a value of another type than its default's.
    """
    stored = _tuples(json.loads(text))
    problem = next((f"it has no {key!r}" for key in ("method", "tokenizer", "model") if key not in stored), None)
    problem = problem or _fill(stored, base(), "")
    for which in () if problem else ("image", "text"):
        tower = stored["model"].get(which, {})
        if not isinstance(tower, dict) or not isinstance(tower.get("kind", ""), str):  # OneR's tower has no kind
            problem = f"model.{which}={tower!r}"
    if not problem and stored["model"]["dtype"] not in DTYPES:
        problem = f"model.dtype={stored['model']['dtype']!r}"
    try:
        if not problem:
            return ConfigDict(stored).lock()
    except ValueError as error:  # a name with a dot
        problem = error
    raise UserError(f"the stored configuration is damaged: {problem}")


def _fill(stored, defaults, prefix):
    """Adds the defaults of missing fields, but not to towers; returns the first wrong value as text, or None."""
    for name, default in defaults.items():
        if isinstance(default, ConfigDict) and prefix:
            continue
        value = stored.setdefault(name, {} if isinstance(default, ConfigDict) else default)
        problem = f"{prefix}{name}={value!r} "
        if isinstance(default, ConfigDict):
            problem = _fill(value, default, f"{name}.") if isinstance(value, dict) else problem + "is not a section"
            if problem:
                return problem
            continue
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            return problem + f"must be of type {type(default).__name__}"
        if name in _TEXTS and not all(isinstance(x, str) for x in value):
            return problem + "must hold texts"
        if name in _COLOURS and not (len(value) == 3 and all(isinstance(x, int | float) for x in value)):
            return problem + "must hold three numbers"
    return None


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
    """Checks the values that no other part of the program checks. Raises one UserError for all wrong values."""
    config_checks.check(config)


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def differences(old, new, sections=None):
    """Returns the fields of two configurations that differ, `[(key, old value, new value)]`.

    Args:
      old: a configuration.
      new: another one. A field that one of them lacks, because it was added later, counts as its default.
      sections: compares only these sections or fields, such as `["model", "optim.lr"]`; None compares all.
    """
    defaults, old, new = (_flat(c) for c in (base(), old, new))
    keys = sorted(old | new)
    if sections is not None:
        keys = [k for k in keys if any(k == s or k.startswith(s + ".") for s in sections)]
    pairs = ((k, defaults.get(k)) for k in keys)
    return [(k, old.get(k), new.get(k)) for k, default in pairs if old.get(k, default) != new.get(k, default)]


def _flat(config):
    """`{key: value}` of all fields."""
    return {k: _get(config, k) for k in _keys(config) if not isinstance(_get(config, k), ConfigDict)}
