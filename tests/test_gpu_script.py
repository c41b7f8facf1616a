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


def test_every_part_has_a_row_in_the_docs_and_the_checks_have_time():
    assert {*gpu.CHECKS, *gpu.TIMED, "method"} == set(gpu.PARTS)
    timed = [name for name in gpu.DEFAULT if name in gpu.TIMED]
    assert gpu.CHECKS_NEED <= gpu.LIMIT - sum(map(gpu.TIMED.get, timed)) and gpu.LIMIT < 540
    page = (REPO / "docs" / "gpu_checklist.md").read_text()
    assert all(f"| `{name}` |" in page for name in (*gpu.CHECKS, *gpu.TIMED))


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


def test_every_part_has_time_when_all_are_asked_for():
    names = [*gpu.CHECKS, *gpu.TIMED]
    run = gpu.Run(argparse.Namespace(limit=300, device="", platform=""), names)
    assert 300 - run.share * sum(gpu.TIMED.values()) == pytest.approx(run.share * gpu.CHECKS_NEED) and run.share < 1


def test_a_method_whose_process_dies_is_named(monkeypatch):
    ended = {"otter": ("it ended with SIGSEGV", "")}

    def run_part(name, args, seconds, add):
        add(args.method, {"last loss": 1.0})
        return ended.get(args.method)

    monkeypatch.setattr(gpu, "run_part", run_part)
    rows = gpu.check_methods(argparse.Namespace(methods=["clip", "otter"], cores=1))
    assert [next(rows), next(rows)] == [("clip", {"last loss": 1.0}), ("otter", {"error": "it ended with SIGSEGV"})]
    with pytest.raises(gpu.Failure, match="failed: otter$"):
        next(rows)


def test_wrong_arguments_are_refused_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    for arguments, line in ((["--parts=b8"], "'b8' is none of methods"), ([], "nvidia-smi finds no GPU")):
        with pytest.raises(SystemExit) as end:
            gpu.main(arguments)
        assert end.value.code == 2 and line in capsys.readouterr().err


def test_attention_is_compared_with_float32(monkeypatch):
    monkeypatch.setattr(gpu, "ATTENTION", {"text": (1, 6, 2, 8, True)})
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
