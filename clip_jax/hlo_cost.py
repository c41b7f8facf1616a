"""The cost of a compiled program on one device: FLOPs of matrix products, memory traffic and collectives.

The figures come from the optimized HLO text, so they describe the compiled program. A loop counts as often as it runs;
the compiler's own `cost_analysis` counts its body once. `clip_jax.program.jaxpr_flops` counts a program as written.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

#: The collectives of HLO. Their asynchronous forms end in -start and -done.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
#: Instructions that only name data.
NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}
_SLICES = ("dynamic-slice", "slice", "gather")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_DIGITS = re.compile(r"[a-z]+(\d+)")


class Collective(NamedTuple):
    """One kind of exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      shape: the input on one device, such as `"f32[128,512]"`.
      group: the number of devices that exchange with each other.
      sent: the bytes that one device sends when the group forms a ring.
      name: the operation of the source program that the collective comes from.
    """

    kind: str
    shape: str
    group: int
    sent: float
    name: str


@dataclasses.dataclass
class Cost:
    """The cost of one run of a program on one device.

    Attributes:
      flops: FLOPs of matrix products and convolutions; a multiplication and an addition are two.
      traffic: bytes read from and written to the device's main memory.
      collectives: `{Collective: count}`, within a TPU slice.
      between_slices: bytes handed to the network between TPU slices.
      unknown_loops: the number of loops whose trip count the text does not give; their bodies count once.
    """

    flops: float = 0.0
    traffic: float = 0.0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    between_slices: float = 0.0
    unknown_loops: int = 0

    def add(self, other, times=1):
        """Adds another cost, `times` times."""
        self.flops += times * other.flops
        self.traffic += times * other.traffic
        for key, count in other.collectives.items():
            self.collectives[key] += times * count
        self.between_slices += times * other.between_slices
        self.unknown_loops += other.unknown_loops

    @property
    def sent(self):
        """Bytes that a device sends to other devices."""
        return sum(key.sent * count for key, count in self.collectives.items())


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str  # operands as written; the value of a constant, the number of a parameter
    attributes: str

    def called(self, keys):
        """The name of the computation in an attribute whose key matches the regular expression `keys`."""
        return re.search(rf"\b(?:{keys})=%?([\w.\-]+)", self.attributes)[1]

    @property
    def source(self):
        """The operation of the source program that the instruction comes from, with its path of modules, or ""."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern):
        """The text that the first group of the regular expression `pattern` finds in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def stated_cost(self):
        """What a Pallas kernel states, ints by name, such as "flops" and "bytes_accessed"; {} for all others."""
        written = self.attribute(r'"cost_estimate":\{([^}]*)\}')
        return {name: int(n) for name, n in re.findall(r'"(\w+)":"(\d+)"', written)}

    def branches(self):
        """The names of the computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", listed[1]) if listed else named


def hlo_cost(text):
    """Returns the `Cost` of a program from its optimized HLO text, `compiled.as_text()`."""
    module = HloModule(text)
    return module.cost(module.entry)


class HloModule:
    """The computations of a program.

    Attributes:
      computations: `{name: {name of an instruction: instruction}}`; the key None repeats the root instruction.
      entry: the name of the computation that the program starts with.
      devices: the number of devices that run the program.
    """

    def __init__(self, text):
        self.computations, self.entry = {}, None
        self._costs, current = {}, {}
        self.devices = math.prod(
            int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        )
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                instruction = current[match[2]] = _parse(match[2], line[match.end() :])
                if match[1]:
                    current[None] = instruction
            elif match := _COMPUTATION.match(line):
                current = self.computations[match[2]] = {}
                self.entry = match[2] if match[1] else self.entry

    def cost(self, name, fused=False):
        """The `Cost` of one computation.

        A fusion's operands and results are memory traffic, its inner arrays are not.
        """
        if (name, fused) not in self._costs:
            self._costs[name, fused] = self._cost(name, fused)
        return self._costs[name, fused]

    def _cost(self, name, fused):
        total, scope = Cost(), self.computations[name]
        for i in (i for key, i in scope.items() if key is not None):
            kind = i.op.removesuffix("-start")
            if i.op == "while":
                trips = self.trip_count(i, scope)
                total.add(self.cost(i.called("body")), 1 if trips is None else trips)
                total.unknown_loops += trips is None
            elif i.op == "conditional":
                costs = [self.cost(branch) for branch in i.branches()]
                total.add(max(costs, key=lambda cost: (cost.flops, cost.traffic)))
            elif i.op in ("call", "async-start"):
                total.add(self.cost(i.called("to_apply|calls"), fused))
            elif kind in COLLECTIVES and not _is_continued(i, scope):
                # When each device keeps a part of an all-reduce, in one fusion, a TPU runs it as a reduce-scatter.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                total.collectives[self.collective(i, scope, kind)] += 1
            elif i.op == "send" and "xla_megascale" in i.attributes:
                total.between_slices += sum(a.bytes for a in arrays(scope[i.operands[0]].shape))
            elif i.op == "fusion":
                total.add(self.cost(i.called("calls"), True))
            elif i.op == "dot":
                total.flops += _dot_flops(i, scope)
            elif i.op == "convolution":
                total.flops += _convolution_flops(i, scope)
            elif i.op == "custom-call":
                total.flops += i.stated_cost().get("flops", 0)
            if not fused:
                total.traffic += self.traffic(i, scope)
        return total

    def trip_count(self, loop, scope):
        """How often a loop runs: the compiler's own count, or that of a counter compared to a constant; else None."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
            return int(known[1])
        condition, body = self.computations[loop.called("condition")], self.computations[loop.called("body")]
        compare = condition[None]
        if compare.op != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, limit = (_source(condition[o], condition) for o in compare.operands)
        start, end = _source(scope[loop.operands[0]], scope), body[None]
        if counter.op != "get-tuple-element" or {start.op, end.op} != {"tuple"}:
            return None
        index = int(re.search(r"index=(\d+)", counter.attributes)[1])
        added = _source(body[end.operands[index]], body)
        steps = [i for i in (_source(body[o], body) for o in added.operands) if i.op == "constant"]
        first = _source(scope[start.operands[index]], scope)
        if added.op != "add" or len(steps) != 1 or {first.op, limit.op} != {"constant"}:
            return None
        return -(-(int(limit.text) - int(first.text)) // int(steps[0].text))

    def collective(self, i, scope, kind):
        """The `Collective` of an instruction."""
        inputs = [a for o in i.operands for a in arrays(scope[o].shape)]
        group = self.group_size(i.attributes)
        rounds = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group, "collective-permute": 1}
        shapes = ", ".join(f"{n} x {shape}" if n > 1 else shape for shape, n in Counter(str(a) for a in inputs).items())
        sent = sum(a.bytes for a in inputs) * rounds.get(kind, (group - 1) / group)
        return Collective(kind, shapes, group, sent, i.source)

    def group_size(self, attributes):
        """The number of devices in a replica group; all devices when the attributes name no group.

        HLO writes groups as `{{0,1},{2,3}}`, as `[groups,size]<=[...]`, or as `mesh['a'=2,'b'=2], device_ids=(...)
        {'a'}`, where `device_ids` may be missing.
        """
        if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)? *\{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            return math.prod(
                int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
            )
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
            return int(iota[1])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return listed[1].count(",") + 1
        return self.devices

    def traffic(self, i, scope):
        """Bytes that an instruction itself moves between the device and its main memory."""
        if i.op in NO_TRAFFIC or i.op in ("while", "conditional", "call", "async-start") or i.op.endswith("-done"):
            return 0
        if i.op == "fusion":
            body = self.computations[i.called("calls")]
            read = sum(self.read(body, p, scope[o].shape) for p, o in zip(_parameters(body), i.operands, strict=True))
            root = body[None]
            return (
                read + sum(_written(body[o], body) for o in root.operands)
                if root.op == "tuple"
                else read + _written(root, body)
            )
        if i.op in ("copy-start", "slice-start"):
            ends = arrays(i.shape)[:2]  # source and destination, of which one may be a slice of the other
            return min(a.bytes for a in ends) * sum(a.main > 0 for a in ends)
        if i.op in _SLICES:
            return sum(a.bytes for a in arrays(i.shape)) * (_bytes(scope[i.operands[0]].shape) > 0) + _bytes(i.shape)
        if i.op == "dynamic-update-slice":
            return 2 * _bytes(scope[i.operands[1]].shape)
        read = sum(_bytes(scope[o].shape) for o in i.operands)
        if i.op.endswith("-start"):  # the result repeats the operands
            return 2 * read
        return read + _bytes(i.shape)

    def read(self, body, name, shape):
        """Bytes that a fusion reads of its parameter `name`: only the slices where it uses nothing else."""
        whole = total = _bytes(shape)
        if whole:
            users = [i for key, i in body.items() if key is not None and name in i.operands]
            total = sum(self._read_by(user, body, name, shape) for user in users)
        return min(total, whole)

    def _read_by(self, user, body, name, shape):
        if user.op in _SLICES:
            return sum(a.bytes for a in arrays(user.shape))
        if user.op == "tuple" or user.op == "dynamic-update-slice" and name not in user.operands[1:]:
            return 0  # passed on in place
        if user.op == "bitcast":
            return self.read(body, user.name, shape)
        if user.op == "fusion":
            inner = self.computations[user.called("calls")]
            return sum(
                self.read(inner, p, shape) for p, o in zip(_parameters(inner), user.operands, strict=True) if o == name
            )
        return _bytes(shape)


class _Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    main: int  # bytes in main memory: all or none

    @property
    def bytes(self):
        return _size(self.dtype, self.dims)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _size(dtype, dims):
    bits = 8 if dtype == "pred" else int((_DIGITS.match(dtype) or [0, 0])[1])
    return math.ceil(bits * math.prod(dims) / 8)


@functools.cache
def arrays(shape):
    """The arrays of a shape such as `(f32[8,128]{1,0:T(8,128)S(1)}, u32[])`.

    `S(n)` with n > 0 marks memory on the chip or on the host.
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        dims = tuple(int(n) for n in dims.split(",") if n)
        elsewhere = re.search(r"S\([1-9]", layout)
        found.append(_Array(dtype, dims, 0 if elsewhere else _size(dtype, dims)))
    return found


def _bytes(shape):
    return sum(a.main for a in arrays(shape))


def _dims(name, scope):
    return arrays(scope[name].shape)[0].dims


def _closing(text, start):
    """The index after the bracket that closes the first bracket from `start` on."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"no closing bracket: {text[:200]!r}")


def _parse(name, text):
    """Parses `shape op(operands), attributes` into an instruction."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    return _Instruction(
        name, text[:end], text[end:opening].strip(), tuple(re.findall(r"%([\w.\-]+)", inside)), inside, text[closing:]
    )


def _source(i, scope):
    while i.op in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        i = scope[i.operands[0]]
    return i


def _parameters(body):
    """The names of the parameters of a computation, in order."""
    parameters = [i for key, i in body.items() if key is not None and i.op == "parameter"]
    return [i.name for i in sorted(parameters, key=lambda i: int(i.text))]


def _written(i, scope):
    """Bytes that a fusion writes for one of its results. An update in place writes only the new part."""
    shape = i.shape
    while i.op == "bitcast":
        i = scope[i.operands[0]]
    if i.op == "parameter":  # passed on in place
        return 0
    if i.op == "dynamic-update-slice" and _bytes(shape):
        return sum(a.bytes for a in arrays(scope[i.operands[1]].shape))
    return _bytes(shape)


def _is_continued(i, scope):
    """Whether an earlier fusion started this collective.

    A TPU spreads one over a chain of fusions that each repeat it.
    """
    return "async_collective_fusion_config" in i.attributes and not any(
        "AsyncCollectiveStart" in o.attributes for o in scope.values()
    )


def _dot_flops(i, scope):
    lhs = _dims(i.operands[0], scope)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    sizes = [lhs[int(d)] for d in contracted[1].split(",") if d] if contracted else []
    return 2 * math.prod(arrays(i.shape)[0].dims) * math.prod(sizes)


def _convolution_flops(i, scope):
    """FLOPs without the products with padding.

    A TPU writes batched matrix products as convolutions that are mostly padding.
    """
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    lhs, rhs = (_dims(operand, scope) for operand in i.operands[:2])
    out = arrays(i.shape)[0].dims
    batches = re.search(r"batch_group_count=(\d+)", i.attributes)
    products = (
        rhs[rhs_labels.index("i")]
        * rhs[rhs_labels.index("o")]
        * lhs[lhs_labels.index("b")]
        // int(batches[1] if batches else 1)
    )
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    for d in range(len(lhs) - 2):
        label = str(d)
        stride, lhs_dilate, rhs_dilate = (
            int(fields[k].split("x")[d]) if k in fields else 1 for k in ("stride", "lhs_dilate", "rhs_dilate")
        )
        pad = int(fields["pad"].split("x")[d].split("_")[0]) if "pad" in fields else 0
        sizes = lhs[lhs_labels.index(label)], rhs[rhs_labels.index(label)], out[out_labels.index(label)]
        products *= _positions(*sizes, stride, lhs_dilate, rhs_dilate, pad)
    return 2 * products


@functools.cache
def _positions(lhs, rhs, out, stride, lhs_dilate, rhs_dilate, pad):
    """The number of pairs of output and kernel positions, along one dimension, that meet an element of the input."""
    starts, count = np.arange(out) * stride - pad, 0
    for k in range(rhs):
        at = starts + k * rhs_dilate
        count += int(np.sum((at >= 0) & (at <= (lhs - 1) * lhs_dilate) & (at % lhs_dilate == 0)))
    return count
