"""How a run ends early: signals, stalls, the loss of another process, and the exit status of each.

    0 done   1 a defect   2 wrong input or a full disk   42 preempted (SIGTERM)
    43 another process is lost, or nothing progresses   44 storage failed   130 interrupted (Ctrl-C)

After 42, 43, 44 and 130, the same command resumes the run.
"""

import collections
import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref

from clip_jax.runtime import host_log

PREEMPTED = 42
LOST = 43
STORAGE = 44
INTERRUPTED = 130
_WORDS = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
#: Seconds that the other processes have to end as well, before this one ends alone.
_TOGETHER_SECONDS = 10
#: The signal that repeats another one, and the seconds after which it does.
_AGAIN, _INSIST_SECONDS = signal.SIGVTALRM, 2
_OUTSIDE = "outside of the training steps: the newest checkpoint is unchanged"

_asked = 0  # the exit status that a signal asked this process for
_stage = None  # (name of the stage that the main thread is in, its start time)
_spent = collections.Counter()  # {name of a stage: seconds}, without those of inner stages
_leaving = None  # the exit status of a process that is about to end
_handlers = []  # signal handlers; the C library keeps no reference to them
#: Functions that `end` calls, within `_TOGETHER_SECONDS`, before it ends the process.
at_end = []


def asked():
    """Returns the exit status that a signal asked this process for, 0 without a signal."""
    return _asked


class Stopped(BaseException):
    """A signal ends the run. Like KeyboardInterrupt it is no Exception, so that no handler mistakes it for an error."""

    def __init__(self, status, where):
        super().__init__(f"{_WORDS[status]} {where}; the same command resumes the run")
        self.status = status


class Signals:
    """Handles SIGTERM and SIGINT: raises `Stopped` at once or, within `deferred`, only sets `status`.

    A second signal kills the process. SIGVTALRM repeats `Stopped` where it was dropped.

    Attributes:
      status: the exit status that a signal asked for, 0 without a signal.
    """

    _NUMBERS = signal.SIGTERM, signal.SIGINT
    _SECOND = signal.SIG_DFL  # the handler of a second signal

    def __init__(self):
        self.status = 0
        self._deferred, self._previous = False, {}
        self._is_ending = threading.Event()
        self._raised = lambda: None  # the `Stopped` on its way up, as a weak reference

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self._previous = {number: signal.signal(number, self._answer) for number in self._NUMBERS}
            again = signal.signal(_AGAIN, self._raise)
            if callable(again):  # of an outer context; else it stays: one more may come after the context
                self._previous[_AGAIN] = again
        return self

    def __exit__(self, *_):
        self._is_ending.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _answer(self, number, _):
        global _asked
        self.status = _asked = PREEMPTED if number == signal.SIGTERM else INTERRUPTED
        signal.signal(number, self._SECOND)
        with contextlib.suppress(RuntimeError):  # no thread is left
            threading.Thread(target=self._insist, args=(threading.get_ident(),), daemon=True).start()
        self._raise()

    def _insist(self, main_thread):
        """Raises `Stopped` again where it was dropped, until the context ends.

        Python drops an exception that is raised in a finalizer or in a callback of the garbage collector, and libraries
        drop some that are raised in functions that they call from C. An exception on its way up exists, and what it
        passes, such as a checkpoint that is being written, is left to end.
        """
        while not self._is_ending.wait(_INSIST_SECONDS):
            if self._raised() is None:
                signal.pthread_kill(main_thread, _AGAIN)

    def _raise(self, *_):
        if self.status and not self._deferred and not self._is_ending.is_set() and self._raised() is None:
            raise self._stopped()

    def _stopped(self):
        # Not in `_raise`: the traceback keeps that frame, whose variable would keep a dropped exception alive.
        stopped = self._exception()
        self._raised = weakref.ref(stopped)
        return stopped

    def _exception(self):
        return Stopped(self.status, _OUTSIDE)

    @contextlib.contextmanager
    def deferred(self):
        """A context in which a signal only sets `status`.

        Leaving it raises `Stopped` when a signal was not acted on.
        """
        self._deferred = True
        try:
            yield
        except BaseException:
            self._is_ending.set()
            raise
        finally:
            self._deferred = False
        self._raise()


class _Interrupt(KeyboardInterrupt):
    """Has weak references, which KeyboardInterrupt does not have."""


class Interrupts(Signals):
    """Handles Ctrl-C of a command that has nothing to save: raises KeyboardInterrupt, again where it was dropped."""

    _NUMBERS = (signal.SIGINT,)
    _SECOND = staticmethod(signal.default_int_handler)  # a study waits for its run after the first one

    def _exception(self):
        return _Interrupt()


@contextlib.contextmanager
def stage(name):
    """A context that names the main thread's work for `watch` and `spent`. Each stage has its own time.

    After an inner stage, the time of the outer stage starts again.
    """
    outer = _stage
    _enter((name, time.monotonic()))
    yield  # after an error the stage stays set, for the message
    _enter(outer and (outer[0], time.monotonic()))


def _enter(entered):
    global _stage
    if _stage:
        _spent[_stage[0]] += time.monotonic() - _stage[1]
    _stage = entered


def spent():
    """Returns the seconds that this process has spent in each `stage`, as a Counter, the running one included."""
    found, current = collections.Counter(_spent), _stage
    if current:
        found[current[0]] += time.monotonic() - current[1]
    return found


@contextlib.contextmanager
def watch(minutes):
    """A context that ends the process with status 43 when a `stage` takes longer than `minutes`; 0 turns it off.

    The process prints the name of the stage, the stages of the other processes, and the stacks of all its threads.
    """
    global _stage
    _stage, done = None, threading.Event()

    def look():
        limit = 60 * minutes
        while not done.wait(min(limit / 4, 5)):
            current = _stage
            _publish(_where())
            if current and time.monotonic() - current[1] > limit:
                taken = (
                    f"the stage {current[0]!r} has taken {_waited(current)}, more than train.stall_minutes={minutes:g}"
                )
                reason = "another process is lost or hangs, or the limit is too low"
                end(LOST, f"error: {taken}: {reason}\n{_all_stages()}stacks:", stacks=True)

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


_STAGES_KEY = "clip_jax_stages"  # in the store of JAX's coordination service


def _publish(text):
    """Tells the other processes what this one does, as far as they can be reached."""
    if not several_processes():
        return
    from jax._src import distributed

    client, index = distributed.global_state.client, distributed.global_state.process_id
    with contextlib.suppress(Exception):  # the process that keeps the store may be the lost one
        client.key_value_set(f"{_STAGES_KEY}/{index}", f"{time.time():.0f} {text}", allow_overwrite=True)


def _all_stages():
    """Returns a line for each process with its last published stage; empty for a single process."""
    if not several_processes():
        return ""
    import jax
    from jax._src import distributed

    found = {}
    with contextlib.suppress(Exception):
        for key, value in distributed.global_state.client.key_value_dir_get(_STAGES_KEY):
            since, _, text = value.partition(" ")
            found[int(key.rpartition("/")[2])] = f"{text}, {max(0, int(time.time() - float(since)))} s ago"
    return "".join(f"  process {i}: {found.get(i, 'unknown')}\n" for i in range(jax.process_count()))


def one_line(error):
    """Returns the message of an exception as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def end(status, line, stacks=False):
    """Prints a line and ends this process and its workers at once, as other processes may never answer."""
    print(line, file=sys.stderr, flush=True)
    for stream in filter(None, (sys.stderr, host_log.file())) if stacks else ():
        faulthandler.dump_traceback(stream)
    host_log.stop()
    _kill_workers()
    calls = threading.Thread(target=lambda: [call() for call in list(at_end)], daemon=True)
    calls.start()
    calls.join(_TOGETHER_SECONDS)  # storage may hang as well
    end_now(status)


def end_now(status):
    """Ends this process and its workers without the interpreter's clean-up."""
    _kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(status)


def _kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


def script(main):
    """Ends this process with the status that `main` returns; Ctrl-C gives one line and 130.

    A signal may arrive while a thread of JAX compiles. The clean-up of the interpreter would make that thread crash,
    and the status would be the crash's. So it is left out after a signal.
    """
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a script
    try:
        with contextlib.nullcontext() if is_ignored else Interrupts():
            status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    if status in _WORDS:
        end_now(status)
    sys.exit(status)


def end_lost(reason):
    """Ends this process without the others.

    The status is that of a signal when this process received one, because the others may have ended by the same signal.
    """
    if _asked:
        end(_asked, str(Stopped(_asked, _OUTSIDE)))
    end(LOST, f"error: another process is lost ({reason}); this one was {_where()}")


def answer_abort(answers=True):
    """Turns JAX's abort after the loss of another process into one line and status 43; False restores the default.

    JAX's coordination service calls abort(), possibly in a thread of its own, where no Python signal handler runs.
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
    """Whether a collective or barrier raised this error because another process is lost."""
    signs = (
        "Gloo",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CoordinationService",
        "oordination service",
        "NCCL",
        "heartbeat",
    )
    text = str(error)
    is_storage = "http_response_code" in text or "tensorstore" in text  # which fails with the same words
    return isinstance(error, Exception) and any(sign in text for sign in signs) and not is_storage


def several_processes():
    """Whether this process works together with others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status, line):
    """Ends one of several processes: together with the others when they end too, otherwise alone."""
    import jax

    global _leaving
    _leaving = status
    index = jax.process_index()
    if status not in _WORDS or index == 0:
        print(line if index == 0 else f"process {index}: {line}", file=sys.stderr, flush=True)
    timer = threading.Timer(_TOGETHER_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    host_log.stop()
    sys.stdout.flush()
    os._exit(status)
