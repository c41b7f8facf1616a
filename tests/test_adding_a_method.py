"""docs/adding_a_method.md: its example is a method by its import path, and trains."""

import dataclasses
import functools
import importlib
import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import REPO
from helpers import losses, tiny_config

from clip_jax import config, plugins, train
from clip_jax.errors import UserError
from clip_jax.methods import interface
from clip_jax.methods.check import check_method
from clip_jax.training import checkpoint


@pytest.fixture
def example(tmp_path, monkeypatch):
    code, *_ = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_method", None)


def test_it_trains_and_the_run_has_a_copy(tmp_path, example):
    train.train(tiny_config("method=my_method", "train.steps=2"), tmp_path / "smoothed", print)
    train.train(tiny_config("train.steps=2"), tmp_path / "clip", print)
    smoothed, clip = losses(tmp_path / "smoothed"), losses(tmp_path / "clip")
    assert all(map(math.isfinite, smoothed.values())) and smoothed[1] != clip[1]
    text = (tmp_path / "smoothed" / "method" / "my_method.py").read_text()
    assert text == (tmp_path / "my_method.py").read_text()
    assert checkpoint.read_meta(checkpoint.find(tmp_path / "smoothed"))["method"]["text"] == text


def test_the_test_of_a_method(tmp_path, monkeypatch):
    """The page's own call of `check_method`."""
    for code in re.findall(r"```python\n(# .*?)```", (REPO / "docs" / "adding_a_method.md").read_text(), re.DOTALL):
        (tmp_path / re.match(r"# (\S+)", code)[1]).write_text(code)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("test_my_pairs").test_my_pairs()
    for name in ("my_pairs", "my_config", "test_my_pairs"):
        sys.modules.pop(name, None)


def noisy(base, params, extra, batch, rng, train):
    """An encoder whose randomness belongs to a part of the batch, not to an example."""
    features, extra = base.encode(params, extra, batch, rng, train)
    return {name: x + 0.1 * jax.random.normal(rng, x.shape) for name, x in features.items()}, extra


def one_sided(base, params, extra, features, batch, rng):
    return jnp.sum(features["image"][:, 0]) * base.scale(params), {}


@pytest.mark.parametrize(
    "field, function, message",
    [("encode", noisy, "2 micro-batches: loss"), ("loss", one_sided, "txt/.*: no gradient reaches it")],
)
def test_wrong_methods_do_not_pass(monkeypatch, field, function, message):
    base = interface.make_method

    def make(c):
        method = base(c)
        return dataclasses.replace(method, **{field: functools.partial(function, method)})

    monkeypatch.setattr(interface, "make_method", make)
    with pytest.raises(AssertionError, match=message):
        check_method(tiny_config())


def test_names_of_modules(example):
    assert plugins.load("my_method", "clip_jax.methods", "make").__name__ == "my_method"
    assert plugins.load("clip", "clip_jax.methods", "make").__name__ == "clip_jax.methods.clip"
    assert "interface" not in plugins.names("clip_jax.methods", "make")


@pytest.mark.parametrize(
    "name, message",
    [
        ("clipp", "'clipp' is neither one of .* clip, .* nor the import path of a module"),
        ("interface", "'interface' is neither one of"),
        ("no.such.module", "'no.such.module' is neither one of"),
        ("json", "'json': the module json has no function 'make'"),
    ],
)
def test_wrong_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        plugins.load(name, "clip_jax.methods", "make")


def test_a_checkpoint_remembers_the_module(tmp_path, monkeypatch):
    """It is found beside the configuration and in the current folder, recalled from its path, and else named."""
    code, *_ = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for number, folder in enumerate(("here", "configs")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"method_of_mine_{number}.py").write_text(code)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "configs" / "a.py").write_text("from clip_jax import config\nget_config = lambda v: config.base()\n")
    config.load(f"{tmp_path}/configs/a.py")
    about = [plugins.describe(f"method_of_mine_{number}", "clip_jax.methods", "make") for number in (0, 1)]
    assert about[0] == dict(name="method_of_mine_0", path=f"{tmp_path}/here/method_of_mine_0.py", text=code)
    assert plugins.describe("clip", "clip_jax.methods", "make") is None

    def forget():
        monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.startswith(str(tmp_path))])
        sys.modules.pop("method_of_mine_0", None)

    forget()
    plugins.recall(about[0], "runs/x/method")
    assert plugins.find("method_of_mine_0").__file__ == about[0]["path"]
    forget()
    (tmp_path / "here" / "method_of_mine_0.py").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'method_of_mine_0' is missing, .*: set PYTHONPATH=runs/x/method$"):
        plugins.recall(about[0], "runs/x/method")


def test_a_changed_module_is_a_warning(tmp_path, example, caplog):
    about = plugins.describe("my_method", "clip_jax.methods", "make")
    plugins.recall(about, "runs/x/method")
    assert not caplog.text
    plugins.recall(about | {"text": "other"}, "runs/x/method")
    assert "differs from the module 'my_method'" in caplog.text
