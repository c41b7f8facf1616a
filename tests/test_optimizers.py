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
from clip_jax.training.schedules import make_momentum_schedule, make_schedule

PARAMS = {
    "img": {"proj": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}},
    "txt": {"ln": {"scale": np.ones(3, np.float32)}},
    "logit_scale": np.ones((), np.float32),
}
GRADS = jax.tree.map(lambda x: np.float32(0.1) * np.arange(1, x.size + 1, dtype=x.dtype).reshape(x.shape), PARAMS)


def optim(**changes):
    o = config.base().optim
    o.update(dict(schedule="constant", warmup_steps=0, lr=0.1, **changes))
    return o


def make_step(tx):
    """Returns a compiled step of an optimizer, `(params, state, grads) -> (params, state)`."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def after(o, steps=3, params=PARAMS, grads=GRADS):
    tx = optimizers.make_optimizer(o, 100, params)
    step, state = make_step(tx), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, grads)
    return jax.device_get((params, state))


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
    assert_follows(o, {name: g[f"init_{name}"] for name in ("kernel", "bias")}, g)


def assert_follows(o, params, golden):
    """Checks the parameters after each step of a golden trajectory."""
    tx = optimizers.make_optimizer(o, 100, params)
    step, state = make_step(tx), tx.init(params)
    for i in range(len(golden["grads_kernel"])):
        params, state = step(params, state, {name: golden[f"grads_{name}"][i] for name in params})
        for name, value in params.items():
            np.testing.assert_allclose(value, golden[f"param_{name}"][i], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("stack", ["block", "mbconv_2_to_3"])
def test_lamb_takes_the_norm_of_each_stacked_layer(stack):
    layers = [np.arange(1, 7, dtype=np.float32).reshape(2, 3), np.full((2, 3), 0.01, np.float32)]
    single, stacked = {"img": {"a": layers[0], "b": layers[1]}}, {"img": {stack: np.stack(layers)}}
    o = optim(name="lamb", no_decay=())

    def step(params):
        tx = optimizers.make_optimizer(o, 100, params)
        return jax.jit(tx.update)(jax.tree.map(np.cos, params), tx.init(params), params)[0]["img"]

    parts = step(single)
    np.testing.assert_allclose(step(stacked)[stack], np.stack([parts["a"], parts["b"]]), rtol=1e-6)
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
    params = {name: g[f"init_{name}"] for name in names}
    tx = optimizers.scale_by_adafactor(momentum=momentum)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(len(g["grads_kernel"])):
        updates, state = update({name: g[f"grads_{name}"][step] for name in names}, state, params)
        for name in names:
            np.testing.assert_allclose(updates[name], g[prefix + name][step], rtol=tolerance[0], atol=tolerance[1])


def test_sgd_has_momentum():
    params, _ = after(optim(name="sgd", b1=0.9, weight_decay=0.0), steps=2)
    np.testing.assert_allclose(
        params["txt"]["ln"]["scale"], 1 - 0.1 * (1 + 1.9) * np.asarray(GRADS["txt"]["ln"]["scale"]), rtol=1e-6
    )


def test_gains_biases_and_the_scale_are_not_decayed():
    zero = jax.tree.map(np.zeros_like, PARAMS)
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
    rates = jax.jit(jax.vmap(make_schedule(o, 110)))(np.array(list(values)))
    np.testing.assert_allclose(rates, list(values.values()), atol=1e-6)


def lamb(**changes):
    return optim(name="lamb", b1=0.9, b2=0.999, eps=1e-6, **changes)


def lamb_by_hand(o, w, g, steps, decayed, adapted, max_norm=np.inf, corrects=True):
    """LAMB of one tensor in float64: TensorFlow Addons' rule, or pytorch-lamb's."""
    w, m, v = np.asarray(w, np.float64), 0.0, 0.0
    for t in range(1, steps + 1):
        m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g * g
        first, second = (m / (1 - o.b1**t), v / (1 - o.b2**t)) if corrects else (m, v)
        u = first / (np.sqrt(second) + o.eps) + o.weight_decay * decayed * w
        w_norm, u_norm = min(np.sqrt((w**2).sum()), max_norm), np.sqrt((u**2).sum())
        w = w - o.lr * (w_norm / u_norm if adapted and w_norm > 0 and u_norm > 0 else 1.0) * u
    return w


def test_lamb_is_tensorflow_addons_rule():
    o = lamb(weight_decay=0.05, no_decay=("/bias$",))
    params, _ = after(o, steps=4)
    for leaf, decayed in (("kernel", True), ("bias", False)):
        g = np.asarray(GRADS["img"]["proj"][leaf], np.float64)
        wanted = lamb_by_hand(o, PARAMS["img"]["proj"][leaf], g, 4, decayed, adapted=decayed)
        np.testing.assert_allclose(params["img"]["proj"][leaf], wanted, rtol=1e-5)


def test_lamb_is_pytorch_lambs_rule():
    o = lamb(weight_decay=0.05, no_decay=("/bias$",), lamb_adapt_all=True, lamb_max_norm=2.0)
    o.lamb_bias_correction = False
    params, _ = after(o, steps=4)
    for leaf, decayed in (("kernel", True), ("bias", False)):
        g = np.asarray(GRADS["img"]["proj"][leaf], np.float64)
        wanted = lamb_by_hand(o, PARAMS["img"]["proj"][leaf], g, 4, decayed, True, max_norm=2.0, corrects=False)
        np.testing.assert_allclose(params["img"]["proj"][leaf], wanted, rtol=1e-5)


@pytest.mark.parametrize("stack", [False, True])
def test_lamb_fuses_query_key_and_value(stack):
    parts = {
        name: {"kernel": np.full((3, 3), value, np.float32)}
        for name, value in (("query", 1.0), ("key", 2.0), ("value", 3.0))
    }
    grads = jax.tree.map(lambda x: np.cos(np.arange(9, dtype=np.float32).reshape(3, 3)) * x, parts)
    fused, fused_grads = ({"qkv": np.concatenate([t[k]["kernel"] for k in parts], 1)} for t in (parts, grads))

    def wrap(tree):
        tree = jax.tree.map(lambda x: np.stack([x, 2 * x]), tree) if stack else tree
        return {"block" if stack else "block_0": {"attn": tree}}

    def step(params, grads, **changes):
        tx = optimizers.make_optimizer(lamb(no_decay=(), **changes), 10, wrap(params))
        updates, _ = jax.jit(tx.update)(wrap(grads), tx.init(wrap(params)), wrap(params))
        return next(iter(updates.values()))["attn"]

    found, wanted = step(parts, grads, lamb_fuse_qkv=True), step(fused, fused_grads)
    joined = np.concatenate([found[k]["kernel"] for k in parts], -1)
    np.testing.assert_allclose(joined, wanted["qkv"], rtol=1e-5)


def test_lamb_moves_a_bias_of_a_norm_that_is_not_decayed():
    """After 1,000 constant gradients at a rate of 1e-3 a bias that starts at 0 is near -1, as with Adam."""
    params = {"img": {"stem_bn": {"bias": np.zeros(4, np.float32)}}}
    o = lamb(no_decay=("_bn/",))
    o.lr = 1e-3
    tx = optimizers.make_optimizer(o, 1000, params)

    def body(_, carry):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, 1000, body, (params, tx.init(params)))
    np.testing.assert_allclose(params["img"]["stem_bn"]["bias"], -1.0, rtol=1e-3)


@pytest.mark.parametrize("path", golden_files("optim_lamb_timm_*.npz"))
def test_lamb_golden_of_timm(path):
    """timm's rule is ours with every tensor adapted; without a decay it is Adam. Its averaging options are not ours."""
    g = np.load(path)
    if g["trust_clip"] or not g["grad_averaging"]:
        pytest.skip("options that no recipe uses")
    o = optim(name="lamb" if g["weight_decay"] else "adamw", no_decay=(), lamb_adapt_all=True)
    for field, name in (
        ("b1", "beta1"),
        ("b2", "beta2"),
        ("eps", "eps"),
        ("weight_decay", "weight_decay"),
        ("lr", "lr"),
    ):
        o[field] = float(g[name])
    o.grad_clip_norm = float(g["max_grad_norm"])
    assert_follows(o, {key.removeprefix("init_"): g[key] for key in g.files if key.startswith("init_")}, g)


def rate_of(steps, **changes):
    o = optim()
    o.update(changes)
    return np.asarray(jax.jit(jax.vmap(make_schedule(o, steps)))(np.arange(steps)))


def test_schedule_of_big_vision():
    """CLIPPO's: rsqrt with a time scale, warm-up from 0, cool-down."""
    found = rate_of(
        1000, schedule="rsqrt", lr=1e-3, warmup_steps=100, warmup_from=0.0, timescale=50, cooldown_steps=200
    )
    step = np.arange(1000)
    wanted = 1e-3 / np.sqrt(1 + np.maximum(step - 100, 0) / 50)
    wanted *= np.minimum(1, step / 100) * np.minimum(1, (1000 - step) / 200)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_schedule_of_declip():
    """Its iterations count from 1, its warm-up of 50 reaches the peak in iteration 50, its cosine has one step more."""
    found = rate_of(1000, schedule="cosine", lr=1e-3, warmup_from=1e-4, warmup_steps=49)
    iteration = np.arange(1, 1001)
    warm = 1e-4 + (1e-3 - 1e-4) / 49 * (iteration - 1)
    cosine = 1e-3 * (1 + np.cos(np.pi * (iteration - 50) / (1001 - 50))) / 2
    np.testing.assert_allclose(found, np.where(iteration < 50, warm, cosine), rtol=1e-5, atol=1e-9)


def test_schedule_of_slip_and_laclip():
    """`numpy.linspace` to the peak, which two steps have, then a cosine to the last rate."""
    found = rate_of(1000, schedule="cosine", lr=1e-3, warmup_from=1e-6, warmup_steps=99, lr_end=1e-2)
    cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * np.arange(900) / 900))
    wanted = np.concatenate([np.linspace(1e-6, 1e-3, 100), cosine])
    np.testing.assert_allclose(found, wanted, atol=2e-3 * 1e-3)


def test_schedule_of_otter():
    """`CosineAnnealingLR` by epochs: the rate stays for the steps of an epoch."""
    found = rate_of(100, schedule="cosine", lr=3e-3, lr_hold_steps=10)
    wanted = 3e-3 * 0.5 * (1 + np.cos(np.pi * np.repeat(np.arange(10), 10) / 10))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)


def test_schedule_and_momentum_of_alip():
    """`OneCycleLR(max_lr=1e-3, total_steps=200, pct_start=0.1)`: values of PyTorch's formula."""
    o = optim()
    o.update(dict(schedule="onecycle", lr=1e-3, warmup_steps=20, b1_cycle=(0.95, 0.85)))
    rate, momentum = make_schedule(o, 200), make_momentum_schedule(o, 200)

    def between(start, end, share):
        return end + (start - end) / 2 * (1 + np.cos(np.pi * share))

    for step in (0, 7, 19, 100, 199):
        first, share = step <= 19, step / 19 if step <= 19 else (step - 19) / (199 - 19)
        wanted = between(4e-5, 1e-3, share) if first else between(1e-3, 4e-9, share)
        np.testing.assert_allclose(rate(step), wanted, rtol=1e-4, atol=1e-9)
        wanted = between(0.95, 0.85, share) if first else between(0.85, 0.95, share)
        np.testing.assert_allclose(momentum(step), wanted, rtol=1e-5)


def test_adam_with_a_cycle_of_b1_is_its_formula():
    o = optim(b1_cycle=(0.95, 0.85), b2=0.98, eps=1e-6, weight_decay=0.0)
    o.warmup_steps = 2
    momentum = make_momentum_schedule(o, 100)
    params, _ = after(o)
    g, w, m, v = np.asarray(GRADS["img"]["proj"]["kernel"]), np.ones((4, 3)), 0, 0
    rate = make_schedule(o, 100)
    for t in (1, 2, 3):
        b1 = float(momentum(t - 1))
        m, v = b1 * m + (1 - b1) * g, 0.98 * v + 0.02 * g * g
        w = w - float(rate(t - 1)) * (m / (1 - b1**t) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6))
    np.testing.assert_allclose(params["img"]["proj"]["kernel"], w, rtol=1e-5)


def test_schedule_of_unicl():
    """timm's `CosineLRScheduler` without a prefix: its cosine counts the steps of the warm-up."""
    fields = dict(warmup_from=4e-6, warmup_steps=50, lr_end=0.01, decay_from_start=True)
    found = rate_of(320, schedule="cosine", lr=4e-3, **fields)
    step = np.arange(320)
    warm, cosine = 4e-6 + step * (4e-3 - 4e-6) / 50, 4e-5 + (4e-3 - 4e-5) / 2 * (1 + np.cos(np.pi * step / 320))
    np.testing.assert_allclose(found, np.where(step < 50, warm, cosine), rtol=1e-5)


def test_schedule_of_zerovl():
    """Linear from 0, then a cosine that ends at a tenth."""
    found = rate_of(400, schedule="cosine", lr=1e-4, warmup_from=0.0, warmup_steps=10, lr_end=0.1)
    step = np.arange(400)
    cosine = 1e-5 + 9e-5 * 0.5 * (1 + np.cos(np.pi * (step - 10) / 390))
    np.testing.assert_allclose(found, np.where(step < 10, 1e-4 * step / 10, cosine), rtol=1e-5)
