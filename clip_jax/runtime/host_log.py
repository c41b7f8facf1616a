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
import time

FOLDER = "logs"
FORMAT = "%(levelname)s %(name)s: %(message)s"

_file = None
_streams = ()  # of the process, before `start`


def process_name(cluster, environ=os.environ):
    """Returns the name of this process's file: "process-3" where a flag or SLURM gives the number, else the host's.

    Args:
      cluster: a `clip_jax.runtime.hosts.Cluster`, or None.
      environ: the environment.
    """
    number = cluster.process if cluster else environ.get("SLURM_PROCID")
    return socket.gethostname() if number is None else f"process-{number}"


def start(workdir, name):
    """Copies what this process prints and logs from now on to `<workdir>/logs/<name>.log`, at its end.

    Args:
      workdir: an existing folder, a `pathlib.Path`.
      name: the name of the process.
    """
    global _file, _streams
    (workdir / FOLDER).mkdir(exist_ok=True)
    _file = _File(open(workdir / FOLDER / f"{name}.log", "a", buffering=1, errors="replace"))
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
    global _file
    if not _file:
        return
    sys.stdout, sys.stderr = _streams
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if getattr(handler, "stream", None) is not _file]
    show_stacks(sys.__stderr__)
    _file.close()
    _file = None


def file():
    """The open file, or None before `start`."""
    return _file


def write(line):
    """Writes a line to the file only; without a file it is lost."""
    if _file:
        print(line, file=_file)


class _Copy:
    """A text stream whose text goes to the file as well. Everything else is that of `stream`."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        if _file:
            _file.write(text)
        return self.stream.write(text)


class _File:
    """The file. A full disk costs lines of the log, and nothing else."""

    def __init__(self, stream):
        self.stream, self.fileno = stream, stream.fileno

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def close(self):
        with contextlib.suppress(OSError):
            self.stream.close()
