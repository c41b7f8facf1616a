"""Traces of training steps for xprof: those of `profile.steps`, and the next ones after a signal.

    python -m clip_jax.train ... --config.profile.steps=100-110     # a trace of these steps
    pkill -USR2 -f clip_jax.train                                   # a trace of the next steps, on this host
    xprof --logdir=WORKDIR/profile                                  # pip install xprof

Beside each trace lie the memory of the device at its end (for pprof) and the compiled program of the step as HLO text.
"""

import contextlib
import logging
import pathlib
import re
import signal
import tempfile
import threading

from clip_jax.errors import UserError
from clip_jax.runtime import faults, storage

#: Steps of a trace that a signal asks for.
SIGNAL_STEPS = 10
#: Ends of the names of a trace's files; before it stands the name of the machine.
_FILES = (".xplane.pb", ".trace.json.gz")

logger = logging.getLogger(__name__)


def ignore_signal():
    """From now on SIGUSR2, which would end the process, has no effect outside of a `Profiler`."""
    if hasattr(signal, "SIGUSR2") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def parse_steps(text, steps):
    """Returns `(first, last)` of `profile.steps`, such as `"100-110"` or `"100"`, or None for an empty text.

    Raises UserError for any other text, and for a step after the last one of the run, `steps`.
    """
    if not text:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise UserError(f"profile.steps={text!r}: give a range of steps such as '100-110'")
    if last > steps:
        raise UserError(f"profile.steps={text!r}: the run has train.steps={steps}")
    return first, last


def check(config):
    """Checks the section `profile` of a configuration. Raises UserError."""
    parse_steps(config.profile.steps, config.train.steps)
    if config.profile.port > 65535:
        raise UserError(f"profile.port={config.profile.port}: a port is at most 65535")


class Profiler:
    """Starts and stops traces between steps. On the main thread it also answers SIGUSR2.

    A trace that fails is a warning, and the run continues.

    Args:
      folder: of the traces, local or in a bucket.
      config: the configuration.
      step_fn: the compiled step.
      log: takes a line for each trace, on the host that made it.
    """

    def __init__(self, folder, config, step_fn, log):
        self.folder, self.step_fn = storage.path(folder), step_fn
        self.log = log
        self.wanted, self.asked = parse_steps(config.profile.steps, config.train.steps), False
        self.trace = None  # temporary folder of the running trace
        self.place, self.last = None, 0  # where it goes at its end, its last step
        self.port, self._previous = config.profile.port, None

    def __enter__(self):
        if self.port:
            import jax

            jax.profiler.start_server(self.port)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR2"):
            self._previous = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGUSR2, self._previous)
        if self.trace is not None:
            self._stop()

    def _ask(self, *_):
        self.asked = True

    def step(self, step, state):
        """Returns a context for one step, which ends a trace before it or starts one with it.

        Args:
          step: the number of the step.
          state: the state that it starts from. A trace starts and ends when that state is computed.
        """
        import jax

        if self.trace is not None and step > self.last:
            jax.block_until_ready(state)
            self._stop()
        if self.trace is None and (self.asked or self.wanted and step == self.wanted[0]):
            self.last, self.asked = step + SIGNAL_STEPS - 1 if self.asked else self.wanted[1], False
            jax.block_until_ready(state)
            self._start(step)
        if self.trace is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _start(self, step):
        import jax

        trace = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would fill the trace
        try:
            jax.profiler.start_trace(trace.name, profiler_options=options)
        except Exception as error:  # another trace is running, which profile.port was asked for
            logger.warning("profile: no trace of step %d can be started: %s", step, faults.one_line(error))
            return
        self.trace, self.place = trace, self.folder / f"steps_{step}-{self.last}"
        self.log(f"profile: a trace of steps {step} to {self.last} ...")

    def _stop(self):
        import jax

        host, trace = jax.process_index(), self.trace
        self.trace = None
        try:
            with trace:
                jax.profiler.stop_trace()
                # Hosts are one run of xprof, also processes of one machine, whose files have the same name.
                for file in pathlib.Path(trace.name).glob("plugins/profile/*/*"):
                    for end in filter(file.name.endswith, _FILES):
                        storage.write(self.place / "plugins/profile/trace" / f"host{host}{end}", file.read_bytes())
            storage.write(self.place / f"memory_host{host}.prof", jax.profiler.device_memory_profile())
            if host == 0:
                storage.write(self.place / "step.hlo.txt", self.step_fn.as_text())
        except Exception as error:
            logger.warning("profile: the trace cannot be written to %s: %s", self.place, faults.one_line(error))
            return
        self.log(f"profile: written to {self.place}; look at it with: xprof --logdir={self.folder}")
