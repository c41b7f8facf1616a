"""docs/adding_a_source.md: its example is a source by its import path, and trains."""

import math
import pickle
import re
import sys

import numpy as np
import pytest
from conftest import REPO
from helpers import losses, tiny_config

from clip_jax import train
from clip_jax.data.sources import make_source
from clip_jax.errors import UserError

PATH = "my_package.my_source"


@pytest.fixture(autouse=True)
def example(tmp_path, monkeypatch):
    """The example of the documentation as a module outside of the package."""
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "adding_a_source.md").read_text(), re.DOTALL)
    folder = tmp_path / "modules" / "my_package"
    folder.mkdir(parents=True)
    (folder / "my_source.py").write_text(code)
    (folder / "no_source.py").write_text("")
    monkeypatch.syspath_prepend(folder.parent)
    yield
    for name in ("my_package", PATH, "my_package.no_source"):
        sys.modules.pop(name, None)


def test_records():
    source = make_source(f"{PATH}?records=40&size=16")
    assert len(source) == 40 and source.name == "colors:train" and source.broken == {}
    record, copy = source[7], pickle.loads(pickle.dumps(source))[7]
    assert record["image"].shape == (16, 16, 3) and record["image"].dtype == np.uint8
    assert record["texts"] == [f"a {record['class_name']} square"]
    assert source.class_names[record["label"]] == record["class_name"]
    np.testing.assert_array_equal(copy.pop("image"), record.pop("image"))
    assert copy == record
    assert not np.array_equal(make_source(PATH, "test")[7]["image"], make_source(PATH)[7]["image"])


def test_steps_and_mixtures():
    red = make_source(f"{PATH}?records=40?where=class_name:red")
    assert 0 < len(red) < 40 and {red[i]["class_name"] for i in range(len(red))} == {"red"}
    mixture = make_source(f"{PATH}?records=40?where=class_name:red*3 + {PATH}?records=10")
    assert len(mixture) == len(red) + 10 and mixture.weights == [3.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        (f"{PATH}?record=40", "train", r"my_source\?record=40: my_package.my_source.make\(.*unexpected .*'record'"),
        (PATH, "tset", r"no split 'tset' \(did you mean 'test'\?\)"),
        ("my_package.no_source", "train", r"no_source: the module has no function make\(split"),
        ("my_package.nowhere", "train", "my_package.nowhere: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(spec, split, message):
    with pytest.raises(UserError, match=message) as error:
        make_source(spec, split)
    assert "\n" not in str(error.value)


def test_it_trains(tmp_path):
    train.train(tiny_config(f"data.source={PATH}?records=64&size=16", "data.templates=()"), tmp_path / "run", print)
    values = losses(tmp_path / "run")
    assert sorted(values) == [1, 2, 3, 4, 5, 6] and all(map(math.isfinite, values.values()))
