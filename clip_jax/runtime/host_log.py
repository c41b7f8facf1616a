"""The log of one process in a file of the work folder: what it prints, its warnings, and the stacks after a stall.

Each process appends to a file of its own, so that a pod's hosts can be read side by side. What the compiler or the
network prints in C++ is not in it; that is in the launcher's output.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time

FOLDER = "logs"
FORMAT = "%(levelname)s %(name)s: %(message)s"

#: A log in a bucket gets new lines this often, and its last ones within a limit before the process ends.
SHIP_SECONDS, END_SECONDS = 15, 10

_file = None
_streams = ()  # of the process, before `start`
_shipper = None


def process_name(cluster, environ=os.environ):
    """Returns the name of this process's file: "process-3" where a flag or SLURM gives the number, else the host's.

    Args:
      cluster: a `clip_jax.runtime.hosts.Cluster`, or None.
      environ: the environment.
    """
    number = cluster.process if cluster else environ.get("SLURM_PROCID")
    return socket.gethostname() if number is None else f"process-{number}"


def start(workdir, name, open_remote=None):
    """Copies what this process prints and logs from now on to `<workdir>/logs/<name>.log`, at its end.

    Args:
      workdir: an existing folder, a `pathlib.Path`.
      name: the name of the process.
      open_remote: for a work folder in a bucket, a function from the path of the log to an object with `write(line)`
        and `flush()`. A thread of its own calls it, so a slow or failing bucket does not hold up the process.
    """
    global _file, _streams, _shipper
    path = workdir / FOLDER / f"{name}.log"
    if open_remote:
        _file = _File(tempfile.NamedTemporaryFile("a", buffering=1, errors="replace"))
        _shipper = _Shipper(_file.stream.name, lambda: open_remote(path))
        _shipper.start()
    else:
        path.parent.mkdir(exist_ok=True)
        _file = _File(open(path, "a", buffering=1, errors="replace"))
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    write(f"--- {when} on {socket.gethostname()}, pid {os.getpid()}: {' '.join(sys.argv)}")
    _streams = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = map(_Copy, _streams)
    handler = logging.StreamHandler(_file)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {FORMAT}"))
    logging.getLogger().addHandler(handler)
    show_stacks(_file)


def show_stacks(stream):
    """From now on, SIGUSR1 writes the stacks of all threads to a file, and the process continues."""
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stream)


def stop():
    """Undoes `start`, where it was called."""
    global _file, _shipper
    stopped, shipper = _file, _shipper
    if not stopped:
        return
    _shipper = None  # another thread may stop too: the first one ends it
    if shipper:
        shipper.end()
    sys.stdout, sys.stderr = _streams
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if getattr(handler, "stream", None) is not stopped]
    show_stacks(sys.__stderr__)
    _file = None
    stopped.close()


def file():
    """The open file, or None before `start`."""
    return _file


def write(line):
    """Writes a line to the file only; without a file it is lost."""
    if current := _file:
        print(line, file=current)


class _Copy:
    """A text stream whose text goes to the file as well. Everything else is that of `stream`."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if current := _file:  # another thread may stop the log
            current.write(text)
        return self.stream.write(text)


class _File:
    """The file. A full disk costs lines of the log, and nothing else."""

    def __init__(self, stream):
        self.stream, self.fileno = stream, stream.fileno

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # the latter when it is closed
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def close(self):
        with contextlib.suppress(OSError):
            self.stream.close()


class _Shipper(threading.Thread):
    """Hands the lines of a local file to a log in a bucket."""

    def __init__(self, path, open_remote):
        super().__init__(daemon=True, name="host log")
        self.file, self.open_remote = open(path, errors="replace"), open_remote
        self.remote, self.ended = None, threading.Event()

    def run(self):
        last = False
        while not last:
            last = self.ended.wait(SHIP_SECONDS)
            try:
                self.remote = self.remote or self.open_remote()
                for line in self.file:
                    self.remote.write(line.rstrip("\n"))
                self.remote.flush()
            except Exception:  # the next round tries again: the bucket's state is not that of the run
                logging.getLogger(__name__).debug("the log cannot be written to the bucket", exc_info=True)

    def end(self):
        """Hands over the last lines, within END_SECONDS."""
        self.ended.set()
        self.join(END_SECONDS)
        self.file.close()
