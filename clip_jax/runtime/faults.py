"""How a run ends when it cannot go on: signals, stalls, the loss of another process, and the exit status of each.

    0 done   1 a defect   2 wrong input or a full disk   42 preempted (SIGTERM)   43 another process is lost, or nothing moves
    130 interrupted (Ctrl-C)

After 42, 43 and 130 the same command goes on.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time

PREEMPTED, LOST, INTERRUPTED = 42, 43, 130
_WORDS = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
#: Seconds that the other processes have to come to the same end, before this one ends alone.
_TOGETHER_SECONDS = 10


_OUTSIDE = "outside of the training steps: the newest checkpoint is as it was"
_asked = 0  # the exit status that a signal has asked this process for


class Stopped(BaseException):
    """The run was told to stop; like KeyboardInterrupt no Exception, so that nothing takes it for an error of its own."""

    def __init__(self, status, where):
        super().__init__(f"{_WORDS[status]} {where}; the same command goes on")
        self.status = status


class Signals:
    """Answers SIGTERM and SIGINT: at once by `Stopped`, or, within `deferred`, by `status` alone. The second kills.

    Attributes:
      status: the exit status that a signal asks for, 0 without one.
    """

    def __init__(self):
        self.status, self._deferred, self._previous = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other one may
            self._previous = {number: signal.signal(number, self._answer) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _answer(self, number, _):
        global _asked
        self.status = _asked = PREEMPTED if number == signal.SIGTERM else INTERRUPTED
        signal.signal(number, signal.SIG_DFL)
        self._raise()

    def _raise(self):
        if self.status and not self._deferred:
            raise Stopped(self.status, _OUTSIDE)

    @contextlib.contextmanager
    def deferred(self):
        """Within it a signal only sets `status`; one that nobody answered is answered at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self._raise()


_stage = None  # (what the main thread waits for, since when), of this process


@contextlib.contextmanager
def stage(name):
    """Names what the main thread does, for `watch`: each has its own time, and the outer one starts anew after the inner one."""
    global _stage
    outer, _stage = _stage, (name, time.monotonic())
    yield  # after an error it stays as it is, for the message
    _stage = outer and (outer[0], time.monotonic())


@contextlib.contextmanager
def watch(minutes):
    """Ends the process with status 43, the name of the stage and all stacks when a `stage` takes longer; 0: never."""
    global _stage
    _stage, done = None, threading.Event()

    def look():
        limit = 60 * minutes
        while not done.wait(min(limit / 4, 5)):
            current = _stage
            if current and time.monotonic() - current[1] > limit:
                line = (
                    f"the stage {current[0]!r} has taken {_waited(current)}, more than train.stall_minutes={minutes:g}"
                )
                end(
                    LOST,
                    f"error: {line}: another process is lost or hangs, or the limit is too low; stacks:",
                    stacks=True,
                )

    if minutes:
        threading.Thread(target=look, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        done.set()


def _waited(current):
    return f"{time.monotonic() - current[1]:.0f} s"


def _where():
    current = _stage
    return f"in the stage {current[0]!r} for {_waited(current)}" if current else "between the stages"


def end(status, line, stacks=False):
    """Prints a line and ends this process at once, with its worker processes: nothing is waited for, since nothing may come."""
    print(line, file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(status)


def end_lost(reason):
    """Ends a process without the others; they may have ended by the signal that came here too, and that is the status then."""
    if _asked:
        end(_asked, str(Stopped(_asked, _OUTSIDE)))
    end(LOST, f"error: another process is lost ({reason}); this one was {_where()}")


_leaving = None  # the exit status of a process that is already about to end
_handlers = []  # the C library keeps no reference


def answer_abort(answers=True):
    """Makes the abort by which JAX ends a process that does not find or has lost another one a line and status 43, or no longer.

    The coordination service calls abort(), later in a thread of its own, which no Python handler survives.
    """
    if not answers:
        ctypes.CDLL(None).signal(signal.SIGABRT, None)
        return

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def answer(_):
        if _leaving is not None:
            os._exit(_leaving)
        end_lost("the reason stands above")

    _handlers.append(answer)
    ctypes.CDLL(None).signal(signal.SIGABRT, answer)


def is_loss(error):
    """Is it what a collective or barrier raises when another process is gone?"""
    signs = (
        "Gloo",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CoordinationService",
        "oordination service",
        "NCCL",
        "heartbeat",
    )
    return isinstance(error, Exception) and any(sign in str(error) for sign in signs)


def several_processes():
    """Does this process work together with others?"""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status, line):
    """Ends one process of several: together with the others if they come to an end as well, else alone."""
    import jax

    global _leaving
    _leaving = status
    if status not in _WORDS or jax.process_index() == 0:
        print(
            line if jax.process_index() == 0 else f"process {jax.process_index()}: {line}", file=sys.stderr, flush=True
        )
    timer = threading.Timer(_TOGETHER_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    sys.stdout.flush()
    os._exit(status)
