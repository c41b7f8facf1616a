"""Methods, data sources and evaluation tasks are modules: of this package by name, of a user by import path."""

import ast
import importlib
import importlib.util
import pkgutil
import re

from clip_jax.errors import UserError


def find(path):
    """The module at an import path such as `my_package.my_source`, or None when there is none."""
    try:
        spec = importlib.util.find_spec(path)
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or is no package
        spec = None
    return None if spec is None else importlib.import_module(path)


def load(name, package, function):
    """The module that a name stands for: a module of `package`, or with a dot in its name the import path of a user's.

    Args:
      name: such as `clip` or `my_package.my_method`.
      package: a package of this project, such as `clip_jax.methods`.
      function: the name of the function that the module must have.

    Raises UserError, which lists the modules of the package, when there is no such module or it lacks the function.
    """
    module = find(name if "." in name else f"{package}.{name}")
    if module is not None and hasattr(module, function):
        return module
    if module is not None and "." in name:
        raise UserError(f"{name!r}: the module has no function {function!r}")
    raise UserError(f"{name!r} is neither one of {', '.join(names(package, function))} nor the import path of a module")


def names(package, function):
    """The names of the modules of a package that have a function, sorted."""
    modules = (m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
    return sorted(name for name in modules if hasattr(importlib.import_module(f"{package}.{name}"), function))


def parse_call(text, what):
    """Reads `name` or `name(arguments)` with Python literals, where the name may be an import path.

    Returns `(name, args, kwargs)`. Raises UserError, which begins with `what`.
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
        f"{what}: cannot read {text!r}; write name or name(arguments), arguments being numbers, strings or tuples of them"
    )
