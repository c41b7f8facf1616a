"""The lock of a work folder: one run writes into it at a time.

`run.lock` names the process that owns the folder and is refreshed every `BEAT_SECONDS`. It is deleted when the run
ends, also after a signal, a stall or the loss of another host. After kill -9 or a dead machine it stays, and the next
run takes it over: at once when the owner was a process of this machine that no longer runs, otherwise when it was not
refreshed for `STALE_SECONDS`, of which the next run watches `WATCH_SECONDS` at least, as clocks of hosts may differ.

A run that received a signal says so in its lock, and the next one waits until it has saved its state: a cluster may
start the new host while the old one still ends. So does a run that joins at the address at which the owner joined.

All hosts of a run share one lock, which its first host owns. Files and objects are made with the condition that there
is none (`storage.create`). A lock that is taken over is read back, and its former owner, should it still live, finds a
stranger's name in it at the next refresh and ends.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid

from clip_jax.errors import StorageError, UserError
from clip_jax.runtime import faults, hosts, storage

FILE = "run.lock"
#: Seconds between two refreshes, and seconds without one after which an owner counts as dead.
BEAT_SECONDS, STALE_SECONDS = 10, 120
WATCH_SECONDS = 1.5 * BEAT_SECONDS
#: Seconds that a run waits for the end of one that received a signal.
ENDING_SECONDS = 600
#: Seconds after which a lock that was taken over is read back.
SETTLE_SECONDS = 1
_MACHINE_KEYS = ("host", "machine")

_held = {}  # {(folder, name): the token of this process}


def _read_file(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


@functools.cache
def _machine():
    """Names this machine since its start, and the container in which process numbers count."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{_read_file('/proc/sys/kernel/random/boot_id')} {namespace}".strip()


def _started(pid):
    """Returns when a process of this machine started, in the kernel's own unit; None when there is no such process.

    Process numbers are used again, most of all in containers, where each trainer is number 1.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    fields = _read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields[:1] == ["Z"]:  # it has ended, and its parent has not asked for its status
        return None
    return fields[19] if len(fields) > 19 else ""


def hold(folder, log=print, number=None, coordinator="", name=FILE):
    """Returns a context in which this run owns a work folder.

    Within such a context of this process it does nothing. Processes other than the first one write nothing; they only
    look whether another run owns the folder.

    Args:
      folder: the folder, which exists.
      log: takes the lines about a lock that is waited for or taken over.
      number: the number of this process, from 0; None asks JAX, whose processes have joined then.
      coordinator: the address at which the processes of this run join, by which they know each other; empty for one.
      name: the name of the lock.

    Raises UserError, before anything is written, when another run owns the folder or takes it over while it is looked
    at, and StorageError when the bucket fails.
    """
    if (str(folder), name) in _held:
        return contextlib.nullcontext()
    if number is None:
        return _hold(folder, log, coordinator, name) if hosts.is_first() else contextlib.nullcontext()
    if number:
        found = read(folder, name)
        if found and not _is_leaving(found, coordinator) and _state(found) == "alive":
            raise _in_use(folder, found)
        return contextlib.nullcontext()
    return _hold(folder, log, coordinator, name)


@contextlib.contextmanager
def _hold(folder, log, coordinator, name):
    lock = Lock(folder, coordinator, name)
    lock.acquire(log)
    _held[str(folder), name] = lock.token
    faults.at_end.append(lock.release)
    try:
        yield
    finally:
        faults.at_end.remove(lock.release)
        del _held[str(folder), name]
        lock.release()


def check_free(folder, what, name=FILE):
    """Raises UserError when a run owns a folder; `what` says what would be written, and what to do."""
    found = read(folder, name)
    is_dead = found and (_state(found) == "dead" or (_state(found) == "unknown" and _age(found) > STALE_SECONDS))
    if found and not is_dead and found.get("token") not in _held.values():
        raise UserError(f"{_in_use(folder, found)}; {what}")


def read(folder, name=FILE):
    """Returns the lock of a folder as a dict, {} when it is unreadable, and None when there is none."""
    text = storage.read(folder / name)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _state(found):
    """Returns whether the owner of a lock is "alive" or "dead"; "unknown" on another machine."""
    here = {"host": socket.gethostname(), "machine": _machine()}
    if all(found.get(key) == here[key] for key in _MACHINE_KEYS) and isinstance(found.get("pid"), int):
        return "alive" if _started(found["pid"]) == found.get("started") else "dead"
    return "unknown"


def _age(found):
    """Returns the seconds since the last refresh of a lock, by the clocks of both hosts."""
    beat = found.get("beat")
    return time.time() - beat if isinstance(beat, int | float) else 0.0


def _is_leaving(found, coordinator):
    """Whether the owner of a lock ends, or is an earlier start of the run that joins at `coordinator`."""
    return bool(found.get("ending") or (coordinator and found.get("coordinator") == coordinator))


def _in_use(folder, found):
    return UserError(f"{folder} is in use by {_owner(found)}")


def _owner(found):
    since = found.get("since")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, int | float) else "?"
    return f"a run on {found.get('host', '?')}, process {found.get('pid', '?')}, since {since}"


class Lock:
    """The lock of a folder.

    Attributes:
      token: what tells this lock from any other.
    """

    def __init__(self, folder, coordinator="", name=FILE):
        self.folder, self.path = folder, folder / name
        self.name, self.token = name, uuid.uuid4().hex
        self.content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "since": round(time.time(), 3),
            "coordinator": coordinator,
            "token": self.token,
        }
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._refresh, daemon=True, name="lock")

    def _text(self):
        return json.dumps(self.content | {"beat": round(time.time(), 3)})

    def acquire(self, log):
        """Makes the lock, after that of a dead run is removed, and keeps it fresh. Raises UserError as `hold`."""
        former = None
        while True:
            created = storage.create(self.path, self._text())
            if created and former is not None:
                time.sleep(SETTLE_SECONDS)  # another run may have removed the same lock
            found = read(self.folder, self.name)
            if created and found is not None and found.get("token") == self.token:
                break
            if found is None or not self._is_dead(found, log):
                continue
            now = read(self.folder, self.name)
            if now is not None and now.get("token") == found.get("token"):
                former = found
                with contextlib.suppress(FileNotFoundError), storage.guard(self.path):
                    self.path.unlink()
        if former is not None:
            log(f"{self.folder}: taken over from {_owner(former)}, which no longer runs")
        self._beats.start()

    def _is_dead(self, found, log):
        """Returns whether the owner of a lock is dead, when that is known; False also when it has gone meanwhile.

        Raises UserError as soon as the owner is known to live, unless it is ending.
        """
        state, first = _state(found), found
        if state == "unknown":
            limit = min(STALE_SECONDS, max(STALE_SECONDS - _age(found), WATCH_SECONDS)) if found else 2 * SETTLE_SECONDS
            if found:
                log(f"{self.folder}: looking up to {limit:.0f} s whether {_owner(found)}, still lives ...")
            end = time.monotonic() + limit
            while state == "unknown" and time.monotonic() < end:
                time.sleep(min(1, limit))
                found = read(self.folder, self.name)
                if found is None:
                    return False
                if found.get("token") != first.get("token") or found.get("beat") != first.get("beat"):
                    state = "alive"
        if state == "alive":
            if not _is_leaving(found, self.content["coordinator"]):
                raise _in_use(self.folder, found)
            return self._has_ended(found, log)
        return True

    def _has_ended(self, found, log):
        """As `_is_dead`, for an owner that is ending."""
        token, end = found.get("token"), time.monotonic() + ENDING_SECONDS
        beat, seen = found.get("beat"), time.monotonic()  # by one clock: those of the hosts may differ
        log(f"{self.folder}: waiting for the end of {_owner(found)} ...")
        while time.monotonic() < end:
            if _state(found) == "dead" or time.monotonic() - seen > STALE_SECONDS:
                return True
            time.sleep(min(1, BEAT_SECONDS))
            found = read(self.folder, self.name)
            if found is None or found.get("token") != token:
                return False
            if found.get("beat") != beat:
                beat, seen = found.get("beat"), time.monotonic()
        raise _in_use(self.folder, found)

    def _refresh(self):
        beaten, told = time.monotonic(), False
        while not self._ended.wait(min(BEAT_SECONDS, 1)):
            ending = bool(faults.asked())
            if ending == told and time.monotonic() - beaten < BEAT_SECONDS:
                continue
            beaten, told = time.monotonic(), ending
            try:
                found = read(self.folder, self.name)
                if found and found.get("token") != self.token:
                    self._ended.set()  # nothing is left to release
                    faults.end(2, f"error: this run was taken for dead: {_in_use(self.folder, found)}")
                # A folder that was deleted is not made again.
                if self._ended.is_set() or not (storage.is_remote(self.folder) or self.folder.is_dir()):
                    continue
                self.content["ending"] = ending
                storage.write(self.path, self._text())
            except (OSError, StorageError):  # the next refresh tries again
                continue

    def release(self):
        """Deletes the lock, where it is still this one's."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._beats.is_alive() and threading.current_thread() is not self._beats:
            self._beats.join(BEAT_SECONDS)  # it may be writing
        with contextlib.suppress(OSError, StorageError):
            found = read(self.folder, self.name)
            if found and found.get("token") == self.token:
                with storage.guard(self.path):
                    self.path.unlink()
