"""The program of a training step: its shapes, its compilation and its FLOPs."""

import logging
import math
import re
from typing import Any, NamedTuple

import jax

from clip_jax import config as config_lib
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.methods import interface
from clip_jax.runtime import sharding, xla_flags
from clip_jax.training.step import cast_kernels, make_init, make_step, state_shapes


class Program(NamedTuple):
    """A configuration with everything that its step is compiled from.

    Attributes:
      config: the resolved configuration.
      method: its `Method`.
      tx: its optimizer.
      state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`.
      batch: `{name: array or jax.ShapeDtypeStruct}`, each `[B, ...]`.
    """

    config: Any
    method: Any
    tx: Any
    state: Any
    batch: Any


def make_program(config):
    """Returns the `Program` of a configuration as shapes. It needs no data and no device.

    Raises UserError when the configuration is wrong.
    """
    config_lib.validate(config)
    config = interface.resolve(config, make_tokenizer(config.tokenizer))
    method = interface.make_method(config)
    batch = method.batch_spec(config.data.batch_size)
    init, tx = make_init(config, method, batch)
    return Program(config, method, tx, state_shapes(init), batch)


def shard(program, mesh):
    """Returns `(program, state bytes, batch bytes)`: the shapes with their shardings, and the bytes per device.

    Raises UserError when the devices do not divide the batch.
    """
    config = program.config
    sharding.check_batch(config.data.batch_size, mesh, micro_batches=config.micro_batches)
    layouts = sharding.state_shardings(program.state, mesh, program.method.sharding_rules)
    state = sharding.with_shardings(program.state, layouts)
    batch = sharding.with_shardings(program.batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), program.batch))
    return program._replace(state=state, batch=batch), shard_bytes(state), shard_bytes(batch)


def shard_bytes(tree):
    """The bytes of a pytree of arrays or shapes with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def summed_bytes(program):
    """The bytes of the gradients on one device as they are summed over devices, by `optim.grad_dtype`."""
    params = program.state.params
    shapes = jax.eval_shape(lambda params: cast_kernels(params, program.config.optim.grad_dtype), params)
    return shard_bytes(sharding.with_shardings(shapes, jax.tree.map(lambda x: x.sharding, params)))


def trace_step(program):
    """Returns the traced step `(state, batch) -> (state, metrics)`, which donates the state, a `jax.stages.Traced`.

    Args:
      program: a `Program` whose state and batch have shardings; the step returns the state in the same ones.
    """
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    step = make_step(program.config, program.method, program.tx)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(program.state, program.batch)


def compile_step(program, traced=None, more=None):
    """Returns the compiled step of a `Program` with shardings, a `jax.stages.Compiled`.

    Args:
      program: the `Program`.
      traced: None, or a result of `trace_step`, which saves the tracing.
      more: None, or further `{option: value}` for the compiler.
    """
    traced = traced or trace_step(program)
    return _compile(traced.lower(), compiler_options(program) | (more or {}))


def compiler_options(program):
    """Returns the `{option: value}` for the compiler of a `Program`'s step; empty with `train.xla_flags=false`."""
    if not program.config.train.xla_flags:
        return {}
    device = min(jax.tree.leaves(program.state)[0].sharding.device_set, key=lambda device: device.id)
    return xla_flags.options(device.device_kind)


def _compile(lowered, options):
    """Compiles with options; leaves out, with a warning, those that this version of the compiler does not have."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '(\w+)'", str(error))
        if not unknown or unknown[1] not in options:
            raise
    logging.getLogger(__name__).warning("this compiler has no option %s: the step is compiled without it", unknown[1])
    return _compile(lowered, {name: value for name, value in options.items() if name != unknown[1]})


def device_bytes(compiled):
    """The bytes that a `jax.stages.Compiled` takes on one device, or None when the compiler does not report them."""
    memory = compiled.memory_analysis()
    if not memory:
        return None
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arrays + memory.temp_size_in_bytes


def step_flops(program):
    """FLOPs of the matrix products and convolutions of a step as written, over all devices."""
    step = make_step(program.config, program.method, program.tx)
    return jaxpr_flops(jax.make_jaxpr(step)(program.state, program.batch))


def model_flops(config, traced=None):
    """FLOPs of the model in a step: forward and backward pass, over the whole batch.

    What rematerialisation, micro-batches and fused attention compute twice counts once. Where the step has none of
    them, `traced`, the step by `trace_step` for the devices of this machine, saves the tracing.
    """
    is_plain = config.model.attention == "plain" or jax.default_backend() == "cpu"
    if traced and is_plain and config.micro_batches == 1 and config.model.remat == "none":
        return jaxpr_flops(traced.jaxpr)
    plain = config.copy_and_resolve_references()
    plain.micro_batches = 1
    plain.model.remat, plain.model.attention = "none", "plain"
    return step_flops(make_program(plain))


def jaxpr_flops(jaxpr):
    """FLOPs of the matrix products and convolutions of a `ClosedJaxpr`.

    A scan counts all of its rounds, a `cond` its most expensive branch, a `while` one round, a Pallas kernel its own
    figure. A `shard_map` counts once for every device of its mesh. A multiplication and an addition are two FLOPs.
    """
    return _jaxpr_flops(jaxpr.jaxpr)


def _jaxpr_flops(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            # In the gradient of a strided convolution the input lies between zeros, which are no work.
            zeros = math.prod(eqn.params["lhs_dilation"])
            total += 2 * out * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]] // zeros
        elif name == "pallas_call":
            total += eqn.params["cost_estimate"].flops
        else:
            values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
            inner = [_jaxpr_flops(getattr(v, "jaxpr", v)) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
            times = eqn.params["mesh"].size if name == "shard_map" else eqn.params.get("length", 1)
            total += max(inner) if name == "cond" else times * sum(inner)
    return total
