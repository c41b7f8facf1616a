"""OTTER: the oracles of its specification, Sinkhorn and the released code, sharded plans, teacher, meshes, runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import REPO, golden_files
from helpers import TINY, interrupted, losses, unit
from model_helpers import BATCH, initialise, run_steps

from clip_jax import config, train
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.losses.contrastive import contrast
from clip_jax.losses.transport import Plan, divergence, sinkhorn
from clip_jax.methods.interface import make_method
from clip_jax.methods.otter import Options, decay_of, loss
from clip_jax.models.common import l2_normalize
from clip_jax.runtime import sharding

CONFIG = str(REPO / "configs" / "otter.py")
transport = jax.jit(sinkhorn)  # one program for any regularisation, number of iterations and diagonal
loss_of = jax.jit(loss, static_argnums=(0, 1))


def tiny(*overrides, variant="smoke"):
    return config.resolve(config.load(f"{CONFIG}:{variant}", [*TINY, *overrides]), make_tokenizer("sentencepiece"))


def similarity(rows, cols, diagonal=0.0):
    return rows @ cols.T - diagonal * np.eye(len(rows), dtype=np.float32)


def matrix(s, plan, reg, normalised=False):
    """Returns the plan or, normalised, the targets: its rows divided by their sums."""
    return np.exp(s / reg + np.asarray(plan.row - plan.log_mass * normalised)[:, None] + np.asarray(plan.col))


def solve(s, reg, iterations, diagonal=0.0):
    """Returns the plan of a matrix of similarities, and the matrix without `diagonal`."""
    plan = transport(np.float32(s), np.eye(len(s), dtype=np.float32), reg, iterations, diagonal)
    return plan, np.asarray(s) - diagonal * np.eye(len(s))


def in_probabilities(s, reg, iterations):
    """The released form, in probabilities and float64."""
    q = np.exp(np.float64(s) / reg)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0) * len(q)
    return q


# Sinkhorn


@pytest.mark.parametrize("file", golden_files("otter_sinkhorn.npz"))
@pytest.mark.parametrize("kind, diagonal", [("diagkept", 0.0), ("diagremoved", 200.0)])
def test_golden_sinkhorn(file, kind, diagonal):
    g = np.load(file)
    reg = float(g["sinkhorn_lambda"])
    rounds = [int(key.removeprefix(f"{kind}_plan_iters")) for key in g.files if key.startswith(f"{kind}_plan_iters")]
    assert rounds
    for n in rounds:
        plan, s = solve(g["similarity"], reg, n, diagonal)
        np.testing.assert_allclose(matrix(s, plan, reg), g[f"{kind}_plan_iters{n}"], rtol=1e-3, atol=1e-6)


def test_oracle_1_marginals():
    """Columns and the mass are exact after any iteration, rows converge, and the targets' rows sum to 1."""
    u, v = unit(0, 8, 16), unit(1, 8, 16)
    errors = []
    for n in (1, 2, 5, 20, 100):
        plan = transport(u, v, 0.15, n, 200.0)
        q = matrix(similarity(u, v, 200.0), plan, 0.15)
        np.testing.assert_allclose(q.sum(0), 1 / 8, atol=1e-6)
        np.testing.assert_allclose(q.sum(), 1, atol=1e-6)
        np.testing.assert_allclose(q.sum(1), np.exp(plan.log_mass), atol=1e-6)
        errors.append(np.abs(8 * q.sum(1) - 1).max())
        np.testing.assert_allclose(matrix(similarity(u, v, 200.0), plan, 0.15, True).sum(1), 1, atol=1e-5)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[0]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_oracle_2_constant_similarities(n):
    plan, s = solve(np.full((6, 6), 0.3), 0.1, n)
    np.testing.assert_allclose(matrix(s, plan, 0.1, True), 1 / 6, rtol=1e-5)
    plan, s = solve(np.full((6, 6), 0.3), 0.1, n, 200.0)
    np.testing.assert_allclose(matrix(s, plan, 0.1, True), (1 - np.eye(6)) / 5, rtol=1e-5)


def test_oracle_3_without_iterations_targets_are_a_softmax():
    s = np.random.default_rng(0).standard_normal((5, 5), np.float32)
    plan, _ = solve(s, 0.01, 0)
    np.testing.assert_allclose(matrix(s, plan, 0.01, True), scipy.special.softmax(100 * s, axis=1), atol=1e-4)


def test_oracles_4_and_5_rows_constants_permutations_and_transposes():
    s = np.random.default_rng(0).standard_normal((6, 6), np.float32)
    base = matrix(s, solve(s, 0.2, 3)[0], 0.2)
    shifted = s + np.arange(6)[:, None]
    np.testing.assert_allclose(matrix(shifted, solve(shifted, 0.2, 3)[0], 0.2), base, atol=1e-6)
    p, r = np.random.default_rng(0).permutation(6), np.random.default_rng(1).permutation(6)
    moved = s[p][:, r]
    np.testing.assert_allclose(matrix(moved, solve(moved, 0.2, 3)[0], 0.2), base[p][:, r], atol=1e-6)
    transposed = {n: matrix(s.T, solve(s.T, 0.2, n)[0], 0.2) - matrix(s, solve(s, 0.2, n)[0], 0.2).T for n in (1, 300)}
    assert np.abs(transposed[1]).max() > 1e-3 and np.abs(transposed[300]).max() < 1e-5


def test_oracle_8_the_log_domain_is_the_probability_domain():
    u, v = unit(2, 8, 16), unit(3, 8, 16)
    for diagonal in (0.0, 200.0):
        plan, s = transport(u, v, 0.15, 5, diagonal), similarity(u, v, diagonal)
        q = in_probabilities(s, 0.15, 5)
        np.testing.assert_allclose(matrix(s, plan, 0.15), q, atol=1e-6)
    np.testing.assert_array_equal(np.diag(matrix(s, plan, 0.15, True)), 0)


def test_divergence_is_that_of_the_matrices_and_has_their_gradient():
    u, v, rows, cols = (unit(seed, 12, 8) for seed in range(4))
    plan = transport(rows, cols, 0.15, 4, 200.0)
    target = matrix(similarity(rows, cols, 200.0), plan, 0.15, True)

    def plain(u, v, scale):
        entropy = jnp.where(target > 0, target * jnp.log(jnp.maximum(target, 1e-30)), 0).sum(1)
        return jnp.mean(entropy - jnp.sum(target * jax.nn.log_softmax(scale * u @ v.T), axis=1))

    def ours(u, v, scale):
        return divergence(u, v, scale, rows, cols, plan, 0.15, 200.0)

    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2)))(u, v, 20.0) for fn in (ours, plain)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_plan_is_spread_over_the_mesh(mesh8):
    """Eight devices give the same plan, and none holds more than a few times its rows of the matrix."""
    n, spread = 1024, sharding.batch_sharding(mesh8)
    u, v = unit(0, n, 8), unit(1, n, 8)
    solve = jax.jit(lambda u, v: sinkhorn(u, v, 0.15, 5, 200.0))
    sharded = solve.lower(*jax.device_put((u, v), spread)).compile()
    matrix_bytes = 4 * n * n
    assert sharded.memory_analysis().temp_size_in_bytes < 4 * matrix_bytes / 8
    mesh = jax.sharding.get_mesh()
    assert mesh.size == 8
    got = sharded(*jax.device_put((u, v), spread))
    q = in_probabilities(similarity(u, v, 200.0), 0.15, 5)
    np.testing.assert_allclose(np.exp(got.log_mass), q.sum(1), rtol=1e-4)
    np.testing.assert_allclose(
        matrix(similarity(u, v, 200.0), Plan(*map(np.asarray, got)), 0.15), q, rtol=1e-3, atol=1e-9
    )


def test_the_loss_holds_no_matrix(mesh8):
    n, spread = 2048, sharding.batch_sharding(mesh8)
    vectors = jax.device_put(tuple(unit(seed, n, 8) for seed in range(4)), spread)

    def value(u, v, rows, cols):
        return divergence(u, v, 20.0, rows, cols, Plan(*[jnp.zeros(n)] * 3), 0.15)

    compiled = jax.jit(jax.grad(value)).lower(*vectors).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * n / 2


# The loss


def features_of(g, raw=None):
    student = [l2_normalize(x) for x in (raw or (g["student_image_raw"], g["student_text_raw"]))]
    return dict(
        zip(
            ("image", "text", "teacher_image", "teacher_text"),
            (*student, g["teacher_image"], g["teacher_text"]),
            strict=True,
        )
    )


def golden_loss(g, raw, scales, **options):
    given = dict(alpha=float(g["alpha"]), entropy=float(g["sinkhorn_lambda"]), iterations=int(g["sinkhorn_iters"]))
    params = dict(zip(("logit_scale", "logit_scale_distill"), scales, strict=True))
    return loss_of(Options(**given | options), np.log(100), params, {"updates": 9}, features_of(g, raw), None, None)


@pytest.mark.parametrize("file", golden_files("loss_otter_*.npz"))
@pytest.mark.parametrize("kind, removed", [("diagremoved", True), ("diagkept", False)])
def test_golden_loss(file, kind, removed):
    g = np.load(file)
    reg, diagonal = float(g["sinkhorn_lambda"]), 200.0 * removed
    u, v = g["teacher_image"], g["teacher_text"]
    rows, cols = np.concatenate([u, v], 1), np.concatenate([u + v, v], 1)
    for sides, s, plan_name, target in (
        ((rows, cols), "sim_image_rows", "plan_image", "target_image"),
        ((cols, rows), "sim_text_rows", "plan_text", "target_text"),
    ):
        plan = transport(*sides, reg, int(g["sinkhorn_iters"]), diagonal)
        np.testing.assert_allclose(similarity(*sides, diagonal), g[f"{kind}.{s}"], rtol=1e-3, atol=5e-5)
        np.testing.assert_allclose(
            matrix(similarity(*sides, diagonal), plan, reg), g[f"{kind}.{plan_name}"], rtol=1e-3, atol=5e-5
        )
        np.testing.assert_allclose(
            matrix(similarity(*sides, diagonal), plan, reg, True), g[f"{kind}.{target}"], rtol=1e-3, atol=5e-5
        )
    inputs = (g["student_image_raw"], g["student_text_raw"]), (g["T_c"], g["T_s"])
    for stop, name in ((True, "keys_stopgrad"), (False, "keys_grad")):

        def value(raw, scales, stop=stop):
            return golden_loss(g, raw, scales, remove_diag=removed, keys_stopgrad=stop)

        (total, metrics), (raw, scales) = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(*inputs)
        np.testing.assert_allclose(total, g[f"{kind}.loss"], rtol=1e-3)
        np.testing.assert_allclose(metrics["loss_infonce"], g[f"{kind}.infonce_sum"], rtol=1e-3)
        np.testing.assert_allclose(metrics["loss_distill"], g[f"{kind}.distill_sum"], rtol=1e-3)
        expected = [g[f"{kind}.{name}.grad_{x}"] for x in ("student_image_raw", "student_text_raw", "T_c", "T_s")]
        for a, b in zip((*raw, *scales), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("file", golden_files("loss_otter_*.npz"))
def test_golden_knowledge_distillation_is_no_iterations(file):
    g = np.load(file)
    kd = config.load(f"{CONFIG}:kd").otter
    raw, scales = (g["student_image_raw"], g["student_text_raw"]), (g["T_c"], g["T_s"])
    names = ("iterations", "entropy", "remove_diag")
    total, metrics = golden_loss(g, raw, scales, **{name: kd[name] for name in names})
    np.testing.assert_allclose(total, g["kd.loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["loss_distill"], g["kd.distill_sum"], rtol=1e-3)


NAMES = ("image", "text", "teacher_image", "teacher_text")
FEATURES = {name: unit(seed, 8, 16) for seed, name in enumerate(NAMES)}


def value_of(options, features=None, scales=(3.0, 3.5), updates=9):
    params = dict(zip(("logit_scale", "logit_scale_distill"), scales, strict=True))
    return loss_of(options, np.log(100), params, {"updates": updates}, features or FEATURES, None, None)


def test_oracle_6_alpha_1_is_infonce_alone():
    u, v = (FEATURES[name] for name in ("image", "text"))
    expected = jax.jit(lambda: contrast(u, v, np.exp(3.0))[0] + contrast(v, u, np.exp(3.0))[0])()
    np.testing.assert_allclose(value_of(Options(alpha=1.0))[0], expected, rtol=1e-6)
    grad = jax.jit(jax.grad(lambda s: value_of(Options(alpha=1.0), scales=(3.0, s))[0]))(3.5)
    assert grad == 0
    assert abs(jax.jit(jax.grad(lambda s: value_of(Options(alpha=0.9), scales=(3.0, s))[0]))(3.5)) > 1e-4


def test_oracle_6_the_identity_as_target_is_infonce():
    """The teacher's embeddings are orthogonal between pairs, and the entropy is nearly 0."""
    features = FEATURES | dict.fromkeys(("teacher_image", "teacher_text"), np.eye(8, 16, dtype=np.float32))
    options = Options(alpha=0.3, remove_diag=False, entropy=0.01)
    expected = value_of(Options(alpha=1.0), features)[0]
    np.testing.assert_allclose(value_of(options, features, (3.0, 3.0))[0], expected, rtol=1e-5)


def test_oracle_7_the_paper_writes_one_cross_entropy():
    """With one temperature the forms differ only by the targets' entropy times 1 - alpha."""
    f, alpha = FEATURES, 0.4
    u, v = f["teacher_image"], f["teacher_text"]
    rows, cols = np.concatenate([u, v], 1), np.concatenate([u + v, v], 1)
    expected = 0.0
    for query, key, sides in ((f["image"], f["text"], (rows, cols)), (f["text"], f["image"], (cols, rows))):
        m = matrix(similarity(*sides, 200.0), transport(*sides, 0.15, 5, 200.0), 0.15, True)
        log_p = scipy.special.log_softmax(np.exp(3.0) * query @ key.T, axis=1)
        entropy = -np.where(m > 0, m * np.log(np.maximum(m, 1e-30)), 0).sum(1)
        expected += np.mean(-((alpha * np.eye(8) + (1 - alpha) * m) * log_p).sum(1) - (1 - alpha) * entropy)
    np.testing.assert_allclose(value_of(Options(alpha=alpha), scales=(3.0, 3.0))[0], expected, rtol=1e-5)


def test_oracle_10_keys_carry_no_gradient():
    f, text = FEATURES, FEATURES["text"]
    grads = {}
    for stop in (True, False):
        grads[stop] = jax.jit(
            jax.grad(lambda x, stop=stop: value_of(Options(alpha=1.0, keys_stopgrad=stop), f | {"text": x})[0])
        )(text)
    own = jax.jit(jax.grad(lambda x: contrast(x, f["image"], np.exp(3.0))[0]))(text)
    np.testing.assert_allclose(grads[True], own, rtol=1e-5, atol=1e-7)
    assert np.abs(grads[False] - own).max() > 1e-3


def test_oracle_g2_equal_embeddings():
    same = dict.fromkeys(FEATURES, np.tile(unit(0, 1, 16), (8, 1)))
    np.testing.assert_allclose(value_of(Options(alpha=1.0), same)[0], 2 * np.log(8), rtol=1e-5)


def test_scales_are_clipped_hard():
    grad = jax.jit(jax.grad(lambda s: value_of(Options(), scales=(s, s))[0]))
    assert grad(-0.5) == grad(5.0) == 0
    metrics = value_of(Options(), scales=(-1.0, 9.0))[1]
    np.testing.assert_allclose([metrics["logit_scale"], metrics["logit_scale_distill"]], [1, 100], rtol=1e-5)


def test_label_smoothing_is_spread_over_the_wrong_pairs():
    f, n = FEATURES, 8
    target = 0.8 * np.eye(n) + 0.2 / (n - 1) * (1 - np.eye(n))
    logits = np.exp(3.0) * f["image"] @ f["text"].T
    expected = -sum((target * scipy.special.log_softmax(x, axis=1)).sum(1).mean() for x in (logits, logits.T))
    np.testing.assert_allclose(value_of(Options(alpha=1.0, label_smoothing=0.2))[0], expected, rtol=1e-5)


def test_the_warm_up_moves_the_weight_from_infonce_to_the_distillation():
    _, metrics = value_of(Options())
    for updates, weight in ((1, 0.0), (26, 0.125), (101, 0.5), (500, 0.5)):
        total = value_of(Options(warmup_steps=100), updates=updates)[0]
        np.testing.assert_allclose(
            total, (1 - weight) * metrics["loss_infonce"] + weight * metrics["loss_distill"], rtol=1e-5
        )


# The teacher and the engine


@pytest.mark.parametrize("file", golden_files("otter_ema.npz"))
def test_golden_moving_average(file):
    g = np.load(file)
    shadow = g["init"]
    for n, (params, expected) in enumerate(zip(g["params"], g["shadow"], strict=True), 1):
        d = float(decay_of(n, float(g["decay"])))
        shadow = d * shadow + (1 - d) * params
        np.testing.assert_allclose(shadow, expected, rtol=1e-4, atol=1e-5)


def test_oracle_9_the_decay_warms_up():
    decays = np.asarray(decay_of(np.arange(1, 20_000, 10), 0.999)).tolist()
    np.testing.assert_allclose(decays[0], 2 / 11, rtol=1e-6)
    assert decays == sorted(decays) and decays[-1] == np.float32(0.999)


ENGINE = ["otter.warmup_steps=2", "otter.decay=0.6", "otter.keys_stopgrad=true"]


@pytest.fixture(scope="module")
def one_device():
    c = tiny(*ENGINE)
    return run_steps(c, make_method(c), None, steps=3, devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes, micro_batches", [((2, 2, 2), 2), (None, 4)])
def test_oracle_g1_any_mesh_and_micro_batches_give_the_result_of_one_device(one_device, sizes, micro_batches):
    c, (expected, expected_state) = tiny(*ENGINE, f"micro_batches={micro_batches}"), one_device
    sizes, devices = (dict(zip(sharding.AXES, sizes, strict=True)), None) if sizes else (None, jax.devices()[:1])
    history, state = run_steps(c, make_method(c), sizes, steps=3, devices=devices)
    for a, b in zip(history, expected, strict=True):
        for name in ("loss", "grad_norm", "loss_infonce", "loss_distill"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), state.extra, expected_state.extra)
    for name, x in state.extra["teacher"].items():
        jax.tree.map(lambda t, p: t.sharding == p.sharding or pytest.fail("sharded differently"), x, state.params[name])


def test_the_teacher_follows_the_student_from_the_start_of_each_step():
    """The first step's teacher is the student, whose weights may be loaded. Later ones move before their use."""
    method = make_method(tiny("otter.decay=0.6"))
    first, extra = jax.device_get(initialise(method.init, BATCH))
    students = [jax.tree.map(lambda x, k=k: x + 0.1 * k, first) for k in (1, 2, 3)]  # none of them is extra's teacher
    encode = jax.jit(lambda params, extra: method.encode(params, extra, BATCH, jax.random.key(1), True)[0])
    heads = jax.jit(method.heads)
    features = encode(students[0], extra)
    for name in ("image", "text"):
        np.testing.assert_allclose(features[f"teacher_{name}"], features[name], atol=1e-6)
    expected = students[0]
    for n, params in enumerate(students, 1):
        d = 0.0 if n == 1 else min(0.6, (1 + n) / (10 + n))
        expected = jax.tree.map(lambda t, p, d=d: d * t + (1 - d) * p, expected, params)
        ours = encode(params, extra)["teacher_image"]
        np.testing.assert_allclose(ours, encode(expected, extra | {"updates": np.int32(0)})["image"], atol=2e-4)
        _, extra = heads(params, extra, None, None, None)
        for name in ("img", "txt"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), extra["teacher"][name], expected[name]
            )
    assert extra["updates"] == 3


def test_oracle_9_a_student_that_stands_still_is_its_teacher():
    method = make_method(tiny())
    params, extra = initialise(method.init, BATCH)
    heads = jax.jit(method.heads)
    for _ in range(3):
        _, extra = heads(params, extra, None, None, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        extra["teacher"],
        {k: params[k] for k in ("img", "txt")},
    )


def test_oracle_9_no_gradient_reaches_the_teacher():
    method = make_method(tiny())
    params, extra = initialise(method.init, BATCH)

    @jax.jit
    @jax.grad
    def gradient(teacher, extra):
        features, new = method.encode(params, extra | {"teacher": teacher}, BATCH, jax.random.key(1), True)
        _, new = method.heads(params, new, features, BATCH, None)
        return method.loss(params, new, features, BATCH, None)[0]

    grads = gradient(extra["teacher"], extra | {"updates": np.int32(5)})
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(grads))


def test_without_distillation_there_is_no_teacher():
    method = make_method(tiny(variant="small_infonce"))
    params, extra = jax.eval_shape(method.init, jax.random.key(0), BATCH)
    assert extra == {} and "logit_scale_distill" not in params
    features, _ = jax.eval_shape(lambda p: method.encode(p, {}, BATCH, jax.random.key(0), True), params)
    assert features.keys() == {"image", "text"}


def test_a_run_resumes_bit_by_bit(tmp_path):
    """The checkpoint holds the teacher and its counter, so three steps at once equal two and one."""
    quick = ["eval.steps=0", "eval.train_tasks=()", "checkpoint.steps=2"]

    def run(name, steps):
        c = config.load(f"{CONFIG}:smoke", [*TINY, *quick, f"train.steps={steps}"])
        train.train(c, tmp_path / name, lambda line: None)

    run("whole", 3)
    interrupted(tmp_path / "whole", tmp_path / "parts", 2)
    run("parts", 3)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert np.isfinite(list(whole.values())).all() and whole == parts and len(whole) == 3


# Configurations


def test_published_recipe():
    c = config.load(f"{CONFIG}:otter")
    assert c.train.steps == 10 * c.optim.lr_hold_steps == 56830
    assert c.optim.name == "sgd" and c.otter.to_dict() == dataclasses.asdict(Options())
