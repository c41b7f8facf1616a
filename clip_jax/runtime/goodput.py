"""Where the time of a run went, over all its starts."""

import collections
import time

from clip_jax.runtime import faults

#: The parts, in the order in which they are shown. What none of them explains was lost: steps that were done again
#: after a restart, and the time between two processes.
PARTS = {
    "training": "training",
    "data": "waiting for data",
    "checkpoint": "saving",
    "evaluation": "evaluating",
    "compiling": "compiling",
    "starting": "starting",
    "lost": "lost to restarts",
}
_STAGES = ("data", "checkpoint", "evaluation")


class Goodput:
    """Counts the seconds of a run by what they were spent on.

    Args:
      started: the Unix time at which this process started.
      stored: what `seconds` returned when the checkpoint was saved that this process resumes; {} for a new run.
    """

    def __init__(self, started, stored):
        self.started = started
        self.earlier = collections.Counter({part: stored.get(part, 0.0) for part in PARTS if part != "lost"})
        self.begun = min(stored.get("begun", started), started)
        self.starting = self.compiling = 0.0
        self.before = collections.Counter()  # of the stages, before the first step

    def begin_steps(self, compiling):
        """Marks the first step; `compiling` is the part of the time until now that the compilation took, in seconds."""
        self.compiling, self.before = compiling, faults.spent()
        self.starting = time.time() - self.started - compiling

    def seconds(self):
        """Returns `{part: seconds}` for the keys of `PARTS`, and `begun`, the Unix time of the run's first start.

        All time after the first step that is not spent on data, saving or evaluating counts as training.
        """
        now, stages = time.time(), faults.spent() - self.before
        here = {name: stages[name] for name in _STAGES} | {"starting": self.starting, "compiling": self.compiling}
        here["training"] = max(0.0, now - self.started - sum(here.values()))
        parts = {part: self.earlier[part] + here[part] for part in PARTS if part != "lost"}
        return parts | {"lost": max(0.0, now - self.begun - sum(parts.values())), "begun": self.begun}

    def share(self):
        """Returns the share of the run's time that was spent on training."""
        return shares(self.seconds())["training"]


def shares(seconds):
    """Returns `{part: share of the whole time}` of `Goodput.seconds`."""
    total = sum(seconds[part] for part in PARTS)
    return {part: seconds[part] / max(total, 1e-9) for part in PARTS}


def describe(seconds):
    """Returns the line about `Goodput.seconds`: the whole time and the share of each part."""
    parts = ", ".join(f"{PARTS[part]} {share:.1%}" for part, share in shares(seconds).items())
    return f"{duration(sum(seconds[part] for part in PARTS))} in all: {parts}"


def duration(seconds):
    """Returns a duration in seconds as `"1h02m"`, `"3m05s"` or `"12s"`."""
    seconds = int(round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
