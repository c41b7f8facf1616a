"""A test of a method: its gradients, micro-batches, meshes and restarts, see docs/adding_a_method.md."""

import jax
import numpy as np

from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.methods import interface
from clip_jax.runtime import sharding
from clip_jax.training import optimizers
from clip_jax.training.step import first_state, make_gradients, make_init, make_step, state_shapes


def random_batch(config, method, seed=0):
    """Returns a batch of random pixels and of random texts of different lengths, `{name: array [B, ...]}`.

    Args:
      config: the resolved configuration; `data.batch_size` is B.
      method: its `Method`.
      seed: an int.
    """
    rng, text = np.random.default_rng(seed), config.model.get("text", {})
    size = config.data.batch_size

    def draw(spec):
        if spec.dtype == np.uint8:
            return rng.integers(0, 256, spec.shape, np.uint8)
        ids = rng.integers(1, text.vocab_size, spec.shape, np.int32)
        place, last = np.arange(spec.shape[-1]), rng.integers(2, spec.shape[-1], (*spec.shape[:-1], 1))
        return np.where(place < last, ids, np.where(place == last, text.eot_id, 0)).astype(np.int32)

    batch = {name: draw(spec) for name, spec in method.batch_spec(size).items() if name != "example_id"}
    return batch | {"example_id": sharding.id_words(np.arange(size))}


def check_method(config, batch=None, micro_batches=2, without_gradient=(), rtol=1e-4):
    """Checks the rules that keep a method exact on any machine; float32 models only, since others round.

    - The loss is finite. Every parameter has a finite gradient, and one that is not zero unless it is frozen.
    - The loss and the gradients of several micro-batches are those of the whole batch.
    - The loss and the norms of a step on a mesh of all devices are those on one device, and the new parameters as well.
    - Two steps from a copy of the state after the first one are bit for bit the two steps without a break.

    Args:
      config: the configuration, with small towers and `model.dtype` float32. Fields of the tokenizer are filled in.
      batch: `{name: array [B, ...]}`, as the loader makes it; the devices and `micro_batches` divide B. None:
        `random_batch`, which suits methods that read pictures and texts alone.
      micro_batches: parts of the batch.
      without_gradient: names of parameters, such as `"img/proj"`, whose gradient may be zero.
      rtol: the relative tolerance of losses and norms.

    Returns the metrics of the first step, a dict of float32 scalars.

    Raises AssertionError, which names the rule, the value and the parameter.
    """
    config = interface.resolve(config, make_tokenizer(config.tokenizer))
    method = interface.make_method(config)
    batch = random_batch(config, method) if batch is None else batch
    one = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    _check_gradients(config, method, batch, one, micro_batches, without_gradient, rtol)
    first, second, again = _run(config, method, batch, one)
    _equal("a restart after the first step", second, again, 0)
    count = len(jax.devices())
    fsdp = 2 if count % 2 == 0 else 1
    mesh = sharding.make_mesh(dict(data=count // fsdp, fsdp=fsdp, tensor=1))
    if count > 1:
        (spread,) = _run(config, method, batch, mesh, steps=1)
        for name in ("loss", "grad_norm", "param_norm"):
            _equal(f"{count} devices: {name}", first[1][name], spread[1][name], rtol)
        # Adam divides by the gradient's size, which amplifies the rounding of tiny gradients.
        _equal(f"{count} devices: parameters", first[0].params, spread[0].params, rtol, 2 * float(first[1]["lr"]))
    return first[1]


def _check_gradients(config, method, batch, mesh, micro_batches, without_gradient, rtol):
    with jax.set_mesh(mesh):
        init, _ = make_init(config, method, batch)
        state = first_state(init, jax.random.key(config.seed))
        rng = jax.random.key(config.seed)
        prepared = method.prepare(batch, rng)

        def run(parts):
            def gradients(params, extra, batch):
                loss, _, _, _, grads = make_gradients(method, parts)(params, extra, batch, rng, lambda p: p)
                return loss, grads

            return jax.device_get(jax.jit(gradients)(state.params, state.extra, prepared))

        loss, grads = run(1)
        assert np.isfinite(loss), f"the loss is {loss}"
        frozen = dict(_leaves(optimizers.frozen(config.optim, state.params)))
        for name, gradient in _leaves(grads):
            assert np.isfinite(gradient).all(), f"{name}: the gradient is not finite"
            is_free = frozen[name] or name in without_gradient
            assert is_free or np.any(gradient), f"{name}: no gradient reaches it"
        several_loss, several = run(micro_batches)
    _equal(f"{micro_batches} micro-batches: loss", loss, several_loss, rtol)
    _equal(f"{micro_batches} micro-batches: gradient", grads, several, rtol, 1e-5)


def _run(config, method, batch, mesh, steps=2):
    """Returns `[(state, metrics), ...]` of steps on a mesh; after two, a third entry repeats the second from a copy."""
    with jax.set_mesh(mesh):
        init, tx = make_init(config, method, batch)
        shapes = state_shapes(init)
        layouts = sharding.state_shardings(shapes, mesh, method.sharding_rules)
        state = first_state(init, jax.random.key(config.seed), layouts)
        step = jax.jit(make_step(config, method, tx), out_shardings=(layouts, None))
        batch, results = sharding.to_global(batch, mesh), []
        for _ in range(steps):
            state, metrics = step(state, batch)
            results.append(jax.device_get((state, metrics)))
        if steps == 2:
            copy = jax.device_put(jax.tree.map(np.array, results[0][0]), layouts)
            results.append(jax.device_get(step(copy, batch)))
    return results


def _leaves(tree):
    return [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _equal(what, expected, found, rtol, atol=0.0):
    for (name, a), (_, b) in zip(_leaves(expected), _leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=atol, err_msg=f"{what} {name}".strip())
