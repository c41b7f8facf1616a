"""Time and memory of a training step on an absent machine, and the lines that report them.

The estimates are the TPU compiler's (`clip_jax.hlo_cycles`), and bounds: the cost of a step divided by the makers' peak
figures (`clip_jax.runtime.hardware`). They are not measurements.
"""

import math

from clip_jax import program as program_lib
from clip_jax.runtime import sharding

GIB = 2**30
#: The share of the memory that a step may take. The next batch and the runtime need the rest.
USABLE = 0.9
#: The share of a GPU's memory that JAX takes by default.
_JAX_TAKES = 0.75
#: How many operations are listed as the dearest.
_DEAREST = 12
#: What the report says of rows whose time is their bytes over a bandwidth (`clip_jax.hlo_cycles.Row.basis`).
_BY_BYTES = {
    "links": "exchanges between chips, by bytes over the links",
    "memory": "copies and operations without an estimate, by bytes",
}
#: What the report says of rows for which the compiler gives no estimate within the step.
_BASES = {
    "kernel": "kernel, by the compiler's estimate of it alone",
    "stated": "kernel, at least, by the cost that it states",
    "none": "not counted, no figure is known",
}


def gib(size):
    """The text of a number of bytes, such as `"1.50 GiB"`."""
    return f"{size / GIB:.2f} GiB"


def estimate(topology, config, result, flops):
    """Estimates the time of a compiled step.

    Args:
      topology: a `clip_jax.runtime.topology.Topology`.
      config: the configuration.
      result: a result of `clip_jax.compile.compile_for_tpu`.
      flops: the model's FLOPs of a step, on all chips.

    Returns:
      A dict: `compiler` is the `schedule` of the compiler's estimate, where the chip's clock is known. `parts` holds
      the seconds of compute, memory traffic and links, each at its peak. `at_best` and `one_by_one` are the `schedule`
      of their maximum, as if all of them overlapped, and of their sum.
    """
    chip = topology.chip
    parts = {
        "compute": result["flops"] * chip.devices / chip.flops,
        "memory": result["traffic"] * chip.devices / chip.hbm_bandwidth,
        "links": result["sent"] * chip.devices / chip.link_bandwidth,
    }
    times = {"at_best": max(parts.values()), "one_by_one": sum(parts.values())}
    if chip.clock:
        times = {"compiler": result["cycles"]["total"] / chip.clock} | times
    return {"parts": parts} | {name: schedule(topology, config, seconds, flops) for name, seconds in times.items()}


def schedule(topology, config, seconds, flops):
    """Returns what `seconds` per step mean for the whole run: MFU, examples per second, hours, chip-hours."""
    hours = config.train.steps * seconds / 3600
    return dict(
        seconds=seconds,
        mfu=flops / (seconds * topology.chip.flops * topology.count),
        examples_per_second=config.data.batch_size / seconds,
        hours=hours,
        chip_hours=hours * topology.count,
    )


def estimate_gpu(topology, program, flops):
    """Estimates a run on GPUs from shapes alone.

    Activations are missing: only XLA's compiler knows how many of them are kept. Memory traffic and exchange are
    those that every step needs: the state is read and written once, and the gradients are summed in one ring.

    Args:
      topology: a `clip_jax.runtime.topology.Topology`.
      program: a `clip_jax.program.Program` of shapes.
      flops: the model's FLOPs of a step, on all GPUs.

    Returns:
      A dict with the fields of `clip_jax.compile.compile_for_tpu` that are known, for one GPU, and `estimate`.
    """
    from jax.sharding import AbstractMesh

    config, chip = program.config, topology.chip
    mesh = AbstractMesh(sharding.mesh_shape(config.mesh, topology.count), sharding.AXES)
    sharded, state_bytes, batch_bytes = program_lib.shard(program, mesh)
    gradients = program_lib.shard_bytes(sharded.state.params)
    executed = program_lib.step_flops(program) / topology.count
    replicas = topology.count // mesh.shape["tensor"]
    sent = 2 * (replicas - 1) / replicas * program_lib.summed_bytes(sharded) * mesh.shape["fsdp"]
    parts = {
        "compute": executed / chip.flops,
        "memory": 2 * state_bytes / chip.hbm_bandwidth,
        "links": sent / chip.link_bandwidth,
    }
    times = {"at_best": max(parts.values()), "at_40_percent": executed / (0.4 * chip.flops)}
    schedules = {name: schedule(topology, config, seconds, flops) for name, seconds in times.items()}
    total = state_bytes + gradients + batch_bytes
    return dict(
        mesh=dict(mesh.shape),
        memory=dict(state=state_bytes, gradients=gradients, batch=batch_bytes, total=total),
        flops=executed,
        traffic=2 * state_bytes,
        sent=sent,
        estimate={"parts": parts} | schedules,
    )


def variants(config, topology, state_bytes, temporary):
    """Lists changes that make a step smaller, the cheapest first.

    Args:
      config: the configuration that does not fit.
      topology: a `clip_jax.runtime.topology.Topology`.
      state_bytes: the bytes of the state on one device.
      temporary: the bytes of temporaries that the step needs on one device, or None when unknown.

    Returns:
      `[(overrides, their effect in words)]`.
    """
    usable = USABLE * topology.chip.device_hbm
    devices = topology.count * topology.chip.devices
    shards = math.gcd(devices // max(1, config.mesh.tensor), 16)
    found = []
    if config.mesh.data == -1 and config.mesh.fsdp == 1 and shards > 1 and state_bytes > usable / 8:
        sizes = f"{gib(state_bytes)} -> {gib(state_bytes / shards)}"
        effect = f"parameters and optimizer state {sizes}, gathered where they are used"
        found.append(([f"mesh.fsdp={shards}"], effect))
    if config.model.scan:
        effect = "the compiler sees each block and keeps less of it; compiles for longer"
        found.append((["model.scan=false"], effect))
    if config.model.remat == "none":
        found.append((["model.remat=dots"], "keeps only the results of linear layers; little more compute"))
    if config.model.remat != "full":
        found.append((["model.remat=full"], "keeps only the inputs of blocks; a third more compute"))
    per_device = config.data.batch_size * max(1, config.mesh.tensor) // devices
    parts = [k for k in (2**n * config.micro_batches for n in range(1, 20)) if per_device % k == 0]
    enough = [k for k in parts if temporary and state_bytes + temporary * config.micro_batches / k <= usable]
    for k in enough[:1] or parts[-1:]:
        effect = f"activations of {per_device // k} examples at a time; a third more compute"
        found.append(([f"micro_batches={k}"], effect))
        if config.model.remat != "full":
            found.append(([f"micro_batches={k}", "model.remat=full"], "both; two thirds more compute"))
    return found


def describe(topology, config, result, flops):
    """Yields the lines that report a result of `clip_jax.compile.compile_for`, `estimate_gpu` or both to a user."""
    chip = topology.chip
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    per = "chip" if chip.devices == 1 else f"device; a chip is {chip.devices} devices"
    batch = f"batch {config.data.batch_size:,}"
    yield f"{topology.name}: {topology.count} chips, mesh {mesh}, {batch}; figures are per {per}"
    yield from _describe_memory(topology, result)
    own, per_example = flops / topology.count / chip.devices / 1e12, flops / config.data.batch_size / 1e9
    yield (
        f"matrix products: {result['flops'] / 1e12:.2f} TFLOP, of which the model's own {own:.2f}"
        f" ({per_example:.1f} GFLOP per example, forward and backward, nothing computed twice)"
    )
    only_state = "" if topology.shape else ", only the state read and written once"
    yield f"memory traffic: {result['traffic'] / 1e9:.1f} GB{only_state}"
    one_ring = "" if topology.shape else ", the gradients summed in one ring"
    yield f"sent to other chips: {result['sent'] / 1e9:.2f} GB{one_ring}"
    yield from _describe_collectives(result.get("collectives", []))
    if topology.slices > 1:
        yield f"sent to other slices: {result['between_slices'] / 1e9:.2f} GB; the times below leave this network out"
    if count := result.get("unknown_loops"):
        yield f"  {count} loop(s) of unknown length count as one round: FLOPs, traffic and collectives are too low"
    if cycles := result.get("cycles"):
        yield from _describe_cycles(topology, config, cycles, result["estimate"])
    yield from _describe_bounds(topology, config, result["estimate"])


def _describe_memory(topology, result):
    memory, hbm = result["memory"], topology.chip.device_hbm
    total = f"{gib(memory['total'])} of {gib(hbm)}"
    share = f"({memory['total'] / hbm:.1%})"
    if "temp" in memory:
        yield f"compiled in {result['compile_seconds']:.0f} s, with {len(result['options'])} options for this chip"
        yield (
            f"memory: arguments {gib(memory['argument'])} (state {gib(memory['state'])}, batch {gib(memory['batch'])})"
            f" + outputs {gib(memory['output'])} - reused {gib(memory['alias'])} + temporary {gib(memory['temp'])}"
            f" + program {gib(memory['generated_code'])}"
        )
        yield f"  = {total} HBM {share}: it fits"
        if memory["total"] > USABLE * hbm:
            yield f"  that is more than {USABLE:.0%}: the next batch and the runtime may lack memory"
        if not topology.shape and memory["total"] > _JAX_TAKES * hbm:
            yield f"  JAX takes {_JAX_TAKES:.0%} of a GPU: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for this step"
    else:
        parts = " + ".join(f"{part} {gib(memory[part])}" for part in ("state", "gradients", "batch"))
        yield f"memory: {parts} = {total} {share}"
        yield "  activations come on top and are not estimated: XLA's compiler would count them, which needs no GPU:"
        yield "  pip install 'clip-jax-pretraining[gpu]'"


def _describe_collectives(collectives):
    """Lines with the collectives by kind, and the five largest."""
    kinds = {}
    for c in collectives:
        count, sent = kinds.get(c["kind"], (0, 0.0))
        kinds[c["kind"]] = count + c["count"], sent + c["count"] * c["sent"]
    for kind, (count, sent) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        yield f"  {kind:<20}{count:>7,} x {sent / 1e6:>12,.2f} MB in all"
    for c in sorted(collectives, key=lambda c: -c["count"] * c["sent"])[:5]:
        shape = c["shape"] if len(c["shape"]) < 60 else c["shape"][:57] + "..."
        sent = f"{c['sent'] / 1e6:,.2f} MB each"
        yield f"    {c['count']} x {c['kind']} of {shape} among {c['group']}: {sent}; {c['name']}"


def _describe_cycles(topology, config, cycles, estimate):
    """Lines with the compiler's estimate: the whole, its parts, what it leaves out, and the dearest operations."""
    chip, rows = topology.chip, cycles["instructions"]
    unit, scale = ("ms", 1e-3 * chip.clock) if chip.clock else ("Mcycles", 1e6)
    yield f"step time by the compiler's estimate: {cycles['total'] / scale:.1f} {unit}"
    if times := estimate.get("compiler"):
        yield f"  {_run(times)}; {_hours(config, times)}"
        yield f"  at {chip.clock / 1e9:.2f} GHz, a clock that is inferred from the chip's peak FLOP/s"
    else:
        yield "  the clock of this chip is unknown, so exchanges and copies are not in it"
    yield f"  {'part':<14}{unit:>9}{'share':>8}{'backward':>10}"
    for part, count in cycles["parts"].items():
        share, backward = count / max(1, cycles["total"]), cycles["backward"][part]
        yield f"  {part:<14}{count / scale:>9.2f}{share:>8.1%}{backward / scale:>10.2f}"
    for basis, words in _BY_BYTES.items():
        found = [row for row in rows if row["basis"] == basis]
        waits, hidden = (sum(row["times"] * row[field] for row in found) / scale for field in ("cycles", "hidden"))
        if found:
            yield f"  {words}: {waits:.2f} {unit}, and {hidden:.2f} {unit} beside other work"
    for basis, words in _BASES.items():
        found = [row for row in rows if row["basis"] == basis]
        for row in found:
            each = "" if basis == "none" else f", {row['cycles'] / scale:.3f} {unit} each"
            yield f"  {words}: {row['times']} x {row['op']} {row['source'] or row['name']}{each}"
    yield f"  dearest operations, {unit} in all:"
    for row in rows[:_DEAREST]:
        name = row["source"] or row["name"]
        yield f"  {row['times'] * row['cycles'] / scale:>9.2f} {row['times']:>5} x {row['op']} {name}"


def _run(times):
    return f"MFU {times['mfu']:.0%}, {times['examples_per_second']:,.0f} examples/s"


def _hours(config, times):
    return f"{config.train.steps:,} steps {times['hours']:,.1f} h, {times['chip_hours']:,.0f} chip-hours"


def _describe_bounds(topology, config, estimate):
    chip = topology.chip
    parts = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in estimate["parts"].items())
    yield f"step time by part, each at its peak: {parts}"
    labels = {
        "at_best": "all parts overlapped",
        "one_by_one": "one after the other",
        "at_40_percent": "at 40 % of the peak FLOP/s",
    }
    for name, label in labels.items():
        if times := estimate.get(name):
            hours = "" if "compiler" in estimate else f"; {_hours(config, times)}"
            yield f"  {label}: {1e3 * times['seconds']:.1f} ms, {_run(times)}{hours}"
    yield (
        f"  assumed for a chip: {chip.flops / 1e12:.0f} TFLOP/s (bf16), {chip.hbm_bandwidth / 1e9:,.0f} GB/s of memory"
        f" and {chip.link_bandwidth / 1e9:.0f} GB/s sent over all its links, in rings; other arithmetic, latency and"
        " the input pipeline"
        + (" are not counted" if topology.shape else ", and a network between servers, are not counted")
    )
