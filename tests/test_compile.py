"""Compiling for absent machines: the cost of programs, errors, whole runs of the command."""

import importlib.util
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import REPO
from helpers import TINY

from clip_jax import compile as compile_lib
from clip_jax import config, estimates
from clip_jax import program as program_lib
from clip_jax.errors import UserError
from clip_jax.hlo_cost import HloModule, hlo_cost
from clip_jax.program import jaxpr_flops, make_program
from clip_jax.runtime import hardware, topology, xla_flags

CLIP = str(REPO / "configs" / "clip.py")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# The command turns the compilation cache off.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@pytest.fixture(autouse=True)
def environment():
    """Removes the variables that the command sets for libtpu, so that other tests' processes do not inherit them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def matmul(x, w):
    return x @ w


def scanned(x, ws):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0]


def nested(x, ws):
    return jax.lax.scan(lambda h, _: (scanned(h, ws), None), x, length=3)[0]


def gradient(x, ws):
    return jax.grad(lambda ws: scanned(x, ws).sum())(ws)


def branches(x, ws):
    return jax.lax.cond(x[0, 0] > 0, lambda: scanned(x, ws), lambda: x @ ws[0])


X, W, WS = (16, 32), (32, 32), (5, 32, 32)
ONE = 2 * 16 * 32 * 32


@pytest.mark.parametrize(
    "function, shapes, products",
    [
        (matmul, (X, W), 1),
        (scanned, (X, WS), 5),
        (nested, (X, WS), 15),
        (gradient, (X, WS), 15),
        (branches, (X, WS), 5),
    ],
)
def test_flops_count_every_round_of_a_loop(function, shapes, products):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    cost = hlo_cost(jax.jit(function).lower(*arguments).compile().as_text())
    assert (cost.flops, cost.unknown_loops) == (products * 2 * 16 * 32 * 32, 0)
    assert jaxpr_flops(jax.make_jaxpr(function)(*arguments)) == cost.flops


def test_flops_of_convolutions_leave_out_the_padding():
    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def convolve(padding):
        function = jax.jit(
            lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        return hlo_cost(function.lower(x, k).compile().as_text()).flops

    assert convolve("VALID") == 2 * 2 * 6 * 6 * 5 * 9 * 3
    assert convolve("SAME") == 2 * 2 * (8 * 3 - 2) ** 2 * 5 * 3


@pytest.mark.parametrize("kernel, groups", [((2, 2, 4, 6), 1), ((2, 2, 1, 4), 4)])
def test_flops_of_a_strided_convolution_and_its_gradients(kernel, groups):
    """Each takes as many products. The gradient of the input has zeros between its numbers, which are no work."""
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones(kernel)

    def convolve(x, k):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (2, 2), "VALID", dimension_numbers=layout, feature_group_count=groups
        ).sum()

    forward = 2 * 2 * 4 * 4 * kernel[3] * math.prod(kernel[:3])
    assert jaxpr_flops(jax.make_jaxpr(convolve)(x, k)) == forward
    assert jaxpr_flops(jax.make_jaxpr(jax.value_and_grad(convolve, (0, 1)))(x, k)) == 3 * forward


def test_traffic_of_a_fusion_that_takes_a_slice():
    """A loop reads one layer of the stacked weights in each round, not all layers."""
    text = (
        jax.jit(lambda x, ws: jax.lax.scan(lambda h, w: (h * w, None), x, ws)[0])
        .lower(jnp.ones(1000), jnp.ones((50, 1000)))
        .compile()
    )
    assert 4 * 3 * 50 * 1000 <= hlo_cost(text.as_text()).traffic < 4 * 6 * 50 * 1000


HLO = """HloModule step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%begin (p0: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,8]{1,0} all-gather(%p0), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, dimensions={0}, @config
  ROOT %start = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (p1: bf16[4,8]) -> bf16[32,8] {
  %p1 = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[32,8]{1,0} all-gather(%p1), replica_groups=mesh['x'=4,'y'=2] {'x','y'}, dimensions={0}, @config
}

%all-reduce-scatter.1 (p2: f32[8,16]) -> f32[4,16] {
  %p2 = f32[8,16]{1,0} parameter(0)
  %reduced = f32[8,16]{1,0} all-reduce(%p2), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%sum
  %zero.1 = s32[] constant(0)
  ROOT %mine = f32[4,16]{1,0} dynamic-slice(%reduced, %zero.1, %zero.1), dynamic_slice_sizes={4,16}
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %gram = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %y = f32[8,16]{1,0} dot(%gram, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,16]{1,0} all-reduce(%y), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, @sum
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%next, %z)
}

%condition (state.1: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(9)
  ROOT %more = pred[] compare(%count, %limit), direction=LT
}

ENTRY %main (q0: f32[8,16], q1: bf16[4,8]) -> f32[8,16] {
  %q0 = f32[8,16]{1,0} parameter(0)
  %q1 = bf16[4,8]{1,0} parameter(1)
  %two = s32[] constant(2)
  %two.copy = s32[]{:T(128)S(6)} copy(%two)
  %first = (s32[], f32[8,16]{1,0}) tuple(%two.copy, %q0)
  %loop = (s32[], /*index=1*/f32[8,16]{1,0}) while(%first), condition=%condition, body=%body
  %gather-start = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%q1), kind=kCustom, calls=%begin
  %gather-done = bf16[32,8]{1,0} fusion(%q1), kind=kCustom, calls=%go_on
  %half = f32[4,16]{1,0} fusion(%q0), kind=kCustom, calls=%all-reduce-scatter.1
  %all = f32[8,16]{1,0} all-reduce(%q0), channel_id=4, replica_groups={}, to_apply=%sum
  %permute = ((f32[8,16]{1,0}), f32[8,16]{1,0}) collective-permute-start(%q0), source_target_pairs={{0,1},{1,0}}
  %permute.1 = f32[8,16]{1,0} collective-permute-done(%permute)
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
HLO = HLO.replace("@config", 'backend_config={"async_collective_fusion_config":{}}')
HLO = HLO.replace("@sum", 'to_apply=%sum, metadata={op_name="jit(step)/sum"}')


def test_collectives_of_a_program():
    cost = hlo_cost(HLO)
    found = {(c.kind, c.shape, c.group): (n, c.sent) for c, n in cost.collectives.items()}
    assert found == {
        ("all-reduce", "f32[8,16]", 4): (7, 2 * 3 / 4 * 512),  # the loop counts from 2 to 9
        ("all-gather", "bf16[4,8]", 8): (1, 7 * 64),  # counts once, although two fusions contain it
        ("reduce-scatter", "f32[8,16]", 2): (1, 1 / 2 * 512),
        ("all-reduce", "f32[8,16]", 8): (1, 2 * 7 / 8 * 512),
        ("collective-permute", "f32[8,16]", 8): (1, 512),
    }
    assert cost.sent == sum(n * sent for n, sent in found.values())
    assert cost.flops == 7 * 2 * (8 * 8 * 16 + 8 * 16 * 8) and cost.unknown_loops == 0
    assert {c.name for c in cost.collectives} == {"jit(step)/sum", ""}


def test_a_counter_may_take_larger_steps():
    assert hlo_cost(HLO.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")).flops == 4 * 2 * (
        8 * 8 * 16 + 8 * 16 * 8
    )


@pytest.mark.parametrize(
    "old, new",
    [("direction=LT", "direction=NE"), ("add(%i, %one)", "multiply(%i, %one)"), ("copy(%two)", "partition-id()")],
)
def test_a_loop_of_unknown_length_is_reported(old, new):
    cost = hlo_cost(HLO.replace(old, new))
    assert cost.unknown_loops == 1 and cost.flops == 2 * (8 * 8 * 16 + 8 * 16 * 8)


def test_memory_on_the_chip_is_no_traffic():
    text = """ENTRY %main (p: f32[64,128]) -> f32[128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %near = ((f32[64,128]{1,0:T(8,128)}), f32[1,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:1]}
  %near.1 = f32[1,128]{1,0:T(8,128)S(1)} slice-done(%near)
  %twice = f32[1,128]{1,0:T(8,128)S(1)} add(%near.1, %near.1)
  %far = (f32[1,128]{1,0:T(8,128)}, f32[1,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%twice)
  %far.1 = f32[1,128]{1,0:T(8,128)} copy-done(%far)
  ROOT %out = f32[128]{0:T(128)} bitcast(%far.1)
}
"""
    assert hlo_cost(text).traffic == 2 * 128 * 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5f:2x2", "'v5f' .did you mean 'v5p'"),
        ("a100x8", "'a100x8'; allowed: v3, v4, v5e, v5p, v6e, tpu7x, gpu"),
        ("v5e", "each of the 2 directions, such as v5e:4x4"),
        ("v5e:2x2x2", "each of the 2 directions, such as v5e:4x4"),
        ("v5p:0x2x2", "each of the 3 directions, such as v5p:4x4x4"),
        ("gpu:h100", "such as gpu:h100x8"),
        ("gpu:h10x8", "GPU 'h10' .did you mean 'h100'"),
    ],
)
def test_topologies_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message) as error:
        compile_lib.parse_topology(name)
    assert "\n" not in str(error.value)


def test_topologies():
    tpu, gpu = compile_lib.parse_topology("v5p:2x2x4"), compile_lib.parse_topology("gpu:h100x16")
    assert (tpu.chip, tpu.count, gpu.chip, gpu.count, gpu.shape) == (
        hardware.TPUS["v5p"],
        16,
        hardware.GPUS["h100"],
        16,
        None,
    )
    two = compile_lib.parse_topology("v5e:4x8*2")
    assert (two.count, two.shape, two.slices, tpu.slices) == (64, "4x8", 2, 1)


def test_chips_by_their_name_in_jax():
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
        "TPU v4": "v4",
    }
    assert {kind: hardware.chip_of(kind) for kind in kinds} == {
        kind: hardware.TPUS[name] for kind, name in kinds.items()
    }
    assert hardware.chip_of("NVIDIA H100 80GB HBM3") is hardware.GPUS["h100"] and hardware.chip_of("cpu") is None


@needs_libtpu
@pytest.mark.parametrize("slice", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_knows_the_options_of_every_chip(slice, caplog):
    """Its own names, so a misspelt or dropped option would be reported."""
    devices = compile_lib.tpu_devices(compile_lib.parse_topology(slice))
    options = xla_flags.options(devices[0].device_kind)
    assert options["xla_tpu_enable_latency_hiding_scheduler"] == "true"
    everywhere = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.sharding.PartitionSpec())
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=everywhere))
    program_lib._compile(lowered, options)
    assert not caplog.records
    program_lib._compile(lowered, {"xla_tpu_no_such": "true"} | options)
    assert [record.getMessage() for record in caplog.records] == [
        "this compiler has no option xla_tpu_no_such: the step is compiled without it"
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_scoped_vmem_limit_kib"):
        program_lib._compile(lowered, {"xla_tpu_scoped_vmem_limit_kib": "much"})


@needs_libtpu
def test_with_fsdp_alone_kernels_are_gathered_whole():
    """Without the option the compiler multiplies by the parts of a kernel in turn, in a loop."""
    devices = compile_lib.tpu_devices(compile_lib.parse_topology("v5e:2x4"))
    mesh = jax.sharding.Mesh(devices, "x")

    def spread(shape, *axes):
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

    x, kernels = spread((8192, 128), "x"), (spread((128, 512), "x"), spread((512, 128), None, "x"))

    def loss(kernels, x):
        x, kernels = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (x, kernels))
        return jnp.square((jnp.tanh(x @ kernels[0]) @ kernels[1]).astype(jnp.float32)).sum()

    layouts = tuple(kernel.sharding for kernel in kernels)
    lowered = jax.jit(jax.grad(loss), out_shardings=layouts).lower(kernels, x)
    options = xla_flags.options(devices[0].device_kind)
    others = {name: value for name, value in options.items() if "windowed_einsum" not in name}
    loops = [" while(" in program_lib._compile(lowered, chosen).as_text() for chosen in (options, others)]
    assert loops == [False, True]


def test_the_options_of_gpus_are_those_of_xla():
    (name,) = options = xla_flags.options("NVIDIA H100 80GB HBM3")
    assert options == {name: True} and not xla_flags.options("cpu")
    program_lib._compile(jax.jit(lambda x: x + 1).lower(jnp.ones(3)), options)


@pytest.mark.parametrize("on", [True, False])
def test_the_step_is_compiled_with_the_options_of_its_devices(monkeypatch, on, mesh8):
    """Both commands compile it by this function."""
    seen = []
    monkeypatch.setattr(program_lib, "_compile", lambda lowered, options: seen.append(options))
    monkeypatch.setattr(xla_flags, "options", lambda kind: {"for": kind})
    sharded, _, _ = program_lib.shard(make_program(config.load(CLIP, [*TINY, f"train.xla_flags={on}"])), mesh8)
    program_lib.compile_step(sharded)
    assert seen == [{"for": "cpu"} if on else {}]


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command("--topology=v5e:2x2") == 2
    assert (
        capsys.readouterr().err
        == "error: --topology=v5e:2x2 needs the TPU compiler: pip install 'clip-jax-pretraining[tpu]'\n"
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.optim.lrr=1", "did you mean 'optim.lr'"),
        ("--confg.seed=1", "unknown argument"),
        ("--config.seed", "has no value"),
    ],
)
def test_wrong_flags(flag, message, capsys):
    assert command("--topology=gpu:h100x8", flag) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def command(*flags, tiny=TINY):
    """Runs the command with the tiny model and returns its exit status."""
    return compile_lib.main([f"--config={CLIP}", *(f"--config.{o}" for o in tiny), *flags])


def figures(tmp_path, *flags, status=0):
    assert command(f"--json={tmp_path / 'figures.json'}", *flags) == status
    return json.loads((tmp_path / "figures.json").read_text())


BFLOAT16_SUMS = "--config.model.dtype=bfloat16", "--config.optim.grad_dtype=bfloat16"


def test_gpu_estimates_follow_from_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_lib, "gpu_devices", lambda topology: None)
    whole = figures(tmp_path, "--topology=gpu:h100x1")
    parts = figures(tmp_path, "--topology=gpu:h100x8", "--config.mesh.fsdp=2")
    assert parts["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert parts["flops"] == whole["flops"] / 8 and parts["model_flops"] == whole["model_flops"] == whole["flops"]
    program = make_program(config.load(CLIP, TINY))
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state)]
    assert whole["memory"]["state"] == sum(sizes) and sum(sizes) / 2 < parts["memory"]["state"] < sum(sizes) / 1.8
    assert "activations come on top and are not estimated" in capsys.readouterr().out
    sums = figures(tmp_path, "--topology=gpu:h100x8", *BFLOAT16_SUMS)["sent"]
    params = jax.tree_util.tree_leaves_with_path(program.state.params)
    bytes_summed = sum(x.size * (2 if x.ndim > 1 and path[-1].key == "kernel" else 4) for path, x in params)
    assert sums == 2 * 7 / 8 * bytes_summed


def test_a_step_is_compiled_for_gpus_where_jax_has_their_compiler(tmp_path, capsys, monkeypatch):
    shapes = figures(tmp_path, "--topology=gpu:h100x8")
    monkeypatch.setattr(compile_lib, "gpu_devices", lambda topology: jax.devices()[: topology.count])
    found = figures(tmp_path, "--topology=gpu:h100x8")
    memory = found["memory"]
    assert memory["temp"] > 0 and memory["state"] == shapes["memory"]["state"]
    assert (
        memory["total"]
        == memory["argument"] + memory["output"] - memory["alias"] + memory["temp"] + memory["generated_code"]
    )
    assert (found["flops"], found["estimate"]) == (shapes["flops"], shapes["estimate"])
    assert "HBM (0.0%): it fits" in capsys.readouterr().out
    monkeypatch.setitem(hardware.GPUS, "h100", hardware.GPUS["h100"]._replace(hbm=memory["total"] - 1))
    found = figures(tmp_path, "--topology=gpu:h100x8", status=1)
    assert not found["fits"] and "--config.model.remat=full" in capsys.readouterr().out


def test_a_step_that_needs_more_than_jax_takes_says_how_to_get_it():
    sizes = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code", "state", "batch"), 0)
    result = dict(compile_seconds=1, options={}, memory=dict(sizes, total=64 * 10**9))
    lines = list(estimates._describe_memory(compile_lib.parse_topology("gpu:h100x1"), result))
    assert lines[-1].endswith("JAX takes 75% of a GPU: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for this step")


def test_without_a_whole_plugin_there_are_no_gpu_devices(monkeypatch):
    from jax.experimental import topologies

    def no_topology(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topology, "has_gpu_compiler", lambda: True)
    monkeypatch.setattr(topologies, "get_topology_desc", no_topology)
    assert topology.gpu_devices(compile_lib.parse_topology("gpu:h100x12")) is None


@pytest.mark.skipif(not topology.has_gpu_compiler(), reason="JAX's CUDA plugin (extra gpu) is not installed")
@pytest.mark.parametrize("gpu", hardware.GPUS)
def test_xla_knows_the_gpus(gpu):
    devices = compile_lib.gpu_devices(compile_lib.parse_topology(f"gpu:{gpu}x16"))
    assert len(devices) == 16 and hardware.chip_of(devices[0].device_kind) is hardware.GPUS[gpu]
    assert len(compile_lib.gpu_devices(compile_lib.parse_topology(f"gpu:{gpu}x12"))) == 12


def test_the_schedule():
    topology, c = (
        compile_lib.parse_topology("gpu:h100x8"),
        config.load(CLIP, ["train.steps=7200", "data.batch_size=64"]),
    )
    times = estimates.schedule(topology, c, 0.5, flops=0.5 * 8 * 989e12 / 4)
    assert times == dict(seconds=0.5, mfu=0.25, examples_per_second=128, hours=1.0, chip_hours=8.0)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[2,8]T(1,0)", 4),
        ("mesh['a'=8,'b'=1,'c'=2] {'a'}", 8),
        ("mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", 2),
        ("mesh['a'=8,'b'=2] {'a':(2)4}", 4),
        ("{}", 16),
    ],
)
def test_groups_of_a_collective(groups, size):
    module = HloModule("HloModule x, num_partitions=16\n")
    assert (
        module.group_size(f"channel_id=1, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true")
        == size
    )


def sums(result):
    """Returns the shapes of all arrays that a compiled step sums over chips, as one text."""
    return " ".join(c["shape"] for c in result["collectives"] if c["kind"] in ("all-reduce", "reduce-scatter"))


@needs_libtpu
def test_a_tiny_model_on_four_chips(tmp_path, capsys):
    result = figures(tmp_path, "--topology=v5e:2x2", "--config.model.dtype=bfloat16")
    memory = result["memory"]
    assert result["fits"] and result["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1} and result["unknown_loops"] == 0
    assert memory["alias"] >= 0.9 * memory["state"], "the step reuses the memory of the state"
    assert memory["argument"] >= memory["state"] + memory["batch"] and memory["temp"] > 0
    assert result["flops"] == pytest.approx(result["model_flops"] / 4, rel=0.05)
    # The gradients of all parameters, half of the state (SGD), are summed over the four chips.
    summed = sum(c["count"] * c["sent"] for c in result["collectives"] if c["kind"] == "all-reduce")
    assert summed == pytest.approx(2 * 3 / 4 * memory["state"] / 2, rel=0.1) and {
        c["group"] for c in result["collectives"]
    } == {4}
    assert "f32[" in sums(result) and "bf16[" not in sums(result), "every sum over examples is in float32"
    assert 0 < result["estimate"]["at_best"]["seconds"] < result["estimate"]["one_by_one"]["seconds"]
    output = capsys.readouterr().out
    assert "it fits" in output
    check_cycles(result, output)


def check_cycles(result, output):
    """The compiler's estimate in the figures of a step and in its report."""
    cycles, by = result["cycles"], result["estimate"]["compiler"]
    assert by["seconds"] == pytest.approx(cycles["total"] / 1.5e9)
    assert by["seconds"] > result["estimate"]["one_by_one"]["seconds"], "the bounds stay below it"
    for sums in (cycles["parts"], cycles["bases"]):
        assert sum(sums.values()) == pytest.approx(cycles["total"])
    rows = cycles["instructions"]
    assert sum(row["times"] * row["cycles"] for row in rows) == pytest.approx(cycles["total"])
    parts = {"attention", "MLP", "norms", "embedding", "projection", "loss", "optimizer", "copies", "collectives"}
    assert parts <= cycles["parts"].keys() and cycles["parts"].get("other", 0) < 0.1 * cycles["total"]
    assert cycles["backward"]["optimizer"] == 0 < cycles["backward"]["attention"] < cycles["parts"]["attention"]
    assert f"by the compiler's estimate: {1e3 * by['seconds']:.1f} ms" in output and "\n  attention " in output
    hours = [line for line in output.splitlines() if "chip-hours" in line]
    assert len(hours) == 1 and f"MFU {by['mfu']:.0%}" in hours[0], "hours follow the compiler's estimate"
    # Without a clock the report counts cycles.
    topology, c = compile_lib.parse_topology("tpu7x:2x2x1"), config.load(CLIP, TINY)
    estimate = estimates.estimate(topology, c, result, result["model_flops"])
    assert "compiler" not in estimate
    lines = list(estimates.describe(topology, c, result | {"estimate": estimate}, result["model_flops"]))
    assert any("Mcycles" in line for line in lines) and sum("chip-hours" in line for line in lines) == 2


@needs_libtpu
def test_two_slices_sum_their_gradients_over_the_network_between_them(tmp_path, capsys):
    # The compiler pads what is small, and small parameters lie whole on each chip.
    wide = [f"--config.model.{tower}.{size}" for tower in ("image", "text") for size in ("width=256", "mlp_dim=1024")]
    result = figures(tmp_path, "--topology=v5e:2x2*2", "--config.mesh.fsdp=4", *wide)
    assert result["fits"] and result["chips"] == 8 and result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert {c["group"] for c in result["collectives"]} == {4}, "parameters are gathered within a slice"
    # A chip's part of the gradients, a quarter of them, once. SGD's state holds two numbers for each parameter.
    gradients = result["memory"]["state"] / 2
    assert gradients < result["between_slices"] < 2 * gradients
    assert "sent to other slices: 0.00 GB" in capsys.readouterr().out


@needs_libtpu
def test_every_loop_of_a_step_is_counted(tmp_path):
    """Two micro-batches of scanned blocks add one forward pass, a third of the model's own work."""
    flags = "micro_batches=2 model.scan=true model.image.depth=4 model.text.depth=3 mesh.fsdp=2".split()
    flags += ["model.dtype=bfloat16", "optim.grad_dtype=bfloat16"]
    result = figures(tmp_path, "--topology=v5e:2x2", *(f"--config.{f}" for f in flags))
    assert "bf16[32,64]" in sums(result) and not re.search(r"bf16\[[34],32\]", sums(result)), "kernels, not biases"
    assert (
        result["flops"] * 4 == pytest.approx(result["model_flops"] * 4 / 3, rel=0.02) and result["unknown_loops"] == 0
    )
    assert {
        c["group"] for c in result["collectives"] if c["kind"] == "all-gather" and c["shape"].startswith("bf16")
    } == {2}


@needs_libtpu
def test_what_does_not_fit(tmp_path, capsys):
    result = figures(tmp_path, "--topology=v5e:2x2", f"--config.data.batch_size={2**27}", status=1)
    output = capsys.readouterr().out
    assert not result["fits"] and "Ran out of memory on HBM" in result["compiler"] and result["compiler"] in output
    assert "--config.model.remat=full" in output and "--config.micro_batches=" in output


@needs_libtpu
def test_a_step_that_the_compiler_accepts_may_need_more_than_the_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compile_lib, "compile_for_tpu", lambda *_: {"memory": dict(total=18 * 2**30, temp=15 * 2**30)})
    result = figures(tmp_path, "--topology=v5e:2x2", status=1)
    assert not result["fits"] and "add up to 18.00 GiB of 16.00 GiB" in capsys.readouterr().out


@needs_libtpu
def test_a_slice_that_cannot_be_built(capsys):
    assert command("--topology=v5e:3x3") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --topology=v5e:3x3: ") and error.count("\n") == 1


def test_variants_start_with_the_cheapest():
    topology, c = compile_lib.parse_topology("v5e:4x4"), config.load(CLIP, ["data.batch_size=4096"])
    tries = [overrides for overrides, _ in estimates.variants(c, topology, 8e9, 40e9)]
    assert tries[0] == ["mesh.fsdp=16"] and tries[1:3] == [["model.remat=dots"], ["model.remat=full"]]
    # 8 GB + 40 GB / 8 is below 90 % of 16 GiB.
    assert tries[3:] == [["micro_batches=8"], ["micro_batches=8", "model.remat=full"]]
    c.model.scan = True
    tries = [overrides for overrides, _ in estimates.variants(c, topology, 1e9, 1e15)]
    assert tries[0] == ["model.scan=false"]
    assert ["micro_batches=256"] in tries, "one example at a time on each chip, when nothing is enough"
    c.mesh.tensor, c.model.scan = 2, False
    assert estimates.variants(c, topology, 8e9, 40e9)[0][0] == ["mesh.fsdp=8"]
    c.mesh.data = 8  # leaves nothing for fsdp
    assert estimates.variants(c, topology, 8e9, 40e9)[0][0] == ["model.remat=dots"]


def test_search_stops_at_the_first_that_fits(monkeypatch):
    compiled = []

    def fake(program, *_):
        compiled.append((program.config.model.remat, program.config.micro_batches))
        if program.config.model.remat == "dots":
            raise UserError("it does not fit the mesh")
        if program.config.micro_batches == 1:
            raise compile_lib.DoesNotFit.of_compiler(
                "RESOURCE_EXHAUSTED: total memory required (24.00G) exceeds available HBM (15.75G)."
            )
        return {"memory": {"total": 1e9}}

    monkeypatch.setattr(compile_lib, "compile_for_tpu", fake)
    args = compile_lib.parse_args([f"--config={CLIP}", "--topology=v5e:2x2", *(f"--config.{o}" for o in TINY)])
    tries = [([o], "") for o in ("model.remat=dots", "model.remat=full", "micro_batches=2", "micro_batches=4")]
    lines = []
    found = compile_lib.search(args, compile_lib.parse_topology("v5e:2x2"), None, tries, lines.append)
    assert found["overrides"] == ["micro_batches=2"] and compiled == [("dots", 1), ("full", 1), ("none", 2)]
    assert "the mesh" in lines[0] and "24.00G" in lines[1] and "6%" in lines[2]


def test_the_size_in_the_message_of_the_compiler():
    error = compile_lib.DoesNotFit.of_compiler(
        "RESOURCE_EXHAUSTED: E1000: HLO temporaries (1.50T) exceeds available HBM (15.75G).\nSee the manual"
    )
    assert error.temporary == 1.5 * 2**40 and str(error).endswith("(15.75G).")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "variant, flags", [("b16", []), ("l14", ["--config.model.remat=full", "--config.model.scan=true"])]
)
def test_pods(variant, flags, tmp_path):
    path = tmp_path / "figures.json"
    assert compile_lib.main([f"--config={CLIP}:{variant}", "--topology=v5e:16x16", f"--json={path}", *flags]) == 0
    result = json.loads(path.read_text())
    assert result["memory"]["total"] < 0.9 * 16 * 2**30
    embeddings = 32768 * config.load(f"{CLIP}:{variant}").model.embed_dim * 4
    for c in result["collectives"]:
        assert c["kind"] != "all-gather" or c["sent"] < embeddings, f"gathers activations over the batch: {c}"
