"""Takes the configuration of a model from the weights that a run starts from (`config.init_from_model`).

    python -m clip_jax.train --config=configs/clip.py:finetune --config.init_from=PATH --config.data=PATH --workdir=DIR

Method, towers, tokenizer, length of texts and preprocessing follow from the weights of `config.init_from`: a run of
this package or third-party weights. What the user sets on purpose wins: a field that the command line sets, or whose
value is not its default. Where such a field contradicts the weights, nothing is taken, and one message lists all of
them. Everything here happens before a device is touched.
"""

import ast
import json

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.init_from import recognized

#: Fields of `config.model` that say how it is computed: always those of the configuration.
_COMPUTED = ("dtype", "remat", "scan", "attention")
#: Fields that contradict no weights: start values and regularisation.
_FREE = ("logit_scale_init", "logit_bias_init", "temperature_init", "logit_scale_max")
_FREE_OF_TOWERS = ("weight_init", "proj_init", "dropout", "attention_dropout", "patch_drop", "stochastic_depth")
_FREE_OF_TOWERS += ("bn_group",)
#: Fields of towers that follow from the tokenizer.
_TOKENS = ("vocab_size", "eot_id")


def base():
    """Returns the configuration of fine-tuning, which `configs/clip.py:finetune` is.

    Batch, learning rate, weight decay and warm-up are those of FLYP (Goyal et al. 2023, "Finetune Like You Pretrain")
    on ImageNet, which tunes CLIP with its own loss; the other constants are those of PyTorch's AdamW, which it uses.
    The steps are an assumption: FLYP trains 10 epochs.
    """
    c = config_lib.base()
    c.update(init_from_model=True, train=dict(steps=2000), checkpoint=dict(steps=500), eval=dict(tasks=()))
    c.data.update(dict(source="", batch_size=512))
    c.optim.update(dict(lr=1e-5, warmup_steps=500, weight_decay=0.1, b2=0.999, eps=1e-8, no_decay=()))
    return c


def load(spec, overrides=()):
    """Returns the configuration of `clip_jax.config.load` with the model of the weights, as `take` does."""
    return take(config_lib.load(spec, overrides), overrides)


def take(config, overrides=()):
    """Returns a configuration with the fields that follow from the weights of `init_from`.

    It returns `config` itself unless `config.init_from_model` is set, which is unset in the result.

    Args:
      config: a configuration.
      overrides: its overrides from the command line, `["model.image.size=336", ...]`.

    Raises UserError without weights or data, for weights that are unreadable or are no whole model, and for fields
    that are set on purpose and contradict the weights.
    """
    if not config.init_from_model:
        return config
    _check_given(config)
    defaults, named = config_lib.base(), set(_keys(overrides))

    def is_set(key):
        return key in named or _get(config, key) != _get(defaults, key)

    own, theirs = _source(config.init_from, not is_set("tokenizer"))
    taken = config.copy_and_resolve_references().unlock()
    problems = _take_method(taken, theirs, is_set)
    problems += _take_tokenizer(taken, theirs, own, is_set)
    problems += _take_model(taken, theirs, is_set)
    _take_preprocessing(taken, config, theirs, is_set)
    if problems:
        raise UserError(
            f"init_from: {config.init_from} contradicts what is set here: {'; '.join(problems)}; leave these fields out"
            " to take them from the weights (init_from_model)"
        )
    taken.init_from_model = False
    return taken.lock()


def _keys(overrides):
    """Yields the fields that overrides set, also those of a section that is given as a dict."""
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = None
        yield from (f"{key}.{field}" for field in value) if isinstance(value, dict) else (key,)


def _check_given(config):
    missing = {
        "weights": ("--config.init_from=PATH", not config.init_from),
        "data": ("--config.data=PATH", not config.data.source),
    }
    missing = {what: flag for what, (flag, is_missing) in missing.items() if is_missing}
    if missing:
        raise UserError(f"fine-tuning: give the {' and the '.join(missing)}: {' '.join(missing.values())}")


def _source(text, with_tokenizer):
    """Returns `(whether they are a run of this package, configuration)` of weights, with all fields of the towers.

    Args:
      text: `config.init_from`.
      with_tokenizer: whether the tokenizer of third-party weights is looked for. The configuration then has its spec,
        or "" without one.
    """
    from clip_jax.interop.load import find_tokenizer
    from clip_jax.interop.towers.files import is_foreign, sources
    from clip_jax.models import towers

    paths = sources(text)
    if list(paths) != [""]:
        raise UserError(
            f"init_from={text!r}: a model is taken from one source with both towers; without init_from_model, as in "
            "configs/lit.py, towers may come from two"
        )
    if not is_foreign(text):
        return True, _stored(text)
    foreign = recognized(text)
    if not foreign.config.method:
        which = next(name for name in ("image", "text") if name in foreign.config.model)
        raise UserError(
            f"init_from: {text} holds the {which} tower alone, but fine-tuning needs both: start a configuration that "
            "names its towers from it, such as configs/lit.py"
        )
    if with_tokenizer:
        find_tokenizer(foreign)
    towers.fill(foreign.config.model)
    return False, foreign.config


def _stored(path):
    """Returns the configuration of a run's newest checkpoint; raises UserError."""
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.training import checkpoint

    try:
        meta = checkpoint.read_meta(checkpoint.find(path))
        config = config_lib.from_json(json.dumps(meta["config"])).copy_and_resolve_references()
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    try:
        is_same = make_tokenizer(config.tokenizer).fingerprint() == meta["tokenizer"]["fingerprint"]
    except UserError:
        is_same = False
    if not is_same:
        config.tokenizer = ""
    return config


def _take_method(taken, theirs, is_set):
    """Takes the method and its options; returns what contradicts the weights."""
    if is_set("method") and taken.method != theirs.method:
        # Towers fit any method, but its other parameters have to be in the weights.
        missing = {"siglip": "logit_bias", "align": "temperature"}.get(taken.method)
        is_whole = missing is None or taken.init_from_params
        problem = f"method={theirs.method!r} there, {taken.method!r} here, whose {missing} they lack"
        return [] if is_whole else [f"{problem} (use configs/clip.py:finetune, or choose with init_from_params)"]
    taken.method = theirs.method
    for section in set(theirs) - set(config_lib.base()) - set(taken):
        taken[section] = theirs[section]
    return []


def _take_tokenizer(taken, theirs, own, is_set):
    """Takes the tokenizer; returns what contradicts the weights."""
    from clip_jax.data.tokenizers import make_tokenizer

    if not is_set("tokenizer"):
        taken.tokenizer = theirs.tokenizer
        if taken.tokenizer:
            return []
        hint = f"; clip_jax.load({taken.init_from!r}).tokenizer.save(FOLDER) writes it" if own else ""
        return [f"their tokenizer is not found: give it, --config.tokenizer=SPEC or a folder{hint}"]
    size, text = make_tokenizer(taken.tokenizer).vocab_size, theirs.model.get("text", {})
    if text.get("vocab_size", size) not in (-1, 0, size):
        return [f"tokenizer: {text.vocab_size} ids there, {size} of {taken.tokenizer!r} here"]
    return []


def _take_model(taken, theirs, is_set):
    """Takes the towers and the preprocessing of pixels; returns what contradicts the weights."""
    ours, problems = taken.model, []
    taken.model = theirs.model.copy_and_resolve_references().unlock()
    for which in ("image", "text"):
        if which not in theirs.model:
            continue
        section = taken.model[which]
        for field, value in ours[which].items():
            key = f"model.{which}.{field}"
            if field in _TOKENS or not is_set(key) or section.get(field) == value:
                continue
            if field in _FREE_OF_TOWERS or _is_resizable(theirs, which, field) or key in taken.init_from_allow:
                section[field] = value
                taken.init_from_resize |= field in ("size", "context")
            else:
                problems.append(f"{key}: {section.get(field)!r} there, {value!r} here")
    for field, value in ours.items():
        key, there = f"model.{field}", taken.model.get(field)
        if field in _COMPUTED or (is_set(key) and (field in _FREE or key in taken.init_from_allow)):
            taken.model[field] = value
        elif field not in ("image", "text") and is_set(key) and _plain(value) != _plain(there):
            problems.append(f"{key}: {there!r} there, {value!r} here")
    return problems


def _is_resizable(theirs, which, field):
    """Whether a field only changes the number of positions, which `init_from_resize` adapts."""
    tower = theirs.model[which]
    return (which, field, tower.kind) in (("image", "size", "vit"), ("text", "context", "transformer"))


def _plain(value):
    return list(value) if isinstance(value, tuple | list) else value


def _take_preprocessing(taken, config, theirs, is_set):
    """Takes the transform of evaluation, and an augmentation of the same kind."""
    from clip_jax.interop.load import resized

    if not is_set("eval.transform"):
        old, new = theirs.model.get("image", taken.model).get("size"), taken.model.get("image", {}).get("size")
        taken.eval.transform = resized(theirs.eval.transform, old, new) if old else theirs.eval.transform
    if not is_set("data.augment"):
        steps = taken.eval.transform
        is_squashed = any(step.startswith("squash") for step in steps)  # then SigLIP was trained with it, too
        crop = (*(step for step in steps if step == "drop_alpha"), *taken.data.augment)  # transparent pictures as there
        taken.data.augment = steps if is_squashed else crop


def _get(config, key):
    """Returns the value of a field, None where the configuration lacks it."""
    for part in key.split("."):
        config = config.get(part) if hasattr(config, "get") else None
    return config
