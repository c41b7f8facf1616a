"""docs/adding_a_method.md: its example is a method by its import path, and trains."""

import math
import re
import sys

import pytest
from conftest import REPO
from helpers import losses, tiny_config

from clip_jax import plugins, train
from clip_jax.errors import UserError


@pytest.fixture
def example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "adding_a_method.md").read_text(), re.DOTALL)
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_method", None)


def test_it_trains(tmp_path, example):
    train.train(tiny_config("method=my_method", "train.steps=2"), tmp_path / "smoothed", print)
    train.train(tiny_config("train.steps=2"), tmp_path / "clip", print)
    smoothed, clip = losses(tmp_path / "smoothed"), losses(tmp_path / "clip")
    assert all(map(math.isfinite, smoothed.values())) and smoothed[1] != clip[1]


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
