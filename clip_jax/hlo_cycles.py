"""The time of a compiled TPU program by the TPU compiler's own estimate, one row per instruction.

The compiler attaches `estimated_cycles` to most instructions of the optimized HLO text. A loop counts as often as it
runs, a conditional as its most expensive branch. What has no estimate counts by bytes: exchanges over the links between
chips, copies and a few other instructions at the memory's bandwidth. Instructions stand in the order in which they run,
so that the wait for asynchronous exchanges and copies follows from what runs in between. Nothing here is a measurement.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

from clip_jax.hlo_cost import COLLECTIVES, NO_TRAFFIC, HloModule

#: The parts of a step, with the names of modules and scopes that belong to each. The innermost name decides.
PARTS = {
    "attention": r"attn|attend|pool",
    "MLP": r"mlp|fc\d*",
    "norms": r"ln\w*|bn\d*|\w*_(?:bn|norm)",
    "convolutions": r"conv\w*|layer_\d+_\d+|mbconv_\w+",
    "embedding": r"patch|stem|embed|pos_embed",
    "projection": r"proj\w*|head\w*",
    "loss": r"loss",
    "optimizer": r"optimizer",
}
COPIES, LINKS = "copies", "collectives"
OTHER = "other"
#: Instructions that move data and compute nothing.
_MOVES = NO_TRAFFIC | {"copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "pad"}
_MOVES |= {"concatenate", "broadcast", "copy-start", "copy-done", "slice-start", "slice-done"}
#: Custom calls that take no time.
_FREE = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
#: The target of the custom calls that run Pallas kernels.
KERNEL = "tpu_custom_call"
#: What moves the data of asynchronous exchanges and copies, and the rate of `Peaks` at which it does.
_ENGINES = {LINKS: "links", COPIES: "memory"}


class Row(NamedTuple):
    """An instruction that takes time.

    Attributes:
      name, op: its name and its operation in HLO; of a custom call the target.
      source: the operation of the source program, with its path of modules, or "".
      part: a key of `PARTS`, or one of `COPIES`, `LINKS`, `OTHER`.
      basis: where the figure comes from. "compiler": the compiler's estimate. "kernel": the compiler's estimate of a
        Pallas kernel compiled alone, or the time of its bytes where that is longer. "stated": the cost that a Pallas
        kernel states, at the chip's peaks. "memory", "links": bytes over the bandwidth. "none": no figure is known, and
        the row counts as nothing.
      cycles: of one run; for asynchronous exchanges and copies only the wait for their end.
      hidden: the cycles of one asynchronous exchange or copy during which other instructions run.
      times: how often it runs in a step.
    """

    name: str
    op: str
    source: str
    part: str
    basis: str
    cycles: float
    hidden: float = 0.0
    times: int = 1

    @property
    def total(self):
        """The cycles of all runs."""
        return self.times * self.cycles

    @property
    def backward(self):
        """Whether the row belongs to a gradient."""
        return "transpose(" in self.source


class StepCycles(NamedTuple):
    """The estimated cycles of one run of a program on one device.

    Attributes:
      rows: a `Row` for each instruction that takes time.
      unknown_loops: the number of loops whose trip count the text does not give; their bodies count once.
    """

    rows: tuple[Row, ...]
    unknown_loops: int

    @property
    def cycles(self):
        """The cycles of the program."""
        return sum(row.total for row in self.rows)

    def by(self, field, backward=False):
        """The cycles for each value of a field of `Row`, the largest first, `{value: cycles}`.

        With `backward` only those of gradients count.
        """
        sums = Counter()
        for row in self.rows:
            sums[getattr(row, field)] += row.total if row.backward or not backward else 0.0
        return dict(sums.most_common())

    def merged(self):
        """One `Row` for the same operation in all blocks, with the means over its runs; the dearest comes first.

        The name is that of one of the instructions; numbers of blocks in the source become `*`.
        """
        groups = {}
        for row in self.rows:
            source = re.sub(r"(?<=_)\d+", "*", row.source)
            groups.setdefault((row.op, source, row.part, row.basis), []).append(row)
        merged = []
        for (_, source, _, _), rows in groups.items():
            times = sum(row.times for row in rows)
            cycles, hidden = (sum(r.times * getattr(r, f) for r in rows) / (times or 1) for f in ("cycles", "hidden"))
            merged.append(rows[0]._replace(source=source, cycles=cycles, hidden=hidden, times=times))
        return sorted(merged, key=lambda row: -row.total)


class Peaks(NamedTuple):
    """What one device does in a cycle of its clock.

    Attributes:
      flops: FLOPs of matrix products.
      memory: bytes between the chip and its memory.
      links: bytes that it sends to other chips.
    """

    flops: float
    memory: float
    links: float


def peaks(chip):
    """Returns the `Peaks` of one device of a `clip_jax.runtime.hardware.Chip`, or None when its clock is unknown."""
    if chip.clock is None:
        return None
    rates = chip.flops, chip.hbm_bandwidth, chip.link_bandwidth
    return Peaks(*(rate / chip.devices / chip.clock for rate in rates))


def step_cycles(text, peaks=None, kernels=None):
    """Returns the `StepCycles` of a program.

    Args:
      text: its optimized HLO text, `compiled.as_text()`, made by the TPU compiler.
      peaks: the `Peaks` of the device. None leaves out what only bytes tell: exchanges, copies, stated costs.
      kernels: `{key of a kernel: cycles}`, see `kernels_of`. Other kernels count by the cost that they state.
    """
    walk = _Walk(HloModule(text), peaks, kernels or {})
    return StepCycles(tuple(walk.rows(walk.module.entry)), walk.unknown_loops)


def kernels_of(text):
    """Returns the Pallas kernels of a program, equal ones once.

    Returns:
      `{key: (instruction, shapes of its operands)}`; `step_cycles` takes the cycles of a kernel by its key.
    """
    return {
        _key(i, scope): (i, [scope[o].shape for o in i.operands])
        for scope in HloModule(text).computations.values()
        for i in scope.values()
        if _target(i) == KERNEL
    }


def part_of(source):
    """Returns the key of `PARTS` for the path of an operation, such as `"jit(step)/jvp(A)/attn/dot_general"`."""
    for component in reversed(source.split("/")[:-1]):
        for word in re.findall(r"[\w.]+", component):
            for part, pattern in PARTS.items():
                if re.fullmatch(pattern, word):
                    return part
    return OTHER


def _target(i):
    return i.attribute(r'custom_call_target="([^"]*)"') if i.op == "custom-call" else ""


def _key(i, scope):
    """What tells kernels apart: the program of the kernel and the shapes that it works on."""
    return " ".join([i.attribute(r'"body":"([^"]*)"'), i.shape, *(scope[o].shape for o in i.operands)])


class _Transfer(NamedTuple):
    instruction: Any
    engine: str  # LINKS or COPIES
    key: str  # under which its end finds it
    cycles: float


class _Walk:
    """Collects the rows of a program, one computation after the other."""

    def __init__(self, module, peaks, kernels):
        self.module, self.kernels = module, kernels
        self.peaks = peaks
        self.unknown_loops, self._rows = 0, {}

    def rows(self, name):
        """The rows of one run of a computation."""
        if name not in self._rows:
            self._rows[name] = self._walk(self.module.computations[name])
        return self._rows[name]

    def _walk(self, scope):
        rows, clock = [], 0.0
        free, flying = dict.fromkeys((LINKS, COPIES), 0.0), {}  # when each engine is free; what has not ended

        def add(i, part, basis, cycles, hidden=0.0):
            nonlocal clock
            clock += cycles
            rows.append(Row(i.name, _target(i) or i.op, i.source, part, basis, cycles, hidden))

        def end(key):
            transfer, at = flying.pop(key)
            wait = max(0.0, at - clock)
            basis = "none" if self.peaks is None else "links" if transfer.engine == LINKS else "memory"
            add(transfer.instruction, transfer.engine, basis, wait, max(0.0, transfer.cycles - wait))

        for i in (i for key, i in scope.items() if key is not None):
            for row in self._called(i, scope):
                clock += row.total
                rows.append(row)
            if (key := self._ends(i)) is not None:
                if key in flying:
                    end(key)
                continue
            if transfer := self._transfer(i, scope):
                # An engine makes one transfer after the other.
                free[transfer.engine] = max(clock, free[transfer.engine]) + transfer.cycles
                flying[transfer.key] = transfer, free[transfer.engine]
                if transfer.key == i.name and not i.op.endswith("-start"):
                    end(transfer.key)
            basis, cycles = self._own(i, scope, transfer)
            if basis:
                add(i, self._part(i), basis, cycles)
        for key in list(flying):
            end(key)
        return rows

    def _called(self, i, scope):
        """The rows of the computations that an instruction runs."""
        if i.op == "while":
            trips = self.module.trip_count(i, scope)
            self.unknown_loops += trips is None
            inner = [*self.rows(i.called("condition")), *self.rows(i.called("body"))]
            return [row._replace(times=row.times * (1 if trips is None else trips)) for row in inner]
        if i.op == "conditional":
            return max(map(self.rows, i.branches()), key=lambda rows: sum(row.total for row in rows))
        if i.op == "call" or i.op == "async-start" and not self._sent(i):
            return self.rows(i.called("to_apply|calls"))
        return []

    def _sent(self, i):
        """The bytes that the computation called by a fusion or an async-start sends to other chips."""
        return self.module.cost(i.called("calls"), True).sent

    def _marker(self, i):
        """ "Start" or "Done" for a fusion that starts or ends an exchange that other fusions continue, else ""."""
        targets = {_target(j) for j in self.module.computations[i.called("calls")].values()} if i.op == "fusion" else ()
        return next((end for end in ("Start", "Done") if f"AsyncCollective{end}" in targets), "")

    def _channel(self, i):
        """The channel of the exchange in a fusion, which its start and its end share."""
        body = self.module.computations[i.called("calls")].values()
        return next(j.attribute(r"\b(channel_id=\d+)") for j in body if j.op in COLLECTIVES)

    def _ends(self, i):
        """The key under which a transfer started that ends with an instruction, or None."""
        if i.op.endswith("-done"):
            return i.operands[0]
        return self._channel(i) if self._marker(i) == "Done" else None

    def _transfer(self, i, scope):
        """The `_Transfer` that an instruction starts or makes, or None."""
        kind, key = i.op.removesuffix("-start"), i.name
        engine = LINKS
        if i.op in ("copy-start", "slice-start"):
            engine, size = COPIES, self.module.traffic(i, scope)
        elif kind in COLLECTIVES:
            size = self.module.collective(i, scope, kind).sent
        elif i.op in ("fusion", "async-start") and (size := self._sent(i)):
            key = self._channel(i) if self._marker(i) else i.name
        else:
            return None
        return _Transfer(i, engine, key, size / getattr(self.peaks, _ENGINES[engine]) if self.peaks else 0.0)

    def _own(self, i, scope, transfer):
        """`(basis, cycles)` of an instruction itself; basis None when it takes no time."""
        if i.op in ("while", "conditional", "call", "async-start"):
            return None, 0.0
        if estimate := int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0):
            return "compiler", estimate
        if _target(i) == KERNEL:
            return self._kernel(i, scope)
        if i.op == "custom-call":
            return (None if _target(i) in _FREE else "none"), 0.0
        size = 0 if transfer else self.module.traffic(i, scope)
        if not size:
            return None, 0.0
        return ("memory", size / self.peaks.memory) if self.peaks else ("none", 0.0)

    def _kernel(self, i, scope):
        if (key := _key(i, scope)) in self.kernels:
            memory = self.module.traffic(i, scope) / self.peaks.memory if self.peaks else 0.0
            return "kernel", max(self.kernels[key], memory)
        stated = i.stated_cost()
        flops, size = (stated.get(name, 0) for name in ("flops", "bytes_accessed"))
        if not self.peaks or not (flops or size):
            return "none", 0.0
        return "stated", max(flops / self.peaks.flops, size / self.peaks.memory)

    def _part(self, i):
        ops, source = {i.op}, i.source
        if i.op == "fusion":
            body = self.module.computations[i.called("calls")]
            ops = {j.op for j in body.values()}
            source = source or next((j.source for j in reversed(body.values()) if j.source), "")
        return COPIES if ops <= _MOVES else part_of(source)
