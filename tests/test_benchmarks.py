"""Benchmarks: tables, files, charts, and equal models on both sides of a comparison; not the figures."""

import importlib
import json
import pathlib
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from absl import logging
from helpers import TINY

from clip_jax import config as config_lib

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
names = ("common", "fuzz", "retrieval", "train_step")
common, fuzz, retrieval, train_step = map(importlib.import_module, names)

#: Modules that others use.
PARTS = ("common.py", "parity_towers.py")
COMMANDS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name not in PARTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_is_documented_and_explains_itself(name, monkeypatch, capsys):
    assert f"benchmarks/{name}" in (BENCHMARKS / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # some set it, and it is restored
    monkeypatch.setattr(logging, "set_verbosity", lambda level: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


def test_the_readers_bear_a_second_of_fuzzing(tmp_path):
    assert fuzz.main(["--minutes=0.015", "--seed=3", f"--json={tmp_path}/x.json"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["reader"] for row in rows] == list(fuzz.READERS)
    assert all(row["rounds"] >= 1 and row["records"] and not row["failures"] for row in rows)


def test_fuzzing_reports_a_wrong_record(monkeypatch, capsys):
    def wrong(rng, folder, counts):
        fuzz.expect(["a"], ["b"], "captions")

    monkeypatch.setattr(fuzz, "READERS", {"table": wrong})
    assert fuzz.main(["--round=table:7"]) == 1
    assert capsys.readouterr().out == "FAILED: --seed=0 --round=table:7: captions: ['a'] instead of ['b']\n"


def test_report_is_a_table_and_a_file(tmp_path, capsys):
    report = common.Report({"batch": ">8,", "time": ">6.2f"}, dtype="float32")
    report.header()
    report.add(batch=4096, time=1.234, more="kept")
    report.add(batch=8192, time=None)
    report.write(tmp_path / "new" / "x.json")
    assert capsys.readouterr().out.splitlines()[:3] == ["   batch    time", "   4,096    1.23", "   8,192       -"]
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written["rows"] == [{"batch": 4096, "time": 1.234, "more": "kept"}, {"batch": 8192, "time": None}]
    assert written["dtype"] == "float32" and written["versions"]["jax"] and written["command"].startswith("python ")


@pytest.mark.parametrize("log_y", [False, True])
def test_line_chart_draws_every_line_inside_of_its_axes(tmp_path, log_y):
    series = {"a < b": [(8, 1.0), (16, 20.0), (256, 300.0)], "c": [(8, 2.0), (256, 2.0)]}
    common.line_chart(tmp_path / "x.svg", "title & more", "chips", "ms", series, log_y)
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    lines = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [3, 2]
    points = [tuple(map(float, point.split(","))) for line in lines for point in line]
    assert all(70 <= x <= 540 and 40 <= y <= 345 for x, y in points)
    assert points[0][1] > points[1][1] > points[2][1] and points[3][1] == points[4][1]  # y grows downwards
    assert "title & more" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_unknown_argument_is_refused(capsys):
    parser = common.make_parser("doc", "name")
    assert common.parse(parser, ["--config.a.b=1", "--config.c", "2"]).overrides == ["a.b=1", "c=2"]
    with pytest.raises(SystemExit):
        common.parse(parser, ["--batchs=3"])
    assert "'--batchs=3'" in capsys.readouterr().err


def test_open_clip_gets_our_sizes():
    config = config_lib.load("configs/clip.py:b32")
    config = config.copy_and_resolve_references().unlock()
    config.model.text.update(dict(vocab_size=49408, eot_id=49407))
    assert train_step.open_clip_model(config) == dict(
        embed_dim=512, quick_gelu=True,
        vision_cfg=dict(layers=12, width=768, head_width=64, mlp_ratio=4.0, patch_size=32, image_size=224),
        text_cfg=dict(layers=12, width=512, heads=8, mlp_ratio=4.0, context_length=77, vocab_size=49408),
    )  # fmt: skip
    config.model.image.pool = "gap"
    assert train_step.open_clip_model(config) is None


def test_retrieval_is_measured_with_and_without_the_other_side(tmp_path, monkeypatch):
    command = ["--rows=600,37", "--dim=8", "--batch=4", "--k=5", "--repeats=2", f"--json={tmp_path}/x.json"]
    monkeypatch.setitem(sys.modules, "faiss", None)
    retrieval.main(command)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["rows"] for row in rows] == [600, 37]
    assert all(len(row["turns"]["ours"]) == 2 and "faiss" not in row for row in rows)

    values, numbers = np.array([[0.9, 0.8]]), np.array([[3, 1]])
    retrieval.check((values, numbers), (values + 1e-7, numbers[:, ::-1]))
    with pytest.raises(SystemExit, match="do not find the same: 50.00%"):
        retrieval.check((values, numbers), (values, numbers + [[0, 1]]))


def test_the_first_step_is_found_in_what_a_run_prints(tmp_path):
    flags = [f"--config.{override}" for override in TINY]
    command = [
        sys.executable,
        BENCHMARKS / "startup.py",
        "--configs=configs/clip.py:emoji",
        "--batch=16",
        f"--json={tmp_path / 'x.json'}",
    ]
    process = subprocess.run([*command, *flags], cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    stages = ("imports", "init", "data, compile", "first step")
    assert [row["cache"] for row in rows] == ["empty", "filled"]
    assert all(row[stage] > 0 for row in rows for stage in stages)
