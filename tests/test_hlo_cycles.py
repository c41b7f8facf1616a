"""The TPU compiler's estimate of a step: the rule on programs written by hand, and on compiled ones."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from clip_jax import hlo_cycles, kernel_cycles
from clip_jax.hlo_cycles import Peaks, part_of, step_cycles
from clip_jax.runtime import hardware
from clip_jax.runtime.topology import parse_topology, tpu_devices

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# The cache of the tests cannot hold programs for devices that are not present.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
PEAKS = Peaks(flops=100, memory=64, links=16)

HEAD = """HloModule step, num_partitions=2

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%work (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %inside = f32[64]{0} negate(%p), @1000000
}

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), @1
  %y = f32[64]{0} fusion(%x), kind=kLoop, calls=%work, metadata={op_name="jit(step)/jvp(A)/block_3/mlp/fc1/dot"}, @10
  ROOT %t = (s32[], f32[64]{0}) tuple(%next, %y)
}

%condition (s.1: (s32[], f32[64])) -> pred[] {
  %s.1 = (s32[], f32[64]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %more = pred[] compare(%i.1, %limit), direction=LT, @2
}

%outer_body (s.2: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s.2 = (s32[], f32[64]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %x.2 = f32[64]{0} get-tuple-element(%s.2), index=1
  %zero.2 = s32[] constant(0)
  %first.2 = (s32[], f32[64]{0}) tuple(%zero.2, %x.2)
  %inner = (s32[], f32[64]{0}) while(%first.2), condition=%condition, body=%body
  %y.2 = f32[64]{0} get-tuple-element(%inner), index=1
  ROOT %t.2 = (s32[], f32[64]{0}) tuple(%i.2, %y.2)
}

%cheap (p.3: f32[64]) -> f32[64] {
  %p.3 = f32[64]{0} parameter(0)
  ROOT %r.3 = f32[64]{0} fusion(%p.3), kind=kLoop, calls=%work, @20
}

%dear (p.4: f32[64]) -> f32[64] {
  %p.4 = f32[64]{0} parameter(0)
  ROOT %r.4 = f32[64]{0} fusion(%p.4), kind=kLoop, calls=%work, @300
}

ENTRY %main (q: f32[64]) -> f32[64] {
  %q = f32[64]{0} parameter(0)
  %yes = s32[] constant(0)
  %state = (s32[], f32[64]{0}) tuple(%yes, %q)
"""
LOOP = "  %loop = (s32[], f32[64]{0}) while(%state), condition=%condition, body=%body\n"
OUTER = "  %outer = (s32[], f32[64]{0}) while(%state), condition=%condition, body=%outer_body, @trips=3\n"


def cycles_of(lines, peaks=PEAKS, kernels=None):
    """The `StepCycles` of a program whose entry consists of `lines`; `@7` stands for an estimate of 7 cycles."""
    text = HEAD + lines + "}\n"
    words = text.replace("@trips=", 'backend_config={"known_trip_count":{"n":"')
    words = words.replace('"n":"3', '"n":"3"}}')
    for number in (1000000, 300, 100, 50, 20, 10, 2, 1):
        words = words.replace(f"@{number}\n", f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}\n')
    return step_cycles(words, peaks, kernels)


@pytest.mark.parametrize(
    "lines, cycles, unknown",
    [
        (LOOP, 5 * (10 + 1 + 2), 0),  # condition and body; the instructions inside of fusions are not counted
        (OUTER, 3 * (2 + 5 * 13), 0),
        (LOOP.replace("%state", "%q"), 10 + 1 + 2, 1),  # nothing says where the counter starts: one round
        ("  %r = f32[64]{0} conditional(%yes, %q, %q), branch_computations={%cheap, %dear}\n", 300, 0),
        ("  %r = f32[64]{0} call(%q), to_apply=%cheap, @50\n", 20, 0),  # its own estimate would count twice
        ("  %r = ((f32[64]), f32[64], u32[]) async-start(%q), calls=%dear\n", 300, 0),
        ("  %r = f32[64]{0} custom-call(%q), custom_call_target=\"AllocateBuffer\"\n", 0, 0),
        ("  %r = f32[64]{0} add(%q, %q)\n", 3 * 256 / 64, 0),  # no estimate: bytes at the memory's bandwidth
        ("  %r = f32[64]{0:S(1)} bitcast(%q)\n", 0, 0),
    ],
)  # fmt: skip
def test_the_rule(lines, cycles, unknown):
    found = cycles_of(lines)
    assert (found.cycles, found.unknown_loops) == (cycles, unknown)


START = "  %s1 = (f32[64], f32[64]) all-reduce-start(%q), channel_id=1, replica_groups={{0,1}}, to_apply=%sum\n"
DONE = "  %d1 = f32[64]{0} all-reduce-done(%s1)\n"
WORK = "  %w1 = f32[64]{0} fusion(%q), kind=kLoop, calls=%work, @10\n"
WORK_2 = WORK.replace("w1", "w2")
SENT = 256 / 16  # cycles on the links: a ring of two sends every byte once


@pytest.mark.parametrize(
    "lines, waits, hidden",
    [
        ("  %r = f32[64]{0} all-reduce(%q), channel_id=1, replica_groups={{0,1}}, to_apply=%sum\n", SENT, 0),
        (START + DONE, SENT, 0),
        (START + WORK + DONE, SENT - 10, 10),
        (START + WORK + WORK_2 + DONE, 0, SENT),
        # The second exchange waits for the first one.
        (START + START.replace("s1", "s2") + WORK + DONE + DONE.replace("1", "2"), 2 * SENT - 10, 10),
    ],
)
def test_exchanges_wait_for_what_other_work_does_not_hide(lines, waits, hidden):
    links = [row for row in cycles_of(lines).rows if row.basis == "links"]
    assert sum(row.cycles for row in links) == waits and sum(row.hidden for row in links) == hidden
    assert {row.part for row in links} == {hlo_cycles.LINKS}
    assert cycles_of(lines).cycles == waits + 10 * lines.count("fusion")
    assert cycles_of(lines, peaks=None).cycles == 10 * lines.count("fusion"), "without a clock only the estimates count"


def test_exchanges_that_fusions_continue():
    body = """%@name (p.9: f32[64]) -> f32[64] {
  %p.9 = f32[64]{0} parameter(0)
  %g.@name = f32[128]{0} all-gather(%p.9), channel_id=7, replica_groups={{0,1}}, @config
  ROOT %e.@name = f32[64]{0} custom-call(%g.@name), custom_call_target="AsyncCollective@end"
}

"""
    text = "".join(body.replace("@name", end.lower()).replace("@end", end) for end in ("Start", "Done"))
    text = text.replace("@config", 'backend_config={"async_collective_fusion_config":{}}')
    lines = "".join(
        f"  %{end} = f32[64]{{0}} fusion(%q), kind=kCustom, calls=%{end}\n{work}"
        for end, work in (("start", WORK), ("done", WORK_2))
    )
    program = (HEAD + lines + "}\n").replace("ENTRY", text + "ENTRY")
    program = program.replace(", @10\n", ', backend_config={"estimated_cycles":"10"}\n')
    (row,) = (row for row in step_cycles(program, PEAKS).rows if row.basis == "links")
    assert (row.cycles, row.hidden, row.name) == (SENT - 10, 10, "start")


CONFIG = """{"custom_call_config":{"body":"QUJD","cost_estimate":\
{"flops":"5000","transcendentals":"9","bytes_accessed":"640"}}}"""
KERNEL = '  %k = f32[64]{0} custom-call(%q), custom_call_target="tpu_custom_call", '
KERNEL += f'metadata={{op_name="jit(step)/A/attn/call"}}, backend_config={CONFIG}\n'


def test_kernels_count_by_their_own_estimate_or_by_the_cost_that_they_state():
    (key,) = hlo_cycles.kernels_of(HEAD + KERNEL + "}\n")
    for kernels, basis, cycles in (({}, "stated", 5000 / 100), ({key: 123}, "kernel", 123)):
        (row,) = cycles_of(KERNEL, kernels=kernels).rows  # its bytes take 512 / 64 cycles
        assert (row.basis, row.cycles, row.part) == (basis, cycles, "attention")
    (row,) = cycles_of(KERNEL, kernels={key: 7}).rows
    assert row.cycles == 512 / 64, "its bytes take longer"
    (row,) = cycles_of(KERNEL.replace('"5000"', '"0"')).rows
    assert row.cycles == 640 / 64
    (row,) = cycles_of(KERNEL[: KERNEL.index(", backend_config")] + "\n").rows
    assert (row.basis, row.cycles) == ("none", 0)


@pytest.mark.parametrize(
    "source, part",
    [
        ("jit(step)/transpose(jvp(VisionTransformer))/block_0/attn/query/cond/branch_0_fun/dot_general", "attention"),
        ("jit(step)/while/body/closed_call/jvp(A)/while/body/closed_call/block.<lambda>/block/mlp/fc1/add", "MLP"),
        ("jit(step)/jvp(TextTransformer)/block_11/ln2/reduce_sum", "norms"),
        ("jit(step)/jvp(VisionTransformer)/block_0/attn/key_norm/mul", "norms"),
        ("jit(step)/jvp(VisionTransformer)/patch/conv_general_dilated", "embedding"),
        ("jit(step)/transpose(jvp(TextTransformer))/embed/jit(_take)/scatter-add", "embedding"),
        ("jit(step)/jvp(ResNet)/layer_1_0/conv2/conv_general_dilated", "convolutions"),
        ("jit(step)/transpose(jvp(loss))/shard_map/while/body/closed_call/jvp()/mul", "loss"),
        ("jit(step)/optimizer/reduce_sum", "optimizer"),
        ("jit(step)/jvp(VisionTransformer)/block_3/add", "other"),
        ("", "other"),
    ],
)
def test_parts_by_the_names_of_modules(source, part):
    assert part_of(source) == part


def test_equal_operations_of_all_blocks_are_one_line():
    other = WORK_2.replace(", @10", ', metadata={op_name="jit(step)/jvp(A)/block_4/mlp/fc1/dot"}, @20')
    (row, *_) = cycles_of(LOOP + other).merged()
    assert (row.source, row.times, row.cycles) == ("jit(step)/jvp(A)/block_*/mlp/fc1/dot", 6, 70 / 6)
    assert row.part == "MLP" and row.total == 70


def test_what_only_moves_data_is_a_copy():
    lines = '  %m = f32[64]{0} transpose(%q), metadata={op_name="jit(step)/jvp(A)/attn/query/transpose"}, @50\n'
    lines += "  %n = (f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%q)\n  %o = f32[64]{0:S(1)} copy-done(%n)\n"
    assert cycles_of(lines).by("part") == {"copies": 50 + 256 / 64}


def test_the_peaks_of_a_device():
    assert hlo_cycles.peaks(hardware.TPUS["tpu7x"]) is None
    v3 = hlo_cycles.peaks(hardware.TPUS["v3"])
    assert v3.flops == pytest.approx(2 * 2 * 128 * 128, rel=0.01), "a core has two matrix units of 128 x 128"


@pytest.fixture
def device():
    """A v5e chip as its compiler describes it."""
    before = dict(os.environ)
    yield tpu_devices(parse_topology("v5e:2x2"))[0]
    os.environ.clear()
    os.environ.update(before)


def compiled(function, device, *shapes):
    placed = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


@needs_libtpu
def test_a_scan_and_its_unrolled_form_take_the_same_time(device):
    """By their products: the compiler adds a copy of the carry to each round of the scan."""

    def scanned(x, ws):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]

    def unrolled(x, ws):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x

    products = []
    for function in (scanned, unrolled):
        found = step_cycles(compiled(function, device, (4096, 1024), (3, 1024, 1024)), PEAKS)
        products.append(sum(row.total for row in found.rows if row.source.endswith("dot_general")))
        assert found.unknown_loops == 0
    assert products[0] == pytest.approx(products[1], rel=0.03)
    # Each of a v5e chip's four matrix units of 128 x 128 takes a row of 128 numbers a cycle.
    assert 1 < products[1] / (3 * 4096 * 8 * 8 / 4) < 1.2


@needs_libtpu
def test_a_kernel_is_compiled_alone_for_its_cycles(device):
    from jax.experimental import pallas as pl

    def product(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def step(y, *xs):
        rows, all_of = pl.BlockSpec((128, 256), lambda i: (i, 0)), pl.BlockSpec((256, 256), lambda i: (0, 0))
        calls = (
            pl.pallas_call(
                product, grid=(len(x) // 128,), in_specs=[rows, all_of], out_specs=rows,
                out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32), name="product",
            )
            for x in xs
        )  # fmt: skip
        return [call(x, y) for call, x in zip(calls, xs, strict=True)]

    text = compiled(step, device, (256, 256), (1024, 256), (4096, 256), (1024, 256))
    kernels = kernel_cycles.kernel_cycles(text, parse_topology("v5e:2x2"), {})
    small, large = sorted(kernels.values())  # the kernel that runs twice is compiled once
    assert 1024 * 2 * 2 / 4 < small and large == 4 * small, "four times as many rounds of the grid"
    bases = step_cycles(text, hlo_cycles.peaks(hardware.TPUS["v5e"]), kernels).by("basis")
    assert bases["kernel"] == 2 * small + large and "none" not in bases
