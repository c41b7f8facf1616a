"""Several processes, one on each host: how they join, exchange values, and how one machine simulates several hosts.

    python -m clip_jax.runtime.hosts --processes=2 clip_jax.train --config=configs/clip.py --workdir=runs/clip

runs a command in two processes on this machine, joined over loopback. `launch/local.sh --processes 2` does the same.
"""

import functools
import glob
import importlib.util
import logging
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import UserError
from clip_jax.runtime import host_log, storage

#: Seconds that the other processes of this machine have to end on their own after one has failed.
GRACE_SECONDS = 20


@dataclass(frozen=True)
class Cluster:
    """The processes that work together.

    Attributes:
      coordinator: the address of process 0, HOST:PORT.
      processes: the number of processes.
      process: the number of this process, from 0.
    """

    coordinator: str
    processes: int
    process: int


def add_arguments(parser):
    """Adds the flags that `from_arguments` reads to a parser."""
    group = parser.add_argument_group(
        "several hosts", "detected on Cloud TPU and SLURM; elsewhere give all three flags or variables"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0 (JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", metavar="N", help="the number of processes (JAX_NUM_PROCESSES)")
    group.add_argument("--process", metavar="I", help="the number of this process, from 0 (JAX_PROCESS_ID)")


def from_arguments(args):
    """Returns the `Cluster` of parsed flags and the environment, or None without them.

    Raises UserError when they are incomplete.
    """
    names = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
    values = {flag: getattr(args, flag) or os.environ.get(variable) for flag, variable in names.items()}
    if not values["processes"] and not values["process"]:
        if args.coordinator:
            raise UserError("--coordinator is given without --processes and --process")
        return None
    for flag, variable in names.items():
        if not values[flag]:
            raise UserError(
                f"--{flag} (or {variable}) is missing: several processes need --coordinator, --processes and --process"
            )
    for flag in ("processes", "process"):
        if not values[flag].isdecimal():
            raise UserError(f"--{flag}={values[flag]}: a whole number is needed")
    processes, process = int(values["processes"]), int(values["process"])
    host, _, port = values["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={values['coordinator']}: HOST:PORT is needed")
    if processes < 1 or process >= processes:
        raise UserError(f"--process={process} is not in 0..{processes - 1} (--processes={processes})")
    return Cluster(values["coordinator"], processes, process)


def _on_slurm():
    # These belong to a job step. A script that sbatch runs has SLURM_NTASKS, but is one process.
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def place(cluster):
    """Returns `(number of this process, name of the run's processes together)` before the processes have joined.

    The number is None on Cloud TPU, which tells it when they join; the name of a single process is empty.
    """
    if cluster is not None:
        return cluster.process, cluster.coordinator if cluster.processes > 1 else ""
    if _on_slurm():
        return int(os.environ["SLURM_PROCID"]), f"SLURM job {os.environ.get('SLURM_JOB_ID', '')}"
    return (None if _on_cloud_tpu() else 0), ""


def tpu_chips():
    """Returns the device files of this machine's TPU chips; empty without a TPU."""
    return glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")


def _on_cloud_tpu():
    # JAX asks the metadata server, which answers only on Google's machines: look for a TPU first.
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in wanted and bool(tpu_chips()) and importlib.util.find_spec("libtpu") is not None


def start(cluster=None, timeout=100):
    """Joins the other processes before any device is touched. A single process returns at once.

    Args:
      cluster: a `Cluster`. None lets JAX detect Cloud TPU and SLURM job steps.
      timeout: seconds without a heartbeat after which a process counts as lost.

    When the processes do not find each other within JAX's five minutes, this process ends with status 43
    (`clip_jax.runtime.faults`), because a preempted host may come back. Raises UserError when the machine describes its
    cluster incompletely, and on process 0 when the coordinator's port is taken.
    """
    managed = _on_slurm() or _on_cloud_tpu()
    if not managed and (cluster is None or cluster.processes == 1):
        return
    import jax

    from clip_jax.runtime import faults

    if jax.distributed.is_initialized():
        return
    if cluster is not None and cluster.process == 0:
        _check_port(cluster.coordinator)
    # It would replace the SIGTERM handler of faults.Signals, and it does not handle Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    arguments = {} if cluster is None else dict(
        coordinator_address=cluster.coordinator, num_processes=cluster.processes, process_id=cluster.process,
    )  # fmt: skip
    if not managed:
        arguments["cluster_detection_method"] = "deactivate"
    where = f"at {cluster.coordinator}" if cluster else "that Cloud TPU or SLURM names"
    faults.answer_abort()
    try:
        with faults.stage(f"waiting for the other processes {where}"):
            jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=timeout)
    except ValueError as error:
        raise UserError(f"the cluster {where} cannot be joined: {faults.one_line(error)}") from None
    # The runtimes of GPUs and TPUs join here, while all hosts are at the same point.
    devices()
    if jax.process_count() == 1:
        faults.answer_abort(False)
    host_log.write(f"process {jax.process_index()} of {jax.process_count()}")


def devices():
    """Returns the devices of all hosts.

    Raises RuntimeError when `JAX_PLATFORMS` begins with an accelerator that this host lacks: JAX itself would compute
    on the CPU. One of several processes ends with status 1 instead.
    """
    import jax

    from clip_jax.runtime import faults

    wanted = (os.environ.get("JAX_PLATFORMS") or "cpu").split(",")[0]
    try:
        found, reason = jax.devices(), "it sees only the CPU"
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a device
        if jax.distributed.is_initialized() and faults.is_loss(error):
            faults.end_lost(faults.one_line(error))
        found, reason = [], faults.one_line(error) or "it sees no device"
    if found and (wanted == "cpu" or found[0].platform != "cpu"):
        return found
    line = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}, but JAX finds no {wanted} on this host: {reason}"
    if jax.distributed.is_initialized():
        faults.end(1, f"error: {line}")
    raise RuntimeError(line)


def _check_port(coordinator):
    """Raises UserError when the port of the coordinator, which process 0 opens, is taken on this host.

    gRPC allows two coordinators on one port, and each would get some of the other's processes.
    """
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind(("", port))
            probe.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "a port is at most 65535"
            raise UserError(
                f"--coordinator={coordinator}: process 0 cannot open port {port} ({reason}); choose another port"
            ) from None


def count():
    """The number of processes."""
    import jax

    return jax.process_count()


def is_first():
    """Whether this process prints and writes for all."""
    import jax

    return jax.process_index() == 0


def on_first(log):
    """Returns `log` on the first host. The others only write to their log files, also their warnings."""
    if is_first():
        return log
    for handler in logging.getLogger().handlers:
        if getattr(handler, "stream", None) is not host_log.file():
            handler.setLevel(logging.ERROR)
    return host_log.write


def log(line):
    """Prints a line on the first host only."""
    if is_first():
        print(line, flush=True)


def gather(value):
    """Returns the values of all processes, in their order. Every process must call it; `value` must be picklable."""
    if count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def exchange(mesh, request, skipped, waited):
    """Returns `(greatest request, sum of skipped, longest wait, process that waited so long)` over all processes.

    With several processes they are on the devices, so that nothing waits until they are read. This is a separate
    program: inside the step, XLA would not order its collective with the step's own, and the two could deadlock.

    Args:
      mesh: the mesh of all devices.
      request: this host's request, an int.
      skipped: this host's count of unusable records.
      waited: seconds that this host waited for the rows of a batch.
    """
    if count() == 1:
        return request, skipped, waited, 0
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    local = len(mesh.local_devices)
    rows = np.zeros((local, 4), np.int32)
    rows[0] = request, skipped, min(round(1e6 * waited), 2**31 - 1), jax.process_index()
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(mesh.axis_names)), rows)
    return _reducer(mesh)(rows)


@functools.cache
def _reducer(mesh):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def reduce(rows):
        slowest = rows[:, 2].argmax()
        return rows[:, 0].max(), rows[:, 1].sum(), rows[slowest, 2] / 1e6, rows[slowest, 3]

    return jax.jit(reduce, out_shardings=NamedSharding(mesh, PartitionSpec()))


def wait(name, minutes=60):
    """Waits until every process calls it with the same `name`.

    It uses no collective, because a collective on CPU gives up after 30 s.
    """
    import orbax.checkpoint as ocp

    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=60_000 * minutes)


def check_shared(folder):
    """Raises UserError on all processes unless they all see the same folder."""
    if count() == 1:
        return
    if storage.is_remote(folder):
        names = gather(str(folder))
        if len(set(names)) > 1:
            raise UserError(f"the hosts have different work folders: {', '.join(sorted(set(names)))}")
        return
    with tempfile.NamedTemporaryFile(prefix=".shared_", dir=folder) as mark:
        name = gather(pathlib.Path(mark.name).name)[0]
        # A network file system may answer a look-up of the name from its cache, but not a listing.
        seen = gather(name in os.listdir(folder))
    if not all(seen):
        raise UserError(
            f"{folder} is not one folder for all hosts (process {seen.index(False)} sees another one): share it"
        )


def spawn(processes, command, **kwargs):
    """Starts `python -m *command` in several processes on this machine, joined over loopback; returns `[Popen]`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        flags = [f"--coordinator=127.0.0.1:{probe.getsockname()[1]}", f"--processes={processes}"]
    children = []
    for process in range(processes):
        # Process i uses GPU i. In a session of its own it does not receive the terminal's Ctrl-C a second time.
        env = {"JAX_LOCAL_DEVICE_IDS": str(process)} | os.environ
        arguments = [sys.executable, "-m", *command, *flags, f"--process={process}"]
        children.append(subprocess.Popen(arguments, env=env, start_new_session=True, **kwargs))
    return children


def launch(processes, command):
    """Runs the processes of `spawn` to their end; returns the exit status of the first process that fails, or 0.

    It passes signals on. When one process fails, the others have `GRACE_SECONDS` to end, and are killed then.
    """
    children = []

    def pass_on(number, _):
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    # `pkill -USR1 -f clip_jax.train` also finds this process, whose arguments are those of the others.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        previous[number] = signal.signal(number, signal.SIG_IGN)
    status, since = 0, 0.0
    try:
        children += spawn(processes, command)
        while any(child.poll() is None for child in children) and not (
            status and time.monotonic() - since > GRACE_SECONDS
        ):
            time.sleep(0.1)
            if not status and (failed := [child.returncode for child in children if child.poll()]):
                status, since = failed[0], time.monotonic()
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def main(argv=None):
    """Runs the command `--processes=N MODULE ...` and returns its exit status."""
    count_flag, *command = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if count_flag in ("-h", "--help"):
        print(__doc__)
        return 0
    name, _, processes = count_flag.partition("=")
    if name != "--processes" or not processes.isdecimal() or not int(processes) or not command:
        print(f"error: give --processes=N, N at least 1, and a module; got {count_flag!r}", file=sys.stderr)
        return 2
    return launch(int(processes), command)


if __name__ == "__main__":
    sys.exit(main())
