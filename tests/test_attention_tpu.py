"""Fused attention for TPUs: the kernels in the interpreter against plain attention, on a mesh, and compiled ahead."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from model_helpers import initialise

from clip_jax.hlo_cost import hlo_cost
from clip_jax.models import attention_tpu, transformer
from clip_jax.models.bert import BertTower
from clip_jax.models.common import platform
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer
from clip_jax.program import jaxpr_flops
from clip_jax.runtime import sharding
from clip_jax.runtime.topology import parse_topology, tpu_devices

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def tpu(monkeypatch):
    """Traces programs as for a TPU and interprets their kernels."""
    monkeypatch.setattr(transformer, "platform", lambda: "tpu")
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def plain(q, k, v, biases, heads, mask, causal):
    """Attention as `attention_tpu.attention` has it, by XLA."""
    q, k, v = (
        (x.astype(jnp.float32) + bias).astype(x.dtype).reshape(*x.shape[:2], heads, -1)
        for x, bias in zip((q, k, v), biases, strict=True)
    )
    mask = None if mask is None else mask[:, None, None]
    return transformer.attend(q, k, v, mask, causal).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize(
    ("t", "s", "heads", "width", "causal", "masked"),
    [
        (197, 197, 2, 64, False, False),
        (77, 77, 2, 64, True, False),
        (257, 257, 1, 128, False, True),
        (50, 50, 3, 64, True, True),
        (33, 20, 2, 80, False, False),
        (16, 17, 4, 32, False, True),
    ],
)
def test_kernels_are_plain_attention(tpu, t, s, heads, width, causal, masked):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.normal(size=(2, n, heads * width)).astype(np.float32) for n in (t, s, s, t))
    biases = tuple(rng.normal(size=heads * width).astype(np.float32) for _ in range(3))
    mask = np.arange(s) < np.array([[s - 3], [5]]) if masked else None

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(attention, dtype, q, k, v, biases, d_out):
        call = functools.partial(attention, heads=heads, mask=mask, causal=causal)
        out, transpose = jax.vjp(call, *(x.astype(dtype) for x in (q, k, v)), biases)
        *grads, d_biases = transpose(d_out.astype(dtype))
        # The weights do not depend on the bias of the keys: its gradient is nothing but rounding errors.
        return [x.astype(jnp.float32) for x in (out, *grads, d_biases[0], d_biases[2])], d_biases[1]

    def errors(found):
        found, wanted = jax.device_get((found, exact))
        return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, wanted, strict=True)]

    # The arrays are arguments: XLA evaluates a kernel of constants itself, and does so wrongly for bfloat16.
    arrays = q, k, v, biases, d_out
    exact, _ = run(plain, jnp.float32, *arrays)
    found, key_bias = run(attention_tpu.attention, jnp.float32, *arrays)
    assert max(errors(found)) < 3e-6 and np.abs(key_bias).max() < 1e-4
    found, key_bias = run(attention_tpu.attention, jnp.bfloat16, *arrays)
    # Both round, at different places: the ratio of their errors scatters around 1.
    ratios = np.divide(errors(found), errors(run(plain, jnp.bfloat16, *arrays)[0]))
    assert np.exp(np.log(ratios).mean()) < 1.06 and ratios.max() < 1.25, ratios
    assert np.abs(key_bias).max() < 0.3


def test_an_example_without_keys_has_no_gradient(tpu):
    x = np.random.default_rng(0).normal(size=(2, 20, 64)).astype(np.float32)

    @jax.jit
    def run(x, mask):
        out, transpose = jax.vjp(lambda q, k, v: attention_tpu.attention(q, k, v, (None,) * 3, 1, mask), x, x, x)
        return out, transpose(jnp.ones_like(out))

    out, grads = jax.device_get(run(x, np.array([[True] * 20, [False] * 20])))
    np.testing.assert_allclose(out[1], np.broadcast_to(x[1].mean(0), (20, 64)), rtol=1e-5, atol=1e-6)
    for grad in grads:
        assert not grad[1].any() and np.isfinite(grad).all()


B, T, HEADS, WIDTH = 4, 20, 4, 64
X = np.random.default_rng(0).normal(size=(B, T, HEADS * WIDTH)).astype(jnp.bfloat16)
MASK = (np.arange(T) < np.array([[20], [7], [1], [12]]))[:, None, None]


def module(attention="auto", heads=HEADS, dtype=jnp.bfloat16, remat="none", **fields):
    kind = transformer.rematerialized(transformer.Attention, remat)
    inits = transformer.block_init("timm_qk_norm", X.shape[-1], 4 * X.shape[-1], 1)
    return kind(heads, inits, dtype, attention, **fields)


def value_and_grad(module, params, x, mask=None, causal=True):
    """The output of a module, and the gradients of a function of it."""

    def loss(params, x):
        out = module.apply(params, x, x, mask, causal)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return out, grads


def four(devices, data=2):
    return sharding.make_mesh(dict(data=data, fsdp=1, tensor=4 // data), devices)


@pytest.mark.parametrize("qk_norm_eps", [None, 1e-6])
def test_the_module_has_the_same_parameters_values_and_gradients_on_any_mesh(tpu, qk_norm_eps):
    auto, xla = (module(name, qk_norm_eps=qk_norm_eps) for name in ("auto", "plain"))
    params, expected = (initialise(m.init, X, X, seed=1) for m in (auto, xla))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    expected = jax.jit(functools.partial(value_and_grad, xla))(params, X, MASK)

    def check(found):
        def near(path, x, y):
            name, x, y = jax.tree_util.keystr(path), np.float32(x), np.float32(y)
            # The weights do not depend on the last bias of the keys: its gradient is nothing but rounding errors.
            is_noise = f"['{'key_norm' if qk_norm_eps else 'key'}']['bias']" in name
            assert np.linalg.norm(x - y) < (0.1 if is_noise else 0.015 * np.linalg.norm(y)), name

        jax.tree_util.tree_map_with_path(near, found, expected)

    check(jax.jit(functools.partial(value_and_grad, auto))(params, X, MASK))
    mesh = four(jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = sharding.place(params, sharding.state_shardings(params, mesh))
        x, mask = sharding.place((X, MASK), (sharding.batch_sharding(mesh),) * 2)
        found = jax.jit(functools.partial(value_and_grad, auto))(placed, x, mask)
    check(found)


def gradient(module, *args, **kwargs):
    """The program of the gradient of a module's output, the first one of several, as a text."""
    params = jax.eval_shape(module.init, jax.random.key(0), *args)

    def call(params, *args):
        found = module.apply(params, *args, **kwargs)
        return (found[0] if isinstance(found, tuple) else found).astype(jnp.float32).sum()

    return str(jax.make_jaxpr(jax.grad(call))(params, *args))


def is_fused(*args, **kwargs):
    """Whether the gradient of a module is a program with the two kernels."""
    count = gradient(*args, **kwargs).count("pallas_call[")
    assert count in (0, 2)
    return count == 2


def test_which_remat_computes_fused_attention_again(tpu):
    programs = {remat: gradient(module(remat=remat), X, X) for remat in ("none", "dots", "full", "loop")}
    counts = {remat: program.count("pallas_call[") for remat, program in programs.items()}
    assert counts == {"none": 2, "dots": 3, "full": 3, "loop": 2}


SIZES = dict(width=128, depth=2, heads=2, mlp_dim=128, embed_dim=8, dtype=jnp.bfloat16, attention="auto")
IDS, IMAGES = np.ones((2, 6), np.int32), np.zeros((2, 16, 16, 3), np.float32)


@pytest.mark.parametrize(
    ("tower", "inputs"),
    [
        (functools.partial(VisionTransformer, size=16, patch=8), IMAGES),
        (functools.partial(TextTransformer, vocab_size=9, context=6, eot_id=8), IDS),
        (functools.partial(BertTower, vocab_size=9, context=6, eot_id=8), IDS),
    ],
)
def test_in_a_loop_the_layout_of_a_gradient_is_not_that_of_the_stacked_kernels(tpu, tower, inputs):
    def barriers(scan):
        program = gradient(tower(**SIZES, scan=scan), inputs)
        assert "pallas_call[" in program
        return program.count("= optimization_barrier")

    assert (barriers(False), barriers(True)) == (0, 3), "queries, keys and values"


def test_where_attention_is_fused(tpu, monkeypatch):
    assert is_fused(module(), X, X, MASK) and is_fused(module(), X, X[:, :7], MASK[:1, ..., :7])
    assert is_fused(module(heads=1), X, X, causal=True)
    assert not is_fused(module("plain"), X, X)
    assert not is_fused(module(dtype=jnp.float32), X, X)
    assert not is_fused(module(), X[:, :1], X), "one query"
    assert not is_fused(module(), X, X, np.ones((B, 1, T, T), bool)), "a mask of pairs"
    assert not is_fused(module(), X, X, bias=np.ones((1, HEADS, T, T), np.float32))
    assert not is_fused(module(), X, X, drop_weights=lambda weights: weights)
    long = np.zeros((1, 2000, HEADS * WIDTH), jnp.bfloat16)
    assert is_fused(module(), long[:, :500], long[:, :500]) and not is_fused(module(), long, long), "too large for VMEM"
    with jax.set_mesh(four(jax.devices()[:4], data=1)):
        assert is_fused(module(), X[:3], X[:3]) and is_fused(module(heads=2), X, X), "heads are whole on every device"
    with jax.set_mesh(four(jax.devices()[:4])):
        assert not is_fused(module(), X[:3], X[:3]), "the mesh does not divide the examples"
    monkeypatch.setattr(transformer, "platform", platform)
    assert not is_fused(module(), X, X), "not on a CPU"


def test_flops_of_the_kernels_are_counted(tpu):
    def flops(attention):
        m = module(attention)
        params = jax.eval_shape(m.init, jax.random.key(0), X, X)
        return jaxpr_flops(jax.make_jaxpr(functools.partial(value_and_grad, m))(params, X))

    again = 2 * B * HEADS * T * T * WIDTH  # the backward pass computes the scores again
    assert flops("auto") == flops("plain") + again
    with jax.set_mesh(four(jax.devices()[:4])):
        assert flops("auto") == flops("plain") + again, "on all devices together"


#: MiB of VMEM that the compiler of a v5e takes for the backward kernel (libtpu 0.0.42.1): `{(tokens, heads, width of a
#: head, columns of a block, examples): MiB}`.
TAKEN = {
    (50, 12, 64, 384, 8): 7.66, (145, 12, 64, 384, 4): 12.28, (197, 12, 64, 384, 4): 14.20,
    (256, 16, 64, 512, 2): 11.05, (257, 16, 64, 512, 2): 15.63, (257, 16, 80, 640, 1): 10.38,
    (256, 16, 72, 1152, 1): 10.76, (290, 12, 64, 384, 2): 13.30, (400, 16, 128, 256, 2): 12.82,
    (401, 12, 64, 384, 1): 13.22, (513, 12, 64, 128, 2): 14.17, (577, 16, 64, 128, 1): 7.31,
}  # fmt: skip


@pytest.mark.parametrize("shape", TAKEN, ids=str)
def test_the_kernels_take_no_more_memory_than_planned(shape):
    tokens, heads, width, columns, examples = shape
    call = attention_tpu._Call(attention_tpu._Plan(width, False), tokens, tokens, heads * width)
    assert TAKEN[shape] * 2**20 <= call.bytes(columns, examples) < 1.4 * TAKEN[shape] * 2**20
    chosen = call.columns, call.examples(64)
    assert call.bytes(*chosen) <= attention_tpu.VMEM
    if (*shape[:3], *chosen) in TAKEN:
        assert TAKEN[*shape[:3], *chosen] * 2**20 <= attention_tpu.VMEM


@needs_libtpu
@pytest.mark.parametrize("slice", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_the_compiler_of_every_chip_takes_the_kernels(slice):
    """Without a TPU; the backend of this process is a CPU."""
    mesh = four(tpu_devices(parse_topology(slice)))
    m = module()
    params = jax.eval_shape(m.init, jax.random.key(0), X, X)
    params = sharding.with_shardings(params, sharding.state_shardings(params, mesh))
    x, mask = (jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=sharding.batch_sharding(mesh)) for y in (X, MASK))
    with jax.set_mesh(mesh):
        assert platform() == "tpu"
        call = jax.jit(functools.partial(value_and_grad, m))
        text = call.lower(params, x, mask).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    flops = jaxpr_flops(jax.make_jaxpr(functools.partial(value_and_grad, module("plain")))(params, x, mask))
    assert hlo_cost(text).flops * 4 == pytest.approx(flops + 2 * B * HEADS * T * T * WIDTH, rel=0.01)
