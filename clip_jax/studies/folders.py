"""Whose run and whose index a folder of a study holds: one of another definition is refused, never mixed in."""

import json
import os

from clip_jax import config as config_lib
from clip_jax import run_folder
from clip_jax.errors import UserError
from clip_jax.runtime import storage

#: The file in the folder of a run that tells how the study defined it.
DEFINITION = "study_run.json"
#: The same for the index of a row, in the folder of the row.
INDEX_DEFINITION = "study_index.json"


def begin(run):
    """Makes the folder of a run and writes how the study defines it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    storage.write(run.folder / DEFINITION, json.dumps(definition(run)))


def check(run):
    """Raises UserError when the folder of a run holds one that the study defined otherwise."""
    now = definition(run)
    before = now | run_folder.read_json(run.folder / DEFINITION)  # an older file has the changes alone
    if before["changes"] and not before["changes"][0].startswith("configs/"):  # and a path from the current folder
        before["changes"] = [os.path.abspath(before["changes"][0]), *before["changes"][1:]]
    if not (run.folder / DEFINITION).exists():
        _check_config(run)
    if any(set(that_count(before[part])) != set(that_count(now[part])) for part in now):
        old, new = ([x for part in now for x in a[part] if x not in b[part]] for a, b in ((before, now), (now, before)))
        nothing = "no such change" if old or new else "the same in another order"
        raise _other_run(run, *(", ".join(changes) or nothing for changes in (old, new)))


def definition(run):
    """Returns how the study defines a run, for `DEFINITION`."""
    return {"changes": [*run.changes], "index": [*run.row.index], "after": [run.row.after] * bool(run.row.after)}


def _check_config(run):
    """Raises UserError when a folder holds a run, of a command by hand, whose fields are not those of the study."""
    text = storage.read(run.folder / run_folder.CONFIG)
    if text is None:
        return
    config = run_folder.parsed(text, run.folder / run_folder.CONFIG)
    changes = [change for change in config_lib.parse_overrides(run.command[4:]) if not change.startswith("compile.")]
    wanted = config_lib.override(config.copy_and_resolve_references(), changes)
    if differing := config_lib.differences(config, wanted):
        raise _other_run(run, *(", ".join(f"{d[0]}={d[side]}" for d in differing) for side in (1, 2)))


def _other_run(run, was, now):
    return UserError(f"{run.name}: {run.folder} holds a run with {was}, not {now}: give another --workdir or delete it")


def that_count(changes):
    """Returns the changes without those that a later one replaces. Sections, `{...}`, add to each other."""
    last = {}
    for change in changes:
        field, _, value = change.partition("=")
        key = change if value.lstrip().startswith("{") else field
        last.pop(key, None)
        last[key] = change
    return last.values()


def has_index(planned):
    """Whether the index of a row is complete."""
    return (planned.folder / "index" / "report.json").exists()


def begin_index(planned):
    """Makes the folder of a row for its index, unless that is there; returns whether it is.

    Raises UserError for an index that another command wrote.
    """
    file, command = planned.folder / INDEX_DEFINITION, [*planned.row.index]
    if not has_index(planned):
        planned.folder.mkdir(parents=True, exist_ok=True)
        storage.write(file, json.dumps({"command": command}))
        return False
    if (before := run_folder.read_json(file).get("command", command)) != command:
        was, now = " ".join(before), " ".join(command)
        raise UserError(f"{planned.folder / 'index'} is of {was}, not {now}: give another --workdir or delete it")
    return True
