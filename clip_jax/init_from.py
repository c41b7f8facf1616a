"""Starts a run from existing weights (`config.init_from`): a checkpoint of this project, or third-party weights.

`config.init_from_params` holds regular expressions on parameter paths, which choose the parameters that are taken. Each
must match a parameter, and each matching parameter must be in the source with the same shape. Layers are called
`block_0`, `block_1`, ... in these paths, also with `model.scan`. Running statistics (BatchNorm) come with the
parameters of the same path.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from clip_jax import config as config_lib
from clip_jax.errors import UserError, unknown

#: Fields that change what a tower computes but not the shapes of its weights.
SILENT = ("act", "ln_eps", "heads", "posemb", "padding", "causal", "mask_padding", "first_position", "first_residual")
COLOURS = ("image_mean", "image_std")
#: What `config.init_from_allow` may hold.
ALLOWED = (
    *(f"model.{which}.{field}" for which in ("image", "text") for field in SILENT),
    *(f"model.{f}" for f in COLOURS),
)
POS, TEXT_POS = "img/pos", "txt/pos"


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
      path: their path, as given.
      config: their configuration.
      shapes: `{path: jax.ShapeDtypeStruct}`, layers not stacked; running statistics under `batch_stats/`.
      load: `{path: jax.ShapeDtypeStruct with sharding} -> {path: array}`. It reads only these arrays and those that are
        stored with them.
      fingerprint: the fingerprint of their tokenizer, or None.
      resize: how position embeddings are resized, see `clip_jax.interop.towers.load.resize_positions`.
    """

    path: str
    config: Any
    shapes: dict
    load: Callable
    fingerprint: str | None = None
    resize: str = "antialias"


def check(config, tokenizer, workdir):
    """Checks, without touching a device, that a new run in `workdir` finds its weights and that they fit.

    Args:
      config: the configuration, resolved.
      tokenizer: the run's tokenizer.
      workdir: the work folder.

    Raises UserError as `start` does.
    """
    import jax

    from clip_jax.interop.towers.files import is_foreign, sources
    from clip_jax.methods.interface import init_shapes
    from clip_jax.training import checkpoint

    for field in config.init_from_allow:
        if field not in ALLOWED:
            raise unknown("init_from_allow", field, ALLOWED)
    if not config.init_from or checkpoint.committed(workdir / "checkpoints"):  # a resumed run does not need it
        return
    for path in sources(config.init_from).values():
        if is_foreign(path):
            recognized(path)
            continue
        try:
            checkpoint.find(path)
        except UserError as error:
            hint = f"train it first with --workdir={path}, or name another one: --config.init_from=PATH"
            raise UserError(f"init_from: {error}; {hint}") from None
    for _ in _matched(config, jax.eval_shape(_flat, *init_shapes(config)), tokenizer):
        pass


def start(config, state, tokenizer):
    """Returns `(state, line)`: the state with the weights of `config.init_from`, and a line that reports them.

    Args:
      config: the configuration.
      state: a new `TrainState`. The new weights take over its shardings.
      tokenizer: the run's tokenizer.

    Raises UserError when a pattern matches nothing, an array is missing or has another shape, or the source was trained
    with another value of a field in `SILENT`, another image normalisation or tokenizer.
    """
    import jax

    current = _flat(state.params, state.extra)
    found, resized = {}, False
    for source, chosen, resizes in _matched(config, current, tokenizer):
        targets = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in chosen.items()}
        loaded = source.load(targets | {name: _whole(source.shapes[name], targets[name]) for name in resizes})
        for name in resizes:
            loaded[name] = _resize(name, loaded[name], targets[name], config.model, source.resize)
        found |= {name: loaded[name] for name in targets}
        resized = resized or bool(resizes)
    params, stats = _nested(current | found, state.params, state.extra)
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    extra = state.extra | ({"batch_stats": stats} if stats else {})
    teacher = extra.get("teacher", {})
    student = {name: params.get(name) for name in teacher}
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (student, teacher)]
    if teacher and shapes[0] == shapes[1]:  # a moving average of the student begins as its copy
        copies = jax.tree.map(lambda new, old: jax.device_put(new.copy(), old.sharding), student, teacher)
        extra = extra | {"teacher": copies}
    count = sum(x.size for path, x in found.items() if not path.startswith("batch_stats/"))
    line = f"started from {config.init_from}: {count:,} parameters"
    line += "; position embeddings resized" if resized else ""
    ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, extra=extra, ema=ema), line


def complete(state, method, tokenizer, mesh):
    """Returns a new state with the parameters that `Method.start` computes from others."""
    import jax

    from clip_jax.methods.interface import Method
    from clip_jax.runtime import sharding

    if method.start is Method.start:
        return state
    params = method.start(state.params, state.extra, tokenizer, mesh)
    params = sharding.place(params, jax.tree.map(lambda x: x.sharding, state.params))
    ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, ema=ema)


def beginning(config, method, tokenizer, mesh):
    """Returns `(params, extra)` as a run with `init_from` had them before its first step, on the mesh.

    State that comes from data (`Method.init_from_data`) is left out. Raises UserError as `start` does.

    Args:
      config: the run's configuration, resolved.
      method: its `Method`.
      tokenizer: its tokenizer.
      mesh: the mesh.
    """
    import jax
    import jax.numpy as jnp

    from clip_jax.methods.interface import init_shapes
    from clip_jax.runtime import sharding
    from clip_jax.training.step import TrainState, first_state

    batch = {name: jnp.zeros(x.shape, x.dtype) for name, x in method.batch_spec(2).items()}
    layouts = sharding.state_shardings(init_shapes(config), mesh, method.sharding_rules)
    with jax.set_mesh(mesh):
        start_values = first_state(lambda key: method.init(key, batch), jax.random.key(config.seed), layouts)
        state = TrainState(0, *start_values, None, None, 0)
        state = complete(start(config, state, tokenizer)[0], method, tokenizer, mesh)
    return state.params, state.extra


def _matched(config, current, tokenizer):
    """Yields `(Source, {path: array or shape of the run}, paths to resize)` of each source; raises as `start` does."""
    from clip_jax.interop.towers.files import is_foreign, sources

    found = sources(config.init_from)
    params = [path for path in current if path.startswith(tuple(found)) and not path.startswith("batch_stats/")]
    for pattern in config.init_from_params:
        if params and not any(re.search(pattern, path) for path in params):
            raise UserError(
                f"init_from_params: {pattern!r} matches no parameter for which init_from={config.init_from!r} names a "
                f"source; paths look like {params[0]!r}, {params[-1]!r}"
            )
    for prefix, path in found.items():
        source = _foreign(path) if is_foreign(path) else _own(path)
        chosen = _choose(config, current, source, prefix)
        _check_meaning(config, source, chosen, tokenizer)
        yield source, chosen, _check_shapes(config, source, chosen)


def _flat(params, extra):
    """Returns `{path: array or shape}` of parameters, layers not stacked, and of running statistics."""
    import jax

    from clip_jax.models.transformer import unstack_layers
    from clip_jax.runtime.sharding import path_name

    tree = unstack_layers(_with_stats(params, extra))
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(flat, params, extra):
    """Returns `(params, running statistics)`, nested like the given ones: the inverse of `_flat`."""
    from flax import traverse_util

    from clip_jax.models.transformer import stack_layers

    tree = stack_layers(traverse_util.unflatten_dict(flat, sep="/"), _with_stats(params, extra))
    return {name: x for name, x in tree.items() if name != "batch_stats"}, tree.get("batch_stats", {})


def _with_stats(params, extra):
    return params | ({"batch_stats": extra["batch_stats"]} if "batch_stats" in extra else {})


def _choose(config, current, source, prefix):
    """Returns the run's arrays below `prefix` that `init_from_params` matches.

    Raises UserError when there is none, and when the source lacks an array.
    """
    from clip_jax.interop.layouts import list_names

    patterns = config.init_from_params or ("",)
    names = {path: path.removeprefix("batch_stats/") for path in current}
    chosen = {
        path: x
        for path, x in current.items()
        if names[path].startswith(prefix) and any(re.search(p, names[path]) for p in patterns)
    }
    if not chosen:
        raise UserError(f"init_from_params={config.init_from_params}: no pattern matches a parameter below {prefix!r}")
    if missing := chosen.keys() - source.shapes.keys():
        raise UserError(
            f"init_from: {source.path} has no {list_names(missing)}; init_from_params chooses the parameters to take; "
            "configs/clip.py:finetune takes the sizes from the weights"
        )
    return chosen


def _check_meaning(config, source, chosen, tokenizer):
    """Raises UserError when the run would use the weights differently than the source does."""
    ours, theirs = config.model, source.config.model
    problems, chosen = {}, [path.removeprefix("tower/") for path in chosen]  # of one tower for both
    for which, prefixes in (("image", ("img/", "block_")), ("text", ("txt/",))):
        if which not in ours or which not in theirs or not any(path.startswith(prefixes) for path in chosen):
            continue
        for field in SILENT:
            a, b = ours[which].get(field), theirs[which].get(field)
            if a is not None and b is not None and a != b:
                problems[f"model.{which}.{field}"] = f"{b!r} there, {a!r} here"
        if which == "image":
            problems |= {
                f"model.{f}": f"{tuple(theirs[f])} there, {tuple(ours[f])} here"
                for f in COLOURS
                if theirs[f] is not None and not _close(ours[f], theirs[f])
            }
    lines = [f"{field}={text}" for field, text in problems.items() if field not in config.init_from_allow]
    if "txt/embed/embedding" in chosen and source.fingerprint not in (None, tokenizer.fingerprint()):
        lines.append(f"the tokenizer {source.config.tokenizer!r} there differs from {config.tokenizer!r} here")
    if lines:
        raise UserError(f"init_from: {source.path} contradicts the configuration: {'; '.join(lines)}")


def _close(a, b):
    return all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))


def _check_shapes(config, source, targets):
    """Returns the paths whose arrays must be resized. Raises UserError for any other difference in shape."""
    from clip_jax.interop.layouts import list_names, shape_text

    differ = {path: source.shapes[path].shape for path, x in targets.items() if source.shapes[path].shape != x.shape}
    resizable = [path for path in differ if path == TEXT_POS or (path == POS and config.model.image.kind == "vit")]
    resized = resizable if config.init_from_resize else []
    if rest := differ.keys() - set(resized):
        notes = {path: f"{shape_text(differ[path])} there, {shape_text(targets[path].shape)} here" for path in rest}
        hint = "; configs/clip.py:finetune takes the sizes from the weights"
        hint = "; init_from_resize=True resizes the position embeddings" if rest <= set(resizable) else hint
        raise UserError(f"init_from: {source.path}: other shapes: {list_names(notes)}{hint}")
    return resized


def _whole(shape, target):
    """The shape of a source's array, replicated on every device of the target."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(target.sharding.mesh, PartitionSpec()))


def _resize(path, pos, target, model, how):
    import jax
    import numpy as np

    from clip_jax.interop.towers.load import resize_positions, resize_text_positions

    if path == TEXT_POS:
        new = resize_text_positions(np.asarray(pos), target.shape[1])
    else:
        first = int(model.image.cls_token)
        new = resize_positions(np.asarray(pos), round((target.shape[1] - first) ** 0.5), first, how)
    return jax.make_array_from_callback(target.shape, target.sharding, new.astype(target.dtype).__getitem__)


def recognized(path):
    """Returns the `Foreign` model of third-party weights; raises UserError that names `init_from`."""
    from clip_jax.interop import recognize

    try:
        return recognize.recognize(path)
    except UserError as error:
        command = f"python -m clip_jax.interop.load --from={path} --workdir=..."
        hint = f"; import it first: {command}" if "give --" in str(error) else ""
        raise UserError(f"init_from: {error}{hint}") from None


def _foreign(path):
    """Returns the Source of third-party weights."""
    from clip_jax.interop import layouts
    from clip_jax.interop import load as interop

    foreign = recognized(path)
    ours = interop.shapes(foreign.config)
    entries = foreign.entries(ours)
    layouts.check(entries, foreign.tensors, ours, foreign.ignored, f"init_from: {foreign.file}")
    full = {p.removeprefix("params/").removeprefix("extra/"): p for p in ours}

    def load(targets):
        wanted = {full[path]: x for path, x in targets.items()}
        used = [e for e in entries if any(p in wanted for p in e.ours)]
        some = next(iter(targets.values()))
        # An entry that fuses several arrays is read as a whole.
        placed = {p: wanted[p] if p in wanted else _whole(ours[p], some) for e in used for p in e.ours}
        found = layouts.load(used, foreign.tensors, placed)
        return {path: found[full[path]] for path in targets}

    shapes = {path: ours[p] for path, p in full.items()}
    return Source(str(path), foreign.config, shapes, load, resize=foreign.resize)


def _own(path):
    """Returns the Source of a checkpoint of this project: its moving average when its configuration evaluates that."""
    import jax

    from clip_jax.methods.interface import init_shapes, make_method
    from clip_jax.runtime import sharding
    from clip_jax.training import checkpoint

    try:
        folder = checkpoint.find(path)
        meta = checkpoint.read_meta(folder)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    config = config_lib.from_json(json.dumps(meta["config"]))
    params, extra = init_shapes(config)
    weights = "ema" if config.eval.ema else "params"
    unstacked = jax.eval_shape(_flat, params, extra)

    def load(targets):
        # Stacked layers are stored as one array. A transformer's stack is read when one of its layers is needed, the
        # stacks of an EfficientNet ("_to_") always.
        names = targets.keys() | {re.sub(r"/block_\d+/", "/block/", name) for name in targets}

        def is_needed(name):
            return re.sub(rf"^({weights}|extra)/", "", name) in names or "_to_" in name

        tree = _only({weights: params, "extra": extra}, is_needed)
        mesh = next(iter(targets.values())).sharding.mesh
        placed = sharding.with_shardings(tree, sharding.state_shardings(tree, mesh, make_method(config).sharding_rules))
        try:
            state = checkpoint.restore_arrays(folder, placed)
        except UserError as error:
            raise UserError(f"init_from: {error}") from None
        found = _flat(state.get(weights, {}), state.get("extra", {}))
        return {name: jax.device_put(found[name], x.sharding) for name, x in targets.items()}

    return Source(str(path), config, unstacked, load, meta["tokenizer"]["fingerprint"])


def _only(tree, keep):
    """Returns the leaves of nested dicts for whose path `keep` is true."""
    from flax import traverse_util

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({name: x for name, x in flat.items() if keep(name)}, sep="/")
