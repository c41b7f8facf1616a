"""The offline commands as a whole: their former names, and their help."""

import importlib
import runpy
import sys

import pytest
from conftest import REPO

MOVED = {
    "clip_jax.data.caption": "clip_jax.tools.caption",
    "clip_jax.data.filter": "clip_jax.tools.filter",
    "clip_jax.data.regions": "clip_jax.tools.regions",
    "clip_jax.data.rewrite": "clip_jax.tools.rewrite",
    "clip_jax.data.train_tokenizer": "clip_jax.tools.train_tokenizer",
    "clip_jax.interop.clip_benchmark": "clip_jax.tools.clip_benchmark",
    "clip_jax.interop.export": "clip_jax.tools.export",
    "clip_jax.training.hosts": "clip_jax.runtime.hosts",
}


def path(module):
    return REPO / f"{module.replace('.', '/')}.py"


@pytest.mark.parametrize("old", MOVED)
def test_a_former_name_runs_the_command(old):
    new, text = MOVED[old], path(old).read_text()
    assert path(new).is_file() and 'if __name__ == "__main__":' in path(new).read_text()
    assert f'print("{old} is now {new}", file=sys.stderr)\n' in text
    assert f'runpy.run_module("{new}", run_name="__main__", alter_sys=True)\n' in text


@pytest.mark.parametrize("old", ["clip_jax.data.filter", "clip_jax.interop.export"])
def test_a_former_name_prints_the_help_of_the_new_one(old, monkeypatch, capsys):
    new = MOVED[old]
    monkeypatch.setattr(sys, "argv", [old, "--help"])
    for module in (old, new):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as error:
        runpy.run_module(old, run_name="__main__", alter_sys=True)
    out, err = capsys.readouterr()
    assert error.value.code == 0 and err == f"{old} is now {new}\n"
    assert out.startswith(f"usage: python -m {new} ") and f"python -m {new} --" in out.split("options:")[0]


def test_the_manifest_command_is_found_beside_the_data(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["manifest", "--help"])
    monkeypatch.delitem(sys.modules, "clip_jax.tools.manifest", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module("clip_jax.data.manifest", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith("usage: python -m clip_jax.data.manifest ")


@pytest.mark.parametrize(
    "name",
    "balance caption clip_score dedup export filter manifest regions rewrite to_parquet train_tokenizer".split(),
)
def test_every_argument_has_a_help_text(name, capsys):
    main = importlib.import_module(f"clip_jax.tools.{name}").main
    with pytest.raises(SystemExit):
        main(["--help"])
    options = capsys.readouterr().out.split("options:\n")[1].splitlines()
    for line, following in zip(options, [*options[1:], ""], strict=True):
        if line.startswith("  --"):
            assert len(line.split("  ")) > 2 or following.startswith(" " * 20), line
