"""Optimizers against golden trajectories and formulas; schedules; regular expressions on parameter paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden_files

from clip_jax import config
from clip_jax.errors import UserError
from clip_jax.training import optimizers

PARAMS = {
    "img": {"proj": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}},
    "txt": {"ln": {"scale": jnp.ones(3)}},
    "logit_scale": jnp.ones(()),
}
GRADS = jax.tree.map(lambda x: 0.1 * jnp.arange(1.0, x.size + 1).reshape(x.shape), PARAMS)


def optim(**changes):
    o = config.base().optim
    o.update(dict(schedule="constant", warmup_steps=0, lr=0.1, **changes))
    return o


def after(o, steps=3, params=PARAMS, grads=GRADS):
    tx = optimizers.make_optimizer(o, 100, params)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_adamw_is_its_formula():
    params, _ = after(optim(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2))
    g, w, m, v = np.asarray(GRADS["img"]["proj"]["kernel"]), np.ones((4, 3)), 0, 0
    for t in (1, 2, 3):
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6) + 0.2 * w)
    np.testing.assert_allclose(params["img"]["proj"]["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize("path", golden_files("optim_lamb_optax.npz"))
def test_lamb_golden(path):
    g = np.load(path)
    o = optim(
        name="lamb",
        b1=float(g["beta1"]),
        b2=float(g["beta2"]),
        eps=float(g["eps"]),
        weight_decay=float(g["weight_decay"]),
        no_decay=(),
    )
    o.lr = float(g["lr"])
    params = {name: jnp.asarray(g[f"init_{name}"]) for name in ("kernel", "bias")}
    tx = optimizers.make_optimizer(o, 100, params)
    state = tx.init(params)
    for step in range(len(g["grads_kernel"])):
        updates, state = tx.update({name: g[f"grads_{name}"][step] for name in params}, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in params.items():
            np.testing.assert_allclose(value, g[f"param_{name}"][step], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stack", ["block", "mbconv_2_to_3"])
def test_lamb_takes_the_norm_of_each_stacked_layer(stack):
    layers = [jnp.arange(1.0, 7).reshape(2, 3), jnp.full((2, 3), 0.01)]
    single, stacked = {"img": {"a": layers[0], "b": layers[1]}}, {"img": {stack: jnp.stack(layers)}}
    o = optim(name="lamb", no_decay=())

    def step(params):
        tx = optimizers.make_optimizer(o, 100, params)
        return tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)[0]["img"]

    np.testing.assert_allclose(step(stacked)[stack], jnp.stack([step(single)["a"], step(single)["b"]]), rtol=1e-6)
    assert optimizers.make_optimizer(
        optim(name="lamb", freeze=("^img/x",)), 100, stacked | {"img": stacked["img"] | {"x": layers[0]}}
    )


@pytest.mark.parametrize("path", golden_files("optim_bv_adafactor.npz"))
@pytest.mark.parametrize(
    "momentum, prefix, tolerance", [(None, "update_nomomentum_", (1e-3, 1e-4)), (0.9, "update_", (2e-2, 2e-2))]
)
def test_adafactor_golden(path, momentum, prefix, tolerance):
    g = np.load(path)
    names = ("kernel", "small", "bias", "attn")
    params = {name: jnp.asarray(g[f"init_{name}"]) for name in names}
    tx = optimizers.scale_by_adafactor(momentum=momentum)
    state = tx.init(params)
    for step in range(len(g["grads_kernel"])):
        updates, state = tx.update({name: jnp.asarray(g[f"grads_{name}"][step]) for name in names}, state, params)
        for name in names:
            np.testing.assert_allclose(updates[name], g[prefix + name][step], rtol=tolerance[0], atol=tolerance[1])


def test_sgd_has_momentum():
    params, _ = after(optim(name="sgd", b1=0.9, weight_decay=0.0), steps=2)
    np.testing.assert_allclose(
        params["txt"]["ln"]["scale"], 1 - 0.1 * (1 + 1.9) * np.asarray(GRADS["txt"]["ln"]["scale"]), rtol=1e-6
    )


def test_gains_biases_and_the_scale_are_not_decayed():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    params, _ = after(optim(weight_decay=0.2), steps=1, grads=zero)
    np.testing.assert_allclose(params["img"]["proj"]["kernel"], 1 - 0.1 * 0.2)
    for leaf in (params["img"]["proj"]["bias"], params["txt"]["ln"]["scale"], params["logit_scale"]):
        np.testing.assert_array_equal(leaf, 1)


def test_freeze_leaves_parameters_alone_and_costs_no_state():
    params, state = after(optim(freeze=("^img/",)))
    np.testing.assert_array_equal(params["img"]["proj"]["kernel"], 1)
    assert np.abs(params["txt"]["ln"]["scale"] - 1).max() > 0.01
    assert not any(x.shape == (4, 3) for x in jax.tree.leaves(state)), "a frozen kernel has no moments"


def test_lr_mult_scales_the_update_and_zero_freezes():
    plain, _ = after(optim(name="sgd", weight_decay=0.0), steps=1)
    slow, _ = after(
        optim(name="sgd", weight_decay=0.0, lr_mult=(("bias$", 0.5), ("^img", 0.1), ("^logit", 0))), steps=1
    )
    for path, factor in (
        (("img", "proj", "bias"), 0.5),
        (("img", "proj", "kernel"), 0.1),
        (("txt", "ln", "scale"), 1.0),
        (("logit_scale",), 0.0),
    ):
        a, b = plain, slow
        for key in path:
            a, b = a[key], b[key]
        np.testing.assert_allclose(b - 1, factor * (a - 1), rtol=1e-4, atol=1e-7)


def test_clipping_by_the_global_norm():
    params, _ = after(optim(name="sgd", b1=0.0, weight_decay=0.0, grad_clip_norm=1.0), steps=1)
    moved = np.sqrt(sum(float(((p - 1) ** 2).sum()) for p in jax.tree.leaves(params)))
    np.testing.assert_allclose(moved, 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(freeze=("^image",)), "optim.freeze: '.image' matches no parameter"),
        (dict(lr_mult=(("x9", 0.1),)), "optim.lr_mult: 'x9'"),
        (dict(freeze=(".",)), "leave no parameter"),
    ],
)
def test_wrong_patterns(changes, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_optimizer(optim(**changes), 100, PARAMS)


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("linear", {4: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("constant", {0: 0.1, 10: 1.0, 110: 1.0}),
        ("rsqrt", {9: 1.0, 10: 1.0, 40: 0.5, 1000: 0.1}),
    ],
)
def test_schedules(schedule, values):
    o = optim()
    o.update(dict(schedule=schedule, warmup_steps=10, lr=1.0))
    rate = optimizers.make_schedule(o, 110)
    for step, value in values.items():
        np.testing.assert_allclose(rate(step), value, atol=1e-6)
