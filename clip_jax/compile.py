"""What a run needs, without the machine: `python -m clip_jax.compile --config=configs/clip.py:b16 --topology=v5e:16x16`.

For a TPU slice the real train step is compiled by the TPU's own compiler (package libtpu, extra `tpu`; no TPU is needed),
which tells whether it fits and what it does. For GPUs (`gpu:h100x8`) only what follows from shapes is told. docs/scaling.md
explains the figures. Exit status: 0 it fits, 1 it does not, 2 wrong input.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, NamedTuple

from clip_jax import config as config_lib
from clip_jax.errors import UserError
from clip_jax.runtime import command, hardware

GIB = 2**30
#: Share of the memory that a step may take: the next batch and the runtime need some as well.
USABLE = 0.9


class Topology(NamedTuple):
    """`count` chips in all; `shape` is how each of the TPU `slices` is wired, None for GPUs."""

    name: str
    chip: hardware.Chip
    count: int
    shape: str | None
    slices: int = 1


def parse_topology(name):
    """The `Topology` of `"v5e:16x16"`, `"v5e:16x16*2"` (two slices) or `"gpu:h100x8"`; raises UserError."""
    generation, _, shape = name.partition(":")
    if generation == "gpu":
        match = re.fullmatch(r"(\w+)x([1-9]\d*)", shape)
        if not match:
            raise UserError(f"--topology={name}: write a GPU and how many there are, such as gpu:h100x8")
        if match[1] not in hardware.GPUS:
            raise config_lib.unknown(f"--topology={name}: GPU", match[1], hardware.GPUS)
        return Topology(name, hardware.GPUS[match[1]], int(match[2]), None)
    if generation not in hardware.TPUS:
        raise config_lib.unknown(f"--topology={name}: accelerator", generation, [*hardware.TPUS, "gpu"])
    chip = hardware.TPUS[generation]
    match = re.fullmatch(rf"([1-9]\d*(?:x[1-9]\d*){{{chip.torus - 1}}})(?:\*([1-9]\d*))?", shape)
    if not match:
        example = "x".join("4" * chip.torus)
        raise UserError(
            f"--topology={name}: write the chips in each of the {chip.torus} directions, such as {generation}:{example}"
        )
    slices = int(match[2] or 1)
    return Topology(name, chip, slices * math.prod(map(int, match[1].split("x"))), match[1], slices)


def tpu_devices(topology):
    """The devices of TPU slices as the compiler knows them; raises UserError without libtpu, or when there is no such slice."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology.name} needs the TPU compiler: pip install 'clip-jax-pretraining[tpu]'")
    quiet = dict(
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
    )
    # Several processes may compile at once, and none of them asks whether this is a machine with a TPU.
    for key, value in dict(
        quiet, TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled"
    ).items():
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    # Both cores of a v4 chip as one device, as on Cloud TPU.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4:") else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name.partition("*")[0], **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from None


class Program(NamedTuple):
    """A configuration as shapes. `state` and `batch` are trees of `jax.ShapeDtypeStruct`."""

    config: Any
    method: Any
    tx: Any
    state: Any
    batch: Any


def make_program(config):
    """The `Program` of a configuration; needs no data and no device. Raises UserError."""
    import jax

    from clip_jax.data.tokenizers import make_tokenizer
    from clip_jax.methods import interface
    from clip_jax.training.step import make_init

    config_lib.validate(config)
    config = interface.resolve(config, make_tokenizer(config.tokenizer))
    method, size = interface.make_method(config), config.data.batch_size
    batch = method.batch_spec(size)
    init, tx = make_init(config, method, batch)
    return Program(config, method, tx, jax.eval_shape(lambda: init(jax.random.key(config.seed))), batch)


def model_flops(config):
    """FLOPs of a step's matrix products, forward and backward, over the whole batch, with nothing computed twice to save memory."""
    import jax

    from clip_jax.hlo_cost import jaxpr_flops
    from clip_jax.training.step import make_step

    plain = config.copy_and_resolve_references()
    plain.micro_batches, plain.model.remat = 1, "none"
    program = make_program(plain)
    return jaxpr_flops(
        jax.make_jaxpr(make_step(program.config, program.method, program.tx))(program.state, program.batch)
    )


def shard(program, mesh):
    """`(state, batch)` laid out over a mesh, and the bytes that each takes on one device."""
    import jax

    from clip_jax.runtime import sharding

    sharding.check_batch(program.config.data.batch_size, mesh, micro_batches=program.config.micro_batches)
    layouts = (
        sharding.state_shardings(program.state, mesh, program.method.sharding_rules),
        jax.tree.map(lambda _: sharding.batch_sharding(mesh), program.batch),
    )
    with_layout = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (program.state, program.batch), layouts
    )
    sizes = (
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in with_layout
    )
    return *with_layout, *sizes


class DoesNotFit(Exception):
    """A line about it, and the bytes of temporaries that are wanted on a device, or None where they are not known."""

    def __init__(self, line, temporary=None):
        super().__init__(line)
        self.temporary = temporary

    @classmethod
    def of_compiler(cls, message):
        """With the compiler's own line."""
        size = re.search(r"\(([\d.]+)([KMGTP]?)\) exceeds", message)
        temporary = float(size[1]) * 1024 ** " KMGTP".index(size[2] or " ") if size else None
        return cls(message.partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0], temporary)


def compile_for_tpu(program, devices):
    """What the compiler says about a step on these devices, a dict with bytes, FLOPs and collectives for one of them; raises DoesNotFit."""
    import jax

    from clip_jax.hlo_cost import hlo_cost
    from clip_jax.runtime import sharding
    from clip_jax.training.step import make_step

    mesh = sharding.make_mesh(program.config.mesh, devices)
    state, batch, state_bytes, batch_bytes = shard(program, mesh)
    step = make_step(program.config, program.method, program.tx)
    step = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DoesNotFit.of_compiler(str(error)) from None
        line = str(error).splitlines()[0]
        raise UserError(
            f"the TPU compiler failed; is it the libtpu that extra 'tpu' wants for this jax? {line}"
        ) from None
    memory, cost = compiled.memory_analysis(), hlo_cost(compiled.as_text())
    fields = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {field: getattr(memory, f"{field}_size_in_bytes") for field in fields}
    return dict(
        mesh=dict(mesh.shape),
        compile_seconds=time.perf_counter() - start,
        memory=dict(sizes, total=sum(sizes.values()) - 2 * sizes["alias"], state=state_bytes, batch=batch_bytes),
        flops=cost.flops,
        traffic=cost.traffic,
        sent=cost.sent,
        between_slices=cost.between_slices,
        unknown_loops=cost.unknown_loops,
        collectives=[dict(key._asdict(), count=count) for key, count in cost.collectives.most_common()],
    )


def estimate(topology, config, result, flops):
    """Seconds of a step by part and as a whole, and what follows from them: a dict; `flops` are the model's, on all chips.

    `at_best` is the longest of the parts, as if all overlapped and each ran at its peak; `one_by_one` their sum.
    """
    chip = topology.chip
    parts = {
        "compute": result["flops"] * chip.devices / chip.flops,
        "memory": result["traffic"] * chip.devices / chip.hbm_bandwidth,
        "links": result["sent"] * chip.devices / chip.link_bandwidth,
    }
    times = {"at_best": max(parts.values()), "one_by_one": sum(parts.values())}
    return {"parts": parts} | {name: schedule(topology, config, seconds, flops) for name, seconds in times.items()}


def schedule(topology, config, seconds, flops):
    """What a time per step means for the whole run."""
    hours = config.train.steps * seconds / 3600
    return dict(
        seconds=seconds,
        mfu=flops / (seconds * topology.chip.flops * topology.count),
        examples_per_second=config.data.batch_size / seconds,
        hours=hours,
        chip_hours=hours * topology.count,
    )


def estimate_gpu(topology, program, flops):
    """What shapes alone tell about a run on GPUs, a dict as of `compile_for_tpu` and `estimate`, for one of them.

    Activations are not in it: how much of them is kept is known only to the GPU's compiler. Of memory traffic and exchange it
    has what every step needs: the state read and written once, the gradients summed in one ring.
    """
    import jax
    from jax.sharding import AbstractMesh

    from clip_jax.hlo_cost import jaxpr_flops
    from clip_jax.runtime import sharding
    from clip_jax.training.step import make_step

    config, chip = program.config, topology.chip
    mesh = AbstractMesh(sharding.mesh_shape(config.mesh, topology.count), sharding.AXES)
    state, _, state_bytes, batch_bytes = shard(program, mesh)
    gradients = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state.params)
    )
    executed = (
        jaxpr_flops(jax.make_jaxpr(make_step(config, program.method, program.tx))(program.state, program.batch))
        / topology.count
    )
    replicas = topology.count // mesh.shape["tensor"]
    sent = 2 * (replicas - 1) / replicas * gradients * mesh.shape["fsdp"]
    parts = {
        "compute": executed / chip.flops,
        "memory": 2 * state_bytes / chip.hbm_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    times = {"at_best": max(parts.values()), "at_40_percent": executed / (0.4 * chip.flops)}
    return dict(
        mesh=dict(mesh.shape),
        memory=dict(
            state=state_bytes, gradients=gradients, batch=batch_bytes, total=state_bytes + gradients + batch_bytes
        ),
        flops=executed,
        traffic=2 * state_bytes,
        sent=sent,
        estimate={"parts": parts}
        | {name: schedule(topology, config, seconds, flops) for name, seconds in times.items()},
    )


def variants(config, topology, state_bytes, temporary):
    """What makes a step smaller, the cheapest first: `[(overrides, what it does)]`. `temporary`: of `DoesNotFit`."""
    usable = USABLE * topology.chip.device_hbm
    shards = math.gcd(topology.count, 16)
    found = []
    if config.mesh.fsdp == 1 and shards > 1 and state_bytes > usable / 8:
        sizes = f"{gib(state_bytes)} -> {gib(state_bytes / shards)}"
        found.append(([f"mesh.fsdp={shards}"], f"parameters and optimizer state {sizes}, gathered where they are used"))
    if config.model.scan:
        found.append(
            (["model.scan=false"], "less is kept of blocks that the compiler sees one by one; compiles for longer")
        )
    if config.model.remat == "none":
        found.append((["model.remat=dots"], "keeps only the results of matrix products; little more compute"))
    if config.model.remat != "full":
        found.append((["model.remat=full"], "keeps only the inputs of blocks; a third more compute"))
    per_device = config.data.batch_size * max(1, config.mesh.tensor) // (topology.count * topology.chip.devices)
    parts = [k for k in (2**n * config.micro_batches for n in range(1, 20)) if per_device % k == 0]
    enough = [k for k in parts if temporary and state_bytes + temporary * config.micro_batches / k <= usable]
    for k in enough[:1] or parts[-1:]:
        found.append(
            ([f"micro_batches={k}"], f"activations of {per_device // k} examples at a time; a third more compute")
        )
        if config.model.remat != "full":
            found.append(([f"micro_batches={k}", "model.remat=full"], "both; two thirds more compute"))
    return found


def search(args, topology, devices, tries, log):
    """Compiles the configuration with each of some overrides until one fits; says the result of each."""
    for overrides, _ in tries:
        flags = " ".join(f"--config.{o}" for o in overrides)
        try:
            result = compile_for_tpu(make_program(config_lib.load(args.config, [*args.overrides, *overrides])), devices)
        except DoesNotFit as error:
            log(f"  {flags}: {error}")
            continue
        total, hbm = result["memory"]["total"], topology.chip.device_hbm
        log(f"  {flags}: {gib(total)} of {gib(hbm)} ({total / hbm:.0%})")
        if total <= USABLE * hbm:
            return dict(result, overrides=overrides)
    return None


def gib(size):
    return f"{size / GIB:.2f} GiB"


def describe(topology, config, result, flops):
    """The lines that a user reads about a result of `compile_for_tpu` or `estimate_gpu`."""
    chip, memory = topology.chip, result["memory"]
    hbm = chip.device_hbm
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    per = "chip" if chip.devices == 1 else f"device, {chip.devices} of which are a chip"
    yield f"{topology.name}: {topology.count} chips, mesh {mesh}, batch {config.data.batch_size:,}; figures are per {per}"
    if topology.shape:
        yield f"compiled in {result['compile_seconds']:.0f} s"
        yield (
            f"memory: arguments {gib(memory['argument'])} (state {gib(memory['state'])}, batch {gib(memory['batch'])})"
            f" + outputs {gib(memory['output'])} - reused {gib(memory['alias'])} + temporary {gib(memory['temp'])}"
            f" + program {gib(memory['generated_code'])}"
        )
        yield f"  = {gib(memory['total'])} of {gib(hbm)} HBM ({memory['total'] / hbm:.1%}): it fits"
        if memory["total"] > USABLE * hbm:
            yield f"  that is more than {USABLE:.0%}: the next batch and the runtime may not find room"
    else:
        yield (
            f"memory: state {gib(memory['state'])} + gradients {gib(memory['gradients'])} + batch {gib(memory['batch'])}"
            f" = {gib(memory['total'])} of {gib(hbm)} ({memory['total'] / hbm:.1%})"
        )
        yield "  activations come on top and are not estimated: only the GPU's compiler knows how much of them is kept"
    per_example = flops / config.data.batch_size / 1e9
    yield (
        f"matrix products: {result['flops'] / 1e12:.2f} TFLOP, of which the model's own {flops / topology.count / chip.devices / 1e12:.2f}"
        f" ({per_example:.1f} GFLOP per example, forward and backward, nothing computed twice)"
    )
    yield f"memory traffic: {result['traffic'] / 1e9:.1f} GB{'' if topology.shape else ', only the state read and written once'}"
    yield f"sent to other chips: {result['sent'] / 1e9:.2f} GB" + (
        "" if topology.shape else ", the gradients summed in one ring"
    )
    yield from collective_table(result.get("collectives", []))
    if topology.slices > 1:
        yield f"sent to other slices: {result['between_slices'] / 1e9:.2f} GB, over a network that is in none of the times below"
    if result.get("unknown_loops"):
        yield f"  {result['unknown_loops']} loop(s) of unknown length were counted as one round: FLOPs, traffic and collectives are too low"
    parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in result["estimate"]["parts"].items())
    yield f"step time by part, each at its peak: {parts}"
    labels = {
        "at_best": "all parts overlapped",
        "one_by_one": "one after the other",
        "at_40_percent": "at 40 % of the peak FLOP/s",
    }
    for name, label in labels.items():
        if times := result["estimate"].get(name):
            yield (
                f"  {label}: {1e3 * times['seconds']:.1f} ms, MFU {times['mfu']:.0%}, {times['examples_per_second']:,.0f} examples/s;"
                f" {config.train.steps:,} steps {times['hours']:,.1f} h, {times['chip_hours']:,.0f} chip-hours"
            )
    yield (
        f"  taking a chip's {chip.flops / 1e12:.0f} TFLOP/s (bf16), {chip.hbm_bandwidth / 1e9:,.0f} GB/s of memory and"
        f" {chip.link_bandwidth / 1e9:.0f} GB/s sent over all its links, in rings; other arithmetic, latency and the input pipeline"
        + (" are not counted" if topology.shape else ", and a network between servers, are not counted")
    )


def collective_table(collectives):
    """Lines with the collectives by kind, and the largest of them."""
    kinds = {}
    for c in collectives:
        count, sent = kinds.get(c["kind"], (0, 0.0))
        kinds[c["kind"]] = count + c["count"], sent + c["count"] * c["sent"]
    for kind, (count, sent) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        yield f"  {kind:<20}{count:>7,} x {sent / 1e6:>12,.2f} MB in all"
    for c in sorted(collectives, key=lambda c: -c["count"] * c["sent"])[:5]:
        shape = c["shape"] if len(c["shape"]) < 60 else c["shape"][:57] + "..."
        yield f"    {c['count']} x {c['kind']} of {shape} among {c['group']}: {c['sent'] / 1e6:,.2f} MB each; {c['name']}"


def parse_args(argv):
    """The command line; raises UserError."""
    parser = command.make_parser("clip_jax.compile", __doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a configuration, e.g. configs/clip.py:b16"
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="a TPU slice, e.g. v5e:16x16 (v3 v4 v5e v5p v6e tpu7x), several, v5e:16x16*2, or gpu:h100x8",
    )
    parser.add_argument("--search", action="store_true", help="when it does not fit: compile variants until one does")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    args, rest = parser.parse_known_args(argv)
    args.overrides = config_lib.parse_overrides(rest)
    return args


def run(args, log=print):
    """Compiles or estimates; returns the figures, a dict with `fits`. Raises UserError."""
    topology = parse_topology(args.topology)
    config = config_lib.load(args.config, args.overrides)
    devices = tpu_devices(topology) if topology.shape else None
    program, flops = make_program(config), model_flops(config)
    about = dict(
        config=args.config, overrides=args.overrides, topology=args.topology, chips=topology.count, model_flops=flops
    )
    if not topology.shape:
        result = estimate_gpu(topology, program, flops)
        result["fits"] = result["memory"]["total"] <= topology.chip.device_hbm
    else:
        log(f"compiling for {topology.count} chips, which takes minutes for a large model ...")
        try:
            result = compile_for_tpu(program, devices)
            memory, hbm = result["memory"], topology.chip.device_hbm
            if memory["total"] > hbm:  # it only refuses temporaries that are too large by themselves
                line = f"the compiler accepts it, but its figures add up to {gib(memory['total'])} of {gib(hbm)}"
                raise DoesNotFit(line, memory["temp"])
        except DoesNotFit as error:
            return dict(
                about, fits=False, compiler=str(error), found=advise(args, topology, program, error, devices, log)
            )
        result = dict(result, fits=True, estimate=estimate(topology, config, result, flops))
    for line in describe(topology, config, result, flops):
        log(line)
    return about | result


def advise(args, topology, program, error, devices, log):
    """Says what would make a step fit; with `--search` the figures of the first that does, else None."""
    from clip_jax.runtime import sharding

    *_, state_bytes, _ = shard(program, sharding.make_mesh(program.config.mesh, devices))
    log(f"it does not fit: {error}")
    tries = variants(program.config, topology, state_bytes, error.temporary)
    log(f"parameters and optimizer state take {gib(state_bytes)} of it; smaller, the cheapest first:")
    if args.search:
        return search(args, topology, devices, tries, log)
    for overrides, effect in tries:
        log(f"  {' '.join(f'--config.{o}' for o in overrides)}: {effect}")
    log("  --search compiles them one after the other until one fits")
    return None


def main(argv=None):
    """The command; returns the exit status: 0 when it fits, 1 when it does not, 2 after a one-line error."""
    # Not even a machine that has accelerators needs them for this; and programs for devices that are not there cannot be cached.
    os.environ.update(JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    fits = []

    def work():
        args = parse_args(argv)
        result = run(args, log=lambda line: print(line, flush=True))
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1))
        fits.append(result["fits"])

    return command.run(work) or int(not fits[0])


if __name__ == "__main__":
    sys.exit(main())
