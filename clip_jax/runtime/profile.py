"""Traces of training steps for xprof: those of `profile.steps`, and the next ones after a signal.

    python -m clip_jax.train ... --config.profile.steps=100-110     # a trace of these steps
    pkill -USR2 -f clip_jax.train                                   # a trace of the next steps, on this host
    xprof --logdir=WORKDIR/profile                                  # pip install xprof

Beside each trace lie the memory of the device at its end (for pprof) and the compiled program of the step as HLO text.
"""

import contextlib
import re
import signal
import threading

from clip_jax.errors import UserError
from clip_jax.runtime import storage

#: Steps of a trace that a signal asks for.
SIGNAL_STEPS = 10


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


class Profiler:
    """Starts and stops traces between steps. On the main thread it also answers SIGUSR2.

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
        self.trace = None  # local folder of the running trace
        self.place, self.last = contextlib.ExitStack(), 0  # where it goes at its end, its last step
        self.port, self._previous = config.profile.port, None

    def __enter__(self):
        if self.port:
            import jax

            jax.profiler.start_server(self.port)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR2"):
            self._previous = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, kind, *_):
        if self._previous is not None:
            signal.signal(signal.SIGUSR2, self._previous)
        if self.trace is not None:
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
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
            self.trace = self.place.enter_context(storage.local_folder(self.folder / f"steps_{step}-{self.last}"))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would fill the trace
            jax.profiler.start_trace(str(self.trace), profiler_options=options)
            self.log(f"profile: a trace of steps {step} to {self.last} ...")
        if self.trace is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _stop(self):
        import jax

        jax.profiler.stop_trace()
        host = jax.process_index()
        jax.profiler.save_device_memory_profile(str(self.trace / f"memory_host{host}.prof"))
        if host == 0:
            (self.trace / "step.hlo.txt").write_text(self.step_fn.as_text())
        self.trace = None
        self.place.close()
        self.log(f"profile: written to {self.folder}; look at it with: xprof --logdir={self.folder}")
