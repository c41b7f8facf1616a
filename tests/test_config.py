"""Configurations: every shipped variant, overrides from the command line, the one-line errors, and storage."""

import dataclasses
import json
import pathlib

import pytest
from conftest import REPO

from clip_jax import config
from clip_jax.errors import UserError

CLIP = str(REPO / "configs" / "clip.py")


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_short(path):
    for variant in ("", *config.load_module(str(path))[0].VARIANTS):
        config.validate(config.load(f"{path}:{variant}"))
    assert len(path.read_text().splitlines()) <= 80


def test_published_recipe():
    c = config.load(f"{CLIP}:l14")
    assert (c.data.batch_size, c.optim.lr, c.optim.weight_decay, c.optim.warmup_steps) == (32768, 4e-4, 0.2, 2000)
    assert (c.optim.b1, c.optim.b2, c.optim.eps) == (0.9, 0.98, 1e-6)
    assert (c.model.image.width, c.model.text.width, c.model.embed_dim, c.tokenizer) == (1024, 768, 768, "clip_bpe")
    assert c.train.steps * c.data.batch_size == pytest.approx(32 * 400e6, rel=1e-3)


def test_overrides_take_the_type_of_the_field():
    c = config.load(
        CLIP,
        ["optim.lr=3e-4", "train.steps=1e3", "optim.lr_mult=(('^img', 0.1),)", "data.augment=rrc(0.5, 1.0),flip",
         "data.source=/data/x.csv", "eval.ema=true", "model.image.stem=(8, 16)", "mesh={'fsdp': 2}", "seed=7"],
    )  # fmt: skip
    assert (c.optim.lr, c.train.steps, c.seed, c.eval.ema, c.mesh.fsdp, c.mesh.data) == (3e-4, 1000, 7, True, 2, -1)
    assert (
        c.optim.lr_mult == (("^img", 0.1),)
        and c.data.augment == ("rrc(0.5, 1.0)", "flip")
        and c.model.image.stem == (8, 16)
    )


def test_a_path_for_the_section_data_is_its_source():
    assert config.load(CLIP, ["data=/data/cc3m/*.tar"]).data.source == "/data/cc3m/*.tar"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lrr=1", "unknown config key 'optim.lrr' .did you mean 'optim.lr'"),
        ("optmi.lr=1", "did you mean 'optim.lr'"),
        ("optim.lr.x=1", "unknown config key 'optim.lr.x'"),
        ("train.steps=ten", "'train.steps' is of type int, got 'ten'"),
        ("train.steps=1.5", "'train.steps' is of type int"),
        ("optim.lr=fast", "'optim.lr' is of type float"),
        ("eval.ema=maybe", "'eval.ema' is of type bool"),
        ("optim=3", "'optim' is a section"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(UserError, match=message) as error:
        config.load(CLIP, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("configs/none.py", "there is no file"),
        (f"{CLIP}:b33", "did you mean 'b32'"),
        (f"{CLIP}:rn5", "did you mean 'rn50'"),
    ],
)
def test_wrong_config_files(spec, message):
    with pytest.raises(UserError, match=message):
        config.load(spec)


def test_sibling_loads_from_the_folder_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the working directory does not matter
    c = config.sibling(str(REPO / "configs" / "siglip.py"), "clip.py:smoke")
    assert c == config.load(f"{CLIP}:smoke") and c.is_locked
    with pytest.raises(UserError, match="there is no file"):
        config.sibling(CLIP, "clipp.py")


def test_a_config_file_without_get_config(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="has no function get_config"):
        config.load(str(path))


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.batch_size=0", "data.batch_size=0: must be at least 1"),
        ("optim.b2=1.0", "optim.b2=1.0: must be at least 0 and below 1"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.name=adam", "optim.name 'adam' .did you mean 'adamw'"),
        ("model.remat=yes", "model.remat 'yes'; allowed: none, dots, full"),
        ("model.attention=flash", "model.attention 'flash'; allowed: auto, plain"),
        ("micro_batches=0", "micro_batches=0: must be at least 1"),
        ("model.logit_scale_init=nan", "model.logit_scale_init=nan: must be finite"),
        ("optim.schedule=cos", "did you mean 'cosine'"),
        ("model.dtype=bf16", "model.dtype 'bf16'"),
        ("optim.warmup_steps=100000", "is more than train.steps"),
        ("eval.ema=true", "needs optim.ema_decay"),
        ("optim.freeze=('(',)", "not a regular expression"),
        ("optim.lr_mult=('img',)", "pairs"),
        ("optim.lr_mult=(('^img', -1),)", "a factor must be a finite number, at least 0"),
        ("optim.lr=inf", "optim.lr=inf: must be a finite number, at least 0"),
        ("optim.eps=-1e-6", "optim.eps=-1e-06: must be"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan: must be"),
        ("optim.lr_end=1.5", "optim.lr_end=1.5: must be between 0 and 1"),
        ("optim.lr_end=nan", "optim.lr_end=nan: must be"),
        ("optim.warmup_from=-0.5", "optim.warmup_from=-0.5: must be a finite rate, at least 0, or -1"),
        ("optim.warmup_from=nan", "optim.warmup_from=nan: must be"),
    ],
)
def test_wrong_values(override, message):
    with pytest.raises(UserError, match=message) as error:
        config.validate(config.load(CLIP, [override]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("schedule=onecycle cooldown_steps=10", "optim.cooldown_steps=10 has no effect with optim.schedule='onecycle'"),
        (
            "schedule=onecycle lr_end=0.1",
            "optim.lr_end=0.1 has no effect .*, only with cosine, linear: set it to 0.0",
        ),
        ("schedule=onecycle warmup_from=0", "optim.warmup_from=0.0 has no effect .*: set it to -1.0"),
        ("schedule=rsqrt lr_end=0.1", "optim.lr_end=0.1 has no effect with optim.schedule='rsqrt'"),
        ("schedule=constant decay_from_start=true", "optim.decay_from_start=True has no effect"),
        ("schedule=constant lr_hold_steps=7", "optim.lr_hold_steps=7 has no effect"),
        ("timescale=100", "optim.timescale=100 has no effect with optim.schedule='cosine', only with rsqrt"),
        (
            "name=sgd b1_cycle=(0.95,0.85)",
            "optim.b1_cycle=.* has no effect .*, only with adamw, lamb",
        ),
        ("name=adafactor b1_cycle=(0.95,0.85)", "optim.b1_cycle=.* has no effect with optim.name='adafactor'"),
        ("lamb_adapt_all=true", "optim.lamb_adapt_all=True has no effect with optim.name='adamw', only with lamb"),
        ("lamb_max_norm=10", "optim.lamb_max_norm=10.0 has no effect"),
        ("lamb_bias_correction=false", "optim.lamb_bias_correction=False has no effect .*: set it to True"),
        ("name=sgd lamb_fuse_qkv=true", "optim.lamb_fuse_qkv=True has no effect"),
    ],
)
def test_options_without_effect(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        config.validate(config.load(CLIP, [f"optim.{o}" for o in overrides.split()]))
    assert "\n" not in str(error.value)


def test_storage_keeps_every_value():
    c = config.load(f"{CLIP}:b16", ["optim.lr_mult=(('a', 0.5), ('b', 0.0))"])
    restored = config.from_json(config.to_json(c))
    assert restored == c and config.differences(c, restored) == []


def test_differences_name_the_fields():
    a, b = config.load(CLIP), config.load(CLIP, ["optim.lr=1", "model.embed_dim=64"])
    assert config.differences(a, b) == [("model.embed_dim", a.model.embed_dim, 64), ("optim.lr", a.optim.lr, 1.0)]
    assert [key for key, _, _ in config.differences(a, b, ("model",))] == ["model.embed_dim"]


def test_resolve_takes_the_vocabulary_from_the_tokenizer():
    class Tokenizer:
        vocab_size, eot_id = 100, 7
        mask_id = None

    c = config.base()
    assert config.resolve(c, Tokenizer).model.text.vocab_size == 100 and c.model.text.vocab_size == 0
    c.model.text.vocab_size = 99
    with pytest.raises(UserError, match="model.text.vocab_size=99, but the tokenizer"):
        config.resolve(c, Tokenizer)


def test_configs_open_with_their_command():
    for path in pathlib.Path(REPO / "configs").glob("*.py"):
        assert f"python -m clip_jax.train --config=configs/{path.name}" in path.read_text()


def test_a_method_and_its_options_are_set_together():
    @dataclasses.dataclass
    class Options:
        weight: float = 0.5
        names: tuple[str, ...] = ("a",)

    c = config.set_method(config.base(), "mine", Options(weight=2.0))
    assert c.method == "mine" and c.mine.to_dict() == dict(weight=2.0, names=("a",)) and c.mine.is_locked


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("method"), "it has no 'method'"),
        (lambda c: c.update(model=None), "model=None is not a section"),
        (lambda c: c["model"].update(embed_dim="64"), "model.embed_dim='64' must be of type int"),
        (lambda c: c["model"].update(image=[1]), r"model.image=\(1,\)"),
        (lambda c: c["model"]["image"].update(kind=3), "model.image="),
        (lambda c: c["data"].update(batch_size=True), "data.batch_size=True must be of type int"),
        (lambda c: c["data"].update(augment="rrc"), "data.augment='rrc' must be of type tuple"),
        (lambda c: c.update(optim=7), "optim=7 is not a section"),
    ],
)
def test_a_damaged_stored_configuration_is_one_line(change, message):
    stored = json.loads(config.to_json(config.base()))
    change(stored)
    with pytest.raises(UserError, match=message) as error:
        config.from_json(json.dumps(stored))
    assert "\n" not in str(error.value)


def test_fields_that_were_added_later_have_their_defaults():
    stored = json.loads(config.to_json(config.base()))
    del stored["optim"]["grad_dtype"], stored["data"]["rewrites"], stored["log"]
    assert config.differences(config.from_json(json.dumps(stored)), config.base()) == []


@pytest.mark.parametrize(
    "field, value",
    [("width", "768"), ("depth", 2.5), ("ln_eps", "x"), ("cls_token", 1), ("act", 3), ("heads", True), ("stem", 1.5)],
)
def test_a_tower_field_of_a_wrong_type_is_one_line(field, value):
    from clip_jax.models.towers import image_tower

    stored = json.loads(config.to_json(config.base()))
    stored["model"]["image"][field] = value
    with pytest.raises(UserError, match=f"model.image.{field}={value!r}: must be of type"):
        image_tower(config.from_json(json.dumps(stored)).model)
