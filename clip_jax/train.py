"""Pretraining: ``python -m clip_jax.train --config=configs/clip.py[:variant] --workdir=runs/clip [--config.optim.lr=5e-4 ...]``.

The whole of it, top to bottom: configuration -> source, tokenizer, method -> mesh -> state, sharded from birth -> compiled step
-> loop with metrics, evaluation and checkpoints. The same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import clip_jax
from clip_jax import config as config_lib
from clip_jax.errors import UserError

if TYPE_CHECKING:  # JAX takes seconds to import, and wrong input is answered before
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from clip_jax.data.tokenizers import Tokenizer
    from clip_jax.methods.interface import Method
    from clip_jax.training.checkpoint import Checkpointer
    from clip_jax.training.metrics import Writer


def parse_args(argv):
    """``(configuration, work folder)`` of a command line; raises UserError."""
    parser = argparse.ArgumentParser(prog="clip_jax.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a configuration, e.g. configs/clip.py:smoke")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the report go here; a run in it is continued")
    args, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; fields of the configuration are set by --config.FIELD=VALUE")
        if "=" not in argument:
            if not rest:
                raise UserError(f"{argument!r} has no value")
            argument += "=" + rest.pop(0)
        overrides.append(argument.removeprefix("--config."))
    return config_lib.load(args.config, overrides), args.workdir


def prepare_workdir(workdir):
    """Makes the work folder; raises UserError when it cannot be written."""
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    return workdir


def make_parts(config):
    """``(config, source, tokenizer, method)``, checked, without touching a device; raises UserError."""
    from clip_jax import evaluate
    from clip_jax.data.loader import check_source
    from clip_jax.data.sources import make_source
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.methods.interface import make_method

    config_lib.validate(config)
    for task in (*config.eval.tasks, *config.eval.train_tasks):
        evaluate.parse_task(task)
    tokenizer = make_tokenizer(config.tokenizer)
    config = config_lib.resolve(config, tokenizer)
    method = make_method(config)
    data = config.data
    source = make_source(data.source, data.split, image=data.image or None, text=data.text or None, label=data.label or None)
    check_source(source, method.views, tokenizer)
    return config, source, tokenizer, method


def make_loader(config, source, tokenizer, method, start_step):
    """This host's batches from ``start_step`` on."""
    import jax

    from clip_jax.data.loader import Loader

    data = config.data
    return Loader(
        source, method.views, tokenizer, batch_size=data.batch_size, seed=config.seed, start_step=start_step, host=jax.process_index(),
        hosts=jax.process_count(), workers=data.workers, threads=data.threads, prefetch=data.prefetch, max_bad_share=data.max_bad_share,
        cache_bytes=data.cache_mb << 20,
    )  # fmt: skip


def init_or_restore(config, method, mesh, checkpointer, batch):
    """``(state, optimizer)`` on the mesh: the newest checkpoint's, or a new one that no single device ever holds whole."""
    import jax

    from clip_jax.training import sharding
    from clip_jax.training.step import make_init

    init, tx = make_init(config, method, batch)
    rng = jax.random.key(config.seed)
    shapes = jax.eval_shape(init, rng)
    shardings = sharding.state_shardings(shapes, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    state = checkpointer.restore(shapes)
    if state is None:
        state = jax.jit(init, out_shardings=shardings)(rng)
    return state, tx


def compile_step(config, method, tx, state, batch):
    """``(step, FLOPs or None, bytes per device or None)``: the compiled step, which reuses the state's memory, and its cost."""
    import jax

    from clip_jax.training.step import make_step

    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(make_step(config, method, tx), donate_argnums=0, out_shardings=(shardings, None))
    compiled = step.lower(state, batch).compile()
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    size = memory and memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    # The compiler counts the work of one device.
    flops = cost.get("flops", 0) * jax.device_count() or None
    return compiled, flops, size


def describe(config, source, mesh, state, flops, size, seconds):
    """What a user wants to know before the first step."""
    import jax

    from clip_jax.training import metrics

    devices = jax.devices()
    steps, batch = config.train.steps, config.data.batch_size
    gigaflops = f"{flops / batch / 1e9:.2f} GFLOP per example (forward and backward)" if flops else "FLOPs unknown"
    memory = f"{size / 2**20:,.0f} MiB per device" if size else "memory unknown"
    machine = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} host(s)"
    yield f"devices: {machine}; mesh {dict(mesh.shape)}"
    yield f"data: {config.data.source!r} {config.data.split!r}, {len(source):,} records"
    yield "parameters:\n" + metrics.parameter_table(state.params)
    yield f"step compiled in {seconds:.1f} s: {gigaflops}, {memory}"
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
    say: Callable[[str], None]

    def evaluate(self, state, tasks):
        """The EvalResult of a state, its metrics written down."""
        from clip_jax import evaluate
        from clip_jax.inference import Model

        params = state.ema if self.config.eval.ema else state.params
        result = evaluate.run(Model(self.config, self.method, params, state.extra, self.tokenizer, self.mesh), tasks, self.say)
        if result.metrics:
            self.writer.write(int(state.step), result.metrics)
        return result


def train(config, workdir, say=print):
    """Trains and evaluates; returns the metrics of the last evaluation. Raises UserError."""
    workdir = prepare_workdir(workdir)
    say(f"clip_jax {clip_jax.__version__}: {config.method} on {config.data.source}, work folder {workdir}")
    config, source, tokenizer, method = make_parts(config)

    import jax

    from clip_jax import evaluate
    from clip_jax.training import checkpoint, metrics, sharding

    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_size, mesh)
    layout = sharding.batch_sharding(mesh)
    shapes = {v.name: jax.ShapeDtypeStruct((config.data.batch_size, *v.shape), v.dtype, sharding=layout) for v in method.views}
    with jax.set_mesh(mesh), closing(checkpoint.Checkpointer(workdir, config, tokenizer)) as checkpointer:
        state, tx = init_or_restore(config, method, mesh, checkpointer, shapes)
        (workdir / "config.json").write_text(config_lib.to_json(config))
        with closing(metrics.Writer(workdir, config)) as writer:
            run = Run(config, method, tokenizer, mesh, checkpointer, writer, say)
            if int(state.step) < config.train.steps:
                state = loop(run, source, tx, state)
            else:
                say(f"the run in {workdir} is complete: {int(state.step)} of {config.train.steps} steps")
            if not config.checkpoint.best:  # nothing that goes wrong in the evaluation costs the training
                checkpointer.save(int(state.step), state, {})
            result = run.evaluate(state, config.eval.tasks)
        checkpointer.save(int(state.step), state, result.metrics)
        checkpointer.wait()
    if config.eval.report:
        say(f"report: {evaluate.write_report(workdir, config, result)}")
    say(f"done: checkpoints, metrics.jsonl, config.json are in {workdir}")
    return result.metrics


def loop(run, source, tx, state):
    """The steps up to ``config.train.steps``; host work happens one step behind the devices. Returns the last state."""
    import jax

    from clip_jax.training import metrics, sharding

    config, say = run.config, run.say
    steps, first = config.train.steps, int(state.step)
    loader = make_loader(config, source, run.tokenizer, run.method, first)
    say("reading the first batch and compiling the step ...")
    batch = sharding.to_global(next(loader), run.mesh)
    start = time.perf_counter()
    step_fn, flops, size = compile_step(config, run.method, tx, state, batch)
    for line in describe(config, source, run.mesh, state, flops, size, time.perf_counter() - start):
        say(line)
    progress = metrics.Progress(config.data.batch_size, steps, flops)
    saved, behind = time.monotonic(), None

    def account(step, values, waited):
        """Takes in the metrics of a step that the devices have finished, or are about to."""
        values = jax.device_get(values)
        progress.add(values, waited)
        if values["bad_steps"] >= config.train.max_bad_steps:
            since = step - int(values["bad_steps"]) + 1
            raise UserError(
                f"the loss or a gradient was not finite in steps {since} to {step}; their updates were skipped,"
                f" so the newest checkpoint in {run.checkpointer.folder} is still good: lower the learning rate and start again"
            )
        if step % config.train.log_steps == 0 or step in (first + 1, steps):
            values, line = progress.report(step, loader.skipped.total())
            run.writer.write(step, values)
            say(line)

    with closing(loader):
        for step in range(first + 1, steps + 1):
            state, values = step_fn(state, batch)
            if behind:
                account(*behind)
            waited = 0.0
            if step < steps:
                start = time.perf_counter()
                rows = next(loader)
                waited = time.perf_counter() - start
                batch = sharding.to_global(rows, run.mesh)
            behind, result = (step, values, waited), {}
            if config.eval.steps and step % config.eval.steps == 0 and step < steps:
                account(*behind)
                behind, start = None, time.perf_counter()
                result = run.evaluate(state, config.eval.train_tasks).metrics
                progress.pause(time.perf_counter() - start)
            by_steps = config.checkpoint.steps and step % config.checkpoint.steps == 0
            by_minutes = config.checkpoint.minutes and time.monotonic() - saved > 60 * config.checkpoint.minutes
            if (by_steps or by_minutes or (result and config.checkpoint.best)) and step < steps:
                run.checkpointer.save(step, state, result)
                saved = time.monotonic()
        if behind:
            account(*behind)
    return state


def main(argv=None):
    """The command; returns the exit status: 0, or 2 after a one-line error."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        train(*parse_args(argv), say=lambda line: print(line, flush=True))
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that is gone
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
