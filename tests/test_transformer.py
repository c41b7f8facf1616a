"""The blocks that the towers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer

SIZES = dict(width=32, depth=2, heads=2, mlp_dim=64, embed_dim=8)
IDS = jnp.array([[5, 9, 2, 9, 1], [9, 3, 4, 5, 0], [1, 2, 3, 4, 9]])  # 9 ends a text
IMAGES = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
CASES = {
    "cls": (VisionTransformer, dict(size=16, patch=8, pool="cls"), IMAGES),
    **{
        f"{pool}, {'causal' if causal else 'not causal'}, mask {mask_padding}": (
            TextTransformer, dict(vocab_size=10, context=5, eot_id=9, pool=pool, causal=causal, mask_padding=mask_padding), IDS,
        )
        for pool in ("eot", "last", "first") for causal in (True, False) for mask_padding in (True, False)
    },
}  # fmt: skip


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_without_tokens_the_last_block_does_less_and_the_result_is_the_same(case, remat):
    if remat == "full" and case not in ("cls", "eot, causal, mask True"):
        pytest.skip("remat is the same for all")
    kind, fields, inputs = CASES[case]
    params = kind(**SIZES, **fields).init(jax.random.key(0), inputs)

    def run(tokens):
        tower = kind(**SIZES, **fields, remat=remat, tokens=tokens)
        assert (tower.apply(params, inputs)[1] is None) is not tokens
        both = jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(tower.apply(params, inputs)[0])))).lower(params).compile()
        return both.cost_analysis()["flops"], both(params)

    (flops, expected), (fewer, found) = run(True), run(False)
    assert fewer < 0.9 * flops
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("fields", [dict(scan=True), dict(depth=0), dict(pool="gap")])
def test_where_every_token_is_needed_nothing_changes(fields):
    sizes = SIZES | dict(size=16, patch=8) | fields
    params = VisionTransformer(**sizes).init(jax.random.key(0), IMAGES)
    z, tokens = VisionTransformer(**sizes, tokens=False).apply(params, IMAGES)
    np.testing.assert_array_equal(z, VisionTransformer(**sizes).apply(params, IMAGES)[0])
    assert tokens is None
