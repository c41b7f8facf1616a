"""Checkpoints through Orbax: asynchronous, sharded, and each complete in itself.

`<workdir>/checkpoints/<step>/` holds the state and a `meta` item with the configuration, the tokenizer's files, the
versions and the metrics, so that one such folder is enough to evaluate, resume or export. Of several hosts each writes what
its devices hold, into one folder that all share.
"""

import base64
import json
import logging
import os
import pathlib
import tempfile

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.runtime import faults, hosts
from clip_jax.version import __version__

#: Fields that decide what the saved arrays are and mean: a run cannot go on with other values.
IDENTITY = ("method", "model", "tokenizer", "optim.name", "optim.freeze", "optim.ema_decay", "seed", "data.batch_size")

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the states of one run in `<workdir>/checkpoints`. A context manager; every host has to make each call."""

    def __init__(self, workdir, config, tokenizer):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.config, self.tokenizer = config, _pack(tokenizer)
        policies = [checkpoint_managers.LatestN(config.checkpoint.keep)]
        if best := config.checkpoint.best:
            sign, name = (-1, best[1:]) if best.startswith("-") else (1, best)
            get = lambda metrics: sign * metrics[name] if metrics and name in metrics else float("-inf")  # noqa: E731
            policies.append(checkpoint_managers.BestN(get_metric_fn=get, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta"))

    def save(self, step, state, metrics):
        """Starts to save `state` (a TrainState) after `step` steps; `metrics` are the numbers that `checkpoint.best` looks at.

        Raises UserError when the save before this one, or the beginning of this one, failed.
        """
        if step in self.manager.all_steps():
            return
        meta = {
            "format": 1,
            "clip_jax": __version__,
            "jax": jax.__version__,
            "step": step,
            "config": json.loads(config_lib.to_json(self.config)),
            "tokenizer": self.tokenizer,
            "metrics": metrics,
        }
        with faults.stage("checkpoint"), _SaveFailure(self, step):
            self.manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=metrics or None,
            )

    def wait(self):
        """Blocks until everything is on disk; raises UserError when it could not be written."""
        with faults.stage("checkpoint"), _SaveFailure(self, "the newest"):
            self.manager.wait_until_finished()

    def newest(self):
        """The folder of the newest complete checkpoint, or None."""
        steps = [int(p.name) for p in self.folder.glob("*") if p.name.isdigit()]
        return self.folder / str(max(steps)) if steps else None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After an error on one host of several the others may never come to what closing waits for.
        if kind is None or hosts.count() == 1:
            with faults.stage("checkpoint"):
                self.manager.close()

    def restore(self, state):
        """The newest usable state with the shapes and shardings of `state` (a TrainState of ShapeDtypeStruct), or None if there is none.

        A damaged checkpoint is passed over, with a warning, for the one before. Raises UserError when none is left, and when the
        run in the folder was made with a configuration or tokenizer that does not fit, naming the fields.
        """
        with faults.stage("checkpoint"):
            steps = hosts.gather(sorted(self.manager.all_steps(), reverse=True))[0]
            for step in steps:
                found, problem = None, ""
                try:
                    self._check(read_meta(self.folder / str(step)))
                    found = restore_arrays(self.folder / str(step), state)
                except UserError:
                    raise
                except Exception as error:  # what Orbax raises for a damaged array is a bare Exception
                    problem = _line(error)
                # What one host cannot read is damaged for all of them.
                if not any(problems := hosts.gather(problem)):
                    return found
                problem = next(filter(None, problems))
                logger.warning("checkpoint %s/%d is damaged (%s); trying the one before", self.folder, step, problem)
        if steps:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read ({', '.join(map(str, steps))}); use another --workdir"
            )
        return None

    def _check(self, meta):
        old = config_lib.from_json(json.dumps(meta["config"]))
        changed = config_lib.differences(old, self.config, IDENTITY)
        if changed:
            what = "; ".join(f"{key} was {a!r}, is now {b!r}" for key, a, b in changed)
            raise UserError(
                f"{self.folder} holds a run that this configuration cannot continue: {what}. Use another --workdir"
            )
        if meta["tokenizer"]["fingerprint"] != self.tokenizer["fingerprint"]:
            what = f"the files of the tokenizer {self.config.tokenizer!r} are others than it was trained with"
            raise UserError(
                f"{self.folder} holds a run that this configuration cannot continue: {what}. Use another --workdir"
            )
        changed = [
            c
            for c in config_lib.differences(old, self.config)
            if c[0].split(".")[0] not in ("log", "eval", "checkpoint", "mesh")
        ]
        for key, a, b in changed:
            logger.warning("the run is continued with another %s: it was %r, is now %r", key, a, b)


class _SaveFailure:
    """Turns what goes wrong in writing (a full disk, a folder that is gone) into one line that names the last good checkpoint."""

    def __init__(self, checkpointer, step):
        self.checkpointer, self.step = checkpointer, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, UserError) or not isinstance(error, Exception) or faults.is_loss(error):
            return
        good = self.checkpointer.newest()
        last = f"the last good checkpoint is {good}" if good else "there is no earlier one"
        raise UserError(f"could not save checkpoint {self.step} ({_line(error)}); {last}") from error


def _line(error):
    return " ".join(str(error).split())[:300]


def _alone():
    """Each host reads for itself: were it to wait for the others, one that finds damage would leave them waiting."""
    return ocp.options.MultiprocessingOptions(active_processes={jax.process_index()}, primary_host=jax.process_index())


def restore_arrays(folder, target):
    """The arrays of checkpoint `folder` that a pytree of ShapeDtypeStruct names, with its dtypes and shardings; others are not read."""
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(pathlib.Path(folder).absolute() / "state", args=args)


def read_meta(folder):
    """The `meta` item of one checkpoint folder, a dict; raises OSError or ValueError when it is not there or damaged."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(pathlib.Path(folder).absolute() / "meta", args=ocp.args.JsonRestore())


def find(path, which="latest"):
    """The folder of one checkpoint: `path` is a work folder, its `checkpoints` folder, or the folder of one step.

    `which`: `latest`, `best` (by the metric that the run was configured with), or a step number. Raises UserError when
    there is none.
    """
    path = pathlib.Path(path)
    if (path / "meta").is_dir() and (path / "state").is_dir():
        return path
    if not path.is_dir():
        raise UserError(f"there is no checkpoint: {str(path)!r} is no folder")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "meta").is_dir())
    if not steps:
        raise UserError(
            f"there is no checkpoint in {str(path)!r}: it has no folder with a step's number and 'state' and 'meta' in it"
        )
    if which == "latest":
        return folder / str(steps[-1])
    if which != "best":
        if str(which) not in map(str, steps):
            raise UserError(
                f"there is no checkpoint of step {which} in {str(folder)!r}: there are {', '.join(map(str, steps))}"
            )
        return folder / str(which)
    scores = {}
    for step in steps:
        meta = read_meta(folder / str(step))
        name = meta["config"]["checkpoint"]["best"]
        value = (meta["metrics"] or {}).get(name.lstrip("-"))
        if value is not None:
            scores[step] = -value if name.startswith("-") else value
    if not scores:
        raise UserError(
            f"no checkpoint in {str(folder)!r} has a metric to be best by: the run had checkpoint.best={name!r}"
        )
    return folder / str(max(scores, key=scores.get))


def _pack(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(pathlib.Path(folder).iterdir())}
    return {"fingerprint": tokenizer.fingerprint(), "files": files}


def unpack_tokenizer(meta):
    """The tokenizer stored in a `meta` item."""
    from clip_jax.data.tokenizers import make_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in meta["tokenizer"]["files"].items():
            with open(os.path.join(folder, os.path.basename(name)), "wb") as file:
                file.write(base64.b64decode(text))
        return make_tokenizer(folder)
