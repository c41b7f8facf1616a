"""benchmarks/gpu.py on a CPU: its parts, their rows and failures, the summary of a trace; not the figures."""

import argparse
import importlib
import json
import sys

import jax
import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
gpu, train_step = map(importlib.import_module, ("gpu", "train_step"))


def test_every_part_has_a_limit_and_a_row_in_the_docs():
    assert {*gpu.CHECKS, *gpu.TIMED} == set(gpu.PARTS)
    # The checks run at once, the others one by one.
    assert max(gpu.CHECKS.values()) + sum(gpu.TIMED.values()) <= gpu.LIMIT < 540
    page = (REPO / "docs" / "gpu_checklist.md").read_text()
    assert all(f"| `{name}` | {limit} |" in page for name, limit in {**gpu.CHECKS, "loss": gpu.TIMED["loss"]}.items())


def test_a_part_runs_and_another_has_no_time(tmp_path, capsys):
    command = ["--platform=cpu", f"--json={tmp_path}/x.json"]
    assert gpu.main([*command, "--parts=import", "--limit=2000"]) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["open_clip layout", "zero-shot, random weights", "done"]
    assert rows[0]["values"]["tensors"] == 62 and rows[0]["values"]["largest difference from the CPU"] == 0
    assert rows[1]["values"]["colors/images"] == 64 and rows[1]["values"]["colors/chance_top1"] == 0.25
    capsys.readouterr()
    assert gpu.main([*command, "--parts=methods,loss", "--limit=4"]) == 1
    assert [row["values"][""] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == [
        "no time was left"
    ] * 2
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 2 parts done; failed: methods, loss"


def test_wrong_arguments_are_refused_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    for arguments, line in ((["--parts=b8"], "'b8' is none of methods"), ([], "nvidia-smi finds no GPU")):
        with pytest.raises(SystemExit) as end:
            gpu.main(arguments)
        assert end.value.code == 2 and line in capsys.readouterr().err


def test_attention_is_compared_with_float32(monkeypatch):
    monkeypatch.setattr(gpu, "ATTENTION", {"text": (1, 5, 2, 8, True)})
    rows = []
    with pytest.raises(gpu.Failure, match="without cuDNN .* text"):  # on a CPU there is none
        rows.extend(gpu.check_attention(argparse.Namespace(gpu=True)))
    ((name, row),) = rows
    assert name == "text" and 0 < row["plain value"] < 0.01 and 0 < row["plain gradient"] < 0.01 and not row["cuDNN"]


def test_the_line_of_a_failure_names_its_cause():
    text = (
        'Traceback\n  File "x.py", line 1\nValueError: a batch\nmore\nerror: the process ended; its message is above\n'
    )
    assert gpu.first_line(text) == "ValueError: a batch"
    assert gpu.first_line(ValueError("a\nb")) == "ValueError: a" and gpu.first_line("") == "it ended without a message"


def test_kernels_of_a_trace(tmp_path):
    x = jax.numpy.ones((128, 128))
    fn = jax.jit(lambda x: jax.numpy.sort(x @ x))
    fn(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        fn(x).block_until_ready()
    total, kernels = gpu.top_kernels(tmp_path)
    names = [name for name, _, _ in kernels]
    assert any("sort" in name for name in names) and not any(name[-1].isdigit() for name in names)
    assert total == pytest.approx(sum(ms for _, ms, _ in kernels)) and all(runs >= 1 for _, _, runs in kernels)


def test_the_environment_of_small_and_huge_pages():
    given = {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=2"}
    assert train_step.with_pages(given, None) == given
    assert train_step.with_pages(given, "small") == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.check=1"}
    assert train_step.with_pages({}, "huge") == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
