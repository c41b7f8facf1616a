"""The documentation site: it builds without a warning, no link is broken, and it fetches nothing from elsewhere."""

import os
import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from conftest import REPO

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")


class Html(HTMLParser):
    """The links of a page, the files that a browser fetches for it, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.fetched = set(), set()
        self.anchors = {"", "__skip"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.links |= {attributes["href"]} if tag == "a" and "href" in attributes else set()
        fetched = attributes.get("href") if tag == "link" and attributes.get("rel") != "canonical" else None
        self.fetched |= {fetched or attributes.get("src")} - {None}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`{path: Html}` of the built pages, and the folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    pages = {file.relative_to(folder).as_posix(): Html(file.read_text()) for file in folder.rglob("*.html")}
    return folder, pages


def test_no_link_is_broken(site):
    folder, pages = site
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # its addresses begin at the root of the server
            continue
        for link in page.links | page.fetched:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data") or link.startswith("javascript:"):
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
            target = target if parts.path else name
            if not (folder / target).is_file():
                broken.append(f"{name}: {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{name}: {link}: no such anchor")
    assert not broken
    assert {"index.html", "data.html", "recipes/index.html", "reference/inference.html"} <= pages.keys()


def test_texts_and_docstrings_that_name_a_page_lead_to_it(site):
    _, pages = site
    assert "checkpoints.html" in pages["launching.html"].links  # "(docs/checkpoints.md)"
    assert "../scaling.html" in pages["reference/compile.html"].links


def test_nothing_is_fetched_from_elsewhere(site):
    _, pages = site
    assert not {link for page in pages.values() for link in page.fetched if urlsplit(link).netloc}


def test_the_reference_has_every_public_function(site):
    import ast

    _, pages = site
    for module in ("inference", "data/records", "losses/contrastive", "methods/interface", "runtime/storage"):
        tree = ast.parse((REPO / "clip_jax" / f"{module}.py").read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        path = f"clip_jax.{module.replace('/', '.')}"
        public = {f"{path}.{name}" for name in names if not name.startswith("_")}
        assert public and public <= pages[f"reference/{module}.html"].anchors
