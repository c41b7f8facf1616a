"""What a run checks before its first step: the data of a recipe, free disk, and memory.

JAX is imported in functions, because wrong input is answered before it loads.
"""

import contextlib
import math
import os
import shutil
from pathlib import Path

from clip_jax import config as config_lib
from clip_jax import from_weights
from clip_jax.data.reading import configured_reading
from clip_jax.errors import Problems, UserError
from clip_jax.runtime import faults, lock, profile, storage

GIB = 2**30
#: The activations that a backward pass keeps are at most this many times the bytes of its batch.
_MOST_KEPT = 2000
#: A compiler keeps this share of the activations that the backward pass names, and never less than the second one: it
#: computes cheap ones again. Measured on a CPU for configs/clip.py:emoji, with and without micro-batches: 0.77.
_KEPT = 0.8
_LEAST_KEPT = 0.5
#: The share of the memory that a proposed variant may take, because its need is estimated.
_USABLE = 0.9


def need_data(spec, config, overrides):
    """Raises UserError when a published recipe is started without data of the user.

    Such a recipe leaves `data.source` at its default, the embedded emoji, and has neither templates for these nor
    tasks of evaluation. `--config.data=emoji` trains it on emoji all the same.

    Args:
      spec: `FILE[:VARIANT]` of the command line.
      config: the configuration with its overrides.
      overrides: `["optim.lr=3e-4", ...]`.
    """
    keys = {text.partition("=")[0] for text in overrides}
    is_default = config.data.source == config_lib.base().data.source and not keys & {"data", "data.source"}
    if not is_default or ".json" in spec:
        return
    own = config_lib.load(spec, [])  # an override may have emptied both fields
    if not own.data.templates and not own.eval.tasks:
        raise UserError(f"{spec} is a published recipe without data: give the data: --config.data=/data/pairs/*.tar")


def make_parts(config, workdir=None, log=lambda line: None):
    """Returns `(config, source, tokenizer, method)`, all checked, without touching a device. Raises UserError.

    Args:
      config: the configuration.
      workdir: the work folder; a run in it keeps the fields of a variant `small` that it found in the data.
      log: takes the line about these fields.
    """
    from clip_jax import evaluate, small
    from clip_jax.data.loader import check_source
    from clip_jax.data.sources import configured_source
    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.methods import interface

    config, problems = small.fitted(from_weights.take(config), workdir, log), Problems()
    problems.check(config_lib.validate, config)
    problems.check(profile.check, config)
    problems.check(evaluate.check_tasks, config)
    tokenizer = problems.check(make_tokenizer, config.tokenizer)
    data, source = config.data, problems.check(configured_source, config.data)
    problems.end()  # what follows needs all of it
    config = interface.resolve(config, tokenizer, source)
    method = interface.make_method(config)
    one_source = data.sampling == "one_source"
    check_source(source, method.views, tokenizer, data.batch_size, one_source, configured_reading(data))
    return config, source, tokenizer, method


@contextlib.contextmanager
def nothing_left(workdir):
    """Removes a local work folder that did not exist before when wrong input ends the run before its first checkpoint.

    Several processes share their work folder, so that they leave it.
    """
    is_new = not storage.is_remote(workdir) and not os.path.exists(workdir)
    top = next((p for p in [Path(workdir), *Path(workdir).parents][::-1] if not p.exists()), None) if is_new else None
    try:
        yield
    except UserError:
        files = [Path(workdir) / name for name in (lock.FILE, "metrics.jsonl")]
        has_begun = any(file.exists() and file.stat().st_size for file in files)
        has_begun = has_begun or any((Path(workdir) / "checkpoints").glob("[0-9]*"))
        if top and not has_begun and not faults.several_processes():
            shutil.rmtree(workdir, ignore_errors=True)
            while top != Path(workdir) and top.exists() and not any(Path(workdir).parent.iterdir()):
                workdir = Path(workdir).parent
                workdir.rmdir()
        raise


def check_room(program, workdir, is_new):
    """Checks by shapes, before anything is allocated or compiled, that a run has the disk and the memory it needs.

    Args:
      program: a `clip_jax.program.Program` of shapes with shardings.
      workdir: the work folder; only a local one has a known free space.
      is_new: whether the run starts, so that it writes two checkpoints; a resumed one has the first.

    Raises UserError with what is needed, what there is, and for memory what would fit.
    """
    _check_disk(program.state, workdir, 2 if is_new else 1)
    limit, owner = device_memory()
    _, fixed = _sizes(program)
    if limit is None or not is_new or fixed + _MOST_KEPT * _batch_bytes(program) < limit:
        return
    kept = kept_bytes(program)
    if fixed + _LEAST_KEPT * kept > limit:
        raise UserError(_does_not_fit(program, fixed + _KEPT * kept, limit, owner, kept))


def check_step(program, size):
    """Raises UserError when a compiled step needs more memory than a device has, with what would fit.

    Args:
      program: the `clip_jax.program.Program`; its state is in memory already.
      size: bytes of the step on one device, or None when the compiler does not report them.
    """
    state, _ = _sizes(program)
    limit, owner = device_memory(held=state)
    if size and limit is not None and size > limit:
        raise UserError(_does_not_fit(program, size, limit, owner))


def device_memory(held=0):
    """Returns `(bytes, owner)`: the memory for one device of this host, None when unknown, and whose it is.

    Args:
      held: bytes on each device that this run has allocated already; they count as free on a CPU.
    """
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free = free_memory()
        return (None if free is None else free / len(devices) + held), "this machine has free"
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return limit, f"a {devices[0].device_kind} has for JAX"


def free_memory(root="/"):
    """Returns the bytes of memory that a process may still take: of the machine and of its control group, or None.

    Args:
      root: folder of `proc` and `sys`.
    """

    def number(path):
        try:
            with open(os.path.join(root, path)) as file:
                return int(file.read())
        except (OSError, ValueError):
            return None  # no such file, or "max"

    free = []
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            free += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except OSError:
        pass
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        values = number(f"{folder}/{limit}"), number(f"{folder}/{used}")
        if None not in values:
            free.append(values[0] - values[1] + _file_cache(os.path.join(root, folder, "memory.stat")))
    return max(0, min(free)) if free else None


def _file_cache(path):
    """The bytes of cached files in a control group, which give way to a process."""
    try:
        with open(path) as file:
            return sum(int(line.split()[1]) for line in file if line.split()[0] in ("inactive_file", "active_file"))
    except (OSError, ValueError, IndexError):
        return 0


def _check_disk(state, workdir, checkpoints):
    if not isinstance(workdir, os.PathLike) or "://" in str(workdir) or not os.path.isdir(workdir):
        return
    import jax

    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state) if hasattr(x.dtype, "itemsize"))
    free = shutil.disk_usage(workdir).free
    if checkpoints * size > free:
        raise UserError(
            f"--workdir={workdir}: {checkpoints} checkpoint{'s' * (checkpoints > 1)} of {_gib(size)} each need "
            f"{_gib(checkpoints * size)} of disk, {_gib(free)} are free"
        )


def _sizes(program):
    """Returns bytes on one device: `(the state, all that every variant of the step needs)`."""
    from clip_jax.program import shard_bytes

    state = shard_bytes(program.state)
    return state, state + shard_bytes(program.state.params) + _batch_bytes(program)


def _batch_bytes(program):
    from clip_jax.program import shard_bytes

    return shard_bytes(program.batch)


def kept_bytes(program, remat=None):
    """Returns the bytes of activations on one device that the backward pass of the towers keeps, as it is written.

    Nothing is compiled: these are the values that `jax.vjp` carries to the backward pass.

    Args:
      program: a `clip_jax.program.Program`.
      remat: another value of `model.remat`; None: the program's.
    """
    import jax

    from clip_jax.methods import interface
    from clip_jax.training.step import make_init, state_shapes

    config = program.config.copy_and_resolve_references()
    model, remat = config.model, remat or config.model.remat
    # In a loop one block is traced instead of all. "all" makes it store what it would store without a loop.
    model.update(remat="all" if remat == "none" and not model.scan else remat, scan=True)
    method = interface.make_method(config.lock())
    shapes = state_shapes(make_init(config, method, program.batch)[0])

    def pullback(params, extra, batch):
        rng = jax.random.key(0)
        batch = method.prepare(batch, rng)
        return jax.vjp(lambda params: method.encode(params, extra, batch, rng, train=True)[0], params)[1]

    # A dimension is one of examples when it is a multiple of this prime, which no usual width or depth is.
    prime, group = 41, config.model.get("image", {}).get("bn_group") or 1
    batch = {k: jax.ShapeDtypeStruct((prime * group, *x.shape[1:]), x.dtype) for k, x in program.batch.items()}
    kept = jax.tree.leaves(jax.eval_shape(pullback, shapes.params, shapes.extra, batch))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in kept if any(n and n % prime == 0 for n in x.shape))
    return size / (prime * group) * _rows(program) / config.micro_batches


def _rows(program):
    """The examples of a batch on one device."""
    first = next(iter(program.batch.values()))
    return first.sharding.shard_shape(first.shape)[0]


def _does_not_fit(program, size, limit, owner, kept=None):
    """Returns the message about a step of `size` bytes on a device with `limit`; it names variants that would fit.

    `kept` is `kept_bytes(program)` when the size is an estimate by it.
    """
    needs = f"memory: a step needs {'about ' if kept else ''}{_gib(size)}, {owner} {_gib(limit)}"
    found = fitting(program, size, limit, kept)
    if not found:
        return f"{needs}; neither micro_batches, model.remat nor data.batch_size is enough: take a smaller model"
    listed = ", ".join(f"{flags} ({_gib(need)})" for flags, need in found)
    return f"{needs}; by estimate these fit: {listed}"


def fitting(program, size, limit, kept=None):
    """Returns variants of a step that would fit by estimate, `[(flags, bytes)]`, each the smallest change of its kind.

    Args:
      program: a `clip_jax.program.Program` with shardings.
      size: bytes of its step on one device.
      limit: bytes of memory of a device.
      kept: `kept_bytes(program)` where it is known.
    """
    _, fixed = _sizes(program)
    config, usable = program.config, _USABLE * limit
    rows = _rows(program)
    others = ["full"] * (config.model.remat != "full")
    shares = {config.model.remat: 1.0}
    if others and size > fixed:
        shares["full"] = kept_bytes(program, "full") / (kept or kept_bytes(program))
    parts = [2**n * config.micro_batches for n in range(20) if rows % (2**n * config.micro_batches) == 0]

    def need(remat, count):
        return fixed + (size - fixed) * shares[remat] * config.micro_batches / count

    def first(remats, counts):
        for remat, count in ((remat, count) for count in counts for remat in remats):
            if need(remat, count) <= usable:
                flags = [f"--config.micro_batches={count}"] * (count != config.micro_batches)
                flags += [f"--config.model.remat={remat}"] * (remat != config.model.remat)
                return [(" ".join(flags), need(remat, count))]
        return []

    found = first([config.model.remat], parts[1:]) + first(others, parts[:1])
    found = found or first(others, parts[1:])
    own = size - fixed + _batch_bytes(program)  # what shrinks with the batch
    batches = [(n, size - own + own / 2**n) for n in range(1, 20) if rows % 2**n == 0 and rows >> n >= 2]
    smaller = [(config.data.batch_size >> n, bytes_) for n, bytes_ in batches if bytes_ <= usable]
    return found + [(f"--config.data.batch_size={batch}", bytes_) for batch, bytes_ in smaller[:1]]


def _gib(size):
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.1f} GiB"
