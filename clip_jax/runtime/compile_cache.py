"""The cache of compiled steps: a step that an earlier start or another host has compiled is not compiled again.

The entries are those of JAX's compilation cache, of which this module uses the public settings and events. Whoever can
write to the cache can run code in a run that reads it.
"""

import contextlib
import functools
import logging
import os
import pathlib
import tempfile

from clip_jax.runtime import storage

#: The `compile.cache` that stands for this folder of the work folder.
WORKDIR, FOLDER = "workdir", "compilation_cache"
#: The variable with the folder of JAX's own cache, which replaces the default.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
#: JAX's event for a program that it found.
_FOUND = "/jax/compilation_cache/cache_hits"

logger = logging.getLogger(__name__)


def prepare(setting, workdir, environ=os.environ):
    """Returns the path of the cache, or None where this module has none.

    Args:
      setting: `compile.cache`.
      workdir: the work folder, a path.
      environ: the environment. Its `VARIABLE` replaces the default.

    Raises UserError when a folder or bucket of its own cannot be written, and StorageError when it fails.
    """
    if setting == WORKDIR:
        return None if environ.get(VARIABLE) else workdir / FOLDER
    return storage.prepare(setting, "compile.cache") if setting else None


def run(compile_step, place):
    """Returns `(compile_step(), whether JAX's cache had the program)`, however short the compilation is.

    Args:
      compile_step: a function that compiles one program.
      place: what `prepare` returned. None leaves JAX's own cache, where the user has set one.
    """
    found = _found()
    before = len(found)
    with _entries(place) as folder, _settings(folder):
        compiled = compile_step()
    return compiled, len(found) > before


@functools.cache
def _found():
    """Returns the list that gets an item for each program that JAX finds in its cache."""
    import jax

    found = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event) if event == _FOUND else None)
    return found


@contextlib.contextmanager
def _entries(place):
    """A context with the folder that JAX reads and writes, as text; None without a place.

    JAX writes a local entry piece by piece and never replaces one: what a kill leaves would stay. So it gets a
    temporary folder with links, and a new entry is copied as a whole. An object of a bucket is whole or not there.
    """
    if place is None or storage.is_remote(place):
        yield place and str(place)
        return
    place = place.absolute()
    with tempfile.TemporaryDirectory() as folder:
        known = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        for name in known:
            os.symlink(place / name, os.path.join(folder, name))
        yield folder
        try:
            for name in set(os.listdir(folder)) - known:
                storage.write(place / name, pathlib.Path(folder, name).read_bytes())
        except OSError as error:
            logger.warning("the compilation cache %s cannot be written: %s", place, error)


@contextlib.contextmanager
def _settings(folder):
    """A context in which JAX caches programs of any time and size, in a folder if one is given."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_compilation_cache_max_size": -1}
    if folder:
        # XLA would write its own cache beside the entries, which it cannot do in a bucket, and which a step that is
        # found does not need. Its path is also a part of the key of an entry.
        settings |= {"jax_compilation_cache_dir": folder, "jax_persistent_cache_enable_xla_caches": "none"}
    before = {name: getattr(jax.config, name) for name in settings}
    _set(settings)
    if folder:
        compilation_cache.reset_cache()
    try:
        yield
    finally:
        _set(before)
        if folder:
            compilation_cache.reset_cache()


def _set(settings):
    import jax

    for name, value in settings.items():
        jax.config.update(name, value)
