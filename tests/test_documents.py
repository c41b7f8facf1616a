"""README and docs: their shell and Python blocks run as printed, on small data.

A block is fenced or indented. Not run are blocks below `<!-- not run: reason -->`, and blocks that show no commands:
output, fields, the path of a batch.

Changed in each block: `/data` is the folder `data` of a fixture, `/weights/NAME` and runs that no earlier command made
are one tiny trained run, a range of shards such as `{00000..00331}` ends at 1, and tools read a 99th of the embedded
sets.

- Python: executed, the blocks of a page one after the other in one namespace. One whose first line is `# FILE.py` is
  written there.
- `python -m clip_jax...` and `clip-jax ...`: its `main` is called in this process. Trainings are checked by
  `train.parse_args` and `preflight.make_parts`: the configuration, its options, data, tokenizer and method. Those of
  `TRAINED` train a step or two of tiny towers. `clip_jax.study` and `clip_jax.compile` load their configuration; both
  take minutes.
- `bash launch/...`: with `--dry-run`, or as it stands with `--help`.
- `python benchmarks/...`: with `--help` behind the printed arguments, so that these are parsed.
- other commands, such as `printf`: by bash.
"""

import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPO
from document_helpers import write_data
from helpers import TINY, tiny_config

from clip_jax import compile as compiler
from clip_jax import config as config_lib
from clip_jax import preflight, study, train
from clip_jax.__main__ import COMMANDS

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
#: The trainings of each page that are run.
TRAINED = {
    "README": ("runs/mine",),
    "checkpoints": ("runs/a", "runs/b"),
}
COMMAND = re.compile(r"([A-Z_]+=\S+ )?(python|clip-jax|bash|pip|docker|export|printf|tfds) ")


def blocks(text):
    """Yields `(line, kind, code, marked)` of each block: kind is "shell" or "python", line its number in the page."""
    lines, mark, i = text.splitlines() + [""], False, 0
    while i < len(lines):
        line, start = lines[i], i
        if line.startswith("<!-- not run: "):
            mark = True
        elif line.startswith("```"):
            end = lines.index("```", i + 1)
            code, language = "\n".join(lines[i + 1 : end]), line[3:]
            i = end
        elif line.startswith("    ") and not lines[i - 1].strip():
            body = list(itertools.takewhile(lambda x: x.startswith("    ") or not x.strip(), lines[i:]))
            code, language = "\n".join(x[4:] for x in body).rstrip(), ""
            i += len(body) - 1
        if i > start or line.startswith("    ") and not lines[start - 1].strip():
            if language == "python":
                yield start + 1, "python", code, mark
            elif language == "bash" or not language and COMMAND.match(code):
                yield start + 1, "shell", code, mark
            mark = False
        elif line.strip() and not line.startswith("<!--"):
            mark = False
        i += 1


def commands(code):
    """Returns the commands of a shell block, continued lines joined and comments left out."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder in which commands run: `data`, pictures, links to configs and launch, and `clip`, a trained tiny run."""
    root = tmp_path_factory.mktemp("documents")
    for name in ("configs", "launch", "benchmarks"):
        (root / name).symlink_to(REPO / name)
    write_data(root)
    task = "retrieval(source='emoji', split='val_seen_vendor', limit=16)"
    values = ["train.steps=1", "data.workers=0", "eval.batch_size=16", f'eval.tasks=("{task}",)']
    train.train(tiny_config(*values, "checkpoint.best=retrieval/loss"), root / "clip", lambda line: None)
    return root


class Session:
    """Runs the blocks of one page in a folder."""

    def __init__(self, root, monkeypatch, trained):
        self.root, self.monkeypatch = root, monkeypatch
        self.trained, self.names = trained, {}

    def run(self, kind, code):
        code = re.sub(r"(?<![\w.])/data\b", str(self.root / "data"), code)
        code = re.sub(r"\{(0+)\.\.\d+\}", lambda m: f"{{{m[1]}..{m[1][1:]}1}}", code)
        code = re.sub(r"/weights/[\w.-]+", "runs/weights", code)
        self.make_runs(code)
        if kind == "python" and (file := re.match(r"# ([\w/]+\.py)\n", code)):
            path = self.root / file[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(code)
        elif kind == "python":
            exec(compile(code, "block", "exec"), self.names)
        else:
            for command in commands(code):
                self.shell(command)

    def shell(self, command):
        words = shlex.split(re.sub(r"\s#\s.*", "", command))
        if words[0] == "export":
            for word in words[1:]:
                self.monkeypatch.setenv(*word.split("=", 1))
        elif words[:2] == ["python", "-m"]:
            self.module(words[2], words[3:])
        elif words[0] == "clip-jax":
            self.module({n: m for group in COMMANDS.values() for n, (m, _) in group.items()}[words[1]], words[2:])
        else:
            if words[0] == "bash" and "--help" not in words:
                place = 3 if words[1].endswith(("tpu.sh", "gke.sh")) else 2
                words.insert(min(place, len(words)), "--dry-run")
                command = shlex.join(words)
            elif words[0] == "python":
                assert words[1].startswith("benchmarks/"), command
                command = shlex.join([sys.executable, *words[1:], "--help"])
            folder = REPO if words[0] == "bash" else self.root  # the launchers read git's revision
            done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise AssertionError(f"{command}: {done.stderr}")
            if words[0] == "python":  # --help ends the parser before it sees unknown flags
                for flag in re.findall(r" (--(?!config[.])[\w-]+)", shlex.join(words)):
                    assert re.search(rf"(?m)^ +{flag}(?![\w-])", done.stdout), f"{command}: there is no {flag}"

    def module(self, name, arguments):
        name = name.replace("clip_jax.data.", "clip_jax.tools.")  # a short name of the same command
        options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
        if name == "clip_jax.train" and options["workdir"] not in self.trained:
            # A region has an embedding of the encoder and 4 numbers of a box; the tiny run's embeddings are 16 wide.
            arguments = [a.replace("region_dim=132", "region_dim=20") for a in arguments]
            config = train.parse_args(arguments)[0]
            preflight.make_parts(config)
        elif name == "clip_jax.compile":
            compiler.parse_args(arguments)
            config_lib.load(options["config"])
        elif name == "clip_jax.study":
            args, _ = study.parse_args(arguments)
            assert args.report or study.load(args.config).rows
        else:
            if name.startswith("clip_jax.tools."):
                arguments = [re.sub("(=)(emoji|openclipart)$", r"\1\2?part=record:1/99", a) for a in arguments]
            elif name == "clip_jax.train":
                short = [*TINY, "train.steps=1"] if "fork-from" not in options else ["train.steps=2"]
                arguments = arguments + [f"--config.{o}" for o in [*short, "data.workers=0"]]
            if importlib.import_module(name).main(arguments):
                raise AssertionError(" ".join([name, *arguments]))

    def make_runs(self, code):
        """Puts the tiny run where a command reads a run that is not there."""
        for run in re.findall(r"(?<!workdir=)(?<!out=)\bruns/\w+", code):
            if run not in self.trained and not (self.root / run).exists():
                shutil.copytree(self.root / "clip", self.root / run)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tree / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
    session = Session(tree, monkeypatch, TRAINED.get(page.stem, ()))
    for line, kind, code, marked in blocks(page.read_text()):
        if marked:
            continue
        assert "--serve" not in code, f"{page.name}:{line}: serves until Ctrl-C"
        try:
            session.run(kind, code)
        except SystemExit as error:  # --help
            assert error.code == 0, f"{page.name}:{line}: {capsys.readouterr().err}"
        except Exception as error:
            pytest.fail(f"{page.name}:{line}: {error!r}\n{capsys.readouterr().err[-500:]}", pytrace=False)
    shutil.rmtree(tree / "runs", ignore_errors=True)


def test_what_counts_as_a_block():
    text = """
Text.

    python -m a --x=1 \\
        --y=2   # a comment
    bash b.sh

    loss 1.5

```python
c = 1
```

<!-- not run: a download -->

    pip install d

```
printf e
```

- an item
    of a list

```text
python f
```
"""
    found = list(blocks(text))
    assert [(kind, code.split()[0], marked) for _, kind, code, marked in found] == [
        ("shell", "python", False),
        ("python", "c", False),
        ("shell", "pip", True),
        ("shell", "printf", False),
    ]
    assert [line for line, *_ in found] == [4, 10, 16, 18]
    assert commands(found[0][2])[:2] == ["python -m a --x=1      --y=2   # a comment", "bash b.sh"]
