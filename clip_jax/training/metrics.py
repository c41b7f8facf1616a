"""The metrics of a run: the progress line, `metrics.jsonl`, TensorBoard and Weights & Biases."""

import collections
import hashlib
import json
import math
import tempfile
import time

import jax
import numpy as np

from clip_jax.errors import UserError
from clip_jax.runtime import hardware, hosts, storage
from clip_jax.runtime.goodput import duration

#: The progress line names the host that waits for its data when the waits are more than this share of the time, and
#: when it was the slowest one for more than this share of them.
_NAMED_SHARE, _FAR_BEHIND = 0.05, 0.8


def peak_flops():
    """Returns the peak bf16 FLOP/s of one device of this machine, or None when unknown (a CPU)."""
    chip = hardware.chip_of(jax.devices()[0].device_kind)
    return chip and chip.flops / chip.devices


class Writer:
    """Writes scalars to `<workdir>/metrics.jsonl` and, as configured, to TensorBoard and Weights & Biases.

    Only the first host writes. In a bucket, metrics.jsonl is a folder of parts (`clip_jax.runtime.storage.Log`), and
    everything is safe after `flush`.
    """

    def __init__(self, workdir, config):
        self.sinks, self.flushes = [], []
        if not hosts.is_first():
            return
        log = storage.Log(workdir / "metrics.jsonl")
        self.sinks.append((lambda step, values: log.write(_row(step, values)), log.close))
        self.flushes.append(log.flush)
        if config.log.tensorboard:
            self._add_tensorboard(workdir / "tensorboard")
        if config.log.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    f"log.wandb={config.log.wandb!r} needs the package wandb: pip install 'clip-jax-pretraining[wandb]'"
                ) from None
            run = wandb.init(
                project=config.log.wandb,
                dir=tempfile.gettempdir() if storage.is_remote(workdir) else str(workdir),
                config=config.to_dict(),
                resume="allow",
                name=workdir.name,
                # The rows of a study have folders of one name, and W&B keeps one run for an id.
                id=hashlib.sha256(str(storage.absolute(workdir)).encode()).hexdigest()[:16],
            )
            self.sinks.append((lambda step, values: run.log(values, step=step), run.finish))

    def _add_tensorboard(self, folder):
        import tensorboardX
        from tensorboardX.proto.summary_pb2 import Summary

        mirror = storage.Mirror(folder)
        board = tensorboardX.SummaryWriter(str(mirror.folder))

        def write(step, values):
            # `add_scalar` would write "R_1" for "R@1".
            found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            board.file_writer.add_summary(Summary(value=found), step)

        def flush():
            board.flush()
            mirror.flush()

        def close():
            board.close()
            mirror.close()

        self.sinks.append((write, close))
        self.flushes.append(flush)

    def flush(self):
        """Makes all values safe. Raises StorageError when a bucket does not take them."""
        for flush in self.flushes:
            flush()

    def write(self, step, values):
        """Writes `{name: number}` of a step. A non-finite number becomes null in the JSON file."""
        values = {k: float(v) for k, v in values.items()}
        for write, _ in self.sinks:
            write(step, values)

    def close(self):
        """Closes all files."""
        for _, close in self.sinks:
            close()


def _row(step, values):
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return json.dumps({"step": step, "time": round(time.time(), 3), **row})


class Progress:
    """Means and rates over the steps since the last report.

    Args:
      batch_size: the global batch size.
      steps: the number of steps of the run.
      flops_per_step: the model's FLOPs of a step, over all devices.
    """

    def __init__(self, batch_size, steps, flops_per_step):
        self.batch_size, self.steps = batch_size, steps
        self.flops, self.peak = flops_per_step, peak_flops()
        self.sums = collections.defaultdict(float)
        self.recent = collections.deque(maxlen=20)  # (steps, seconds) of the last reports, for the remaining time
        self._restart()

    def _restart(self):
        self.done, self.waited = 0, collections.Counter()
        self.start = time.perf_counter()

    def add(self, metrics, waited, host=0):
        """Adds the metrics of one step, the seconds that the slowest host waited for its data, and that host."""
        for name, value in metrics.items():
            self.sums[name] += float(value)
        self.done += 1
        self.waited[int(host)] += float(waited)

    def pause(self, seconds):
        """Excludes time that was not spent on training, such as an evaluation."""
        self.start += seconds

    def report(self, step, skipped=0):
        """Returns `({name: float}, progress line)`: mean metrics and rates since the last report.

        Args:
          step: the number of the last step.
          skipped: the number of unusable records so far.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        values = {name: total / self.done for name, total in self.sums.items()}
        values["images_per_s"] = self.done * self.batch_size / seconds
        waited = self.waited.total()
        values["data_wait_share"] = waited / seconds
        host, longest = self.waited.most_common(1)[0]
        if hosts.count() > 1 and values["data_wait_share"] > _NAMED_SHARE and longest > _FAR_BEHIND * waited:
            values["data_wait_host"] = host
        values["skipped"] = skipped
        if self.peak and self.flops:
            values["mfu"] = self.flops * self.done / seconds / (self.peak * jax.device_count())
        self.recent.append((self.done, seconds))
        pace = sum(s for _, s in self.recent) / sum(n for n, _ in self.recent)
        values["eta_s"] = pace * (self.steps - step)
        self.sums.clear()
        self._restart()
        return values, self.line(step, values)

    def line(self, step, values):
        """Returns the progress line of the values of `report`."""
        accuracy = [v for k, v in values.items() if k.endswith("_acc")]
        parts = [f"step {step:{len(str(self.steps))}}/{self.steps}", f"loss {values['loss']:.4f}"]
        if accuracy:
            parts.append(f"acc {np.mean(accuracy):.3f}")
        if "logit_scale" in values:
            parts.append(f"scale {values['logit_scale']:.1f}")
        parts += [f"grad {values['grad_norm']:.2f}", f"params {values['param_norm']:.1f}", f"lr {values['lr']:.1e}"]
        slowest = f" (host {values['data_wait_host']})" if "data_wait_host" in values else ""
        parts += [f"{values['images_per_s']:.0f} img/s", f"data wait {values['data_wait_share']:.0%}{slowest}"]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if values["skipped"]:
            parts.append(f"skipped {values['skipped']:.0f}")
        return " | ".join([*parts, f"ETA {duration(values['eta_s'])}"])


def describe_run(config, records, mesh, state, flops, size, seconds, found):
    """Yields the lines that a user reads before the first step.

    Args:
      config: the configuration.
      records: the number of records in the source.
      mesh: the device mesh.
      state: the `TrainState` to start from.
      flops: FLOPs of a step, over all devices.
      size: bytes of the step on one device, or None.
      seconds: the time that its compilation took.
      found: the number of hosts that found it in the compilation cache.
    """
    devices = jax.devices()
    steps, batch = config.train.steps, config.data.batch_size
    memory = f"{size / 2**20:,.0f} MiB per device" if size else "memory unknown"
    machine = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} host(s)"
    yield f"devices: {machine}; mesh {dict(mesh.shape)}"
    yield f"data: {config.data.source!r} {config.data.split!r}, {records:,} records"
    yield "parameters:\n" + parameter_table(state.params)
    gflops = flops / batch / 1e9
    source = ", found in the compilation cache" if found else ""
    source += f" by {found} of {hosts.count()} hosts" if 0 < found < hosts.count() else ""
    yield f"step compiled in {seconds:.1f} s{source}: {gflops:.2f} GFLOP per example (forward and backward), {memory}"
    epochs = f"{steps * batch:,} examples, {steps * batch / records:.1f} epochs"
    yield f"{steps:,} steps of {batch:,}: {epochs}; from step {int(state.step)}"


def parameter_table(params):
    """Returns a table of parameter counts: the two upper levels of the tree, and the total."""
    from clu import parameter_overview

    total = parameter_overview.count_parameters(params)
    rows = []
    for name, part in sorted(params.items()):
        rows.append((name, parameter_overview.count_parameters({name: part})))
        blocks = collections.Counter()
        for child, tree in part.items() if isinstance(part, dict) else ():
            group = "block_*" if child.startswith("block_") else child
            blocks[group] += parameter_overview.count_parameters({child: tree})
        rows += [(f"  {child}", count) for child, count in blocks.items()]
    return "\n".join(f"  {name:<14}{count:>14,.0f}" for name, count in [*rows, ("total", total)])
