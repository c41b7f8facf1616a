"""Helpers for tests of models and methods: small towers, a batch, and train steps on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from conftest import REPO
from helpers import TINY
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from clip_jax import config
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.methods import interface
from clip_jax.models.towers import image_tower, text_tower
from clip_jax.runtime import sharding
from clip_jax.training.step import make_init, make_step

TOWERS = {"image": image_tower, "text": text_tower}
BERT = dict(kind="bert", context=8, positions=10, vocab_size=64, eot_id=63, width=32, depth=2, heads=2, mlp_dim=64)
EFFICIENTNET = dict(kind="efficientnet", size=32, stages=((8, 2, 3, 1, 1), (16, 2, 5, 2, 4)), proj=False)
#: Overrides of tiny towers by method, where `helpers.TINY` does not fit.
ONE_TOWER = [o for o in TINY if not o.startswith("model.text")]
SMALL = {
    "align": [o for o in TINY if not o.startswith("model.image")]
    + ["model.image.size=16", "model.image.stages=((8, 1, 3, 1, 1), (16, 2, 5, 2, 4))"],
    "clippo": [o for o in ONE_TOWER if "image.size" not in o] + ["model.image.size=32", "model.image.patch=16"],
    "declip": [*TINY, "declip.head_width=8", "declip.predictor_width=8", "declip.queue_size=32"],
    "oner": [*ONE_TOWER, "oner.head_width=8"],
    "pyramidclip": [*TINY, "model.image.depth=2"],
    "raclip": [*TINY, "raclip.heads=2", "raclip.k=4", "raclip.bank_size=8", "raclip.encoder_config=pixels"],
}
#: A batch for `helpers.tiny_config`.
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8),
    "text": np.random.default_rng(1).integers(10, 4000, (16, 12), np.int32),
    "example_id": sharding.id_words(np.arange(16)),
}


def tiny(**image):
    """The section `model` of a configuration with two towers of two layers; `image` gives fields of the image tower."""
    c = config.base()
    c.model.dtype, c.model.embed_dim = "float32", 16
    c.model.image.update(dict(size=16, patch=8, width=32, depth=2, heads=2, mlp_dim=64, **image))
    c.model.text.update(dict(vocab_size=64, eot_id=63, context=10, width=32, depth=2, heads=2, mlp_dim=64))
    return c.model


def initialise(init, *inputs, seed=0):
    """Returns `init(key, *inputs)`, such as the variables of a tower.

    Each operation that the result needs runs alone. All tests share the compiled operations of equal shapes. One
    program for all of them takes most of a second to compile, in each test.

    Args:
      init: a function such as `Method.init`.
      inputs: arrays or shapes, whose values do not matter.
      seed: the seed of the key.
    """

    def of_zeros(key):
        return init(key, *jax.tree.map(jnp.zeros_like, inputs))

    closed, shapes = jax.make_jaxpr(of_zeros, return_shape=True)(jax.random.key(seed))
    needed, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)  # drops the forward pass
    values = jaxpr_as_fun(ClosedJaxpr(needed, closed.consts))(jax.random.key(seed))
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def parameter_shapes(name, model, inputs):
    """The shapes of a tower's parameters, in the layout that `model.scan` asks for."""
    return jax.eval_shape(TOWERS[name](model).init, jax.random.key(0), inputs)["params"]


def run_tower(name, model, params, inputs):
    """Embedding and gradient of a tower."""
    tower = TOWERS[name](model)

    def fn(params):
        embedding = tower.apply({"params": params}, inputs)[0]
        return (embedding**2).sum(), embedding

    (_, embedding), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(params)
    return embedding, grads


def collectives_in_conditionals(hlo):
    """Lines of a compiled program in which a branch of a conditional communicates with other devices."""
    computations = re.split(r"\n(?=%|ENTRY )", hlo)
    branches = set(re.findall(r"(?:true|false)_computation=(%[\w.-]+)", hlo))
    for names in re.findall(r"branch_computations=\{([^}]*)\}", hlo):
        branches |= set(names.split(", "))
    bodies = "\n".join(body for body in computations if body.split(" ")[0] in branches)
    return re.findall(r".*(?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(.*", bodies)


_STARTS = {}


def starting_state(c, method, batch=BATCH):
    """Returns `(first state as NumPy arrays, optimizer)`, made once for all meshes and micro-batches.

    It is `first_state` of `make_init` up to rounding, without its compilation (`test_step.py` compares them).
    """
    plain = c.copy_and_resolve_references().unlock()
    plain.micro_batches = 1
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    key = plain.to_json_best_effort(sort_keys=True), str(shapes), method.init.__module__, method.init.__qualname__
    if key not in _STARTS:
        model = initialise(method.init, batch, seed=c.seed)
        init, tx = make_init(c, dataclasses.replace(method, init=lambda rng, batch: model), batch)
        _STARTS[key] = jax.device_get(init(jax.random.key(c.seed))), tx
    return _STARTS[key]


def run_steps(c, method, sizes, steps=5, devices=None, batch=BATCH):
    """Runs train steps on one global batch.

    Args:
      c: the configuration.
      method: the method.
      sizes: `{mesh axis: size}`; None for one device.
      steps: how many steps.
      devices: list of devices, by default all; a single one where `sizes` is None.
      batch: the global batch.

    Returns:
      The metrics of each step, and the last state.
    """
    if sizes is not None:
        mesh = sharding.make_mesh(sizes, devices or jax.devices())
    else:
        mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 1, 1), sharding.AXES)
    state, tx = starting_state(c, method, batch)
    with jax.set_mesh(mesh):
        shardings = sharding.state_shardings(state, mesh, method.sharding_rules)
        state = jax.device_put(state, shardings)
        batch = sharding.to_global(batch, mesh)
        step = jax.jit(make_step(c, method, tx), donate_argnums=0, out_shardings=(shardings, None))
        step = step.lower(state, batch).compile()
        # XLA does not order such collectives with the step's other ones: CPU devices could wait for each other forever.
        assert not collectives_in_conditionals(step.as_text())
        history = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            history.append(jax.device_get(metrics))
    return history, state


@functools.cache
def tiny_method(name, *overrides, dtype="float32"):
    """`(config, method, params, extra, tokenizer)` of the smoke configuration of a method, with tiny towers."""
    values = [*SMALL.get(name, TINY), f"model.dtype={dtype}", *overrides]
    c = config.load(str(REPO / "configs" / f"{name}.py:smoke"), values)
    tokenizer = make_tokenizer(c.tokenizer)
    c = interface.resolve(c, tokenizer)
    method = interface.make_method(c)
    return c, method, *initialise(method.init, method.batch_spec(4)), tokenizer
