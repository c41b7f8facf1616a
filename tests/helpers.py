"""Helpers for tests of whole programs: a tiny run on the embedded images, commands, reports, random unit vectors."""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
from conftest import COMPILE_FAST, REPO

#: Overrides of a tiny run. With a constant learning rate, runs of any length are one program, compiled once. SGD has
#: half of AdamW's kernels; the tests that are about AdamW ask for it.
TINY = """
    model.embed_dim=16 model.image.stem=() model.image.patch=8 model.image.size=16 model.image.width=32
    model.image.heads=2 model.image.mlp_dim=64 model.image.depth=1 model.text.width=32 model.text.heads=2
    model.text.mlp_dim=64 model.text.depth=1 data.batch_size=16 train.steps=6 train.log_steps=1
    optim.name=sgd optim.lr=0.3 optim.schedule=constant optim.warmup_steps=0 checkpoint.steps=2 checkpoint.keep=2
    eval.tasks=() eval.report=false log.tensorboard=false
""".split()
ADAMW = ["optim.name=adamw", "optim.lr=3e-3"]


def tiny_config(*overrides):
    from clip_jax import config

    return config.load(str(REPO / "configs" / "clip.py:emoji"), [*TINY, *overrides])


def losses(workdir):
    """Returns `{step: loss}` of metrics.jsonl, with the last loss of a step that ran twice."""
    rows = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def interrupted(workdir, folder, step):
    """Copies a finished run as a kill after the checkpoint of `step` would have left it; returns `folder`."""
    shutil.copytree(workdir, folder)
    later = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit() and int(path.name) > step]
    assert later and (folder / "checkpoints" / str(step)).exists()
    for path in later:
        shutil.rmtree(path)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return folder


def unit(seed, *shape):
    """Returns random float32 vectors of unit length along the last axis."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def train_command(workdir, *overrides, config="configs/clip.py:emoji"):
    return [
        sys.executable,
        "-m",
        "clip_jax.train",
        f"--config={config}",
        f"--workdir={workdir}",
        *(f"--config.{o}" for o in [*TINY, *overrides]),
    ]


def run(command, **kwargs):
    """Runs a command in the repository's root on one CPU device; returns the finished process with its output."""
    env = {**os.environ, "XLA_FLAGS": COMPILE_FAST, **kwargs.pop("env", {})}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600, **kwargs)


def events(folder):
    """Returns `{(tag, step)}` of the TensorBoard files in a folder."""
    from tensorboardX.proto.event_pb2 import Event

    found = set()
    for file in folder.iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step) for value in event.summary.value}
            data = data[16 + length :]
    return found


class Page(HTMLParser):
    """A parsed HTML page; its elements must be nested properly.

    Attributes:
      elements: `[(tag, {attribute: value})]`.
      text: the text outside of scripts and styles.
      data: the JSON of the first script that is JSON.
    """

    VOID = {"meta", "img", "input", "source", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.words, self.scripts = [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(next(script for script in self.scripts if script.startswith("{")))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.words.append(data)

    def find(self, tag, **wanted):
        names = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        return [a for t, a in self.elements if t == tag and all(a.get(key) == value for key, value in names.items())]


def render(result, **options):
    """Returns the parsed report of an evaluation's result."""
    from clip_jax.evaluation.report import assembly

    return Page(assembly.render(result, **{"title": "a title"} | options))
