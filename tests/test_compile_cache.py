"""The cache of compiled steps: where it is, what it holds, and that a later start finds it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from clip_jax.errors import UserError
from clip_jax.runtime import compile_cache, hosts, storage
from clip_jax.training import metrics


def compile_sum():
    return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32)).compile()


@pytest.fixture
def slow_only():
    """JAX keeps only programs that take very long to compile."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1000.0)
    yield
    assert getattr(jax.config, name) == 1000.0  # as before
    jax.config.update(name, before)


def test_a_compiled_program_is_found_again(slow_only, tmp_path):
    """Also one that compiles in an instant; JAX's own cache is as before."""
    before = jax.config.jax_compilation_cache_dir
    place = tmp_path / "cache"
    found = [compile_cache.run(compile_sum, place)[1] for _ in range(2)]
    (entry,) = place.iterdir()
    assert found == [False, True] and entry.is_file() and not entry.is_symlink()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        compiled, found = compile_cache.run(compile_sum, place)
    assert not found and compiled(jnp.ones(3)).tolist() == [2, 2, 2]
    assert jax.config.jax_compilation_cache_dir == before


def test_a_cache_that_cannot_be_written_costs_a_warning(slow_only, monkeypatch, tmp_path, caplog):
    def write(place, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write", write)
    compiled, found = compile_cache.run(compile_sum, tmp_path / "cache")
    assert not found and compiled(jnp.ones(3)).tolist() == [2, 2, 2]
    assert f"the compilation cache {tmp_path}/cache cannot be written: No space left on device" in caplog.text


def test_where_the_cache_is(tmp_path):
    assert compile_cache.prepare("workdir", tmp_path, {}) == tmp_path / "compilation_cache"
    assert compile_cache.prepare("workdir", tmp_path, {"JAX_COMPILATION_CACHE_DIR": "/tmp"}) is None
    assert compile_cache.prepare("", tmp_path, {}) is None
    other = compile_cache.prepare(str(tmp_path / "other"), tmp_path, {"JAX_COMPILATION_CACHE_DIR": "/tmp"})
    assert other == tmp_path / "other" and other.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compile.cache=.*file cannot be written: File exists"):
        compile_cache.prepare(str(tmp_path / "file"), tmp_path, {})


@pytest.mark.parametrize(
    "found, hosts_in_all, words",
    [
        (0, 4, ""),
        (4, 4, ", found in the compilation cache"),
        (1, 4, ", found in the compilation cache by 1 of 4 hosts"),
    ],
)
def test_the_start_says_that_the_step_was_found(monkeypatch, found, hosts_in_all, words):
    monkeypatch.setattr(hosts, "count", lambda: hosts_in_all)
    state = types.SimpleNamespace(params={"img": {"kernel": np.ones((2, 3))}}, step=0)
    mesh = types.SimpleNamespace(shape={"data": 1})
    lines = list(metrics.describe_run(tiny_config(), 100, mesh, state, 16e9, 2**20, 1.23, found))
    assert f"step compiled in 1.2 s{words}: 1.00 GFLOP per example (forward and backward), 1 MiB per device" in lines
