"""The lock of a work folder: one run writes into it at a time.

`run.lock` names the process that owns the folder and is refreshed every `BEAT_SECONDS`. It is deleted when the run
ends, also after a signal, a stall or the loss of another host. After kill -9 or a dead machine it stays, and the next
run takes it over: at once when the owner was a process of this machine that no longer runs, otherwise when it was not
refreshed for `STALE_SECONDS`. The clocks of hosts must agree to well within that time.

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
        if found and not (coordinator and found.get("coordinator") == coordinator) and _state(found) == "alive":
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
    if found and _state(found) != "dead" and found.get("token") not in _held.values():
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
    """Returns whether the owner of a lock is "alive", "dead", or "unknown": alive if it refreshes the lock."""
    here = {"host": socket.gethostname(), "machine": _machine()}
    if all(found.get(key) == here[key] for key in _MACHINE_KEYS) and isinstance(found.get("pid"), int):
        return "alive" if _started(found["pid"]) == found.get("started") else "dead"
    beat = found.get("beat")
    if not isinstance(beat, int | float):
        return "unknown"
    return "dead" if time.time() - beat > STALE_SECONDS else "unknown"


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
            if found is None:
                continue
            self._wait_for_death(found, log)
            former = found
            with contextlib.suppress(FileNotFoundError), storage.guard(self.path):
                self.path.unlink()
        if former is not None:
            log(f"{self.folder}: taken over from {_owner(former)}, which no longer runs")
        self._beats.start()

    def _wait_for_death(self, found, log):
        """Returns when the owner of a lock is dead. Raises UserError as soon as it is known to live."""
        state, first = _state(found), found
        if state == "unknown":
            age = time.time() - (found.get("beat") or time.time())
            limit = min(STALE_SECONDS, max(STALE_SECONDS - age, 0)) if found else 2 * SETTLE_SECONDS
            if found:
                log(f"{self.folder}: looking up to {limit:.0f} s whether {_owner(found)}, still lives ...")
            end = time.monotonic() + limit
            while state == "unknown" and time.monotonic() < end:
                time.sleep(min(1, limit))
                found = read(self.folder, self.name)
                if found is None:
                    return
                if found.get("token") != first.get("token") or found.get("beat") != first.get("beat"):
                    state = "alive"
        if state == "alive":
            raise _in_use(self.folder, found)

    def _refresh(self):
        while not self._ended.wait(BEAT_SECONDS):
            try:
                found = read(self.folder, self.name)
                if found and found.get("token") != self.token:
                    self._ended.set()  # nothing is left to release
                    faults.end(2, f"error: this run was taken for dead: {_in_use(self.folder, found)}")
                # A folder that was deleted is not made again.
                if self._ended.is_set() or not (storage.is_remote(self.folder) or self.folder.is_dir()):
                    continue
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
