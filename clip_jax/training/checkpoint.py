"""Checkpoints by Orbax: asynchronous, sharded and self-contained.

`<workdir>/checkpoints/<step>/` holds the state and a `meta` item with the configuration, the tokenizer's files, the
versions and the metrics, so that one such folder is enough to evaluate, resume or export. A method that is a module of
the user is remembered by its path and content, and `<workdir>/method` has a copy of it. Each host writes the arrays
of its own devices into one shared folder. A checkpoint counts once its file `commit_success.txt` is there, which is
written last: buckets, and mounts of buckets, cannot rename folders.
"""

import base64
import json
import logging
import math
import os
import pathlib
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers

from clip_jax import config as config_lib
from clip_jax import plugins
from clip_jax.errors import StorageError, UserError
from clip_jax.runtime import faults, hosts, storage
from clip_jax.training.best import Best, score
from clip_jax.version import __version__

#: Fields that determine shape and meaning of the saved arrays. A run cannot resume with other values.
IDENTITY = ("method", "model", "tokenizer", "optim.name", "optim.freeze", "optim.ema_decay", "seed")
IDENTITY += ("data.batch_size", "data.order", "data.lanes", "data.window")

#: The folder in a work folder that holds a copy of the user's module.
METHOD = "method"

#: Parts of Orbax's messages about arrays that are readable but are not those asked for.
_MISFITS = ("not compatible with the stored shape", "Type mismatch at key path", "Length mismatch", "has no array")

#: The file that Orbax writes last. Before 0.12.8 it renamed a complete checkpoint, whose metadata have a time instead.
COMMIT, _RENAMED = "commit_success.txt", "_CHECKPOINT_METADATA"
#: Bytes of the smallest replicated array whose writing devices share. Each part of each shape is a program, which is
#: compiled at the first save. By Orbax's default even biases are divided.
_MIN_SHARED = 2**20
#: Parts of messages about a full disk, which is full at the next start, too.
_FULL = ("No space left", "File too large", "quota exceeded")

logger = logging.getLogger(__name__)


class Damaged(UserError):
    """A checkpoint whose files cannot be read, or whose arrays do not fit the configuration.

    Attributes:
      reason: the first error, in one line.
      is_whole: whether the files are readable.
    """

    def __init__(self, folder, error):
        self.reason = faults.one_line(error.__cause__ or error)
        self.is_whole = any(sign in self.reason for sign in _MISFITS)
        what = "does not fit the configuration" if self.is_whole else "is damaged"
        super().__init__(f"the checkpoint {str(folder)!r} {what}: {self.reason}")


def _state_handler():
    """Returns Orbax's handler of a state, which lets devices share the writing of replicated arrays where that pays."""
    types = ocp.type_handlers
    # The store keeps the types of random keys. Orbax has no public name for it.
    store = getattr(types.get_type_handler(jax.Array), "_array_metadata_store", None)
    arrays = types.ArrayHandler(
        min_slice_bytes_for_replica_parallel=max(1, _MIN_SHARED // jax.device_count()), array_metadata_store=store
    )
    others = [(kind, types.get_type_handler(kind)) for kind in (int, float, bytes, np.number, np.ndarray, str)]
    registry = types.create_type_handler_registry(*others, (jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class Checkpointer:
    """Saves and restores the states of one run in `<workdir>/checkpoints`.

    It is a context manager. Every host must make every call.
    """

    def __init__(self, workdir, config, tokenizer):
        self.folder = storage.absolute(workdir) / "checkpoints"
        storage.prepare_orbax(self.folder)
        self.config, self.tokenizer = config, _pack(tokenizer)
        self.method = plugins.describe(config.method, "clip_jax.methods", "make")
        if self.method and hosts.is_first():
            file = self.method["name"].replace(".", "/") + ".py"
            storage.write(storage.path(workdir) / METHOD / file, self.method["text"])
        policies = [checkpoint_managers.LatestN(config.checkpoint.keep)]
        if config.checkpoint.best:
            policies.append(
                Best(config.checkpoint.best, lambda step: read_meta(self.folder / str(step)).get("metrics"))
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
        )
        self.seconds = {}  # of the restored checkpoint, see `save`
        self.order = None  # of the records: the digest of the restored checkpoint, then that of this start
        with storage.guard(self.folder):
            if hosts.is_first():
                _commit_renamed(self.folder)
            hosts.wait("committed")
            handlers = {"state": _state_handler(), "meta": ocp.JsonCheckpointHandler()}
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step, state, metrics, seconds=None):
        """Starts to save a state, unless that step is saved already.

        Args:
          step: the number of steps done.
          state: a `TrainState`.
          metrics: `{name: number}`, which `checkpoint.best` chooses by.
          seconds: `{part: number}`, where the time of the run went (`clip_jax.runtime.goodput`).

        Raises StorageError when the previous save failed or this one cannot start, and UserError when the disk is full.
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
            "method": self.method,
            "metrics": metrics,
            "seconds": seconds or {},
            "order": self.order,
        }
        with faults.stage("checkpoint"), _SaveFailure(self, step):
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
            if not self.manager.save(step, args=items, metrics=metrics or None):
                raise OSError(f"the folder holds a later one, {self.manager.latest_step()}")

    def begin_order(self, digest, step, log):
        """Keeps the digest of the order of the records, and logs a warning where it is not the restored state's.

        Args:
          digest: that of `clip_jax.data.loader.Loader`.
          step: the first step of this start.
          log: takes the line.
        """
        if self.order not in (None, digest):
            log(
                f"warning: from step {step} on, the records come in another order than before: records were added or "
                "removed, or their blocks or weights changed; some will be seen again too early"
            )
        self.order = digest

    def wait(self):
        """Blocks until everything is stored. Raises as `save`."""
        with faults.stage("checkpoint"), _SaveFailure(self, "the newest"):
            self.manager.wait_until_finished()

    def newest(self):
        """Returns the folder of the newest complete checkpoint, or None."""
        steps = committed(self.folder)
        return self.folder / str(steps[-1]) if steps else None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # After an error on one of several hosts, the others may never reach the barrier that closing waits for.
        if kind is None or hosts.count() == 1:
            with faults.stage("checkpoint"):
                self.manager.close()

    def restore(self, state):
        """Returns the newest readable state, or None when the folder holds no checkpoint.

        A damaged checkpoint causes a warning, and the one before it is used. It is set aside.

        Args:
          state: a `TrainState` of `jax.ShapeDtypeStruct` with shardings.

        Raises UserError when every checkpoint is damaged, and when the run in the folder has another configuration or
        tokenizer, or other arrays; the message names the fields. Raises StorageError when a bucket cannot be read.
        """
        with faults.stage("checkpoint"):
            steps = hosts.gather(sorted(self.manager.all_steps(), reverse=True))[0]
            for step in steps:
                found, problem, misfit = self._read(step, state)
                # A checkpoint that one host cannot read counts as damaged on all hosts.
                failures = [failure for failure in hosts.gather((problem, misfit)) if failure[0]]
                if not failures:
                    self._set_aside([other for other in steps if other > step])
                    return found
                problem, misfit = failures[0]
                if misfit:
                    where = f"{self.folder} holds a run that this configuration cannot continue"
                    raise UserError(f"{where}: {misfit}. Use another --workdir")
                logger.warning("checkpoint %s/%d is damaged (%s); trying the one before", self.folder, step, problem)
        if steps:
            found = ", ".join(map(str, steps))
            raise UserError(f"none of the checkpoints in {self.folder} can be read ({found}); use another --workdir")
        return None

    def _read(self, step, state):
        """Returns the state of a step, and two lines: what is wrong with it, and why its whole arrays do not fit."""
        changed = []
        try:
            meta = read_meta(self.folder / str(step))
            changed = self._check(meta)
            found = restore_arrays(self.folder / str(step), state)
        except Damaged as error:
            fields = "".join(f"; {key} was {a!r}, is now {b!r}" for key, a, b in changed)
            return None, error.reason, f"{error.reason}{fields}" if error.is_whole else ""
        except (UserError, StorageError):
            raise
        except Exception as error:
            return None, faults.one_line(error), ""
        self.seconds, self.order = meta.get("seconds", {}), meta.get("order")
        return found, "", ""

    def _set_aside(self, steps):
        """Renames damaged checkpoints, because Orbax saves only after the newest one."""
        if hosts.is_first():
            for path in (self.folder / str(step) for step in steps):
                aside = self.folder / f"{path.name}.damaged-{time.time_ns()}"
                if storage.is_remote(path):
                    storage.copy(path, aside, last=COMMIT)
                    storage.remove(path)
                else:
                    path.rename(aside)
        if steps:
            hosts.wait("set aside")
            self.manager.reload()

    def _check(self, meta):
        """Returns the fields that changed, as `config.differences`. Raises UserError when one of them is `IDENTITY`."""
        old = config_lib.from_json(json.dumps(meta["config"]))
        changed = config_lib.differences(old, self.config, IDENTITY)
        if changed:
            what = "; ".join(f"{key} was {a!r}, is now {b!r}" for key, a, b in changed)
            raise UserError(
                f"{self.folder} holds a run that this configuration cannot continue: {what}. Use another --workdir"
            )
        if meta["tokenizer"]["fingerprint"] != self.tokenizer["fingerprint"]:
            what = f"the files of the tokenizer {self.config.tokenizer!r} differ from those of the run"
            raise UserError(
                f"{self.folder} holds a run that this configuration cannot continue: {what}. Use another --workdir"
            )
        changed = [
            c
            for c in config_lib.differences(old, self.config)
            if c[0].split(".")[0] not in ("log", "eval", "checkpoint", "mesh", "compile", "profile")
        ]
        for key, a, b in changed:
            logger.warning("the run resumes with another %s: it was %r, is now %r", key, a, b)
        return changed


def committed(folder):
    """Returns the sorted steps of the complete checkpoints in a `checkpoints` folder; StorageError as `restore`."""
    with storage.guard(folder):
        try:
            return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and is_committed(p))
        except (FileNotFoundError, NotADirectoryError):
            return []


def is_committed(folder):
    """Whether the folder of a step holds a complete checkpoint."""
    return (folder / COMMIT).exists() or _is_renamed(folder)


def _is_renamed(folder):
    """Whether a checkpoint is complete by the rule of Orbax before 0.12.8, which never wrote `COMMIT`."""
    try:
        is_done = bool(json.loads((folder / _RENAMED).read_text()).get("commit_timestamp_nsecs"))
        return is_done and not (folder / "state" / COMMIT).exists()
    except (OSError, ValueError):
        return False


def _commit_renamed(folder):
    """Marks complete checkpoints of Orbax before 0.12.8, which Orbax would delete now."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.isdigit() and not (path / COMMIT).exists() and _is_renamed(path):
            (path / COMMIT).write_text("")


class _SaveFailure:
    """Turns a failed write (a full disk, a deleted folder) into one line that names the last good checkpoint."""

    def __init__(self, checkpointer, step):
        self.checkpointer, self.step = checkpointer, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, UserError) or not isinstance(error, Exception) or faults.is_loss(error):
            return
        try:
            good = self.checkpointer.newest()
            last = f"the last good checkpoint is {good}" if good else "there is no earlier one"
        except StorageError:
            last = f"the last good checkpoint in {self.checkpointer.folder} is unchanged"
        is_full = not storage.is_remote(self.checkpointer.folder) and any(sign in str(error) for sign in _FULL)
        kind = UserError if is_full else StorageError
        raise kind(f"could not save checkpoint {self.step} ({faults.one_line(error)}); {last}") from error


def _alone():
    """Options by which each host reads alone.

    If it waited for the others, a host that finds damage would block them.
    """
    return ocp.options.MultiprocessingOptions(active_processes={jax.process_index()}, primary_host=jax.process_index())


def restore_arrays(folder, target):
    """Returns arrays of the checkpoint `folder`.

    Args:
      folder: the folder of one step.
      target: a pytree of `jax.ShapeDtypeStruct` with shardings. Only its arrays are read, in its dtypes and shardings.

    Raises Damaged when an array is missing, damaged or of another shape, and StorageError when a bucket cannot be read.
    """
    storage.prepare_orbax(folder)
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    state = storage.absolute(folder) / "state"
    try:
        if not storage.is_remote(state) and (state / "manifest.ocdbt").exists():
            # Without its list of arrays Orbax would fail for each array and print a traceback for most of them.
            ts.KvStore.open({"driver": "ocdbt", "base": state.as_uri() + "/"}).result().list().result()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
            found = checkpointer.restore(state, args=args)
        for path, x in jax.tree_util.tree_leaves_with_path(found):
            if isinstance(x, jax.ShapeDtypeStruct):  # Orbax returns what it was asked for
                raise ValueError(f"it has no array {jax.tree_util.keystr(path, simple=True, separator='/')}")
        return found
    except (MemoryError, jax.errors.JaxRuntimeError):  # too little memory, or another process is lost
        raise
    except Exception as error:  # Orbax raises a bare Exception for a damaged array
        _raise_failure(folder, error)
        raise Damaged(folder, error) from error


def _raise_failure(folder, error):
    """Raises StorageError when an error comes from the service of a bucket, and not from a damaged checkpoint."""
    if storage.is_remote(folder) and storage.is_failure(error):
        raise StorageError(f"{folder} cannot be read: {faults.one_line(error)}") from error


def read_meta(folder):
    """Returns the `meta` item of one checkpoint folder, a dict; raises Damaged when it is missing or damaged.

    Raises StorageError when a bucket cannot be read.
    """
    try:
        # Orbax's reader of this file would touch the devices.
        meta = json.loads((storage.absolute(folder) / "meta" / "metadata").read_text())
        if not isinstance(meta, dict) or not all(isinstance(meta.get(key), dict) for key in ("config", "tokenizer")):
            raise ValueError("its meta item has no configuration or no tokenizer")
    except Exception as error:
        _raise_failure(folder, error)
        if not isinstance(error, OSError | ValueError):
            raise
        raise Damaged(folder, error) from error
    return meta


def find(path, which="latest"):
    """Returns the folder of one checkpoint.

    Args:
      path: a work folder, its `checkpoints` folder, or the folder of one step.
      which: `latest`, `best` (by the run's own `checkpoint.best`), or a step number.

    Raises UserError when no such checkpoint exists, and StorageError when a bucket cannot be read.
    """
    path = storage.path(path)
    with storage.guard(path):
        if (path / "meta").is_dir() and (path / "state").is_dir():
            if not is_committed(path):
                raise UserError(f"the checkpoint {str(path)!r} is incomplete: it has no {COMMIT}")
            return path
        if not path.is_dir():
            raise UserError(f"there is no checkpoint: {str(path)!r} is no folder")
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = committed(folder)
    if not steps:
        raise UserError(
            f"there is no checkpoint in {str(path)!r}: a checkpoint is a folder whose name is a step number, with"
            f" 'state', 'meta' and {COMMIT} in it"
        )
    if which == "latest":
        return folder / str(steps[-1])
    if which != "best":
        if str(which) not in map(str, steps):
            raise UserError(
                f"there is no checkpoint of step {which} in {str(folder)!r}; its steps: {', '.join(map(str, steps))}"
            )
        return folder / str(which)
    scores = {}
    for step in steps:
        meta = read_meta(folder / str(step))
        name = config_lib.from_json(json.dumps(meta["config"])).checkpoint.best
        if (value := score(meta.get("metrics"), name)) > -math.inf:
            scores[step] = value
    if not scores:
        raise UserError(
            f"no checkpoint in {str(folder)!r} has the metric that decides which is best, checkpoint.best={name!r}"
        )
    return folder / str(max(scores, key=scores.get))


def _pack(tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(pathlib.Path(folder).iterdir())}
    return {"fingerprint": tokenizer.fingerprint(), "files": files}


def unpack_tokenizer(meta):
    """Returns the tokenizer that a `meta` item stores; raises UserError when it is damaged."""
    from clip_jax.data.tokenizers import make_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, text in meta["tokenizer"]["files"].items():
                with open(os.path.join(folder, os.path.basename(name)), "wb") as file:
                    file.write(base64.b64decode(text))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {faults.one_line(error)}"
            raise UserError(f"the tokenizer that the checkpoint stores is damaged ({reason})") from None
        return make_tokenizer(folder)
