"""The transformer blocks of the towers: the shortened last block, and attention on GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO
from helpers import unit
from model_helpers import initialise

from clip_jax import config
from clip_jax.models import common, layers, transformer
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer
from clip_jax.program import jaxpr_flops, make_program
from clip_jax.runtime import sharding
from clip_jax.training.step import make_step

SIZES = dict(width=32, depth=2, heads=2, mlp_dim=64, embed_dim=8)
IDS = np.array([[5, 9, 2, 9, 1], [9, 3, 4, 5, 0], [1, 2, 3, 4, 9]])  # 9 is the end-of-text token
IMAGES = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)
CASES = {
    "cls": (VisionTransformer, dict(size=16, patch=8, pool="cls"), IMAGES),
    **{
        f"{pool}, {'causal' if causal else 'not causal'}, mask {mask_padding}": (
            TextTransformer,
            dict(vocab_size=10, context=5, eot_id=9, pool=pool, causal=causal, mask_padding=mask_padding),
            IDS,
        )
        for pool in ("eot", "last", "first") for causal in (True, False) for mask_padding in (True, False)
    },
}  # fmt: skip


REMAT_AND_SCAN = [
    (case, how)
    for case in ("cls", "eot, causal, mask True")
    for how in (dict(remat="full"), dict(scan=True), dict(scan=True, remat="full"))
]


@functools.cache
def initial(kind):
    """The parameters of a tower, which are the same in all its cases."""
    fields, inputs = next((fields, inputs) for other, fields, inputs in CASES.values() if other is kind)
    return initialise(kind(**SIZES, **fields).init, inputs)


def trace_gradient(case, tokens, params, **how):
    """Traces the loss of a tower's embeddings and its gradient, as a function of the parameters."""
    kind, fields, inputs = CASES[case]

    def loss(params):
        z, found = kind(**SIZES, **fields, **how, tokens=tokens).apply(params, inputs)
        assert (found is None) is not tokens
        return jnp.sum(jnp.sin(z))

    return jax.jit(jax.value_and_grad(loss)).trace(params)


def run_traced(traced, params):
    return traced.lower().compile()(params)


@functools.cache
def whole(case):
    """Returns `(traced, (value, gradient))` of a tower that returns its tokens. Every block has its own name."""
    params = initial(CASES[case][0])
    traced = trace_gradient(case, True, params)
    return traced, run_traced(traced, params)


@pytest.mark.parametrize("case, how", [*((case, {}) for case in CASES), *REMAT_AND_SCAN], ids=str)
def test_without_tokens_the_last_block_computes_less_with_the_same_result(case, how):
    kind, fields, inputs = CASES[case]
    like = jax.eval_shape(kind(**SIZES, **fields, **how).init, jax.random.key(0), inputs)
    params = transformer.stack_layers(initial(kind), like)
    plain, expected = whole(case)
    with_tokens = trace_gradient(case, True, params, **how) if how else plain
    without = trace_gradient(case, False, params, **how)
    assert jaxpr_flops(without.jaxpr) < 0.9 * jaxpr_flops(with_tokens.jaxpr)
    value, grads = run_traced(without, params)
    found = value, transformer.unstack_layers(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("fields", [dict(depth=0), dict(pool="gap"), dict(pool="gap", scan=True)])
def test_the_last_block_is_whole_where_every_token_is_needed(fields):
    sizes = SIZES | dict(size=16, patch=8) | fields

    @jax.jit
    def run(key):
        params = VisionTransformer(**sizes).init(key, IMAGES)
        return [VisionTransformer(**sizes, **tokens).apply(params, IMAGES) for tokens in ({}, {"tokens": False})]

    (expected, _), (z, tokens) = run(jax.random.key(0))
    np.testing.assert_array_equal(z, expected)
    assert tokens is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [5, 6])
def test_attention_on_padded_sequences_is_attention(tokens, causal):
    inputs = np.random.default_rng(2).normal(size=(4, 2, tokens, 3, 8)).astype(np.float32)

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda qkv: jnp.sum(inputs[3] * attend(*qkv))))(inputs[:3])

    expected = run(lambda q, k, v: transformer.attend(q, k, v, causal=causal))
    found = run(lambda q, k, v: transformer.attend_even(q, k, v, causal, "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.fixture
def gpu(monkeypatch):
    """Lowers programs for a GPU without one: answers JAX's checks of the device."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


PAPER = """model.image.pool=cls model.image.cls_token=true
    model.text.pool=eot model.text.causal=true model.text.mask_padding=false model.text.depth=3""".split()


@pytest.mark.parametrize(
    ("method", "overrides", "fused"),
    [
        ("clip.py:emoji", PAPER, 1 + 2),  # all except the last blocks, which have one query
        ("clip.py:emoji", [], 2),  # the text tower has an attention mask
        ("siglip.py", [], 2),
        ("align.py", [], 0),
        ("oner.py", [], 0),
    ],
)
def test_every_step_is_a_program_for_gpus(gpu, method, overrides, fused):
    """Lowering fails where JAX refuses the gradient of cuDNN attention, for example for an odd number of tokens."""
    program = make_program(
        config.load(f"{REPO}/configs/{method}", ["model.dtype=bfloat16", "data.batch_size=16", *overrides])
    )
    step = jax.jit(make_step(program.config, program.method, program.tx))
    text = step.trace(program.state, program.batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmha") == 2 * fused, "one call forward and one backward for each fused attention"


def test_blocks_keep_the_tokens_of_an_example_together_on_a_gpu(mesh8, monkeypatch):
    """Without a constraint XLA makes the batch contiguous, for the gradient of the positions (`common.row_major`)."""
    monkeypatch.setattr(common, "platform", lambda: "gpu")
    program = make_program(config.load(f"{REPO}/configs/clip.py:emoji", ["model.dtype=bfloat16"]))
    step = jax.jit(make_step(program.config, program.method, program.tx))
    lowered = step.trace(program.state, program.batch).lower(lowering_platforms=("cuda",))
    blocks = program.config.model.image.depth + program.config.model.text.depth
    assert lowered.as_text().count("@LayoutConstraint") == 2 * blocks, "one forward and one backward for each block"


def test_a_constraint_of_the_layout_moves_nothing_between_devices(mesh8):
    def values(x, gradient):
        y, transpose = jax.vjp(common._row_major, x)
        return y, *transpose(gradient)

    split = sharding.batch_sharding(mesh8)
    x, gradient = (jax.device_put(unit(seed, 8, 3, 4), split) for seed in (0, 1))
    compiled = jax.jit(values).lower(x, gradient).compile()
    assert not re.search("all-gather|all-reduce|all-to-all", compiled.as_text())
    for found, expected in zip(compiled(x, gradient), (x, gradient), strict=True):
        np.testing.assert_array_equal(found, expected)
    odd = x[:3]  # the mesh does not divide it
    np.testing.assert_array_equal(common._row_major(odd), odd)


@pytest.mark.parametrize("causal", [False, True])
def test_float16_attention_runs_on_every_device(causal):
    full = np.random.default_rng(0).normal(size=(3, 2, 5, 2, 8)).astype(np.float32)
    half = full.astype(np.float16)
    attend = jax.jit(functools.partial(transformer.attend, causal=causal))
    z = attend(*half)
    assert z.dtype == jnp.float16
    np.testing.assert_allclose(z, attend(*full), atol=5e-3)
    gradient = jax.jit(jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum()))(*half)
    assert gradient.dtype == jnp.float16 and np.isfinite(gradient).all()


def test_a_product_in_float32_keeps_the_bits_that_bfloat16_loses():
    x, kernel = jnp.asarray(unit(0, 5, 32), jnp.bfloat16), unit(1, 32, 7) * 20
    exact = x.astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(product, x, kernel):
        return jax.grad(lambda *a: (product(*a).astype(jnp.float32) * jnp.arange(7)).sum(), (0, 1))(x, kernel)

    found = jax.jit(layers.float32_matmul)(x, kernel)
    assert found.dtype == jnp.float32 and not np.allclose(layers.matmul(x, kernel), exact, rtol=1e-4)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    for ours, expected in zip(
        gradients(layers.float32_matmul, x, kernel), gradients(layers.matmul, x, kernel), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(layers.float32_matmul(kernel.T, kernel), kernel.T @ kernel)
