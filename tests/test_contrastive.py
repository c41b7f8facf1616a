"""Contrastive losses: golden values and gradients, analytic values, tiles against whole matrices, meshes, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import golden_files
from helpers import unit

from clip_jax.losses import contrastive, pairwise
from clip_jax.losses.contrastive import cross_entropy, infonce
from clip_jax.runtime.sharding import batch_sharding, make_mesh


@jax.jit
def loss(z_image, z_text, log_scale):
    return infonce(z_image, z_text, jnp.exp(log_scale))[0]


@pytest.mark.parametrize("path", golden_files("loss_clip_infonce_*.npz"))
def test_golden_value_and_gradients(path):
    g = np.load(path)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        g["image_features"], g["text_features"], g["log_scale"]
    )
    np.testing.assert_allclose(value, g["loss"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("grad_image", "grad_text", "grad_log_scale"), strict=True):
        np.testing.assert_allclose(grad, g[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", golden_files("loss_align_smoothed*.npz"))
def test_golden_label_smoothing(path):
    g = np.load(path)

    def summed(image, text, temperature):
        return 2 * infonce(image, text, 1 / temperature, float(g["label_smoothing"]))[0]

    value, grads = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2)))(
        g["image_features"], g["text_features"], g["temperature"]
    )
    np.testing.assert_allclose(value, g["loss_sum"], rtol=1e-4, atol=1e-5)
    for grad, name in zip(grads, ("image", "text", "temperature"), strict=True):
        np.testing.assert_allclose(grad, g[f"grad_{name}_of_sum"], rtol=1e-4, atol=1e-5)


def check_golden(path, fn, args, grads, rtol=1e-4, atol=1e-5):
    """Compares value and gradients of `fn` with a golden file.

    Args:
      path: npz file.
      fn: the loss, a function of the arrays `args`.
      args: names of the arguments in the file.
      grads: names of the gradients of the first arguments in the file.
      rtol, atol: tolerances.
    """
    g = np.load(path)
    value, found = jax.jit(jax.value_and_grad(fn, argnums=tuple(range(len(grads)))))(*(g[name] for name in args))
    np.testing.assert_allclose(value, g["loss"], rtol=rtol, atol=atol)
    for grad, name in zip(found, grads, strict=True):
        np.testing.assert_allclose(grad, g[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("path", golden_files("loss_siglip_*.npz"))
def test_golden_sigmoid(path):
    check_golden(
        path,
        lambda image, text, log_scale, bias: contrastive.sigmoid(image, text, jnp.exp(log_scale), bias)[0],
        ("image_features", "text_features", "log_scale", "bias"),
        ("grad_image", "grad_text", "grad_log_scale", "grad_bias"),
    )


def same_label(_, labels_a, labels_b, i, j):
    """UniCL's targets: pairs of the same class. An example without a class matches only itself."""
    return (i == j) | ((labels_a[:, None] == labels_b) & (labels_a[:, None] > 0))


@pytest.mark.parametrize("path", golden_files("loss_unicl_*.npz"))
def test_golden_targets_from_labels(path):
    check_golden(
        path,
        lambda image, text, scale, labels: contrastive.soft_infonce(image, text, scale, same_label, (), labels, labels)[
            0
        ],
        ("image_features", "text_features", "scale", "labels"),
        ("grad_image", "grad_text", "grad_scale"),
    )


@pytest.mark.parametrize("path", golden_files("loss_zerovl_mixup.npz"))
def test_golden_mixed_targets(path):
    def mixed(lam, _, last, i, j):
        return lam * (i == j) + (1 - lam) * (i + j == last)

    def loss_fn(image, text, tau, lam):
        return contrastive.soft_infonce(image, text, 1 / tau, mixed, lam, (), jnp.full(len(image), len(image) - 1))[0]

    args, grads = ("image_features", "text_features", "tau", "lam"), ("grad_image", "grad_text", "grad_tau")
    check_golden(path, loss_fn, args, grads, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("path", golden_files("loss_filip_paper_*.npz"))
def test_golden_late_interaction(path):
    check_golden(
        path,
        lambda image, text, log_scale, mask: contrastive.filip(image, text, mask, jnp.exp(log_scale))[0],
        ("image_tokens", "text_tokens", "log_scale", "text_mask"),
        ("grad_image_tokens", "grad_text_tokens", "grad_log_scale"),
    )


def test_equal_embeddings_give_ln_b():
    z = np.tile(unit(0, 1, 16), (32, 1))
    np.testing.assert_allclose(loss(z, z, 2.0), np.log(32), rtol=1e-6)


def test_random_unit_embeddings():
    value = loss(unit(0, 1024, 512), unit(1, 1024, 512), np.log(1 / 0.07))
    np.testing.assert_allclose(value, np.log(1024) + (1 / 0.07) ** 2 / (2 * 512), atol=0.05)


def test_orthonormal_pairs():
    z = np.eye(512)
    np.testing.assert_allclose(loss(z, z, np.log(1 / 0.07)), np.log1p(511 * np.exp(-1 / 0.07)), rtol=1e-3)


def test_order_of_pairs_does_not_matter():
    z_image, z_text = unit(0, 24, 8), unit(1, 24, 8)
    order = np.random.default_rng(0).permutation(24)
    np.testing.assert_allclose(loss(z_image, z_text, 1.0), loss(z_image[order], z_text[order], 1.0), rtol=1e-6)


def test_accuracy_counts_both_directions():
    z_image, z_text = np.eye(4), np.eye(4)
    z_text[3] = [0, 0, 0.9, 0.1]  # text 3 is most similar to image 2
    _, metrics = jax.jit(infonce)(z_image, z_text, 10.0)
    assert metrics["image_to_text_acc"] == 1.0 and metrics["text_to_image_acc"] == 0.75


def test_bfloat16_features_give_a_float32_loss():
    rounded = [unit(i, 64, 32).astype(jnp.bfloat16) for i in (0, 1)]
    value, _ = jax.jit(infonce)(*rounded, 100.0)
    assert value.dtype == jnp.float32
    exact = loss(*(x.astype(np.float32) for x in rounded), np.log(100.0))
    np.testing.assert_allclose(value, exact, rtol=1e-4)


def test_filip_multiplies_bfloat16_tokens_as_they_are():
    mask = np.ones((6, 3), bool)
    mask[2, 1:] = False

    def value(image, text):
        keys = contrastive.paired_keys(image, text, mask, 2)
        whole, chosen = (contrastive.filip(image, text, mask, 20.0, k)[0] for k in (None, keys))
        return whole + chosen

    rounded = [unit(i, 6, tokens, 16).astype(jnp.bfloat16) for i, tokens in enumerate((4, 3))]
    gradient = jax.jit(jax.value_and_grad(value, (0, 1)))
    exact, expected = jax.device_get(gradient(*(x.astype(np.float32) for x in rounded)))
    found, got = jax.device_get(gradient(*rounded))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.01 * np.abs(b).max())
    half = [x.astype(np.float16) for x in rounded]  # float16 would lose the gradients of single pairs
    small = jax.device_get(jax.jit(jax.grad(lambda *x: value(*x) * 1e-4, (0, 1)))(*half))
    for a, b in zip(small, expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32) * 1e4, b, atol=0.03 * np.abs(b).max())
    products = re.findall(r"dot_general .*: \((.*)\) ->", gradient.lower(*rounded).as_text())
    assert len(products) >= 8 and all("f32" not in operands.replace("bf16", "") for operands in products)


def test_tiles_are_larger_on_accelerators(monkeypatch):
    assert pairwise.tile_side() == 1024 and pairwise.tile_side(4) == 512
    monkeypatch.setattr(pairwise, "platform", lambda: "tpu")
    assert pairwise.tile_side() == 4096 and pairwise.tile_side(4) == 2048


def similar(temperature, a, b, i, j):
    """Soft targets with a gradient with respect to all inputs."""
    return jnp.exp(a @ b.T / temperature) + (i == j)


LOSSES = {
    "infonce": lambda a, b, s, t: infonce(a, b, s, 0.1, jnp.linspace(0, 1, len(a)))[0],
    "soft_infonce": lambda a, b, s, t: contrastive.soft_infonce(a, b, s, similar, t, b, a)[0],
    "sigmoid": lambda a, b, s, t: contrastive.sigmoid(a, b, s, -t)[0],
    "filip": lambda a, b, s, t: (
        t
        * contrastive.filip(
            a.reshape(len(a), 2, -1), b.reshape(len(b), 2, -1), jnp.arange(len(b) * 2).reshape(-1, 2) % 3 != 1, s
        )[0]
    ),
}


def plain(a, b, s, t):
    """Returns the four losses computed from whole matrices."""
    n, logits = len(a), s * a @ b.T
    own, w = jnp.eye(n), jnp.linspace(0, 1, n)
    smooth = 0.9 * own + 0.1 / n
    y = jnp.exp(b @ a.T / t) + own
    u, v = a.reshape(n, 2, -1), b.reshape(n, 2, -1)
    m = jnp.arange(n * 2).reshape(-1, 2) % 3 != 1
    tokens = jnp.einsum("ipd,jld->ijpl", u, v)
    of_image = jnp.where(m[None, :, None], tokens, -jnp.inf).max(3).mean(2)
    of_text = (tokens.max(2) * m).sum(2) / m.sum(1)
    return {
        "infonce": 0.5 * (w * (cross_entropy(logits, smooth) + cross_entropy(logits.T, smooth))).mean(),
        "soft_infonce": 0.5
        * (cross_entropy(logits, y / y.sum(1, keepdims=True)) + cross_entropy(logits.T, (y / y.sum(0)).T)).mean(),
        "sigmoid": -jax.nn.log_sigmoid((2 * own - 1) * (logits - t)).sum(1).mean(),
        "filip": t * 0.5 * (cross_entropy(s * of_image, own) + cross_entropy(s * of_text.T, own)).mean(),
    }


@functools.cache
def whole(b):
    """Returns the arguments for `b` pairs, and the values of `plain` and their gradients."""
    args = unit(0, b, 16), unit(1, b, 16), np.float32(9.0), np.float32(0.5)
    return args, *jax.jit(lambda *args: (plain(*args), jax.jacrev(plain, (0, 1, 2, 3))(*args)))(*args)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "b, spread", [(37, False), (40, True), (36, True)], ids=["uneven tiles", "8 devices", "4 of 8 devices"]
)
def test_tiles_give_value_and_gradients_of_the_whole_matrix(monkeypatch, mesh8, name, b, spread):
    monkeypatch.setattr(pairwise, "TILE_ENTRIES", 16 if name != "filip" else 64)
    args, expected, expected_grads = whole(b)
    rows = batch_sharding(mesh8) if spread else None
    args = *(jax.device_put(x, rows) for x in args[:2]), *args[2:]
    value, grads = jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1, 2, 3)))(*args)
    np.testing.assert_allclose(value, expected[name], rtol=1e-5)
    for a, b in zip(grads, expected_grads[name], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rows_and_columns_may_differ_in_number(mesh8):
    def tile(scale, a, b, i, j):
        return pairwise.Tile(row_lse={"x": scale * a @ b.T}, col_sum=i + 100 * j)

    a, b = unit(0, 24, 8), unit(1, 56, 8)
    out = jax.jit(lambda a, b: pairwise.pairwise(tile, jnp.float32(3.0), a, b))(a, b)
    np.testing.assert_allclose(out.row_lse["x"], scipy.special.logsumexp(3 * a @ b.T, axis=1), rtol=1e-5)
    np.testing.assert_allclose(out.row_max["x"], (3 * a @ b.T).max(1), rtol=1e-5)
    np.testing.assert_allclose(out.col_sum, (np.arange(24)[:, None] + 100 * np.arange(56)).sum(0), rtol=1e-6)


@pytest.fixture(scope="module")
def temporary_mib():
    """Returns the temporary memory in MiB per device of InfoNCE and its gradient on 8 devices, E=512, by batch size."""
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    rows = batch_sharding(mesh)

    def measure(b):
        z, scale = jax.ShapeDtypeStruct((b, 512), jnp.float32, sharding=rows), jax.ShapeDtypeStruct((), jnp.float32)
        with jax.set_mesh(mesh):
            fn = jax.jit(
                jax.value_and_grad(lambda *args: infonce(*args)[0], argnums=(0, 1, 2)),
                out_shardings=(None, (rows, rows, None)),
            )
            return fn.lower(z, z, scale).compile().memory_analysis().temp_size_in_bytes / 2**20

    return {b: measure(b) for b in (16_384, 32_768, 131_072)}


def test_memory_is_bounded_and_grows_no_faster_than_the_batch(temporary_mib):
    assert temporary_mib[16_384] < 40
    assert temporary_mib[32_768] <= 2 * temporary_mib[16_384]
    assert temporary_mib[131_072] <= 8 * temporary_mib[16_384]


def test_cross_entropy_takes_soft_targets():
    logits, targets = np.array([[1.0, 2.0, 3.0]]), np.array([[0.2, 0.3, 0.5]])
    expected = -(targets * scipy.special.log_softmax(logits)).sum()
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, targets), [expected], rtol=1e-6)


@jax.jit
def values_and_gradients(u, v, scale):
    """Returns the value and the gradient of every loss."""
    mask = np.ones((6, 2), bool)
    losses = [
        lambda u, s: infonce(u, v, s),
        lambda u, s: contrastive.contrast(u, v, s),
        lambda u, s: contrastive.views_infonce([u], [v], s),
        lambda u, s: contrastive.sigmoid(u, v, s, -1),
        lambda u, s: contrastive.filip(u.reshape(6, 2, 2), v.reshape(6, 2, 2), mask, s),
    ]

    def of(outputs):
        return jax.value_and_grad(lambda u: jnp.mean(jax.tree.leaves(outputs(u, scale))[0]))(u)

    return list(map(of, losses))


@pytest.mark.parametrize("scale", [50, 50.0, np.float64(50), np.array([50.0], np.float32), jnp.float32(50)], ids=str)
def test_any_scale_has_gradients(scale):
    """A number has the value and the gradients of an array, in every loss."""
    u, v = unit(0, 6, 4), unit(1, 6, 4)
    found, expected = values_and_gradients(u, v, scale), values_and_gradients(u, v, jnp.float32(50))
    for (value, grad), (wanted, wanted_grad) in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.squeeze(value), wanted, rtol=1e-6)
        np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6)
