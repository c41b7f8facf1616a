"""Gradients under bfloat16: as accurate as the products allow, because every sum over examples is in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import initialise, tiny_method

from clip_jax import plugins
from clip_jax.program import make_program
from clip_jax.runtime.sharding import id_words, path_name
from clip_jax.training.step import make_gradients, make_step

METHODS = sorted(set(plugins.names("clip_jax.methods", "make")) - {"classify"})  # it starts from weights
#: At their initial parameters, rounding the parameters of these methods to bfloat16, with all arithmetic in float32,
#: changes gradients by more than 3 %: batch norm divides nearly equal embeddings by their small spread, and FILIP's
#: maximum changes its argument. Random cotangents of the features replace those of their losses.
SENSITIVE = ("align", "declip", "filip", "oner", "pyramidclip")
#: Towers with batch norm, which under the statistics of a batch are sensitive in the same way.
BATCH_NORM = ("align", "pyramidclip")
#: Masked language modelling takes the states of chosen tokens: its transpose writes each of them once.
SCATTERS = {"declip": {"scatter"}, "oner": {"scatter"}}
#: Gradients that are zero in theory: the softmax does not change with a bias of the keys.
ZERO = r"/key/bias$"
#: Sums of terms that nearly cancel, such as the signs of absolute errors.
CANCELLING = r"/se_reduce/bias$|^mim/"
EXAMPLES = 1024


def random_batch(method, eot_id):
    """A batch with 12,288 tokens of text, some of them frequent, and at least 4,096 patches of images."""
    rng = np.random.default_rng(0)
    batch = {"example_id": id_words(np.arange(EXAMPLES))}
    for name, spec in method.batch_spec(EXAMPLES).items():
        if spec.dtype == np.uint8:
            batch[name] = rng.integers(0, 256, spec.shape, np.uint8)
        elif spec.dtype == np.float32:
            batch[name] = rng.random(spec.shape, np.float32)
        elif name != "example_id":
            batch[name] = np.minimum(rng.zipf(1.5, spec.shape) + 8, 3000).astype(np.int32)
            batch[name][..., -3:] = max(eot_id, 0)
    return batch


def gradients(name, dtype):
    """`{path: gradient}` of a method's loss, or of random products of its features, at its initial parameters."""
    _, method, params, extra, tokenizer = tiny_method(name, f"data.batch_size={EXAMPLES}", dtype=dtype)
    batch, rng = random_batch(method, tokenizer.eot_id), jax.random.key(1)

    def products(params, extra, batch):
        features, _ = method.encode(params, extra, method.prepare(batch, rng), rng, train=name not in BATCH_NORM)
        floats = [x for x in jax.tree.leaves(features) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.sum(x * jax.random.normal(jax.random.key(i), x.shape)) for i, x in enumerate(floats))

    def of_loss(params, extra, batch):
        return make_gradients(method, 1)(params, extra, method.prepare(batch, rng), rng, lambda params: params)[-1]

    function = jax.grad(products) if name in SENSITIVE else of_loss
    tree = jax.device_get(jax.jit(function)(params, extra, batch))
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", METHODS)
def test_a_bfloat16_gradient_is_within_3_percent(name):
    expected, found = gradients(name, "float32"), gradients(name, "bfloat16")
    norms = {path: np.linalg.norm(x) for path, x in expected.items() if not re.search(ZERO, path)}
    norms = {path: norm for path, norm in norms.items() if norm > 0}  # what only the loss uses has no product
    assert len(norms) > 8 and any("embed" in path for path in norms) == (name != "clippo")
    for path, norm in norms.items():
        error = np.linalg.norm(found[path] - expected[path]) / norm
        assert error < (0.1 if re.search(CANCELLING, path) else 0.03), f"{path}: {error:.1%}"


@pytest.mark.parametrize("name", METHODS)
def test_no_program_sums_examples_in_bfloat16(name):
    """Neither for CPU nor GPU nor TPU: sums over examples and scatters into tables have a float32 accumulator."""
    (c, *_), (_, _, params, extra, _) = (
        tiny_method(name, f"data.batch_size={EXAMPLES}", dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    program = make_program(c)
    made_in_float32 = jax.tree.map(lambda x: x.dtype, (params, extra))
    assert jax.tree.map(lambda x: x.dtype, (program.state.params, program.state.extra)) == made_in_float32
    step = jax.jit(make_step(program.config, program.method, program.tx))
    text = step.trace(program.state, program.batch).lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    sums = re.findall(r"applies stablehlo.add across dimensions = \[([\d, ]+)\] : \(tensor<\d+x[^,]*bf16>", text)
    assert not [axes for axes in sums if axes.startswith("0")]
    assert "bf16" in text
    for operation in re.finditer(
        r'"stablehlo\.(scatter|all_reduce|reduce_scatter)"\(([^\n]*)\n\s*\^bb0\(([^)]*)\)', text
    ):
        if "bf16" in operation[3]:  # of tokens of an example, each taken once (masked language modelling)
            assert operation[1] == "scatter", operation[0]


def test_a_sum_of_many_equal_terms_is_exact():
    """A bfloat16 accumulator would stop at 256."""
    from clip_jax.models.layers import Dense, Embed

    x = jnp.ones((4096, 8), jnp.bfloat16)
    dense = Dense(4, dtype=jnp.bfloat16)
    params = initialise(dense.init, x)
    grads = jax.grad(lambda p: dense.apply(p, x).astype(jnp.float32).sum())(params)["params"]
    np.testing.assert_array_equal(grads["bias"], np.full(4, 4096.0))
    np.testing.assert_array_equal(grads["kernel"], np.full((8, 4), 4096.0))
    embed = Embed(3, 4, jnp.bfloat16)
    ids = jnp.ones(4096, jnp.int32)
    params = initialise(embed.init, ids)
    grads = jax.grad(lambda p: embed.apply(p, ids).astype(jnp.float32).sum())(params)["params"]["embedding"]
    np.testing.assert_array_equal(grads, np.outer([0, 4096.0, 0], np.ones(4)))
