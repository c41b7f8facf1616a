"""Loads methods, data sources and evaluation tasks: modules of this package by name, others by import path."""

import ast
import importlib
import importlib.util
import pkgutil
import re

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
      name: a module of `package`, such as `clip`, or else an import path, such as `my_package.my_method`.
      package: a package of this project, such as `clip_jax.methods`.
      function: the name of the function that the module must define.

    Raises UserError when the module is missing or lacks the function. The message lists the modules of the package.
    """
    module = ("." not in name and find(f"{package}.{name}")) or find(name)
    if module is not None and hasattr(module, function):
        return module
    if module is not None and not module.__name__.startswith(f"{package}."):
        raise UserError(f"{name!r}: the module {module.__name__} has no function {function!r}")
    raise UserError(f"{name!r} is neither one of {', '.join(names(package, function))} nor the import path of a module")


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
