"""Work folders as a user names them: run it again, fork it, and what a folder remembers of its configurations.

    python -m clip_jax.train --config=runs/a/config.json --workdir=runs/again
    python -m clip_jax.train --fork-from=runs/a --workdir=runs/b --config.optim.lr=1e-4 --config.train.steps=9000

Files of a work folder:

  config.json: the configuration of the run that is running, or ran last.
  config_history.jsonl: a line for each start with another configuration,
    `{"step": 500, "time": Unix time, "changes": {"optim.lr": [old, new]}}`; the first line is the run's start.
  fork.json: of a fork, the run, the checkpoint and the configuration that it started from.
  run.json: parameters, FLOPs of an example, and the machine of the newest start.
"""

import dataclasses
import json
import os
import time

from clip_jax import config as config_lib
from clip_jax import from_weights
from clip_jax.errors import UserError
from clip_jax.runtime import hosts, lock, storage
from clip_jax.version import __version__

CONFIG, HISTORY = "config.json", "config_history.jsonl"
FORK, MACHINE = "fork.json", "run.json"
#: Fields that a fork cannot change, as the state depends on them; and fields of the model on which it does not.
FIXED = ("method", "model", "tokenizer", "optim.name", "optim.freeze")
FREE = "model.dtype model.remat model.attention model.logit_scale_max model.image.patch_drop".split()
FREE += [f"model.{tower}.{name}" for tower in ("image", "text") for name in ("dropout", "attention_dropout")]
#: Fields that a fork does not have: its whole state comes from the run.
WEIGHTS = ("init_from", "init_from_params", "init_from_allow", "init_from_resize")


@dataclasses.dataclass(frozen=True)
class Fork:
    """Where a new work folder takes its state from.

    Attributes:
      run: the run, as the command line names it.
      checkpoint: the address of the checkpoint.
      step: its step.
      config: the configuration of that checkpoint, as a nested dict.
    """

    run: str
    checkpoint: str
    step: int
    config: dict


def add_arguments(parser):
    """Adds the flags of a training run to a parser: --config, --fork-from and --workdir."""
    parser.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="a configuration, e.g. configs/clip.py:smoke, or the config.json of a run",
    )
    parser.add_argument(
        "--fork-from",
        metavar="RUN",
        help="in place of --config: starts from the newest checkpoint of a run, with its configuration and changes",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder, gs:// or s3:// address of checkpoints, metrics and the report; a run in it is resumed",
    )


def from_arguments(args, overrides):
    """Returns `(config, Fork or None)` of parsed flags and overrides, `["optim.lr=3e-4", ...]`. Raises UserError."""
    if (args.config is None) == (args.fork_from is None):
        given = "not both" if args.config else "one is needed"
        raise UserError(f"give --config=FILE[:VARIANT] or --fork-from=RUN: {given}")
    if args.fork_from is None:
        return load(args.config, overrides), None
    return _forked(args.fork_from, storage.path(args.workdir), overrides)


def load(spec, overrides=()):
    """Returns the configuration of `FILE.py[:VARIANT]`, or of a run's config.json, with overrides.

    Raises UserError as `clip_jax.config.load`, and for an unreadable config.json.
    """
    if not spec.endswith(".json"):
        if not storage.is_remote(spec) and os.path.isfile(os.path.join(spec, CONFIG)):
            raise UserError(f"--config={spec} is a run: its configuration is --config={os.path.join(spec, CONFIG)}")
        return from_weights.load(spec, overrides)
    text = storage.read(spec)
    if text is None:
        raise UserError(f"--config={spec}: there is no such file")
    return config_lib.override(_unresolved(parsed(text, f"--config={spec}")), overrides)


def parsed(text, where):
    """Returns the configuration of JSON text; raises UserError, which begins with `where`, when it is none."""
    try:
        return config_lib.from_json(text)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where} is no configuration: {error}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _unresolved(config):
    """Returns the configuration without what the tokenizer sets, so that it can be changed."""
    text = config.model.get("text", {})
    for field, value in (("vocab_size", 0), ("eot_id", -1)):
        if field in text:
            text[field] = value
    return config


def _forked(run, workdir, overrides):
    fork = _read_fork(run, workdir) or _new_fork(run, workdir)
    old = config_lib.from_json(json.dumps(fork.config))
    config = config_lib.from_json(json.dumps(fork.config))
    defaults = config_lib.base()
    for field in WEIGHTS:
        config[field] = defaults[field]
    where = f"--fork-from={run}"
    if field := next((o for o in overrides if o.partition("=")[0] in WEIGHTS), None):
        raise UserError(f"{where}: the whole state comes from the run, so {field} has no place")
    config = config_lib.override(config, overrides)
    changed = [c for c in config_lib.differences(old, config, FIXED) if c[0] not in FREE]
    changed += [c for c in config_lib.differences(old, config, ["optim.ema_decay"]) if not (c[1] and c[2])]
    if changed:
        what = "; ".join(f"{key} was {a!r}, is now {b!r}" for key, a, b in changed)
        raise UserError(f"{where}: a fork keeps what its state depends on: {what}; init_from takes weights alone")
    if config.train.steps <= fork.step:
        raise UserError(
            f"{where}: its newest checkpoint is that of step {fork.step}, and train.steps={config.train.steps}: give"
            " more, --config.train.steps=N"
        )
    return config, fork


def _read_fork(run, workdir):
    """Returns the Fork that a work folder is, None for a new folder. Raises UserError for any other run."""
    text = storage.read(workdir / FORK)
    if text is None:
        if storage.read(workdir / CONFIG) is None:
            return None
        raise UserError(f"--workdir={workdir} holds another run: --fork-from needs a new work folder")
    try:
        fields = json.loads(text)
        fork = Fork(**{field.name: fields[field.name] for field in dataclasses.fields(Fork)})
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--workdir={workdir}: {FORK} is damaged") from None
    if fork.run != str(run):
        raise UserError(f"--workdir={workdir} is a fork of {fork.run}, not of {run}: use another --workdir")
    return fork


def _new_fork(run, workdir):
    from clip_jax.training import checkpoint

    if checkpoint.committed(workdir / "checkpoints"):
        raise UserError(f"--workdir={workdir} holds another run: --fork-from needs a new work folder")
    try:
        folder = checkpoint.find(run)
        meta = checkpoint.read_meta(folder)
    except UserError as error:
        raise UserError(f"--fork-from={run}: {error}") from None
    return Fork(str(run), str(storage.absolute(folder)), int(meta["step"]), meta["config"])


def begin(config, method, workdir, fork=None, log=print):
    """Gives a new work folder the checkpoint of a fork, if it is one. Every process must call it.

    Args:
      config: the configuration, resolved.
      method: its method.
      workdir: the work folder.
      fork: a `Fork` whose checkpoint a new work folder gets.
      log: takes a line.

    Raises UserError when the state of the fork does not fit the configuration, or its checkpoint is gone.
    """
    from clip_jax.training import checkpoint

    if fork is None or hosts.gather(bool(checkpoint.committed(workdir / "checkpoints")))[0]:
        return
    _check_state(config, method, fork)
    if hosts.is_first():
        with lock.hold(workdir, log):
            _copy(config, workdir, fork)
    hosts.wait("forked")
    log(f"forked from {fork.run}, step {fork.step}")


def is_beyond(config, workdir, step, log=print):
    """Whether the run in a work folder, at `step`, has more steps than asked for; it says so, as it is left alone."""
    steps = config.train.steps
    if step > steps:
        where = f"the run in {workdir} has {step} steps, more than train.steps={steps}: it is left as it is"
        log(f"{where} (evaluate it: python -m clip_jax.evaluate --checkpoint={workdir})")
    return step > steps


def _check_state(config, method, fork):
    """Raises UserError when the state of the configuration has other arrays than that of the fork."""
    from clip_jax.methods.interface import make_method

    old = config_lib.from_json(json.dumps(fork.config))
    there, here = _state(old, make_method(old)), _state(config, method)
    names = sorted(there.keys() | here.keys())
    differ = next((name for name in names if there.get(name) != here.get(name)), None)
    if differ:
        was, now = (str(found.get(differ, "missing")) for found in (there, here))
        fields = config_lib.differences(old, config, ("model", "optim", config.method))
        what = ", ".join(key for key, *_ in fields) or "these changes"
        raise UserError(f"--fork-from={fork.run}: {what} would alter its state: {differ} is {was} there, {now} here")


def _state(config, method):
    """Returns `{path: shape}` of the arrays of a training state."""
    import jax

    from clip_jax.runtime.sharding import path_name
    from clip_jax.training.step import make_init, state_shapes

    shapes = state_shapes(make_init(config, method, method.batch_spec(2))[0])
    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}


def _copy(config, workdir, fork):
    """Copies the checkpoint of a fork; the copy has the configuration of the fork, and no time spent."""
    from clip_jax.training import checkpoint

    source, place = storage.path(fork.checkpoint), workdir / "checkpoints" / str(fork.step)
    storage.write(workdir / FORK, json.dumps(dataclasses.asdict(fork) | {"time": round(time.time(), 3)}, indent=1))
    try:
        meta = checkpoint.read_meta(source)
        meta |= {"config": json.loads(config_lib.to_json(config)), "seconds": {}, "order": None}
        storage.remove(place)  # what a kill left
        storage.copy(source, place, last=checkpoint.COMMIT, instead={"meta/metadata": json.dumps(meta)})
    except (FileNotFoundError, UserError):
        storage.remove(place)
        raise UserError(
            f"--fork-from={fork.run}: its checkpoint {fork.checkpoint} is gone: delete {workdir} and fork again"
        ) from None


def record(workdir, config, step):
    """Writes config.json on the first host, and a line of config_history.jsonl when it differs from the one there."""
    if not hosts.is_first():
        return
    fork = storage.read(workdir / FORK)
    old = storage.read(workdir / CONFIG)
    new = config_lib.to_json(config)
    if old == new:
        return
    row = {"step": step, "time": round(time.time(), 3), "clip_jax": __version__, "changes": {}}
    if old is None and fork is not None:
        row["forked_from"] = json.loads(fork)["checkpoint"]
        old = json.dumps(json.loads(fork)["config"])
    try:
        before = config_lib.from_json(old) if old else config
        row["changes"] = {key: [a, b] for key, a, b in config_lib.differences(before, config)}
    except (UserError, ValueError, AttributeError, TypeError):  # a damaged file, which is replaced
        row["note"] = f"{CONFIG} was damaged"
    storage.write(workdir / HISTORY, (storage.read(workdir / HISTORY) or "") + json.dumps(row) + "\n")
    storage.write(workdir / CONFIG, new)


def history(workdir):
    """Returns the lines of config_history.jsonl as dicts; unreadable ones are left out."""
    return storage.read_rows(storage.path(workdir) / HISTORY)


def read_json(path):
    """Returns the dict of a JSON file of a work folder; {} where there is none, or it is damaged."""
    try:
        found = json.loads(storage.read(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def describe(workdir, config, params, flops, size):
    """Writes run.json on the first host: what the run costs, and where it runs.

    Args:
      workdir: the work folder.
      config: the configuration.
      params: the parameters.
      flops: the model's FLOPs of a step, over all devices.
      size: the bytes of a step on one device, the compiler's estimate; None where it gives none.
    """
    import jax

    if not hosts.is_first():
        return
    devices = jax.devices()
    found = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops_per_example": flops / config.data.batch_size,
        "step_bytes": size,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "hosts": hosts.count(),
        "clip_jax": __version__,
    }
    storage.write(workdir / MACHINE, json.dumps(found, indent=1))
