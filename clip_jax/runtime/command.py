"""The frame of every command: its parser, its log level, its exit status, and one line about an early end."""

import argparse
import gc
import importlib.util
import io
import logging
import os
import re
import sys
import traceback

from clip_jax.errors import StorageError, UserError
from clip_jax.runtime import faults, host_log, hosts, storage

#: What every command ends with: `if __name__ == "__main__": command.script(main)`.
script = faults.script
#: Python looks for garbage after this many new objects, where its own number is 700 or 2,000. Imports and traces of
#: programs make millions of objects that live long. With 700 the search took a fifth of the CPU time of a short run.
GARBAGE_THRESHOLD = 10_000
#: With these variables libtpu neither asks a metadata server whether this machine has a TPU nor prints anything.
QUIET_LIBTPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at once
}


def make_parser(module, doc):
    """Returns the parser of `python -m MODULE`.

    Args:
      module: the import path of the command's module.
      doc: its docstring, which becomes the help text.
    """
    raw, program = argparse.RawDescriptionHelpFormatter, f"python -m {module}"
    if os.path.basename(sys.argv[0]) == "clip-jax":
        program, doc = (re.sub(r"python -m clip_jax\.(?:\w+\.)*(\w+)", r"clip-jax \1", t) for t in (program, doc))
    return Parser(prog=program, description=doc, formatter_class=raw, allow_abbrev=False)


class Parser(argparse.ArgumentParser):
    """A parser that replaces "~" at the beginning of values, because shells leave the one in `--workdir=~/run`."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_expand_home(argument) for argument in args], namespace)


def _expand_home(argument):
    if "/" not in argument:
        return argument
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


def quiet_libtpu():
    """Silences libtpu where it is installed and there is no TPU: JAX loads it all the same, and it prints warnings.

    Variables that are set already stay, and a machine whose variables describe a TPU is left alone.
    """
    described = {"TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "TPU_NAME", "JAX_FORCE_TPU_INIT"} & os.environ.keys()
    excluded = "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu")
    if described or excluded or hosts.tpu_chips() or importlib.util.find_spec("libtpu") is None:
        return
    for name, value in QUIET_LIBTPU.items():
        os.environ.setdefault(name, value)


def run(work):
    """Calls `work` and returns the exit status of the command, see `clip_jax.runtime.faults`.

    A `UserError`, an `OSError` (a full disk, a missing folder), a `StorageError` or `faults.Stopped` prints one line.
    With several processes, every exception ends this process. A single process raises all other exceptions. Characters
    that the terminal's encoding lacks are printed as "?", such as the bytes of a file name that are not UTF-8. At
    SIGUSR1 the command prints the stacks of all threads and continues. Until it ends, Python looks for garbage after
    `GARBAGE_THRESHOLD` new objects.
    """
    before = gc.get_threshold()
    if 0 < before[0] < GARBAGE_THRESHOLD:  # 0 turns the search off
        gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        return _run(work)
    except Exception:
        host_log.write(traceback.format_exc().rstrip())
        raise
    finally:
        gc.set_threshold(*before)
        host_log.stop()


def _run(work):
    host_log.show_stacks(sys.__stderr__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    quiet_libtpu()
    logging.basicConfig(format=host_log.FORMAT, level=logging.WARNING)
    try:
        work()
        return 0
    except (UserError, OSError, StorageError) as error:
        status, line = 2, f"error: {error}"
        if isinstance(error, StorageError) or getattr(error, "errno", None) in storage.MOUNT_ERRORS:
            status, line = faults.STORAGE, f"{line}; the same command tries again"
    except faults.Stopped as stopped:
        status, line = stopped.status, str(stopped)
    except KeyboardInterrupt:
        if not faults.several_processes():
            raise
        status, line = faults.INTERRUPTED, "interrupted"
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
