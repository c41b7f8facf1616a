"""The variants `:small` of the configurations, for the user's own data on one small machine, and the held-out records.

`base` is CLIP with towers of a few million parameters, which open_clip and Hugging Face can express. The fields that
`small.fields` names follow from the data (`fit`); a run stores them, so that a resumed run and an evaluation have the
same. `held_out_tasks` are the tasks of `data.holdout`.
"""

import dataclasses
import os
import re
import statistics

from clip_jax import config as config_lib
from clip_jax.data import decode
from clip_jax.data.records import BadRecord, label_tuple
from clip_jax.data.sources import configured_source, make_source
from clip_jax.data.sources.spec import with_step
from clip_jax.data.templates import fill_template, usable_texts
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.interop.towers.files import is_foreign
from clip_jax.runtime import storage

_PATCHES = 8  # along a side of an image, so that the cost of a step does not depend on its size
_SAMPLE = 512  # records that are looked at
_LOOKED_AT = 2000  # held-out records, at most, that are evaluated
_CONTEXTS = 16, 77
_BATCHES = 16, 256
_EXAMPLES = 20_000, 1_000_000
NAME = "held_out"


@dataclasses.dataclass(frozen=True)
class Options:
    """The section `config.small`.

    Attributes:
      fields: the fields that are chosen from the data; empty once they are. One that the command line sets is not.
      sizes: of images, in pixels. The largest one that is no larger than the median shorter side is chosen.
      epochs: passes over the data, unless these are fewer than 20,000 or more than 1,000,000 examples.
      needs: what the method needs besides pairs: `(field of the records, how it is made)`, or `("init_from", how)`.
      apart: a field that gets a tenth of the records, chosen by a hash of the image; training has the others.
    """

    fields: tuple[str, ...] = (
        *("model.image.size", "model.image.patch", "model.text.context", "data.batch_size", "train.steps"),
        *("optim.warmup_steps", "eval.steps", "checkpoint.steps"),
    )
    sizes: tuple[int, ...] = (64, 96, 128, 224)
    epochs: int = 30
    needs: tuple[str, ...] = ()
    apart: str = ""


def base(**options):
    """Returns the configuration of `configs/clip.py:small`; `options` are fields of `Options`."""
    c = config_lib.base()
    with c.unlocked():
        c.small = dataclasses.asdict(Options(**options))
    c.data.update(dict(source="", holdout=0.1, batch_size=128, augment=("rrc(0.5, 1.0)", "jitter(0.2, 0.2, 0.2, 0.0)")))
    c.model.update(dict(embed_dim=192, dtype="float32"))
    tower = dict(width=192, heads=3, mlp_dim=768)
    c.model.image.update(dict(tower, size=128, patch=128 // _PATCHES, depth=4))
    c.model.text.update(dict(tower, context=32, depth=2))
    c.optim.update(dict(lr=1e-3, warmup_steps=100, weight_decay=0.1, grad_clip_norm=1.0))
    c.update(train=dict(steps=1000), checkpoint=dict(steps=250), eval=dict(steps=250, tasks=()))
    return c


def fitted(config, workdir=None, log=print):
    """Returns a copy of the configuration with the fields that follow from the data, and the tasks of `data.holdout`.

    Args:
      config: a configuration.
      workdir: the work folder. If it holds a run, its fields are taken.
      log: takes the lines that say what was chosen.

    Raises UserError when the data is missing or unusable, or lacks what the method needs.
    """
    fields, data = config.small.fields if "small" in config else (), config.data
    is_wrong = not 0 <= data.holdout < 1 or data.batch_size < 1 or config.train.steps < 1  # `config.validate` says it
    if is_wrong or not fields and not data.holdout:
        return config
    config = config.copy_and_resolve_references()
    if "small" in config:
        if not config.data.source.strip():
            raise UserError("name your data: --config.data=PATH, a table, shards or a folder of images (docs/data.md)")
        _set_apart(config)
    source = configured_source(config.data)
    if "small" in config:
        _check_needs(config, source)
    if fields:
        fields = _from_run(config, fields, workdir)
        lines = fit(config, source, fields) if fields else []
        config.small.fields = ()
        for line in lines:
            log(line)
    if config.data.holdout:
        _add_tasks(config, source, log)
    return config.lock()


def fit(config, source, fields):
    """Sets the fields of a configuration that follow from a source, and returns lines that say how.

    Args:
      config: an unlocked or locked configuration with a section `small`, changed in place.
      source: the training data.
      fields: names of fields; others stay as they are.
    """
    fields, lines = [field for field in fields if _section(config, field) is not None], []
    sides, lengths = _measure(config, source)
    if "model.image.size" in fields:
        side = statistics.median(sides)
        size = max((s for s in config.small.sizes if s <= side), default=min(config.small.sizes))
        config.model.image.size = size
        lines.append(f"images of {size} pixels: the median of the shorter sides is {side:.0f}")
    if "model.image.patch" in fields and "patch" in config.model.image:
        config.model.image.patch = max(1, config.model.image.size // _PATCHES)
    if "model.text.context" in fields and lengths:
        longest = sorted(lengths)[min(len(lengths) - 1, int(0.99 * len(lengths)))]
        low, high = _CONTEXTS
        config.model.text.context = min(max(-(-longest // 8) * 8, low), high)
        lines.append(f"texts of {config.model.text.context} tokens: 99 % have at most {longest}")
    count = len(source)
    if "data.batch_size" in fields:
        low, high = _BATCHES
        config.data.batch_size = min(max(1 << max(count // 8, 1).bit_length() - 1, low), high)
    batch = config.data.batch_size
    if "train.steps" in fields:
        low, high = _EXAMPLES
        config.train.steps = -(-min(max(config.small.epochs * count, low), high) // batch)
    steps = config.train.steps
    for field, share in (("optim.warmup_steps", 10), ("eval.steps", 4), ("checkpoint.steps", 4)):
        if field in fields:
            _section(config, field)[field.rpartition(".")[2]] = max(1, -(-steps // share))
    if {"data.batch_size", "train.steps"} & {*fields}:
        lines.append(f"{steps:,} steps of {batch}: {steps * batch / count:.0f} epochs of {count:,} records")
    return lines


def _section(config, field):
    """Returns the section of a field, None where the configuration lacks it, such as `model.text` of CLIPPO."""
    for name in field.split(".")[:-1]:
        config = config.get(name)
        if config is None:
            return None
    return config


def _sample(source):
    """Yields the usable records of an evenly spaced sample."""
    for i in range(min(len(source), _SAMPLE)):
        try:
            yield source[i * len(source) // min(len(source), _SAMPLE)]
        except BadRecord:
            continue


def _measure(config, source):
    """Returns the shorter sides of a sample of images, and the numbers of tokens of their texts."""
    tokenizer = make_tokenizer(config.tokenizer)
    special = (tokenizer.sot_id is not None) + 1 if "text" in config.model else 0
    sides, lengths = [], []
    for record in _sample(source):
        try:
            sides.append(min(decode.open_image(record.get("image")).size))
            if "text" in config.model:
                lengths += [len(tokenizer.encode(text)) + special for text in _texts(config, record)]
        except BadRecord:
            continue
    if not sides:
        raise UserError(f"{source.name}: none of {min(len(source), _SAMPLE)} records has a usable image")
    return sides, lengths


def _texts(config, record):
    if config.data.templates:
        return [fill_template(config.data.templates, record, None)]
    return usable_texts(record["texts"], strict=False)


def _from_run(config, fields, workdir):
    """Takes the fields from the run in a work folder, or the image tower from `init_from`; returns the other fields."""
    stored = workdir is not None and storage.read(storage.path(workdir) / "config.json")
    run = config_lib.from_json(stored) if stored else None
    if run is not None and "small" in run:
        for field in fields:
            section, name = _section(run, field), field.rpartition(".")[2]
            if section is not None and name in section and _section(config, field) is not None:
                _section(config, field)[name] = section[name]
        return ()
    is_run = os.path.isdir(config.init_from) and not is_foreign(config.init_from)
    if is_run and (weights := storage.read(os.path.join(config.init_from, "config.json"))):
        model = config_lib.from_json(weights).model
        if model.image.get("kind") == config.model.image.get("kind"):
            config.model.image.size, config.model.image.patch = model.image.size, model.image.patch
            return tuple(field for field in fields if not field.startswith("model.image."))
    return fields


def _check_needs(config, source):
    """Raises UserError when the data or `init_from` lacks what the method needs besides pairs."""
    if not config.small.needs:
        return
    field, how = config.small.needs
    given = config.init_from if field == "init_from" else any(_has(record, field) for record in _sample(source))
    if not given:
        what = "--config.init_from=PATH" if field == "init_from" else f"records with the field {field!r}"
        raise UserError(f"this variant needs {what}: {how.replace('DATA', config.data.source)}")


def _has(record, field):
    return record.get(field) is not None and len(record[field]) > 0


def _set_apart(config):
    """Gives a tenth of the records to the field `small.apart`, unless it names records already."""
    if field := config.small.apart:
        section, name = _section(config, field), field.rpartition(".")[2]
        if not section[name]:
            section[name] = with_step(config.data.source, "holdout", f"0.1:{name}")
            config.data.source = with_step(config.data.source, "holdout", f"!0.1:{name}")


def _add_tasks(config, source, log):
    """Adds the tasks on the held-out records to a configuration, in place of those of other data.

    A task of the user on held-out records stays the only one.
    """
    others = {key: [t for t in config.eval[key] if f"name='{NAME}" not in t] for key in ("tasks", "train_tasks")}
    if any("holdout=" in task for key in others for task in others[key]):
        return
    tasks, count = held_out_tasks(config.data)
    if config.method == "classify":  # its head is evaluated, and not the texts of the classes
        tasks = [re.sub(r"^zeroshot\(", "accuracy(", task) for task in tasks]
    log(f"held out of training: {count:,} of {len(source) + count:,} records; tasks: {', '.join(tasks)}")
    for key, own in others.items():
        config.eval[key] = (*own, *tasks)


def held_out_tasks(data):
    """Returns the task strings that evaluate the records that `data.holdout` keeps out, and the number of these.

    Retrieval where they have captions, zero-shot where all of them have one class with a name.

    Args:
      data: the section of a configuration.

    Raises UserError when no record is held out, or it has neither captions nor classes.
    """
    spec = with_step(data.source, "holdout", f"{data.holdout:g}")
    fields = {name: data[name] for name in ("image", "text", "label") if data[name]}
    source = make_source(spec, data.split, **fields)
    options = dict(source=spec, split=data.split)
    if len(source) > _LOOKED_AT:
        options["limit"] = _LOOKED_AT
    records = [record for _, record in zip(range(_SAMPLE), _usable(source), strict=False)]
    captioned = any(_captions(record) for record in records)
    labelled = source.class_names is not None and all(_has_one_label(record) for record in records)
    tasks = []
    if captioned:
        tasks.append(_call("retrieval", options, fields, ("image", "text"), NAME))
    if labelled:
        tasks.append(_call("zeroshot", options, fields, ("image", "label"), f"{NAME}_classes" if captioned else NAME))
    if not tasks:
        raise UserError(f"{spec}: the records have neither captions nor one named class each: nothing to evaluate")
    return tasks, len(source)


def _usable(source):
    for index in range(len(source)):
        try:
            yield source[index]
        except BadRecord:
            continue


def _captions(record):
    """Returns the texts of a record that say more than its class."""
    return [text for text in usable_texts(record["texts"], strict=False) if text != record.get("class_name")]


def _has_one_label(record):
    return not isinstance(record.get("label"), tuple) and bool(label_tuple(record))


def _call(task, options, fields, names, name):
    given = options | {key: fields[key] for key in names if key in fields} | {"name": name}
    return f"{task}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
