"""The training step: one and eight devices, moving average, constraints, frozen parameters, bad updates, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAMW, tiny_config
from model_helpers import BATCH, run_steps, starting_state

from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import UserError
from clip_jax.runtime import sharding
from clip_jax.training.schedules import make_schedule
from clip_jax.training.step import first_state, make_gradients, make_init, make_step, short_random, state_shapes


def setup(*overrides):
    from clip_jax import config
    from clip_jax.methods.interface import make_method

    c = config.resolve(tiny_config(*overrides), make_tokenizer("sentencepiece"))
    return c, make_method(c)


@pytest.fixture(scope="module")
def one_device():
    c, method = setup("optim.ema_decay=0.5", "model.image.patch_drop=0.25")
    return (c, method, *run_steps(c, method, None, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def compiled():
    """A first state, as NumPy arrays, and the compiled step, to which a state is donated."""
    c, method = setup()
    state, tx = starting_state(c, method)
    return state, jax.jit(make_step(c, method, tx), donate_argnums=0).lower(state, BATCH).compile()


@pytest.mark.parametrize(
    "data, fsdp, tensor, micro_batches",
    [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 1, 1, 2), (1, 1, 1, 4), (2, 1, 4, 4)],
)
def test_any_mesh_and_micro_batches_give_the_result_of_one_device(one_device, data, fsdp, tensor, micro_batches):
    c, method, expected, expected_state = one_device
    c = c.copy_and_resolve_references()
    c.micro_batches = micro_batches
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    history, state = run_steps(c, method, sizes, devices=jax.devices()[:1] if data * fsdp * tensor == 1 else None)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "param_norm", "logit_scale"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("scan, block", [(False, "block_0"), (True, "block")])
def test_state_is_spread_over_the_mesh(scan, block):
    c, method = setup(*ADAMW, f"model.scan={scan}")
    _, state = run_steps(c, method, dict(data=1, fsdp=4, tensor=2), steps=1)
    kernel = state.params["img"][block]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if sharding.path_name(path).endswith(f"img/{block}/mlp/fc1/kernel")
    ]
    assert len(moments) == 2 and all(x.sharding == kernel.sharding for x in moments)


def test_the_moving_average_follows_the_weights(one_device):
    c, method, _, _ = one_device
    _, after_one = run_steps(c, method, None, steps=1, devices=jax.devices()[:1])
    trees = jax.device_get((after_one.ema, starting_state(c, method)[0].params, after_one.params))
    for e, p0, p1 in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(e, 0.5 * p0 + 0.5 * p1, atol=1e-6)


@pytest.mark.parametrize("scale, expected", [(6.0, np.log(100)), (-1.0, 0.0)])
def test_the_logit_scale_is_clamped_after_a_step(compiled, scale, expected):
    state, step = compiled
    state, _ = step(state.replace(params=state.params | {"logit_scale": np.float32(scale)}), BATCH)
    np.testing.assert_allclose(state.params["logit_scale"], expected, atol=1e-4)


def test_frozen_parameters_do_not_move():
    c, method = setup("optim.freeze=^img/")
    before = starting_state(c, method)[0].params
    _, state = run_steps(c, method, None, steps=2, devices=jax.devices()[:1])
    for a, b in zip(jax.tree.leaves(before["img"]), jax.tree.leaves(state.params["img"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(before["txt"]), jax.tree.leaves(state.params["txt"]), strict=True)
    )


def test_a_non_finite_update_is_skipped_and_counted():
    c, method = setup(*ADAMW, "optim.schedule=linear")

    def bad_loss(params, extra, features, batch, rng):
        loss, metrics = method.loss(params, extra, features, batch, rng)
        return jnp.where(batch["example_id"][0, 0] == 99, jnp.nan, 1.0) * loss, metrics

    bad = dataclasses.replace(method, loss=bad_loss)
    state, tx = starting_state(c, bad)
    step = jax.jit(make_step(c, bad, tx))
    poison = {**BATCH, "example_id": np.full_like(BATCH["example_id"], 99)}
    after, metrics = step(state, poison)
    assert metrics["bad_steps"] == 1 and after.step == 1
    for a, b in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((after.params, after.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    after, metrics = step(after, poison)
    assert metrics["bad_steps"] == 2
    after, metrics = step(after, BATCH)
    assert metrics["bad_steps"] == 0 and np.isfinite(metrics["loss"])
    # The rate that is logged is applied: the number of steps drives it, and not that of updates.
    rate = make_schedule(c.optim, c.train.steps)
    assert metrics["lr"] == rate(2) < 0.8 * rate(0)

    @jax.jit
    def gradient(params):
        rng = jax.random.key(0)
        return make_gradients(method, 1)(params, state.extra, BATCH, rng, lambda p: p)[-1]["logit_scale"]

    moved = float(after.params["logit_scale"]) - float(state.params["logit_scale"])
    assert gradient(state.params) and abs(abs(moved) / float(metrics["lr"]) - 1) < 1e-2, (
        "Adam's first update has size lr"
    )


def temporary_bytes(*overrides):
    """The bytes of temporaries of the compiled step, on one device."""
    c, method = setup("model.image.depth=3", "model.text.depth=3", "data.batch_size=64", *overrides)
    batch = {name: jax.ShapeDtypeStruct((64, *x.shape[1:]), x.dtype) for name, x in BATCH.items()}
    init, tx = make_init(c, method, batch)
    state = state_shapes(init)
    return (
        jax.jit(make_step(c, method, tx), donate_argnums=0)
        .lower(state, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_micro_batches_and_recomputation_save_memory():
    plain = temporary_bytes()
    assert temporary_bytes("micro_batches=4") < 0.6 * plain
    assert temporary_bytes("model.remat=full", "model.scan=true") < 0.6 * plain


def test_the_state_is_donated(compiled):
    state, step = compiled
    assert step.memory_analysis().alias_size_in_bytes >= sum(
        x.nbytes for x in jax.tree.leaves((state.params, state.opt_state))
    )


@pytest.mark.parametrize(
    "sizes, message",
    [(dict(data=3, fsdp=1, tensor=1), "does not fit 8"), (dict(data=-1, fsdp=-1, tensor=1), "at most one may be -1")],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes)


def test_a_batch_that_the_devices_do_not_divide(mesh8):
    sharding.check_batch(16, mesh8)
    with pytest.raises(UserError, match="data.batch_size=18 is not divisible by the 4 devices"):
        sharding.check_batch(18, mesh8)


def test_the_first_state_on_a_mesh_is_that_of_one_device(mesh8):
    """Its shapes, those for the optimizer and the state itself come from one trace of the model."""
    c, method = setup()
    traces = []

    def traced_init(rng, batch):
        traces.append(rng)
        return method.init(rng, batch)

    init, _ = make_init(c, dataclasses.replace(method, init=traced_init), BATCH)
    shapes = state_shapes(init)
    split = first_state(init, jax.random.key(0), sharding.state_shardings(shapes, mesh8, method.sharding_rules))
    assert len(traces) == 1
    alone = jax.jit(init)(jax.random.key(0))
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(split.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(split), jax.device_get(alone))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), alone)
    by_helper, _ = starting_state(c, method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), by_helper, jax.device_get(alone))


def test_the_first_state_of_a_gpu_is_a_short_program():
    """Within `short_random` the draws are calls of a kernel. In the step, which devices share, they are spelled out."""

    def program():
        draw = jax.jit(lambda key: jax.random.normal(key, (3,)))
        return draw.trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()

    with short_random():
        short = program()
    assert "cu_threefry2x32" in short and "cu_threefry2x32" not in program()
