"""The frame of every command: its parser, its log level, its exit status, and one line about an early end."""

import argparse
import logging
import sys
import traceback

from clip_jax.errors import UserError
from clip_jax.runtime import faults


def make_parser(module, doc):
    """Returns an `argparse.ArgumentParser` for `python -m MODULE`.

    Args:
      module: the import path of the command's module.
      doc: its docstring, which becomes the help text.
    """
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=raw, allow_abbrev=False)


def run(work):
    """Calls `work` and returns the exit status of the command, see `clip_jax.runtime.faults`.

    A `UserError`, an `OSError` (a full disk, a missing folder) or `faults.Stopped` prints one line. With several
    processes, every exception ends this process. A single process raises all other exceptions.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        work()
        return 0
    except (UserError, OSError) as error:
        status, line = 2, f"error: {error}"
    except faults.Stopped as stopped:
        status, line = stopped.status, str(stopped)
    except Exception as error:
        if not faults.several_processes():
            raise
        if faults.is_loss(error):
            faults.end_lost(faults.one_line(error))
        traceback.print_exc()
        status, line = 1, f"error: {error}"
    if faults.several_processes():
        faults.leave(status, line)
    print(line, file=sys.stderr)
    return status
