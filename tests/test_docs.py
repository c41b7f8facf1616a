"""What the documentation shows runs, and what it names is there."""

import re

import pytest
from conftest import REPO
from helpers import tiny_config

from clip_jax import config, train

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def test_the_library_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.train(tiny_config("train.steps=1"), "runs/clip", lambda line: None)
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "library.md").read_text(), re.DOTALL)
    exec(compile(example, "library.md", "exec"), {})
    assert capsys.readouterr().out.count("->") == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_and_fields_named_in_the_docs_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:clip_jax|configs|docs|launch|tests|benchmarks)/[\w/.]+)`", text):
        assert (REPO / path).exists(), path
    files = {REPO / path for path in re.findall(r"configs/\w+\.py", text)}
    configs = [
        config.base(),
        config.load(str(REPO / "configs" / "clip.py:small")),
        *(config.load(str(path)) for path in sorted(files) if path.exists()),
    ]  # none is called METHOD.py
    for key in re.findall(r"--config\.([a-z_.]+)=", text):
        assert any(has(c, key) for c in configs), key


def has(section, key):
    for part in key.split("."):
        if part not in section:
            return False
        section = section[part]
    return True
