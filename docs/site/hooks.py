"""What mkdocs.yml adds to the pages of `docs`: pages of the top level, the API reference, and links."""

import ast
import functools
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
#: Tags of HTML whose text gets no links.
CLOSED = {"a", "code", "pre", "h1", "h2", "h3", "h4", "script", "style"}


@functools.cache
def modules():
    """Returns `{module: its docstring}` of the package, without other names of commands and `tools/build`."""
    found = {}
    for file in sorted((ROOT / "clip_jax").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        code = file.read_text()
        if not parts[-1].startswith("__") and parts[1:3] != ("tools", "build") and "\nimport runpy\n" not in code:
            found[".".join(parts)] = ast.get_docstring(ast.parse(code)) or ""
    return found


def reference(module):
    """Returns the page of a module."""
    path = module.removeprefix("clip_jax.").replace(".", "/")
    return f"reference/{path}{'_module' * path.endswith('/index')}.md"  # index.md would be the page of its package


def on_config(config):
    """Adds the API reference to the navigation, packages as sections."""
    tree = {}
    for module in modules():
        *packages, name = module.split(".")[1:]
        section = tree
        for package in packages:
            section = section.setdefault(package, {})
        section[f"{name} "] = reference(module)  # a module may have the name of a package
    config.nav.insert(-2, {"API": ["reference/index.md", *_nav(tree)]})


def _nav(tree):
    return [{name.strip(): _nav(item) if isinstance(item, dict) else item} for name, item in tree.items()]


def overview():
    """Returns the first page of the reference: the modules, and the first sentence of each."""
    rows = ["# API", "", "`clip_jax.load` and `clip_jax.Model` are those of [`clip_jax.inference`](inference.md).", ""]
    rows += ["| module | |", "|---|---|"]
    for module, text in modules().items():
        first = re.split(r"(?<=\.)\s|: `python |\n\n", text)[0].replace("\n", " ").replace("|", "\\|")
        rows.append(f"| [`{module}`]({reference(module).removeprefix('reference/')}) | {first} |")
    return "\n".join(rows)


def on_files(files, config):
    """Adds the pages."""
    links = {"](docs/": "]("} | {f"]({name})": f"]({page})" for name, page in PAGES.items()}
    texts = {page: _replaced((ROOT / name).read_text(), links) for name, page in PAGES.items()}
    texts |= {reference(module): f"# `{module}`\n\n::: {module}\n" for module in modules()}
    texts["reference/index.md"] = overview()
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))


def _replaced(text, parts):
    for old, new in parts.items():
        text = text.replace(old, new)
    return text


def on_page_markdown(markdown, page, config, files):
    """Lets links to a folder lead to its README."""
    folders = {posixpath.dirname(f.src_uri) for f in files if posixpath.basename(f.src_uri) == "README.md"}

    def link(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        return f"]({match[1]}/README.md)" if target in folders else match[0]

    return re.sub(r"\]\(([\w/.]+)\)", link, markdown)


def on_page_content(html, page, config, files):
    """Makes links of the pages that a text names, such as docs/data.md."""
    parts, closed = re.split(r"(<[^>]+>)", html), 0
    for i, part in enumerate(parts):
        if tag := re.match(r"<(/?)(\w+)", part):
            closed += (tag[2] in CLOSED) * (-1 if tag[1] else 1)
        elif not closed:
            parts[i] = re.sub(r"\bdocs/([\w/]+\.md)", lambda m: _link(m, page, files), part)
    return "".join(parts)


def _link(match, page, files):
    target = files.get_file_from_path(match[1])
    return f'<a href="{target.url_relative_to(page.file)}">{match[0]}</a>' if target else match[0]
