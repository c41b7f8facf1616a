"""Loads methods, data sources and evaluation tasks: modules of this package by name, others by import path."""

import ast
import hashlib
import importlib
import importlib.util
import logging
import os
import pathlib
import pkgutil
import re
import sys

from clip_jax.errors import UserError


def find(path):
    """Returns the module at an import path such as `my_package.my_source`, or None when it does not exist."""
    try:
        spec = importlib.util.find_spec(path)
    except (ModuleNotFoundError, ValueError):  # a parent is missing or is no package
        spec = None
    return None if spec is None else importlib.import_module(path)


def load(name, package, function):
    """Returns the module that a name stands for.

    Args:
      name: a module of `package`, such as `clip`, or else an import path, such as `my_package.my_method`. The current
        folder is the last one of the import path.
      package: a package of this project, such as `clip_jax.methods`.
      function: the name of the function that the module must define.

    Raises UserError when the module is missing or lacks the function. The message lists the modules of the package.
    """
    sys.path += {os.getcwd()} - {*sys.path}
    module = ("." not in name and find(f"{package}.{name}")) or find(name)
    if module is not None and hasattr(module, function):
        return module
    if module is not None and not module.__name__.startswith(f"{package}."):
        raise UserError(f"{name!r}: the module {module.__name__} has no function {function!r}")
    raise UserError(
        f"{name!r} is neither one of {', '.join(names(package, function))} nor the import path of a module; a module "
        "of your own lies in the current folder, beside the configuration, or on PYTHONPATH"
    )


def describe(name, package, function):
    """Returns what a checkpoint remembers of a user's module, None for a module of this project.

    Args: as for `load`.

    Returns: `{"name": import path, "path": absolute path of its file, "text": its content}`.
    """
    module = load(name, package, function)
    if module.__name__.startswith("clip_jax.") or not getattr(module, "__file__", None):
        return None
    path = os.path.abspath(module.__file__)
    return dict(name=module.__name__, path=path, text=pathlib.Path(path).read_text(encoding="utf-8"))


def recall(about, copy):
    """Makes a user's module importable again, where `describe` found it; warns when its content is another one now.

    Args:
      about: what `describe` returned.
      copy: the folder that holds a copy of the module, for the message.

    Raises UserError when the module is no longer found.
    """
    name, path = about["name"], pathlib.Path(about["path"])
    if find(name) is None and path.is_file():
        sys.path.append(os.fspath(path.parents[name.count(".") + (path.name == "__init__.py")]))
    if (module := find(name)) is None:
        raise UserError(f"the module {name!r} is missing, which was {path}; the run has a copy: set PYTHONPATH={copy}")
    found = pathlib.Path(module.__file__ or os.devnull)
    if _digest(found.read_text(encoding="utf-8")) != _digest(about["text"]):
        logging.getLogger(__name__).warning("%s differs from the module %r that this run was trained with", found, name)


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def names(package, function):
    """Returns the sorted names of the modules of a package that define a function."""
    modules = (m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return sorted(name for name in modules if hasattr(importlib.import_module(f"{package}.{name}"), function))


def parse_call(text, what):
    """Parses `name` or `name(arguments)`, whose arguments are Python literals and whose name may be an import path.

    Returns `(name, args, kwargs)`. Raises a UserError whose message begins with `what`.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        function, args, keywords = (
            (node.func, node.args, node.keywords) if isinstance(node, ast.Call) else (node, [], [])
        )
        name = ast.unparse(function)
        if re.fullmatch(r"\w+(\.\w+)*", name) and all(k.arg for k in keywords):
            return name, [ast.literal_eval(a) for a in args], {k.arg: ast.literal_eval(k.value) for k in keywords}
    except (SyntaxError, ValueError, AttributeError, TypeError):
        pass
    raise UserError(
        f"{what}: cannot read {text!r}; write name or name(arguments); arguments are numbers, strings or tuples of them"
    )
