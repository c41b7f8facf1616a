"""The files that `--config` names: those of the user, and the configurations that come with this package."""

import glob
import os

from clip_jax.errors import UserError, did_you_mean


def folder(name):
    """Returns `configs` or `launch`: beside the package in a checkout, inside it where a wheel was installed."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside, beside = (os.path.join(parent, name) for parent in (package, os.path.dirname(package)))
    return inside if os.path.isdir(inside) else beside


def shipped():
    """Returns `{name: file}` of the configurations of this package, such as `clip` and `studies/methods`."""
    configs = folder("configs")
    files = sorted(glob.glob(os.path.join(configs, "**", "*.py"), recursive=True))
    return {os.path.relpath(file, configs).removesuffix(".py").replace(os.sep, "/"): file for file in files}


def find(path):
    """Returns the file that a `--config` without its variant names.

    A file wins; else `configs/clip.py`, `clip.py` and `clip` name the configuration of this package. Raises UserError.
    """
    if path.endswith(".py") and os.path.isfile(path):
        return path
    files, name = shipped(), os.path.normpath(path).replace(os.sep, "/")
    name = name.removesuffix(".py").removeprefix("configs/")
    if name not in files:
        known = f"{did_you_mean(name, files)}; the package has {', '.join(files)}"
        raise UserError(f"--config={path}: there is no file {path!r}{known}")
    return files[name]


def spec_of(spec, is_absolute=False):
    """Returns the `--config` of `spec` for a command in the current folder: `configs/...` names a shipped file.

    Args:
      spec: `FILE[:VARIANT]`.
      is_absolute: gives a file of the user its absolute path, for a command in any folder.
    """
    path, colon, variant = spec.partition(":")
    file = os.path.abspath(find(path))
    for name, known in shipped().items():
        if known == file and os.path.abspath(find(f"configs/{name}.py")) == file:  # no other file hides it
            return f"configs/{name}.py{colon}{variant}"
    return (file if is_absolute else os.path.relpath(file)) + colon + variant
