"""BERT as a text tower: golden outputs, padding, scan and rematerialisation, dropout."""

import functools

import jax
import numpy as np
import pytest
from conftest import golden_files
from model_helpers import BERT, initialise, parameter_shapes, run_tower, tiny

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models.common import drop, l2_normalize
from clip_jax.models.towers import text_tower
from clip_jax.models.transformer import stack_layers, unstack_layers

IDS = np.array([[5, 9, 63, 0, 0, 0], [5, 9, 8, 7, 63, 0], [5, 11, 12, 13, 14, 63]])


def tiny_bert(**fields):
    model = tiny()
    model.text = dict(BERT, **fields)
    return model


@pytest.mark.parametrize("folder", golden_files("hf_align"))
def test_golden_text_tower_of_align(folder):
    model, io = clip_jax.load(folder), np.load(folder / "io.npz")
    z = jax.jit(text_tower(model.config.model).apply)({"params": model.params["txt"]}, io["input_ids"])[0]
    np.testing.assert_allclose(l2_normalize(z), io["text_embed"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_id", [-1, 0])
def test_padding_is_not_attended_to(pad_id):
    tower = text_tower(tiny_bert(pad_id=pad_id))
    params = initialise(tower.init, IDS)
    embed = jax.jit(lambda ids: tower.apply(params, ids)[0])
    z = np.asarray(embed(IDS))
    np.testing.assert_allclose(z[0], embed(IDS[:1, :3])[0], atol=1e-5)
    other = np.where(IDS == 0, 17, IDS)  # still padding after [SEP], but with a pad_id no longer padding
    assert (np.abs(embed(other) - z).max(1) < 1e-5).tolist() == ([True] * 3 if pad_id < 0 else [False, False, True])


def test_the_embedding_is_the_projected_state_of_the_first_token():
    tower = text_tower(tiny_bert())
    (z, tokens), variables = jax.device_get(jax.jit(tower.init_with_output)(jax.random.key(0), IDS))
    proj = variables["params"]["proj"]
    np.testing.assert_allclose(z, tokens[:, 0] @ proj["kernel"] + proj["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tokens.mean(-1), np.zeros(IDS.shape), atol=1e-5)  # each block ends with a layer norm
    assert variables["params"]["bert"]["pos"].shape == (1, 10, 32) and variables["params"]["bert"]["type"].shape == (
        2,
        32,
    )
    std = 0.02 * 0.8796  # of BERT's normal distribution with 0.02, truncated at two standard deviations
    np.testing.assert_allclose(variables["params"]["bert"]["embed"]["embedding"].std(), std, rtol=0.05)


def test_scan_and_rematerialisation_change_only_the_layout():
    model = tiny_bert()
    params = initialise(text_tower(model).init, IDS)["params"]
    expected, expected_grads = run_tower("text", model, params, IDS)
    model.scan, model.remat = True, "full"
    stacked = jax.jit(functools.partial(stack_layers, like=parameter_shapes("text", model, IDS)))(params)
    embedding, grads = run_tower("text", model, stacked, IDS)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-5)
    grads = unstack_layers(jax.device_get(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)


def test_dropout_keeps_the_mean_and_follows_the_keys():
    keys = jax.random.split(jax.random.key(0), 8)
    x = np.ones((8, 100, 10), np.float32)
    y = np.asarray(jax.jit(lambda keys: drop(x, 0.1, keys, 2))(keys))
    np.testing.assert_allclose(y.mean(), 1, atol=0.02)
    np.testing.assert_allclose((y == 0).mean(), 0.1, atol=0.02)
    assert (y[0] != y[1]).any()


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_acts_in_training_and_depends_only_on_the_keys_of_an_example(scan):
    model = tiny_bert(dropout=0.5, attention_dropout=0.5)
    model.scan, model.remat = scan, "full" if scan else "none"
    tower, keys = text_tower(model), jax.random.split(jax.random.key(1), 3)
    params = initialise(tower.init, IDS)
    trained = jax.jit(lambda ids, keys: tower.apply(params, ids, train=True, keys=keys)[0])
    z = np.asarray(trained(IDS, keys))
    np.testing.assert_allclose(trained(IDS[1:], keys[1:]), z[1:], rtol=1e-4, atol=1e-5)

    @jax.jit
    def evaluated(keys):
        plain = text_tower(tiny_bert() if not scan else model)
        return plain.apply(params, IDS)[0], tower.apply(params, IDS, keys=keys)[0]

    plain, with_keys = evaluated(keys)
    np.testing.assert_array_equal(with_keys, plain)
    assert np.abs(z - plain).min(1).max() > 1e-4


def test_scanned_layers_drop_the_same_as_single_layers():
    """Also in the backward pass, in which blocks in a loop draw what they drop again."""
    model, keys = tiny_bert(dropout=0.5, attention_dropout=0.5), jax.random.split(jax.random.key(1), 3)
    params = initialise(text_tower(model).init, IDS)["params"]

    def loss(params, scan):
        model.scan = scan
        params = stack_layers(params, parameter_shapes("text", model, IDS)) if scan else params
        z = text_tower(model).apply({"params": params}, IDS, train=True, keys=keys)[0]
        return (z**2).sum(), z

    gradient = jax.grad(loss, has_aux=True)
    scanned, single = jax.jit(lambda params: [gradient(params, scan) for scan in (True, False)])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), scanned, single)


def test_more_tokens_than_positions():
    with pytest.raises(UserError, match="model.text.context=11 is more than model.text.positions=10"):
        text_tower(tiny_bert(context=11))


def test_attention_weights_are_dropped_in_training_by_the_keys_of_an_example():
    """One block by hand, without dropout of hidden states."""
    model, keys = tiny_bert(attention_dropout=0.3, depth=1, heads=1), jax.random.split(jax.random.key(1), 3)
    model.attention = "auto"
    tower = text_tower(model)
    variables = initialise(tower.init, IDS)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"]["bert"])

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def linear(name, x):
        layer = p["block_0"]["attn"][name]
        return np.tensordot(x, layer["kernel"], ([-1], [0])).reshape(*x.shape[:-1], -1) + layer["bias"].reshape(-1)

    x = norm(p["embed"]["embedding"][IDS] + p["pos"][:, :6] + p["type"][0], p["ln_embed"])
    q, k, v = (linear(name, x) for name in ("query", "key", "value"))
    real = np.arange(6) <= np.argmax(IDS == 63, axis=1)[:, None]
    weights = np.where(real[:, None], np.exp(q @ k.swapaxes(1, 2) / np.sqrt(32)), 0)
    weights /= weights.sum(-1, keepdims=True)
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), 0.7, (1, 6, 6))[0])
    kept = np.asarray(jax.jit(kept)(keys))
    out = p["block_0"]["attn"]["out"]
    y = (weights * kept / 0.7) @ v @ out["kernel"].reshape(32, 32) + out["bias"]
    x, mlp = norm(x + y, p["block_0"]["ln1"]), p["block_0"]["mlp"]
    hidden = jax.nn.gelu(x @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"], approximate=False)
    expected = norm(x + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"], p["block_0"]["ln2"])

    @jax.jit
    def run(keys):
        plain = text_tower(tiny_bert(depth=1, heads=1)).apply(variables, IDS, train=True, keys=keys)
        evaluated = [tower.apply(variables, IDS), tower.apply(variables, IDS, keys=keys)]
        return tower.apply(variables, IDS, train=True, keys=keys)[1], plain[0], [z for z, _ in evaluated]

    found, plain, evaluated = run(keys)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for z in evaluated:
        np.testing.assert_array_equal(z, plain)


def test_probabilities_are_checked():
    for name, value in (("dropout", 1.0), ("attention_dropout", -0.1), ("dropout", float("nan"))):
        with pytest.raises(UserError, match=rf"model.text.{name}={value}: must be at least 0 and below 1"):
            text_tower(tiny_bert(**{name: value}))
