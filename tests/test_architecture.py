"""The structure of the package: no import circle, the arrows of docs/architecture.md, sizes, and one dialect."""

import ast
import functools
import re

import pytest
from conftest import FAST, LONGEST, REPO

MAX_LINES = {"clip_jax/train.py": 365, "clip_jax/methods/clip.py": 25}


@functools.cache
def trees():
    """The syntax tree of every module, `{"clip_jax.data.records": tree}`."""
    files = sorted((REPO / "clip_jax").rglob("*.py"))
    names = [".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return {name: ast.parse(file.read_text()) for name, file in zip(names, files, strict=True)}


@functools.cache
def imports():
    """The modules of the package that each module imports, at its top or inside a function."""
    found = {}
    for name, tree in trees().items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: relative import"
                found[name] |= {f"{node.module}.{alias.name}" for alias in node.names} & trees().keys() or {node.module}
        found[name] &= trees().keys() - {name}
    return found


@functools.cache
def rooms():
    """The table of docs/architecture.md: `{room: rooms that it may import}`."""
    text = (REPO / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a room stands twice in the table"
    return {room: set(re.findall(r"`([\w/]+)`", allowed)) for room, allowed in rows}


def room_of(module):
    """The room of a module: the longest name in the table that its path begins with."""
    path = module.removeprefix("clip_jax").lstrip(".").replace(".", "/") or "__init__"
    found = [room for room in rooms() if path == room or path.startswith(room + "/")]
    assert found, f"docs/architecture.md has no room for {module}"
    return max(found, key=len)


def test_there_is_no_import_circle():
    # Repeatedly removes the modules that import nothing that is left: what stays is in a circle or imports one.
    left = dict(imports())
    del left["clip_jax"]  # its attributes `load` and `Model` are imported when they are first used
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, sorted(left)


def test_imports_follow_the_arrows_of_the_documentation():
    arrows = {(room_of(a), room_of(b)) for a, targets in imports().items() for b in targets}
    forbidden = {(a, b) for a, b in arrows if a != b and b not in rooms()[a]}
    assert not forbidden
    # What the table allows is needed: an arrow that no import follows any more is taken out of it.
    assert {(a, b) for a, allowed in rooms().items() for b in allowed} <= arrows


def test_a_room_is_only_above_its_users():
    """The table itself has no circle."""
    left = dict(rooms())
    while free := [room for room, allowed in left.items() if not allowed & left.keys()]:
        for room in free:
            del left[room]
    assert not left


@pytest.mark.parametrize("name", trees())
def test_modules_are_short_and_in_one_dialect(name):
    tree, path = trees()[name], "/".join(name.split("."))
    file = next(f for f in (REPO / f"{path}.py", REPO / path / "__init__.py") if f.exists())
    assert len(file.read_text().splitlines()) <= MAX_LINES.get(f"{path}.py", 450)
    for node in ast.walk(tree):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{where}: {node.name} is longer than 80 lines"
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            assert not any(a and a.annotation for a in arguments) and not node.returns, f"{where}: an annotation"
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Tuple)
            and isinstance(node.targets[0], ast.Tuple)
        ):
            assert len(node.targets[0].elts) <= 2, f"{where}: more than two targets"
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        assert "``" not in (text or "") and ":func:" not in (text or ""), f"{where}: another kind of backticks"


@pytest.mark.parametrize("name", sorted({*FAST, *LONGEST}))
def test_the_lists_of_quick_and_long_tests_name_tests(name):
    file, _, test = name.partition("::")
    assert f"def {test or 'test_'}" in (REPO / "tests" / f"test_{file}.py").read_text()
