"""The model of a checkpoint: its method, weights and tokenizer."""

import json
from typing import Any, NamedTuple

import jax

from clip_jax import config as config_lib
from clip_jax import plugins
from clip_jax.errors import UserError
from clip_jax.methods.interface import make_method
from clip_jax.runtime import sharding
from clip_jax.training import checkpoint


class Stored(NamedTuple):
    """The model of a checkpoint.

    Attributes:
      config: the configuration of its run.
      method: its `clip_jax.methods.interface.Method`.
      params: the parameters or their moving average (EMA), on a mesh.
      extra: the method's state without a gradient, on the mesh.
      tokenizer: its tokenizer.
      step: the step of the checkpoint; None where its folder is named otherwise.
      ema: whether `params` are the moving average.
    """

    config: Any
    method: Any
    params: Any
    extra: Any
    tokenizer: Any
    step: int | None
    ema: bool


def load(path, which="latest", ema=None, mesh=None, overrides=()):
    """Returns the `Stored` model of a checkpoint.

    Args:
      path: a work folder, its `checkpoints` folder, or the folder of one step.
      which: `"latest"`, `"best"`, or a step.
      ema: True loads the moving average of the weights; None follows `eval.ema` of the configuration.
      mesh: the mesh of the arrays; None: all devices, with the parameters replicated.
      overrides: changes of the stored configuration, `["eval.batch_size=64", ...]`.

    Raises UserError when the checkpoint is missing, damaged, or has no moving average though `ema` asks for it.
    """
    folder = checkpoint.find(path, which)
    meta = checkpoint.read_meta(folder)
    config = config_lib.override(config_lib.from_json(json.dumps(meta["config"])), overrides)
    if meta.get("method"):
        plugins.recall(meta["method"], folder.parent.parent / checkpoint.METHOD)
    method = make_method(config)
    ema = config.eval.ema if ema is None else ema
    if ema and not config.optim.ema_decay:
        raise UserError(f"{str(folder)!r} has no moving average of the weights: its run had optim.ema_decay=0")
    mesh = mesh or sharding.make_mesh(config_lib.base().mesh)
    params, extra = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec(2))
    weights = "ema" if ema else "params"
    target = {weights: params, "extra": extra}
    layouts = sharding.state_shardings(target, mesh, method.sharding_rules)
    state = checkpoint.restore_arrays(folder, sharding.with_shardings(target, layouts))
    step = int(folder.name) if folder.name.isdigit() else None
    return Stored(config, method, state[weights], state["extra"], checkpoint.unpack_tokenizer(meta), step, ema)
