"""The worked example of docs/adding_a_task.md runs as a task of its own, without any change to the package."""

import re
import subprocess
import sys

from conftest import REPO
from helpers import Page, tiny_config

from clip_jax import train

TASK = "my_package.duplicates(source='emoji', split='val_unseen_vendor', limit=20, threshold=-1.0)"


def test_the_example_runs_by_its_import_path_and_is_shown(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "adding_a_task.md").read_text(), re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "duplicates.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config("train.steps=1", "eval.report=true")
    config.eval.tasks = (TASK,)
    lines = []
    metrics = train.train(config, tmp_path / "run", lines.append)
    assert metrics["duplicates/share"] == 1.0 and metrics["duplicates/images"] == 20
    assert "  duplicates: 100.0% of the images have a near duplicate" in lines
    page = Page((tmp_path / "run" / "report.html").read_text("utf-8"))
    assert "Near duplicates 100.0 % of the images have one." in page.text and "Other metrics" not in page.text
    assert page.find("section", id="duplicates") and "The pairs of images with the highest cosine" in page.text
    assert len(page.find("i", role="img")) == 24


def test_task_strings_are_checked_before_jax_loads():
    code = """if True:
        import sys
        from clip_jax import evaluate
        from clip_jax.errors import UserError
        for name in ("emoji()", "zeroshot('x')", "retrieval('x')", "relations()", "probe('x', 'y')", "knn('x', 'y')"):
            evaluate.parse_task(name)
        try:
            evaluate.parse_task("zeroshot(sorce='x')")
        except UserError:
            sys.exit("jax" in sys.modules)
        """
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
