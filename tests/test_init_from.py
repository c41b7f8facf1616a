"""Runs that start from weights: all or some of them, third-party, resized, sharded; one-line errors."""

import jax
import numpy as np
import pytest
from conftest import REPO
from flax import traverse_util
from helpers import TINY, tiny_config

import clip_jax
from clip_jax import config, init_from, train
from clip_jax.errors import UserError
from clip_jax.interop.export import export
from clip_jax.runtime import sharding
from clip_jax.training import checkpoint

CLASSIC = """model.image.pool=cls model.image.cls_token=true model.image.ln_pre=true model.text.pool=eot
    model.text.causal=true model.text.mask_padding=false model.image.act=gelu model.text.act=gelu
    tokenizer=clip_bpe""".split()


def flat(params):
    return {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def begin(workdir, *overrides, save=True):
    """Returns `(state, lines)` of a run before its first step, which is saved as checkpoint 0."""
    config, source, tokenizer, method = train.make_parts(tiny_config(*overrides))
    init_from.check(config, tokenizer, workdir)
    mesh = sharding.make_mesh(config.mesh)
    batch = method.batch_spec(config.data.batch_size, sharding.batch_sharding(mesh))
    lines = []
    with jax.set_mesh(mesh), checkpoint.Checkpointer(workdir, config, tokenizer) as checkpointer:
        state, _ = train.init_or_restore(config, source, method, mesh, checkpointer, batch, tokenizer, lines.append)
        if save:
            checkpointer.save(0, state, {})
            checkpointer.wait()
    return state, lines


def run(workdir, *overrides):
    state, lines = begin(workdir, *overrides, save=False)
    return flat(state.params), lines


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A work folder whose weights differ from those of the default seed, and its parameters."""
    workdir = tmp_path_factory.mktemp("source") / "run"
    return workdir, flat(begin(workdir, "seed=7")[0].params)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An open_clip folder of a tiny model, and its parameters as clip_jax names them."""
    folder = tmp_path_factory.mktemp("foreign")
    begin(folder / "run", "seed=7", *CLASSIC)
    model = clip_jax.load(folder / "run")
    export(model, "open_clip", folder / "model")
    return folder / "model", flat(model.params)


def same(found, expected):
    """Returns the paths whose arrays are equal."""
    return {path for path, x in found.items() if path in expected and np.array_equal(x, expected[path])}


def test_a_run_starts_from_a_checkpoint(source, tmp_path):
    workdir, params = source
    found, lines = run(tmp_path, f"init_from={workdir}")
    assert same(found, params) == set(found)
    count = sum(x.size for x in params.values())
    assert lines == [f"started from {workdir}: {count:,} parameters"]


def test_a_part_of_a_checkpoint(source, tmp_path):
    workdir, params = source
    found, _ = run(tmp_path, f"init_from={workdir}", "init_from_params=^img/,^logit_scale$")
    moved = {path for path in found if np.ptp(found[path])}  # gains and biases are constant at the start
    assert same(found, params) & moved == {path for path in moved if path.startswith("img/")}


def test_layers_that_are_stacked_on_one_side_only(source, tmp_path):
    workdir, params = source
    stacked = flat(begin(tmp_path / "a", f"init_from={workdir}", "model.scan=true")[0].params)
    np.testing.assert_array_equal(stacked["img/block/mlp/fc1/kernel"][0], params["img/block_0/mlp/fc1/kernel"])
    again, _ = run(tmp_path / "b", f"init_from={tmp_path / 'a'}", "init_from_params=/block_0/attn/,^txt/embed/")
    moved = {path for path in again if np.ptp(again[path])}
    assert same(again, params) & moved == {path for path in moved if "/attn/" in path or "txt/embed/" in path}


def test_third_party_weights(foreign, tmp_path):
    folder, params = foreign
    found, _ = run(tmp_path / "all", f"init_from={folder}", *CLASSIC)
    assert same(found, params) == set(found)
    found, _ = run(tmp_path / "part", f"init_from={folder}", "init_from_params=attn/query/kernel$", *CLASSIC)
    moved = {path for path in found if np.ptp(found[path])}
    assert same(found, params) & moved == {path for path in moved if "attn/query/kernel" in path}, (
        "a part of a fused matrix"
    )


@pytest.mark.parametrize("name", ["source", "foreign"])
def test_positions_are_resized_on_request_only(name, request, tmp_path):
    folder, params = request.getfixturevalue(name)
    larger = [
        "model.image.size=32",
        f"init_from={folder}",
        "init_from_params=^img/",
        *(CLASSIC if name == "foreign" else []),
    ]
    with pytest.raises(UserError, match=r"other shapes: img/pos \(.* there, .* here\); init_from_resize=True resizes"):
        run(tmp_path / "a", *larger)
    found, lines = run(tmp_path / "b", "init_from_resize=true", *larger)
    assert (
        lines[0].endswith("position embeddings resized")
        and found["img/pos"].shape[1] - params["img/pos"].shape[1] == 12
    )
    assert same(found, params) >= {path for path in found if path.startswith("img/")} - {"img/pos"}
    np.testing.assert_allclose(found["img/pos"].mean(1), params["img/pos"].mean(1), atol=0.1)


def test_arrays_reach_only_their_own_devices(source, tmp_path):
    mesh = ["mesh.fsdp=2", "mesh.tensor=2"]
    fresh, _ = begin(tmp_path / "fresh", *mesh, save=False)
    started, _ = begin(tmp_path / "started", f"init_from={source[0]}", *mesh, save=False)
    assert same(flat(started.params), source[1]) == set(source[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, fresh, started))
    kernel = started.params["img"]["block_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_the_moving_average_starts_from_the_same_weights(source, tmp_path):
    state, _ = begin(tmp_path, f"init_from={source[0]}", "optim.ema_decay=0.5", save=False)
    assert same(flat(state.ema), source[1]) == set(source[1])
    assert state.ema["logit_scale"] is not state.params["logit_scale"]


def test_running_statistics_go_with_the_parameters(tmp_path, monkeypatch):
    plain = tiny_config

    def resnet(*overrides):
        config = plain(*overrides).unlock()
        config.model.image = dict(kind="resnet", size=32, layers=(1, 1), width=8)
        return config.lock()

    monkeypatch.setitem(globals(), "tiny_config", resnet)
    init = train.init_or_restore
    with monkeypatch.context() as patch:

        def moved(*args):
            state, tx = init(*args)
            return state.replace(extra=jax.tree.map(lambda x: x + 0.5, state.extra)), tx

        patch.setattr(train, "init_or_restore", moved)
        begin(tmp_path / "source")
    started, _ = begin(tmp_path / "run", f"init_from={tmp_path / 'source'}", "init_from_params=^img/stem/", save=False)
    stats = flat(started.extra["batch_stats"]["img"])
    assert stats["stem/bn1/mean"][0] == 0.5 and stats["layer_1_0/bn1/mean"][0] == 0.0


def test_one_tower_for_both_and_its_teacher(tmp_path, monkeypatch):
    """OneR: the teacher starts as a copy of the student, and what shapes do not show is compared."""
    tiny = [o for o in TINY if not o.startswith("model.text")] + ["oner.head_width=16", "oner.predictor=true"]
    monkeypatch.setitem(
        globals(), "tiny_config", lambda *more: config.load(str(REPO / "configs" / "oner.py:small_itc"), [*tiny, *more])
    )
    source, _ = begin(tmp_path / "source", "seed=7")
    started, _ = begin(tmp_path / "run", f"init_from={tmp_path / 'source'}", save=False)
    teacher, student = started.extra["teacher"], {name: started.params[name] for name in started.extra["teacher"]}
    assert jax.tree.all(jax.tree.map(np.array_equal, student, {name: source.params[name] for name in teacher}))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a is not b, teacher, student))
    for override, message in (
        ("model.image.act=quick_gelu", "model.image.act='gelu_tanh' there, 'quick_gelu' here"),
        ("model.image_mean=(0.5,0.5,0.5)", "model.image_mean"),
        ("tokenizer=sentencepiece?pad_with_eot=true", "the tokenizer 'sentencepiece' there differs"),
    ):
        with pytest.raises(UserError, match=message):
            begin(tmp_path / "wrong", f"init_from={tmp_path / 'source'}", override)


def test_a_resumed_run_ignores_init_from(tmp_path):
    before, _ = begin(tmp_path, "seed=3")
    found, lines = run(tmp_path, "seed=3", "init_from=/no/such/folder")
    assert same(found, flat(before.params)) == set(found) and not lines


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init_from=/no/such/folder"], "init_from: there is no checkpoint: '/no/such/folder' is no folder"),
        (["init_from_params=^img/"], "need init_from"),
        (
            ["init_from={source}", "init_from_params=^img/,^nothing/"],
            r"init_from_params: '\^nothing/' matches no parameter for which .* names a source; paths look like",
        ),
        (
            ["init_from=img={source}", "init_from_params=^img/,^txt/"],
            r"'\^txt/' matches no parameter for which .* names",
        ),
        (["init_from={source}", "init_from_params=("], "init_from_params: '\\(' is not a regular expression"),
        (["init_from={source}", "model.image.width=64"], r"other shapes: img/.* \(.*32 there, .*64 here\)"),
        (["init_from={source}", "model.text.depth=2"], r"has no txt/block_1/.*; init_from_params chooses"),
        (["init_from={source}", "model.image.act=quick_gelu"], "model.image.act='gelu_tanh' there, 'quick_gelu' here"),
        (
            ["init_from={source}", "model.image_mean=(0.5,0.5,0.5)"],
            r"model.image_mean=\(0.48.* there, \(0.5, 0.5, 0.5\) here",
        ),
        (
            ["init_from={source}", "tokenizer=sentencepiece?pad_with_eot=true"],
            "the tokenizer 'sentencepiece' there differs",
        ),
        (
            ["init_from={foreign}", "init_from_params=^img/block", "model.image.act=quick_gelu"],
            "model.image.act='gelu' there",
        ),
        (["init_from={foreign}", "init_from_params=^img/"], "model.image.act='gelu' there, 'gelu_tanh' here"),
    ],
)
def test_wrong_sources_are_refused_in_one_line(source, foreign, tmp_path, overrides, message, monkeypatch):
    """Before the state is made."""
    monkeypatch.setattr(sharding, "place", lambda *_: pytest.fail("the state was made"))
    overrides = [override.format(source=source[0], foreign=foreign[0]) for override in overrides]
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_a_bare_state_dict_says_to_import_it_first(foreign, tmp_path):
    (tmp_path / "open_clip_model.safetensors").write_bytes((foreign[0] / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="give --act=.* import it first: python -m clip_jax.interop.load"):
        run(tmp_path / "run", f"init_from={tmp_path}")
