"""Pretraining: `python -m clip_jax.train --config=configs/clip.py[:variant] --workdir=runs/clip [--config.optim.lr=5e-4 ...]`.

The whole of it, top to bottom: configuration -> source, tokenizer, method -> mesh -> state, sharded from birth -> compiled step
-> loop with metrics, evaluation and checkpoints. The same command again goes on from the newest checkpoint.

On several hosts every one runs the same command. The exit status: 0 done, 2 wrong input or a full disk, 42 preempted (SIGTERM)
and 130 interrupted (Ctrl-C), the state being saved, 43 another host is lost or nothing moves.
"""

from __future__ import annotations

import logging
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_jax import config as config_lib
from clip_jax import init_from
from clip_jax.errors import UserError
from clip_jax.runtime import command, faults, hosts
from clip_jax.version import __version__

#: What a host may wish of all: to save now; greater is an exit status to stop with.
SAVE = 1

if TYPE_CHECKING:  # JAX takes seconds to import, and wrong input is answered before
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from clip_jax.data.tokenizers import Tokenizer
    from clip_jax.methods.interface import Method
    from clip_jax.training.checkpoint import Checkpointer
    from clip_jax.training.metrics import Writer


def parse_args(argv):
    """`(configuration, work folder, hosts.Cluster or None)` of a command line; raises UserError."""
    parser = command.make_parser("clip_jax.train", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a configuration, e.g. configs/clip.py:smoke"
    )
    parser.add_argument(
        "--workdir", required=True, help="checkpoints, metrics and the report go here; a run in it is continued"
    )
    hosts.add_arguments(parser)
    args, rest = parser.parse_known_args(argv)
    return config_lib.load(args.config, config_lib.parse_overrides(rest)), args.workdir, hosts.from_arguments(args)


def prepare_workdir(workdir):
    """Makes the work folder; raises UserError when it cannot be written."""
    if "://" in str(workdir):
        raise UserError(
            f"--workdir={workdir}: a folder is needed; mount the bucket, for instance with gcsfuse, and give its path"
        )
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return workdir


def make_parts(config):
    """`(config, source, tokenizer, method)`, checked, without touching a device; raises UserError."""
    from clip_jax import evaluate
    from clip_jax.data.loader import check_source
    from clip_jax.data.sources import configured_source
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.methods import interface

    config_lib.validate(config)
    for task in (*config.eval.tasks, *config.eval.train_tasks):
        evaluate.parse_task(task)
    tokenizer = make_tokenizer(config.tokenizer)
    source, data = configured_source(config.data), config.data
    config = interface.resolve(config, tokenizer, source)
    method = interface.make_method(config)
    check_source(source, method.views, tokenizer, data.batch_size, data.sampling == "one_source")
    return config, source, tokenizer, method


def make_loader(config, source, tokenizer, method, mesh, start_step):
    """This host's share of the batches from `start_step` on."""
    from clip_jax.data.loader import Loader
    from clip_jax.runtime import sharding

    data, (host, count) = config.data, sharding.process_shard(mesh)
    return Loader(
        source, method.views, tokenizer, batch_size=data.batch_size, seed=config.seed, start_step=start_step, host=host,
        hosts=count, one_source=data.sampling == "one_source", workers=data.workers, threads=data.threads, prefetch=data.prefetch,
        max_bad_share=data.max_bad_share, cache_bytes=data.cache_mb << 20,
    )  # fmt: skip


def init_or_restore(config, source, method, mesh, checkpointer, batch, tokenizer, log):
    """`(state, optimizer)` on the mesh: the newest checkpoint's, or a new one that no single device ever holds whole.

    A new one has the weights that `config.init_from` names, and what the method takes from the data.
    """
    import jax

    from clip_jax.runtime import sharding
    from clip_jax.training.step import make_init

    init, tx = make_init(config, method, batch)
    rng = jax.random.key(config.seed)
    shapes = jax.eval_shape(init, rng)
    shardings = sharding.state_shardings(shapes, mesh, method.sharding_rules)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    state = checkpointer.restore(shapes)
    if state is None:
        state = jax.jit(init, out_shardings=shardings)(rng)
        state = state.replace(extra=sharding.place(method.init_from_data(state.extra, source, mesh), shardings.extra))
        if config.init_from:
            state, line = init_from.start(config, state, tokenizer)
            log(line)
    return state, tx


def compile_step(config, method, tx, state, batch):
    """`(step, FLOPs, bytes per device or None)`: the compiled step, which reuses the state's memory, and its cost.

    FLOPs are the model's, over all devices: what is computed twice to save memory counts once.
    """
    import jax

    from clip_jax.compile import model_flops
    from clip_jax.training.step import make_step

    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_step(config, method, tx), donate_argnums=0, out_shardings=(shardings, None))
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    size = (
        memory
        and memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return compiled, model_flops(config), size


def describe(config, source, mesh, state, flops, size, seconds):
    """What a user wants to know before the first step."""
    import jax

    from clip_jax.training import metrics

    devices = jax.devices()
    steps, batch = config.train.steps, config.data.batch_size
    memory = f"{size / 2**20:,.0f} MiB per device" if size else "memory unknown"
    machine = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} host(s)"
    yield f"devices: {machine}; mesh {dict(mesh.shape)}"
    yield f"data: {config.data.source!r} {config.data.split!r}, {len(source):,} records"
    yield "parameters:\n" + metrics.parameter_table(state.params)
    yield f"step compiled in {seconds:.1f} s: {flops / batch / 1e9:.2f} GFLOP per example (forward and backward), {memory}"
    yield f"{steps:,} steps of {batch:,}: {steps * batch:,} examples, {steps * batch / len(source):.1f} epochs; from step {int(state.step)}"


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: ConfigDict
    method: Method
    tokenizer: Tokenizer
    mesh: Mesh
    checkpointer: Checkpointer
    writer: Writer
    signals: faults.Signals
    log: Callable[[str], None]

    def evaluate(self, state, tasks):
        """The EvalResult of a state, its metrics written down."""
        from clip_jax import evaluate
        from clip_jax.inference import Model

        params = state.ema if self.config.eval.ema else state.params
        with faults.stage("evaluation"):
            result = evaluate.run(
                Model(self.config, self.method, params, state.extra, self.tokenizer, self.mesh), tasks, self.log
            )
        if result.metrics:
            self.writer.write(int(state.step), result.metrics)
        return result

    def stop(self, status, step):
        """Ends the run, whose state of `step` is being saved, as a signal asked."""
        self.checkpointer.wait()
        raise faults.Stopped(status, f"at step {step}: state saved")


def train(config, workdir, log=print, cluster=None):
    """Trains and evaluates; returns the metrics of the last evaluation.

    Args:
      config: a configuration.
      workdir: the work folder, which all hosts share.
      say: takes the lines that tell what is going on, on the first host.
      cluster: a `clip_jax.runtime.hosts.Cluster`; None: what the machine knows of itself, else one host.

    Raises:
      UserError: wrong input, or nothing can be saved.
      clip_jax.runtime.faults.Stopped: a signal told it to stop.
    """
    workdir = prepare_workdir(workdir)
    config, source, tokenizer, method = make_parts(config)
    init_from.check_path(config, workdir)
    limit = 60 * config.train.stall_minutes
    hosts.start(cluster, timeout=max(5, int(min(limit, 100))) if limit else 100)
    hosts.check_shared(workdir)

    import jax

    from clip_jax import evaluate
    from clip_jax.runtime import sharding
    from clip_jax.training import checkpoint, metrics

    if not hosts.is_first():
        logging.getLogger().setLevel(logging.ERROR)
        log = lambda line: None  # noqa: E731
    log(f"clip_jax {__version__}: {config.method} on {config.data.source}, work folder {workdir}")
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, mesh, micro_batches=config.micro_batches)
    shapes = method.batch_spec(config.data.batch_size, sharding.batch_sharding(mesh))
    with (
        faults.Signals() as signals,
        faults.watch(config.train.stall_minutes),
        jax.set_mesh(mesh),
        checkpoint.Checkpointer(workdir, config, tokenizer) as checkpointer,
    ):
        state, tx = init_or_restore(config, source, method, mesh, checkpointer, shapes, tokenizer, log)
        if hosts.is_first():
            (workdir / "config.json").write_text(config_lib.to_json(config))
        with closing(metrics.Writer(workdir, config)) as writer:
            run = Run(config, method, tokenizer, mesh, checkpointer, writer, signals, log)
            if int(state.step) < config.train.steps:
                state = loop(run, source, tx, state)
            else:
                log(f"the run in {workdir} is complete: {int(state.step)} of {config.train.steps} steps")
            result = run.evaluate(state, config.eval.tasks)
        checkpointer.save(int(state.step), state, result.metrics)
        checkpointer.wait()
    if hosts.is_first() and config.eval.report:
        log(f"report: {evaluate.write_report(workdir, config, result)}")
    log(f"done: checkpoints, metrics.jsonl, config.json are in {workdir}")
    hosts.wait("reported")  # by the first one
    return result.metrics


def loop(run, source, tx, state):
    """The steps up to `config.train.steps`; host work happens one step behind the devices. Returns the last state."""
    import jax

    from clip_jax.runtime import sharding
    from clip_jax.training import metrics

    config, log = run.config, run.log
    steps, first = config.train.steps, int(state.step)
    loader = make_loader(config, source, run.tokenizer, run.method, run.mesh, first)
    known, shares = loader.skipped.total(), sharding.process_shard(run.mesh)[1]  # known: on every host the same
    log("reading the first batch and compiling the step ...")
    with faults.stage("data"):
        batch = sharding.to_global(next(loader), run.mesh)
    start = time.perf_counter()
    step_fn, flops, size = compile_step(config, run.method, tx, state, batch)
    hosts.wait("compiled")  # a host that had the step in a cache waits here, and not in a step that must not take long
    for line in describe(config, source, run.mesh, state, flops, size, time.perf_counter() - start):
        log(line)
    progress = metrics.Progress(config.data.batch_size, steps, flops)
    saved, behind = time.monotonic(), None

    def account(step, values, agreed, waited):
        """Takes in the metrics of a step that the devices have finished, or are about to; returns what the hosts wish."""
        with faults.stage("step"):
            values, (wish, skipped) = jax.device_get((values, agreed))
        progress.add(values, waited)
        if values["bad_steps"] >= config.train.max_bad_steps:
            run.checkpointer.wait()
            since = step - int(values["bad_steps"]) + 1
            raise UserError(
                f"the loss or a gradient was not finite in steps {since} to {step}; their updates were skipped, so the newest checkpoint,"
                f" {run.checkpointer.newest()}, is still good: lower the learning rate and start again"
            )
        if step % config.train.log_steps == 0 or step in (first + 1, steps):
            # Hosts with the same share of the rows skip the same.
            values, line = progress.report(step, known + int(skipped) * shares // hosts.count())
            run.writer.write(step, values)
            log(line)
        return int(wish)

    with closing(loader), run.signals.deferred():
        for step in range(first + 1, steps + 1):
            wish = run.signals.status
            if not wish and config.checkpoint.minutes and time.monotonic() - saved > 60 * config.checkpoint.minutes:
                wish, saved = SAVE, time.monotonic()
            with faults.stage("step"):
                state, values = step_fn(state, batch)
                agreed = hosts.exchange(run.mesh, wish, loader.skipped.total() - known)
            wish = account(*behind) if behind else 0
            waited = 0.0
            if step < steps:
                start = time.perf_counter()
                with faults.stage("data"):
                    rows = next(loader)
                waited = time.perf_counter() - start
                batch = sharding.to_global(rows, run.mesh)
            behind = (step, values, agreed, waited)
            by_steps = config.checkpoint.steps and step % config.checkpoint.steps == 0
            evaluates = config.eval.steps and step % config.eval.steps == 0
            if step < steps and (by_steps or evaluates or wish):
                # What a checkpoint holds, the metrics hold too.
                wish, behind, result = max(wish, account(*behind)), None, {}
                if evaluates:
                    start = time.perf_counter()
                    result = run.evaluate(state, config.eval.train_tasks).metrics
                    progress.pause(time.perf_counter() - start)
                if by_steps or wish or config.checkpoint.best:
                    run.checkpointer.save(step, state, result)
                    saved = time.monotonic()
                if wish > SAVE:
                    run.stop(wish, step)
        wish = max(wish, account(*behind))
        if wish > SAVE or not config.checkpoint.best:  # nothing that goes wrong in the evaluation costs the training
            run.checkpointer.save(steps, state, {})
        if wish > SAVE:
            run.stop(wish, steps)
    return state


def main(argv=None):
    """The command; returns the exit status, see the top of this file."""

    def work():
        config, workdir, cluster = parse_args(argv)
        train(config, workdir, lambda line: print(line, flush=True), cluster)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
