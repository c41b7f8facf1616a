"""Pretraining: `python -m clip_jax.train --config=configs/clip.py[:variant] --workdir=DIR [--config.optim.lr=1e-3 ..]`.

The file reads from top to bottom: configuration -> source, tokenizer, method -> mesh -> sharded state -> compiled step
-> loop with metrics, evaluation and checkpoints. The same command again resumes from the newest checkpoint.

On several hosts, each runs the same command. Exit status: 0 done, 2 wrong input or a full disk, 42 preempted (SIGTERM)
and 130 interrupted (Ctrl-C), both with the state saved, 43 another host is lost or nothing progresses, 44 storage
failed.
"""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from clip_jax import config as config_lib
from clip_jax import init_from, preflight, run_folder
from clip_jax.data import summary
from clip_jax.data.reading import configured_reading
from clip_jax.errors import StorageError, UserError
from clip_jax.runtime import command, compile_cache, faults, goodput, host_log, hosts, lock, profile, storage
from clip_jax.version import __version__

# Importing JAX takes seconds and wrong input is refused before, so functions import what needs JAX.

make_parts = preflight.make_parts

#: Request shared by all hosts: 0 none, SAVE saves now, a larger value is the exit status after saving.
SAVE = 1


def parse_args(argv):
    """Returns `(config, workdir, hosts.Cluster or None, run_folder.Fork or None)` of a command line; UserError."""
    parser = command.make_parser("clip_jax.train", __doc__)
    run_folder.add_arguments(parser)
    hosts.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = config_lib.parse_overrides(rest)
    config, fork = run_folder.from_arguments(args, overrides)
    if not fork:
        preflight.need_data(args.config, config, overrides)
    return config, args.workdir, hosts.from_arguments(args), fork


def make_loader(config, source, tokenizer, method, mesh, start_step):
    """Returns the loader of this host's share of the batches, from `start_step` on."""
    from clip_jax.data.loader import Loader
    from clip_jax.runtime import sharding

    data, (host, count) = config.data, sharding.process_shard(mesh)
    return Loader(
        source, method.views, tokenizer, batch_size=data.batch_size, seed=config.seed, start_step=start_step,
        host=host, hosts=count, one_source=data.sampling == "one_source", workers=data.workers, threads=data.threads,
        prefetch=data.prefetch, max_bad_share=data.max_bad_share, cache_bytes=data.cache_mb << 20,
        reading=configured_reading(data),
    )  # fmt: skip


def init_or_restore(config, source, method, mesh, checkpointer, batch, tokenizer, log):
    """Returns `(state, optimizer)` on the mesh: the newest checkpoint or a new state, sharded from the start.

    A new state takes the weights of `config.init_from` and the start values that the method computes from the data.
    """
    import jax

    from clip_jax import program
    from clip_jax.runtime import sharding
    from clip_jax.training.step import first_state, make_init, state_shapes

    init, tx = make_init(config, method, batch)
    shapes = state_shapes(init)
    shardings = sharding.state_shardings(shapes, mesh, method.sharding_rules)
    parts = program.Program(config, method, tx, sharding.with_shardings(shapes, shardings), batch)
    preflight.check_room(parts, checkpointer.folder.parent, not checkpointer.newest())
    state = checkpointer.restore(parts.state)
    if state is None:
        state = first_state(init, jax.random.key(config.seed), shardings)
        state = state.replace(extra=sharding.place(method.init_from_data(state.extra, source, mesh), shardings.extra))
        if config.init_from:
            state, line = init_from.start(config, state, tokenizer)
            log(line)
        state = init_from.complete(state, method, tokenizer, mesh)
    return state, tx


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Any  # resolved
    method: Any
    tokenizer: Any
    mesh: Any
    checkpointer: Any
    writer: Any  # of metrics
    signals: faults.Signals
    goodput: goodput.Goodput
    workdir: Any  # a path, see `storage.path`
    cache: Any  # of the compiled step, see `compile_cache.prepare`
    log: Any  # takes a line of text

    def evaluate(self, state, tasks, is_last=False):
        """Evaluates a state, writes its metrics and returns the `EvalResult`; the last one's outcomes are kept."""
        from clip_jax import evaluate
        from clip_jax.inference import Model

        params = state.ema if self.config.eval.ema else state.params
        with faults.stage("evaluation"):
            model = Model(self.config, self.method, params, state.extra, self.tokenizer, self.mesh)
            model.step, model.ema = int(state.step), self.config.eval.ema
            result = evaluate.run(model, tasks, self.log)
        if is_last and hosts.is_first():  # before the metrics, by which a reader knows a complete run
            evaluate.keep_outcomes(self.workdir, int(state.step), result)
        if result.metrics:
            self.writer.write(int(state.step), result.metrics)
        return result

    def save(self, step, state, metrics):
        """Starts to save a state, unless that step is saved already; the metrics of its steps are safe before."""
        self.writer.flush()
        self.checkpointer.save(step, state, metrics, self.goodput.seconds())

    def stop(self, status, step):
        """Ends the run with the exit status that a signal asked for, once the state of `step` is on disk."""
        self.checkpointer.wait()
        raise faults.Stopped(status, f"at step {step}: state saved")


def train(config, workdir, log=print, cluster=None, fork=None):
    """Trains and evaluates; returns the metrics of the last evaluation.

    Args:
      config: a configuration.
      workdir: the work folder, which all hosts share.
      log: takes the lines that report progress, on the first host.
      cluster: a `clip_jax.runtime.hosts.Cluster`. None detects Cloud TPU and SLURM; elsewhere this is the only host.
      fork: a `clip_jax.run_folder.Fork` whose state a new work folder starts from.

    Raises UserError on wrong input or a full disk, StorageError when storage fails, and
    `clip_jax.runtime.faults.Stopped` after a signal.
    """
    started, limit = time.time(), 60 * config.train.stall_minutes
    workdir = storage.prepare(workdir)
    cache = compile_cache.prepare(config.compile.cache, workdir)
    # The hosts join before data is opened, because they may take very different times for that.
    hosts.start(cluster, timeout=max(5, int(min(limit, 100))) if limit else 100)
    lines = []  # which host is the first one is known by the devices, and nothing touches these yet
    config, source, tokenizer, method = make_parts(config, workdir, lines.append)
    init_from.check(config, tokenizer, workdir)
    hosts.devices()
    with faults.stage("waiting until all hosts have opened their data"):
        hosts.wait("opened")
    hosts.check_shared(workdir)

    import jax

    from clip_jax import evaluate
    from clip_jax.runtime import sharding
    from clip_jax.training import checkpoint, metrics

    log = hosts.on_first(log)
    for line in lines:
        log(line)
    run_folder.begin(config, method, workdir, fork, log)
    log(f"clip_jax {__version__}: {config.method} on {config.data.source}, work folder {workdir}")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, mesh, micro_batches=config.micro_batches)
    shapes = method.batch_spec(config.data.batch_size, sharding.batch_sharding(mesh))
    with (
        faults.Signals() as signals,
        lock.hold(workdir, log),
        faults.watch(config.train.stall_minutes),
        jax.set_mesh(mesh),
        checkpoint.Checkpointer(workdir, config, tokenizer) as checkpointer,
    ):
        state, tx = init_or_restore(config, source, method, mesh, checkpointer, shapes, tokenizer, log)
        if run_folder.is_beyond(config, workdir, int(state.step), log):
            return {}
        run_folder.record(workdir, config, int(state.step))
        with contextlib.closing(metrics.Writer(workdir, config)) as writer:
            clock = goodput.Goodput(started, checkpointer.seconds)
            run = Run(config, method, tokenizer, mesh, checkpointer, writer, signals, clock, workdir, cache, log)
            trains = int(state.step) < config.train.steps
            if trains:
                state = loop(run, source, tx, state)
            else:
                log(f"the run in {workdir} is complete: {int(state.step)} of {config.train.steps} steps")
            result = run.evaluate(state, config.eval.tasks, is_last=True)
            run.save(int(state.step), state, result.metrics)
            checkpointer.wait()
            if trains:  # a run that was complete has lost no time since
                seconds = clock.seconds()
                writer.write(int(state.step), {f"seconds/{part}": seconds[part] for part in goodput.PARTS})
                log(f"time: {goodput.describe(seconds)}")
    if hosts.is_first() and config.eval.report:
        log(f"report: {evaluate.write_report(workdir, config, result)}")
    log(f"done: checkpoints, metrics.jsonl, config.json are in {workdir}")
    hosts.wait("reported")  # until the first host has written the report
    return result.metrics


def next_batch(loader, mesh):
    """Returns `(global batch on the mesh, seconds waited for this host's rows)`."""
    from clip_jax.runtime import sharding

    start = time.perf_counter()
    with faults.stage("data"):
        rows = next(loader)
    waited = time.perf_counter() - start
    return sharding.to_global(rows, mesh), waited


def compile_on_all_hosts(run, source, tx, state, batch):
    """Compiles the step, logs what a user reads before the first step, and returns `(step, FLOPs over all devices)`."""
    from clip_jax import program
    from clip_jax.training import metrics

    start = time.perf_counter()
    parts = program.Program(run.config, run.method, tx, state, batch)
    traced = program.trace_step(parts)
    step_fn, found = compile_cache.run(lambda: program.compile_step(parts, traced), run.cache)
    size = program.device_bytes(step_fn)
    preflight.check_step(parts, size)
    flops = program.model_flops(run.config, traced)
    # A host with a cached step waits here, outside of the stage "step", whose time is limited.
    hosts.wait("compiled")
    found, seconds = sum(hosts.gather(found)), time.perf_counter() - start
    run.goodput.begin_steps(seconds)
    run_folder.describe(run.workdir, run.config, state.params, flops, size)
    for line in metrics.describe_run(run.config, len(source), run.mesh, state, flops, size, seconds, found):
        run.log(line)
    return step_fn, flops


class Recorder:
    """Records finished steps and knows when this host asks for a checkpoint.

    `skipped` is the loader's count of unusable records when it was made, the same on all hosts.
    """

    def __init__(self, run, loader, skipped, first, flops):
        from clip_jax.training import metrics

        self.run, self.loader = run, loader
        self.skipped, self.first = skipped, first
        self.progress = metrics.Progress(run.config.data.batch_size, run.config.train.steps, flops)
        self.saved = time.monotonic()

    def exchange(self, waited):
        """Shares this host's request, skipped records and seconds of waiting; returns those of `hosts.exchange`."""
        request, minutes = self.run.signals.status, self.run.config.checkpoint.minutes
        if not request and minutes and time.monotonic() - self.saved > 60 * minutes:
            request, self.saved = SAVE, time.monotonic()
        return hosts.exchange(self.run.mesh, request, self.loader.skipped.total() - self.skipped, waited)

    def record_step(self, step, values, agreed):
        """Waits for the metrics of a step, checks and logs them; returns the request that the hosts agreed on."""
        import jax

        from clip_jax.runtime import sharding

        run, options = self.run, self.run.config.train
        with faults.stage("step"):
            values, (request, skipped, *waited) = jax.device_get((values, agreed))
        self.progress.add(values, *waited)
        if values["bad_steps"] >= options.max_bad_steps:
            run.checkpointer.wait()
            since = step - int(values["bad_steps"]) + 1
            problem = f"the loss or a gradient was not finite in steps {since} to {step}; their updates were skipped"
            path = run.checkpointer.newest()
            newest = f"the newest checkpoint, {path}, is still good" if path else "no checkpoint is saved yet"
            raise UserError(f"{problem}; {newest}: lower the learning rate and start again")
        if step % options.log_steps == 0 or step in (self.first, options.steps):
            # Hosts with the same rows skip the same records: each of the shares counts once.
            shares = sharding.process_shard(run.mesh)[1]
            values, line = self.progress.report(step, self.skipped + int(skipped) * shares // hosts.count())
            run.writer.write(step, values | {"goodput": run.goodput.share()})
            run.log(line)
        return int(request)

    def end_without_data(self, error, pending, state):
        """Ends the run when its data fail for good. A single process saves first; several have no common step."""
        if hosts.count() == 1:
            self.record_step(*pending)
            self.run.save(pending[0], state, {})
            self.run.checkpointer.wait()
        newest = self.run.checkpointer.newest()
        raise StorageError(f"{error}; the run resumes from step {newest.name if newest else 0}") from error

    def evaluate(self, state):
        """Returns the metrics of `config.eval.train_tasks`; the time does not count as training."""
        start = time.perf_counter()
        result = self.run.evaluate(state, self.run.config.eval.train_tasks).metrics
        self.progress.pause(time.perf_counter() - start)
        return result


def loop(run, source, tx, state):
    """Runs the steps up to `config.train.steps` and returns the last state.

    Host work happens one step behind the devices.
    """
    config, first = run.config, int(state.step) + 1
    steps = config.train.steps
    loader = make_loader(config, source, run.tokenizer, run.method, run.mesh, first - 1)
    skipped = loader.skipped.total()
    run.checkpointer.begin_order(loader.digest, first, run.log)
    if first == 1 and hosts.is_first():
        for line in summary.describe(source, run.method.views, run.tokenizer):
            run.log(line)
    run.log("\n".join(filter(None, [loader.blocks, "reading the first batch and compiling the step ..."])))
    batch, waited = next_batch(loader, run.mesh)[0], 0.0  # nothing trains yet
    step_fn, flops = compile_on_all_hosts(run, source, tx, state, batch)
    recorder, pending = Recorder(run, loader, skipped, first, flops), None
    profiler = profile.Profiler(run.workdir / "profile", config, step_fn, run.log)
    with contextlib.closing(loader), run.signals.deferred(), profiler:
        for step in range(first, steps + 1):
            with faults.stage("step"), profiler.step(step, state):
                state, values = step_fn(state, batch)
                agreed = recorder.exchange(waited)
            stop_request = recorder.record_step(*pending) if pending else 0
            pending = (step, values, agreed)
            if step < steps:
                try:
                    batch, waited = next_batch(loader, run.mesh)
                except StorageError as error:
                    recorder.end_without_data(error, pending, state)
            by_steps = config.checkpoint.steps and step % config.checkpoint.steps == 0
            evaluates = config.eval.steps and step % config.eval.steps == 0
            if step < steps and (by_steps or evaluates or stop_request):
                # metrics.jsonl has every step that a checkpoint has.
                stop_request, pending = max(stop_request, recorder.record_step(*pending)), None
                result = recorder.evaluate(state) if evaluates else {}
                if by_steps or stop_request or config.checkpoint.best:
                    run.save(step, state, result)
                    recorder.saved = time.monotonic()
                if stop_request > SAVE:
                    run.stop(stop_request, step)
        stop_request = max(stop_request, recorder.record_step(*pending))
        if stop_request > SAVE or not config.checkpoint.best:  # a failing evaluation must not cost the training
            run.save(steps, state, {})
        if stop_request > SAVE:
            run.stop(stop_request, steps)
    return state


def main(argv=None):
    """Runs the command and returns its exit status, which the top of this file lists."""

    def work():
        profile.ignore_signal()
        config, workdir, cluster, fork = parse_args(argv)
        with preflight.nothing_left(workdir):
            folder, log = storage.prepare(workdir), lambda line: print(line, flush=True)
            number, together = hosts.place(cluster)
            # On Cloud TPU `train` takes the lock, once the hosts have joined: until then nothing may ask JAX.
            with contextlib.nullcontext() if number is None else lock.hold(folder, log, number, together):
                host_log.start(folder, host_log.process_name(cluster), storage.is_remote(workdir) and storage.Log)
                train(config, workdir, log, cluster, fork)

    return command.run(work)


if __name__ == "__main__":
    command.script(main)
