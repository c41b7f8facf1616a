"""What an installation gives: the command `clip-jax`, the configurations in the wheel, one version."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import REPO

from clip_jax import __main__ as cli
from clip_jax import config, config_files, study
from clip_jax.errors import UserError
from clip_jax.version import __version__

MODULES = {name: module for group in cli.COMMANDS.values() for name, (module, _) in group.items()}


def python(code, *arguments, folder, path):
    """Runs code in another folder with the package of `path`; returns its lines."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_command_of_the_package_has_a_name():
    files = {file: file.read_text() for file in (REPO / "clip_jax").rglob("*.py")}
    found = {file for file, text in files.items() if '\nif __name__ == "__main__":\n' in text}
    found -= {file for file in found if "runpy.run_module(" in files[file] or file.parent.name == "build"}
    modules = {".".join(file.relative_to(REPO).with_suffix("").parts) for file in found}
    assert set(MODULES.values()) == modules - {"clip_jax.kernel_cycles"}  # a process that clip_jax.compile starts
    assert all(module.rpartition(".")[2] == name for name, module in MODULES.items() if name != "launch")


def test_the_help_imports_nothing_that_takes_time(tmp_path):
    code = "import atexit, sys; sys.argv[1:] = ['--help']; atexit.register(lambda: print(*sys.modules))"
    code += "; from clip_jax.__main__ import script; script()"
    *usage, imported = python(code, folder=tmp_path, path=REPO)
    assert usage[0].startswith("usage: clip-jax COMMAND")
    assert all(any(line.startswith(f"  {name} ") for line in usage) for name in MODULES)
    assert not {"jax", "numpy", "ml_collections", "argparse"} & set(imported.split())


def test_a_command_gets_its_arguments_and_returns_its_status(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/clip-jax", "train-tokenizer", "--help"])
    with pytest.raises(SystemExit) as error:
        cli.main()
    text = capsys.readouterr().out
    assert error.value.code == 0 and text.startswith("usage: clip-jax train_tokenizer ")
    assert "    clip-jax train_tokenizer --source=" in text and "python -m" not in text
    assert cli.main(["compare", "runs/a"]) == 2
    assert "name two work folders" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: clip-jax has no command 'trian' (did you mean 'train'?)\n"
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"clip-jax {__version__}\n"


def test_launchers_get_the_folder_of_their_files_and_this_python(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(os, "execvp", lambda program, arguments: calls.append((program, *arguments)))
    for variable in ("CLIP_JAX_LAUNCH", "CLIP_JAX_PYTHON"):
        monkeypatch.setenv(variable, "")
    cli.main(["launch", "slurm", "--dry-run"])
    assert calls == [("bash", "bash", str(REPO / "launch" / "slurm.sh"), "--dry-run")]
    assert (os.environ["CLIP_JAX_LAUNCH"], os.environ["CLIP_JAX_PYTHON"]) == (str(REPO / "launch"), sys.executable)
    assert cli.main(["launch", "tpu"]) == 2
    assert capsys.readouterr().err == "error: clip-jax launch: no launcher 'tpu'; allowed: gke, slurm\n"


def test_a_file_wins_over_a_configuration_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = str(REPO / "configs" / "clip.py")
    (tmp_path / "clip").write_text("no configuration")
    for path in ("clip", "clip.py", "configs/clip.py", "./configs/clip.py", theirs):
        assert config_files.find(path) == theirs and config_files.spec_of(f"{path}:emoji") == "configs/clip.py:emoji"
    assert config_files.find("studies/methods") == str(REPO / "configs" / "studies" / "methods.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "clip.py").write_text((REPO / "configs" / "flip.py").read_text())
    assert config_files.find("configs/clip.py") == config_files.spec_of("configs/clip.py") == "configs/clip.py"
    assert config_files.spec_of(f"{theirs}:emoji") == f"{os.path.relpath(theirs)}:emoji"
    assert config_files.spec_of("siglip") == "configs/siglip.py"


@pytest.mark.parametrize("path", ["clp", "configs/clp.py", "../setup", "/configs/clip.py"])
def test_a_wrong_name_lists_the_configurations_of_the_package(path):
    with pytest.raises(UserError, match="there is no file .*; the package has align, .*, studies/methods, ") as error:
        config.load(f"{path}:smoke")
    assert "\n" not in str(error.value) and ("clp" not in path or "did you mean 'clip'" in str(error.value))


def test_a_study_names_its_configurations_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = study.load("studies/methods").rows
    assert [config_files.spec_of(row.config) for row in rows][:2] == ["configs/clip.py:emoji", "configs/siglip.py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an unpacked wheel."""
    if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("setuptools is older than 70.1 and cannot build a wheel (pip install -U setuptools)")
    folder = tmp_path_factory.mktemp("wheel")
    for name in (
        "clip_jax",
        "configs",
        "launch",
    ):  # a build leaves files beside its sources, which a later one would take
        shutil.copytree(REPO / name, folder / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPO / name, folder / "sources")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", ".", "./sources"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    assert file.name.split("-")[1] == __version__
    zipfile.ZipFile(file).extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_wheel_contains_the_package_its_configurations_and_the_command(wheel):
    package = wheel / "clip_jax"
    for inside, outside in (("", "clip_jax"), ("configs", "configs")):
        found = {file.relative_to(package / inside) for file in (package / inside).rglob("*.py")}
        wanted = {file.relative_to(REPO / outside) for file in (REPO / outside).rglob("*.py")}
        assert wanted <= found
    assert {path.name for path in wheel.iterdir()} == {"clip_jax", f"clip_jax_pretraining-{__version__}.dist-info"}
    (entry,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "clip-jax = clip_jax.__main__:script" in entry.read_text()
    assert {file.name for file in (package / "launch").iterdir()} == {
        *("common.sh", "venv.sh"),
        *(f"{name}.sh" for name in cli.LAUNCHERS),
    }
    data = {file.relative_to(REPO) for file in (REPO / "clip_jax").rglob("*") if file.suffix in (".html", ".json")}
    assert data and all((wheel / file).is_file() for file in data)


def test_a_wheel_finds_its_configurations_in_any_folder(wheel, tmp_path):
    code = """
import sys
from clip_jax import config, config_files, study
for spec in sys.argv[1:]:
    print(config_files.find(spec.partition(":")[0]))
    config.load(spec)
for row in study.load("configs/oner.py:ablation").rows[:1]:
    print(config_files.spec_of(row.config))
"""
    specs = ["clip:smoke", "configs/clip.py:smoke", "siglip.py:smoke"]  # which starts from the clip.py beside it
    *files, row = python(code, *specs, folder=tmp_path, path=wheel)
    assert files == [str(wheel / "clip_jax" / "configs" / f"{name}.py") for name in ("clip", "clip", "siglip")]
    assert row.startswith("configs/oner.py:small_")


def test_there_is_one_version():
    assert re.search(r"^version: (\S+)$", (REPO / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__
    assert re.search(r"^## (\S+)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__
