"""What README and docs name is there; `test_documents.py` runs what they show."""

import re

import pytest
from conftest import REPO

from clip_jax import config

DOCS = sorted((REPO / "docs").glob("*.md"))
PAGES = [*(REPO / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *DOCS]


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
    for key in re.findall(r"--config\.([a-z0-9_.]+)=", text):
        assert key.startswith("my_") or any(has(c, key) for c in configs), key


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_readme_is_short_and_leads_to_every_page():
    text = (REPO / "README.md").read_text()
    assert len(text.split()) <= 700
    assert {f"docs/{page.name}" for page in DOCS} <= set(re.findall(r"\((docs/\w+\.md)\)", text))
    assert (REPO / "docs" / "report.png").stat().st_size < 150_000


def test_the_site_has_every_page_in_the_order_of_the_readme():
    nav = re.findall(r"(?:- |: )([\w/]+\.md)$", (REPO / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [page.relative_to(REPO / "docs").as_posix() for page in (REPO / "docs").rglob("*.md")]
    assert sorted(nav) == sorted([*pages, "index.md", "changelog.md", "contributing.md"])
    order = re.findall(r"\(docs/(\w+\.md)\)", (REPO / "README.md").read_text().partition("## Documentation")[2])
    assert [page for page in nav if page in order] == order


def has(section, key):
    for part in key.split("."):
        if part not in section:
            return False
        section = section[part]
    return True
